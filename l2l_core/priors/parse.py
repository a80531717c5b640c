"""A multimodal LLM's answer, however it is written -> what it says is meant and where that is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from l2l_core.priors.backend import clean_text
from l2l_core.priors.coords import MIN_SIDE_PX, CoordSpace, pixels_per_unit

MAX_TEXT_CHARS = 20_000
"""An answer has a few hundred characters; what lies beyond this is a runaway and not read."""
_MAX_OBJECTS = 64  # JSON objects tried in one answer, for the same reason

_BOX_KEYS = ("bbox", "bbox_2d", "box", "bounding_box", "bboxes", "boxes")
_POINT_KEYS = ("point", "point_2d", "points")
_TARGET_KEYS = ("target", "label", "object")
_SCORE_KEYS = ("confidence", "score")
_NO = (False, 0, None, "false", "no", "none", "null")
_NOTHING = (None, "", "none", "null")

_NUMBER = r"\s*(-?\d{1,9}(?:\.\d{1,30})?)\s*"
_BARE_BOX = re.compile(rf"[\[(]{_NUMBER},{_NUMBER}(?:,|\)\s*,?\s*\(){_NUMBER},{_NUMBER}[\])]")
"""[x1, y1, x2, y2], (x1, y1, x2, y2) or (x1, y1), (x2, y2) in any surroundings."""
_FOUR_NUMBERS = re.compile(rf"{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}")
_POINT_TAG = re.compile(r"<points?\s[^<>]{0,500}>")
_POINT_TAG_XY = re.compile(r"\bx1?\s*=\s*\"([^\"]{1,32})\"\s*y1?\s*=\s*\"([^\"]{1,32})\"")

Box = tuple[float, float, float, float]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class ParsedPrior:
    """What an answer says; coordinates in original-image pixels, inside the image."""

    status: Literal["ok", "empty", "invalid"]  # it says where, it says that there is nothing, it cannot be used
    target: str = ""
    attributes: tuple[str, ...] = ()
    relation: str = ""  # with its anchor: "left of the bus"
    bbox: Box | None = None  # x1 y1 x2 y2
    point: Point | None = None  # x y
    score: float | None = None  # the model's own confidence in [0, 1]


@dataclass(frozen=True, slots=True)
class _Frame:
    """The image that coordinates refer to."""

    scale_xy: Point  # original-image pixels per unit
    size_wh: Point  # original image


def parse_answer(
    raw_text: str, coord_space: CoordSpace, image_hw: tuple[int, int], input_hw: tuple[int, int] | None = None
) -> ParsedPrior:
    """Read any text without raising.

    Understood are JSON objects (in prose or code fences; keys bbox, bbox_2d, box, point, ...; numbers as strings;
    several boxes, of which the first usable one counts, since the prompt asks for the most likely first), bare boxes in
    brackets, and Molmo's <point x="" y=""> tags, which are in percent whatever `coord_space` says. Boxes are clipped to
    the image. Inverted, non-finite and (after clipping) less than MIN_SIDE_PX wide ones are not used: the order of
    corners is never guessed.

    image_hw: original image. input_hw: image as the model saw it, needed for `resized_pixel` (ValueError without).
    """
    text = raw_text[:MAX_TEXT_CHARS]
    size_wh = (float(image_hw[1]), float(image_hw[0]))
    frame = _Frame(_pair(pixels_per_unit(coord_space, image_hw, input_hw).tolist()), size_wh)
    percent = _Frame(_pair(pixels_per_unit("percent", image_hw).tolist()), size_wh)

    fallback: ParsedPrior | None = None
    has_objects = False
    for item in _json_objects(text):
        has_objects = True
        parsed = _read_object(item, frame)
        if parsed is None:
            continue
        if parsed.status == "ok" or "found" in item:
            return parsed
        fallback = fallback or parsed
    if fallback is not None:
        return fallback
    for tag in _POINT_TAG.findall(text):
        match = _POINT_TAG_XY.search(tag)
        point = _to_point(match.groups(), percent) if match else None
        if point:
            return ParsedPrior("ok", point=point)
    if not has_objects:  # four numbers inside an object under some other key are no box
        for match in _BARE_BOX.finditer(text):
            box = _to_box(match.groups(), frame)
            if box:
                return ParsedPrior("ok", bbox=box)
    return ParsedPrior("invalid")


def _json_objects(text: str) -> Iterator[dict[str, object]]:
    """Every JSON object in a text, outer ones before those within them; keys in lower case."""
    decoder = json.JSONDecoder()
    for match in list(re.finditer(r"\{", text))[:_MAX_OBJECTS]:
        try:
            value, _ = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        yield {key.strip().lower(): item for key, item in value.items()}


def _read_object(item: dict[str, object], frame: _Frame) -> ParsedPrior | None:
    """An answer object; None where it says nothing of a place."""
    box_value, point_value = _first(item, _BOX_KEYS), _first(item, _POINT_KEYS)
    named = [key for key in (*_BOX_KEYS, *_POINT_KEYS, "found") if key in item]
    if not named:
        return None
    found = item.get("found", True)
    if (found.strip().lower() if isinstance(found, str) else found) in _NO:
        return _with_words("empty", item)
    box = next((box for four in _fours(box_value) if (box := _to_box(four, frame))), None)
    point = next((point for two in _twos(point_value) if (point := _to_point(two, frame))), None)
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
    return (value.strip().lower() if isinstance(value, str) else value) in _NOTHING


def _fours(value: object) -> Iterator[tuple[object, ...]]:
    """Candidates for x1 y1 x2 y2 in what stands under a box key, in order."""
    match value:
        case str():
            yield from (match.groups() for match in _FOUR_NUMBERS.finditer(value))
        case {"x1": x1, "y1": y1, "x2": x2, "y2": y2}:
            yield (x1, y1, x2, y2)
        case [[x1, y1], [x2, y2]]:
            yield (x1, y1, x2, y2)
        case [list() | dict(), *_]:
            for entry in value:
                match entry:
                    case [x1, y1, x2, y2]:
                        yield (x1, y1, x2, y2)
                    case {"x1": x1, "y1": y1, "x2": x2, "y2": y2}:
                        yield (x1, y1, x2, y2)
        case [x1, y1, x2, y2]:
            yield (x1, y1, x2, y2)


def _twos(value: object) -> Iterator[tuple[object, ...]]:
    """Candidates for x y in what stands under a point key, in order."""
    for entry in value if isinstance(value, list) and value and isinstance(value[0], list | dict) else [value]:
        match entry:
            case [x, y] | {"x": x, "y": y}:
                yield (x, y)


def _to_number(value: object) -> float | None:
    """A finite number, or a string that holds one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _to_box(four: tuple[object, ...], frame: _Frame) -> Box | None:
    numbers = [number for value in four if (number := _to_number(value)) is not None]
    if len(numbers) != 4:
        return None
    (scale_x, scale_y), (width, height) = frame.scale_xy, frame.size_wh
    x1, x2 = (min(max(number * scale_x, 0.0), width) for number in numbers[::2])
    y1, y2 = (min(max(number * scale_y, 0.0), height) for number in numbers[1::2])
    return (x1, y1, x2, y2) if x2 - x1 >= MIN_SIDE_PX and y2 - y1 >= MIN_SIDE_PX else None


