"""Results of all rounds so far and of the distilled model: predictions, pseudo-labels and learning curves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from l2l_core.artifacts import records
from l2l_core.errors import ArtifactError

TRAINING_COLUMNS = ("model", "step", "loss", "bce", "dice", "lr")
POLICY_COLUMNS = ("round", "step", "reward", "keep_rate", "accept_rate", "entropy", "advantage_std")

PSEUDO_LABEL_COLUMNS = [name for name in records.PSEUDO_LABELS.names if name != "weight"]
"""All but the maps of pixel weights, which take most of the space and which only training needs."""


@dataclass(frozen=True)
class History:
    """Results of the rounds 0..k."""

    predictions: pa.Table  # records.PREDICTIONS of the supervised model, every round and the distilled model
    pseudo_labels: pa.Table  # PSEUDO_LABEL_COLUMNS of the rounds 1..k
    training: pd.DataFrame  # model, step, loss and its parts
    policy: pd.DataFrame  # round, step, reward and more; no row without a trained policy


def read_history(folder: Path) -> History:
    """Read the history of a round. Raises ArtifactError if a part is missing."""
    return History(
        records.read_table(folder / "predictions.parquet", records.PREDICTIONS),
        records.read_table(folder / "pseudo_labels.parquet", records.PSEUDO_LABELS, PSEUDO_LABEL_COLUMNS),
        _read_curve(folder / "training.csv", "model"),
        _read_curve(folder / "policy.csv", "round"),
    )


def last_predictions(history: History, last_round: int) -> pa.Table:
    """The predictions with priors of the last round and of the one before."""
    models = pa.array([f"round_{last_round}", f"round_{last_round - 1}"])
    return history.predictions.filter(pc.field("with_prior") & pc.field("model").isin(models))


def last_pseudo_labels(history: History, last_round: int) -> pa.Table:
    """The pseudo-labels of the last round and of the one before."""
    return history.pseudo_labels.filter(pc.field("round") >= last_round - 1)


def _read_curve(path: Path, by: str) -> pd.DataFrame:
    try:
        curve = pd.read_csv(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: not found, run the stage that writes it: dvc repro") from None
    except (ValueError, UnicodeDecodeError) as error:  # pandas' parser errors are ValueErrors
        raise ArtifactError(f"{path}: not a CSV file: {error}") from None
    if by not in curve or "step" not in curve:
        raise ArtifactError(f"{path}: columns {list(curve)}, expected {by} and step among them")
    return curve
