"""Supervised training on the labeled pairs: round 0 with priors, and in parallel the baseline without priors."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from l2l_core.artifacts import records
from l2l_core.config import Params, load_params
from l2l_core.core.files import copy_atomically, fingerprint, scratch_folder
from l2l_core.data.load import sentences_of
from l2l_core.errors import run_stage
from l2l_core.training.runs import (
    LABEL_INPUTS,
    PRIOR_INPUTS,
    labeled_stream,
    new_network,
    run_training,
    training_settings,
)
from l2l_core.training.side_by_side import Training, end_with_parent, train_all

WARMUP, SUPERVISED = "warmup", "supervised"
FOLDERS = {SUPERVISED: records.SUPERVISED_FOLDER, WARMUP: records.round_folder(0)}
"""Output folder of each training's model and curves."""


def main() -> None:
    """Train both networks on labels only, and write model/ and curves/ of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=FOLDERS, help="train this network alone; used by the parent process")
    parser.add_argument("--into", type=Path, help="folder of the network of --only")
    given, params = parser.parse_args(), load_params()
    if given.only is not None:
        end_with_parent()
        train_network(params, given.only, given.into)
        return
    sentences_of("labeled")  # report a missing split before creating a scratch folder
    # After a kill, a finished network is kept, and an unfinished one resumes from its checkpoint.
    key = fingerprint("round-0", f"{training_settings(params)} {params.warmup.steps}", [*LABEL_INPUTS, *PRIOR_INPUTS])
    with scratch_folder("round-0", key) as done:
        train_all(params, trainings_of(params, done), records.INDEX)
        for name, folder in FOLDERS.items():
            for part in ("model", "curves"):
                copy_atomically(done / name / part, folder / part)


def trainings_of(params: Params, into: Path) -> dict[str, Training]:
    """Both trainings, each with a separate folder."""
    return {
        name: Training(
            into / name / "model",
            partial(train_network, params, name, into / name),
            ["-m", "stages.warmup", "--only", name, "--into", str(into / name)],
        )
        for name in FOLDERS
    }


def train_network(params: Params, name: str, into: Path) -> None:
    """Train on all labeled pairs: `warmup` with priors, `supervised` without."""
    with_priors = name == WARMUP
    run_training(
        params,
        name,
        new_network(params, name, with_priors=with_priors),
        [labeled_stream(params, 1.0, with_priors=with_priors)],
        params.warmup.steps,
        [*LABEL_INPUTS, *(PRIOR_INPUTS if with_priors else ())],
        into / "model",
        into / "curves",
    )


if __name__ == "__main__":
    run_stage(main)
