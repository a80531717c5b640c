import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from toy_pairs import TRAIN, toy_batches, toy_network
from toy_streams import streams_of, with_

from l2l_core.core.images import IMAGE_CACHE_BYTES
from l2l_core.core.masks import encode_rle
from l2l_core.core.seeding import seed_of
from l2l_core.data.pairs import SIDE_BY_SIDE_VARIABLE, Targets
from l2l_core.errors import ConfigError, InputError
from l2l_core.model.batch_predictor import BatchPredictor
from l2l_core.training import workers
from l2l_core.training.loop import choose_device, schedule, train
from l2l_core.training.streams import OnlineStream, Stream, epoch_rows

STEPS = 7


def test_refuses_a_batch_smaller_than_the_number_of_streams(toy):
    with pytest.raises(ConfigError, match=r"train\.batch_size: got 1, expected at least 2"):
        train(toy_network(toy[0]), streams_of(toy, 0.25, 0.75), 1, with_(batch_size=1), seed=0, run_name="test")


def test_refuses_a_single_sample_with_batch_norm(toy):
    """The last feature map of the tiny encoder has one pixel for these images."""
    with pytest.raises(
        ConfigError, match=r"train\.batch_size, .*: a process computes one sample at a time, but the image"
    ):
        train(toy_network(toy[0]), streams_of(toy), 1, with_(batch_size=1), seed=0, run_name="test")


# --- online labels


def test_online_labels_come_from_the_current_ema_teacher(toy, tmp_path, monkeypatch):
    """The labels of steps 1 and 2 come from the start network and from the checkpoint after step 1. The teacher sees
    the priors that are hidden from the student."""
    params = with_(precision="bf16", prior_dropout=1.0, checkpoint_every=1, lr=4e-3)
    batches, checkpoint, seen, threshold = toy_batches(toy[0]), tmp_path / "checkpoint.pt", [], 0.97
    teachers = [toy_network(toy[0]), toy_network(toy[0])]
    taught = toy_network(toy[0])  # enough steps for some confident pixels and some foreground
    train(taught, streams_of(toy), 10, with_(precision="bf16", prior_dropout=0.0, lr=4e-3), seed=0, run_name="start")
    teachers[0].load_state_dict(taught.state_dict())
    start = copy.deepcopy(teachers[0])
    monkeypatch.setattr(workers, "strong_view", lambda batch, seeds, flip: seen.append(batch) or batch)
    train(start, [OnlineStream(batches, threshold, 1.0)], 2, params, seed=5, run_name="test", checkpoint=checkpoint)
    teachers[1].load_state_dict(torch.load(checkpoint, weights_only=True)["teacher"])
    probs = []
    for step, (teacher, batch) in enumerate(zip(teachers, seen, strict=True)):
        rows = epoch_rows(len(toy[0]), params.batch_size, seed_of("stream", 5, 0), step)
        prob = BatchPredictor.of(teacher, params).logits(batches(rows)).sigmoid().numpy()
        np.testing.assert_array_equal(batch.label.numpy(), prob > 0.5)
        np.testing.assert_array_equal(batch.keep.numpy(), np.maximum(prob, 1 - prob) >= threshold)
        assert 0 < batch.keep.mean() < 1
        assert 0 < batch.label.mean() < 1
        assert not batch.has_box.any()
        probs.append(prob)
    assert not np.array_equal(*probs)


# --- learning rate


def test_cosine_schedule_matches_hand_computed_factors():
    """Two of ten steps warm up, and eight follow half a cosine."""
    factors = [schedule(step, 10, 0.2, "cosine") for step in range(10)]
    expected = [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8))]
    assert factors == pytest.approx(expected)
    assert factors[6] == pytest.approx(0.5)


def test_poly_schedule_matches_hand_computed_factors():
    """LAVT uses (1 - step / steps) ** 0.9."""
    factors = [schedule(step, 10, 0.0, "poly") for step in range(1, 10)]
    assert factors == pytest.approx([(1 - k / 9) ** 0.9 for k in range(9)])


@pytest.mark.parametrize("decay", ["cosine", "poly"])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_schedule_stays_in_range(steps, fraction, decay):
    factors = [schedule(step, steps, fraction, decay) for step in range(steps)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) == 1


def test_curve_records_the_learning_rate(toy):
    rows = train(toy_network(toy[0]), streams_of(toy), 4, with_(warmup_fraction=0.5), seed=0, run_name="test").curve
    assert [row["lr"] for row in rows] == pytest.approx([TRAIN.lr / 2, TRAIN.lr, TRAIN.lr, TRAIN.lr / 2])
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


# --- training


def test_training_reduces_the_loss(toy):
    params = with_(lr=4e-3, prior_dropout=0.0)
    curve = train(toy_network(toy[0]), streams_of(toy), 60, params, seed=0, run_name="test").curve
    loss = [row["loss"] for row in curve]
    assert np.mean(loss[-8:]) < 0.6 * np.mean(loss[:8])
    assert np.mean([row["dice"] for row in curve[-8:]]) < np.mean([row["dice"] for row in curve[:8]])


