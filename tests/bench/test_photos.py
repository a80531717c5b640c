"""The benchmark on photographs: its settings, its splits, its masks of known quality, and its rows."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from pycocotools import mask as coco_mask
from synthetic_run import write_evaluated_run

from bench import docs, photos
from bench.label_efficiency import planned
from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.datasets.read import load_dataset

DEFAULTS = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
SPLITS = photos.SETTINGS["splits"]


def test_splits_share_no_photo() -> None:
    assert list(SPLITS) == list(photos.SPLIT_NAMES)
    listed = [image_id for ids in SPLITS.values() for image_id in ids]
    assert len(set(listed)) == len(listed)
    assert len(SPLITS["test_generated"]) == 100


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("prior", sorted(photos.SETTINGS["priors"]))
def test_parameters_of_every_method_are_valid(tmp_path: Path, prior: str, smoke: bool) -> None:
    make = partial(photos.PhotoRun, images="photos", smoke=smoke)
    for run in planned(photos.METHODS, [0.1], [prior], [3], 2, make):
        file = tmp_path / "params.yaml"
        file.write_text(yaml.safe_dump(run.params(DEFAULTS)), encoding="utf-8")
        params = load_params(file)
        assert (params.dataset, params.ingest.images, params.model.preset) == ("data/photos", "photos", "small")
        assert params.proposals.renderer == ("grabcut" if prior.endswith("grabcut") else "box")
        replayed = prior == photos.MASKS
        assert params.priors.backend == ("replay" if replayed else "simulated")
        assert (params.priors.replay_file == "data/photo_masks/3.jsonl") == replayed
        assert (params.distill.steps == 1) == (run.method != "reinforce")
        assert run.start.params(DEFAULTS)["ingest"]["images"] == "photos"  # of the same photos


def test_settings_fix_everything_except_how_training_runs() -> None:
    fixed = photos.SETTINGS["params"]
    trained = ("model", "train", "warmup", "select", "retrain", "distill", "evaluate")
    free = {key for section in trained for key in DEFAULTS[section].keys() - fixed[section].keys()}
    assert free == {"precision", "engine", "log_every"}


# ---- masks of known quality


def disc(center: int, radius: int) -> np.ndarray:
    y, x = np.mgrid[:80, :100]
    return (y - 40) ** 2 + (x - center) ** 2 <= radius**2


def test_a_mask_without_noise_is_the_seen_one() -> None:
    """Also at the image's edge, and where the true mask is another object far away."""
    for seen in (disc(50, 20), disc(5, 20)):
        wobble = photos.make_wobble(seen, seen, np.random.default_rng(0))
        rle = {"size": [80, 100], "counts": wobble.rle(0.0)}
        np.testing.assert_array_equal(coco_mask.decode(rle).astype(bool), seen)
        assert wobble.iou(0.0) == 1
    assert photos.make_wobble(disc(15, 10), disc(80, 10), np.random.default_rng(0)).iou(0.0) == 0


def test_iou_of_a_degraded_mask_matches_pycocotools() -> None:
    true = disc(50, 20)
    encoded = coco_mask.encode(np.asfortranarray(true.astype(np.uint8)))
    for seed, seen in ((0, true), (1, true), (2, disc(60, 25))):
        wobble = photos.make_wobble(seen, true, np.random.default_rng(seed))
        rle = {"size": [80, 100], "counts": wobble.rle(0.2)}
        assert wobble.iou(0.2) == pytest.approx(coco_mask.iou([rle], [encoded], [0]).item())
        assert wobble.iou(0.2) < wobble.iou(0.0)


def test_fits_the_noise_to_the_published_quality() -> None:
    wobbles = [photos.make_wobble(disc(50, 20), disc(50, 20), np.random.default_rng(seed)) for seed in range(40)]
    factor = photos.fitted_factor(wobbles)
    assert 100 * np.mean([wobble.iou(factor) for wobble in wobbles]) == pytest.approx(68.5, abs=0.3)


# ---- data


