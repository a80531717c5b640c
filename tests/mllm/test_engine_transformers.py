"""TransformersEngine with a tiny random model; the model's own generate() is the oracle."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prior_tables import prior_params
from tiny_llava import save_tiny_llava
from transformers import AutoModelForImageTextToText, AutoProcessor

from l2l_core.errors import ConfigError
from l2l_core.mllm.engine import Request
from l2l_core.mllm.engine_transformers import TransformersEngine, _SeededDraws, _tokens_at
from l2l_core.mllm.prompt import keeps_to, response_schema

needs_xgrammar = pytest.mark.skipif(
    importlib.util.find_spec("xgrammar") is None, reason="xgrammar is not installed: pip install -e '.[mllm]'"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("models") / "tiny-llava")


def engine(folder: Path, **changes: object) -> TransformersEngine:
    settings: dict[str, Any] = {"backend": "transformers", "model": str(folder), "precision": "fp32"}
    settings |= {"coord_space": "unit_square", "structured_output": False, "engine": {"batch_size": 3, "device": "cpu"}}
    return TransformersEngine(prior_params(**(settings | changes)))


@pytest.fixture(scope="module")
def plain(folder: Path) -> TransformersEngine:
    return engine(folder)


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def request(text: str, seed: int = 0, temperature: float = 0.0, max_tokens: int = 12, **more: Any) -> Request:
    return Request(image(len(text)), text, more.get("schema"), temperature, seed, max_tokens)


TEXTS = ["cup", "the red cup", "a rather long question about the cup", "dog"]


def test_batched_greedy_text_equals_the_models_own_generate(folder: Path, plain: TransformersEngine) -> None:
    """The model's own generate() runs one unpadded prompt at a time; the engine runs batches of three."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    written = []
    for text in TEXTS:
        inputs = processor(images=[image(len(text))], text=[f"user: <image>{text}\nassistant: "], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        written.append((processor.tokenizer.decode(tokens, skip_special_tokens=True), inputs["input_ids"].shape[1]))
    done = plain.generate([request(text) for text in TEXTS])
    assert [(entry.text, entry.prompt_tokens) for entry in done] == written
    assert len({text for text, _ in written}) > 1  # the question matters
    assert [entry.completion_tokens for entry in done] == [12] * 4


def test_a_sample_depends_only_on_its_seed(plain: TransformersEngine) -> None:
    requests = [request("cup", seed=seed, temperature=0.7) for seed in range(7)]
    together = [entry.text for entry in plain.generate(requests)]
    assert len(set(together)) > 4
    assert [entry.text for entry in plain.generate(requests[::-1])][::-1] == together
    assert [plain.generate([entry])[0].text for entry in requests] == together
    greedy = [request("cup", seed=seed) for seed in range(3)]
    assert len({entry.text for entry in plain.generate(greedy)}) == 1


def test_samples_follow_the_models_distribution(folder: Path, plain: TransformersEngine) -> None:
    """First letters over 600 seeds match softmax(logits / T) within four standard errors."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    inputs = processor(images=[image(3)], text=["user: <image>cup\nassistant: "], return_tensors="pt")
    with torch.inference_mode():
        wanted = torch.softmax(model(**inputs).logits[0, -1] / 2.0, dim=0)
    many = TransformersEngine.generate  # the same engine with larger batches
    plain._batch_size = 200
    texts = [entry.text for entry in many(plain, [request("cup", seed, 2.0, 1) for seed in range(600)])]
    plain._batch_size = 3
    for token in wanted.topk(5).indices.tolist():
        share, letter = float(wanted[token]), processor.tokenizer.decode([token])
        assert texts.count(letter) / 600 == pytest.approx(share, abs=4 * (share * (1 - share) / 600) ** 0.5)


def test_a_completion_ends_at_the_end_of_sequence_token(plain: TransformersEngine) -> None:
    done = plain._completion([10, 11, 2, 0, 0], 5)
    assert (len(done.text), done.prompt_tokens, done.completion_tokens) == (2, 5, 3)


def test_each_request_uses_its_own_token_limit(plain: TransformersEngine) -> None:
    done = plain.generate([request("cup", max_tokens=4), request("dog", max_tokens=9)])
    assert [entry.completion_tokens for entry in done] == [4, 9]


def test_sampling_picks_the_first_token_whose_cumulative_probability_exceeds_u() -> None:
    """Probabilities 0.2, 0, 0.5 and 0.3 at temperature 2; u comes from the request's own generator."""
    seeds = range(20)
    logits = 2 * torch.log(torch.tensor([[0.2, 0.0, 0.5, 0.3]])).expand(len(seeds), -1)
    draws = _SeededDraws([request("cup", seed, temperature=2.0, max_tokens=3) for seed in seeds])
    chosen = [draws(torch.zeros(1), logits).argmax(dim=1).tolist() for _ in range(5)]
    for seed in seeds:
        numbers = torch.rand(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        wanted = [0 if number < 0.2 else 2 if number < 0.7 else 3 for number in numbers]
        assert [step[seed] for step in chosen[:3]] == wanted


def test_tokens_at_matches_numpy_and_never_picks_a_zero_probability_token() -> None:
    rng = np.random.default_rng(0)
    probs = rng.random((50, 3000)) ** 8 * (rng.random((50, 3000)) < 0.2)
    probs /= probs.sum(axis=1, keepdims=True)
    shares = np.concatenate([rng.random(48), [0.0, np.nextafter(1.0, 0.0)]])
    tokens = _tokens_at(torch.tensor(probs, dtype=torch.float32), torch.tensor(shares))[:, 0].numpy()
    assert (probs[np.arange(50), tokens] > 0).all()
    ends = np.cumsum(probs, axis=1)
    rows = np.arange(50)
    assert (ends[rows, tokens] >= shares - 1e-6).all()
    assert (ends[rows, tokens] - probs[rows, tokens] <= shares + 1e-6).all()


def test_sampling_leaves_greedy_rows_unchanged() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]])
    draws = _SeededDraws([request("cup"), request("cup", 1, temperature=0.7)])
    first, second = draws(torch.zeros(1), scores)
    assert first.tolist() == [1.0, 3.0, 2.0]
    assert sorted(second.tolist()) == [-torch.inf, -torch.inf, 0.0]
    assert _SeededDraws([request("cup")])(torch.zeros(1), scores[:1]) is not None


