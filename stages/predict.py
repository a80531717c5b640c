"""Predict masks of the evaluated sentences with a round's model, with and without priors; add them to the history."""

from __future__ import annotations

import argparse

from l2l_core.config import load_params
from l2l_core.errors import run_stage
from l2l_core.evaluation.predict import extend_history


def main() -> None:
    """Write a round's history/: predictions, pseudo-labels and curves of this and all earlier rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--round", type=int, required=True)
    extend_history(load_params(), parser.parse_args().round)


if __name__ == "__main__":
    run_stage(main)
