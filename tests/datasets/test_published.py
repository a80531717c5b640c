"""Counts of the published datasets, compared with totals from other sources and with the real annotations."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import pytest

from l2l_core.config import load_params
from l2l_core.datasets.published import ARCHIVES, SPLITS, warnings
from l2l_core.datasets.refcoco import read_refcoco
from stages import ingest

TOTALS = {
    # Objects and expressions of the full datasets from their papers (Yu et al. 2016; Nagaraja et al. 2016).
    ("refcoco", "unc"): (50_000, 142_210),
    ("refcoco+", "unc"): (49_856, 141_564),
    ("refcocog", "umd"): (49_822, 95_010),
    ("refcocog", "google"): (49_822, 95_010),  # the same refs, split differently
}

HELD_OUT = {"refcoco": 21_586, "refcoco+": 21_373, "refcocog": 14_498}
"""Sentences of all evaluation splits, as counted in Ref-L4's review of the three datasets (umd for the last)."""


@pytest.mark.parametrize("edition", SPLITS, ids="-".join)
def test_splits_add_up_to_the_published_totals(edition):
    rows = SPLITS[edition]
    assert (sum(row.refs for row in rows.values()), sum(row.sentences for row in rows.values())) == TOTALS[edition]
    if edition[1] != "google":
        held_out = sum(row.sentences for split, row in rows.items() if split != "train")
        assert held_out == HELD_OUT[edition[0]]


def test_every_published_dataset_has_an_archive_and_a_checksum_setting():
    names = ["refcoco", "refcoco+", "refcocog", "images"]
    assert list(ARCHIVES) == names
    assert list(load_params().fetch.sha256) == names
    for name, archive in ARCHIVES.items():
        assert archive.name == name
        assert archive.splits or archive.photos


def test_real_evaluation_splits_have_the_published_counts(real_data):
    refs = pickle.loads((real_data / "refcoco_annotations" / "refs(unc).p").read_bytes())
    counts = Counter(ref["split"] for ref in refs)
    sentences = Counter[str]()
    for ref in refs:
        sentences[ref["split"]] += len(ref["sentences"])
    expected = SPLITS["refcoco", "unc"]
    for split in ("val", "testA", "testB"):
        assert (counts[split], sentences[split]) == expected[split]
    assert counts["train"] == 432  # the file holds only these


def warned(data, name, split_by="auto"):
    folder = data.folder.rename(data.folder.with_name(name))
    index = read_refcoco(folder, "auto", split_by)
    return warnings(folder, split_by, index.refs)


def test_warns_of_another_dataset_under_a_published_name(tiny_refcoco):
    lines = warned(tiny_refcoco, "refcoco+")
    # The tiny dataset has four refs with two sentences each in train, one in val and testA, and no testB.
    assert [line.split(": ")[1].split(";")[0] for line in lines] == [
        "train has 4 refs with 8 sentences, published are 42,278 with 120,191",
        "val has 1 refs with 2 sentences, published are 3,805 with 10,758",
        "testA has 1 refs with 2 sentences, published are 1,975 with 5,726",
        "testB has 0 refs with 0 sentences, published are 1,798 with 4,889",
    ]
    assert all(line.split(": ")[0].endswith("refcoco+/refs(unc).p") for line in lines)


def test_does_not_warn_about_other_datasets(tiny_refcoco):
    assert warned(tiny_refcoco, "mine") == []


def test_does_not_warn_about_other_editions(tiny_refcoco):
    tiny_refcoco.save("refs(mine).json")
    assert warned(tiny_refcoco, "refcoco") == []


def test_checks_the_selected_edition(tiny_refcoco):
    for ref in tiny_refcoco.refs:
        ref["split"] = ref["split"].replace("testA", "test")
    tiny_refcoco.save("refs(umd).p")
    (tiny_refcoco.folder / "refs(google).p").write_bytes((tiny_refcoco.folder / "refs(umd).p").read_bytes())
    lines = warned(tiny_refcoco, "refcocog", "umd")
    assert len(lines) == 3
    assert "refs(umd).p: train has 4 refs with 8 sentences, published are 42,226 with 80,512" in lines[0]


def test_does_not_warn_about_complete_splits(real_data, tmp_path):
    """For the real refs under the published name, the only warning concerns train, which is incomplete there."""
    folder = tmp_path / "refcoco"
    folder.mkdir()
    for name, source in (("refs(unc).p", "refs(unc).p"), ("instances.json", "instances_bbox_only.json")):
        (folder / name).symlink_to(real_data / "refcoco_annotations" / source)
    (line,) = warnings(folder, "auto", read_refcoco(folder).refs)
    assert "train has 432 refs with 1,222 sentences, published are 42,404 with 120,624" in line


def test_ingest_warns_and_continues(tiny_refcoco, tmp_path, monkeypatch, capsys):
    folder = tiny_refcoco.folder.rename(tmp_path / "refcoco")
    params = (Path(__file__).parents[2] / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(
        params.replace("dataset: data/refshapes", f"dataset: {folder}").replace(
            "backend: transformers", "backend: none"
        )
    )
    monkeypatch.chdir(tmp_path)
    ingest.main()
    captured = capsys.readouterr()
    assert captured.err.splitlines()[0].startswith("warning: refcoco/refs(unc).p: train has 4 refs")
    assert len(captured.err.splitlines()) == 4  # one per split
    assert "6 images, 12 sentences" in captured.out
    assert (tmp_path / "data" / "index" / "refs.parquet").exists()
