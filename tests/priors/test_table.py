"""Parsing stored responses into priors: coordinates of each model family, words, and the summary."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from l2l_core.artifacts import records
from l2l_core.config import CoordSpace, PricesParams
from l2l_core.core.masks import encode_rle
from l2l_core.mllm.coords import resolve_coord_space
from l2l_core.priors.table import interpret, kinds, kinds_of_sentences, summarize

NO_PRICES = PricesParams(prompt=None, completion=None)


def responses(*changes: dict[str, object]) -> pa.Table:
    """One response per dict; each dict overrides fields of a usable response."""
    plain = {
        "sample_index": 0,
        "backend": "vllm",
        "model": "m",
        "prompt_sha256": "p",
        "raw_text": '{"found": true, "boxes": [[10, 20, 30, 40]]}',
        "failure": None,
        "reason": "",
        "attempts": 1,
        "coord_space": "pixel",
        "height": 480,
        "width": 640,
        "input_height": 480,
        "input_width": 640,
        "prompt_tokens": 0,
        "completion_tokens": 0,
    }
    return records.make_table(
        [{"sent_id": row} | plain | change for row, change in enumerate(changes)], records.RESPONSES
    )


@pytest.mark.parametrize(
    ("model", "input_hw", "raw_text"),
    [
        # The box 64 48 320 240 of a 640 x 480 image in the notation of each family.
        (
            "Qwen/Qwen2.5-VL-7B-Instruct",
            (476, 644),
            '```json\n[{"bbox_2d": [64.4, 47.6, 322, 238], "label": "cup"}]\n```',
        ),
        ("Qwen/Qwen2.5-VL-7B-Instruct", (476, 644), '{"found": true, "boxes": [[64.4, 47.6, 322, 238]]}'),
        ("Qwen/Qwen2-VL-7B-Instruct", (476, 644), "<|box_start|>(100,100),(500,500)<|box_end|>"),
        ("Qwen/Qwen3-VL-8B-Instruct", (480, 640), '[{"bbox_2d": [100, 100, 500, 500], "label": "cup"}]'),
        ("OpenGVLab/InternVL3-8B", (448, 448), "<ref>cup</ref><box>[[100, 100, 500, 500]]</box>"),
        ("llava-hf/llava-1.5-7b-hf", (640, 640), "[0.1, 0.2, 0.5, 0.5]"),
    ],
)
def test_reads_the_boxes_of_each_model_family(model: str, input_hw: tuple[int, int], raw_text: str) -> None:
    row = {
        "raw_text": raw_text,
        "coord_space": resolve_coord_space(model, "auto"),
        "input_height": input_hw[0],
        "input_width": input_hw[1],
    }
    (prior,) = interpret(responses(row)).to_pylist()
    assert prior["status"] == "ok"
    assert prior["bbox"] == pytest.approx([64, 48, 320, 240])


@pytest.mark.parametrize(
    "raw_text", ['<point x="30.0" y="30.0" alt="cup">cup</point>', '{"found": true, "point": [30.0, 30.0]}']
)
def test_molmo_points_are_in_percent(raw_text: str) -> None:
    space: CoordSpace = resolve_coord_space("allenai/Molmo-7B-D-0924", "auto")
    (prior,) = interpret(responses({"raw_text": raw_text, "coord_space": space})).to_pylist()
    assert (prior["status"], prior["bbox"]) == ("ok", None)
    assert prior["point"] == pytest.approx([192, 144])


def test_reads_every_field_of_a_response() -> None:
    said = {
        "found": True,
        "target": "red cup",
        "attributes": ["red", "tall"],
        "relation": "left of",
        "anchor": "the bus",
        "boxes": [[30, 20, 10, 40], [10, 20, 30, 40], [50, 60, 70, 80]],  # the first is inverted
        "point": [20, 30],
        "confidence": 0.75,
    }
    (prior,) = interpret(responses({"raw_text": json.dumps(said)})).to_pylist()
    wanted = {
        "status": "ok",
        "target": "red cup",
        "attributes": ["red", "tall"],
        "relation": "left of the bus",
        "bbox": [10, 20, 30, 40],
        "point": [20, 30],
        "score": 0.75,
    }
    assert {key: prior[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("relation", "anchor", "read"),
    [
        ("left of", "bus", "left of bus"),
        ("left of the Bus", "bus", "left of the Bus"),  # the anchor is already named
        ("", "bus", "bus"),
        ("on the left", "", "on the left"),
        ("on the left", None, "on the left"),
    ],
)
def test_joins_relation_and_anchor_into_one_phrase(relation: str, anchor: str | None, read: str) -> None:
    said = {"relation": relation, "anchor": anchor, "bbox": [10, 20, 30, 40]}
    assert interpret(responses({"raw_text": json.dumps(said)}))["relation"].to_pylist() == [read]


MIXED = responses(
    {"prompt_tokens": 900, "completion_tokens": 100},
    {"raw_text": '{"found": false}', "prompt_tokens": 1000},
    {"raw_text": "no idea", "prompt_tokens": 1100, "completion_tokens": 60},
    {"raw_text": "", "failure": "error", "reason": "HTTP 400"},
    {"raw_text": "", "failure": "empty"},
)


def test_summary_counts_statuses_and_tokens() -> None:
    assert summarize(interpret(MIXED), NO_PRICES) == {
        "responses": 5,
        "ok": 1,
        "empty": 2,
        "invalid": 1,
        "error": 1,
        "mask": 0,
        "box": 1,
        "point": 0,
        "none": 4,
        "prompt_tokens": 3000,
        "completion_tokens": 160,
    }


def test_counts_priors_by_what_their_proposals_are_rendered_from() -> None:
    """A mask counts before a box and a box before a point; a sentence counts by its best response."""
    mask = encode_rle(np.ones((480, 640), dtype=bool))
    point = '{"found": true, "point": [20, 30]}'
    rows = [
        {"sent_id": 1, "mask": mask},  # a mask and a box
        {"sent_id": 1, "sample_index": 1, "raw_text": point, "mask": mask},
        {"sent_id": 2},
        {"sent_id": 2, "sample_index": 1, "mask": mask, "raw_text": "no idea"},
        {"sent_id": 3, "raw_text": point},
        {"sent_id": 3, "sample_index": 1, "raw_text": "no idea"},
        {"sent_id": 4, "raw_text": "", "failure": "empty"},
        {"sent_id": 4, "sample_index": 1, "raw_text": "", "failure": "error"},
    ]
    priors = interpret(responses(*rows))
    assert kinds(priors).tolist() == ["mask", "mask", "box", "mask", "point", "none", "none", "none"]
    summary = summarize(priors, NO_PRICES)
    assert [summary[name] for name in records.PRIOR_KINDS] == [3, 1, 1, 3]
    assert kinds_of_sentences(priors) == {"mask": 2, "box": 0, "point": 1, "none": 1}
    assert kinds_of_sentences(interpret(responses())) == {"mask": 0, "box": 0, "point": 0, "none": 0}


def test_cost_per_1000_matches_a_hand_computed_value() -> None:
    """3,000 tokens at 2 and 160 at 10 per million cost 0.0076 for 5 responses, or 1.52 per thousand."""
    summary = summarize(interpret(MIXED), PricesParams(prompt=2.0, completion=10.0))
    assert summary["cost_per_1000"] == pytest.approx(1.52)
    assert "cost_per_1000" not in summarize(interpret(MIXED), PricesParams(prompt=2.0, completion=None))
    assert "cost_per_1000" not in summarize(interpret(responses()), PricesParams(prompt=2.0, completion=10.0))
