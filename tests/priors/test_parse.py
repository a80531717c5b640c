from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l2l_core.config import CoordSpace
from l2l_core.mllm.coords import COORD_SPACES, resolve_coord_space
from l2l_core.priors.parse import BoxForm, ParsedPrior, parse_response

HW = (480, 640)  # height, width


def read(text: str, space: CoordSpace = "pixel", input_hw: tuple[int, int] | None = None) -> ParsedPrior:
    return parse_response(text, space, HW, input_hw)


def box_text(*values: object) -> str:
    return json.dumps({"bbox": list(values)})


# --- coordinate spaces: the box 64 48 320 240 of a 640 x 480 image in the notation of each family ---


@pytest.mark.parametrize(
    ("space", "values", "input_hw"),
    [
        ("pixel", (64, 48, 320, 240), None),
        ("resized_pixel", (128, 24, 640, 120), (240, 1280)),  # the input is twice as wide and half as high
        ("norm1000", (100, 100, 500, 500), None),
        ("percent", (10, 10, 50, 50), None),
        ("unit", (0.1, 0.1, 0.5, 0.5), None),
        ("norm1000_yx", (100, 100, 500, 500), None),
        ("norm999", (99.9, 99.9, 499.5, 499.5), None),
        ("norm1024_yx", (102.4, 102.4, 512, 512), None),
        ("unit_square", (0.1, 0.2, 0.5, 0.5), None),  # 640 x 640 with 80 rows of padding above the image
    ],
)
def test_converts_boxes_from_every_coordinate_space(
    space: CoordSpace, values: tuple[float, ...], input_hw: tuple[int, int] | None
) -> None:
    prior = read(box_text(*values), space, input_hw)
    assert prior.status == "ok"
    assert prior.bbox == pytest.approx((64, 48, 320, 240))


def test_resized_pixel_requires_the_input_size() -> None:
    with pytest.raises(ValueError, match="as the model saw it"):
        read(box_text(1, 2, 3, 4), "resized_pixel")


@settings(deadline=None)
@given(
    st.sampled_from([space for space in COORD_SPACES if not space.startswith("resized_pixel")]),
    st.tuples(*[st.floats(0, 1)] * 4),
    st.tuples(st.integers(16, 4000), st.integers(16, 4000)),
)
def test_every_coordinate_space_round_trips_the_box(
    space: CoordSpace, where: tuple[float, ...], hw: tuple[int, int]
) -> None:
    (left, right), (top, bottom) = sorted(where[:2]), sorted(where[2:])
    scale = space.removesuffix("_yx")
    if scale == "unit_square":
        side = max(hw)
        above, beside = (side - hw[0]) / 2, (side - hw[1]) / 2
        xs = [(beside + x * hw[1]) / side for x in (left, right)]
        ys = [(above + y * hw[0]) / side for y in (top, bottom)]
    else:
        spans = {"norm1000": 1000, "norm999": 999, "norm1024": 1024, "percent": 100, "unit": 1}
        wide, high = (hw[1], hw[0]) if scale == "pixel" else (spans[scale], spans[scale])
        xs, ys = [left * wide, right * wide], [top * high, bottom * high]
    pairs = zip(ys, xs, strict=True) if space.endswith("_yx") else zip(xs, ys, strict=True)
    text = box_text(*(value for pair in pairs for value in pair))
    true_box = (left * hw[1], top * hw[0], right * hw[1], bottom * hw[0])
    prior = parse_response(text, space, hw)
    if true_box[2] - true_box[0] > 1.001 and true_box[3] - true_box[1] > 1.001:
        assert prior.bbox == pytest.approx(true_box, abs=1e-3)
    elif true_box[2] - true_box[0] < 0.999 or true_box[3] - true_box[1] < 0.999:
        assert prior.status == "invalid"


# --- formats ---

HERE = (10.0, 20.0, 30.0, 40.0)


