"""MllmBackend: questions become requests and completions become responses; the engines are plain functions."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from prior_tables import BOX_2, prior_params
from transformers import CLIPImageProcessorPil

from l2l_core.config import CoordSpace
from l2l_core.errors import InputError
from l2l_core.mllm import image_backend
from l2l_core.mllm.backend import Question
from l2l_core.mllm.coords import sent_hw
from l2l_core.mllm.engine import Completion, MllmBackend, Request, request_seed
from l2l_core.mllm.prompt import prompt_sha256, response_schema
from l2l_core.priors.parse import parse_response

GOOD = json.dumps(BOX_2)


@dataclass
class Scripted:
    """Completes each request with a function and records the batches it receives."""

    write: Callable[[Request], str] = lambda _: GOOD
    batches: list[list[Request]] = field(default_factory=list)
    precision: Literal["bf16", "fp32"] | None = None

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.batches.append(list(requests))
        return [Completion(self.write(request), 10, 3) for request in requests]


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "image.png"
    Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)).save(path)
    return str(path)


def questions_about(image: str, *sentences: str) -> list[Question]:
    return [Question(number, 0, image, (48, 64), text) for number, text in enumerate(sentences)]


def backend(engine: Scripted, **changes: object) -> MllmBackend:
    return MllmBackend(engine, prior_params(backend="openai", model="Qwen3-VL-8B", seed=3, **changes))


def test_request_holds_the_image_and_the_prompt(image: str) -> None:
    engine = Scripted()
    (response,) = backend(engine).query(questions_about(image, "red cup"))
    ((request,),) = engine.batches
    assert request.image.mode == "RGB"
    assert request.image.size == (64, 48)
    assert '"red cup"' in request.text
    assert request.schema == response_schema("box-2", "norm1000")
    assert (request.temperature, request.max_tokens) == (0.0, 256)
    assert (response.raw_text, response.model, response.coord_space) == (GOOD, "Qwen3-VL-8B", "norm1000")
    assert response.prompt_sha256 == prompt_sha256("box-2", "norm1000")
    assert (response.prompt_tokens, response.completion_tokens, response.attempts, response.failure) == (10, 3, 1, None)


def test_request_has_no_schema_without_structured_output(image: str) -> None:
    engine = Scripted()
    backend(engine, structured_output=False).query(questions_about(image, "red cup"))
    assert engine.batches[0][0].schema is None


@pytest.mark.parametrize(
    ("space", "image_hw", "sent"),
    [
        ("resized_pixel", (480, 640), (476, 644)),  # multiples of 28
        ("norm1000", (480, 640), (480, 640)),
        ("norm1000", (2000, 4000), (708, 1416)),  # sqrt(1003520 / 8e6) = 0.35418
        ("pixel", (2000, 4000), (2000, 4000)),  # resizing would change the meaning of its coordinates
        ("unit", (1, 5_000_000), (1, 2240000)),  # too thin to keep its aspect ratio; the engine will refuse it
    ],
)
def test_sent_hw_limits_the_image_size_per_coordinate_space(
    space: CoordSpace, image_hw: tuple[int, int], sent: tuple[int, int]
) -> None:
    assert sent_hw(space, image_hw, 1003520) == sent


def test_qwen25_images_are_resized_to_the_size_its_boxes_refer_to(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.new("L", (640, 480)).save(path)  # grayscale
    engine = Scripted()
    mllm = MllmBackend(engine, prior_params(backend="vllm", model="Qwen2.5-VL-7B"))
    (response,) = mllm.query([Question(0, 0, str(path), (480, 640), "cup")])
    assert engine.batches[0][0].image.size == (644, 476)
    assert response.input_hw == (476, 644)


def test_resamples_a_response_that_violates_the_prompt(image: str) -> None:
    """The retry samples with a new seed and more tokens; only the response that violated the prompt is repeated."""
    engine = Scripted(lambda request: "what?" if '"bad"' in request.text and request.temperature == 0 else GOOD)
    responses = backend(engine).query(questions_about(image, "good", "bad"))
    assert [response.raw_text for response in responses] == [GOOD, GOOD]
    assert [(response.attempts, response.prompt_tokens) for response in responses] == [(1, 10), (2, 20)]
    assert [len(batch) for batch in engine.batches] == [2, 1]
    again = engine.batches[1][0]
    assert (again.temperature, again.max_tokens, again.seed) == (0.7, 512, request_seed(3, 1, 0, 1))


def test_keeps_the_raw_text_when_every_attempt_violates_the_prompt(image: str) -> None:
    engine = Scripted(lambda request: f"what? {request.max_tokens}")
    (response,) = backend(engine, retries=2).query(questions_about(image, "cup"))
    assert (response.raw_text, response.attempts, response.is_valid, response.failure) == ("what? 768", 3, False, None)


def test_request_seed_is_unique_for_every_draw() -> None:
    seeds = {
        request_seed(seed, sent_id, sample, attempt)
        for seed in range(3)
        for sent_id in range(100)
        for sample in range(4)
        for attempt in range(3)
    }
    assert len(seeds) == 3 * 100 * 4 * 3
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_samples_after_the_first_use_a_temperature(image: str) -> None:
    engine = Scripted()
    backend(engine).query([Question(0, sample, image, (48, 64), "cup") for sample in range(3)])
    assert [request.temperature for request in engine.batches[0]] == [0.0, 0.7, 0.7]
    assert len({request.seed for request in engine.batches[0]}) == 3


class Poisoned(Scripted):
    """Refuses any batch that holds a poisoned request, as real engines do."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        done = super().generate(requests)
        if any("poison" in request.text for request in requests):
            raise RuntimeError(f"at {id(self):x}")
        return done


