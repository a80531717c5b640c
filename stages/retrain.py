"""Train on the labelled pairs and on the pixels that the round's selection lets teach."""

from __future__ import annotations

import argparse

from l2l_core import records
from l2l_core.config import load_params
from l2l_core.engine.jobs import (
    LABEL_INPUTS,
    PRIOR_INPUTS,
    labeled_stream,
    new_network,
    pseudo_stream,
    run_training,
)
from l2l_core.errors import exit_code
from l2l_core.model.segmenter import Segmenter


def main() -> None:
    """Write model/ and curves/ of a round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--round", type=int, required=True)
    number = parser.parse_args().round
    params = load_params()
    folder, previous = records.round_folder(number), records.round_folder(number - 1) / "model"
    purpose = f"retrain-{number}"
    pseudo = pseudo_stream(params, folder / "pseudo_labels.parquet", 1 - params.retrain.labeled_share)
    labeled = labeled_stream(params, 1.0 if pseudo is None else params.retrain.labeled_share)
    if pseudo is None:
        print(f"round {number}: the selection accepted nothing, training on the labelled pairs alone")
    fresh = params.retrain.start == "scratch"
    run_training(
        params,
        purpose,
        new_network(params, purpose) if fresh else Segmenter.load(previous),
        [labeled] if pseudo is None else [labeled, pseudo],
        params.retrain.steps,
        # Where it starts from the last model, that is an input too: checkpoints of the two ways must not be mixed up.
        [*LABEL_INPUTS, *PRIOR_INPUTS, folder / "pseudo_labels.parquet", *(() if fresh else (previous,))],
        folder / "model",
        folder / "curves",
    )


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
