"""Scores of priors and proposals on the labeled sentences, against values counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from prior_tables import ROOT

from l2l_core.artifacts import records
from l2l_core.core.masks import encode_rle
from l2l_core.errors import ConfigError
from l2l_core.priors.scores import LabeledMasks, describe, labels_of, score_priors, score_proposals
from stages import priors as priors_stage

SIDE = 10


def rectangle(x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[y1:y2, x1:x2] = True
    return mask


SQUARE = rectangle(2, 2, 6, 6)
RING = rectangle(2, 2, 8, 8) & ~rectangle(4, 4, 6, 6)


def make_labels(*masks: np.ndarray) -> LabeledMasks:
    ys_xs = [np.nonzero(mask) for mask in masks]
    boxes = [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] for ys, xs in ys_xs]
    ids = np.arange(len(masks))
    image_hw = np.full((len(masks), 2), SIDE)
    return LabeledMasks(ids, ids, image_hw, [encode_rle(mask) for mask in masks], np.array(boxes, np.float64))


def make_priors(*rows: dict[str, object]) -> object:
    plain = {"sample_index": 0, "backend": "vllm", "model": "m", "bbox": None, "point": None, "score": None}
    return records.make_table([plain | {"sent_id": number} | row for number, row in enumerate(rows)], records.PRIORS)


EXACT, HALF, ELSEWHERE = [2, 2, 6, 6], [2, 2, 6, 4], [6, 6, 10, 10]  # IoU 1, 8 / 16 and 0 with the square


def test_scores_of_priors_match_hand_counted_values() -> None:
    """Right are 2 of 4 boxes at 0.5, mean IoU (1 + 0.5 + 0 + 0) / 4. The last point is inside, though its box is not.

    Of the scored boxes only the first has IoU above 0.5; its 0.9 beats 0.5 and loses to 0.95: AUROC 50.
    """
    priors = make_priors(
        {"bbox": EXACT, "score": 0.9},
        {"bbox": HALF, "score": 0.5},
        {},
        {"bbox": ELSEWHERE, "point": [3, 3], "score": 0.95},
    )
    assert score_priors(priors, make_labels(*[SQUARE] * 4)) == {
        "labeled": 4,
        "labeled_without_prior": 1,
        "box_acc50": 50.0,
        "box_miou": 37.5,
        "mask_miou": None,
        "pointing_acc": 75.0,
        "score_auroc": 50.0,
    }


def test_of_a_mask_its_own_iou_is_scored_and_ranked() -> None:
    """All boxes are exact. The masks have 20 of 36 and 2 of 16 true pixels: IoU 20 / 36 is right, 0.125 is wrong.

    The third prior has only its box, which is right. Both right ones score below the wrong mask: AUROC 0. By the boxes
    alone all would be right, and the AUROC undefined. Mean IoU of the masks: (20 / 36 + 2 / 16 + 0) / 3.
    """
    corners = rectangle(2, 2, 3, 3) | rectangle(5, 5, 6, 6)
    full = rectangle(2, 2, 8, 8)
    ring = full & ~rectangle(3, 3, 7, 7)
    assert (ring.sum(), corners.sum()) == (20, 2)
    priors = make_priors(
        {"bbox": [2, 2, 8, 8], "mask": encode_rle(ring), "score": 0.5},
        {"bbox": EXACT, "mask": encode_rle(corners), "score": 0.9},
        {"bbox": EXACT, "score": 0.7},
    )
    scores = score_priors(priors, make_labels(full, SQUARE, SQUARE))
    assert (scores["box_miou"], scores["mask_miou"]) == (100.0, round(100 * (20 / 36 + 0.125) / 3, 2))
    assert scores["score_auroc"] == 0.0
    assert "box_miou 100.0, mask_miou 22.7, pointing_acc" in describe(scores)


def test_the_center_of_a_box_can_miss_its_object() -> None:
    scores = score_priors(make_priors({"bbox": [2, 2, 8, 8]}), make_labels(RING))
    assert (scores["box_miou"], scores["pointing_acc"]) == (100.0, 0.0)
    on_the_ring = score_priors(make_priors({"bbox": [2, 2, 8, 8], "point": [3, 7]}), make_labels(RING))
    assert on_the_ring["pointing_acc"] == 100.0


def test_a_point_on_the_far_edge_counts_as_the_last_pixel() -> None:
    corner = rectangle(9, 9, 10, 10)
    assert score_priors(make_priors({"point": [10, 10]}), make_labels(corner))["pointing_acc"] == 100.0


@pytest.mark.parametrize(
    ("rows", "undefined"),
    [
        (
            [{"point": [3, 3], "score": 0.5}],
            ["box_acc50", "box_miou", "mask_miou", "score_auroc"],
        ),  # a model that only points
        ([{}], ["box_acc50", "box_miou", "mask_miou", "pointing_acc", "score_auroc"]),
        ([{"bbox": EXACT, "mask": encode_rle(SQUARE)}], ["score_auroc"]),
        ([{"bbox": EXACT, "score": 0.5}, {"bbox": EXACT, "score": 0.9}], ["mask_miou", "score_auroc"]),  # all right
        ([{"bbox": EXACT, "score": 1.0}, {"bbox": ELSEWHERE, "score": 1.0}], ["mask_miou", "score_auroc"]),  # equal
        ([{"bbox": EXACT}, {"bbox": ELSEWHERE}], ["mask_miou", "score_auroc"]),
    ],
)
def test_undefined_scores_are_null(rows: list[dict[str, object]], undefined: list[str]) -> None:
    scores = score_priors(make_priors(*rows), make_labels(*[SQUARE] * len(rows)))
    assert [key for key, value in scores.items() if value is None] == undefined


def test_only_the_first_sample_of_labeled_sentences_counts() -> None:
    priors = make_priors(
        {"sent_id": 0, "bbox": EXACT},
        {"sent_id": 0, "sample_index": 1, "bbox": ELSEWHERE},
        {"sent_id": 7, "bbox": ELSEWHERE},  # not labeled
    )
    scores = score_priors(priors, make_labels(SQUARE))
    assert (scores["labeled"], scores["box_miou"]) == (1, 100.0)


def test_several_models_are_also_scored_on_their_own() -> None:
    """The sentence without a recorded response has no model."""
    rows = ({"model": "a", "bbox": EXACT}, {"model": "b", "bbox": HALF}, {"model": "b"}, {"model": ""})
    priors = make_priors(*({"backend": "replay"} | row for row in rows))
    scores = score_priors(priors, make_labels(*[SQUARE] * 4))
    by_source = {source: (row["labeled"], row["box_miou"]) for source, row in scores.pop("by_source").items()}
    assert by_source == {"replay a": (1, 100.0), "replay b": (2, 25.0)}
    assert scores["box_miou"] == 37.5
    assert "by_source" not in score_priors(priors.slice(1), make_labels(*[SQUARE] * 4))


def test_scores_of_proposals_match_hand_counted_values() -> None:
    """Cut at 0.5: the square itself, 8 of its 16 pixels, and nothing. Mean IoU (1 + 0.5 + 0) / 3."""
    softs = [np.where(SQUARE, 255, 0), np.where(rectangle(*HALF), 200, 100), np.full((SIDE, SIDE), 25)]
    rows = [
        {"sent_id": number, "height": SIDE, "width": SIDE, "soft": soft.astype(np.uint8).tobytes(), "score": score}
        for number, (soft, score) in enumerate(zip(softs, (0.9, 0.4, 0.0), strict=True))
    ]
    proposals = records.make_table(rows[::-1], records.PROPOSALS)
    assert score_proposals(proposals, make_labels(*[SQUARE] * 3)) == {
        "labeled": 3,
        "labeled_without_prior": 1,
        "miou": 50.0,
        "score_auroc": 100.0,
    }


def test_without_labels_nothing_is_scored() -> None:
    none = LabeledMasks(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 2), int), [], np.zeros((0, 4)))
    scores = score_priors(make_priors({"bbox": EXACT}), none)
    assert scores == dict.fromkeys(scores) | {"labeled": 0, "labeled_without_prior": 0}
    proposals = score_proposals(records.PROPOSALS.empty_table(), none)
    assert proposals == {"labeled": 0, "labeled_without_prior": 0, "miou": None, "score_auroc": None}
    assert describe(proposals) == "0 labeled, 0 without a prior"


def test_only_sentences_of_role_labeled_get_their_truth() -> None:
    split = records.make_table(
        [{"sent_id": 3, "role": "labeled"}, {"sent_id": 1, "role": "labeled"}, {"sent_id": 2, "role": "unlabeled"}],
        records.SPLIT,
    )
    refs = records.make_table([{"sent_id": row, "ann_id": 50 + row % 2} for row in (1, 2, 3)], records.REFS)
    masks = records.make_table(
        [{"ann_id": 51, "height": SIDE, "width": SIDE, "rle_counts": encode_rle(RING)}], records.MASKS
    )
    labels = labels_of(split, refs, masks)
    assert (labels.sent_id.tolist(), labels.ann_id.tolist()) == ([1, 3], [51, 51])
    assert labels.box_xyxy.tolist() == [[2, 2, 8, 8]] * 2


# --- the stage `priors` ---


def write_project(folder: Path, space: str, sentences: int = 20) -> None:
    """A project after the stage `query`: square objects, and responses in thousandths that are read in `space`."""
    rng = np.random.default_rng(0)
    refs, split, masks, responses = [], [], [], []
    for number in range(sentences):
        x, y = rng.integers(0, 60, 2).tolist()
        mask = np.zeros((100, 120), bool)
        mask[y : y + 40, x : x + 50] = True
        refs.append({"sent_id": number, "ann_id": number})
        split.append({"sent_id": number, "role": "labeled"})
        masks.append({"ann_id": number, "height": 100, "width": 120, "rle_counts": encode_rle(mask)})
        box = [round(1000 * value) for value in (x / 120, y / 100, (x + 50) / 120, (y + 40) / 100)]
        response = {"sent_id": number, "sample_index": 0, "backend": "vllm", "model": "m", "raw_text": str(box)}
        size = {"height": 100, "width": 120, "input_height": 100, "input_width": 120}
        responses.append(response | size | {"coord_space": space, "prompt_tokens": 0, "completion_tokens": 0})
    for rows, path, schema in (
        (refs, records.INDEX.refs, records.REFS),
        (split, records.SPLIT_PATH, records.SPLIT),
        (masks, records.LABELED_MASKS_PATH, records.MASKS),
        (responses, records.RESPONSES_PATH, records.RESPONSES),
    ):
        records.write_table(records.make_table(rows, schema), folder / path, schema)


def run_stage(folder: Path, monkeypatch: pytest.MonkeyPatch, check_coords: str = "true") -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (folder / "params.yaml").write_text(text.replace("check_coords: true", f"check_coords: {check_coords}"))
    monkeypatch.chdir(folder)
    priors_stage.main()


def test_the_stage_writes_and_prints_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_project(tmp_path, "norm1000")
    run_stage(tmp_path, monkeypatch)
    metrics = json.loads(records.PRIORS_METRICS_PATH.read_text())
    assert (metrics["ok"], metrics["labeled"], metrics["box_acc50"], metrics["score_auroc"]) == (20, 20, 100.0, None)
    assert metrics["box_miou"] > 97  # whole thousandths
    (coords,) = metrics["coords"]  # a list, which DVC's tables leave out
    assert (coords["model"], coords["coord_space"], coords["sentences"]) == ("m", "norm1000", 20)
    assert coords["box_miou"]["norm1000"] == metrics["box_miou"] > 50 > coords["box_miou"]["pixel"]
    assert coords["box_acc50"]["norm1000"] == 100.0
    _, scores, fit = capsys.readouterr().out.splitlines()
    assert scores.startswith("priors: 20 labeled, 0 without a prior, box_acc50 100.0, box_miou 9")
    assert fit.startswith("priors: norm1000 fits with mean IoU ")


def test_the_stage_says_that_too_few_objects_are_labeled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_project(tmp_path, "pixel", sentences=7)
    run_stage(tmp_path, monkeypatch)
    assert "priors: coordinates of m not checked: 7 labeled objects, needs 10\n" in capsys.readouterr().out


def test_the_stage_stops_at_wrong_coordinates_if_the_check_is_enabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(tmp_path, "pixel")
    with pytest.raises(ConfigError, match=r"priors\.coord_space: norm1000 fits .* priors\.check_coords: false"):
        run_stage(tmp_path, monkeypatch)
    assert not records.PRIORS_PATH.exists()
    run_stage(tmp_path, monkeypatch, check_coords="false")
    assert records.PRIORS_PATH.exists()
    assert json.loads(records.PRIORS_METRICS_PATH.read_text())["box_miou"] < 50
