"""Query a real multimodal LLM: build requests, retry responses that do not follow the prompt, and isolate and mark the
requests that make an engine fail.

The models are behind `Engine`: engine_transformers.py, engine_openai.py and engine_vllm.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from PIL import Image, ImageOps

from l2l_core.config import PriorsParams
from l2l_core.core.images import read_image
from l2l_core.errors import InputError, L2LError
from l2l_core.mllm.backend import Question, RawResponse
from l2l_core.mllm.coords import resolve_coord_space, scale_of, sent_hw
from l2l_core.mllm.prompt import Schema, keeps_to, prompt_sha256, prompt_text, response_schema

BORDER_RGB = (122, 116, 104)
"""Border of an image padded to a square: CLIP's mean color, which the network sees as 0, as in LLaVA-1.5's training."""
AHEAD_BYTES = 256 * 2**20
"""Limit for images that are decoded ahead."""
DECODERS = 4
"""Threads that decode images; reading and decoding release the GIL."""


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


class MllmBackend:
    """Queries a model about every question with the prompt `priors.prompt`.

    Raises ConfigError if the model's family is unknown and `priors.coord_space` is not set.
    """

    def __init__(self, engine: Engine, params: PriorsParams) -> None:
        self.name: str = params.backend
        self._engine = engine
        self._precision = engine.precision
        self._params = params
        self._model = str(params.model)
        self._space = resolve_coord_space(self._model, params.coord_space)
        self._schema = response_schema(params.prompt, self._space) if params.is_structured else None
        self._sha256 = prompt_sha256(params.prompt, self._space)
        self._images = _Images(self._load)

    def query(self, questions: Sequence[Question], following: Sequence[Question] = ()) -> list[RawResponse]:
        """Return one response per question; a failed image or request yields a response with `error`.

        following: the next questions; their images are decoded while the engine works.
        """
        images = self._images.decode(questions)
        self._images.decode_ahead(following)
        try:
            return self._query(questions, images)
        except BaseException:
            self._images.cancel()
            raise

    def _query(self, questions: Sequence[Question], images: Sequence[Image.Image | str]) -> list[RawResponse]:
        responses = [self._empty_response(question) for question in questions]
        waiting = []
        for row, image in enumerate(images):
            if isinstance(image, str):
                responses[row] = replace(responses[row], unread="error", reason=image)
            else:
                waiting.append((row, image))
        for attempt in range(1 + self._params.retries):
            requests = [self._request(questions[row], image, attempt) for row, image in waiting]
            done = _generate(self._engine, requests)
            for (row, _), completion in zip(waiting, done, strict=True):
                responses[row] = self._add(responses[row], completion, attempt)
            waiting = [
                (row, image) for row, image in waiting if not responses[row].is_valid and not responses[row].reason
            ]
        return [replace(response, unread="error") if response.reason else response for response in responses]

    def _load(self, path: str, image_hw: tuple[int, int]) -> Image.Image | str:
        """The image at the size sent to the model, or an error message."""
        height, width = sent_hw(self._space, image_hw, self._params.max_image_px)
        try:
            image = Image.fromarray(read_image(path))
        except InputError as error:
            return str(error)
        if image.size != (image_hw[1], image_hw[0]):
            return "image of another size than the index says"
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


class _Images:
    """Images by path and size, as `load` returns them: each is decoded once for consecutive questions about it."""

    def __init__(self, load: Callable[[str, tuple[int, int]], Image.Image | str]) -> None:
        self._load = load
        self._threads = ThreadPoolExecutor(DECODERS, "decode")
        self._held: dict[tuple[str, tuple[int, int]], Future[Image.Image | str]] = {}

    def decode(self, questions: Sequence[Question]) -> list[Image.Image | str]:
        """The image of each question, in order. Drops all other images."""
        keys = [(question.image_path, question.image_hw) for question in questions]
        held = {key: self._held.pop(key, None) for key in dict.fromkeys(keys)}
        self.cancel()
        self._held = {key: future or self._threads.submit(self._load, *key) for key, future in held.items()}
        return [self._held[key].result() for key in keys]

    def decode_ahead(self, questions: Sequence[Question]) -> None:
        """Start to decode the images of the questions, up to AHEAD_BYTES, without waiting for them."""
        room = AHEAD_BYTES
        for key in dict.fromkeys((question.image_path, question.image_hw) for question in questions):
            height, width = key[1]
            room -= 3 * height * width
            if room < 0:
                return
            if key not in self._held:
                self._held[key] = self._threads.submit(self._load, *key)

    def cancel(self) -> None:
        """Drop all images and cancel pending decodes."""
        for future in self._held.values():
            future.cancel()
        self._held.clear()


def request_seed(seed: int, sent_id: int, sample_index: int, attempt: int) -> int:
    """Seed of one sample, the same in every run and order: 0..2**31 - 1."""
    digest = hashlib.sha256(f"{seed} {sent_id} {sample_index} {attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _generate(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """Split a failing batch in half until the failing requests are isolated; the others get completions.

    Only the exception type is stored: messages contain addresses and times, which differ from run to run.
    """
    if not requests:
        return []
    try:
        return engine.generate(requests)
    except L2LError:
        raise
    except Exception as error:  # whatever an engine's library raises
        if len(requests) == 1:
            return [Completion("", failure=type(error).__name__)]
    middle = len(requests) // 2
    return _generate(engine, requests[:middle]) + _generate(engine, requests[middle:])