@pytest.mark.parametrize(
    "text",
    [
        '{"bbox": [10, 20, 30, 40]}',
        '{"bbox_2d": [10, 20, 30, 40]}',
        '{"box": [10, 20, 30, 40]}',
        '{"BBox": ["10", " 20.0", "3e1", "40"]}',
        '{"bbox": "10, 20, 30, 40"}',
        '{"bbox": "[10, 20, 30, 40]"}',
        '{"bbox": {"x1": 10, "y1": 20, "x2": 30, "y2": 40}}',
        '{"bbox": [[10, 20], [30, 40]]}',
        '{"bbox": [[10, 20, 30, 40], [50, 60, 70, 80]]}',
        '{"bbox": [[50, 60, 50, 80], [10, 20, 30, 40]]}',  # the first is empty
        '{"boxes": [{"x1": 10, "y1": 20, "x2": 30, "y2": 40}]}',
        '```json\n{"bbox": [10, 20, 30, 40]}\n```',
        'The {object} is here: {"bbox": [10, 20, 30, 40]} as you see.',
        '[{"bbox_2d": [10, 20, 30, 40], "label": "cup"}, {"bbox_2d": [1, 2, 3, 4], "label": "cup"}]',
        '{"answer": {"bbox": [10, 20, 30, 40]}}',
        '{"bbox": null} or rather {"bbox": [10, 20, 30, 40]}',
        '{"target": "cup", "bbox": [10, 20, 30, 40], "confid',
        "{'bbox': [10, 20, 30, 40]}",
        "[10, 20, 30, 40]",
        "It is at (10, 20), (30, 40).",
        "<|box_start|>(10,20),(30,40)<|box_end|>",
        "<ref>cup</ref><box>[[10, 20, 30, 40]]</box>",
        "[1, 2, 3] and [10, 20, 30, 40.0]",
        "<box>10 20 30 40</box>",
        '{"box_2d": [10, 20, 30, 40]}',
        '{"bbox": {"xmin": 10, "ymin": 20, "xmax": 30, "ymax": 40}}',
        '{"objects": [{"x_min": 1}, {"bbox": {"y_max": 40, "x_max": 30, "y_min": 20, "x_min": 10}}]}',
        "{'bbox': [10, 20, 30, 40], 'found': True}",
        '{"bbox": "<box>10 20 30 40</box>"}',
        '{"bbox": ["10, 20"]} [10, 20, 30, 40] {"bbox": [10, 20, 30, 40]}',
    ],
)
def test_parses_a_box_in_every_supported_format(text: str) -> None:
    prior = read(text)
    assert prior.status == "ok"
    assert prior.bbox == pytest.approx(HERE)


@pytest.mark.parametrize(
    "text",
    [
        '{"bbox": [10, 20, 30, 40]} or {"bbox": [50, 60, 70, 80]}',
        'Here: {"bbox": [10, 20, 30, 40]}, {"bbox": [50, 60, 70, 80]}, and {"bbox": [1, 2, 3, 4]}.',
        "The boxes are [10, 20, 30, 40] and [50, 60, 70, 80].",
        "[10, 20, 30, 40] OR [50, 60, 70, 80]",
        "<box>10 20 30 40</box> and/or <box>50 60 70 80</box>",
        "First [1, 2, 3, 4], no: [10, 20, 30, 40] or [50, 60, 70, 80]",
        "[50, 60, 70, 80] and the other one at [10, 20, 30, 40]",  # other words separate
        "[50, 60, 70, 80] android [10, 20, 30, 40]",
    ],
)
def test_uses_the_first_box_of_a_list_joined_by_and_or_or(text: str) -> None:
    assert read(text).bbox == HERE


RESPONSE = '{"target": "cat", "bbox": [10, 20, 30, 40]}'
DOG = '{"label": "dog", "bbox": [1, 2, 3, 4]}'


@pytest.mark.parametrize(
    "text",
    [
        f"{RESPONSE} Note: there is another {DOG} nearby",
        f"There is a dog, {DOG}, but the answer is {RESPONSE}. Also a {DOG} and a {DOG}.",
        f'{{"found": true, "bbox": [10, 20, 30, 40]}} Beside it: {DOG}',
        f'{{"answer": {RESPONSE}}} Beside it: {{"others": [{DOG}]}}',
        '{"target": "cup", "bbox": [50, 60, 70, 80]} No, rather: {"bbox": [10, 20, 30, 40]}',  # no extra keys
        '{"target": "cup", "bbox": [50, 60, 70, 80]} No, rather: {"target": "cup", "bbox": [10, 20, 30, 40]}',
        '{"target": "cup", "bbox": [5]} It is {"label": "cup", "bbox": [10, 20, 30, 40]}',  # the only usable one
        '{"label": "dog", "bbox": [1, 2, 3, 4]} is a dog, the cat is {"label": "cat", "bbox": [10, 20, 30, 40]}',
    ],
)
def test_a_remark_with_other_keys_does_not_replace_a_response_with_prompt_keys(text: str) -> None:
    assert read(text).bbox == HERE


