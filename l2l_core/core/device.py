"""Choice of device and precision, based on what PyTorch reports about the hardware."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from l2l_core.config import TrainParams
from l2l_core.core.progress import is_first_process, logger
from l2l_core.errors import ConfigError

Precision = Literal["bf16", "fp32"]

CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""PyTorch's names of the CPU instructions that multiply bf16 numbers: two of x86, two of ARM."""


def choose_device(name: str, source: str = "params.yaml: train.engine.device") -> torch.device:
    """The device of a name: auto, cpu, cuda, cuda:N, or mps; `auto` is CUDA if available, else the CPU.

    Apple GPUs (`mps`) must be named explicitly, because PyTorch lacks some operations there. source: where the name
    comes from, for messages. Raises ConfigError if the name is another one or PyTorch does not find the device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = re.fullmatch(r"cpu|mps|cuda(?::(\d+))?", name)
    if kind is None:
        raise ConfigError(f"{source}: got {name!r}, expected auto, cpu, cuda, cuda:N, or mps")
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0  # a driver may be too old for torch
        if int(kind[1] or 0) >= count:
            found = f"{count} CUDA device(s)" if count else "no CUDA device"
            raise ConfigError(f"{source}: got {name!r}, but torch sees {found}; use auto or cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"{source}: got 'mps', but torch sees no Apple GPU; use auto or cpu")
    return torch.device(name)


def computes_bf16(device: torch.device) -> bool:
    """Whether the device supports bf16 natively. Other devices emulate it, many times slower than fp32."""
    match device.type:
        case "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)  # compute capability 8.0, or ROCm
        case "mps":
            return torch.backends.mps.is_macos_or_newer(14, 0)
        case _:
            known = torch.cpu.get_capabilities()
            # oneDNN has the fast kernels; without it PyTorch computes bf16 in plain loops.
            has_kernels: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
            return has_kernels and any(known.get(name, False) for name in CPU_BF16)


def resolve_precision(
    setting: str, device: torch.device, key: str = "train.precision", file: str = "params.yaml"
) -> Precision:
    """Resolve `auto` to bf16 if the device supports it natively, else to fp32; `bf16` and `fp32` stay.

    key, file: the source of an explicit bf16. If the device emulates bf16, one warning names them.
    """
    return "fp32" if setting == "fp32" else precision_where(computes_bf16(device), setting, device.type, key, file)


def precision_where(native: bool, setting: str, kind: str, key: str, file: str = "params.yaml") -> Precision:
    """`resolve_precision` for a device given by its kind and by whether it supports bf16 natively."""
    if setting == "bf16" and not native:
        _warn_of_emulation(file, key, kind)
    return "bf16" if setting == "bf16" or (native and setting == "auto") else "fp32"


def resolved_train(train: TrainParams) -> TrainParams:
    """The parameters with the device and precision that `auto` stands for here, so that all workers take the same."""
    device = choose_device(train.engine.device)
    engine = train.engine.model_copy(update={"device": device.type})
    return train.model_copy(update={"engine": engine, "precision": resolve_precision(train.precision, device)})


def device_state(device: torch.device, precision: Precision, threads: int) -> str:
    """What the last bits of a network's outputs depend on: `cpu fp32 2`. On a GPU the threads do not count."""
    return f"{device.type} {precision} {threads}" if device.type == "cpu" else f"{device.type} {precision}"


def to_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move tensors to a device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Autocast context for a precision; fp32 changes nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def describe_device(device: torch.device, precision: Precision) -> str:
    """`cpu (2 threads), fp32` or `cuda (NVIDIA H100), bf16`."""
    kind = f"{torch.get_num_threads()} threads" if device.type == "cpu" else "Apple GPU"
    return f"{device.type} ({torch.cuda.get_device_name(device) if device.type == 'cuda' else kind}), {precision}"


@cache
def print_device(device: torch.device, precision: Precision) -> None:
    """Print `device: cpu (2 threads), fp32`, once per process, however many networks it loads."""
    if is_first_process():
        logger.info(f"device: {describe_device(device, precision)}")


@cache
def _warn_of_emulation(file: str, key: str, kind: str) -> None:
    if is_first_process():
        logger.warning(
            f"warning: {file}: {key}: got 'bf16', which this {kind} emulates, many times slower than fp32; "
            "use auto or fp32"
        )
