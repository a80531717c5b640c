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
    labeled_stream,
    method_of,
    new_network,
    online_stream,
    pseudo_stream,
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
    round_number = parser.parse_args().round
    params = load_params()
    folder, previous = records.round_folder(round_number), records.round_folder(round_number - 1) / "model"
    run_name, pseudo_path = f"retrain-{round_number}", folder / "pseudo_labels.parquet"
    online, share = method_of(pseudo_path) == "mean_teacher", 1 - params.retrain.labeled_share
    pseudo = online_stream(params, share) if online else pseudo_stream(params, pseudo_path, share)
    labeled = labeled_stream(params, 1.0 if pseudo is None else params.retrain.labeled_share)
    if pseudo is None and is_first_process():
        print(f"round {round_number}: the selection accepted nothing, training on the labeled pairs alone")
    fresh = params.retrain.start == "scratch" and not online
    network = new_network(params, run_name) if fresh else Segmenter.load(previous)
    network.num_passes = params.retrain.num_passes
    run_training(
        params,
        run_name,
        network,
        with_prior_swap(params, [labeled] if pseudo is None else [labeled, pseudo]),
        params.retrain.steps,
        # If training starts from the last model, that is an input too, so the two ways never share a checkpoint.
        [*LABEL_INPUTS, *PRIOR_INPUTS, pseudo_path, *(() if fresh else (previous,))],
        folder / "model",
        folder / "curves",
    )


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
