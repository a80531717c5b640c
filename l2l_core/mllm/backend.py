"""What every prior backend is asked and gives back, whatever model or file stands behind it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from l2l_core.mllm.coords import CoordSpace


@dataclass(frozen=True, slots=True)
class Question:
    """One sentence about one image; `sample_index` counts the times that it is asked."""

    sent_id: int
    sample_index: int
    image_path: str  # relative to the project's root
    image_hw: tuple[int, int]  # original height, width in pixels
    sentence: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, unparsed."""

    raw_text: str
    model: str
    coord_space: CoordSpace  # in which `raw_text` is written
    input_hw: tuple[int, int]  # height, width of the image as the model saw it
    prompt_sha256: str = ""  # "": not known
    unread: Literal["empty", "error"] | None = None  # status where there is no text to parse
    reason: str = ""  # of an error: the kind of exception or the server's status
    attempts: int = 1  # times asked; more than one where an answer did not keep to the prompt
    is_valid: bool = True  # the last answer kept to the prompt
    prompt_tokens: int = 0  # of all attempts; 0 where the backend has none
    completion_tokens: int = 0
    precision: Literal["bf16", "fp32"] | None = None  # in which the model was computed; None: not known


_DRAFT_TAG = re.compile(
    r"<(?P<closes>/?)(?:think|thinking|thought|reasoning|reflection|scratchpad)>|◁(?P<ends>/?)think▷", re.IGNORECASE
)
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)


class PriorBackend(Protocol):
    """A source of priors. An answer depends on its question (and the seed) alone, not on what else is asked."""

    name: str

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer a batch, one answer a question, in the same order; a failed request is an answer with `error`.

        Raises L2LError where nothing can be asked at all: no such model, no server.
        """
        ...


def clean_text(text: str) -> str:
    """The same text, with what UTF-8 cannot hold (lone surrogates) replaced, so that it can be stored."""
    return text.encode("utf-8", "replace").decode("utf-8")


def final_text(raw_text: str) -> str:
    """What a model means as its answer: no draft in <think> tags, and of that what stands in the last <answer>.

    A draft that is closed ends where its last tag closes, also where a chat template has opened it. A draft that is
    never closed is all draft from its opening on. The time is linear in the text's length.
    """
    start, end, is_draft = 0, len(raw_text), False
    for tag in _DRAFT_TAG.finditer(raw_text):
        if tag["closes"] or tag["ends"]:
            start, end, is_draft = tag.end(), len(raw_text), False
        elif not is_draft:
            end, is_draft = tag.start(), True
    text = raw_text[start:end]
    answer, opened = text, None
    for tag in _ANSWER_TAG.finditer(text):
        if not tag[1]:
            opened = tag.end()
        elif opened is not None:
            answer, opened = text[opened : tag.start()], None
    return text[opened:] if opened is not None and answer is text else answer
