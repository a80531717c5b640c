"""A backend that looks at the images: it decodes each once, and those of the next questions while it works."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from PIL import Image

from l2l_core.core.images import read_image
from l2l_core.errors import InputError
from l2l_core.mllm.backend import Question, RawResponse

AHEAD_BYTES = 256 * 2**20
"""Limit for images that are decoded ahead."""
DECODERS = 4
"""Threads that decode images; reading and decoding release the GIL."""


class ImageBackend(ABC):
    """A PriorBackend whose responses depend on the images."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._images = _Images(self._load)

    def query(self, questions: Sequence[Question], following: Sequence[Question] = ()) -> list[RawResponse]:
        """Return one response per question; a failed image or request yields a response with `error`.

        following: the next questions; their images are decoded while the model works.
        """
        images = self._images.decode(questions)
        self._images.decode_ahead(following)
        try:
            return self._query(questions, images)
        except BaseException:
            self._images.cancel()
            raise

    @abstractmethod
    def _query(self, questions: Sequence[Question], images: Sequence[Image.Image | str]) -> list[RawResponse]:
        """Return one response per question. images: of each question, as `_load` returns it."""

    def _load(self, path: str, image_hw: tuple[int, int]) -> Image.Image | str:
        """The image as stored, or an error message."""
        try:
            image = Image.fromarray(read_image(path))
        except InputError as error:
            return str(error)
        return image if image.size == (image_hw[1], image_hw[0]) else "image of another size than the index says"


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
