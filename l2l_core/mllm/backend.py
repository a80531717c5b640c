"""Queries to a prior backend and its responses, the same for every model or file behind it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from l2l_core.config import CoordSpace
from l2l_core.errors import L2LError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Question:
    """One sentence about one image; `sample_index` counts the repeated queries of that sentence."""

    sent_id: int
    sample_index: int
    image_path: str  # relative to the project's root
    image_hw: tuple[int, int]  # original height, width in pixels
    sentence: str


@dataclass(frozen=True, slots=True)
class RawResponse:
    """A raw response of the multimodal LLM, or of another system in its place, before parsing."""

    raw_text: str
    model: str
    coord_space: CoordSpace  # coordinate space of `raw_text`
    input_hw: tuple[int, int]  # height, width of the image as the model saw it
    prompt_sha256: str = ""  # "": unknown
    failure: Literal["empty", "error"] | None = None  # the status if there is no text to parse
    reason: str = ""  # for errors: the exception type or the server's status
    attempts: int = 1  # number of queries; more than one if a response did not follow the prompt
    is_valid: bool = True  # the last response follows the prompt
    prompt_tokens: int = 0  # of all attempts; 0 if the backend does not report it
    completion_tokens: int = 0
    precision: Literal["bf16", "fp32"] | None = None  # precision of the model; None: unknown
    mask: bytes | None = None  # COCO compressed run lengths at the image's own size; not empty


_DRAFT_TAG = re.compile(
    r"(?P<opens><(?:seed:)?(?:think|thinking|thought|reasoning|reflection|scratchpad)>|◁think▷|\[THINK\]"
    r"|<\|begin_of_thought\|>|<\|channel\|?>(?:thought|analysis|commentary)\b)"
    r"|</(?:seed:)?(?:think|thinking|thought|reasoning|reflection|scratchpad)>|◁/think▷|\[/THINK\]"
    r"|<\|end_of_thought\|>|<channel\|>|<\|channel\|>final\b",
    re.IGNORECASE,
)
"""Tags around the reasoning of models. Each alternative occurs in a published chat template: Kimi writes ◁think▷,
Magistral [THINK], Seed-OSS <seed:think>, Gemma 4 <|channel>thought, and gpt-oss <|channel|>analysis."""
_ANSWER_TAG = re.compile(r"<(?:(?P<ends>/)?answer|\|(?:begin|(?P<closes>end))_of_box\|)>", re.IGNORECASE)
"""GLM-V writes its answer between <|begin_of_box|> and <|end_of_box|>."""


class PriorBackend(Protocol):
    """A source of priors. A response depends only on its question and the seed, not on the rest of the batch."""

    name: str

    def query(self, questions: Sequence[Question]) -> list[RawResponse]:
        """Return one response per question, in the same order. A failed request yields a response with `error`.

        Raises L2LError if no query is possible at all, such as for a missing model or server.
        """
        ...


def isolate_failures(
    run: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item], failed: Callable[[str], Result]
) -> list[Result]:
    """Run a batch -> one result per item. A failing batch is split in half until the failing items are isolated.

    failed: the result of a failing item, given the exception's type. Messages contain addresses and times, which differ
    from run to run. An L2LError passes: it means that no item can succeed.
    """
    if not items:
        return []
    try:
        return run(items)
    except L2LError:
        raise
    except Exception as error:  # whatever a model's library raises
        if len(items) == 1:
            return [failed(type(error).__name__)]
    middle = len(items) // 2
    return isolate_failures(run, items[:middle], failed) + isolate_failures(run, items[middle:], failed)


def clean_text(text: str) -> str:
    """Replace what UTF-8 cannot encode (lone surrogates), so that the text can be stored."""
    return text.encode("utf-8", "replace").decode("utf-8")


def final_text(raw_text: str) -> str:
    """The final response of a model: no draft in <think> tags, and if there is an <answer> tag, only its last content.

    Other models' tags with these meanings count too.

    A closed draft ends at its last closing tag, even if the chat template opened it. An unclosed draft extends to
    the end of the text. Time is linear in the length of the text.
    """
    start, end, is_draft = 0, len(raw_text), False
    for tag in _DRAFT_TAG.finditer(raw_text):
        if not tag["opens"]:
            start, end, is_draft = tag.end(), len(raw_text), False
        elif not is_draft:
            end, is_draft = tag.start(), True
    text = raw_text[start:end]
    final, opened = text, None
    for tag in _ANSWER_TAG.finditer(text):
        if not (tag["ends"] or tag["closes"]):
            opened = tag.end()
        elif opened is not None:
            final, opened = text[opened : tag.start()], None
    return text[opened:] if opened is not None and final is text else final
