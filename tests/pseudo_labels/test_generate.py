from collections.abc import Iterator
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from synthetic_run import write_run
from toy_pairs import toy_params

from l2l_core.artifacts import records
from l2l_core.config import Params
from l2l_core.core.masks import decode_rle, encode_rle, resize_mask
from l2l_core.data.load import batches_of, labeled_targets, pairs_of, sentences_of
from l2l_core.data.pairs import BatchMaker, Targets, load_targets
from l2l_core.data.views import Views
from l2l_core.errors import ArtifactError, InputError
from l2l_core.model import batch_predictor
from l2l_core.model.batch_predictor import rows_by_image
from l2l_core.pseudo_labels import generate
from l2l_core.pseudo_labels.features import SENTENCE_FEATURES, Candidates
from l2l_core.pseudo_labels.generate import (
    PseudoLabelCandidates,
    label_key,
    label_unlabeled,
    pseudo_label_table,
    score_labeled,
    score_out_of_fold,
    score_unlabeled,
    select_chunks,
)
from l2l_core.pseudo_labels.reinforce import train_policy
from l2l_core.pseudo_labels.sam_masks import Match, Refined
from l2l_core.pseudo_labels.select import Selection, select_labels
from l2l_core.training import fold_teachers

HEIGHT, WIDTH, GRID = 48, 64, 4