def test_teacher_is_the_mean_of_start_and_student_after_one_step(toy):
    student = toy_network(toy[0])
    for weight in (*student.decoder.head.parameters(), *student.decoder.refine.parameters()):
        torch.nn.init.normal_(weight, std=0.1)  # initially zero, which blocks gradients to earlier layers
    start = {name: value.clone() for name, value in student.named_parameters()}
    teacher = train(student, streams_of(toy), 1, TRAIN, seed=0, run_name="test").teacher
    trained = dict(student.named_parameters())
    moved = 0
    for name, value in teacher.named_parameters():
        torch.testing.assert_close(value, (start[name] + trained[name].detach()) / 2)
        moved += not torch.equal(start[name], trained[name])
    assert moved > len(start) / 2
    assert not teacher.training
    assert not any(value.requires_grad for value in teacher.parameters())


def test_dropped_pixels_do_not_change_the_weights(toy):
    """No pixel is kept: there is no gradient, and without weight decay the weights do not change."""
    nothing = [encode_rle(np.zeros(hw, dtype=bool)) for hw in toy[0].hw.tolist()]
    stream = Stream(toy_batches(toy[0]), replace(toy[1], keep=nothing), 1.0)
    student = toy_network(toy[0])
    start = copy.deepcopy(student)
    curve = train(student, [stream], 2, with_(weight_decay=0.0), seed=0, run_name="test").curve
    assert [row["loss"] for row in curve] == [0, 0]
    for before, after in zip(start.parameters(), student.parameters(), strict=True):
        assert torch.equal(before, after)


def test_refuses_an_empty_stream(toy):
    none = np.zeros(0, dtype=np.int64)
    streams = [*streams_of(toy), Stream(toy_batches(toy[0].take(none)), Targets([]), 0.5)]
    with pytest.raises(InputError, match="warmup: a stream has no pairs"):
        train(toy_network(toy[0]), streams, 1, TRAIN, seed=0, run_name="warmup")


def test_refuses_an_unavailable_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match=r"train\.engine\.device: got 'cuda'"):
        choose_device("cuda")


# --- resuming


class Killed(Exception):
    """Stands for kill -9, which the loop does not handle."""


def run(toy, folder, params, *, seed=3, checkpoint=None, kill_at=None, online=False):
    """Train for STEPS steps from a fixed start; return the teacher's bytes, the curve, and the logged rows."""
    AcceleratorState._reset_state(True)
    logged: list[dict[str, float]] = []

    def log(row: dict[str, float]) -> None:
        logged.append(row)
        if row["step"] == kill_at:
            raise Killed

    labeled, pseudo = streams_of(toy, 0.25, 0.75)
    streams = [labeled, OnlineStream(pseudo.batches, 0.95, pseudo.share) if online else pseudo]
    trained = train(
        toy_network(toy[0]), streams, STEPS, params, seed=seed, run_name="test", checkpoint=checkpoint, log=log
    )
    trained.teacher.save(folder)
    return (folder / "model.safetensors").read_bytes(), trained.curve, logged


@pytest.mark.parametrize(("precision", "online"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_a_killed_training_resumes_to_the_same_result(toy, tmp_path, precision, online):
    params = with_(precision=precision)
    whole, curve, logged = run(toy, tmp_path / "whole", params, online=online)
    assert [row["step"] for row in curve] == list(range(1, STEPS + 1))
    assert logged == curve
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        # before the first checkpoint
        run(toy, tmp_path / "killed", params, checkpoint=checkpoint, kill_at=1, online=online)
    assert not checkpoint.exists()
    for kill_at in (5, 6):  # both leave the checkpoint of step 4 (the kill at 6 precedes that of 6)
        with pytest.raises(Killed):
            run(toy, tmp_path / "killed", params, checkpoint=checkpoint, kill_at=kill_at, online=online)
        assert checkpoint.exists()
        assert torch.load(checkpoint, weights_only=True)["step"] == 4
    resumed, resumed_curve, resumed_log = run(toy, tmp_path / "resumed", params, checkpoint=checkpoint, online=online)
    assert resumed == whole
    assert resumed_curve == curve
    assert resumed_log == curve  # the rows from before the kill are logged again


def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not(toy, tmp_path):
    first, _, _ = run(toy, tmp_path / "a", TRAIN, checkpoint=tmp_path / "a.pt")
    torch.manual_seed(99)
    again, _, _ = run(toy, tmp_path / "b", with_(checkpoint_every=100, log_every=5))
    other, _, _ = run(toy, tmp_path / "c", TRAIN, seed=4)
    assert first == again  # even with other checkpoint and logging intervals
    assert first != other


def test_curve_follows_log_every_and_includes_the_last_step(toy):
    curve = train(toy_network(toy[0]), streams_of(toy), 5, with_(log_every=2), seed=0, run_name="test").curve
    assert [row["step"] for row in curve] == [2, 4, 5]


def test_weights_do_not_depend_on_the_share_of_the_image_cache(toy, monkeypatch):
    """Compares the whole cache with a share that is too small for any image."""
    found = []
    for beside in ("1", str(IMAGE_CACHE_BYTES)):
        monkeypatch.setenv(SIDE_BY_SIDE_VARIABLE, beside)
        trained = train(toy_network(toy[0]), streams_of(toy), 3, TRAIN, seed=5, run_name="test")
        found.append(trained.teacher.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
