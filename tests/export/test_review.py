"""Checks the review order, and reads Label Studio's formats with an independent decoder."""

import json
from urllib.parse import unquote
from xml.etree import ElementTree

import cv2
import numpy as np
import pandas as pd
import pytest
from called import call
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from synthetic_run import write_run

from l2l_core.artifacts import records
from l2l_core.core.masks import decode_rle, encode_rle
from l2l_core.export.review import brush_rle, label_studio_tasks, review_scores

LABELS = pd.DataFrame(
    {
        "accept_prob": [0.5, 1.0, 0.75, 0.0],
        "prior_iou": [0.0, 1.0, 0.5, 0.2],
        "sentence": ["the cup", "The, the cup!", "the dog", "the"],
        "image_id": [1, 1, 1, 2],
    }
)


def test_review_scores_match_hand_computed_values():
    """`the` occurs in 4 sentences, `cup` in 2, `dog` in 1; image 1 has 3 sentences, image 2 has 1."""
    cup, dog, second = np.log(3) / np.log(5), np.log(2) / np.log(5), np.log(2) / np.log(4)
    informative = [(1 + 1) / 2, (0 + 0) / 2, (0.5 + 0.5) / 2, (0 + 0.8) / 2]
    representative = [((1 + cup) / 2 + 1) / 2, ((1 + cup) / 2 + 1) / 2, ((1 + dog) / 2 + 1) / 2, (1 + second) / 2]
    np.testing.assert_allclose(review_scores(LABELS), np.multiply(informative, representative))


@given(st.floats(0, 1), st.floats(0, 1))
def test_review_scores_lie_between_zero_and_one(accept_prob, prior_iou):
    scores = review_scores(LABELS.assign(accept_prob=accept_prob, prior_iou=prior_iou))
    assert ((scores >= 0) & (scores <= 1)).all()


# --- Label Studio masks


def unpacked(rle: list[int]) -> np.ndarray:
    """Decode the bytes of @thi.ng/rle-pack to values."""
    bits = "".join(f"{byte:08b}" for byte in rle)
    place = 0

    def read(width: int) -> int:
        nonlocal place
        place += width
        return int(bits[place - width : place], 2)

    count, value_bits = read(32), read(5) + 1
    run_bits = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < count:
        is_run, length = read(1), read(run_bits[read(2)]) + 1
        values += [read(value_bits)] * length if is_run else [read(value_bits) for _ in range(length)]
    assert len(values) == count
    assert len(bits) - place < 8
    return np.array(values)