def test_a_remark_does_not_replace_a_not_found_response() -> None:
    assert read(f'{{"found": false, "bbox": null}} Note: there is {DOG}').status == "empty"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot see a cup.",
        '{"target": "cup"}',
        '{"found": true}',
        '{"color": [10, 20, 30, 40]}',  # four numbers that are not a box
        '{"bbox": [10, 20, 30]}',
        '{"bbox": [10, 20, 30, true]}',
        '{"bbox": [NaN, 20, 30, 40]}',
        '{"bbox": [10, 20, Infinity, 40]}',
        '{"bbox": [10, 20, "inf", 40]}',
        '{"bbox": [10, 20, 1' + "0" * 400 + ", 40]}",  # larger than any float
        '{"bbox": [30, 20, 10, 40]}',  # inverted
        '{"bbox": [10, 20, 10, 40]}',  # no width
        '{"bbox": [10, 20, 10.5, 40]}',  # thinner than a pixel
        '{"bbox": [0.1, 0.2, 0.3, 0.4]}',  # another coordinate space
        '{"bbox": [700, 20, 900, 40]}',  # outside
        '{"bbox": [-50, 20, 0, 40]}',
        '{"point": [700, 20]}',
        '<point x="101" y="20">',
        '<point x="ten" y="20">',
        '<points coords="1 1 1305 412"/>',
        "(10, 20)",
        "top left (10, 20), bottom right (30, 40)",  # words in between: ambiguous corners
        '{"bbox": [10, 20, 30, 40, 0.9]}',
        '{"bbox": "10 to 20, 30, 40"}',
        "<loc_10><loc_20><loc_30>",
        "<loc0010><loc0020>",
        "<patch_index_1024><patch_index_1030>",
        "[" * 5000,
        '{"a":' * 5000,
    ],
)
def test_unusable_responses_are_invalid(text: str) -> None:
    prior = read(text)
    assert (prior.status, prior.bbox, prior.point) == ("invalid", None, None)


@pytest.mark.parametrize(
    "text",
    [
        '{"found": false}',
        '{"found": "No", "bbox": [10, 20, 30, 40]}',
        '{"found": false, "others": [{"bbox": [10, 20, 30, 40]}]}',
        '{"found": true, "bbox": null}',
        '{"bbox": []}',
        '{"bbox": "none", "target": "cup"}',
    ],
)
def test_not_found_responses_are_empty(text: str) -> None:
    prior = read(text)
    assert (prior.status, prior.bbox) == ("empty", None)


def test_a_box_is_clipped_to_the_image() -> None:
    assert read('{"bbox": [-5, 20, 650, 481.5]}').bbox == (0.0, 20.0, 640.0, 480.0)


@pytest.mark.parametrize(
    ("text", "space", "expected"),
    [
        ('{"point": [32, 24]}', "pixel", (32, 24)),
        ('{"point_2d": [50, 100]}', "norm1000", (32, 48)),
        ('{"points": [[700, 9], [32, 24]]}', "pixel", (32, 24)),
        ('{"point": {"x": 0.05, "y": "0.1"}}', "unit", (32, 48)),
        # Molmo's tags are in percent in every space: 5 % of 640, 10 % of 480.
        (' <point x="5.0" y="10.0" alt="cup">cup</point>', "percent", (32, 48)),
        (' <point x="5.0" y="10.0" alt="cup">cup</point>', "pixel", (32, 48)),
        ('<points x1="5.0" y1="10.0" x2="50" y2="60" alt="cups">cups</points>', "pixel", (32, 48)),
    ],
)
def test_parses_points(text: str, space: CoordSpace, expected: tuple[float, float]) -> None:
    prior = read(text, space)
    assert (prior.status, prior.bbox) == ("ok", None)
    assert prior.point == pytest.approx(expected)


def test_parses_words_and_confidence() -> None:
    response = {"target": " red  cup ", "attributes": ["red", "", 5, "tall"], "relation": "on\nthe left"}
    prior = read(json.dumps({**response, "bbox": [10, 20, 30, 40], "confidence": 0.8}))
    assert (prior.target, prior.attributes, prior.relation) == ("red cup", ("red", "tall"), "on the left")
    assert prior.score == pytest.approx(0.8)
    assert read('{"label": "cup", "attributes": "red", "bbox": [10, 20, 30, 40]}').attributes == ("red",)


@pytest.mark.parametrize(
    ("written", "score"),
    [
        *[(said, 0.25) for said in ("0.25", '"0.25"', '"25%"', "25")],
        ("1", 1.0),
        *[(said, None) for said in ("-1", "101", "NaN", '"high"', "true", "null")],
    ],
)
def test_parses_confidence_values(written: str, score: float | None) -> None:
    assert read('{"bbox": [10, 20, 30, 40], "confidence": ' + written + "}").score == score


