import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from toy_pairs import TRAIN, toy_batches, toy_network, toy_pairs

from l2l_core.config import TrainParams
from l2l_core.core.masks import encode_rle
from l2l_core.core.seeding import derive_seed, seed_of
from l2l_core.data.pairs import IMAGE_CACHE_BYTES, SIDE_BY_SIDE_VARIABLE, Batch, Pairs, Targets
from l2l_core.errors import ConfigError, InputError
from l2l_core.model.predictor import Predictor
from l2l_core.training import loop
from l2l_core.training.loop import (
    OnlineStream,
    Stream,
    choose_device,
    epoch_rows,
    label_online,
    schedule,
    share_image_cache,
    stream_sizes,
    train,
)

STEPS = 7


@pytest.fixture
def toy(tmp_path) -> tuple[Pairs, Targets]:
    return toy_pairs(tmp_path / "images", 5)


def streams_of(toy: tuple[Pairs, Targets], *shares: float) -> list[Stream]:
    return [Stream(toy_batches(toy[0]), toy[1], share) for share in shares or (1.0,)]


def with_(checkpoint_every: int = 2, **values: object) -> TrainParams:
    engine = TRAIN.engine.model_copy(update={"checkpoint_every": checkpoint_every})
    return TRAIN.model_copy(update={**values, "engine": engine})


# --- batch sampling


