"""Checkpoints from which a killed training resumes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from l2l_core.core.files import file_sha256, move_aside
from l2l_core.core.progress import is_first_process, logger
from l2l_core.errors import writing

KEPT_DIGESTS = 8
"""Digests that are kept beside a checkpoint, the latest first."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write atomically: a kill leaves either the old checkpoint or the complete new one.

    A file NAME.sha256 beside it holds the latest digests, so that a kill between the two replacements does no harm.
    """
    temporary, digests = path.with_suffix(".tmp"), digests_path(path)
    with writing(path):
        with temporary.open("wb") as file:  # given a path, PyTorch does not say why a write failed
            torch.save(state, file)
        # Several, since kills between the replacements may follow each other.
        previous = _digests_of(path)[: KEPT_DIGESTS - 1]
        building = digests.with_suffix(".tmp")
        building.write_text("\n".join([file_sha256(temporary), *previous]) + "\n", encoding="ascii")
    os.replace(building, digests)
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Load the checkpoint to the CPU, or return None if it does not exist.

    A file that is not as it was written is moved aside with a note, and None is returned.
    """
    if not path.exists():
        return None
    if not is_intact(path):
        if is_first_process():
            logger.warning(f"note: {path}: torn or changed, moved to {move_aside(path).name}; training anew")
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def is_intact(path: Path) -> bool:
    """Whether a checkpoint has one of the digests that `save_checkpoint` wrote beside it."""
    return file_sha256(path) in _digests_of(path)


def digests_path(path: Path) -> Path:
    """The file with the SHA-256 digests of a checkpoint."""
    return path.with_name(f"{path.name}.sha256")


def _digests_of(path: Path) -> list[str]:
    """The readable digests beside a checkpoint, the latest first."""
    digests = digests_path(path)
    text = digests.read_text(encoding="ascii", errors="replace") if digests.is_file() else ""
    return re.findall(r"\b[0-9a-f]{64}\b", text)