def test_replaces_lone_surrogates() -> None:
    assert read('{"bbox": [10, 20, 30, 40], "target": "cup \\ud800"}').target == "cup ?"


# --- draft text ---

DRAFTS = [
    "<think>The cat is at [{cat}], so the dog must be the other one.</think>\n[{dog}]",
    '<think>First guess {{"bbox_2d": [{cat}]}}, no, that is the cat.</think>{{"bbox_2d": [{dog}]}}',
    "<think>[{cat}] is the cat</think><answer>{{'bbox': [{dog}], 'points_1': [150, 250]}}</answer>",
    "The cat is [{cat}]. </think> [{dog}]",  # the chat template contains the opening tag
    "<think>[{cat}]</think><think>[{cat}]</think>[{dog}]",
    "<Thinking>[{cat}]</Thinking> so it is [{dog}]",
    "◁think▷[{cat}]◁/think▷[{dog}]",
    "I put [{cat}] aside. <answer>[{dog}]</answer> The cat stays at [{cat}].",
    "<answer>[{cat}]</answer> or rather <answer>[{dog}]</answer>",
    "<answer>[{cat}]</answer> or rather <answer>[{dog}]</answer> or <answer>[5, 5",
    "<answer>[{dog}]",
    "[THINK]The cat is at [{cat}].[/THINK]The dog is at [{dog}].",
    "<seed:think>[{cat}]</seed:think>[{dog}]",
    "<|begin_of_thought|>[{cat}]<|end_of_thought|>[{dog}]",
    "<|channel>thought\nThe cat is at [{cat}].<channel|>[{dog}]",
    "<|channel|>analysis<|message|>[{cat}]<|end|><|start|>assistant<|channel|>final<|message|>[{dog}]",
    "<think>[{cat}]</think><answer>The dog, not [{cat}], is <|begin_of_box|>[[{dog}]]<|end_of_box|>.</answer>",
    "The cat is at [{cat}]. <|begin_of_box|>{{'bbox_2d': [{dog}]}}<|end_of_box|>",
    "The cat is at [{cat}], so the dog is at [{dog}].",
    'Maybe {{"bbox": [{cat}]}}? No: {{"bbox": [{dog}]}}',
    "The cat is at ({cat}), the dog at ({dog}), the third at (5, 5, 90",
    "<think>" + "The cat is at [{cat}]. " * 2000 + "</think>[{dog}]",  # longer than any response
]


@pytest.mark.parametrize("text", DRAFTS)
def test_ignores_boxes_in_draft_text(text: str) -> None:
    prior = parse_response(text.format(cat="500, 500, 600, 600", dog="100, 200, 300, 400"), "norm1000", (1000, 1000))
    assert prior.bbox == (100, 200, 300, 400)


@pytest.mark.parametrize(
    "text",
    [
        "<think>It is at [10, 20, 30, 40], or",
        "<think>[10, 20, 30, 40]</think>",
        "[10, 20, 30, 40]</think> no",
        "[THINK][10, 20, 30, 40]",
        "<|channel>thought\n[10, 20, 30, 40]",
    ],
)
def test_a_response_of_only_draft_text_is_invalid(text: str) -> None:
    assert read(text).status == "invalid"


# --- outlines ---


@pytest.mark.parametrize(
    "text",
    [
        "<quad>(100,200),(310,220),(300,400),(90,380)</quad>",
        "<quad>100 200 310 220 300 400 90 380</quad>",
        "Outline: (100, 200), (310, 220), (300, 400), (90, 380).",
        "[[100, 200], [310, 220], [300, 400], [90, 380]]",
        '{"bbox": "100,200,310,220,300,400,90,380"}',
        '{"bbox": [100, 200, 310, 220, 300, 400, 90, 380]}',
        '{"quad": [[100, 200], [310, 220], [300, 400], [90, 380]]}',
        '{"polygon": [[[100, 200], [310, 220], [300, 400], [90, 380]]]}',
    ],
)
def test_the_box_of_an_outline_is_its_bounding_box(text: str) -> None:
    assert parse_response(text, "norm1000", (1000, 1000)).bbox == (90, 200, 310, 400)
    assert parse_response(text, "norm1000_yx", (1000, 1000)).bbox == (200, 90, 400, 310)


# --- families: the box 64 48 320 240 and the point 32 48 in the notation of their model cards ---


def test_gemini_writes_y_before_x() -> None:
    response = '```json\n[\n  {"box_2d": [100, 200, 500, 600], "label": "cup"}\n]\n```'
    assert read(response, "norm1000_yx").bbox == (128, 48, 384, 240)
    assert read('[{"point": [100, 50], "label": "cup"}]', "norm1000_yx").point == pytest.approx((32, 48))
    assert read('{"bbox": {"x1": 200, "y1": 100, "x2": 600, "y2": 500}}', "norm1000_yx").bbox == (128, 48, 384, 240)


