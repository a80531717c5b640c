"""Recorded responses of any system: texts, boxes or masks, read from JSON lines; docs/priors.md has the format."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from l2l_core.config import CoordSpace
from l2l_core.core.json_lines import json_object, numbered_lines
from l2l_core.core.mask_forms import MASK_FORMS, mask_paths, read_mask
from l2l_core.core.masks import rle_area_px
from l2l_core.core.progress import progress
from l2l_core.errors import ConfigError, InputError, raise_all, short_repr
from l2l_core.mllm.backend import Question, RawResponse
from l2l_core.mllm.coords import COORD_SPACES, resolve_coord_space, scale_of

MAX_SAMPLES = 16  # the maximum of priors.samples
Key = tuple[int, int]  # sent_id, sample_index


@dataclass(frozen=True)
class _Sentences:
    """Lookup tables that match a recorded line to its sentence."""

    image: dict[int, tuple[int, int, int]]  # sent_id -> image_id, height, width
    of_ref: dict[int, list[tuple[int, str]]]  # ref_id -> its sent_ids in ascending order, each with its text
    words: dict[int, str]  # sent_id -> its text


class ReplayBackend:
    """Returns recorded responses; a sentence without a record has no prior (`empty`)."""

    def __init__(self, responses: dict[Key, RawResponse], name: str = "replay") -> None:
        self.name = name
        self._responses = responses

    def query(self, questions: Sequence[Question]) -> list[RawResponse]:
        """The recorded response of each question."""
        return [
            self._responses.get((question.sent_id, question.sample_index))
            or RawResponse("", model="", coord_space="pixel", input_hw=question.image_hw, failure="empty")
            for question in questions
        ]


def load_recorded(
    path: str | Path, refs: pd.DataFrame, images: pd.DataFrame, coord_space: str
) -> dict[Key, RawResponse]:
    """Read recorded responses and match each to its sentence.

    refs: sent_id, ref_id, image_id, sentence. images: image_id, height, width. coord_space: as configured; applies to
    lines that do not name their own. Mask files are relative to the file's folder. Lines about sentences and refs
    outside the dataset are skipped.
    Raises InputError that lists every bad line, or if no line belongs to the dataset.
    """
    path = Path(path)
    sentences = _index_sentences(refs, images)
    responses: dict[Key, RawResponse] = {}
    line_of: dict[Key, int] = {}
    problems: list[str] = []
    for line_number, line in progress(_lines(path), "recorded responses", "line"):
        try:
            row = json_object(line)
            sent_id = _find_sentence(row, sentences)
            if sent_id is None:
                continue
            key = (sent_id, _integer(row, "sample_index", 0, MAX_SAMPLES - 1, default=0))
            if key in responses:
                raise ValueError(
                    f"a second response for sent_id {sent_id}, the first is in line {line_of[key]}; keep one"
                )
            responses[key] = _to_response(row, sentences.image[sent_id], coord_space, path.parent)
            line_of[key] = line_number
        except (ValueError, ConfigError) as error:
            problems.append(f"{path}: line {line_number}: {error}")
    raise_all(problems)
    if not responses:
        raise InputError(f"{path}: no response belongs to a sentence of the dataset; check sent_id and ref_id")
    return responses


def mask_files(path: str | Path) -> list[Path]:
    """The existing mask files that a file of recorded responses names; broken lines are skipped.

    Raises InputError if the file cannot be read.
    """
    found: list[Path] = []
    for _, line in _lines(Path(path)):
        with suppress(ValueError):
            found += mask_paths(json_object(line).get("mask"), Path(path).parent)
    return [file for file in dict.fromkeys(found) if os.path.isfile(file)]  # Path.is_file raises for impossible names


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        return numbered_lines(path)
    except FileNotFoundError:
        raise InputError(f"{path}: not found; set priors.replay_file to a JSON-lines file") from None


def _index_sentences(refs: pd.DataFrame, images: pd.DataFrame) -> _Sentences:
    known = refs.merge(images, on="image_id").sort_values("sent_id")
    image: dict[int, tuple[int, int, int]] = {}
    of_ref: dict[int, list[tuple[int, str]]] = {}
    columns = ("sent_id", "ref_id", "image_id", "height", "width", "sentence")
    for sent_id, ref_id, image_id, height, width, sentence in zip(
        *(known[name].tolist() for name in columns), strict=True
    ):
        image[sent_id] = (image_id, height, width)
        of_ref.setdefault(ref_id, []).append((sent_id, _words(sentence)))
    words = {sent_id: said for named in of_ref.values() for sent_id, said in named}
    return _Sentences(image, of_ref, words)


def _find_sentence(row: dict[str, object], sentences: _Sentences) -> int | None:
    """The sent_id of a line; for a ref_id, the sentence with the same words, else the ref's first one."""
    if "sent_id" in row:
        sent_id = _integer(row, "sent_id")
        if sent_id not in sentences.image:
            return None
        own = sentences.words[sent_id]
        if "expression" in row and _words(_expression(row)) != own:
            raise ValueError(
                f"expression: got {short_repr(row['expression'])}, but sentence {sent_id} of the dataset is {own!r}; "
                "the responses seem to belong to another dataset"
            )
        return sent_id
    if "ref_id" not in row:
        raise ValueError("sent_id: missing; give sent_id, or ref_id and expression")
    candidates = sentences.of_ref.get(_integer(row, "ref_id"))
    if not candidates:
        return None
    wanted = _words(_expression(row))
    sent_id = next((sent_id for sent_id, words in candidates if words == wanted), candidates[0][0])
    image_id = sentences.image[sent_id][0]
    if "image_id" in row and _integer(row, "image_id") != image_id:
        raise ValueError(
            f"image_id: got {short_repr(row['image_id'])}, but ref {row['ref_id']} of the dataset is in image "
            f"{image_id}; the responses seem to belong to another dataset"
        )
    return sent_id


