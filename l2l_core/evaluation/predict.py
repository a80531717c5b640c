"""The evaluated sentences' masks by a round's model or the distilled one, added to the history of the rounds before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from l2l_core.artifacts import records
from l2l_core.artifacts.curves import read_curve, read_rows, write_rows
from l2l_core.config import Params
from l2l_core.core.device import print_device
from l2l_core.core.files import atomic_dir, fingerprint, scratch_folder
from l2l_core.data.load import batches_of, pairs_of
from l2l_core.evaluation.history import POLICY_COLUMNS, TRAINING_COLUMNS
from l2l_core.model.batch_predictor import BatchPredictor

Rows = list[dict[str, str]]
"""Rows of a CSV file, as text."""


def extend_history(params: Params, round_number: int) -> None:
    """Write history/ of a round: the previous round's history plus this round's predictions, labels and curves.

    predictions.parquet (records.PREDICTIONS), pseudo_labels.parquet (records.PSEUDO_LABELS), training.csv, policy.csv.
    Reads no ground truth. Round 0 also holds the supervised-only model.
    """
    folder = records.round_folder(round_number)
    if round_number == 0:
        predictions = predict(params, records.SUPERVISED_FOLDER / "model", "supervised", [False])
        training = training_rows(records.SUPERVISED_FOLDER / "curves", "supervised")
        labels = [records.PSEUDO_LABELS.empty_table()]
        policy: Rows = []
    else:
        predictions, labels, training, policy = _history_of(round_number - 1)
        labels.append(records.read_table(folder / "pseudo_labels.parquet", records.PSEUDO_LABELS))
        policy += [{"round": str(round_number), **row} for row in read_rows(folder / "policy.csv")]
    name = f"round_{round_number}"
    predictions += predict(params, folder / "model", name, [True, False])
    training += training_rows(folder / "curves", name)
    _write_history(folder, predictions, labels, training, policy)


def add_distilled(params: Params, round_number: int) -> None:
    """Write history/ of the distilled model: a round's history plus this model's predictions without priors."""
    folder, name = records.DISTILLED_FOLDER, "distilled"
    predictions, labels, training, policy = _history_of(round_number)
    predictions += predict(params, folder / "model", name, [False])
    training += training_rows(folder / "curves", name)
    _write_history(folder, predictions, labels, training, policy)


def _history_of(round_number: int) -> tuple[list[pa.Table], list[pa.Table], Rows, Rows]:
    """A round's predictions, pseudo-labels, training curves and policy curves."""
    folder = records.round_folder(round_number) / "history"
    return (
        [records.read_table(folder / "predictions.parquet", records.PREDICTIONS)],
        [records.read_table(folder / "pseudo_labels.parquet", records.PSEUDO_LABELS)],
        read_rows(folder / "training.csv"),
        read_rows(folder / "policy.csv"),
    )


def _write_history(
    folder: Path, predictions: list[pa.Table], labels: list[pa.Table], training: Rows, policy: Rows
) -> None:
    with atomic_dir(folder / "history") as out:
        records.write_table(pa.concat_tables(predictions), out / "predictions.parquet", records.PREDICTIONS)
        records.write_table(pa.concat_tables(labels), out / "pseudo_labels.parquet", records.PSEUDO_LABELS)
        write_rows(out / "training.csv", TRAINING_COLUMNS, training)
        write_rows(out / "policy.csv", POLICY_COLUMNS, policy)


def predict(params: Params, model: Path, name: str, with_prior: Sequence[bool]) -> list[pa.Table]:
    """Masks of all evaluated sentences by one model (records.PREDICTIONS), for each entry of `with_prior`.

    A killed call resumes: finished chunks stay in .scratch.
    """
    pairs = pairs_of(params, "eval", with_priors=any(with_prior))
    predictor = BatchPredictor.from_run(model, params.train)
    print_device(predictor.device, predictor.precision)
    tables = [records.SPLIT_PATH, records.INDEX.refs, records.INDEX.images]
    tables += [records.PRIORS_PATH, records.PROPOSALS_PATH] if any(with_prior) else []
    settings = f"{params.model.image_size_px} {params.evaluate.batch_size} {predictor.precision} {with_prior}"
    settings += f" {params.proposals.size_px} {params.proposals.flat_prob}"
    with scratch_folder("masks", fingerprint(name, settings, [model, *tables])) as folder:
        batches, size = batches_of(params, pairs), params.evaluate.batch_size
        masks = predictor.masks(batches, size, with_prior, name, folder=folder)
    count = len(pairs)
    columns = {
        "sent_id": pairs.sent_id,
        "height": pairs.hw[:, 0].astype("int32"),
        "width": pairs.hw[:, 1].astype("int32"),
    }
    return [
        pa.table(
            columns | {"model": [name] * count, "with_prior": [shown] * count, "rle_counts": found},
            schema=records.PREDICTIONS,
        )
        for shown, found in zip(with_prior, masks, strict=True)
    ]


def training_rows(curves: Path, model: str) -> Rows:
    """A DVCLive folder as rows of TRAINING_COLUMNS."""
    return [{"model": model, **row} for row in read_curve(curves, TRAINING_COLUMNS[2:])]