def test_minicpm_separates_numbers_by_spaces() -> None:
    assert read("<ref>cup</ref><box>100 100 500 500</box>", "norm1000").bbox == (64, 48, 320, 240)
    assert read("<point>50 100</point>", "norm1000").point == pytest.approx((32, 48))


def test_deepseek_coordinates_range_to_999() -> None:
    prior = read("<|ref|>cup<|/ref|><|det|>[[0, 0, 999, 999], [1, 2, 3, 4]]<|/det|>", "norm999")
    assert prior.bbox == pytest.approx((0, 0, 640, 480))


@pytest.mark.parametrize("space", ["norm1000", "pixel", "norm1000_yx"])
def test_paligemma_tokens_are_1024ths_with_y_first_in_every_space(space: CoordSpace) -> None:
    assert read("<loc0102><loc0205><loc0512><loc0614> cup", space).bbox == pytest.approx(
        (205 / 1024 * 640, 102 / 1024 * 480, 614 / 1024 * 640, 512 / 1024 * 480)
    )
    assert read("<loc0102><loc0205><loc0512><loc0614><seg012><seg034> cup ; <loc0001><loc0002><loc0003><loc0004> cup")


@settings(deadline=None)
@given(st.tuples(*[st.integers(0, 999)] * 4), st.sampled_from(["norm1000", "unit"]))
def test_florence_tokens_are_bin_centers(bins: tuple[int, ...], space: CoordSpace) -> None:
    """Compared with the post-processor in transformers."""
    florence = pytest.importorskip("transformers.models.florence2.processing_florence2")
    quantizer = florence.Florence2PostProcessor.__new__(florence.Florence2PostProcessor)
    quantizer.quantize_bins = (1000, 1000)
    wanted = quantizer.dequantize(torch.tensor([bins]), size=(640, 480))[0].tolist()
    prior = read("a cup" + "".join(f"<loc_{number}>" for number in bins), space)
    if wanted[2] - wanted[0] >= 3 and wanted[3] - wanted[1] >= 3:  # it truncates to whole pixels
        assert prior.bbox == pytest.approx(wanted, abs=1)
    elif wanted[2] - wanted[0] < 0 or wanted[3] - wanted[1] < 0:
        assert prior.status == "invalid"


def test_parses_florence_box_lists_and_outlines() -> None:
    boxes = "cup<loc_100><loc_100><loc_500><loc_500><loc_600><loc_600><loc_700><loc_700>"
    assert read(boxes).bbox == pytest.approx((64.32, 48.24, 320.32, 240.24))
    outline = "<poly><loc_100><loc_200><loc_310><loc_220><loc_300><loc_400><loc_90><loc_380></poly>"
    assert parse_response(outline, "pixel", (1000, 1000)).bbox == (90.5, 200.5, 310.5, 400.5)


@settings(deadline=None)
@given(st.integers(0, 1023), st.integers(0, 1023))
def test_kosmos_patches_match_its_processor(first: int, last: int) -> None:
    """Compared with the function in transformers."""
    kosmos = pytest.importorskip("transformers.models.kosmos2.processing_kosmos2")
    x1, y1, x2, y2 = kosmos.patch_index_to_coordinate(first, last, 32)
    text = f"<phrase>a cup</phrase><object><patch_index_{first:04d}><patch_index_{last:04d}></object>"
    prior = read(text)
    if x2 > x1 and y2 > y1:
        assert prior.bbox == pytest.approx((x1 * 640, y1 * 480, x2 * 640, y2 * 480))
    else:
        assert prior.status == "invalid"


@pytest.mark.parametrize("space", ["percent", "norm1000", "pixel"])
def test_molmo2_points_are_index_x_y_in_thousandths_in_every_space(space: CoordSpace) -> None:
    text = '<points coords="1 1 050 100 2 700 800">cup</points>'
    assert read(text, space).point == pytest.approx((32, 48))


