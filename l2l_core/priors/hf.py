"""Models in the Hugging Face layout, run by transformers: the slowest engine, and the one that runs everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from l2l_core.config import PriorsParams
from l2l_core.device import choose_device, print_device, resolve_precision
from l2l_core.errors import ConfigError
from l2l_core.optional import hidden
from l2l_core.priors.mllm import Completion, Request
from l2l_core.priors.prompt import Schema

with hidden("scipy", "sklearn"):  # for losses of detectors, and drafts by a second model
    from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, LogitsProcessorList

Processor = Callable[[Tensor, Tensor], Tensor]  # token ids [B, L], logits [B, V] -> logits [B, V]


class TransformersEngine:
    """One model in this process. Raises ConfigError where it cannot be loaded or xgrammar is wanted and missing."""

    def __init__(self, params: PriorsParams) -> None:
        name = params.model
        self._device = choose_device(params.engine.device, "priors.engine.device")
        self.precision = resolve_precision(params.precision, self._device, "priors.precision")
        print_device(self._device, self.precision)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        try:
            self._processor = AutoProcessor.from_pretrained(name)
            self._model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(self._device).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"params.yaml: priors.model: got {name!r}, expected a hub id (needs a network or a local copy) or a "
                f"folder of an image-text model that transformers loads: {reason}"
            ) from None
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"params.yaml: priors.model: {name!r} does not fit into the GPU's memory; take a smaller one, or "
                "priors.backend vllm with priors.engine.tensor_parallel GPUs for each model"
            ) from None
        self._tokenizer = self._processor.tokenizer
        self._tokenizer.padding_side = "left"  # so that all answers of a batch begin at the same place
        own = self._model.generation_config
        ends = own.eos_token_id if own.eos_token_id is not None else self._tokenizer.eos_token_id
        self._ends: list[int] = ends if isinstance(ends, list) else [ends]
        pad = self._tokenizer.pad_token_id
        # Not the model's own settings (temperature, penalties), which are for chats: answers are greedy or drawn here.
        self._model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self._ends, pad_token_id=self._ends[0] if pad is None else pad
        )
        self._batch_size = params.engine.batch_size
        self._grammars = _Grammars(self._tokenizer, self._model) if params.is_structured else None

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer `priors.engine.batch_size` requests at a time."""
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
        end = next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens))
        text = self._tokenizer.decode(tokens[:end], skip_special_tokens=True)
        return Completion(text, prompt_tokens, min(end + 1, len(tokens)))


class _SeededDraws:
    """Makes the largest logit of a row a draw at the request's temperature, from the request's own seed.

    By the Gumbel-max trick, since generate() itself draws a whole batch from one generator. Greedy rows stay.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        self._generators = [torch.Generator().manual_seed(request.seed) for request in requests]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = scores.float()
        for row, (request, generator) in enumerate(zip(self._requests, self._generators, strict=True)):
            if request.temperature > 0:
                uniform = torch.rand(scores.shape[1], generator=generator, dtype=torch.float64).clamp(min=1e-300)
                noise = -torch.log(-torch.log(uniform))
                drawn[row] = drawn[row] / request.temperature + noise.to(drawn)
        return drawn


class _Grammars:
    """JSON schemas compiled for a model's tokenizer. The only place that knows xgrammar."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        try:
            import xgrammar  # type: ignore[import-not-found,unused-ignore]
            from xgrammar.contrib.hf import LogitsProcessor  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise ConfigError(
                "params.yaml: priors.structured_output: got true, which needs xgrammar for the transformers backend: "
                f"pip install -r requirements-mllm.txt, or set it to false ({error})"
            ) from None
        vocabulary = model.config.get_text_config().vocab_size  # may be larger than the tokenizer's, by padding
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary)
        self._compiler = xgrammar.GrammarCompiler(info)
        self._make = LogitsProcessor

    def processor(self, schemas: Sequence[Schema | None]) -> Processor:
        """What keeps each row of one batch to its schema; for a single call of generate()."""
        # Without white space, as vLLM does: small models lose themselves in it.
        texts = [json.dumps(schema) for schema in schemas]
        compiled = [
            self._compiler.compile_json_schema(text, any_whitespace=False, separators=(",", ":")) for text in texts
        ]
        return self._make(compiled)


def _chat(request: Request) -> list[dict[str, object]]:
    content = [{"type": "image", "image": request.image}, {"type": "text", "text": request.text}]
    return [{"role": "user", "content": content}]
