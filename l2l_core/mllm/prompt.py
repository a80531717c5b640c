"""Prompts for the multimodal LLM and the JSON format of its response: one versioned prompt per purpose."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from l2l_core.config import CoordScale, CoordSpace
from l2l_core.mllm.backend import final_text
from l2l_core.mllm.coords import is_y_first, scale_of

PromptName = Literal["box-1", "box-2", "point-1"]
Schema = dict[str, object]

_SENTENCE_FIRST = """Find the one object in the image that this expression refers to: "{sentence}"
Answer with one JSON object and nothing else, with these keys:
{keys}"""
# The sentence comes last: everything before it, image included, is the same for all sentences of an image, and
# engines that cache prefixes compute it once.
_SENTENCE_LAST = """An expression refers to one object in the image. Find that object.
Answer with one JSON object and nothing else, with these keys:
{keys}
The expression: "{sentence}\""""

_COORDINATES: dict[CoordScale, str] = {
    "pixel": "in pixels of the image",
    "resized_pixel": "in pixels of the image",
    "norm1000": "as numbers from 0 to 1000 relative to the image's width and height",
    "norm999": "as numbers from 0 to 999 relative to the image's width and height",
    "norm1024": "as numbers from 0 to 1024 relative to the image's width and height",
    "percent": "in percent of the image's width and height",
    "unit": "as fractions from 0 to 1 of the image's width and height",
    "unit_square": "as fractions from 0 to 1 of the image's width and height",  # the model sees only the square
}

# Bounds keep constrained decoding from endless numbers, strings and lists. No model sees images of this many pixels.
_LARGEST: dict[CoordScale, int] = {
    "pixel": 16384,
    "resized_pixel": 16384,
    "norm1000": 1000,
    "norm999": 999,
    "norm1024": 1024,
    "percent": 100,
    "unit": 1,
    "unit_square": 1,
}
_MAX_WORD_CHARS, _MAX_RELATION_CHARS, _MAX_ATTRIBUTES, _MAX_BOXES = 64, 160, 8, 4

_WORD: Schema = {"type": "string", "maxLength": _MAX_WORD_CHARS}
_WORDS: Schema = {"type": "array", "items": _WORD, "maxItems": _MAX_ATTRIBUTES}
_PHRASE: Schema = {"type": "string", "maxLength": _MAX_RELATION_CHARS}
_SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}


def _number(space: CoordSpace) -> Schema:
    return {"type": "number", "minimum": 0, "maximum": _LARGEST[scale_of(space)]}


def _coordinate(space: CoordSpace) -> Schema:
    """Whole numbers if models write them in this space: fewer tokens, and no endless decimals."""
    takes_fractions = scale_of(space) in ("percent", "unit", "unit_square")
    return _number(space) if takes_fractions else {**_number(space), "type": "integer"}