@given(count=st.integers(1, 20), batch=st.integers(1, 30), seed=st.integers(0, 2**32), first=st.integers(0, 50))
def test_every_epoch_is_a_permutation_of_the_rows(count, batch, seed, first):
    """For any batch size, every row occurs once per epoch, and each step depends only on its number."""
    steps = range(-(-3 * count // batch) + 1)
    walk = np.concatenate([epoch_rows(count, batch, seed, step) for step in steps])
    for epoch in range(3):
        assert sorted(walk[epoch * count : (epoch + 1) * count]) == list(range(count))
    np.testing.assert_array_equal(epoch_rows(count, batch, seed, first), epoch_rows(count, batch, seed, first))


def test_epochs_and_seeds_shuffle_differently():
    epochs = [tuple(epoch_rows(30, 30, seed, step)) for seed in (0, 1) for step in (0, 1)]
    assert len(set(epochs)) == 4


@pytest.mark.parametrize(
    ("shares", "batch", "expected"),
    [
        ([1.0], 32, [32]),
        ([0.25, 0.75], 32, [8, 24]),
        ([0.3, 0.7], 8, [2, 6]),
        ([0.01, 0.99], 8, [1, 7]),
        ([0.5, 0.25, 0.25], 8, [4, 2, 2]),
        ([0.99, 0.01], 8, [7, 1]),
        ([0.9, 0.1], 2, [1, 1]),
        ([0.8, 0.1, 0.1], 3, [1, 1, 1]),
    ],
)
def test_streams_split_a_batch_by_their_shares(toy, shares, batch, expected):
    assert stream_sizes(streams_of(toy, *shares), batch) == expected


def test_refuses_a_batch_smaller_than_the_number_of_streams(toy):
    with pytest.raises(ConfigError, match=r"train\.batch_size: got 1, expected at least 2"):
        train(toy_network(toy[0]), streams_of(toy, 0.25, 0.75), 1, with_(batch_size=1), 0, "test")
    assert stream_sizes(streams_of(toy), 1) == [1]


def test_refuses_a_single_sample_with_batch_norm(toy):
    """The last feature map of the tiny encoder has one pixel for these images."""
    with pytest.raises(
        ConfigError, match=r"train\.batch_size, .*: a process computes one sample at a time, but the image"
    ):
        train(toy_network(toy[0]), streams_of(toy), 1, with_(batch_size=1), 0, "test")


class Recorder:
    """A batch maker that records its requests."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.batches = toy_batches(pairs)
        self.rows: list[np.ndarray] = []
        self.hidden: list[np.ndarray] = []
        self.prior_rows: list[np.ndarray] = []

    def __call__(
        self,
        rows: np.ndarray,
        targets: Targets | None = None,
        no_prior: np.ndarray | None = None,
        prior_rows: np.ndarray | None = None,
    ) -> Batch:
        self.rows.append(rows)
        self.prior_rows.append(rows if prior_rows is None else prior_rows)
        self.hidden.append(np.zeros(len(rows), dtype=bool) if no_prior is None else no_prior)
        return self.batches(rows, targets, no_prior)


def find_bright(batch: Batch) -> torch.Tensor:
    """A teacher that is confident about bright pixels, which are the squares of the toy images."""
    bright = batch.image.float().mean(1, keepdim=True) > 120
    return torch.where(bright, 0.9, 0.2)


def test_a_step_follows_stream_shares_and_prior_dropout(toy):
    first, second = Recorder(toy[0]), Recorder(toy[0].take(np.array([0, 2])))
    streams = [Stream(first, toy[1], 0.25), Stream(second, toy[1].take(np.array([0, 2])), 0.75)]
    params = with_(batch_size=16, prior_dropout=0.3)
    for step in range(60):
        batch = loop._draw(streams, params, 1, step, find_bright)
        assert len(batch.sentence) == 16
        assert batch.label.shape == (16, 1, 32, 32)
        assert batch.sentence[4:] == [second.pairs.sentence[row] for row in second.rows[-1]]
    assert {len(rows) for rows in first.rows} == {4}
    assert {len(rows) for rows in second.rows} == {12}
    hidden = np.concatenate([*first.hidden, *second.hidden])
    assert hidden.mean() == pytest.approx(0.3, abs=0.07)  # 4.7 standard deviations of 960 draws
    counts = np.bincount(np.concatenate(second.rows))
    assert abs(counts[0] - counts[1]) <= 1
    assert not all(np.array_equal(hidden, first.hidden[0]) for hidden in first.hidden)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_prior_dropout_of_zero_or_one_hides_no_prior_or_every_prior(toy, share):
    recorder = Recorder(toy[0])
    loop._draw([Stream(recorder, toy[1], 1.0)], with_(prior_dropout=share), 0, 0, find_bright)
    assert recorder.hidden[0].mean() == share


def test_prior_swap_gives_only_the_student_other_priors(toy):
    stored, online, none = Recorder(toy[0]), Recorder(toy[0]), Recorder(toy[0])
    streams = [Stream(none, toy[1], 0.25), Stream(stored, toy[1], 0.25, 0.5), OnlineStream(online, 0.7, 0.5, 0.5)]
    for step in range(50):
        loop._draw(streams, with_(batch_size=16), 1, step, find_bright)
    own = {
        "no swap": np.equal(none.rows, none.prior_rows),
        "stored": np.equal(stored.rows, stored.prior_rows),
        "teacher": np.equal(online.rows[::2], online.prior_rows[::2]),
        "student": np.equal(online.rows[1::2], online.prior_rows[1::2]),
    }
    assert own["no swap"].all()
    assert own["teacher"].all()
    # Each toy image has one sentence, so a swap draws one of the four pairs, and a quarter of the swaps change nothing.
    assert own["stored"].mean() == pytest.approx(1 - 0.5 * 0.75, abs=0.11)  # 3 standard deviations of 200 draws
    assert own["student"].mean() == pytest.approx(1 - 0.5 * 0.75, abs=0.08)


def test_drawn_rows_do_not_depend_on_the_label_source(toy):
    stored, online = Recorder(toy[0]), Recorder(toy[0])
    first = Stream(toy_batches(toy[0]), toy[1], 0.25)
    params = with_(prior_dropout=0.5)
    for step in range(10):
        loop._draw([first, Stream(stored, toy[1], 0.75)], params, 1, step, find_bright)
        loop._draw([first, OnlineStream(online, 0.7, 0.75)], params, 1, step, find_bright)
    teacher, student = slice(0, None, 2), slice(1, None, 2)
    for of in (teacher, student):
        np.testing.assert_array_equal(online.rows[of], stored.rows)
    np.testing.assert_array_equal(online.hidden[student], stored.hidden)
    assert np.any(stored.hidden)
    assert not np.any(online.hidden[teacher])


def test_seeds_of_different_run_names_differ():
    seeds = {derive_seed(seed, purpose) for seed in range(20) for purpose in ("warmup", "retrain-1", "retrain-2")}
    assert len(seeds) == 60
    assert derive_seed(7, "warmup") == derive_seed(7, "warmup")


# --- online labels


def test_online_labels_match_hand_computed_values(toy):
    batch = toy_batches(toy[0])(np.array([0]))
    prob = torch.tensor([0.1, 0.25, 0.26, 0.5, 0.51, 0.74, 0.75, 1.0]).view(1, 1, 2, 4)
    labeled = label_online(batch, prob, 0.75)
    assert labeled.label.flatten().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert labeled.keep.flatten().tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
    assert torch.equal(labeled.image, batch.image)


def test_strong_view_transforms_online_labels_with_the_image(toy):
    """The teacher marks bright pixels. In the student's view, the label must lie on the bright pixels of that view."""
    stream = OnlineStream(toy_batches(toy[0]), 0.85, 1.0)  # only bright pixels reach it: 0.9, against 1 - 0.2
    weak = loop._draw([stream], with_(batch_size=20), 0, 0, find_bright)
    assert torch.equal(weak.keep, weak.label)
    view = loop.strong_view(weak, range(20))
    mirrored = 0
    for row in range(20):
        grey, label = view.image[row].float().mean(0), view.label[row, 0] > 0
        bright = grey > (grey.min() + grey.max()) / 2
        assert (bright & label).sum() / (bright | label).sum() > 0.75
        assert torch.equal(view.keep[row, 0] > 0, label)
        mirrored += view.sentence[row] != weak.sentence[row]
    assert 0 < mirrored < 20


def test_online_labels_come_from_the_current_ema_teacher(toy, tmp_path, monkeypatch):
    """The labels of steps 1 and 2 come from the start network and from the checkpoint after step 1. The teacher sees
    the priors that are hidden from the student."""
    params = with_(precision="bf16", prior_dropout=1.0, checkpoint_every=1, lr=4e-3)
    batches, checkpoint, seen, threshold = toy_batches(toy[0]), tmp_path / "checkpoint.pt", [], 0.97
    teachers = [toy_network(toy[0]), toy_network(toy[0])]
    taught = toy_network(toy[0])  # enough steps for some confident pixels and some foreground
    train(taught, streams_of(toy), 10, with_(precision="bf16", prior_dropout=0.0, lr=4e-3), 0, "start")
    teachers[0].load_state_dict(taught.state_dict())
    start = copy.deepcopy(teachers[0])
    monkeypatch.setattr(loop, "strong_view", lambda batch, seeds, flip: seen.append(batch) or batch)
    train(start, [OnlineStream(batches, threshold, 1.0)], 2, params, 5, "test", checkpoint)
    teachers[1].load_state_dict(torch.load(checkpoint, weights_only=True)["teacher"])
    probs = []
    for step, (teacher, batch) in enumerate(zip(teachers, seen, strict=True)):
        rows = epoch_rows(len(toy[0]), params.batch_size, seed_of("stream", 5, 0), step)
        prob = Predictor.of(teacher, params).logits(batches(rows)).sigmoid().numpy()
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
    rows = train(toy_network(toy[0]), streams_of(toy), 4, with_(warmup_fraction=0.5), 0, "test").curve
    assert [row["lr"] for row in rows] == pytest.approx([TRAIN.lr / 2, TRAIN.lr, TRAIN.lr, TRAIN.lr / 2])
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


# --- training


def test_training_reduces_the_loss(toy):
    params = with_(lr=4e-3, prior_dropout=0.0)
    curve = train(toy_network(toy[0]), streams_of(toy), 60, params, 0, "test").curve
    loss = [row["loss"] for row in curve]
    assert np.mean(loss[-8:]) < 0.6 * np.mean(loss[:8])
    assert np.mean([row["dice"] for row in curve[-8:]]) < np.mean([row["dice"] for row in curve[:8]])


def test_teacher_is_the_mean_of_start_and_student_after_one_step(toy):
    student = toy_network(toy[0])
    for weight in (*student.decoder.head.parameters(), *student.decoder.refine.parameters()):
        torch.nn.init.normal_(weight, std=0.1)  # initially zero, which blocks gradients to earlier layers
    start = {name: value.clone() for name, value in student.named_parameters()}
    teacher = train(student, streams_of(toy), 1, TRAIN, 0, "test").teacher
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
    curve = train(student, [stream], 2, with_(weight_decay=0.0), 0, "test").curve
    assert [row["loss"] for row in curve] == [0, 0]
    for before, after in zip(start.parameters(), student.parameters(), strict=True):
        assert torch.equal(before, after)


def test_refuses_an_empty_stream(toy):
    none = np.zeros(0, dtype=np.int64)
    streams = [*streams_of(toy), Stream(toy_batches(toy[0].take(none)), Targets([]), 0.5)]
    with pytest.raises(InputError, match="warmup: a stream has no pairs"):
        train(toy_network(toy[0]), streams, 1, TRAIN, 0, "warmup")


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
    trained = train(toy_network(toy[0]), streams, STEPS, params, seed, "test", checkpoint, log)
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
    curve = train(toy_network(toy[0]), streams_of(toy), 5, with_(log_every=2), 0, "test").curve
    assert [row["step"] for row in curve] == [2, 4, 5]


@pytest.mark.parametrize(
    ("launched", "beside", "parts"), [(None, None, 2), ("3", None, 6), (None, "2", 4), ("3", "2", 12)]
)
def test_streams_processes_and_trainings_of_a_machine_share_one_image_cache(toy, monkeypatch, launched, beside, parts):
    for name, value in (("LOCAL_WORLD_SIZE", launched), (SIDE_BY_SIDE_VARIABLE, beside)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    shared = share_image_cache(streams_of(toy, 0.5, 0.5))
    assert [stream.batches.cache_bytes for stream in shared] == 2 * [IMAGE_CACHE_BYTES // parts]


def test_weights_do_not_depend_on_the_share_of_the_image_cache(toy, monkeypatch):
    """Compares the whole cache with a share that is too small for any image."""
    found = []
    for beside in ("1", str(IMAGE_CACHE_BYTES)):
        monkeypatch.setenv(SIDE_BY_SIDE_VARIABLE, beside)
        trained = train(toy_network(toy[0]), streams_of(toy), 3, TRAIN, 5, "test")
        found.append(trained.teacher.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
