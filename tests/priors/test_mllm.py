"""From questions to requests and back, with engines that are functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from prior_tables import BOX_2, prior_params

from l2l_core.errors import InputError
from l2l_core.priors.backend import Question
from l2l_core.priors.coords import CoordSpace, sent_hw
from l2l_core.priors.mllm import Completion, MllmBackend, Request, request_seed
from l2l_core.priors.prompt import answer_schema, prompt_sha256

GOOD = json.dumps(BOX_2)


@dataclass
class Scripted:
    """Writes what a function makes of a request, and keeps the batches that it saw."""

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


def ask_about(image: str, *sentences: str) -> list[Question]:
    return [Question(number, 0, image, (48, 64), text) for number, text in enumerate(sentences)]


def backend(engine: Scripted, **changes: object) -> MllmBackend:
    return MllmBackend(engine, prior_params(backend="openai", model="Qwen3-VL-8B", seed=3, **changes))


def test_a_request_is_the_image_and_the_prompt(image: str) -> None:
    engine = Scripted()
    (answer,) = backend(engine).ask(ask_about(image, "red cup"))
    ((request,),) = engine.batches
    assert request.image.mode == "RGB"
    assert request.image.size == (64, 48)
    assert '"red cup"' in request.text
    assert request.schema == answer_schema("box-2", "norm1000")
    assert (request.temperature, request.max_tokens) == (0.0, 256)
    assert (answer.raw_text, answer.model, answer.coord_space) == (GOOD, "Qwen3-VL-8B", "norm1000")
    assert answer.prompt_sha256 == prompt_sha256("box-2", "norm1000")
    assert (answer.prompt_tokens, answer.completion_tokens, answer.attempts, answer.unread) == (10, 3, 1, None)


def test_without_structured_output_there_is_no_schema(image: str) -> None:
    engine = Scripted()
    backend(engine, structured_output=False).ask(ask_about(image, "red cup"))
    assert engine.batches[0][0].schema is None


@pytest.mark.parametrize(
    ("space", "image_hw", "sent"),
    [
        ("resized_pixel", (480, 640), (476, 644)),  # multiples of 28
        ("norm1000", (480, 640), (480, 640)),
        ("norm1000", (2000, 4000), (708, 1416)),  # sqrt(1003520 / 8e6) = 0.35418
        ("pixel", (2000, 4000), (2000, 4000)),  # its answers would mean other pixels
        ("unit", (1, 5_000_000), (1, 2240000)),  # too thin to keep its shape; the engine will refuse it
    ],
)
def test_the_size_that_is_sent(space: CoordSpace, image_hw: tuple[int, int], sent: tuple[int, int]) -> None:
    assert sent_hw(space, image_hw, 1003520) == sent


def test_qwen25_gets_the_size_that_its_boxes_refer_to(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.new("L", (640, 480)).save(path)  # grey
    engine = Scripted()
    asked = MllmBackend(engine, prior_params(backend="vllm", model="Qwen2.5-VL-7B"))
    (answer,) = asked.ask([Question(0, 0, str(path), (480, 640), "cup")])
    assert engine.batches[0][0].image.size == (644, 476)
    assert answer.input_hw == (476, 644)


def test_an_answer_that_breaks_the_prompt_is_drawn_again(image: str) -> None:
    """The second attempt is drawn, from a seed of its own, with more room; only what broke the prompt is repeated."""
    engine = Scripted(lambda request: "what?" if '"bad"' in request.text and request.temperature == 0 else GOOD)
    answers = backend(engine).ask(ask_about(image, "good", "bad"))
    assert [answer.raw_text for answer in answers] == [GOOD, GOOD]
    assert [(answer.attempts, answer.prompt_tokens) for answer in answers] == [(1, 10), (2, 20)]
    assert [len(batch) for batch in engine.batches] == [2, 1]
    again = engine.batches[1][0]
    assert (again.temperature, again.max_tokens, again.seed) == (0.7, 512, request_seed(3, 1, 0, 1))


def test_what_never_keeps_to_the_prompt_is_kept_as_written(image: str) -> None:
    engine = Scripted(lambda request: f"what? {request.max_tokens}")
    (answer,) = backend(engine, retries=2).ask(ask_about(image, "cup"))
    assert (answer.raw_text, answer.attempts, answer.is_valid, answer.unread) == ("what? 768", 3, False, None)


def test_every_draw_has_a_seed_of_its_own() -> None:
    seeds = {
        request_seed(seed, sent_id, sample, attempt)
        for seed in range(3)
        for sent_id in range(100)
        for sample in range(4)
        for attempt in range(3)
    }
    assert len(seeds) == 3 * 100 * 4 * 3
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_further_samples_are_drawn(image: str) -> None:
    engine = Scripted()
    backend(engine).ask([Question(0, sample, image, (48, 64), "cup") for sample in range(3)])
    assert [request.temperature for request in engine.batches[0]] == [0.0, 0.7, 0.7]
    assert len({request.seed for request in engine.batches[0]}) == 3


class Poisoned(Scripted):
    """Refuses any batch in which a poisonous request is, as engines do."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        done = super().generate(requests)
        if any("poison" in request.text for request in requests):
            raise RuntimeError(f"at {id(self):x}")
        return done


