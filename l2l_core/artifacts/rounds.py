"""The latest round and the models of the last run in the current folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from l2l_core.artifacts import records
from l2l_core.core.progress import logger
from l2l_core.errors import DOCTOR, ArtifactError, InputError


def rounds_with(part: str) -> list[int]:
    """The rounds that have `part` ("model", "pseudo_labels.parquet"), in ascending order."""
    rounds = records.round_folder(0).parent
    return sorted(int(path.parent.name) for path in rounds.glob(f"*/{part}") if path.parent.name.isdecimal())


def latest_round(part: str) -> int:
    """The highest round of the last run that has `part` ("model", "pseudo_labels.parquet").

    Later rounds on disk come from an earlier run, perhaps of another dataset: DVC does not remove outputs that it no
    longer needs. Raises ArtifactError if no round has `part` or the record of the last run is torn.
    """
    rounds, numbers = records.round_folder(0).parent, rounds_with(part)
    if not numbers:
        raise ArtifactError(f"{rounds}: no round has {part}; run the pipeline first (dvc repro) in the project's root")
    last = _round_of_last_run(default=max(numbers))
    own = [round_number for round_number in numbers if round_number <= last]
    if not own:
        raise ArtifactError(
            f"{rounds}: no round up to {last} ({records.ROUND_PATH}: the last run) has {part}; later rounds come from "
            "an earlier run: run the pipeline with more rounds, or name the round"
        )
    return max(own)


def _round_of_last_run(default: int) -> int:
    if not records.ROUND_PATH.is_file():
        return default
    try:
        return int(records.ROUND_PATH.read_bytes())
    except ValueError:
        raise ArtifactError(f"{records.ROUND_PATH}: not a number; {DOCTOR}") from None


def model_folder(run: Path | None, *, with_priors: bool = False) -> Path:
    """The folder of the latest round's model, or without priors of the model distilled from it.

    Without a model that was distilled from the latest round's, the folder of the latter is returned, with a note if the
    distilled model comes from an earlier run. run: folder of a round or of a model, used instead. Raises InputError if
    it is neither, or with priors one whose model takes none; ArtifactError if there is no round.
    """
    if run is None:
        distilled = records.DISTILLED_FOLDER / "model"
        if distilled.is_dir() and not with_priors and not rounds_with("model"):
            return distilled
        of_round = records.round_folder(latest_round("model")) / "model"
        if with_priors or not distilled.is_dir():
            return of_round
        if _stated(distilled, "distilled_from") == _stated(of_round, "sha256"):
            return distilled
        note = f"note: {distilled} was not distilled from {of_round}, which is used instead; dvc repro updates it"
        logger.warning(note)
        return of_round
    for folder in (run / "model", run):
        if os.path.isfile(folder / "config.json"):  # Path.is_file raises for a name that is too long
            if with_priors and _stated(folder, "takes_priors") is False:
                raise InputError(f"--run: got {run}, whose model takes no priors; leave out --run or --with-priors")
            return folder
    raise InputError(f"--run: got {run}, expected a folder with a model, such as data/rounds/2")


def _stated(model: Path, key: str) -> object:
    """A value of a model folder's config.json; None if the file or the key is missing or unusable."""
    try:
        return json.loads((model / "config.json").read_bytes()).get(key)
    except (OSError, ValueError, AttributeError):
        return None
