"""Query a real multimodal LLM: build requests, retry responses that do not follow the prompt, and isolate and mark the
requests that make an engine fail.

The models are behind `Engine`: engine_transformers.py, engine_openai.py and engine_vllm.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from PIL import Image, ImageOps

from l2l_core.config import PriorsParams
from l2l_core.mllm.backend import Question, RawResponse, isolate_failures
from l2l_core.mllm.coords import resolve_coord_space, scale_of, sent_hw
from l2l_core.mllm.image_backend import ImageBackend
from l2l_core.mllm.prompt import Schema, keeps_to, prompt_sha256, prompt_text, response_schema

BORDER_RGB = (122, 116, 104)
"""Border of an image padded to a square: CLIP's mean color, which the network sees as 0, as in LLaVA-1.5's training."""


@dataclass(frozen=True, slots=True)
class Request:
    """One question in the model's form: the image comes first, so that all its sentences share its computed tokens."""

    image: Image.Image  # RGB
    text: str
    schema: Schema | None  # of the response; None: free text
    temperature: float  # 0: greedy
    seed: int  # of sampling, in 0..2**31 - 1
    max_tokens: int  # of the response


@dataclass(frozen=True, slots=True)
class Completion:
    """The model's output for one request."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failure: str = ""  # a short reason; "": no failure


class Engine(Protocol):
    """A model that can be queried. The output for a request depends on that request alone."""

    @property
    def precision(self) -> Literal["bf16", "fp32"] | None:
        """Precision of the model; None if the engine does not know it."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order.

        Raises L2LError if no request can ever succeed; any other exception means that at least one request failed.
        """
        ...


class MllmBackend(ImageBackend):
    """Queries a model about every question with the prompt `priors.prompt`.

    Raises ConfigError if the model's family is unknown and `priors.coord_space` is not set.
    """

    def __init__(self, engine: Engine, params: PriorsParams) -> None:
        super().__init__(params.backend)
        self._engine = engine
        self._precision = engine.precision
        self._params = params
        self._model = str(params.model)
        self._space = resolve_coord_space(self._model, params.coord_space)
        self._schema = response_schema(params.prompt, self._space) if params.is_structured else None
        self._sha256 = prompt_sha256(params.prompt, self._space)

    def _query(self, questions: Sequence[Question], images: Sequence[Image.Image | str]) -> list[RawResponse]:
        responses = [self._empty_response(question) for question in questions]
        waiting = []
        for row, image in enumerate(images):
            if isinstance(image, str):
                responses[row] = replace(responses[row], failure="error", reason=image)
            else:
                waiting.append((row, image))
        for attempt in range(1 + self._params.retries):
            requests = [self._request(questions[row], image, attempt) for row, image in waiting]
            done = isolate_failures(self._engine.generate, requests, _failure)
            for (row, _), completion in zip(waiting, done, strict=True):
                responses[row] = self._add(responses[row], completion, attempt)
            waiting = [
                (row, image) for row, image in waiting if not responses[row].is_valid and not responses[row].reason
            ]
        return [replace(response, failure="error") if response.reason else response for response in responses]

    def _load(self, path: str, image_hw: tuple[int, int]) -> Image.Image | str:
        """The image at the size sent to the model, or an error message."""
        image = super()._load(path, image_hw)
        if isinstance(image, str):
            return image
        height, width = sent_hw(self._space, image_hw, self._params.max_image_px)
        if scale_of(self._space) == "unit_square":
            return ImageOps.pad(image, (width, height), Image.Resampling.BICUBIC, color=BORDER_RGB)
        return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)

    def _empty_response(self, question: Question) -> RawResponse:
        size = sent_hw(self._space, question.image_hw, self._params.max_image_px)
        return RawResponse(
            "", self._model, self._space, size, self._sha256, attempts=0, is_valid=False, precision=self._precision
        )

    def _request(self, question: Question, image: Image.Image, attempt: int) -> Request:
        is_greedy = question.sample_index == 0 and attempt == 0
        return Request(
            image=image,
            text=prompt_text(self._params.prompt, question.sentence, self._space),
            schema=self._schema,
            temperature=0.0 if is_greedy else self._params.temperature,
            seed=request_seed(self._params.seed, question.sent_id, question.sample_index, attempt),
            max_tokens=self._params.max_tokens * (1 + attempt),  # truncation is the usual cause of invalid responses
        )

    def _add(self, response: RawResponse, completion: Completion, attempt: int) -> RawResponse:
        """The response after one more attempt; a failed attempt keeps the text of an earlier one."""
        response = replace(
            response,
            attempts=attempt + 1,
            prompt_tokens=response.prompt_tokens + completion.prompt_tokens,
            completion_tokens=response.completion_tokens + completion.completion_tokens,
        )
        if completion.failure:
            return response if response.raw_text else replace(response, reason=completion.failure)
        is_valid = keeps_to(self._params.prompt, completion.text)
        return replace(response, raw_text=completion.text, is_valid=is_valid)


def request_seed(seed: int, sent_id: int, sample_index: int, attempt: int) -> int:
    """Seed of one sample, the same in every run and order: 0..2**31 - 1."""
    digest = hashlib.sha256(f"{seed} {sent_id} {sample_index} {attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _failure(reason: str) -> Completion:
    return Completion("", failure=reason)
