"""What the multimodal LLM is asked, and the JSON that it should answer with."""

from __future__ import annotations

import hashlib
import json

from l2l_core.priors.coords import CoordSpace

PROMPT_VERSION = 1
"""Raise it with every change of meaning; the prompt's sha256 is recorded beside every answer."""

_TEMPLATE = """Find the one object in the image that this expression refers to: "{sentence}"
Answer with one JSON object and nothing else, with these keys:
"found": true or false; false if no object fits.
"target": the object's kind, as one noun.
"attributes": list of the object's own properties that the expression names, such as its colour or size.
"relation": the expression's words on where it is or how it relates to others, or "".
"bbox": the object's bounding box as [x1, y1, x2, y2], {coordinates}; null if not found.
"confidence": how sure you are that this is the object, from 0 to 1."""

_COORDINATES: dict[CoordSpace, str] = {
    "pixel": "in pixels of the image",
    "resized_pixel": "in pixels of the image",
    "norm1000": "as numbers from 0 to 1000 relative to the image's width and height",
    "percent": "in percent of the image's width and height",
    "unit": "as fractions from 0 to 1 of the image's width and height",
}

# Bounds keep constrained decoding from endless numbers, strings and lists. No model sees images of this many pixels.
_LARGEST: dict[CoordSpace, int] = {
    "pixel": 16384,
    "resized_pixel": 16384,
    "norm1000": 1000,
    "percent": 100,
    "unit": 1,
}
_MAX_WORD_CHARS, _MAX_RELATION_CHARS, _MAX_ATTRIBUTES = 64, 160, 8


def prompt_text(sentence: str, coord_space: CoordSpace) -> str:
    """The question about one sentence, to follow the image."""
    return _TEMPLATE.format(sentence=sentence, coordinates=_COORDINATES[coord_space])


def answer_schema(coord_space: CoordSpace) -> dict[str, object]:
    """JSON schema of the answer, for backends that can enforce one."""
    number = {"type": "number", "minimum": 0, "maximum": _LARGEST[coord_space]}
    word = {"type": "string", "maxLength": _MAX_WORD_CHARS}
    properties = {
        "found": {"type": "boolean"},
        "target": word,
        "attributes": {"type": "array", "items": word, "maxItems": _MAX_ATTRIBUTES},
        "relation": {"type": "string", "maxLength": _MAX_RELATION_CHARS},
        "bbox": {"anyOf": [{"type": "array", "items": number, "minItems": 4, "maxItems": 4}, {"type": "null"}]},
        "confidence": {"type": "number", "minimum": 0, "maximum": 1},
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def prompt_sha256(coord_space: CoordSpace) -> str:
    """Fingerprint of everything that a model is asked beside the image and the sentence."""
    asked = [PROMPT_VERSION, prompt_text("", coord_space), answer_schema(coord_space)]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
