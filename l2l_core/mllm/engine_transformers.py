"""Models in the Hugging Face layout, run by transformers: the slowest engine, but it runs everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from l2l_core.config import PriorsParams
from l2l_core.core.device import choose_device, print_device, resolve_precision
from l2l_core.core.optional import hide_packages
from l2l_core.core.pretrained import Loading
from l2l_core.errors import ConfigError
from l2l_core.mllm.coords import resolve_coord_space, scale_of
from l2l_core.mllm.engine import Completion, Request
from l2l_core.mllm.prompt import Schema

with hide_packages("scipy", "sklearn"):  # for losses of detectors, and assisted decoding
    from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, LogitsProcessorList

DRAW_BLOCK = 512
"""Size of the token blocks whose probabilities are summed when a token is sampled."""
Processor = Callable[[Tensor, Tensor], Tensor]  # token ids [B, L], logits [B, V] -> logits [B, V]


class TransformersEngine:
    """One model in this process. Raises ConfigError if it cannot be loaded, or if xgrammar is required but missing."""

    def __init__(self, params: PriorsParams) -> None:
        name = params.model
        self._device = choose_device(params.engine.device, "params.yaml: priors.engine.device")
        self.precision = resolve_precision(params.precision, self._device, "priors.precision")
        print_device(self._device, self.precision)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        expected = (
            "a hub id (needs a network or a local copy) or a folder of an image-text model that transformers loads"
        )
        smaller = (
            "take a smaller one, priors.precision bf16 (half the memory of fp32), or priors.backend vllm with "
            "priors.engine.tensor_parallel GPUs for each model"
        )
        with Loading("priors.model", str(name), expected, smaller):
            self._processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, trust_remote_code=False)
            self._model = model.to(self._device).eval()
        crops = getattr(getattr(self._processor, "image_processor", None), "do_center_crop", False)
        if crops and scale_of(resolve_coord_space(str(name), params.coord_space)) != "unit_square":
            raise ConfigError(
                f"params.yaml: priors.coord_space: got {params.coord_space!r}, but the image processor of {name!r} "
                "crops images to a square, so that its coordinates are not the image's; set it to unit_square, which "
                "pads images to squares first, or set do_center_crop to false in the model's folder"
            )
        self._tokenizer = self._processor.tokenizer
        self._tokenizer.padding_side = "left"  # all responses of a batch start at the same position
        own = self._model.generation_config
        ends = own.eos_token_id if own.eos_token_id is not None else self._tokenizer.eos_token_id
        self._ends: list[int] = ends if isinstance(ends, list) else [ends]
        pad = self._tokenizer.pad_token_id
        # Ignore the model's own settings (temperature, penalties), meant for chats: decoding is greedy or seeded here.
        self._model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self._ends, pad_token_id=self._ends[0] if pad is None else pad
        )
        self._batch_size = params.engine.batch_size
        self._grammars = _Grammars(self._tokenizer, self._model) if params.is_structured else None

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Process `priors.engine.batch_size` requests at a time."""
        size = self._batch_size
        batches = [requests[start : start + size] for start in range(0, len(requests), size)]
        return [completion for batch in batches for completion in self._generate_batch(batch)]

    def _generate_batch(self, requests: Sequence[Request]) -> list[Completion]:
        chats = [_chat(request) for request in requests]
        inputs = self._processor.apply_chat_template(
            chats,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self._device, dtype=self._model.dtype)
        limits = [request.max_tokens for request in requests]
        steps: list[Processor] = [_SeededDraws(requests)]
        if self._grammars is not None:
            steps.insert(0, self._grammars.processor([request.schema for request in requests]))
        written = self._model.generate(
            **inputs, max_new_tokens=max(limits), logits_processor=LogitsProcessorList(steps)
        )[:, inputs["input_ids"].shape[1] :]
        prompt_tokens = inputs["attention_mask"].sum(dim=1).tolist()
        return [
            self._completion(tokens[:limit], count)
            for tokens, limit, count in zip(written.tolist(), limits, prompt_tokens, strict=True)
        ]

    def _completion(self, tokens: list[int], prompt_tokens: int) -> Completion:
        end = next((index for index, token in enumerate(tokens) if token in self._ends), len(tokens))
        text = self._tokenizer.decode(tokens[:end], skip_special_tokens=True)
        return Completion(text, prompt_tokens, min(end + 1, len(tokens)))