def test_bisects_a_failing_batch_and_keeps_the_other_responses(image: str) -> None:
    engine = Poisoned()
    sentences = [f"thing {number}" for number in range(33)]
    sentences[5] = sentences[20] = "poison"
    responses = backend(engine).query(questions_about(image, *sentences))
    assert [row for row, response in enumerate(responses) if response.failure == "error"] == [5, 20]
    assert {responses[row].reason for row in (5, 20)} == {
        "RuntimeError"
    }  # not the message, which differs from run to run
    assert all(response.raw_text == GOOD for row, response in enumerate(responses) if row not in (5, 20))
    assert len(engine.batches) <= 1 + 2 * 2 * 6  # two halves per level, two bad requests, six levels


def test_an_input_error_stops_after_one_batch(image: str) -> None:
    class Gone(Scripted):
        def generate(self, requests: Sequence[Request]) -> list[Completion]:
            self.batches.append(list(requests))
            raise InputError("no server")

    engine = Gone()
    with pytest.raises(InputError, match="no server"):
        backend(engine).query(questions_about(image, "a", "b", "c"))
    assert len(engine.batches) == 1


def test_a_broken_image_fails_only_its_own_sentences(image: str, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    questions = questions_about(image, "cup")
    questions.append(Question(7, 0, str(tmp_path / "broken.png"), (48, 64), "cup"))
    questions.append(Question(8, 0, str(tmp_path / "gone.png"), (48, 64), "cup"))
    questions.append(Question(9, 0, image, (64, 48), "cup"))
    responses = backend(Scripted()).query(questions)
    reasons = [
        "",
        f"{tmp_path}/broken.png: corrupt, or not one of JPEG, PNG, WEBP, BMP, TIFF",
        f"{tmp_path}/gone.png: image not found",
        "image of another size than the index says",
    ]
    assert [response.reason for response in responses] == reasons
    assert [response.failure for response in responses] == [None, "error", "error", "error"]


def test_an_image_is_opened_once_for_all_its_sentences(image: str) -> None:
    engine = Scripted()
    backend(engine).query(questions_about(image, "a", "b", "c"))
    first, *others = [request.image for request in engine.batches[0]]
    assert all(other is first for other in others)


# --- decoding ahead


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images in loading order."""
    paths: list[str] = []
    load = MllmBackend._load

    def noted(self: MllmBackend, path: str, image_hw: tuple[int, int]) -> Image.Image | str:
        paths.append(Path(path).name)
        return load(self, path, image_hw)

    monkeypatch.setattr(MllmBackend, "_load", noted)
    return paths


def about_images(folder: Path, *numbers: int) -> list[Question]:
    for number in set(numbers):
        if not (folder / f"{number}.png").exists():
            Image.new("RGB", (64, 48), (number, 0, 0)).save(folder / f"{number}.png")
    return [Question(row, 0, str(folder / f"{number}.png"), (48, 64), "cup") for row, number in enumerate(numbers)]


def test_the_next_images_are_decoded_while_the_engine_works(tmp_path: Path, decoded: list[str]) -> None:
    first, second = about_images(tmp_path, 0, 0, 1), about_images(tmp_path, 1, 1, 2, 2, 3)
    came = threading.Event()

    class Waiting(Scripted):
        def generate(self, requests: Sequence[Request]) -> list[Completion]:
            if not self.batches:
                came.set()
                limit = time.monotonic() + 60
                while len(decoded) < 4 and time.monotonic() < limit:
                    time.sleep(0.001)
            return super().generate(requests)

    engine = Waiting()
    mllm = backend(engine)
    mllm.query(first, second)
    assert came.is_set()
    assert sorted(decoded) == ["0.png", "1.png", "2.png", "3.png"]  # before the first batch is done
    mllm.query(second)
    assert sorted(decoded) == ["0.png", "1.png", "2.png", "3.png"]  # no image is decoded twice, even across chunks
    assert [request.image.getpixel((0, 0))[0] for request in engine.batches[1]] == [1, 1, 2, 2, 3]


def test_prefetching_does_not_change_the_responses(tmp_path: Path) -> None:
    chunks = [about_images(tmp_path, *numbers) for numbers in ((0, 1), (1, 2), (5, 2), (0, 0))]

    def write(request: Request) -> str:
        return json.dumps(BOX_2 | {"target": str(request.image.getpixel((0, 0)))})

    plain, ahead = backend(Scripted(write)), backend(Scripted(write))
    wanted = [plain.query(chunk) for chunk in chunks]
    following = [*chunks[2:], [], []]  # a wrong guess does no harm either
    assert [ahead.query(chunk, after) for chunk, after in zip(chunks, following, strict=True)] == wanted


def test_prefetching_stays_within_its_memory_budget(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_backend, "AHEAD_BYTES", 2 * 3 * 48 * 64)
    mllm = backend(Scripted())
    mllm.query(about_images(tmp_path, 0), about_images(tmp_path, 1, 2, 3, 4))
    mllm._images._threads.shutdown(wait=True)
    assert sorted(decoded) == ["0.png", "1.png", "2.png"]


def test_a_failure_releases_the_prefetched_images(tmp_path: Path) -> None:
    class Gone(Scripted):
        def generate(self, requests: Sequence[Request]) -> list[Completion]:
            raise KeyboardInterrupt

    mllm = backend(Gone())
    with pytest.raises(KeyboardInterrupt):
        mllm.query(about_images(tmp_path, 0), about_images(tmp_path, *range(1, 9)))
    assert not mllm._images._held


# --- squares


@pytest.mark.parametrize("size", [(120, 60), (60, 120), (90, 90), (301, 77)])
@pytest.mark.parametrize("max_px", [1003520, 3600])
def test_a_cropping_processor_sees_the_whole_image_and_its_box_maps_back(
    tmp_path: Path, size: tuple[int, int], max_px: int
) -> None:
    """Like LLaVA-1.5, the processor scales the shortest side to 56 px and crops the central 56 x 56 px. The engine
    finds the bright object in the processed image and returns its box in fractions of that image."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    x1, y1, x2, y2 = 0, height // 4, width // 5, height // 2  # at the left edge, which a crop would cut off
    pixels[y1:y2, x1:x2] = 255
    Image.fromarray(pixels).save(tmp_path / "photo.png")

    def write(request: Request) -> str:
        seen = np.asarray(processor(request.image, return_tensors="np")["pixel_values"])[0]
        rows, columns = np.nonzero(seen.mean(axis=0) > 0.7)  # between 0 (padding) and 2 (white)
        box = [columns.min() / 56, rows.min() / 56, (columns.max() + 1) / 56, (rows.max() + 1) / 56]
        return json.dumps(BOX_2 | {"boxes": [[float(value) for value in box]]})

    params = prior_params(backend="vllm", model="llava-hf/llava-1.5-7b-hf", max_image_px=max_px)
    (response,) = MllmBackend(Scripted(write), params).query(
        [Question(0, 0, str(tmp_path / "photo.png"), (height, width), "cup")]
    )
    assert response.coord_space == "unit_square"
    assert response.input_hw[0] == response.input_hw[1] == min(max(size), int(max_px**0.5))
    prior = parse_response(response.raw_text, response.coord_space, (height, width), response.input_hw)
    pixel = max(size) / 56  # original pixels per processor pixel
    assert prior.bbox == pytest.approx((x1, y1, x2, y2), abs=1.01 * pixel)


def test_refshapes_vlm_receives_unmodified_images(tmp_path: Path) -> None:
    """The model is a LLaVA whose processor does not crop, and its images are square."""
    path = tmp_path / "scene.png"
    Image.fromarray(np.arange(96 * 96 * 3, dtype=np.uint8).reshape(96, 96, 3)).save(path)
    engine = Scripted()
    mllm = MllmBackend(engine, prior_params(backend="transformers", model="vlm/refshapes-vlm"))
    (response,) = mllm.query([Question(0, 0, str(path), (96, 96), "red circle")])
    assert np.array_equal(np.asarray(engine.batches[0][0].image), np.asarray(Image.open(path)))
    assert (response.coord_space, response.input_hw) == ("percent", (96, 96))


def test_a_failed_retry_keeps_the_first_response(image: str) -> None:
    class Once(Scripted):
        def generate(self, requests: Sequence[Request]) -> list[Completion]:
            if self.batches:
                raise TimeoutError
            return super().generate(requests)

    (response,) = backend(Once(lambda _: "it is at [1, 2, 3, 4]")).query(questions_about(image, "cup"))
    assert (response.raw_text, response.failure) == ("it is at [1, 2, 3, 4]", None)
