from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2l_core.priors.coords import COORD_SPACES, CoordSpace
from l2l_core.priors.parse import ParsedPrior, parse_answer

HW = (480, 640)  # height, width


def read(text: str, space: CoordSpace = "pixel", input_hw: tuple[int, int] | None = None) -> ParsedPrior:
    return parse_answer(text, space, HW, input_hw)


def box_text(*values: object) -> str:
    return json.dumps({"bbox": list(values)})


# --- coordinate spaces: the same box, 64 48 320 240 in a 640 x 480 image, as each family writes it ---


@pytest.mark.parametrize(
    ("space", "values", "input_hw"),
    [
        ("pixel", (64, 48, 320, 240), None),
        ("resized_pixel", (128, 24, 640, 120), (240, 1280)),  # seen twice as wide and half as high
        ("norm1000", (100, 100, 500, 500), None),
        ("percent", (10, 10, 50, 50), None),
        ("unit", (0.1, 0.1, 0.5, 0.5), None),
    ],
)
def test_spaces(space: CoordSpace, values: tuple[float, ...], input_hw: tuple[int, int] | None) -> None:
    prior = read(box_text(*values), space, input_hw)
    assert prior.status == "ok"
    assert prior.bbox == pytest.approx((64, 48, 320, 240))


def test_resized_pixels_need_the_input_size() -> None:
    with pytest.raises(ValueError, match="as the model saw it"):
        read(box_text(1, 2, 3, 4), "resized_pixel")


@settings(deadline=None)
@given(
    st.sampled_from([space for space in COORD_SPACES if space != "resized_pixel"]),
    st.tuples(*[st.floats(0, 1)] * 4),
    st.tuples(st.integers(16, 4000), st.integers(16, 4000)),
)
def test_every_space_gives_back_the_box(space: CoordSpace, where: tuple[float, ...], hw: tuple[int, int]) -> None:
    (left, right), (top, bottom) = sorted(where[:2]), sorted(where[2:])
    span = {"pixel": (hw[1], hw[0]), "norm1000": (1000, 1000), "percent": (100, 100), "unit": (1, 1)}[space]
    text = box_text(left * span[0], top * span[1], right * span[0], bottom * span[1])
    true_box = (left * hw[1], top * hw[0], right * hw[1], bottom * hw[0])
    prior = parse_answer(text, space, hw)
    if true_box[2] - true_box[0] > 1.001 and true_box[3] - true_box[1] > 1.001:
        assert prior.bbox == pytest.approx(true_box, abs=1e-3)
    elif true_box[2] - true_box[0] < 0.999 or true_box[3] - true_box[1] < 0.999:
        assert prior.status == "invalid"


# --- ways of writing ---

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
    ],
)
def test_a_box_is_found(text: str) -> None:
    prior = read(text)
    assert prior.status == "ok"
    assert prior.bbox == pytest.approx(HERE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot see a cup.",
        '{"target": "cup"}',
        '{"found": true}',
        '{"color": [10, 20, 30, 40]}',  # four numbers that are no box
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
        "[" * 5000,
        '{"a":' * 5000,
    ],
)
def test_unusable_answers_are_invalid(text: str) -> None:
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
def test_an_answer_that_nothing_is_there_is_empty(text: str) -> None:
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
        # Molmo's tags are percent in every space: 5 % of 640, 10 % of 480.
        (' <point x="5.0" y="10.0" alt="cup">cup</point>', "percent", (32, 48)),
        (' <point x="5.0" y="10.0" alt="cup">cup</point>', "pixel", (32, 48)),
        ('<points x1="5.0" y1="10.0" x2="50" y2="60" alt="cups">cups</points>', "pixel", (32, 48)),
    ],
)
def test_points(text: str, space: CoordSpace, expected: tuple[float, float]) -> None:
    prior = read(text, space)
    assert (prior.status, prior.bbox) == ("ok", None)
    assert prior.point == pytest.approx(expected)


def test_words_and_confidence() -> None:
    answer = {"target": " red  cup ", "attributes": ["red", "", 5, "tall"], "relation": "on\nthe left"}
    prior = read(json.dumps({**answer, "bbox": [10, 20, 30, 40], "confidence": 0.8}))
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
def test_confidence(written: str, score: float | None) -> None:
    assert read('{"bbox": [10, 20, 30, 40], "confidence": ' + written + "}").score == score


def test_lone_surrogates_become_storable() -> None:
    assert read('{"bbox": [10, 20, 30, 40], "target": "cup \\ud800"}').target == "cup ?"


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
                ["bbox", "bbox_2d", "box", "point", "found", "target", "attributes", "confidence", "x1", "a"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@st.composite
def mangled_json(draw: st.DrawFn) -> str:
    """JSON with up to three cuts, doublings or foreign pieces."""
    text = json.dumps(draw(JSON | JSON.map(lambda value: {"bbox": value})))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(text)))
        stop = draw(st.integers(start, min(len(text), start + 6)))
        piece = draw(
            st.sampled_from(["", "[", "]", "{", "}", '"', ",", "\\ud800", "1e999", "<point x=", "(1,2),(30,40)"])
        )
        text = text[:start] + piece + text[stop:]
    return text


@settings(max_examples=400, deadline=None)
@given(st.text() | st.text(st.characters(codec=None)) | mangled_json(), st.sampled_from(COORD_SPACES))
def test_no_text_raises_and_every_result_can_be_used(text: str, space: CoordSpace) -> None:
    prior = parse_answer(text, space, (48, 64), (84, 112))
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