# Responses as the families write them, for a 640 x 480 image. The box of most is 64 120 320 360 and the point 64 120,
# converted by hand: a thousandth is 0.64 x 0.48 pixels, a 1024th 0.625 x 0.46875, a percent 6.4 x 4.8.
BOX, POINT = (64, 120, 320, 360), (64, 120)
OF_999 = (0, 160, 640 * 2 / 3, 480)  # 0 333 666 999
GOLDEN: list[tuple[str, str, tuple[float, ...]]] = [
    (
        "gemini-2.5-flash",
        '```json\n[\n  {"box_2d": [250, 100, 750, 500], "mask": "data:image/png;base64,iV", "label": "dog"}\n]\n```',
        BOX,
    ),
    ("gemini-robotics-er-1.5-preview", '[{"point": [250, 100], "label": "dog"}]', POINT),
    ("Qwen/Qwen3-VL-8B-Thinking", 'The left one.\n</think>\n\n{"bbox_2d": [100, 250, 500, 750]}', BOX),
    (
        "Qwen/Qwen2-VL-7B",
        "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(100,250),(500,750)<|box_end|>",
        BOX,
    ),
    ("Qwen/Qwen-VL-Chat", "<ref>dog</ref><box>(100,250),(500,750)</box>", BOX),
    ("OpenGVLab/InternVL3_5-8B", "<ref>the dog</ref><box>[[100, 250, 500, 750]]</box>", BOX),
    ("openbmb/MiniCPM-V-4_5", "<ref>dog</ref><box>100 250 500 750</box>", BOX),
    (
        "zai-org/GLM-4.5V",
        "<think>Two dogs.</think><answer>It is at <|begin_of_box|>[[100,250,500,750]]<|end_of_box|>.</answer>",
        BOX,
    ),
    ("zai-org/GLM-4.1V-9B-Thinking", "The dog is <|begin_of_box|>[100, 250, 500, 750]<|end_of_box|>.", BOX),
    ("doubao-1-5-thinking-vision-pro-250428", "<bbox>100 250 500 750</bbox>", BOX),
    ("doubao-1-5-vision-pro-32k", '[{"category": "dog", "bbox": "<bbox>100 250 500 750</bbox>"}]', BOX),
    ("ByteDance-Seed/Seed1.5-VL", "<point>100 250</point>", POINT),
    ("deepseek-ai/deepseek-vl2", "<|ref|>dog<|/ref|><|det|>[[0, 333, 666, 999]]<|/det|>", OF_999),
    ("THUDM/cogvlm-grounding-generalist-hf", "The dog [[000,333,666,999]] lies.", OF_999),
    (
        "IDEA-Research/Rex-Omni",
        "<|object_ref_start|>dog<|object_ref_end|><|box_start|><0><333><666><999>, <9><9><9><9><|box_end|>",
        OF_999,
    ),
    (
        "IDEA-Research/Rex-Omni",
        "<|object_ref_start|>dog<|object_ref_end|><|box_start|><333><666><|box_end|>",
        (640 / 3, 320),
    ),
    # Bins 100, 250, 500 and 750 of 1,000: half a bin to their centers.
    (
        "microsoft/Florence-2-large",
        "</s><s>dog<loc_100><loc_250><loc_500><loc_750></s>",
        (64.32, 120.24, 320.32, 360.24),
    ),
    ("google/paligemma2-3b-mix-448", "<loc0256><loc0128><loc0768><loc0512> dog", (80, 120, 320, 360)),
    ("google/paligemma-3b-mix-224", "<loc0256><loc0128><loc0768><loc0512><seg001><seg127> dog", (80, 120, 320, 360)),
    # Patch 260 is column 4 of row 8, patch 784 column 16 of row 24: their centers, in patches of 20 x 15 px.
    (
        "microsoft/kosmos-2-patch14-224",
        "<phrase> the dog</phrase><object><patch_index_0260><patch_index_0784></object>",
        (90, 127.5, 330, 367.5),
    ),
    ("allenai/Molmo-7B-D-0924", ' <point x="10.0" y="25.0" alt="dog">dog</point>', POINT),
    ("allenai/MolmoE-1B-0924", ' <points x1="10.0" y1="25.0" x2="50.0" y2="75.0" alt="dogs">dogs</points>', POINT),
    (
        "allenai/Molmo2-8B",
        'Counting the <points coords="1 1 100 250 2 500 750">dogs</points> shows a total of 2.',
        POINT,
    ),
    ("Vision-CAIR/MiniGPT-v2", "<p>dog</p> {<10><25><50><75>}", BOX),
    (
        "AIDC-AI/Ovis2.5-9B",
        "<ref>dog</ref>[\n  <box>(0.100,0.250),(0.500,0.750)</box>,\n  <box>(0.6,0.1),(0.7,0.2)</box>\n]",
        BOX,
    ),
    ("AIDC-AI/Ovis2.5-2B", "<ref>dog</ref><point>(0.100,0.250)</point>", POINT),
    (
        "moondream/moondream3-preview",
        '{"objects": [{"x_min": 0.1, "y_min": 0.25, "x_max": 0.5, "y_max": 0.75}]}',
        BOX,
    ),
    ("vikhyatk/moondream2", "{'points': [{'x': 0.1, 'y': 0.25}]}", POINT),
    ("llava-hf/llava-1.5-7b-hf", "[0.10, 0.25, 0.50, 0.75]", (64, 80, 320, 400)),  # of 640 px, 80 px above the image
]


