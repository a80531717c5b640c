"""Loading pretrained models: whatever goes wrong becomes one line that names the parameter."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from safetensors import SafetensorError

from l2l_core.errors import ConfigError

LOADING_ERRORS = (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError, SafetensorError)
"""What transformers raises for a model that is missing, damaged, of another kind, or in need of a missing package."""


@dataclass(frozen=True)
class Loading:
    """A block that loads a model; whatever goes wrong in it becomes a ConfigError."""

    key: str  # parameter that names the model, such as priors.model
    name: str  # its value
    expected: str  # what it should be
    remedy: str = "take a smaller one"  # if the GPU's memory does not suffice

    def __enter__(self) -> None:
        from transformers.utils.logging import disable_progress_bar  # loaded by whoever loads a model

        if not sys.stderr.isatty():  # a bar of one line per step would fill a log
            disable_progress_bar()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            what = f"{self.name!r} does not fit into the GPU's memory; {self.remedy}"
            raise ConfigError(f"params.yaml: {self.key}: {what}") from None
        if isinstance(error, LOADING_ERRORS):
            raise not_loaded(self.key, self.name, self.expected, error) from None


def not_loaded(key: str, name: str, expected: str, reason: object) -> ConfigError:
    """The error for a model that cannot be used, for a reason."""
    return ConfigError(f"params.yaml: {key}: got {name!r}, expected {expected}: {' '.join(str(reason).split())[:300]}")
