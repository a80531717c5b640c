"""The latest round and the models of the last run in the current folder."""

from __future__ import annotations

import os
from pathlib import Path

from l2l_core.artifacts import records
from l2l_core.errors import ArtifactError, InputError


def rounds_with(part: str) -> list[int]:
    """The rounds that have `part` ("model", "pseudo_labels.parquet"), in ascending order."""
    rounds = records.round_folder(0).parent
    return sorted(int(path.parent.name) for path in rounds.glob(f"*/{part}") if path.parent.name.isdecimal())


def latest_round(part: str) -> int:
    """The highest round of the last run that has `part` ("model", "pseudo_labels.parquet").

    Later rounds on disk come from an earlier run, perhaps of another dataset: DVC does not remove outputs that it no
    longer needs. Raises ArtifactError if no round has `part`.
    """
    rounds, numbers = records.round_folder(0).parent, rounds_with(part)
    if not numbers:
        raise ArtifactError(f"{rounds}: no round has {part}; run the pipeline first (dvc repro) in the project's root")
    last = int(records.ROUND_PATH.read_text(encoding="utf-8")) if records.ROUND_PATH.is_file() else max(numbers)
    own = [round_number for round_number in numbers if round_number <= last]
    if not own:
        raise ArtifactError(
            f"{rounds}: no round up to {last} ({records.ROUND_PATH}: the last run) has {part}; later rounds come from "
            "an earlier run: run the pipeline with more rounds, or name the round"
        )
    return max(own)


def model_folder(run: Path | None, *, with_priors: bool = False) -> Path:
    """The folder of the distilled model, or with priors, or where none was distilled, of the latest round's model.

    run: folder of a round or of a model, used instead. Raises InputError if it is neither, or with priors the distilled
    model; ArtifactError if there is no round.
    """
    distilled = records.DISTILLED_FOLDER / "model"
    if run is None:
        if distilled.is_dir() and not with_priors:
            return distilled
        return records.round_folder(latest_round("model")) / "model"
    for folder in (run / "model", run):
        if os.path.isfile(folder / "config.json"):  # Path.is_file raises for a name that is too long
            if with_priors and folder.resolve() == distilled.resolve():
                raise InputError(f"--run: got {run}, whose model takes no priors; leave out --run or --with-priors")
            return folder
    raise InputError(f"--run: got {run}, expected a folder with a model, such as data/rounds/2")