class _SeededDraws:
    """Keeps only the sampled token of each row, drawn at the request's temperature from the request's own seed.

    Each token consumes one random number of its request's generator and is found by inverting the cumulative
    probabilities. generate() itself would sample a whole batch from one generator. Greedy rows stay unchanged.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self._rows = [row for row, request in enumerate(requests) if request.temperature > 0]
        drawn = [requests[row] for row in self._rows]
        self._temperatures = torch.tensor([[request.temperature] for request in drawn])  # [rows, 1]
        self._numbers = [  # [max_tokens] in [0, 1)
            torch.rand(request.max_tokens, generator=torch.Generator().manual_seed(request.seed), dtype=torch.float64)
            for request in drawn
        ]
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._rows:
            return scores
        device = torch.device("cpu") if scores.device.type == "mps" else scores.device  # MPS has no float64
        logits = scores[self._rows].to(device, torch.float32) / self._temperatures.to(device)
        # A row longer than its request allows is cut later, so any number works.
        numbers = [float(own[min(self._step, len(own) - 1)]) for own in self._numbers]
        tokens = _tokens_at(torch.softmax(logits, dim=1), torch.tensor(numbers, dtype=torch.float64, device=device))
        self._step += 1
        drawn = scores.to(torch.float32, copy=True)
        drawn[self._rows] = torch.full_like(logits, -torch.inf).scatter_(1, tokens, 0.0).to(drawn)
        return drawn


def _tokens_at(probs: Tensor, shares: Tensor) -> Tensor:
    """Invert the cumulative distribution: probabilities [B, V] and shares [B] in [0, 1) -> token indices [B, 1].

    Sums are float32 within blocks of tokens and float64 over the blocks: float64 over the whole vocabulary takes
    eight times as long. A token of probability 0 is never chosen.
    """
    padded = torch.nn.functional.pad(probs, (0, -probs.shape[1] % DRAW_BLOCK))
    blocks = padded.reshape(len(probs), -1, DRAW_BLOCK)
    block, within = _entry_at(blocks.sum(dim=2).double(), shares[:, None])
    token, _ = _entry_at(blocks[torch.arange(len(blocks)), block[:, 0]].double(), within)
    return block * DRAW_BLOCK + token


def _entry_at(weights: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [B, N] float64 and shares [B, 1] of their sum -> index of the entry hit, and the position within it.

    Both [B, 1]; the position is a fraction of the entry's weight.
    """
    ends = weights.cumsum(dim=1)
    whole = ends[:, -1:]
    positions = torch.minimum(shares * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    entries = torch.searchsorted(ends, positions, right=True)  # the first entry that ends after the position
    return entries, (positions - (ends - weights).gather(1, entries)) / weights.gather(1, entries)


class _Grammars:
    """JSON schemas compiled for a model's tokenizer. Only this class uses xgrammar."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        try:
            import xgrammar  # type: ignore[import-not-found,unused-ignore]
            from xgrammar.contrib.hf import LogitsProcessor  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise ConfigError(
                "params.yaml: priors.structured_output: got true, which needs xgrammar for the transformers backend: "
                f"pip install -e '.[mllm]', or set it to false ({error})"
            ) from None
        vocabulary = model.config.get_text_config().vocab_size  # padding can make it larger than the tokenizer's
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary)
        self._compiler = xgrammar.GrammarCompiler(info)
        self._make = LogitsProcessor

    def processor(self, schemas: Sequence[Schema | None]) -> Processor:
        """Constrains each row of a batch to its schema; for a single call of generate()."""
        # No free white space, as in vLLM: small models emit it endlessly.
        texts = [json.dumps(schema) for schema in schemas]
        compiled = [
            self._compiler.compile_json_schema(text, any_whitespace=False, separators=(",", ":")) for text in texts
        ]
        return self._make(compiled)


def _chat(request: Request) -> list[dict[str, object]]:
    content = [{"type": "image", "image": request.image}, {"type": "text", "text": request.text}]
    return [{"role": "user", "content": content}]