def _exactly(count: int, item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": count, "maxItems": count}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


@dataclass(frozen=True)
class _Key:
    """One key of the response: its description in the prompt, and its allowed values."""

    meaning: str
    schema: Callable[[CoordSpace], Schema]


_FOUND = _Key("true or false; false if no object fits.", lambda _: {"type": "boolean"})
_ATTRIBUTES = _Key(
    "list of the object's own properties that the expression names, such as its colour or size.", lambda _: _WORDS
)
_CONFIDENCE = _Key("how sure you are that this is the object, from 0 to 1.", lambda _: _SHARE)
_SEMANTICS = {
    "found": _FOUND,
    "target": _Key("the words that name the object itself, as a short noun phrase.", lambda _: _WORD),
    "attributes": _ATTRIBUTES,
    "relation": _Key(
        'the expression\'s words on how the object relates to another thing or to the image, such as "left of", or "".',
        lambda _: _PHRASE,
    ),
    "anchor": _Key('the other thing that the relation refers to, or "".', lambda _: _WORD),
}
_POINT = _Key(
    "a point on the object as {point}, {coordinates}; null if not found.",
    lambda space: _or_null(_exactly(2, _coordinate(space))),
)


@dataclass(frozen=True)
class _Prompt:
    template: str
    keys: dict[str, _Key]


# A prompt never changes; a new version gets a higher number. Recorded responses identify their prompt by its sha256.
_PROMPTS: dict[PromptName, _Prompt] = {
    "box-1": _Prompt(  # the format of `simulated`
        _SENTENCE_FIRST,
        {
            "found": _FOUND,
            "target": _Key("the object's kind, as one noun.", lambda _: _WORD),
            "attributes": _ATTRIBUTES,
            "relation": _Key(
                'the expression\'s words on where it is or how it relates to others, or "".', lambda _: _PHRASE
            ),
            "bbox": _Key(
                "the object's bounding box as {corners}, {coordinates}; null if not found.",
                lambda space: _or_null(_exactly(4, _number(space))),
            ),
            "confidence": _CONFIDENCE,
        },
    ),
    "box-2": _Prompt(
        _SENTENCE_LAST,
        {
            **_SEMANTICS,  # text first: the model writes its box after, and conditioned on, the description
            "boxes": _Key(
                "list of bounding boxes as {corners}, {coordinates}: one, or if you cannot decide between "
                "objects theirs with the most likely first; [] if not found.",
                lambda space: {"type": "array", "items": _exactly(4, _coordinate(space)), "maxItems": _MAX_BOXES},
            ),
            "point": _POINT,
            "confidence": _CONFIDENCE,
        },
    ),
    # For models that point instead of drawing boxes.
    "point-1": _Prompt(_SENTENCE_LAST, {**_SEMANTICS, "point": _POINT, "confidence": _CONFIDENCE}),
}


def prompt_text(name: PromptName, sentence: str, coord_space: CoordSpace) -> str:
    """The question about one sentence, placed after the image."""
    prompt = _PROMPTS[name]
    lines = [f'"{key}": {entry.meaning}' for key, entry in prompt.keys.items()]
    corners, point = ("[y1, x1, y2, x2]", "[y, x]") if is_y_first(coord_space) else ("[x1, y1, x2, y2]", "[x, y]")
    keys = "\n".join(lines).format(coordinates=_COORDINATES[scale_of(coord_space)], corners=corners, point=point)
    return prompt.template.format(sentence=sentence, keys=keys)


def response_schema(name: PromptName, coord_space: CoordSpace) -> Schema:
    """JSON schema of the response, for backends that can enforce one. Everything in it is bounded."""
    properties = {key: entry.schema(coord_space) for key, entry in _PROMPTS[name].keys.items()}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def prompt_sha256(name: PromptName, coord_space: CoordSpace) -> str:
    """Hash of the whole query except for the image and the sentence."""
    query = [int(name.rpartition("-")[2]), prompt_text(name, "", coord_space), response_schema(name, coord_space)]
    return hashlib.sha256(json.dumps(query, sort_keys=True).encode()).hexdigest()


def keeps_to(name: PromptName, raw_text: str) -> bool:
    """Whether a response is acceptable: a JSON object (also within prose) with all of the prompt's keys that names a
    place or says that nothing is found. Draft text does not count. Other responses are retried.

    Separate from the parser, which accepts much more: the parser may change without new queries.
    """
    text = final_text(raw_text)
    try:
        response, _ = json.JSONDecoder().raw_decode(text, max(text.find("{"), 0))
    except (ValueError, RecursionError):
        return False
    if not isinstance(response, dict) or not _PROMPTS[name].keys.keys() <= response.keys():
        return False
    if response["found"] is False:
        return True
    if name == "point-1":
        return _numbers(response["point"], 2) is not None
    boxes = response.get("boxes", [response.get("bbox")])
    return isinstance(boxes, list) and any(_is_box(box) for box in boxes)


def _is_box(value: object) -> bool:
    edges = _numbers(value, 4)
    return edges is not None and bool(edges[0] < edges[2] and edges[1] < edges[3])


def _numbers(value: object, count: int) -> list[float] | None:
    """A list of exactly `count` numbers."""
    if not isinstance(value, list) or len(value) != count:
        return None
    return value if all(isinstance(item, int | float) for item in value) else None
