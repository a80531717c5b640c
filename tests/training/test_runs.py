import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import write_run
from toy_pairs import rows_of, toy_batches, toy_network, toy_pairs, toy_params

from l2l_core.artifacts import records
from l2l_core.artifacts.curves import read_curve
from l2l_core.core.masks import decode_rle, encode_rle
from l2l_core.data.folds import fold_by_image, fold_of_images
from l2l_core.data.load import pairs_of
from l2l_core.errors import InputError
from l2l_core.model.segmenter import Segmenter
from l2l_core.training import fold_teachers, loop, round_model, runs
from l2l_core.training.round_model import train_model
from l2l_core.training.runs import (
    labeled_stream,
    method_of,
    new_network,
    online_stream,
    part_of,
    pseudo_stream,
    run_training,
    without_images,
)
from l2l_core.training.streams import OnlineStream, Stream
from stages import crossfit, distill

PARAMS = toy_params(proposals={"size_px": 24})


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A synthetic run in the current folder, with the masks of its labeled sentences."""
    write_run(tmp_path, rounds=1, images_per_split=4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    masks = records.read_table(records.INDEX.masks, records.MASKS)
    records.write_table(masks.slice(0, 1), records.LABELED_MASKS_PATH, records.MASKS)
    records.INDEX.masks.unlink()  # training must not need them
    return tmp_path


# --- folds


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(2, 6), st.integers(0, 9))
def test_folds_divide_images_evenly(image_row, folds, seed):
    images = np.array(image_row, dtype=np.int64)
    if len(set(image_row)) < folds:
        with pytest.raises(InputError, match=rf"select\.folds: got {folds}, but only {len(set(image_row))} images"):
            fold_of_images(images, folds, seed)
        return
    fold = fold_of_images(images, folds, seed)
    fold_by_image = {image: set(fold[images == image].tolist()) for image in image_row}
    assert all(len(found) == 1 for found in fold_by_image.values())
    sizes = [sum(found == {number} for found in fold_by_image.values()) for number in range(folds)]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == len(fold_by_image)
    np.testing.assert_array_equal(fold, fold_of_images(images, folds, seed))


def test_folds_depend_on_the_seed():
    images = np.arange(40)
    assert not np.array_equal(fold_of_images(images, 2, 0), fold_of_images(images, 2, 1))


@pytest.mark.parametrize("cross_label", [False, True])
def test_images_without_labels_have_a_fold_only_with_cross_label(run, cross_label):
    """Labeled images keep their folds, so that each fold has labels."""
    params = toy_params(select={"folds": 3, "cross_label": cross_label})
    pairs = pairs_of(PARAMS, "eval", with_priors=False)
    labeled = replace(pairs, image_row=np.arange(40) // 2, image_path=[""] * 200)
    fold = fold_by_image(params, labeled)
    np.testing.assert_array_equal(fold[labeled.image_row], fold_of_images(labeled.image_row, 3, params.seed))
    sizes = np.unique(fold[20:], return_counts=True)
    assert sizes[0].tolist() == ([0, 1, 2] if cross_label else [-1])
    assert (abs(sizes[1] - 180 / len(sizes[1])) < 15).all()
    other = fold_by_image(params.model_copy(update={"seed": 1}), labeled)
    assert np.array_equal(fold[20:], other[20:]) != cross_label


# --- streams


def test_labeled_stream_contains_every_labeled_sentence_with_its_mask(run):
    stream = labeled_stream(PARAMS, 0.25)
    assert (stream.share, stream.batches.pairs.sent_id.tolist()) == (0.25, [0, 1])
    truth = records.read_table(records.LABELED_MASKS_PATH, records.MASKS).to_pylist()[0]["rle_counts"]
    assert stream.targets.label == [truth, truth]
    assert stream.targets.keep is None
    assert stream.batches.pairs.has_box.all()
    assert not labeled_stream(PARAMS, 1.0, with_priors=False).batches.pairs.has_box.any()


def test_pseudo_stream_contains_only_accepted_labels_and_kept_pixels(run):
    path = records.round_folder(1) / "history/pseudo_labels.parquet"
    labels = records.read_table(path, records.PSEUDO_LABELS).to_pylist()
    for number, row in enumerate(labels):
        keep = decode_rle(row["rle_counts"], row["height"], row["width"])
        row |= {"accepted": number % 3 == 0, "keep_rle": encode_rle(~keep)}
    records.write_table(records.make_table(labels, records.PSEUDO_LABELS), path, records.PSEUDO_LABELS)
    accepted = labels[::3]
    stream = pseudo_stream(PARAMS, path, 0.75)
    assert stream is not None
    assert stream.share == 0.75
    assert stream.batches.pairs.sent_id.tolist() == [row["sent_id"] for row in accepted]
    batch = stream.batches(np.arange(len(accepted)), stream.targets)
    for row, label in enumerate(accepted):
        for counts, tensor in ((label["rle_counts"], batch.label), (label["keep_rle"], batch.keep)):
            mask = decode_rle(counts, label["height"], label["width"])
            assert tensor[row].mean().item() == pytest.approx(mask.mean(), abs=0.05)
    assert (batch.keep == 0).any()


def test_evolved_proposals_mix_proposal_and_pseudo_label_by_probability(run):
    """Images are 48 x 64 pixels and proposals 24 x 24 cells, so that a label of the 24 upper rows covers 12 rows."""
    path = records.round_folder(1) / "history/pseudo_labels.parquet"
    labels = records.read_table(path, records.PSEUDO_LABELS).to_pylist()
    upper = np.zeros((48, 64), dtype=bool)
    upper[:24] = True
    for row, prob in zip(labels, (0.75, 1.0, 0.5), strict=False):
        row |= {"accepted": prob < 1, "accept_prob": prob, "rle_counts": encode_rle(upper)}
    records.write_table(records.make_table(labels, records.PSEUDO_LABELS), path, records.PSEUDO_LABELS)
    fixed = pseudo_stream(PARAMS, path, 0.75)
    evolved = pseudo_stream(toy_params(proposals={"size_px": 24}, retrain={"evolve_proposals": True}), path, 0.75)
    table = {row["sent_id"]: row for row in records.read_table(records.PROPOSALS_PATH, records.PROPOSALS).to_pylist()}
    stored = [table[sent_id]["soft"] for sent_id in fixed.batches.pairs.sent_id.tolist()]
    assert [proposal.tobytes() for proposal in fixed.batches.pairs.proposal] == stored
    for row, prob in enumerate((0.75, 0.5)):
        before = fixed.batches.pairs.proposal[row].astype(float)
        after = evolved.batches.pairs.proposal[row].astype(float)
        np.testing.assert_allclose(after[:12], prob * 255 + (1 - prob) * before[:12], atol=0.5)
        np.testing.assert_allclose(after[12:], (1 - prob) * before[12:], atol=0.5)
    for name in ("sent_id", "box", "proposal_score"):
        np.testing.assert_array_equal(getattr(evolved.batches.pairs, name), getattr(fixed.batches.pairs, name))
    assert evolved.targets == fixed.targets
    assert (fixed.evolved, evolved.evolved) == (False, True)


def test_labeled_sentences_and_inference_keep_the_proposal_of_the_prior(run):
    evolving = toy_params(proposals={"size_px": 24}, retrain={"evolve_proposals": True})
    for role in ("labeled", "eval", "unlabeled"):
        np.testing.assert_array_equal(pairs_of(evolving, role).proposal, pairs_of(PARAMS, role).proposal)
    stream = labeled_stream(evolving, 0.25)
    np.testing.assert_array_equal(stream.batches.pairs.proposal, pairs_of(PARAMS, "labeled").proposal)


def test_pseudo_stream_reads_pixel_weights_and_defaults_to_full_weight(run):
    """The left half of the map is 51 (a fifth), the right half 255. Every third row has a map, the others have none."""
    path = records.round_folder(1) / "history/pseudo_labels.parquet"
    labels = records.read_table(path, records.PSEUDO_LABELS).to_pylist()
    half = np.full((24, 24), 255, np.uint8)
    half[:, :12] = 51
    for number, row in enumerate(labels):
        everywhere = encode_rle(np.ones((row["height"], row["width"]), dtype=bool))
        row |= {"accepted": True, "keep_rle": everywhere, "weight": half.tobytes() if number % 3 == 0 else None}
    records.write_table(records.make_table(labels, records.PSEUDO_LABELS), path, records.PSEUDO_LABELS)
    stream = pseudo_stream(PARAMS, path, 0.75)
    keep = stream.batches(np.arange(len(labels)), stream.targets).keep[:, 0]
    for number, weight in enumerate(keep):
        left = 0.2 if number % 3 == 0 else 1.0
        torch.testing.assert_close(weight[:, :15], torch.full((32, 15), left))
        torch.testing.assert_close(weight[:, 17:], torch.ones(32, 15))
    for row in labels:
        row["weight"] = None
    records.write_table(records.make_table(labels, records.PSEUDO_LABELS), path, records.PSEUDO_LABELS)
    assert pseudo_stream(PARAMS, path, 0.75).targets.weight is None


def test_online_stream_contains_every_unlabeled_sentence_in_split_order(run):
    split = records.read_table(records.SPLIT_PATH, records.SPLIT).to_pylist()
    stream = online_stream(PARAMS, 0.75)
    unlabeled = [row["sent_id"] for row in split if row["role"] == "unlabeled"]
    assert stream.batches.pairs.sent_id.tolist() == unlabeled
    assert stream.batches.pairs.has_box.any()
    assert (stream.share, stream.threshold) == (0.75, 0.7)


def test_reads_the_policy_from_the_pseudo_label_table(run):
    path = records.round_folder(1) / "history/pseudo_labels.parquet"
    assert method_of(path) == "reinforce"
    records.write_table(records.PSEUDO_LABELS.empty_table(), path, records.PSEUDO_LABELS)
    assert method_of(path) is None


def test_pseudo_stream_is_none_without_accepted_labels(run):
    path = records.round_folder(1) / "history/pseudo_labels.parquet"
    rows = records.read_table(path, records.PSEUDO_LABELS).to_pylist()
    none = [row | {"accepted": False} for row in rows]
    records.write_table(records.make_table(none, records.PSEUDO_LABELS), path, records.PSEUDO_LABELS)
    assert pseudo_stream(PARAMS, path, 0.75) is None


def test_pseudo_stream_takes_only_the_latest_round(run):
    path = records.round_folder(1) / "history/pseudo_labels.parquet"
    first = [row | {"accepted": True} for row in records.read_table(path, records.PSEUDO_LABELS).to_pylist()]
    second = [row | {"round": 2} for row in first[::2]]
    records.write_table(records.make_table(first + second, records.PSEUDO_LABELS), path, records.PSEUDO_LABELS)
    assert pseudo_stream(PARAMS, path, 0.75).batches.pairs.sent_id.tolist() == [row["sent_id"] for row in second]
    none = [row | {"accepted": False} for row in second]
    records.write_table(records.make_table(first + none, records.PSEUDO_LABELS), path, records.PSEUDO_LABELS)
    assert pseudo_stream(PARAMS, path, 0.75) is None


def test_part_of_selects_rows_of_a_stream(tmp_path):
    pairs, targets = toy_pairs(tmp_path)
    part = part_of(Stream(toy_batches(pairs), targets, 0.4), rows_of(3, 1))
    assert part.share == 0.4
    assert part.batches.pairs.sent_id.tolist() == [pairs.sent_id[3], pairs.sent_id[1]]
    assert part.targets.label == [targets.label[3], targets.label[1]]
    assert (part.batches.size_px, part.batches.flat_prob) == (32, 0.1)


def test_without_images_removes_the_pairs_of_given_images(tmp_path):
    pairs, targets = toy_pairs(tmp_path)
    pairs = replace(pairs, image_row=rows_of(5, 2, 5, 7))
    stream = Stream(toy_batches(pairs), targets, 0.4)
    left = without_images(stream, rows_of(5, 9))
    assert left is not None
    assert left.batches.pairs.sent_id.tolist() == [pairs.sent_id[1], pairs.sent_id[3]]
    assert left.targets.label == [targets.label[1], targets.label[3]]
    assert without_images(stream, rows_of(7, 5, 2)) is None


def test_fold_teachers_never_learn_from_held_out_images(run, monkeypatch):
    """Two images have one labeled sentence each; their other sentences have accepted pseudo-labels."""
    split = records.read_table(records.SPLIT_PATH, records.SPLIT).to_pylist()
    for row in split:
        row["role"] = "labeled" if row["sent_id"] in (0, 2) else row["role"]
        row["role"] = "unlabeled" if row["sent_id"] in (1, 3) else row["role"]
    records.write_table(records.make_table(split, records.SPLIT), records.SPLIT_PATH, records.SPLIT)
    history = records.round_folder(1) / "history/pseudo_labels.parquet"
    rows = records.read_table(history, records.PSEUDO_LABELS).to_pylist()
    labels = [rows[0] | {"sent_id": sent_id, "accepted": True} for sent_id in (1, 3, 4, 5)]
    path = records.round_folder(1) / "pseudo_labels.parquet"
    records.write_table(records.make_table(labels, records.PSEUDO_LABELS), path, records.PSEUDO_LABELS)
    masks = records.read_table(records.LABELED_MASKS_PATH, records.MASKS).to_pylist()
    both = [masks[0], masks[0] | {"ann_id": 1}]
    records.write_table(records.make_table(both, records.MASKS), records.LABELED_MASKS_PATH, records.MASKS)

    taught: dict[str, list[int]] = {}

    def note(params, run_name, network, streams, *rest):
        taught[run_name] = [int(sent_id) for stream in streams for sent_id in stream.batches.pairs.sent_id]

    monkeypatch.setattr(fold_teachers, "run_training", note)
    monkeypatch.setattr(crossfit, "load_params", lambda: PARAMS)
    monkeypatch.setattr(fold_teachers.Segmenter, "load", lambda folder: SimpleNamespace())
    monkeypatch.setattr("sys.argv", ["crossfit", "--round", "1"])
    crossfit.main()
    assert sorted(taught.values()) == [[0, 1, 4, 5], [2, 3, 4, 5]]


@pytest.mark.parametrize("start", ["scratch", "teacher"])
def test_retraining_depends_on_the_previous_model_only_if_it_starts_from_it(run, tmp_path, monkeypatch, start):
    """Otherwise a killed training from random weights could resume as one from the previous model."""
    path = records.round_folder(1) / "pseudo_labels.parquet"
    records.write_table(records.PSEUDO_LABELS.empty_table(), path, records.PSEUDO_LABELS)
    inputs = []
    monkeypatch.setattr(round_model, "run_training", lambda *given: inputs.extend(given[5]))
    monkeypatch.setattr(round_model.Segmenter, "load", lambda folder: SimpleNamespace())
    train_model(toy_params(proposals={"size_px": 24}, retrain={"start": start}), 1, tmp_path)
    assert path in inputs
    assert (records.round_folder(0) / "model" in inputs) == (start == "teacher")


@pytest.mark.parametrize("start", ["scratch", "teacher"])
def test_mean_teacher_starts_from_the_previous_model_and_labels_online(run, tmp_path, monkeypatch, start):
    history = records.round_folder(1) / "history/pseudo_labels.parquet"
    rows = records.read_table(history, records.PSEUDO_LABELS).to_pylist()
    path, previous = records.round_folder(1) / "pseudo_labels.parquet", records.round_folder(0) / "model"
    labels = [row | {"accepted": True, "method": "mean_teacher"} for row in rows]
    records.write_table(records.make_table(labels, records.PSEUDO_LABELS), path, records.PSEUDO_LABELS)
    params = toy_params(proposals={"size_px": 24}, retrain={"start": start, "steps": 9, "num_passes": 2})
    given = []
    monkeypatch.setattr(round_model, "run_training", lambda *all_given: given.extend(all_given))
    monkeypatch.setattr(round_model.Segmenter, "load", lambda folder: SimpleNamespace(folder=folder))
    train_model(params, 1, tmp_path)
    _, run_name, network, (labeled, pseudo), steps, inputs, _, _ = given
    assert (run_name, network.folder, steps) == ("retrain-1", previous, 9)
    assert network.num_passes == 2
    assert {path, previous} <= set(inputs)
    assert isinstance(labeled, Stream)
    assert isinstance(pseudo, OnlineStream)
    assert labeled.share == params.retrain.labeled_share
    assert labeled.share + pseudo.share == 1


def write_pseudo_labels(method):
    history = records.round_folder(1) / "history/pseudo_labels.parquet"
    rows = records.read_table(history, records.PSEUDO_LABELS).to_pylist()
    path = records.round_folder(1) / "pseudo_labels.parquet"
    labels = [row | {"method": method} for row in rows]
    records.write_table(records.make_table(labels, records.PSEUDO_LABELS), path, records.PSEUDO_LABELS)


@pytest.mark.parametrize(
    ("method", "cross_label", "fold_update", "skipped"),
    [
        ("reinforce", False, "continue", [False, False]),
        ("reinforce", True, "freeze", [False, True]),
        ("agreement", False, "continue", [True, True]),
        ("agreement", True, "retrain", [False, False]),
    ],
)
def test_fold_teachers_train_only_if_the_selection_uses_them(run, method, cross_label, fold_update, skipped):
    write_pseudo_labels(method)
    params = toy_params(select={"method": method, "cross_label": cross_label, "fold_update": fold_update})
    assert [fold_teachers.skips_training(params, number) for number in (0, 1)] == skipped


def test_crossfit_copies_unused_fold_teachers_unchanged(run, monkeypatch):
    write_pseudo_labels("mean_teacher")
    before = records.round_folder(0) / "folds/1"
    before.mkdir(parents=True)
    (before / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(crossfit, "load_params", lambda: PARAMS)
    monkeypatch.setattr("sys.argv", ["crossfit", "--round", "1"])
    crossfit.main()
    assert files_of(records.round_folder(1) / "folds") == {"1/model.safetensors": b"weights"}


def test_new_network_vocabulary_covers_training_words_and_categories(run):
    vocabulary = set(new_network(PARAMS, "warmup").tokenizer.get_vocab())
    refs = records.read_table(records.INDEX.refs, records.REFS).to_pylist()
    words = {
        word for row in refs if row["split"] == "train" for word in row["sentence"].lower().split() if word.isalpha()
    }
    assert words <= vocabulary
    assert "dot" in vocabulary  # named by priors


# --- distillation

HISTORY_LABELS = records.round_folder(1) / "history/pseudo_labels.parquet"


def write_labels(**changes):
    """Accept every pseudo-label of round 1, with all its pixels; return their sentences."""
    rows = records.read_table(HISTORY_LABELS, records.PSEUDO_LABELS).to_pylist()
    everywhere = {"accepted": True, "keep_rle": encode_rle(np.ones((48, 64), dtype=bool))}
    table = records.make_table([row | everywhere | changes for row in rows], records.PSEUDO_LABELS)
    records.write_table(table, HISTORY_LABELS, records.PSEUDO_LABELS)
    return [row["sent_id"] for row in rows]


def distilled(monkeypatch, params=PARAMS, number=1):
    """Run the stage; return the files of its model."""
    AcceleratorState._reset_state(True)
    steps = params.distill.model_copy(update={"steps": 5})
    monkeypatch.setattr(distill, "load_params", lambda: params.model_copy(update={"distill": steps}))
    monkeypatch.setattr("sys.argv", ["distill", "--round", str(number)])
    distill.main()
    return files_of(records.DISTILLED_FOLDER / "model")


@pytest.fixture
def teacher(run):
    """The model of round 1."""
    network = new_network(PARAMS, "retrain-1")
    network.save(records.round_folder(1) / "model")
    return network


@pytest.mark.parametrize(
    ("method", "kinds"), [("reinforce", [Stream, Stream]), ("mean_teacher", [Stream, OnlineStream])]
)
def test_distillation_hides_all_priors(run, monkeypatch, method, kinds):
    """Also with evolved proposals, which contain the prior, and with swapped priors."""
    sent_ids = write_labels(method=method)
    params = toy_params(proposals={"size_px": 24}, retrain={"evolve_proposals": True, "prior_swap": 0.5})
    weights = records.round_folder(1) / "model/model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    given = []
    monkeypatch.setattr(distill, "run_training", lambda *all_given: given.extend(all_given))
    monkeypatch.setattr(distill, "load_params", lambda: params)
    monkeypatch.setattr(distill.Segmenter, "load", lambda folder: SimpleNamespace(folder=folder))
    monkeypatch.setattr("sys.argv", ["distill", "--round", "1"])
    distill.main()
    _, run_name, network, streams, steps, inputs, model, _ = given
    assert (run_name, steps, model) == ("distill", params.distill.steps, records.DISTILLED_FOLDER / "model")
    assert network.folder == records.round_folder(1) / "model"
    assert not network.takes_priors
    assert network.distilled_from == hashlib.sha256(b"weights").hexdigest()
    assert {HISTORY_LABELS, network.folder} <= set(inputs)
    assert [type(stream) for stream in streams] == kinds
    assert [stream.share for stream in streams] == [0.25, 0.75]
    assert streams[1].batches.pairs.sent_id.tolist() == sent_ids
    for stream in streams:
        pairs = stream.batches.pairs
        if isinstance(stream, OnlineStream):  # its teacher sees the priors, its student does not
            assert stream.hides_priors
            assert pairs.has_box.any()
            continue
        for column in (pairs.has_box, pairs.box, pairs.proposal_score):
            assert not column.any()
        assert set(pairs.prior_text) == {""}
        assert (pairs.proposal == round(255 * params.proposals.flat_prob)).all()
        assert stream.prior_swap == 0


def test_other_priors_give_the_same_distilled_bytes(teacher, monkeypatch):
    write_labels()
    before = distilled(monkeypatch)
    priors = records.read_table(records.PRIORS_PATH, records.PRIORS).to_pylist()
    priors = [row | {"bbox": [0.0, 0.0, 9.0, 9.0], "target": "cup", "status": "ok"} for row in priors]
    records.write_table(records.make_table(priors, records.PRIORS), records.PRIORS_PATH, records.PRIORS)
    proposals = records.read_table(records.PROPOSALS_PATH, records.PROPOSALS).to_pylist()
    proposals = [row | {"soft": bytes(24 * 24), "score": 1.0} for row in proposals]
    records.write_table(records.make_table(proposals, records.PROPOSALS), records.PROPOSALS_PATH, records.PROPOSALS)
    assert distilled(monkeypatch) == before
    records.PRIORS_PATH.unlink()
    records.PROPOSALS_PATH.unlink()
    assert distilled(monkeypatch) == before
    rows = records.read_table(HISTORY_LABELS, records.PSEUDO_LABELS).to_pylist()
    moved = records.make_table([row | {"rle_counts": rows[0]["rle_counts"]} for row in rows], records.PSEUDO_LABELS)
    records.write_table(moved, HISTORY_LABELS, records.PSEUDO_LABELS)
    assert distilled(monkeypatch)["model.safetensors"] != before["model.safetensors"]


def test_distillation_of_round_0_trains_on_the_labels_alone(teacher, monkeypatch):
    teacher.save(records.round_folder(0) / "model")
    path = records.round_folder(0) / "history/pseudo_labels.parquet"
    records.write_table(records.PSEUDO_LABELS.empty_table(), path, records.PSEUDO_LABELS)
    trained = []
    monkeypatch.setattr(
        runs,
        "train",
        lambda network, streams, *rest, **named: (
            trained.extend(streams) or loop.train(network, streams, *rest, **named)
        ),
    )
    assert "model.safetensors" in distilled(monkeypatch, number=0)
    (stream,) = trained
    assert (stream.share, stream.batches.pairs.sent_id.tolist()) == (1.0, [0, 1])


def test_a_killed_distillation_resumes_to_the_same_files(teacher, monkeypatch, kill):
    write_labels()
    whole = distilled(monkeypatch)
    (records.DISTILLED_FOLDER / "model").rename("whole")
    kill(lambda: distilled(monkeypatch))
    assert not (records.DISTILLED_FOLDER / "model").exists()
    assert distilled(monkeypatch) == whole


# --- killed and resumed trainings


RENDERED = PARAMS.proposals.model_copy(update={"renderer": "grabcut", "ring": 0.75, "core": 0.35})


class Killed(Exception):
    """Stands for kill -9."""


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def do(folder, toy, params=PARAMS, run_name="warmup"):
    pairs, targets = toy
    streams = [Stream(toy_batches(pairs), targets, 1.0)]
    AcceleratorState._reset_state(True)
    inputs = [folder.parent / "input"]
    run_training(params, run_name, toy_network(pairs), streams, 5, inputs, folder / "model", folder / "curves")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / "input").write_text("some input")
    records.RENDERING_PATH.parent.mkdir(parents=True)
    records.RENDERING_PATH.write_text(json.dumps({"proposals": RENDERED.model_dump()}))
    return toy_pairs(tmp_path / "images")


@pytest.fixture
def kill(monkeypatch):
    """Return a function that runs another one and kills it right after the checkpoint of step 4."""
    save = loop.save_checkpoint

    def save_and_die(path, state):
        save(path, state)
        if state["step"] == 4:
            raise Killed

    def killed(call):
        with monkeypatch.context() as patched:
            patched.setattr(loop, "save_checkpoint", save_and_die)
            with pytest.raises(Killed):
                call()

    return killed


def test_a_killed_training_leaves_no_model_and_resumes_to_the_same_files(toy, tmp_path, kill):
    do(tmp_path / "whole", toy)
    assert Segmenter.load(tmp_path / "whole/model").proposals == RENDERED  # with the fitted values
    assert list((tmp_path / ".scratch").iterdir()) == []
    kill(lambda: do(tmp_path / "killed", toy))
    assert not (tmp_path / "killed/model").exists()
    left = {path.name for path in (tmp_path / ".scratch").glob("*/*")}
    assert left == {"checkpoint.pt", "checkpoint.pt.sha256"}

    seen = []
    train = runs.train

    def noted(*args, **named):
        result = train(*args, **named)
        seen.append(result.curve)
        return result

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runs, "train", noted)
        do(tmp_path / "killed", toy)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert list((tmp_path / ".scratch").iterdir()) == []
    rows = read_curve(tmp_path / "killed/curves", ("loss", "bce", "dice", "lr"))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5]
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in seen[0]]


def retrained(folder, evolve):
    """Retrain for 5 steps on the labels and all pseudo-labels of the synthetic run."""
    params = toy_params(proposals={"size_px": 24}, retrain={"evolve_proposals": evolve})
    path = records.round_folder(1) / "pseudo_labels.parquet"
    rows = records.read_table(path.parent / "history" / path.name, records.PSEUDO_LABELS).to_pylist()
    labels = [row | {"accepted": True, "keep_rle": encode_rle(np.ones((48, 64), dtype=bool))} for row in rows]
    records.write_table(records.make_table(labels, records.PSEUDO_LABELS), path, records.PSEUDO_LABELS)
    streams = [labeled_stream(params, 0.5), pseudo_stream(params, path, 0.5)]
    AcceleratorState._reset_state(True)
    run_training(params, "retrain-1", new_network(params, "retrain-1"), streams, 5, [path], folder, None)


def test_a_killed_retraining_with_evolved_proposals_resumes_to_the_same_files(run, tmp_path, kill):
    retrained(tmp_path / "whole", evolve=True)
    kill(lambda: retrained(tmp_path / "killed", evolve=True))
    retrained(tmp_path / "killed", evolve=True)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert list((tmp_path / ".scratch").iterdir()) == []


def test_does_not_resume_a_retraining_with_other_proposals(run, tmp_path, kill):
    kill(lambda: retrained(tmp_path / "killed", evolve=True))
    retrained(tmp_path / "killed", evolve=False)
    retrained(tmp_path / "whole", evolve=False)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    retrained(tmp_path / "evolved", evolve=True)
    assert files_of(tmp_path / "evolved") != files_of(tmp_path / "whole")


def begin(folder, toy, params):
    """Start a training and kill it at once; its scratch folder remains."""

    def die(*args: object, **named: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runs, "train", die)
        with pytest.raises(Killed):
            do(folder, toy, params)
    return {path.name for path in (folder.parent / ".scratch").iterdir() if path.is_dir()}


@pytest.mark.parametrize(
    "section",
    [
        {"train": {"lr": 1e-3}},
        {"model": {"guidance_tokens": 3}},
        {"proposals": {"flat_prob": 0.2}},
        {"select": {"folds": 3}},
        {"select": {"cross_label": True}},
    ],
)
def test_does_not_resume_a_checkpoint_of_other_parameters(toy, tmp_path, section):
    assert len(begin(tmp_path / "a", toy, toy_params())) == 1
    assert len(begin(tmp_path / "a", toy, toy_params(**section))) == 2


def test_parameters_of_other_stages_keep_the_checkpoint_valid(toy, tmp_path):
    before = begin(tmp_path / "a", toy, toy_params())
    other = toy_params(report={"cases": 3}, evaluate={"batch_size": 2}, retrain={"steps": 7})
    assert begin(tmp_path / "a", toy, other.model_copy(update={"round": 1})) == before
