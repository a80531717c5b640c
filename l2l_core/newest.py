"""The newest round of the run in the current folder."""

from __future__ import annotations

from pathlib import Path

from l2l_core import records
from l2l_core.errors import ArtifactError, InputError


def newest_round(part: str) -> int:
    """The highest round that left `part` ("model", "pseudo_labels.parquet"). Raises ArtifactError where none did."""
    rounds = records.round_folder(0).parent
    numbers = [int(path.parent.name) for path in rounds.glob(f"*/{part}") if path.parent.name.isdecimal()]
    if not numbers:
        raise ArtifactError(f"{rounds}: no round has {part}; run the pipeline first (dvc repro) in the project's root")
    return max(numbers)


def model_folder(run: Path | None) -> Path:
    """Where the network lies: the newest round's, or `run`, which may be a round's folder or a model's.

    Raises InputError where `run` is neither, ArtifactError where there is no round.
    """
    if run is None:
        return records.round_folder(newest_round("model")) / "model"
    for folder in (run / "model", run):
        if (folder / "config.json").is_file():
            return folder
    raise InputError(f"--run: got {run}, expected a folder with a model, such as data/rounds/2")