@pytest.mark.parametrize(("model", "text", "place"), GOLDEN, ids=[model for model, _, _ in GOLDEN])
def test_responses_of_each_family_give_the_place_converted_by_hand(
    model: str, text: str, place: tuple[float, ...]
) -> None:
    prior = read(text, resolve_coord_space(model, "auto"))
    assert prior.status == "ok"
    assert (prior.bbox or prior.point) == pytest.approx(place)


@pytest.mark.parametrize("space", ["pixel", "norm1000_yx", "unit"])
def test_numbered_tokens_mean_the_same_in_every_space(space: CoordSpace) -> None:
    assert read("<p>dog</p> {<10><25><50><75>}", space).bbox == pytest.approx(BOX)
    assert read("<|box_start|><0><333><666><999><|box_end|>", space).bbox == pytest.approx(OF_999)
    assert read("<|box_start|><9><9><9><9>,<0><333><666><999>", space).bbox == pytest.approx(OF_999)


@pytest.mark.parametrize(
    "text",
    [
        "{<10><25><50>}",
        "<10><25><50><75>",  # ambiguous without the phrase before it: thousandths or percent
        "<|box_start|>None<|box_end|>",
        '{"x_min": 0.1, "y_min": 0.25, "x_max": 0.5}',
        '{"left": "dog", "top": "hat", "right": "cat", "bottom": "paws"}',
    ],
)
def test_incomplete_notations_are_invalid(text: str) -> None:
    assert read(text, "unit").status == "invalid"


@pytest.mark.parametrize(
    ("form", "values"), [("xyxy", (64, 48, 320, 240)), ("xywh", (64, 48, 256, 192)), ("cxcywh", (192, 144, 256, 192))]
)
def test_other_box_forms_are_read_on_request(form: BoxForm, values: tuple[float, ...]) -> None:
    assert parse_response(box_text(*values), "pixel", HW, box_form=form).bbox == (64, 48, 320, 240)
    swapped = [values[place] for place in (1, 0, 3, 2)]
    assert parse_response(box_text(*swapped), "pixel_yx", HW, box_form=form).bbox == (64, 48, 320, 240)
    named = '{"bbox": {"x1": 64, "y1": 48, "x2": 320, "y2": 240}}'  # names state the form
    assert parse_response(named, "pixel", HW, box_form=form).bbox == (64, 48, 320, 240)


# --- any text ---

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["10", "NaN", "5%"]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("bbox", "bbox_2d", "box", "point", "found", "target", "attributes", "confidence", "a"),
                    *("x1", "y1", "x2", "y2", "x_min", "y_min", "x_max", "y_max"),
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


NOTATIONS = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<loc_12>",
    "<loc_1><loc_2><loc_30><loc_40>",
    "<loc0012>",
    "<loc0001><loc0002><loc0300><loc0400>",
    "<patch_index_0044><patch_index_0863>",
    "<box>1 2 30 40</box>",
    "<quad>",
    "<point>",
    "</point>",
    '<points coords="1 1 050 100">',
    '<point x="5" y="10">',
    "[1, 2, 30, 40]",
    "'bbox': [1, 2, 30, 40]",
    "None",
    "9" * 400,
    " ; cup ",
    "<|box_start|>",
    "<12>",
    "<12><34><56><789>, ",
    "{<1><2><30><40>}",
    "<bbox>1 2 30 40</bbox>",
    "<point>(1, 2)</point>",
    "(0.1,0.2),(0.3,0.4)",
    "<|begin_of_box|>",
    "<|end_of_box|>",
    "[THINK]",
    "[/THINK]",
    "<|channel|>final",
    "<|channel>thought",
    '{"x_min": 1, "y_min": 2, "x_max": 30, "y_max": 40}',
]
"""Fragments of the notations of the families."""


@st.composite
def notations(draw: st.DrawFn) -> str:
    return "".join(draw(st.lists(st.sampled_from(NOTATIONS) | st.text(max_size=3), max_size=8)))