def params_of(policy: str = "reinforce", **select: object) -> Params:
    return toy_params(
        proposals={"size_px": 24},
        select={"method": policy, "grid": GRID, "pixel_threshold": 0.9, "candidates": ["teacher"], **select},
        evaluate={"batch_size": 3},
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A synthetic run in the current folder, with two labeled images (four sentences)."""
    write_run(tmp_path, images_per_split=5, height=HEIGHT, width=WIDTH)
    monkeypatch.chdir(tmp_path)
    split = records.read_table(records.SPLIT_PATH, records.SPLIT).to_pylist()
    for row in split:
        row["role"] = "labeled" if row["sent_id"] < 4 else row["role"]
    records.write_table(records.make_table(split, records.SPLIT), records.SPLIT_PATH, records.SPLIT)
    masks = records.read_table(records.INDEX.masks, records.MASKS)
    records.write_table(masks.slice(0, 2), records.LABELED_MASKS_PATH, records.MASKS)
    return tmp_path


def true_masks() -> dict[int, np.ndarray]:
    """sent_id -> [H, W] bool."""
    masks = records.read_table(records.INDEX.masks, records.MASKS).to_pylist()
    by_ann = {row["ann_id"]: decode_rle(row["rle_counts"], HEIGHT, WIDTH) for row in masks}
    refs = records.read_table(records.INDEX.refs, records.REFS).to_pylist()
    return {row["sent_id"]: by_ann[row["ann_id"]] for row in refs}


class Oracle:
    """A teacher that predicts the truth, 0.95 inside and 0.2 outside, and records the queried sentences."""

    def __init__(self) -> None:
        self.truth = true_masks()
        self.asked: list[int] = []

    def views(
        self, batches: BatchMaker, batch_size: int, what: str | None
    ) -> Iterator[tuple[NDArray[np.int64], Views]]:
        sent_id = batches.pairs.sent_id
        order = rows_by_image(batches.pairs)
        for start in range(0, len(sent_id), batch_size):
            rows = order[start : start + batch_size]
            some = sent_id[rows]
            self.asked += some.tolist()
            truth = [resize_mask(self.truth[number], batches.size_px, batches.size_px) for number in some.tolist()]
            prob = np.where(np.stack(truth), 0.95, 0.2).astype(np.float32)
            score = np.ones(len(some), np.float32)
            image = np.zeros((*prob.shape, 3), np.uint8)
            yield rows, Views(some, image, prob, prob, prob, prob, score, 0 * score, np.full(len(some), 4))


class Doubtful(Oracle):
    """Its prior equals the truth; its own mask is shifted by half an image."""

    def views(
        self, batches: BatchMaker, batch_size: int, what: str | None
    ) -> Iterator[tuple[NDArray[np.int64], Views]]:
        for rows, views in super().views(batches, batch_size, what):
            prob = np.roll(views.prob, views.prob.shape[2] // 2, axis=2)
            yield rows, replace(views, prob=prob, proposal=views.prob)


def selection(count: int, accepted: list[int], cells: np.ndarray | None = None) -> Selection:
    taken = np.isin(np.arange(count), accepted)
    keep = np.ones((count, GRID, GRID), dtype=bool) if cells is None else cells
    return Selection(np.zeros(count, np.int64), taken * 0.7 + 0.1, taken, keep, np.linspace(-1, 1, count))


def teachers_own(labels: PseudoLabelCandidates) -> list[bytes]:
    """Return the first candidate of every sentence."""
    return [made[0] for made in labels.candidates]


def unlabeled_truth(labels: PseudoLabelCandidates) -> Targets:
    return load_targets(records.INDEX.masks, records.INDEX, labels.pairs)


def label_all(*arguments) -> tuple[PseudoLabelCandidates, Candidates]:
    labeled = label_unlabeled(*arguments)
    return labeled.take(np.arange(len(labeled.pairs)))


def labels_and_candidates(params: Params) -> tuple[PseudoLabelCandidates, Candidates]:
    return label_all(params, [lambda train: Oracle()])  # type: ignore[arg-type]


def test_labels_are_teacher_masks_at_the_original_image_size(run):
    labels, seen = labels_and_candidates(params_of())
    wanted = sentences_of("unlabeled").tolist()
    assert labels.pairs.sent_id.tolist() == seen.sent_id.tolist() == wanted
    truth = true_masks()
    for sent_id, counts in zip(wanted, teachers_own(labels), strict=True):
        mask = decode_rle(counts, HEIGHT, WIDTH)
        assert (mask & truth[sent_id]).sum() / (mask | truth[sent_id]).sum() > 0.75
    assert seen.cells.shape[:4] == (len(wanted), 1, GRID, GRID)


@pytest.mark.parametrize("fold_update", ["continue", "retrain"])
@pytest.mark.parametrize("method", ["reinforce", "agreement"])
def test_cross_labeling_asks_only_teachers_that_never_learn_from_the_image(run, monkeypatch, method, fold_update):
    """The two fold teachers of round 1 train on nearly all images, and each labels the images that it lacks. Every
    sentence has an accepted pseudo-label."""
    params = params_of(method, cross_label=True, fold_update=fold_update, candidates=["teacher", "neighbor"])
    teachers = [Oracle(), Oracle()]
    labels, seen = label_all(params, [lambda train, one=one: one for one in teachers])
    asked = [set(teacher.asked) for teacher in teachers]
    assert set.union(*asked) == set(sentences_of("unlabeled").tolist())
    assert asked[0] & asked[1] == set()
    assert all(asked)
    assert labels.pairs.sent_id.tolist() == seen.sent_id.tolist() == sentences_of("unlabeled").tolist()
    whole, features = label_all(replace_select(params, cross_label=False), [lambda train: Oracle()])
    assert labels.candidates == whole.candidates  # all teachers are alike: the sentences keep their rows
    np.testing.assert_array_equal(seen.cells, features.cells)

    path = records.round_folder(1) / "pseudo_labels.parquet"
    table = pseudo_label_table(params, 1, labels, seen, selection(len(labels.pairs), list(range(len(labels.pairs)))))
    records.write_table(table, path, records.PSEUDO_LABELS)
    taught: list[set[int]] = []

    def note(params, run_name, network, streams, *rest):
        taught.append({int(number) for stream in streams for number in stream.batches.pairs.sent_id})

    monkeypatch.setattr(fold_teachers, "run_training", note)
    monkeypatch.setattr(fold_teachers.Segmenter, "load", lambda folder: SimpleNamespace())
    for fold in (0, 1):
        fold_teachers.train_teacher(params, 1, fold, run / "teacher")
    image = {
        row["sent_id"]: row["image_id"] for row in records.read_table(records.INDEX.refs, records.REFS).to_pylist()
    }
    for learned, labeled in zip(taught, asked, strict=True):
        assert not {image[number] for number in learned} & {image[number] for number in labeled}
    training = {*sentences_of("labeled").tolist(), *sentences_of("unlabeled").tolist()}
    assert set.union(*taught) == training
    held_out, _ = scored_by_fold(params, monkeypatch)
    for learned, labeled in zip(taught, held_out, strict=True):
        assert not {image[number] for number in learned} & {image[number] for number in labeled}


def replace_select(params: Params, **changes: object) -> Params:
    return params.model_copy(update={"select": params.select.model_copy(update=changes)})


class Killed(BaseException):
    """Stands for a kill."""


class Mortal(Doubtful):
    """It is killed before one of its chunks."""

    def __init__(self, killed_at: int) -> None:
        super().__init__()
        self.left = killed_at

    def views(
        self, batches: BatchMaker, batch_size: int, what: str | None
    ) -> Iterator[tuple[NDArray[np.int64], Views]]:
        if not self.left:
            raise Killed
        self.left -= 1
        yield from super().views(batches, batch_size, what)


@pytest.mark.parametrize("method", ["reinforce", "threshold", "semires"])
def test_killed_labeling_resumes_to_the_same_candidates(run, tmp_path, monkeypatch, method):
    monkeypatch.setattr(batch_predictor, "CHUNK_PAIRS", 1)
    params = params_of(method, candidates=["teacher", "prior"] if method == "reinforce" else ["teacher"])
    labels, features = label_all(params, [lambda train: Doubtful()])  # type: ignore[arg-type]
    folder = tmp_path / "scratch"
    mortal = Mortal(1)
    with pytest.raises(Killed):
        label_all(params, [lambda train: mortal], folder)  # type: ignore[arg-type]
    resumed = Doubtful()
    again, same_features = label_all(params, [lambda train: resumed], folder)  # type: ignore[arg-type]
    assert set(resumed.asked) < set(labels.pairs.sent_id.tolist())  # the first batch was stored
    for name in ("candidates", "confident", "weight", "matched"):
        assert getattr(again, name) == getattr(labels, name)
    for field in fields(Candidates):
        np.testing.assert_array_equal(getattr(same_features, field.name), getattr(features, field.name))
        assert getattr(same_features, field.name).dtype == getattr(features, field.name).dtype


def test_stored_labels_belong_to_one_teacher_and_one_set_of_parameters(run):
    """Another teacher, another table, other candidates, another batch size or number of threads never resume."""
    weights = records.round_folder(0) / "model/model.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.write_bytes(b"one")
    params = params_of()
    keys = [label_key(params, 1), label_key(params_of(candidates=["teacher", "prior"]), 1)]
    other = params.evaluate.model_copy(update={"batch_size": 4})
    keys.append(label_key(params.model_copy(update={"evaluate": other}), 1))
    assert label_key(params, 1) == keys[0]
    one, two, threads = ({"workers": 2}, {"executor": "ray"}, {"cpus_per_worker": 7})
    for changes in (one, two, threads):
        cluster = params.cluster.model_copy(update=changes)
        key = label_key(params.model_copy(update={"cluster": cluster}), 1)
        assert (key == keys[0]) == (changes is not threads)
    weights.write_bytes(b"two")
    keys.append(label_key(params, 1))
    records.PRIORS_PATH.write_bytes(records.PRIORS_PATH.read_bytes() + b" ")
    keys.append(label_key(params, 1))
    assert len(set(keys)) == len(keys)


def test_labels_of_fold_teachers_belong_to_their_weights(run):
    """The last model is no input of cross-labeling, and the seed draws its folds."""
    folder, params = records.round_folder(0), params_of(cross_label=True)
    for name in ("model", "folds/0", "folds/1"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "model.safetensors").write_bytes(b"one")
    keys = [label_key(one, 1) for one in (params, params_of(), params.model_copy(update={"seed": 1}))]
    (folder / "model/model.safetensors").write_bytes(b"two")
    assert label_key(params, 1) == keys[0]
    (folder / "folds/1/model.safetensors").write_bytes(b"two")
    keys.append(label_key(params, 1))
    assert len(set(keys)) == len(keys)


def test_confident_pixels_pass_the_threshold(run):
    """The probability is 0.95 inside (confidence 0.95) and 0.2 outside (confidence 0.8), with a blurred border
    between."""
    labels, _ = labels_and_candidates(params_of("threshold", pixel_threshold=0.9))
    for counts, confident in zip(teachers_own(labels), labels.confident, strict=True):
        mask, sure = decode_rle(counts, HEIGHT, WIDTH), decode_rle(confident, HEIGHT, WIDTH)
        assert sure.any()
        assert not (sure & ~mask).any()
    everything, _ = labels_and_candidates(params_of("threshold", pixel_threshold=0.5))
    assert all(decode_rle(counts, HEIGHT, WIDTH).all() for counts in everything.confident)
    nothing, _ = labels_and_candidates(params_of("threshold", pixel_threshold=0.99))
    assert not any(decode_rle(counts, HEIGHT, WIDTH).any() for counts in nothing.confident)


def test_pseudo_label_table_records_the_selection(run):
    params = params_of()
    labels, seen = labels_and_candidates(params)
    count = len(labels.pairs)
    made = selection(count, accepted=[0, 3])
    rows = pseudo_label_table(params, 2, labels, seen, made).to_pylist()
    assert [row["sent_id"] for row in rows] == labels.pairs.sent_id.tolist()
    assert [row["accepted"] for row in rows] == [number in (0, 3) for number in range(count)]
    assert [row["rle_counts"] for row in rows] == teachers_own(labels)
    assert {row["round"] for row in rows} == {2}
    assert {row["method"] for row in rows} == {"reinforce"}
    assert {(row["height"], row["width"]) for row in rows} == {(HEIGHT, WIDTH)}
    np.testing.assert_allclose([row["reward"] for row in rows], made.reward, rtol=1e-6)
    np.testing.assert_allclose([row["accept_prob"] for row in rows], made.accept_prob, rtol=1e-6)
    np.testing.assert_allclose([row["prior_iou"] for row in rows], 1.0, atol=1e-3)


def test_pseudo_label_table_holds_the_chosen_candidate(run):
    """Two different candidates are chosen in turn. Mask, name, and IoU with the proposal are those of the chosen
    one."""
    params = params_of(candidates=["teacher", "prior"])
    labels, seen = label_all(params, [lambda train: Doubtful()])  # type: ignore[arg-type]
    assert all(first != second for first, second in labels.candidates)
    count = len(labels.pairs)
    made = replace(selection(count, list(range(count))), choice=np.arange(count) % 2)
    rows = pseudo_label_table(params, 1, labels, seen, made).to_pylist()
    assert [row["candidate"] for row in rows] == ["teacher" if number % 2 == 0 else "prior" for number in range(count)]
    truth = true_masks()
    for number, row in enumerate(rows):
        assert row["rle_counts"] == labels.candidates[number][number % 2]
        mask = decode_rle(row["rle_counts"], HEIGHT, WIDTH)
        iou = (mask & truth[row["sent_id"]]).sum() / (mask | truth[row["sent_id"]]).sum()
        assert (iou > 0.4) == (number % 2 == 1)  # fitted to a black image, the truth loses its rim
        assert (row["prior_iou"] > 0.4) == (number % 2 == 1)


def test_oracle_selects_the_best_candidate_of_each_sentence(run):
    """The prior is correct and the teacher wrong, in either order."""
    for names in (["teacher", "prior"], ["prior", "teacher"]):
        params = params_of("oracle", candidates=names)
        labels, seen = label_all(params, [lambda train: Doubtful()])  # type: ignore[arg-type]
        made = select_labels(params.select, seen, None, score_unlabeled(params, labels, unlabeled_truth(labels)))
        assert {names[k] for k in made.choice} == {"prior"}
        assert made.accept_prob.min() > 0.4


@pytest.mark.parametrize("method", ["reinforce", "oracle", "topk", "ranksum", "threshold", "semires", "none"])
def test_selection_chunk_by_chunk_equals_the_selection_at_once(run, tmp_path, monkeypatch, method):
    """The sentences are not in the order of their images, of which each fills a chunk. Fixed rules rank all of them."""
    images = records.read_table(records.INDEX.images, records.IMAGES)
    records.write_table(images.take(np.arange(len(images))[::-1]), records.INDEX.images, records.IMAGES)
    names = ["prior", "teacher"] if method in ("reinforce", "oracle") else ["teacher"]
    params = params_of(method, candidates=names, policy_steps=5, keep_fraction=0.4)
    labels, seen = label_all(params, [lambda train: Doubtful()])
    truth = score_unlabeled(params, labels, unlabeled_truth(labels))
    policy = train_policy(seen, truth, seen, params.select, seed=0).policy if method == "reinforce" else None
    made = select_labels(params.select, seen, policy, truth if method == "oracle" else None)
    whole = pseudo_label_table(params, 1, labels, seen, made)

    monkeypatch.setattr(batch_predictor, "CHUNK_PAIRS", 1)
    labeled = label_unlabeled(params, [lambda train: Doubtful()], tmp_path / "scratch")
    assert len(labeled.chunks) == 2
    assert labeled.chunks[0].min() > labeled.chunks[1].max()
    found = select_chunks(params, 1, labeled, policy)
    assert found["sent_id"].to_pylist() == sentences_of("unlabeled").tolist()
    numbers = ["accept_prob", "reward"]  # sums of other batches may differ in the last bit
    for name in numbers:
        np.testing.assert_allclose(found[name].to_numpy(), whole[name].to_numpy(), rtol=1e-6)
    assert found.drop_columns(numbers).equals(whole.drop_columns(numbers))


def test_taking_some_labels_reads_only_their_chunks(run, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_predictor, "CHUNK_PAIRS", 1)
    params = params_of(candidates=["teacher", "prior"])
    labeled = label_unlabeled(params, [lambda train: Doubtful()], tmp_path / "scratch")
    labels, seen = labeled.take(np.arange(len(labeled.pairs)))
    labeled.tables[0].unlink()
    rows = labeled.chunks[1][::-1]
    assert 1 < len(rows) < len(labeled.pairs)
    some, features = labeled.take(rows)
    assert some.pairs.sent_id.tolist() == labels.pairs.sent_id[rows].tolist()
    assert some.candidates == [labels.candidates[row] for row in rows]
    for name in ("sent_id", "cells", "sentence", "confidence", "prior_iou"):
        np.testing.assert_array_equal(getattr(features, name), getattr(seen, name)[rows])
    np.testing.assert_array_equal(labeled.confidence, seen.confidence)
    np.testing.assert_array_equal(labeled.prior_iou, seen.prior_iou)


def test_semires_stores_a_weight_for_each_pixel(run):
    """0.95 has the weight 1.3 - N(0.95; 0.5, 0.1) = 0.8417, and 0.2 has 0.4956: 215 and 126 of 255."""
    params = params_of("semires")
    labels, seen = labels_and_candidates(params)
    made = selection(len(labels.pairs), [0])
    for row in pseudo_label_table(params, 1, labels, seen, made).to_pylist():
        weight = np.frombuffer(row["weight"], np.uint8)
        assert weight.shape == (24 * 24,)
        assert weight.max() == 215
        assert np.median(weight) == 126


class MatchingSam:
    """Matches every second label, with the upper half of the image; refines each to the left half."""

    def match(self, rows, label):
        upper = np.zeros(label.shape[1:], dtype=bool)
        upper[: len(upper) // 2] = True
        full = encode_rle(np.arange(HEIGHT)[:, None].repeat(WIDTH, 1) < HEIGHT // 2)
        return [Match(upper, full) if row % 2 else None for row in rows.tolist()]

    def refine(self, rows, prob):
        left = np.zeros(prob.shape, dtype=bool)
        left[..., : prob.shape[-1] // 2] = True
        return Refined(left, np.full(len(rows), 0.75, np.float32))


def test_semires_takes_matching_masks_of_sam_and_weighs_only_the_others(run, monkeypatch):
    params = params_of("semires")
    plain, _ = labels_and_candidates(params)
    monkeypatch.setattr(generate, "sam_masks_of", lambda params, pairs: MatchingSam())
    labels, seen = labels_and_candidates(params)
    count = len(labels.pairs)
    rows = pseudo_label_table(params, 1, labels, seen, selection(count, list(range(count)))).to_pylist()
    for number, row in enumerate(rows):
        mask, weight = decode_rle(row["rle_counts"], HEIGHT, WIDTH), np.frombuffer(row["weight"], np.uint8)
        if number % 2:
            assert row["candidate"] == "sam"
            assert mask[: HEIGHT // 2].all()
            assert not mask[HEIGHT // 2 :].any()
            assert (weight == 255).all()
        else:
            assert row["candidate"] == "teacher"
            assert row["rle_counts"] == plain.candidates[number][0]
            assert row["weight"] == plain.weight[number]
    size = seen.sentence[:, 0, SENTENCE_FEATURES.index("size")]
    np.testing.assert_allclose(size[1::2], 0.5**0.5, atol=1e-3)  # features describe the label that is taken


def test_sams_mask_is_a_candidate_with_its_own_estimate(run, monkeypatch):
    """In labels, and in the scores of labeled sentences."""
    monkeypatch.setattr(generate, "sam_masks_of", lambda params, pairs: MatchingSam())
    params = params_of(candidates=["teacher", "sam"])
    labels, seen = labels_and_candidates(params)
    for made in labels.candidates:
        mask = decode_rle(made[1], HEIGHT, WIDTH)
        assert mask[:, : WIDTH // 2].all()
        assert not mask[:, WIDTH // 2 :].any()
    column = {name: seen.sentence[..., SENTENCE_FEATURES.index(name)] for name in ("is_sam", "sam_iou", "is_teacher")}
    assert (column["is_sam"] == [0, 1]).all()
    assert (column["is_teacher"] == [1, 0]).all()
    np.testing.assert_allclose(column["sam_iou"], 0.75)  # of the sentence: both candidates know it
    count = len(labels.pairs)
    made = replace(selection(count, list(range(count))), choice=np.ones(count, np.int64))
    rows = pseudo_label_table(params, 1, labels, seen, made).to_pylist()
    assert {row["candidate"] for row in rows} == {"sam"}
    labeled = pairs_of(params, "labeled")
    scored, truth = score_labeled(params, Oracle(), batches_of(params, labeled), labeled_targets(labeled), "test")
    assert truth.iou.shape == (4, 2)
    assert (truth.iou[:, 0] > truth.iou[:, 1]).all()  # the teacher is right, the left half is not
    assert (scored.sentence[..., SENTENCE_FEATURES.index("sam_iou")] == 0.75).all()


@pytest.mark.parametrize("policy", ["reinforce", "threshold", "all"])
def test_rejected_labels_keep_no_pixels(run, policy):
    """This holds whatever cells the selection still contains."""
    params = params_of(policy)
    labels, seen = labels_and_candidates(params)
    rows = pseudo_label_table(params, 1, labels, seen, selection(len(labels.pairs), accepted=[1])).to_pylist()
    kept = [decode_rle(row["keep_rle"], HEIGHT, WIDTH).any() for row in rows]
    assert kept == [number == 1 for number in range(len(rows))]


def test_kept_cells_expand_to_pixels(run):
    params = params_of()
    labels, seen = labels_and_candidates(params)
    cells = np.random.default_rng(0).random((len(labels.pairs), GRID, GRID)) > 0.5
    made = selection(len(labels.pairs), list(range(len(labels.pairs))), cells)
    rows = pseudo_label_table(params, 1, labels, seen, made).to_pylist()
    for row, kept in zip(rows, cells, strict=True):
        expected = kept.repeat(HEIGHT // GRID, axis=0).repeat(WIDTH // GRID, axis=1)
        np.testing.assert_array_equal(decode_rle(row["keep_rle"], HEIGHT, WIDTH), expected)


def test_threshold_rule_keeps_confident_pixels_instead_of_cells(run):
    params = params_of("threshold")
    labels, seen = labels_and_candidates(params)
    count = len(labels.pairs)
    none = np.zeros((count, GRID, GRID), dtype=bool)
    rows = pseudo_label_table(params, 1, labels, seen, selection(count, list(range(count)), none)).to_pylist()
    assert [row["keep_rle"] for row in rows] == labels.confident


def test_refuses_a_run_without_unlabeled_sentences(run):
    split = records.read_table(records.SPLIT_PATH, records.SPLIT).to_pylist()
    rows = [row | {"role": row["role"].replace("unlabeled", "labeled")} for row in split]
    records.write_table(records.make_table(rows, records.SPLIT), records.SPLIT_PATH, records.SPLIT)
    with pytest.raises(InputError, match=r"no sentence is unlabeled.*set round to 0"):
        labels_and_candidates(params_of())


# --- scoring


def scored_by_fold(params, monkeypatch):
    """Labeled sentences that each fold teacher scores, and the scores."""
    teachers: dict[str, Oracle] = {}

    class Runs:
        @staticmethod
        def from_run(folder, params):
            return teachers.setdefault(str(folder), Oracle())

    monkeypatch.setattr(generate, "BatchPredictor", Runs)
    scores = score_out_of_fold(params, records.round_folder(0) / "folds")
    return [teachers[str(records.round_folder(0) / f"folds/{fold}")].asked for fold in range(len(teachers))], scores


def test_fold_teachers_score_labeled_sentences_of_held_out_images(run, monkeypatch):
    asked, (seen, truth) = scored_by_fold(params_of(folds=2), monkeypatch)
    assert sorted(sorted(some) for some in asked) == [[0, 1], [2, 3]]  # one image each
    np.testing.assert_array_equal(seen.sent_id, truth.sent_id)
    assert sorted(truth.sent_id.tolist()) == [0, 1, 2, 3]
    np.testing.assert_allclose(truth.iou, 1.0)  # the teacher predicts the truth


def test_oracle_scores_labels_against_the_truth(run):
    params = params_of("oracle")
    labels, _ = labels_and_candidates(params)
    empty = encode_rle(np.zeros((HEIGHT, WIDTH), dtype=bool))
    truth = true_masks()
    right = [encode_rle(truth[number]) for number in labels.pairs.sent_id.tolist()]
    mixed = [counts if row % 2 else empty for row, counts in enumerate(right)]
    truth = score_unlabeled(
        params, PseudoLabelCandidates(labels.pairs, [[counts] for counts in mixed], [], []), unlabeled_truth(labels)
    )
    np.testing.assert_array_equal(truth.sent_id, labels.pairs.sent_id)
    np.testing.assert_array_equal(truth.iou[:, 0], np.arange(len(mixed)) % 2)


def test_oracle_requires_the_true_masks(run):
    params = params_of("oracle")
    labeled = label_unlabeled(params, [lambda train: Doubtful()])
    known = records.read_table(records.LABELED_MASKS_PATH, records.MASKS)
    records.write_table(known, records.INDEX.masks, records.MASKS)
    with pytest.raises(ArtifactError, match="lacks the mask"):
        select_chunks(params, 1, labeled, None)