def _expression(row: dict[str, object]) -> str:
    expression = row.get("expression", "")
    if not isinstance(expression, str):
        raise ValueError(f"expression: got {short_repr(expression)}, expected a string")
    return expression


def _to_response(row: dict[str, object], image: tuple[int, int, int], configured: str, folder: Path) -> RawResponse:
    _, height, width = image
    model = row.get("model", "")
    if not isinstance(model, str):
        raise ValueError(f"model: got {short_repr(model)}, expected a string")
    for key, own in (("height", height), ("width", width)):
        if key in row and _integer(row, key, 1) != own:
            raise ValueError(
                f"{key}: got {short_repr(row[key])}, but the image of the dataset has {own}; the picture is another one"
            )
    mask = _mask(row.get("mask"), folder, height, width)
    found: dict[str, object] = {} if mask is None else {"found": True}
    failure: Literal["empty"] | None = None
    if "raw_text" in row:
        raw_text = row["raw_text"]
        if not isinstance(raw_text, str):
            raise ValueError(f"raw_text: got {short_repr(raw_text)}, expected a string")
        if "score" in row:
            raise ValueError("score: got one beside raw_text; give it in raw_text, under the key confidence")
        default = configured
    elif "pred_box_xyxy" in row:
        raw_text = _written(_box(row["pred_box_xyxy"]) or found, _score(row))
        default = "pixel" if configured == "auto" else configured
    elif "mask" in row:
        raw_text = _written(found, _score(row))
        failure = "empty" if mask is None else None
        default = "pixel"
    else:
        raise ValueError(
            "raw_text: missing; give raw_text, pred_box_xyxy (null where the model gave no box), or mask (null where "
            "it found nothing)"
        )
    said = row.get("coord_space", default)
    if said not in (*COORD_SPACES, "auto"):
        raise ValueError(f"coord_space: got {short_repr(said)}, expected one of {'|'.join(COORD_SPACES)}")
    if not model and said == "auto":
        raise ValueError(
            f"coord_space: missing, and no model tells it; give it, or priors.coord_space: {'|'.join(COORD_SPACES)}"
        )
    space: CoordSpace = resolve_coord_space(model, str(said))
    needs_size = scale_of(space) == "resized_pixel"
    if needs_size and not {"input_height", "input_width"} <= row.keys():
        raise ValueError(f"input_height, input_width: missing; {space} needs the size of the image as the model saw it")
    input_hw = (_integer(row, "input_height", 1, default=height), _integer(row, "input_width", 1, default=width))
    return RawResponse(raw_text, model=model, coord_space=space, input_hw=input_hw, failure=failure, mask=mask)


def _mask(mask: object, folder: Path, height: int, width: int) -> bytes | None:
    """The mask of a line as run lengths; None without a mask, and for one without a part or a pixel: nothing found."""
    if mask in (None, [], {"polygon": []}):
        return None
    if not isinstance(mask, str | list | dict):
        raise ValueError(f"mask: got {short_repr(mask)}, expected {MASK_FORMS}")
    try:
        counts = read_mask(mask, folder, height, width)
    except ValueError as error:
        raise ValueError(f"mask: {error}") from None
    return counts if rle_area_px(counts, height, width) else None


def _written(place: dict[str, object], score: dict[str, object]) -> str:
    """A recorded place and its score as the text of a response; without a place, a text that cannot be parsed."""
    return json.dumps(place | score) if place else ""


def _box(box: object) -> dict[str, object]:
    """A recorded box; a missing box becomes an unparsable response, as in the original recordings."""
    if box is None:
        return {}
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise ValueError(f"pred_box_xyxy: got {short_repr(box)}, expected four finite numbers or null")
    return {"bbox": box}


def _score(row: dict[str, object]) -> dict[str, object]:
    """The confidence of a line, if it has one."""
    score = row.get("score")
    if score is None:
        return {}
    if not isinstance(score, int | float) or isinstance(score, bool) or not 0 <= score <= 1:
        raise ValueError(f"score: got {short_repr(score)}, expected a number from 0 to 1")
    return {"confidence": score}


def _is_number(value: object) -> bool:
    """Whether a value is a finite number; an integer beyond the range of float is not."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _integer(
    row: dict[str, object], key: str, low: int = -(2**63), high: int = 2**63 - 1, default: int | None = None
) -> int:
    value = row.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        limits = f" from {low} to {high}" if is_whole or low > -(2**63) else ""
        raise ValueError(f"{key}: got {short_repr(value)}, expected an integer{limits}")
    return value


def _words(text: str) -> str:
    """A sentence without case and punctuation, which vary between sources."""
    return " ".join(re.findall(r"\w+", text.casefold()))