@st.composite
def mangled_json(draw: st.DrawFn) -> str:
    """JSON with up to three deletions or replacements by other fragments."""
    text = json.dumps(draw(JSON | JSON.map(lambda value: {"bbox": value})))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(text)))
        stop = draw(st.integers(start, min(len(text), start + 6)))
        piece = draw(
            st.sampled_from(
                ["", "[", "]", "{", "}", '"', ",", "\\ud800", "1e999", "<point x=", "(1,2),(30,40)", *NOTATIONS]
            )
        )
        text = text[:start] + piece + text[stop:]
    return text


@st.composite
def mangled_golden(draw: st.DrawFn) -> str:
    """A family's response with other numbers, and a piece missing, doubled or replaced."""
    text = draw(st.sampled_from([text for _, text, _ in GOLDEN]))
    if draw(st.booleans()):
        number = draw(st.sampled_from(["-1", "0", "1e308", "9" * 400, "NaN", "", "0x1", "1.5"]))
        text = re.sub(r"\d+", number, text, count=draw(st.integers(1, 3)))
    start = draw(st.integers(0, len(text)))
    stop = draw(st.integers(start, min(len(text), start + 8)))
    return text[:start] + draw(st.sampled_from(["", text[start:stop] * 2, *NOTATIONS])) + text[stop:]


@settings(max_examples=400, deadline=None)
@given(
    st.text() | st.text(st.characters(codec=None)) | mangled_json() | notations() | mangled_golden(),
    st.sampled_from(COORD_SPACES),
    st.sampled_from(["xyxy", "xywh", "cxcywh"]),
)
def test_any_text_parses_without_an_exception_to_a_valid_prior(text: str, space: CoordSpace, form: BoxForm) -> None:
    prior = parse_response(text, space, (48, 64), (84, 112), form)
    assert prior.status in ("ok", "empty", "invalid")
    assert (prior.status == "ok") == (prior.bbox is not None or prior.point is not None)
    if prior.bbox:
        x1, y1, x2, y2 = prior.bbox
        assert 0 <= x1 <= x2 - 1 <= 63
        assert 0 <= y1 <= y2 - 1 <= 47
    if prior.point:
        assert 0 <= prior.point[0] <= 64
        assert 0 <= prior.point[1] <= 48
    assert prior.score is None or 0 <= prior.score <= 1
    for word in (prior.target, prior.relation, *prior.attributes):
        word.encode("utf-8")


MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    "piece",
    [
        " ",
        "{",
        "[",
        "(",
        "<",
        "1",
        "1,",
        "1 ",
        "(1,",
        "(1,2),",
        "[1,2,3,4]",
        '{"a":',
        '{"a":[',
        '{"',
        "'",
        "{'a':",
        '{"a": 1} ',
        '{"bbox": 1} ',
        "<think>",
        "</think>",
        "<answer>",
        "<answer></answer>",
        "<loc_1>",
        "<loc0001>",
        "<patch_index_0001>",
        "<point ",
        '<points coords="1 ',
        'x="1" ',
        "<box>1 ",
        "<box>(",
        '{"bbox": "',
        "<|box_start|>",
        "<|box_start|><1>,",
        "<12>",
        "{<1>",
        "{<1><2><3><4>}",
        "[THINK]",
        "<|channel|>final",
        "<|begin_of_box|>",
        "<|begin_of_box|><|end_of_box|>",
        '{"x_min": 1, "y_min": 1, "x_max": 9, "y_max": 9}',
    ],
)
def test_parses_a_megabyte_of_any_repeated_piece(piece: str) -> None:
    """Quadratic running time would take hours here."""
    assert read(piece * (MEGABYTE // len(piece))).status in ("ok", "empty", "invalid")


@pytest.mark.parametrize("piece", [" ", "1,", "(1,", "<", "[1,2,3,4]"])
@pytest.mark.parametrize("frame", ['{{"bbox": "{}"}}', '<point {} x="1">', '{{"bbox": [[{}]]}}'])
def test_parses_a_megabyte_inside_a_response(piece: str, frame: str) -> None:
    assert read(frame.format(piece * (MEGABYTE // len(piece)))).status in ("ok", "empty", "invalid")


@pytest.mark.parametrize("piece", ['{"a":', "{", '{"a": [1, ', '{"', "{'"])
def test_runaway_text_needs_a_bounded_number_of_decoding_attempts(monkeypatch: pytest.MonkeyPatch, piece: str) -> None:
    """Only a failed decoding attempt costs more than the characters that it skips."""
    tries = []
    decode = json.JSONDecoder.raw_decode

    def counted(self: json.JSONDecoder, text: str, start: int) -> object:
        tries.append(start)
        return decode(self, text, start)

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", counted)
    for repeats in (10_000, 100_000):
        tries.clear()
        read(piece * repeats + "[10, 20, 30, 40]")
        assert len(tries) <= 512
