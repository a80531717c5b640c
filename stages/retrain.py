"""Train on the labeled pairs and on the valid pixels of the round's accepted pseudo-labels."""

from __future__ import annotations

import argparse

from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.core.progress import is_first_process
from l2l_core.errors import exit_code
from l2l_core.model.segmenter import Segmenter
from l2l_core.training.runs import (
    LABEL_INPUTS,
    PRIOR_INPUTS,
    method_of,
    new_network,
    round_streams,
    run_training,
    with_prior_swap,
)


def main() -> None:
    """Write model/ and curves/ of a round.

    With the method `mean_teacher`, the EMA teacher labels the unlabeled pairs during training. Training then starts
    from the last round's model for any `retrain.start`, since a random teacher gives useless labels.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--round", type=int, required=True)
    number = parser.parse_args().round
    params = load_params()
    folder, previous = records.round_folder(number), records.round_folder(number - 1) / "model"
    run_name, pseudo_path = f"retrain-{number}", folder / "pseudo_labels.parquet"
    streams = round_streams(params, pseudo_path)
    if len(streams) == 1 and is_first_process():
        print(f"round {number}: the selection accepted nothing, training on the labeled pairs alone")
    fresh = params.retrain.start == "scratch" and method_of(pseudo_path) != "mean_teacher"
    network = new_network(params, run_name) if fresh else Segmenter.load(previous)
    network.num_passes = params.retrain.num_passes
    run_training(
        params,
        run_name,
        network,
        with_prior_swap(params, streams),
        params.retrain.steps,
        # If training starts from the last model, that is an input too, so the two ways never share a checkpoint.
        [*LABEL_INPUTS, *PRIOR_INPUTS, pseudo_path, *(() if fresh else (previous,))],
        folder / "model",
        folder / "curves",
    )


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
