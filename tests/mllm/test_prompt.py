"""Prompts: texts, schema bounds, fingerprints, and which responses conform to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from prior_tables import BOX_2

from l2l_core.config import CoordSpace
from l2l_core.mllm.coords import COORD_SPACES
from l2l_core.mllm.prompt import PromptName, keeps_to, prompt_sha256, prompt_text, response_schema

NAMES: tuple[PromptName, ...] = get_args(PromptName)


@pytest.mark.parametrize("name", NAMES)
def test_prompt_contains_the_sentence_range_and_schema_keys(name: PromptName) -> None:
    text = prompt_text(name, 'the {red} "cup"', "norm1000")
    assert 'the {red} "cup"' in text
    assert "from 0 to 1000" in text
    properties = response_schema(name, "unit")["properties"]
    assert isinstance(properties, dict)
    assert all(f'"{key}"' in text for key in properties)


@pytest.mark.parametrize("name", ["box-2", "point-1"])
def test_prompts_differ_only_in_the_trailing_sentence(name: PromptName) -> None:
    """Engines cache the longest common prefix."""
    one, other = prompt_text(name, "cup", "unit"), prompt_text(name, "a dog", "unit")
    assert one.removesuffix('cup"') == other.removesuffix('a dog"') != one


def leaves(schema: Any) -> Iterator[dict[str, Any]]:
    """Yields every value schema within a schema."""
    yield schema
    for inner in [*schema.get("properties", {}).values(), *schema.get("anyOf", []), schema.get("items")]:
        if inner is not None:
            yield from leaves(inner)


@pytest.mark.parametrize("space", COORD_SPACES)
@pytest.mark.parametrize("name", NAMES)
def test_every_schema_value_is_bounded(name: PromptName, space: CoordSpace) -> None:
    """Constrained decoding may never stop in an unbounded value; xgrammar does not support `multipleOf`."""
    bounds = {
        "string": {"maxLength"},
        "array": {"maxItems"},
        "number": {"minimum", "maximum"},
        "integer": {"minimum", "maximum"},
        "object": {"required"},
    }
    for leaf in leaves(response_schema(name, space)):
        assert bounds.get(leaf.get("type", ""), set()) <= leaf.keys()
        assert "multipleOf" not in leaf


@pytest.mark.parametrize(
    ("space", "kind", "largest"),
    [("resized_pixel", "integer", 16384), ("norm1000", "integer", 1000), ("percent", "number", 100)],
)
def test_schema_bounds_coordinates_by_coordinate_space(space: CoordSpace, kind: str, largest: int) -> None:
    schema: Any = response_schema("box-2", space)
    assert schema["properties"]["boxes"]["items"]["items"] == {"type": kind, "minimum": 0, "maximum": largest}


def test_a_published_prompt_never_changes() -> None:
    """Recorded responses identify their prompt by this hash. To change a prompt, add one with a higher number."""
    known = {
        "box-1": "30624d",
        "box-2": "f76e64",
        "point-1": "84f61e",
    }
    assert {name: prompt_sha256(name, "norm1000")[:6] for name in NAMES} == known


def test_fingerprint_changes_with_prompt_and_coordinate_space() -> None:
    fingerprints = {prompt_sha256(name, space) for name in NAMES for space in ("pixel", "norm1000", "percent", "unit")}
    assert len(fingerprints) == 12
    assert all(len(fingerprint) == 64 for fingerprint in fingerprints)
    # One of them, computed by hand.
    query = [2, prompt_text("box-2", "", "unit"), response_schema("box-2", "unit")]
    wanted = hashlib.sha256(json.dumps(query, sort_keys=True).encode()).hexdigest()
    assert prompt_sha256("box-2", "unit") == wanted


BOX_1 = {key: value for key, value in BOX_2.items() if key not in ("anchor", "boxes", "point")} | {"bbox": [1, 2, 3, 4]}
POINT_1 = {key: value for key, value in BOX_2.items() if key != "boxes"} | {"point": [1, 2]}


@pytest.mark.parametrize(
    ("name", "response"),
    [
        ("box-2", BOX_2),
        ("box-2", BOX_2 | {"boxes": [[3, 2, 1, 4], [1, 2, 3, 4]]}),  # one of them is valid
        ("box-2", BOX_2 | {"found": False, "boxes": []}),
        ("box-1", BOX_1),
        ("box-1", BOX_1 | {"found": False, "bbox": None}),
        ("point-1", POINT_1),
    ],
)
def test_keeps_to_accepts_valid_responses(name: PromptName, response: dict[str, object]) -> None:
    assert keeps_to(name, json.dumps(response))
    assert keeps_to(name, f"Here it is:\n```json\n{json.dumps(response, indent=1)}\n```")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("box-2", ""),
        ("box-2", "no idea"),
        ("box-2", "[1, 2, 3, 4]"),
        ("box-2", "{" * 5000),
        ("box-2", json.dumps(BOX_2)[:-2]),  # cut short
        ("box-2", json.dumps(BOX_1)),  # the keys of another prompt
        ("box-2", json.dumps(BOX_2 | {"boxes": []})),
        ("box-2", json.dumps(BOX_2 | {"boxes": {"x": 1}})),
        ("box-2", json.dumps(BOX_2 | {"boxes": [[3, 2, 1, 4]]})),  # inverted
        ("box-2", json.dumps(BOX_2 | {"boxes": [[1, 2, 3]]})),
        ("box-2", json.dumps(BOX_2 | {"boxes": [["1", 2, 3, 4]]})),
        ("box-2", json.dumps(BOX_2 | {"boxes": [[1, 2, float("nan"), 4]]})),
        ("box-1", json.dumps(BOX_1 | {"bbox": None})),
        ("point-1", json.dumps(POINT_1 | {"point": None})),
        ("point-1", json.dumps(POINT_1 | {"point": [1]})),
    ],
)
def test_keeps_to_rejects_invalid_responses(name: PromptName, text: str) -> None:
    assert not keeps_to(name, text)
