"""What every prior backend is asked and gives back, whatever model or file stands behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from l2l_core.priors.coords import CoordSpace


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
    prompt_tokens: int = 0  # 0 where the backend has none, as the latency
    completion_tokens: int = 0
    latency_ms: float = 0.0


class PriorBackend(Protocol):
    """A source of priors. An answer depends on its question (and the seed) alone, not on what else is asked."""

    name: str

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer a batch, one answer a question, in the same order; a failed request is an answer with `error`."""
        ...
