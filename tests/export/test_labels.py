"""Checks exported pseudo-labels with pycocotools and with the project's own reader of pairs."""

import json

import numpy as np
import pytest
from called import call
from pycocotools.coco import COCO
from synthetic_run import write_run

from l2l_core.artifacts import records
from l2l_core.core.masks import decode_rle, encode_rle
from l2l_core.datasets.read import load_dataset
from l2l_core.export import labels

EMPTY_ID = 6
"""A sentence whose accepted label is empty and therefore not exported."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A synthetic run with the pseudo-labels of rounds 1 and 2 and without true masks."""
    write_run(tmp_path, rounds=2, images_per_split=6)
    monkeypatch.chdir(tmp_path)
    records.INDEX.masks.unlink()
    table = records.read_table(records.round_folder(2) / "history/pseudo_labels.parquet", records.PSEUDO_LABELS)
    for number in (1, 2):
        rows = [row for row in table.to_pylist() if row["round"] == number]
        for row in rows:
            row["candidate"] = f"way {row['sent_id']}"
        empty = next(row for row in rows if row["sent_id"] == EMPTY_ID)
        empty |= {"rle_counts": encode_rle(np.zeros((48, 64))), "accepted": True}
        path = records.round_folder(number) / "pseudo_labels.parquet"
        records.write_table(records.make_table(rows, records.PSEUDO_LABELS), path, records.PSEUDO_LABELS)
    return tmp_path


def accepted(number: int) -> dict[int, dict]:
    """Return the accepted rows of a round by sent_id, without the empty label."""
    path = records.round_folder(number) / "pseudo_labels.parquet"
    rows = records.read_table(path, records.PSEUDO_LABELS).to_pylist()
    found = {row["sent_id"]: row for row in rows if row["accepted"] and row["sent_id"] != EMPTY_ID}
    assert 2 < len(found) < len(rows) - 1
    return found


def sentences() -> dict[int, str]:
    refs = records.read_table(records.INDEX.refs, records.REFS).to_pylist()
    return {row["sent_id"]: row["sentence"] for row in refs}


@pytest.mark.parametrize("polygons", [[], ["--polygons"]])
def test_pycocotools_reads_every_accepted_label(run, monkeypatch, capsys, polygons):
    assert call(monkeypatch, "export", "coco", *polygons) == 0
    assert f"{len(accepted(2))} of 10 pseudo-labels of round 2: export/pseudo_labels_round_2.json" in (
        capsys.readouterr().out
    )
    coco = COCO(str(run / "export" / "pseudo_labels_round_2.json"))
    expected = accepted(2)
    found = {annotation["sent_id"]: annotation for annotation in coco.loadAnns(coco.getAnnIds())}
    assert list(found) == sorted(expected)
    for sent_id, row in expected.items():
        annotation = found[sent_id]
        mask = decode_rle(row["rle_counts"], 48, 64)
        assert isinstance(annotation["segmentation"], list) == bool(polygons)
        np.testing.assert_array_equal(coco.annToMask(annotation), mask)
        x, y, width, height = (int(value) for value in annotation["bbox"])
        assert mask[y : y + height, x : x + width].sum() == mask.sum() == annotation["area"]
        assert mask[:, x].any()
        assert mask[y + height - 1].any()
        assert annotation["sentence"] == sentences()[sent_id]
        assert (annotation["method"], annotation["round"], annotation["iscrowd"]) == ("reinforce", 2, 0)
        assert annotation["candidate"] == f"way {sent_id}"
        assert annotation["score"] == pytest.approx(row["accept_prob"], abs=1e-6)
        keep = coco.annToMask(annotation | {"segmentation": annotation["keep"]})
        np.testing.assert_array_equal(keep, decode_rle(row["keep_rle"], 48, 64))
        (image,) = coco.loadImgs(annotation["image_id"])
        assert (run / image["file_name"]).is_file()
        assert (image["height"], image["width"]) == (48, 64)