def test_writes_the_photos_with_the_sentences_of_their_splits(real_data: Path, tmp_path: Path) -> None:
    """The first photos of each split; the masks of all sentences have about the published quality."""
    real = real_data / "coco_photos"
    if not real.is_dir():
        pytest.skip("no COCO photos to test with")
    photos.prepare(real, tmp_path, True, [0])
    index = load_dataset(tmp_path / "photos", images=str(real / "images"))
    refs = records.to_frame(index.refs)
    names = {own: name for name, own in photos.SPLIT_NAMES.items()}
    for split, rows in refs.groupby("split"):
        assert set(rows["image_id"]) <= set(SPLITS[names[split]][: photos.SETTINGS["smoke_photos"]])
    assert set(refs["split"]) == set(names)

    human = json.loads((real / "refs.json").read_text(encoding="utf-8"))
    expected = sorted(
        (ref["ann_id"], text) for ref in human for text in ref["sentences"] if ref["image_id"] in set(refs["image_id"])
    )
    rows = refs[refs["split"] == "testA"]
    assert sorted(zip(rows["ann_id"], rows["sentence"], strict=True)) == expected

    masks = records.to_frame(index.masks).set_index("ann_id")
    ious = []
    for line in map(json.loads, (tmp_path / "photo_masks" / "0.jsonl").read_text(encoding="utf-8").splitlines()):
        true = masks.loc[refs.set_index("sent_id").loc[line["sent_id"], "ann_id"]]
        size = [int(true["height"]), int(true["width"])]
        assert line["mask"]["size"] == size
        ious.append(coco_mask.iou([line["mask"]], [{"size": size, "counts": true["rle_counts"]}], [0]).item())
    assert len(ious) == len(refs)
    assert 100 * np.mean(ious) == pytest.approx(photos.MASK_IOU, abs=0.5)


def test_says_how_to_get_the_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L2L_REAL_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match=r"coco_photos/instances\.json: not found; .*images\.cocodataset\.org"):
        photos.photos_folder()
    monkeypatch.delenv("L2L_REAL_DATA")
    with pytest.raises(SystemExit, match="set L2L_REAL_DATA"):
        photos.photos_folder()


# ---- rows


def test_rows_have_intervals_over_the_photos(tmp_path: Path) -> None:
    """Of a synthetic run: the interval holds the score, and is a point if every photo has the same mean."""
    write_evaluated_run(tmp_path)
    metrics = tmp_path / "metrics" / "evaluate.json"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"dataset_version": "1"}))
    run = photos.PhotoRun("reinforce", 0.1, "qwen2.5-vl-7b-box", 0, 2)
    rows = {(row["split"], row["round"]): row for row in run.rows(tmp_path, DEFAULTS)}
    assert set(rows) == {(split, number) for split in ("val", "test_generated") for number in (1, 2)}
    assert all(row["low"] < row["miou"] < row["high"] for row in rows.values())
    last = rows["val", 2]
    assert last["distilled_low"] < last["distilled_miou"] < last["distilled_high"]
    assert "distilled_low" not in rows["val", 1]

    others = photos.PhotoRun("all", 0.1, "qwen2.5-vl-7b-box", 0, 2).rows(tmp_path, DEFAULTS)
    assert not any("distilled" in key for row in others for key in row)

    path = tmp_path / records.PER_SENTENCE_PATH
    table = records.read_table(path, records.PER_SENTENCE).to_pylist()
    same = [row | {"iou": 0.25} for row in table]
    records.write_table(records.make_table(same, records.PER_SENTENCE), path, records.PER_SENTENCE)
    assert set(photos.read_intervals(tmp_path).values()) == {(25.0, 25.0)}


def test_table_shows_each_prior_apart() -> None:
    common = {"labeled_fraction": 0.1, "round": 1, "method": "all", "device": "cpu", "commit": "abc", "edition": 2}
    rows = [
        common | {"prior": prior, "seed": seed, "split": split, "miou": miou + seed, "low": miou - 9, "high": miou + 9}
        for prior, miou in (("masks", 60.0), ("llava-1.5-7b-box", 40.0))
        for split in photos.SHOWN_SPLITS
        for seed in (0, 1)
    ]
    text = photos.table(pd.DataFrame(rows))
    assert text.count("### Photographs, 10 % of the labels, ") == 2
    (line,) = (line for line in text.splitlines() if line.startswith("| all | 1 | 2 | 60.5 (60.0 to 61.0) |"))
    assert line.endswith("| 51.0 to 69.0 |")
    assert photos.table(pd.DataFrame()) == "Not measured yet."


def test_results_page_shows_the_stored_rows() -> None:
    assert docs.get(photos.DOCUMENT, photos.MARK) == photos.table(pd.DataFrame(photos.stored(photos.RESULTS)))