def test_each_token_uses_one_random_number_for_any_vocabulary_size(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **kw: drawn.append(size) or rand(*size, **kw))
    draws = _SeededDraws([request("cup", 1, temperature=0.7, max_tokens=6)] * 2)
    for _ in range(6):
        draws(torch.zeros(1), torch.zeros(2, 50_000))
    assert drawn == [(6,), (6,)]


def test_refuses_a_cropping_processor_unless_images_are_padded_to_squares(tmp_path: Path) -> None:
    folder = save_tiny_llava(tmp_path / "llava-1.5-tiny")
    with pytest.raises(ConfigError, match=r"priors\.coord_space: got 'unit', .* crops images .* set it to unit_square"):
        engine(folder, coord_space="unit")
    engine(folder, coord_space="auto")  # resolved from the model family


@needs_xgrammar
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_structured_output_always_matches_the_prompt_schema(folder: Path, temperature: float) -> None:
    """Random weights do not produce JSON without the constraint."""
    schema = response_schema("box-2", "norm1000")
    requests = [request(text, 1, temperature, 1500, schema=schema) for text in TEXTS]
    for entry in engine(folder, structured_output=True).generate(requests):
        said = json.loads(entry.text)
        assert list(said) == schema["required"]
        assert all(0 <= value <= 1000 for box in said["boxes"] for value in box)
    loose = engine(folder).generate(requests[:1])
    assert not keeps_to("box-2", loose[0].text)


def test_missing_xgrammar_error_names_the_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(ConfigError, match=r"priors\.structured_output: .*needs xgrammar.*pip install .*mllm.*false"):
        engine(folder, structured_output=True)


def test_missing_model_error_names_the_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"priors\.model: got '.*nothing', expected a hub id"):
        engine(tmp_path / "nothing")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_missing_gpu_error_names_the_device_setting(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"priors\.engine\.device: got 'cuda', but torch sees no CUDA device"):
        TransformersEngine(prior_params(backend="transformers", model=str(folder), engine={"device": "cuda"}))