def _to_point(two: tuple[object, ...], frame: _Frame) -> Point | None:
    """A point is used only where it lies in the image: unlike a box it has no part that could."""
    x, y = (_to_number(value) for value in two)
    if x is None or y is None:
        return None
    x, y = x * frame.scale_xy[0], y * frame.scale_xy[1]
    return (x, y) if 0.0 <= x <= frame.size_wh[0] and 0.0 <= y <= frame.size_wh[1] else None


def _to_score(value: object) -> float | None:
    """A confidence in [0, 1]; percentages ("80%", 80) are understood."""
    if isinstance(value, str) and value.strip().endswith("%"):
        percent = _to_number(value.strip()[:-1])
        score = None if percent is None else percent / 100.0
    else:
        score = _to_number(value)
        score = score / 100.0 if score is not None and score > 1.0 else score
    return score if score is not None and 0.0 <= score <= 1.0 else None


def _with_anchor(relation: str, anchor: str) -> str:
    """Many models name the anchor within the relation as well; then it is not repeated."""
    return relation if anchor.lower() in relation.lower() else f"{relation} {anchor}".strip()


def _to_words(value: object) -> str:
    return " ".join(clean_text(value).split()) if isinstance(value, str) else ""


def _pair(values: list[float]) -> Point:
    return values[0], values[1]