@settings(deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_brush_rle_stores_the_mask_in_all_four_channels(mask):
    np.testing.assert_array_equal(
        unpacked(brush_rle(mask)).reshape(*mask.shape, 4) == 255, np.stack([mask] * 4, axis=2)
    )


@pytest.mark.parametrize("pixels", [1, 2, 4, 5, 64, 65, 16383, 16384, 16385, 40000])
def test_brush_rle_encodes_runs_of_every_length(pixels):
    """The longest run in one entry has 65,536 values, which is 16,384 pixels."""
    mask = np.ones((1, pixels + 3), bool)
    mask[0, :2] = mask[0, -1] = False
    assert unpacked(brush_rle(mask)).tolist() == [0] * 8 + [255] * 4 * pixels + [0] * 4


# --- the tasks


@pytest.fixture
def run(tmp_path, monkeypatch):
    write_run(tmp_path, rounds=1, images_per_split=6)
    monkeypatch.chdir(tmp_path)
    records.INDEX.masks.unlink()
    given = records.round_folder(1) / "history/pseudo_labels.parquet"
    given.rename(records.round_folder(1) / "pseudo_labels.parquet")
    return tmp_path


def labels_of_round() -> dict[int, dict]:
    path = records.round_folder(1) / "pseudo_labels.parquet"
    return {row["sent_id"]: row for row in records.read_table(path, records.PSEUDO_LABELS).to_pylist()}


def drawn(value: dict, height: int, width: int) -> np.ndarray:
    if "rle" in value:
        assert value["format"] == "rle"
        return unpacked(value["rle"]).reshape(height, width, 4)[..., 3] == 255
    # OpenCV places corners at pixel centers, up to half a pixel away, so draw at 10 times the size.
    corners = np.array(value["points"]) / 100 * [width, height] * 10
    canvas = cv2.fillPoly(np.zeros((height * 10, width * 10), np.uint8), [np.round(corners).astype(np.int32)], 1)
    return canvas[5::10, 5::10] == 1


@pytest.mark.parametrize(("polygons", "kind"), [([], "BrushLabels"), (["--polygons"], "PolygonLabels")])
def test_tasks_contain_each_label_with_its_image_and_sentence(run, monkeypatch, polygons, kind):
    assert call(monkeypatch, "export", "label-studio", *polygons) == 0
    tasks = json.loads((run / "export/review_round_1.json").read_text())
    rows = labels_of_round()
    refs = {row["sent_id"]: row for row in records.read_table(records.INDEX.refs, records.REFS).to_pylist()}
    images = records.read_table(records.INDEX.images, records.IMAGES).to_pylist()
    files = {row["image_id"]: row["file_name"] for row in images}
    assert sorted(task["data"]["sent_id"] for task in tasks) == sorted(rows)  # accepted or not
    for task in tasks:
        data, (prediction,) = task["data"], task["predictions"]
        row = rows[data["sent_id"]]
        assert data["sentence"] == refs[data["sent_id"]]["sentence"]
        assert data["image"] == f"/data/local-files/?d={files[refs[data['sent_id']]['image_id']]}"
        assert data["accepted"] == row["accepted"]
        assert prediction["score"] == pytest.approx(row["accept_prob"], abs=1e-4)
        assert prediction["model_version"] == "round_1 reinforce"
        mask = np.zeros((48, 64), bool)
        for region in prediction["result"]:
            assert (region["original_height"], region["original_width"]) == (48, 64)
            assert region["type"] == kind.lower()
            assert region["value"][kind.lower()] == ["object"]
            mask |= drawn(region["value"], 48, 64)
        np.testing.assert_array_equal(mask, decode_rle(row["rle_counts"], 48, 64))
    ids = [region["id"] for task in tasks for region in task["predictions"][0]["result"]]
    assert len(set(ids)) == len(ids) > 0


def test_interface_contains_the_tags_of_the_predictions(run, monkeypatch):
    assert call(monkeypatch, "export", "label-studio") == 0
    view = ElementTree.fromstring((run / "export/review_round_1.xml").read_text())
    region = json.loads((run / "export/review_round_1.json").read_text())[0]["predictions"][0]["result"][0]
    tags = {tag.get("name"): tag for tag in view.iter() if tag.get("name")}
    brush, image = tags[region["from_name"]], tags[region["to_name"]]
    assert (brush.tag, brush.get("toName"), image.get("value")) == ("BrushLabels", region["to_name"], "$image")
    assert [label.get("value") for label in brush] == region["value"]["brushlabels"]
    assert view.find("Header").get("value") == "$sentence"


def test_sorts_tasks_by_review_score_and_applies_the_limit(run, monkeypatch):
    assert call(monkeypatch, "export", "label-studio", "--out", "all") == 0
    assert call(monkeypatch, "export", "label-studio", "--limit", 3, "--image-prefix", "http://localhost:8000/") == 0
    whole, first = (json.loads((run / out / "review_round_1.json").read_text()) for out in ("all", "export"))
    scores = [task["data"]["review_score"] for task in whole]
    assert scores == sorted(scores, reverse=True)
    assert [task["data"]["sent_id"] for task in first] == [task["data"]["sent_id"] for task in whole[:3]]
    assert first[0]["data"]["image"].startswith("http://localhost:8000/images/")


def test_quotes_unusual_file_names_and_omits_empty_regions():
    row = {"sent_id": 3, "round": 1, "method": "all", "height": 4, "width": 4, "accepted": True}
    row |= {"rle_counts": encode_rle(np.zeros((4, 4))), "file_name": "my photos/ü & 100%.png"}
    (task,) = label_studio_tasks(LABELS.head(1).assign(**row), 5, "/files/?d=", polygons=False)
    assert task["predictions"][0]["result"] == []
    address = task["data"]["image"].removeprefix("/files/?d=")
    assert unquote(address) == "my photos/ü & 100%.png"
    assert not set(" &") & set(address)