def test_export_omits_the_true_categories(run, monkeypatch):
    assert call(monkeypatch, "export", "coco") == 0
    text = (run / "export" / "pseudo_labels_round_2.json").read_text()
    document = json.loads(text)
    assert [category["name"] for category in document["categories"]] == ["object"]
    assert {annotation["category_id"] for annotation in document["annotations"]} == {1}
    assert '"dot"' not in text  # the true category of every object


@pytest.mark.parametrize("polygons", [[], ["--polygons"]])
def test_ingest_reads_the_exported_lines(run, monkeypatch, polygons):
    """The real reader returns the same sentences, images, and masks, pixel by pixel."""
    assert call(monkeypatch, "export", "coco", "--round", 1, "--out", "deep/out", *polygons) == 0
    index = load_dataset("deep/out/pseudo_labels_round_1.jsonl", min_image_side_px=16)
    expected = accepted(1)
    refs = index.refs.to_pylist()
    assert [row["sent_id"] for row in refs] == sorted(expected)
    masks = {row["ann_id"]: row["rle_counts"] for row in index.masks.to_pylist()}
    files = {row["image_id"]: row["file_name"] for row in index.images.to_pylist()}
    images = records.read_table(records.INDEX.images, records.IMAGES).to_pylist()
    names = {row["image_id"]: row["file_name"] for row in images}
    image_of = {
        row["sent_id"]: row["image_id"] for row in records.read_table(records.INDEX.refs, records.REFS).to_pylist()
    }
    for row in refs:
        assert row["sentence"] == sentences()[row["sent_id"]]
        assert row["split"] == "train"
        assert masks[row["ann_id"]] == expected[row["sent_id"]]["rle_counts"]
        assert files[row["image_id"]] == names[image_of[row["sent_id"]]]


def test_export_bytes_are_reproducible(run, monkeypatch):
    for out in ("one", "two"):
        assert call(monkeypatch, "export", "coco", "--out", out) == 0
    for path in sorted((run / "one").iterdir()):
        assert path.read_bytes() == (run / "two" / path.name).read_bytes()


def test_refuses_labels_of_another_dataset(run, monkeypatch, capsys):
    """A later run on other images can have the same sent_ids."""
    rows = records.read_table(records.INDEX.images, records.IMAGES).to_pylist()
    other = [row | {"height": 96, "width": 96} for row in rows]
    records.write_table(records.make_table(other, records.IMAGES), records.INDEX.images, records.IMAGES)
    assert call(monkeypatch, "export", "coco") == 2
    said = capsys.readouterr().err
    assert "pseudo_labels.parquet: of another dataset than data/index/images.parquet: the label of sent_id " in said
    assert "is 48 x 64 px (height x width), its image 96 x 96; run dvc repro" in said
    assert not (run / "export").exists()


def test_refuses_an_empty_export_and_writes_no_file(run, monkeypatch, capsys):
    path = records.round_folder(2) / "pseudo_labels.parquet"
    rows = records.read_table(path, records.PSEUDO_LABELS).to_pylist()
    none = [row | {"accepted": row["sent_id"] == EMPTY_ID} for row in rows]
    records.write_table(records.make_table(none, records.PSEUDO_LABELS), path, records.PSEUDO_LABELS)
    assert call(monkeypatch, "export", "coco") == 2
    assert capsys.readouterr().err == "error: no pseudo-label to export: of 10 none is accepted and not empty\n"
    assert call(monkeypatch, "export", "coco", "--round", 4) == 2
    assert "--round: got 4, expected one of those with pseudo-labels (1, 2)" in capsys.readouterr().err
    assert not (run / "export").exists()


def test_refuses_sentences_missing_from_the_index(run, monkeypatch, capsys):
    refs = records.read_table(records.INDEX.refs, records.REFS)
    records.write_table(refs.slice(4), records.INDEX.refs, records.REFS)
    assert call(monkeypatch, "export", "coco") == 2
    assert "pseudo_labels.parquet: names sentences that data/index/refs.parquet lacks" in capsys.readouterr().err


def test_selects_accepted_labels_that_are_not_empty(run):
    chosen = labels.accepted_labels(labels.read_labels(2))
    assert chosen["sent_id"].tolist() == sorted(accepted(2))
