"""The evaluated sentences' masks by a round's model or the distilled one, added to the history of the rounds before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pyarrow as pa

from l2l_core.artifacts import records
from l2l_core.artifacts.curves import read_curve, read_rows, write_rows
from l2l_core.config import Params
from l2l_core.core.device import choose_device, device_state, print_device, resolve_precision, resolved_train
from l2l_core.core.files import atomic_dir, fingerprint, scratch_folder
from l2l_core.data.load import batches_of, pairs_of
from l2l_core.data.pairs import Pairs
from l2l_core.evaluation.history import POLICY_COLUMNS, TRAINING_COLUMNS
from l2l_core.model.batch_predictor import BatchPredictor, chunks_of
from l2l_core.workers.chunks import Work, check_gpus, map_chunks, worker_threads

MASKS = pa.schema([("sent_id", pa.int64()), ("masks", pa.list_(pa.binary()))])
"""A chunk of `predict`: for each pair a mask as run lengths per entry of `with_prior`."""
Rows = list[dict[str, str]]
"""Rows of a CSV file, as text."""


def extend_history(params: Params, round_number: int) -> None:
    """Write history/ of a round: the previous round's history plus this round's predictions, labels and curves.

    predictions.parquet (records.PREDICTIONS), pseudo_labels.parquet (records.PSEUDO_LABELS), training.csv, policy.csv.
    Reads no ground truth. Round 0 also holds the supervised-only model.
    """
    folder, name = records.round_folder(round_number), f"round_{round_number}"
    with ExitStack() as until_written:
        if round_number == 0:
            supervised = records.SUPERVISED_FOLDER
            predictions = predict(params, supervised / "model", "supervised", [False], until_written)
            training = training_rows(supervised / "curves", "supervised")
            labels = [records.PSEUDO_LABELS.empty_table()]
            policy: Rows = []
        else:
            predictions, labels, training, policy = _history_of(round_number - 1)
            labels.append(records.read_table(folder / "pseudo_labels.parquet", records.PSEUDO_LABELS))
            policy += [{"round": str(round_number), **row} for row in read_rows(folder / "policy.csv")]
        predictions += predict(params, folder / "model", name, [True, False], until_written)
        training += training_rows(folder / "curves", name)
        _write_history(folder, predictions, labels, training, policy)


def add_distilled(params: Params, round_number: int) -> None:
    """Write history/ of the distilled model: a round's history plus this model's predictions without priors."""
    folder, name = records.DISTILLED_FOLDER, "distilled"
    predictions, labels, training, policy = _history_of(round_number)
    with ExitStack() as until_written:
        predictions += predict(params, folder / "model", name, [False], until_written)
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


def predict(
    params: Params, model: Path, name: str, with_prior: Sequence[bool], until_written: ExitStack
) -> list[pa.Table]:
    """Masks of all evaluated sentences by one model (records.PREDICTIONS), for each entry of `with_prior`.

    A killed call resumes: finished chunks stay in .scratch until `until_written` closes without an error. The caller
    closes it after it has stored the result.
    """
    pairs = pairs_of(params, "eval", with_priors=any(with_prior))
    params = params.model_copy(update={"train": resolved_train(params.train)})
    device = choose_device(params.train.engine.device)
    precision = resolve_precision(params.train.precision, device)
    print_device(device, precision)
    check_gpus(params.cluster, device.type)
    tables = [records.SPLIT_PATH, records.INDEX.refs, records.INDEX.images]
    tables += [records.PRIORS_PATH, records.PROPOSALS_PATH] if any(with_prior) else []
    state = device_state(device, precision, worker_threads(params.cluster))
    settings = f"{params.model.image_size_px} {params.evaluate.batch_size} {state} {with_prior}"
    settings += f" {params.proposals.size_px} {params.proposals.flat_prob}"
    chunks = chunks_of(pairs, params.evaluate.batch_size)
    work = Work(
        what=name,
        ids=[pairs.sent_id[rows] for rows in chunks],
        schema=MASKS,
        load=lambda number: pairs.only(chunks[number]),
        start=partial(_start_predicting, params, model, with_prior),
    )
    masks = [[b""] * len(pairs) for _ in with_prior]
    folder = until_written.enter_context(scratch_folder("masks", fingerprint(name, settings, [model, *tables])))
    for number, table in map_chunks(work, params.cluster, folder):
        for row, found in zip(chunks[number].tolist(), table["masks"].to_pylist(), strict=True):
            for some, mask in zip(masks, found, strict=True):
                some[row] = mask
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


def _start_predicting(params: Params, model: Path, with_prior: Sequence[bool]) -> Callable[[Pairs], Iterator[pa.Table]]:
    """The prediction of a chunk of pairs (MASKS), batch by batch, with the network loaded once."""
    predictor = BatchPredictor.from_run(model, params.train)

    def predicted(pairs: Pairs) -> Iterator[pa.Table]:
        batches, size = batches_of(params, pairs), params.evaluate.batch_size
        for rows, masks in predictor.batched_masks(batches, size, with_prior, None):
            columns = {"sent_id": pairs.sent_id[rows], "masks": [list(some) for some in zip(*masks, strict=True)]}
            yield pa.table(columns, schema=MASKS)

    return predicted


def training_rows(curves: Path, model: str) -> Rows:
    """A DVCLive folder as rows of TRAINING_COLUMNS."""
    return [{"model": model, **row} for row in read_curve(curves, TRAINING_COLUMNS[2:])]
