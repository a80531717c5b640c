"""Predict masks of the evaluated sentences with a round's model or the distilled one, and add them to the history."""

from __future__ import annotations

import argparse

from l2l_core.config import load_params
from l2l_core.errors import run_stage
from l2l_core.evaluation.predict import add_distilled, extend_history


def main() -> None:
    """Write a round's history/: predictions, pseudo-labels and curves of this and all earlier rounds.

    With --distilled, write the distilled model's history/ instead: that of the round, and its own predictions.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--round", type=int, required=True)
    parser.add_argument("--distilled", action="store_true")
    given = parser.parse_args()
    write = add_distilled if given.distilled else extend_history
    write(load_params(), given.round)


if __name__ == "__main__":
    run_stage(main)
