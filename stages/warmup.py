"""Supervised training on the labelled pairs: round 0, or the supervised-only baseline with --without-priors."""

from __future__ import annotations

import argparse

from l2l_core import records
from l2l_core.config import load_params
from l2l_core.engine.jobs import LABEL_INPUTS, PRIOR_INPUTS, labeled_stream, new_network, run_training
from l2l_core.errors import exit_code


def main() -> None:
    """Train on labels only and write model/ and curves/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--without-priors", action="store_true", help="never show the network a prior")
    with_priors = not parser.parse_args().without_priors
    params = load_params()
    purpose = "warmup" if with_priors else "supervised"
    folder = records.round_folder(0) if with_priors else records.SUPERVISED_FOLDER
    run_training(
        params,
        purpose,
        new_network(params, purpose, with_priors=with_priors),
        [labeled_stream(params, 1.0, with_priors=with_priors)],
        params.warmup.steps,
        [*LABEL_INPUTS, *(PRIOR_INPUTS if with_priors else ())],
        folder / "model",
        folder / "curves",
    )


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
