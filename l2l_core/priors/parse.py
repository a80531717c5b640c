"""Parse a multimodal LLM's response, in any notation, into the described object and its place.

All work is linear in the length of the text: responses are external input, and runaway output can reach a megabyte.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal, TypeVar

from l2l_core.config import CoordSpace
from l2l_core.mllm.backend import clean_text, final_text
from l2l_core.mllm.coords import MIN_SIDE_PX, is_y_first, origin_px, pixels_per_unit

_BOX_KEYS = ("bbox", "bbox_2d", "box", "box_2d", "bounding_box", "bboxes", "boxes", "quad", "polygon")
_POINT_KEYS = ("point", "point_2d", "points")
_PLACE_KEYS = (*_BOX_KEYS, *_POINT_KEYS, "found")
_TARGET_KEYS = ("target", "label", "object")
_SCORE_KEYS = ("confidence", "score")
_REQUIRED_PROMPT_KEYS = ("found", "target")
"""Keys of every prompt that other notations lack."""
_PROMPT_KEYS = {*_REQUIRED_PROMPT_KEYS, "attributes", "relation", "anchor", "confidence", *_PLACE_KEYS}
"""All keys that a response in a prompt's form may hold, and other names of the place."""
_CORNER_NAMES = (
    ("x1", "y1", "x2", "y2"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("left", "top", "right", "bottom"),
)
_NO = (False, 0, None, "false", "no", "none", "null")
_EMPTY_VALUES = (None, "", "none", "null")

_MAX_FAILURES = 256
"""Maximum failed attempts to read a JSON object; each reads at most the whole text. More mean runaway output."""
_MAX_DEPTH = 4  # of lists under a box key: boxes > box > corners > numbers

_OBJECT = re.compile(r"\{\s*+[\"}]")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_SEPARATORS = re.compile(r"[\s,;]*")
_BETWEEN_NUMBERS = re.compile(r"[\s,;()\[\]]+")
_TAG = re.compile(r"<[^<>]*>")
_DIVIDING_WORD = re.compile(r"\b(?!(?:and|or)\b)\w", re.IGNORECASE)
_GROUP = re.compile(r"(?:[\[(]|<(?P<tag>box|bbox|quad|point)>[\s\[(]*+)(?P<inner>[^\[\]()<>]*+)(?:[\])]|</(?P=tag)>)")
"""Innermost brackets, and tags around numbers or brackets: <box>x1 y1 x2 y2</box>, <point>(x, y)</point>."""
_POINT_TAG = re.compile(r"<points?\s[^<>]*>")
_POINT_TAG_XY = re.compile(r"\bx1?\s*=\s*\"([^\"]{1,32})\"\s*y1?\s*=\s*\"([^\"]{1,32})\"")
_POINT_TAG_COORDS = re.compile(r"\bcoords\s*=\s*\"[^\"]*?\b\d{1,4} (\d{3,4}) (\d{3,4})\b")
_REX_RUN = re.compile(r"<\|box_start\|>((?:<\d{1,3}>|[\s,])++)")
_MINIGPT_BOX = re.compile(r"\{((?:<\d{1,3}>){4})\}")
_FLORENCE_RUN = re.compile(r"(?:<loc_\d{1,4}>)+")
_PALIGEMMA_RUN = re.compile(r"(?:<loc\d{4}>)+")
_KOSMOS_PAIR = re.compile(r"<patch_index_(\d{4})><patch_index_(\d{4})>")
_KOSMOS_SIDE = 32  # patches along each side of the image

Box = tuple[float, float, float, float]
Point = tuple[float, float]
BoxForm = Literal["xyxy", "xywh", "cxcywh"]
"""Meaning of four numbers: two corners; a corner, width and height; or the center, width and height."""


@dataclass(frozen=True, slots=True)
class ParsedPrior:
    """A parsed response; coordinates are in original-image pixels, inside the image."""

    status: Literal["ok", "empty", "invalid"]  # a place, explicitly nothing, or unusable
    target: str = ""
    attributes: tuple[str, ...] = ()
    relation: str = ""  # includes its anchor: "left of the bus"
    bbox: Box | None = None  # x1 y1 x2 y2
    point: Point | None = None  # x y
    score: float | None = None  # the model's own confidence in [0, 1]


@dataclass(frozen=True, slots=True)
class _Frame:
    """The image that coordinates refer to."""

    scale_xy: Point  # original-image pixels per unit
    origin_xy: Point  # position of 0, 0 in original-image pixels
    size_wh: Point  # original image
    is_y_first: bool  # of boxes and points without named axes
    box_form: BoxForm  # of four numbers without names


@dataclass(frozen=True, slots=True)
class _Shape:
    """Adjacent numbers in a text outside of JSON objects."""

    start: int
    end: int
    numbers: list[float]
    tag: str | None  # the tag around them, if any
    is_corners: bool  # pairs, each in its own brackets


Item = TypeVar("Item")


def parse_response(
    raw_text: str,
    coord_space: CoordSpace,
    image_hw: tuple[int, int],
    input_hw: tuple[int, int] | None = None,
    box_form: BoxForm = "xyxy",
) -> ParsedPrior:
    """Parse any text without raising.

    Only the part that `final_text` keeps is read. Supported notations, in this order:

    - JSON objects (in prose or code fences; keys bbox, bbox_2d, box_2d, box, point, ...; numbers as strings);
    - tokens and tags of families, whose meaning no setting changes: Florence-2's <loc_12>, PaliGemma's <loc0012>,
      Kosmos-2's <patch_index_0012>, Rex-Omni's <|box_start|><12>, MiniGPT-v2's {<12>}, Molmo's <point x="" y=""> and
      <points coords="">;
    - numbers in brackets or in <box>, <quad> and <point> tags.

    The first usable place of a list counts, since the prompt asks for the most likely one first. `and` and `or`
    separate places of one list. If other words separate several lists, the last list counts, since earlier ones are
    reasoning. Objects with keys that no prompt defines count only if no other object is usable.
    Three or more corners are an outline, and the box is its hull. Boxes are clipped to the image. Inverted and
    non-finite boxes are rejected, and so are boxes narrower than MIN_SIDE_PX after clipping: the parser never guesses
    the order of corners. `coord_space` says whether y comes before x, unless the axes are named.

    image_hw: original image. input_hw: image as the model saw it, required for `resized_pixel` (else ValueError).
    box_form: other forms than corners occur in files of other tools; priors/coord_check.py tries them.

    >>> parse_response('{"bbox_2d": [100, 200, 300, 400]}', "norm1000", (480, 640)).bbox
    (64.0, 96.0, 192.0, 192.0)
    """
    text = final_text(raw_text)
    frame = _frame(coord_space, image_hw, input_hw, box_form)
    objects = _json_objects(text) or _json_objects(_with_double_quotes(text))
    prior = _read_objects(text, objects, frame)
    if prior is not None:
        return prior
    rest = _without(text, objects)  # four numbers inside an object under another key are not a box
    prior = _read_tokens(rest, image_hw) or _read_shapes(rest, frame)
    return prior or ParsedPrior("invalid")


def _frame(
    space: CoordSpace,
    image_hw: tuple[int, int],
    input_hw: tuple[int, int] | None = None,
    box_form: BoxForm = "xyxy",
) -> _Frame:
    return _Frame(
        scale_xy=_pair(pixels_per_unit(space, image_hw, input_hw).tolist()),
        origin_xy=_pair(origin_px(space, image_hw).tolist()),
        size_wh=(float(image_hw[1]), float(image_hw[0])),
        is_y_first=is_y_first(space),
        box_form=box_form,
    )


# JSON objects

Span = tuple[int, int, dict[str, object]]


def _json_objects(text: str) -> list[Span]:
    """Every outermost JSON object of a text, with its start and end."""
    decoder = json.JSONDecoder(parse_int=float)  # an integer of any length becomes a float, possibly infinite
    found: list[Span] = []
    failures, position = 0, 0
    while failures < _MAX_FAILURES and (match := _OBJECT.search(text, position)):
        try:
            value, position = decoder.raw_decode(text, match.start())
            found.append((match.start(), position, value))
        except (ValueError, RecursionError):
            failures, position = failures + 1, match.start() + 1
    return found


def _with_double_quotes(text: str) -> str:
    """An object in Python's notation -> JSON of the same length."""
    names = {"'": '"', "None": "null", "True": "true", "False": "false"}
    return re.sub(r"'|\b(?:None|True|False)\b", lambda match: names[match[0]], text) if "'" in text else ""


def _without(text: str, objects: Iterable[Span]) -> str:
    """The text with each object replaced by a word."""
    ends = [0, *(end for _, end, _ in objects)]
    starts = [*(start for start, _, _ in objects), len(text)]
    return " _ ".join(text[end:start] for end, start in zip(ends, starts, strict=True))


def _in_lists(text: str, items: Iterable[tuple[int, int, Item]]) -> list[list[Item]]:
    """Group items (start, end, item) into lists: neighbors with no word but `and` and `or` between them, tags aside."""
    lists: list[list[Item]] = []
    last = 0
    for start, end, item in items:
        if lists and not _DIVIDING_WORD.search(_TAG.sub("", text[last:start])):
            lists[-1].append(item)
        else:
            lists.append([item])
        last = end
    return lists


def _read_objects(text: str, objects: Iterable[Span], frame: _Frame) -> ParsedPrior | None:
    """The content of the last list of responses; None if no object mentions a place.

    If one response is in a prompt's form, objects with keys outside every prompt are remarks: they count only if
    nothing else does.
    """
    unusable: ParsedPrior | None = None
    lists = [[item for value in values for item in _places(value)] for values in _in_lists(text, objects)]
    responses = [items for items in reversed(lists) if items]
    if any(key in item for items in responses for item in items for key in _REQUIRED_PROMPT_KEYS):
        responses.sort(key=_are_remarks)
    for items in responses:
        read = [_read_object(item, frame) for item in items]
        best = next((prior for prior in read if prior.status == "ok"), read[0])
        if best.status != "invalid":
            return best
        unusable = unusable or best
    return unusable


def _are_remarks(items: list[dict[str, object]]) -> bool:
    """Whether no object is in a prompt's form, and each has keys outside every prompt."""
    return not any(key in item for item in items for key in _REQUIRED_PROMPT_KEYS) and all(
        not item.keys() <= _PROMPT_KEYS for item in items
    )


def _places(value: object) -> Iterator[dict[str, object]]:
    """The outermost objects in a JSON value that mention a place, in order; keys in lower case."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            keyed = {key.strip().lower(): entry for key, entry in item.items()}
            if any(key in keyed for key in _PLACE_KEYS) or _named_corners(keyed):
                yield keyed
            else:
                waiting += reversed(keyed.values())
        elif isinstance(item, list):
            waiting += reversed(item)


def _read_object(item: dict[str, object], frame: _Frame) -> ParsedPrior:
    box_value, point_value = _first(item, _BOX_KEYS), _first(item, _POINT_KEYS)
    named = [key for key in _PLACE_KEYS if key in item]
    if box_value is None and _named_corners(item):  # Moondream's objects have no other keys
        box_value = item
    found = item.get("found", True)
    if (found.strip().lower() if isinstance(found, str) else found) in _NO:
        return _with_words("empty", item)
    box = next(_boxes(box_value, frame), None)
    point = next(_points(point_value, frame), None)
    if box or point:
        return _with_words("ok", item, box, point)
    said = [value for value in (box_value, point_value) if not _is_nothing(value)]
    return _with_words("invalid" if said or named == ["found"] else "empty", item)


def _with_words(
    status: Literal["ok", "empty", "invalid"],
    item: dict[str, object],
    box: Box | None = None,
    point: Point | None = None,
) -> ParsedPrior:
    attributes = item.get("attributes")
    words = attributes if isinstance(attributes, list) else [attributes]
    return ParsedPrior(
        status=status,
        target=_to_words(_first(item, _TARGET_KEYS)),
        attributes=tuple(cleaned for word in words if (cleaned := _to_words(word))),
        relation=_with_anchor(_to_words(item.get("relation")), _to_words(item.get("anchor"))),
        bbox=box,
        point=point,
        score=_to_score(_first(item, _SCORE_KEYS)),
    )


def _first(item: dict[str, object], keys: tuple[str, ...]) -> object:
    return next((item[key] for key in keys if key in item), None)


def _is_nothing(value: object) -> bool:
    if isinstance(value, list):
        return not value
    return (value.strip().lower() if isinstance(value, str) else value) in _EMPTY_VALUES


def _boxes(value: object, frame: _Frame, depth: int = _MAX_DEPTH) -> Iterator[Box]:
    """The usable boxes in the value of a box key, in order."""
    if isinstance(value, str):
        value = _numbers(_BETWEEN_NUMBERS.sub(" ", _TAG.sub(" ", value)))
    if isinstance(value, dict):
        box = _to_box(_named_corners(value), replace(frame, is_y_first=False, box_form="xyxy"))
        if box:
            yield box
    elif isinstance(value, list) and depth:
        is_outline = len(value) > 1 and all(isinstance(corner, list) and len(corner) == 2 for corner in value)
        if is_outline or not any(isinstance(entry, list | dict) for entry in value):
            box = _to_box(list(chain(*value)) if is_outline else value, frame)
            if box:
                yield box
        else:
            for entry in value:
                yield from _boxes(entry, frame, depth - 1)


def _named_corners(item: dict[str, object]) -> list[object]:
    """The values of left, top, right and bottom under one set of names; empty if some are missing."""
    named = ([item.get(name) for name in names] for names in _CORNER_NAMES)
    return next((four for four in named if None not in four), [])


def _points(value: object, frame: _Frame) -> Iterator[Point]:
    """The usable points in the value of a point key, in order."""
    for entry in value if isinstance(value, list) and value and isinstance(value[0], list | dict) else [value]:
        match entry:
            case [first, second]:
                point = _to_point([first, second], frame)
            case {"x": x, "y": y}:
                point = _to_point([x, y], replace(frame, is_y_first=False))
            case _:
                point = None
        if point:
            yield point


# Tokens and tags of families


def _read_tokens(text: str, image_hw: tuple[int, int]) -> ParsedPrior | None:
    """The first usable place in a family's own notation: such models do not reason."""
    thousandths = _frame("norm1000", image_hw)
    for run in _FLORENCE_RUN.finditer(text):
        bins = [float(number) + 0.5 for number in re.findall(r"\d+", run[0])]  # a bin's center
        fours = [bins[place : place + 4] for place in range(0, len(bins), 4)]
        boxes = [_to_box(four, thousandths) for four in fours]
        # Several boxes of a phrase look like an outline; an outline turns back somewhere.
        box = boxes[0] if all(boxes) else _to_box(bins, thousandths)
        if box:
            return ParsedPrior("ok", bbox=box)
    for run in _PALIGEMMA_RUN.finditer(text):
        numbers = [float(number) for number in re.findall(r"\d+", run[0])]
        box = _to_box(numbers, _frame("norm1024_yx", image_hw)) if len(numbers) == 4 else None
        if box:
            return ParsedPrior("ok", bbox=box)
    for pair in _KOSMOS_PAIR.finditer(text):
        box = _patch_box(int(pair[1]), int(pair[2]), _frame("unit", image_hw))
        if box:
            return ParsedPrior("ok", bbox=box)
    for run in _REX_RUN.finditer(text):
        for place in run[1].split(","):
            if prior := _numbered_place(place, _frame("norm999", image_hw)):
                return prior
    for run in _MINIGPT_BOX.finditer(text):
        if prior := _numbered_place(run[1], _frame("percent", image_hw)):
            return prior
    for tag in _POINT_TAG.findall(text):
        match, coords = _POINT_TAG_XY.search(tag), _POINT_TAG_COORDS.search(tag)
        point = _to_point(match.groups(), _frame("percent", image_hw)) if match else None
        point = point or (_to_point(coords.groups(), thousandths) if coords else None)
        if point:
            return ParsedPrior("ok", point=point)
    return None


def _numbered_place(text: str, frame: _Frame) -> ParsedPrior | None:
    """The box or point in tokens such as <12><345>: two are a point, four a box, and more an outline."""
    numbers = [float(number) for number in re.findall(r"\d+", text)]
    if len(numbers) == 2 and (point := _to_point(numbers, frame)):
        return ParsedPrior("ok", point=point)
    box = _to_box(numbers, frame)
    return ParsedPrior("ok", bbox=box) if box else None


def _patch_box(first: int, last: int, frame: _Frame) -> Box | None:
    """The box between two of Kosmos-2's patches, which are numbered row by row.

    It extends from center to center, or over whole patches if both are in one row or column.
    """
    if max(first, last) >= _KOSMOS_SIDE**2:
        return None
    (y1, x1), (y2, x2) = divmod(first, _KOSMOS_SIDE), divmod(last, _KOSMOS_SIDE)
    low, high = (0.0, 1.0) if x1 == x2 or y1 == y2 else (0.5, 0.5)
    return _to_box([side / _KOSMOS_SIDE for side in (x1 + low, y1 + low, x2 + high, y2 + high)], frame)


# Numbers in brackets and tags


def _read_shapes(text: str, frame: _Frame) -> ParsedPrior | None:
    shapes = [(shape.start, shape.end, shape) for shape in _shapes(text)]
    for group in reversed(_in_lists(text, shapes)):
        for shape in group:
            if len(shape.numbers) > 2 and (box := _to_box(shape.numbers, frame)):
                return ParsedPrior("ok", bbox=box)
            if shape.tag == "point" and len(shape.numbers) == 2 and (point := _to_point(shape.numbers, frame)):
                return ParsedPrior("ok", point=point)
    return None


def _shapes(text: str) -> list[_Shape]:
    """Groups of numbers in order; pairs with only separators between them are the corners of one shape."""
    found: list[_Shape] = []
    for match in _GROUP.finditer(text):
        numbers = _numbers(match["inner"])
        if not numbers:
            continue
        is_corner = len(numbers) == 2 and match["tag"] != "point"
        if is_corner and found and found[-1].is_corners and _SEPARATORS.fullmatch(text, found[-1].end, match.start()):
            found[-1].numbers.extend(numbers)
            found[-1] = replace(found[-1], end=match.end())
        else:
            found.append(_Shape(match.start(), match.end(), numbers, match["tag"], is_corner))
    return found


def _numbers(text: str) -> list[float] | None:
    """The numbers of a text that contains only numbers and separators."""
    words = re.findall(r"[^\s,;]+", text)
    return [float(word) for word in words] if all(_NUMBER.fullmatch(word) for word in words) else None


def _to_number(value: object) -> float | None:
    """A finite number, or a string that contains one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _to_box(values: Iterable[object], frame: _Frame) -> Box | None:
    """Four numbers are x1 y1 x2 y2; six and more are corners x y, and the box is their hull. None if unusable."""
    numbers = [_to_number(value) for value in values]
    known = [number for number in numbers if number is not None]
    if len(known) != len(numbers) or len(known) < 4 or len(known) % 2:
        return None
    xs, ys = (known[1::2], known[::2]) if frame.is_y_first else (known[::2], known[1::2])
    if len(known) > 4:
        xs, ys = [min(xs), max(xs)], [min(ys), max(ys)]
    elif frame.box_form == "xywh":
        xs, ys = [xs[0], xs[0] + xs[1]], [ys[0], ys[0] + ys[1]]
    elif frame.box_form == "cxcywh":
        xs, ys = [xs[0] - xs[1] / 2, xs[0] + xs[1] / 2], [ys[0] - ys[1] / 2, ys[0] + ys[1] / 2]
    x1, x2 = (_clip(value * frame.scale_xy[0] + frame.origin_xy[0], frame.size_wh[0]) for value in xs)
    y1, y2 = (_clip(value * frame.scale_xy[1] + frame.origin_xy[1], frame.size_wh[1]) for value in ys)
    return (x1, y1, x2, y2) if x2 - x1 >= MIN_SIDE_PX and y2 - y1 >= MIN_SIDE_PX else None


def _clip(value: float, high: float) -> float:
    return min(max(value, 0.0), high)


def _to_point(values: Iterable[object], frame: _Frame) -> Point | None:
    """A point is usable only inside the image; unlike a box, it cannot be clipped."""
    first, second = (_to_number(value) for value in values)
    if first is None or second is None:
        return None
    x, y = (second, first) if frame.is_y_first else (first, second)
    x, y = x * frame.scale_xy[0] + frame.origin_xy[0], y * frame.scale_xy[1] + frame.origin_xy[1]
    return (x, y) if 0.0 <= x <= frame.size_wh[0] and 0.0 <= y <= frame.size_wh[1] else None


def _to_score(value: object) -> float | None:
    """A confidence in [0, 1]; percentages ("80%", 80) are accepted."""
    if isinstance(value, str) and value.strip().endswith("%"):
        percent = _to_number(value.strip()[:-1])
        score = None if percent is None else percent / 100.0
    else:
        score = _to_number(value)
        score = score / 100.0 if score is not None and score > 1.0 else score
    return score if score is not None and 0.0 <= score <= 1.0 else None


def _with_anchor(relation: str, anchor: str) -> str:
    """Append the anchor unless the relation already contains it, as it does for many models."""
    return relation if anchor.lower() in relation.lower() else f"{relation} {anchor}".strip()


def _to_words(value: object) -> str:
    return " ".join(clean_text(value).split()) if isinstance(value, str) else ""


def _pair(values: list[float]) -> Point:
    return values[0], values[1]