def test_poison_is_found_and_the_rest_kept(image: str) -> None:
    engine = Poisoned()
    sentences = [f"thing {number}" for number in range(33)]
    sentences[5] = sentences[20] = "poison"
    answers = backend(engine).ask(ask_about(image, *sentences))
    assert [row for row, answer in enumerate(answers) if answer.unread == "error"] == [5, 20]
    assert {answers[row].reason for row in (5, 20)} == {
        "RuntimeError"
    }  # not its message, which differs from run to run
    assert all(answer.raw_text == GOOD for row, answer in enumerate(answers) if row not in (5, 20))
    assert len(engine.batches) <= 1 + 2 * 2 * 6  # two halves a level, two culprits, six levels


def test_what_concerns_all_requests_stops_at_once(image: str) -> None:
    class Gone(Scripted):
        def generate(self, requests: Sequence[Request]) -> list[Completion]:
            self.batches.append(list(requests))
            raise InputError("no server")

    engine = Gone()
    with pytest.raises(InputError, match="no server"):
        backend(engine).ask(ask_about(image, "a", "b", "c"))
    assert len(engine.batches) == 1


def test_a_broken_image_concerns_its_sentences_alone(image: str, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    asked = ask_about(image, "cup")
    asked.append(Question(7, 0, str(tmp_path / "broken.png"), (48, 64), "cup"))
    asked.append(Question(8, 0, str(tmp_path / "gone.png"), (48, 64), "cup"))
    asked.append(Question(9, 0, image, (64, 48), "cup"))
    answers = backend(Scripted()).ask(asked)
    reasons = ["", "UnidentifiedImageError", "FileNotFoundError", "image of another size than the index says"]
    assert [answer.reason for answer in answers] == reasons
    assert [answer.unread for answer in answers] == [None, "error", "error", "error"]


def test_an_image_is_opened_once_for_all_its_sentences(image: str) -> None:
    engine = Scripted()
    backend(engine).ask(ask_about(image, "a", "b", "c"))
    first, *others = [request.image for request in engine.batches[0]]
    assert all(other is first for other in others)


def test_a_failed_second_attempt_keeps_the_first_answer(image: str) -> None:
    class Once(Scripted):
        def generate(self, requests: Sequence[Request]) -> list[Completion]:
            if self.batches:
                raise TimeoutError
            return super().generate(requests)

    (answer,) = backend(Once(lambda _: "it is at [1, 2, 3, 4]")).ask(ask_about(image, "cup"))
    assert (answer.raw_text, answer.unread) == ("it is at [1, 2, 3, 4]", None)
