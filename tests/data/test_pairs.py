from dataclasses import fields, replace

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from synthetic_run import write_run
from toy_pairs import FLAT_PROB, rows_of, toy_batches, toy_pairs, toy_params

from l2l_core.artifacts import records
from l2l_core.core.images import read_image
from l2l_core.core.masks import encode_rle
from l2l_core.data.load import corpus, labeled_targets, pairs_of, sentences_of
from l2l_core.data.pairs import (
    Batch,
    BatchMaker,
    ImageStore,
    Pairs,
    Targets,
    load_pairs,
    load_targets,
    resize_image,
    with_priors,
)
from l2l_core.errors import ArtifactError, InputError

REVEALING = ("mask", "label", "truth", "ann", "rle", "keep", "bbox", "area", "category")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A synthetic run in the current folder."""
    write_run(tmp_path, images_per_split=3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(sent_ids=None, *, priors: bool = True) -> Pairs:
    paths = (records.PRIORS_PATH, records.PROPOSALS_PATH) if priors else (None, None)
    return load_pairs(records.INDEX, sent_ids, *paths, 24, FLAT_PROB)


def assert_same_batch(first: Batch, second: Batch) -> None:
    for field in fields(Batch):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        else:
            assert a == b, field.name


# --- no ground truth


def test_pairs_have_no_field_that_could_hold_ground_truth():
    names = [field.name for field in fields(Pairs)]
    assert not [name for name in names for word in REVEALING if word in name]


@pytest.mark.parametrize("priors", [True, False])
def test_loads_pairs_from_an_index_without_ground_truth(run, priors):
    whole = load(priors=priors)
    table = pq.read_table(records.INDEX.refs)
    pq.write_table(table.drop_columns(["bbox", "ann_id", "category"]), records.INDEX.refs)
    records.INDEX.masks.unlink()
    without = load(priors=priors)
    for field in fields(Pairs):
        np.testing.assert_array_equal(getattr(without, field.name), getattr(whole, field.name))


# --- tables -> pairs


def test_pairs_match_the_tables(run):
    order = np.random.default_rng(0).permutation(load().sent_id)
    pairs = load(order)
    np.testing.assert_array_equal(pairs.sent_id, order)
    refs = {row["sent_id"]: row for row in pq.read_table(records.INDEX.refs).to_pylist()}
    images = {row["image_id"]: row for row in pq.read_table(records.INDEX.images).to_pylist()}
    priors = {row["sent_id"]: row for row in pq.read_table(records.PRIORS_PATH).to_pylist()}
    soft = {row["sent_id"]: row for row in pq.read_table(records.PROPOSALS_PATH).to_pylist()}
    for row, sent_id in enumerate(order.tolist()):
        image = images[refs[sent_id]["image_id"]]
        assert pairs.sentence[row] == refs[sent_id]["sentence"]
        assert pairs.image_path[pairs.image_row[row]] == image["file_name"]
        assert pairs.hw[row].tolist() == [image["height"], image["width"]]
        box = priors[sent_id]["bbox"]
        assert pairs.has_box[row] == (box is not None)
        expected = np.divide(box, [64, 48, 64, 48]) if box else np.zeros(4)
        np.testing.assert_allclose(pairs.box[row], expected, rtol=1e-6)
        assert pairs.prior_text[row] == ("dot" if box else "")
        assert pairs.proposal[row].tobytes() == soft[sent_id]["soft"]
        assert pairs.proposal_score[row] == soft[sent_id]["score"]


def test_prior_text_comes_from_the_first_response(run):
    rows = pq.read_table(records.PRIORS_PATH).to_pylist()
    rows[0] |= {"target": "cup", "attributes": ["red", "big"], "relation": "left of the plate"}
    rows[1] |= {"target": None, "attributes": [], "relation": "far left"}
    second = rows[0] | {"sample_index": 1, "target": "plate", "bbox": [0.0, 0.0, 1.0, 1.0]}
    records.write_table(records.make_table([second, *rows], records.PRIORS), records.PRIORS_PATH, records.PRIORS)
    pairs = load(np.array([rows[0]["sent_id"], rows[1]["sent_id"]]))
    assert pairs.prior_text == ["cup red big left of the plate", "far left"]
    np.testing.assert_allclose(pairs.box[0] * [64, 48, 64, 48], rows[0]["bbox"], rtol=1e-5)


def test_pairs_without_priors_have_flat_proposals_with_score_zero(run):
    pairs = load(priors=False)
    assert len(pairs) == 18
    assert (pairs.proposal == 26).all()  # 0.1 * 255 = 25.5
    assert pairs.proposal.shape == (18, 24, 24)
    assert not pairs.proposal_score.any()
    assert not pairs.has_box.any()
    assert not pairs.box.any()
    assert set(pairs.prior_text) == {""}


def test_with_priors_fills_known_pairs_and_leaves_the_others_flat(run):
    whole, bare = load(), load(priors=False)
    tables = [pq.read_table(path) for path in (records.PRIORS_PATH, records.PROPOSALS_PATH)]
    known = np.array([3, 0, 7])
    asked = bare.take(np.array([3, 0, 7, 1, 2]))
    asked = replace(asked, sent_id=np.append(bare.sent_id[known], [-9, 2**62]))
    got = with_priors(asked, *tables, FLAT_PROB)
    for some, same in (
        (got.take(np.arange(3)), whole.take(known)),
        (got.take(np.arange(3, 5)), bare.take(rows_of(1, 2))),
    ):
        for name in ("sentence", "prior_text", "box", "has_box", "proposal", "proposal_score", "hw"):
            np.testing.assert_array_equal(getattr(some, name), getattr(same, name), err_msg=name)
    empty = with_priors(bare, *(table.slice(0, 0) for table in tables), FLAT_PROB)
    np.testing.assert_array_equal(empty.proposal, bare.proposal)


def test_proposals_do_not_depend_on_their_order_in_the_table_nor_on_its_parts(run, monkeypatch):
    table = pq.read_table(records.PROPOSALS_PATH)
    expected = {row["sent_id"]: row for row in table.to_pylist()}
    whole = load()
    records.write_table(
        table.take(np.random.default_rng(0).permutation(len(table))), records.PROPOSALS_PATH, table.schema
    )
    monkeypatch.setattr(records, "PART_ROWS", 4)
    chosen = whole.sent_id[[7, 2, 11, 0, 16]]
    pairs = load(chosen)
    for row, sent_id in enumerate(chosen.tolist()):
        assert pairs.proposal[row].tobytes() == expected[sent_id]["soft"]
        assert pairs.proposal_score[row] == expected[sent_id]["score"]
    np.testing.assert_array_equal(load().proposal, whole.proposal)


def test_loads_some_pairs_of_a_role_in_the_given_order(run):
    params, unlabeled = toy_params(), sentences_of("unlabeled")
    chosen = unlabeled[[3, 0, 2]]
    some, whole = pairs_of(params, "unlabeled", only=chosen), pairs_of(params, "unlabeled")
    for name in ("sent_id", "sentence", "prior_text", "box", "proposal", "proposal_score"):
        np.testing.assert_array_equal(getattr(some, name), getattr(whole.take(rows_of(3, 0, 2)), name), err_msg=name)
    with pytest.raises(ArtifactError, match="a table names a sent_id that is not unlabeled; run dvc repro"):
        pairs_of(params, "unlabeled", only=sentences_of("labeled"))


def test_lists_the_pairs_of_an_image_in_order(tmp_path):
    pairs = replace(toy_pairs(tmp_path, 6)[0], image_row=np.array([3, 0, 3, 5, 0, 3]))
    found = [pairs.of_image(image).tolist() for image in range(6)]
    assert found == [[1, 4], [], [], [0, 2, 5], [], [3]]
    assert pairs.take(rows_of(5, 1)).of_image(3).tolist() == [0]


def test_reads_an_image_of_several_sentences_once_per_batch(tmp_path, monkeypatch):
    """Even if the cache has no room."""
    read, pairs = [], replace(toy_pairs(tmp_path)[0], image_row=np.array([2, 0, 2, 2]))
    monkeypatch.setattr("l2l_core.data.pairs.read_image", lambda path: read.append(path) or read_image(path))
    batch = replace(toy_batches(pairs), cache_bytes=0)(rows_of(0, 1, 2, 3))
    assert sorted(read) == [pairs.image_path[0], pairs.image_path[2]]
    expected = [resize_image(read_image(pairs.image_path[row]), 32) for row in (2, 0, 2, 2)]
    np.testing.assert_array_equal(batch.image.permute(0, 2, 3, 1).numpy(), expected)


def test_loads_an_empty_selection_of_sentences(run):
    for priors in (True, False):
        assert len(load(np.zeros(0, dtype=np.int64), priors=priors)) == 0


def test_missing_sentence_error_names_the_file(run):
    with pytest.raises(ArtifactError, match=r"refs\.parquet: lacks sentences .*dvc repro"):
        load(np.array([0, 12345]))
    table = pq.read_table(records.PROPOSALS_PATH)
    records.write_table(table.slice(1), records.PROPOSALS_PATH, records.PROPOSALS)
    with pytest.raises(ArtifactError, match=r"proposals\.parquet: lacks sentences .*dvc repro"):
        load()


def test_true_masks_are_available_only_for_labeled_sentences(run):
    labeled, unlabeled = load(sentences_of("labeled")), load(sentences_of("unlabeled"))
    refs = {row["sent_id"]: row["ann_id"] for row in pq.read_table(records.INDEX.refs).to_pylist()}
    masks = {row["ann_id"]: row for row in pq.read_table(records.INDEX.masks).to_pylist()}
    wanted = {refs[sent_id] for sent_id in labeled.sent_id.tolist()}
    table = records.make_table([masks[ann_id] for ann_id in wanted], records.MASKS)
    records.write_table(table, records.LABELED_MASKS_PATH, records.MASKS)
    records.INDEX.masks.unlink()
    backwards = labeled.take(np.arange(len(labeled))[::-1])
    expected = [masks[refs[sent_id]]["rle_counts"] for sent_id in backwards.sent_id.tolist()]
    assert labeled_targets(backwards).label == expected
    with pytest.raises(ArtifactError, match=r"labeled_masks\.parquet: lacks the mask"):
        load_targets(records.LABELED_MASKS_PATH, records.INDEX, unlabeled)


def test_pairs_of_selects_by_role_and_corpus_collects_training_texts(run):
    split = pq.read_table(records.SPLIT_PATH).to_pylist()
    params = toy_params(proposals={"size_px": 24})
    parts = []
    for role in records.ROLES:
        pairs = pairs_of(params, role)
        assert pairs.sent_id.tolist() == [row["sent_id"] for row in split if row["role"] == role]
        parts.append(pairs)
    assert not any(pairs_of(params, "eval", with_priors=False).prior_text)
    texts = corpus(parts[:2])
    assert set(texts) == {text for pairs in parts[:2] for text in pairs.sentence + pairs.prior_text}


# --- choosing pairs


def test_selects_pairs_by_row_and_by_sentence_id(tmp_path):
    pairs, targets = toy_pairs(tmp_path)
    chosen = pairs.take(rows_of(3, 0, 3))
    assert chosen.sent_id.tolist() == [121, 100, 121]
    assert chosen.sentence == [pairs.sentence[3], pairs.sentence[0], pairs.sentence[3]]
    np.testing.assert_array_equal(chosen.hw, pairs.image_hw[[3, 0, 3]])
    np.testing.assert_array_equal(chosen.proposal[1], pairs.proposal[0])
    shuffled = pairs.take(rows_of(2, 0, 3, 1))
    assert shuffled.with_sent_ids(np.array([121, 100])).sentence == [pairs.sentence[3], pairs.sentence[0]]
    assert len(shuffled.with_sent_ids(np.zeros(0, dtype=np.int64))) == 0
    assert targets.take(rows_of(2, 1)).label == [targets.label[2], targets.label[1]]
    assert targets.take(rows_of(2)).keep is None
    assert replace(targets, keep=targets.label[::-1]).take(rows_of(0)).keep == [targets.label[3]]
    assert targets.take(rows_of(2)).weight is None
    weight = np.arange(4, dtype=np.uint8)[:, None, None].repeat(3, 1).repeat(3, 2)
    assert replace(targets, weight=weight).take(rows_of(2, 0)).weight[:, 1, 1].tolist() == [2, 0]


@pytest.mark.parametrize("unknown", [99, 101, 10_000])
def test_refuses_an_unknown_sentence_id(tmp_path, unknown):
    pairs, _ = toy_pairs(tmp_path)
    with pytest.raises(ArtifactError, match="sent_id that the index lacks"):
        pairs.with_sent_ids(np.array([100, unknown]))
    with pytest.raises(ArtifactError):
        pairs.take(np.zeros(0, dtype=np.int64)).with_sent_ids(np.array([unknown]))


# --- images


def test_resize_image_averages_when_shrinking_and_keeps_pixels_at_equal_size():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_image(image, 16), image)
    means = image.astype(float).reshape(8, 2, 8, 2, 3).mean((1, 3))
    np.testing.assert_allclose(resize_image(image, 8), means, atol=0.51)
    assert resize_image(image[:3, :5], 16).shape == (16, 16, 3)


@pytest.mark.parametrize("room", [0, 3 * 32 * 32, 1 << 20])
def test_image_cache_does_not_change_the_images(tmp_path, room):
    pairs, _ = toy_pairs(tmp_path)
    store = ImageStore(pairs.image_path, 32, room)
    for _ in range(2):
        for row in (2, 0, 1):
            expected = cv2.imread(pairs.image_path[row])[..., ::-1]
            expected = cv2.resize(expected, (32, 32), interpolation=cv2.INTER_AREA)
            np.testing.assert_array_equal(store[row], expected)
    (tmp_path / "2.png").unlink()
    if room:
        assert store[2].shape == (32, 32, 3)
    else:
        with pytest.raises(InputError):
            store[2]


# --- batches


def test_batch_matches_the_selected_pairs(tmp_path):
    pairs, _ = toy_pairs(tmp_path)
    batch = toy_batches(pairs)(rows_of(1, 0))
    assert batch.image.shape == (2, 3, 32, 32)
    assert batch.image.dtype == torch.uint8
    assert batch.sentence == [pairs.sentence[1], pairs.sentence[0]]
    assert batch.prior_text == [pairs.prior_text[1], pairs.prior_text[0]]
    np.testing.assert_array_equal(batch.box.numpy(), pairs.box[[1, 0]])
    np.testing.assert_allclose(batch.proposal[:, 0].numpy() * 255, pairs.proposal[[1, 0]], rtol=1e-6)
    assert batch.proposal.dtype == torch.float32
    assert batch.label is None
    assert batch.keep is None


def test_masks_are_resized_with_their_images(tmp_path):
    """16 x 8 masks at network size 32: each pixel becomes a 2 x 4 block."""
    pairs, _ = toy_pairs(tmp_path, 2)
    pairs = replace(pairs, image_hw=np.array([[16, 8], [16, 8]]))
    masks = np.random.default_rng(0).random((4, 16, 8)) > 0.5
    targets = Targets([encode_rle(masks[0]), encode_rle(masks[1])], [encode_rle(masks[2]), encode_rle(masks[3])])
    batch = toy_batches(pairs)(rows_of(1, 0), targets)
    large = masks.repeat(2, axis=1).repeat(4, axis=2)
    np.testing.assert_array_equal(batch.label[:, 0].numpy(), large[[1, 0]])
    np.testing.assert_array_equal(batch.keep[:, 0].numpy(), large[[3, 2]])


def test_pixel_weights_are_resized_to_the_image_and_multiplied_by_the_keep_mask(tmp_path):
    """A ramp over 16 columns, resized to 32, equals cv2's bilinear resize; the keep mask covers half of the pixels."""
    pairs, targets = toy_pairs(tmp_path, 2)
    ramp = np.linspace(0, 255, 16).round().astype(np.uint8)[None].repeat(16, axis=0)
    flat = np.full((16, 16), 51, np.uint8)
    upper = [np.arange(height)[:, None].repeat(width, 1) < height / 2 for height, width in pairs.hw]
    targets = replace(targets, keep=[encode_rle(mask) for mask in upper], weight=np.stack([ramp, flat]))
    batch = toy_batches(pairs)(rows_of(1, 0), targets)
    keep = batch.keep[:, 0].numpy()
    np.testing.assert_allclose(keep[0, :16], 0.2, rtol=1e-6)  # 51 / 255
    expected = cv2.resize(ramp.astype(np.float32) / 255, (32, 32), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(keep[1, :16], expected[:16], atol=1e-6)
    assert not keep[:, 16:].any()
    assert batch.keep.dtype == torch.float32


def test_weights_of_0_and_1_equal_a_keep_mask(tmp_path):
    """At the network's input size nothing is resized, so the batches are bit-identical."""
    pairs, _ = toy_pairs(tmp_path, 2)
    pairs = replace(pairs, image_hw=np.array([[32, 32], [32, 32]]))
    masks = np.random.default_rng(2).random((4, 32, 32)) > 0.5
    labels = [encode_rle(mask) for mask in masks[:2]]
    kept = Targets(labels, keep=[encode_rle(mask) for mask in masks[2:]])
    weighed = Targets(labels, weight=masks[2:] * np.uint8(255))
    both = replace(kept, weight=np.full((2, 16, 16), 255, np.uint8))
    batches = toy_batches(pairs)
    first = batches(rows_of(0, 1), kept)
    assert 0 < first.keep.mean() < 1
    assert_same_batch(first, batches(rows_of(0, 1), weighed))
    assert_same_batch(first, batches(rows_of(0, 1), both))


def test_true_labels_keep_every_pixel(tmp_path):
    pairs, targets = toy_pairs(tmp_path)
    batch = toy_batches(pairs)(rows_of(0, 1, 2), targets)
    assert (batch.keep == 1).all()
    share = batch.label.mean((1, 2, 3)).numpy()
    np.testing.assert_allclose(share, [18 * 20 / (h * w) for h, w in pairs.hw[:3]], rtol=0.15)


def test_a_hidden_prior_equals_a_missing_prior(run):
    with_priors, without = load(), load(priors=False)
    rows = np.arange(len(without))
    hidden = BatchMaker(with_priors, 32, FLAT_PROB)(rows, None, np.ones(len(rows), dtype=bool))
    assert_same_batch(hidden, BatchMaker(without, 32, FLAT_PROB)(rows))
    assert with_priors.has_box.any()  # hiding changed no pair


def test_hiding_some_priors_leaves_the_others_unchanged(tmp_path):
    pairs, _ = toy_pairs(tmp_path)
    batches = toy_batches(pairs)
    some = batches(rows_of(0, 1, 2), None, np.array([False, True, False]))
    whole = batches(rows_of(0, 1, 2))
    assert some.has_box.tolist() == [True, False, True]
    assert some.prior_text == [whole.prior_text[0], "", whole.prior_text[2]]
    assert some.proposal_score.tolist() == [1, 0, 1]
    for name in ("box", "proposal"):
        torch.testing.assert_close(getattr(some, name)[[0, 2]], getattr(whole, name)[[0, 2]])
        assert getattr(some, name)[1].unique().numel() == 1
    assert some.sentence == whole.sentence
    assert torch.equal(some.image, whole.image)
