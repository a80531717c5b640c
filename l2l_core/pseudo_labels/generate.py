"""Candidate masks from a teacher, their features, and their scores against the ground truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from l2l_core.artifacts import records
from l2l_core.config import Params, TrainParams
from l2l_core.core.arrays import BoolArray, FloatArray
from l2l_core.core.device import choose_device, device_state, resolve_precision, resolved_train
from l2l_core.core.files import fingerprint, folder_state
from l2l_core.core.masks import encode_rle, resize_prob
from l2l_core.core.progress import progress
from l2l_core.core.threads import prefetch
from l2l_core.data.folds import fold_by_image, fold_of_images
from l2l_core.data.load import batches_of, labeled_targets, pairs_of
from l2l_core.data.pairs import BatchMaker, Pairs, Targets, load_targets
from l2l_core.data.views import Views
from l2l_core.errors import InputError
from l2l_core.model.batch_predictor import BatchPredictor, batched_rows, chunks_of
from l2l_core.pseudo_labels.candidates import build_candidates
from l2l_core.pseudo_labels.features import (
    CELL_FEATURES,
    LABEL_THRESHOLD,
    SENTENCE_FEATURES,
    Candidates,
    CandidateTruth,
    compute_features,
    concatenate,
    confident_pixels,
    expand_cells,
    score_candidates,
)
from l2l_core.pseudo_labels.neighbors import Neighbors
from l2l_core.pseudo_labels.policy import Policy
from l2l_core.pseudo_labels.rules import semires_weight
from l2l_core.pseudo_labels.sam_masks import Match, SamMasks, sam_masks_of
from l2l_core.pseudo_labels.select import Selection, rank, select_labels
from l2l_core.workers.chunks import Work, check_gpus, chunk_path, map_chunks, worker_threads


@dataclass(frozen=True)
class PseudoLabelCandidates:
    """Candidate pseudo-labels of N pairs. Masks have the size of their images and are run-length encoded."""

    pairs: Pairs
    candidates: list[list[bytes]]  # for each pair, one per name in `SelectParams.candidate_names`
    confident: list[bytes]  # `threshold`: pixels that reach the fixed confidence threshold; else empty
    weight: list[bytes]  # `semires`: pixel weights, as in records.PSEUDO_LABELS; else empty
    matched: list[bool] = field(default_factory=list)  # `semires`: whether a mask of SAM replaces the teacher's


LABELED = pa.schema(
    [
        ("sent_id", pa.int64()),
        ("candidates", pa.list_(pa.binary())),
        ("confident", pa.binary()),
        ("weight", pa.binary()),
        ("matched", pa.bool_()),
        ("cells", pa.binary()),
        ("sentence", pa.binary()),
        ("confidence", pa.float32()),
        ("prior_iou", pa.float32()),
    ]
)
"""A chunk of `label_unlabeled`: PseudoLabelCandidates and Candidates of some pairs, the features as raw arrays."""


LoadTeacher = Callable[[TrainParams], BatchPredictor]


@dataclass(frozen=True)
class LabeledPairs:
    """Candidates and features of N unlabeled pairs, in chunks. Memory holds the pairs and two numbers of each."""

    params: Params
    pairs: Pairs
    chunks: list[NDArray[np.int64]]  # rows of the pairs in each
    tables: list[pa.Table | Path]  # LABELED of each
    confidence: FloatArray  # [N] as in Candidates
    prior_iou: FloatArray  # [N]

    def take(self, rows: NDArray[np.int64]) -> tuple[PseudoLabelCandidates, Candidates]:
        """Candidates and features of some pairs, in the order of `rows`, without repetitions.

        Memory holds these and one chunk.
        """
        taken = _Taken(self.params, self.pairs.take(rows))
        place = np.full(len(self.pairs), -1)
        place[rows] = np.arange(len(rows))
        for chunk, table in zip(self.chunks, self.tables, strict=True):
            places = place[chunk]
            if (places >= 0).any():
                found = table if isinstance(table, pa.Table) else records.read_table(table, LABELED)
                taken.add(places[places >= 0], found.filter(pa.array(places >= 0)))
        return taken.labels(), taken.features()


def label_unlabeled(params: Params, load_teachers: Sequence[LoadTeacher], folder: Path | None = None) -> LabeledPairs:
    """Build the candidate masks of every unlabeled sentence and compute their features.

    load_teachers: of `teachers_of`; they run in each worker with its `params.train`, and are picklable if there are
    several workers. folder: where chunks are stored and, after a kill, found again; it must exist as long as the result
    is used. None: chunks stay in memory. Raises InputError if no sentence is unlabeled.
    """
    pairs = pairs_of(params, "unlabeled")
    if not len(pairs):
        raise InputError(
            "select: no sentence is unlabeled, so there is nothing to select; set round to 0 or label less "
            "(split.labeled_fraction, split.list_file)"
        )
    params = params.model_copy(update={"train": resolved_train(params.train)})
    check_gpus(params.cluster, params.train.engine.device)
    teacher = np.zeros(len(pairs), np.int64)
    if params.select.cross_label:
        teacher = fold_by_image(params, pairs_of(params, "labeled", with_priors=False))[pairs.image_row]
    chunks = [
        (number, rows)
        for number in range(len(load_teachers))
        for rows in chunks_of(pairs, params.evaluate.batch_size, teacher == number)
    ]
    work = Work(
        what="label",
        ids=[pairs.sent_id[rows] for _, rows in chunks],
        schema=LABELED,
        load=lambda number: (chunks[number][0], pairs.only(chunks[number][1])),
        start=partial(_start_labeling, params, load_teachers),
    )
    confidence, prior_iou = np.empty(len(pairs), np.float32), np.empty(len(pairs), np.float32)
    tables: list[pa.Table | Path] = [Path()] * len(chunks)
    for number, table in map_chunks(work, params.cluster, folder):
        rows = chunks[number][1]
        confidence[rows], prior_iou[rows] = table["confidence"].to_numpy(), table["prior_iou"].to_numpy()
        tables[number] = table if folder is None else chunk_path(folder, number)
    return LabeledPairs(params, pairs, [rows for _, rows in chunks], tables, confidence, prior_iou)


def teachers_of(params: Params, round_number: int) -> list[Path]:
    """Folders of the networks that label in a round: the last model, or with `select.cross_label` the fold teachers."""
    previous = records.round_folder(round_number - 1)
    if not params.select.cross_label:
        return [previous / "model"]
    return [previous / "folds" / str(fold) for fold in range(params.select.folds)]


def label_key(params: Params, round_number: int) -> str:
    """Hex digest of everything that `label_unlabeled` depends on."""
    settings = f"{params.seed} {params.select!r} {params.model.image_size_px} {params.evaluate.batch_size}"
    settings += f" {params.proposals.size_px} {params.proposals.flat_prob}"
    device = choose_device(params.train.engine.device)
    precision = resolve_precision(params.train.precision, device)
    settings += f" {device_state(device, precision, worker_threads(params.cluster))}"
    if params.select.uses_sam(params.proposals.model):
        settings += f" {folder_state(str(params.proposals.model))}"
    teachers = teachers_of(params, round_number)
    tables = (records.SPLIT_PATH, records.INDEX.refs, records.INDEX.images, records.PRIORS_PATH, records.PROPOSALS_PATH)
    return fingerprint(f"select-{round_number}", settings, [*teachers, *tables])


def _start_labeling(
    params: Params, load_teachers: Sequence[LoadTeacher]
) -> Callable[[tuple[int, Pairs]], Iterator[pa.Table]]:
    """The labeling of a chunk, a teacher's number and its pairs, batch by batch (LABELED)."""

    loaded: dict[int, BatchPredictor] = {}  # one at a time: a worker's chunks come teacher by teacher

    def load(number: int) -> BatchPredictor:
        if number not in loaded:
            loaded.clear()
            loaded[number] = load_teachers[number](params.train)
        return loaded[number]

    if len(load_teachers) == 1:
        load(0)  # here, since an error of a chunk names the chunk's sentences

    def label(chunk: tuple[int, Pairs]) -> Iterator[pa.Table]:
        number, pairs = chunk
        batches, sam, neighbors = batches_of(params, pairs), sam_masks_of(params, pairs), Neighbors(pairs)
        for rows, views in _views(params, load(number), batches, sam, None):
            yield _label_batch(params, batches, sam, neighbors, rows, views)

    return label


def _label_batch(
    params: Params,
    batches: BatchMaker,
    sam: SamMasks | None,
    neighbors: Neighbors,
    rows: NDArray[np.int64],
    views: Views,
) -> pa.Table:
    """Candidates of a batch and their features (LABELED)."""
    names, method, side = params.select.candidate_names, params.select.method, params.proposals.size_px
    masks, sam_iou = _build(rows, views, names, sam, neighbors)
    matches: list[Match | None] = [None] * len(rows)
    if method == "semires" and sam is not None:
        matches = sam.match(rows, masks[:, 0])
        for made, match in zip(masks, matches, strict=True):
            made[0] = made[0] if match is None else match.square
    features = compute_features(views, masks, names, params.select.grid, sam_iou)
    labels = []
    for (height, width), prob, made, match in zip(
        batches.pairs.hw[rows].tolist(), views.prob, masks, matches, strict=True
    ):
        # The teacher's mask is thresholded after resizing, as in evaluation.
        soft = [prob if name == "teacher" else mask for name, mask in zip(names, made, strict=True)]
        full = [resize_prob(one.astype(np.float32), height, width) for one in soft]
        label: dict[str, object] = {"candidates": [encode_rle(one > LABEL_THRESHOLD) for one in full]}
        label["matched"] = match is not None
        if method == "threshold":  # the first candidate is then the teacher's mask
            label["confident"] = encode_rle(confident_pixels(full[0], params.select.pixel_threshold))
        if method == "semires":
            weight = semires_weight(resize_prob(prob, side, side))
            if match is not None:
                label["candidates"] = [match.rle]
                weight = np.ones_like(weight)
            label["weight"] = np.rint(weight * 255).astype(np.uint8).tobytes()
        labels.append(label)
    columns = {
        "sent_id": views.sent_id,
        **{name: [label.get(name) for label in labels] for name in ("candidates", "confident", "weight", "matched")},
        "cells": [cells.tobytes() for cells in features.cells],
        "sentence": [sentence.tobytes() for sentence in features.sentence],
        "confidence": features.confidence,
        "prior_iou": features.prior_iou,
    }
    return pa.table(columns, schema=LABELED)


class _Taken:
    """Candidates and features of some pairs, filled chunk by chunk."""

    def __init__(self, params: Params, pairs: Pairs) -> None:
        count, grid, names = len(pairs), params.select.grid, len(params.select.candidate_names)
        self._pairs, self._method = pairs, params.select.method
        self._lists: dict[str, list[Any]] = {
            name: [None] * count for name in ("candidates", "confident", "weight", "matched")
        }
        self._arrays: dict[str, NDArray[Any]] = {
            "cells": np.empty((count, names, grid, grid, len(CELL_FEATURES)), np.float16),
            "sentence": np.empty((count, names, len(SENTENCE_FEATURES)), np.float32),
            "confidence": np.empty(count, np.float32),
            "prior_iou": np.empty(count, np.float32),
        }

    def add(self, rows: NDArray[np.int64], table: pa.Table) -> None:
        """Rows of the pairs and their LABELED, in the same order."""
        for name, values in self._lists.items():
            for row, value in zip(rows.tolist(), table[name].to_pylist(), strict=True):
                values[row] = value
        for name in ("cells", "sentence"):
            array = self._arrays[name]
            flat = np.frombuffer(b"".join(table[name].to_pylist()), array.dtype)
            array[rows] = flat.reshape(len(rows), *array.shape[1:])
        for name in ("confidence", "prior_iou"):
            self._arrays[name][rows] = table[name].to_numpy()

    def labels(self) -> PseudoLabelCandidates:
        is_semires = self._method == "semires"
        return PseudoLabelCandidates(
            self._pairs,
            self._lists["candidates"],
            self._lists["confident"] if self._method == "threshold" else [],
            self._lists["weight"] if is_semires else [],
            self._lists["matched"] if is_semires else [],
        )

    def features(self) -> Candidates:
        return Candidates(sent_id=self._pairs.sent_id, **self._arrays)


def _views(
    params: Params,
    teacher: BatchPredictor,
    batches: BatchMaker,
    sam: SamMasks | None,
    what: str | None,
) -> Iterator[tuple[NDArray[np.int64], Views]]:
    """Yield the teacher's predictions. The next batch is computed while the caller processes the current one."""
    views = teacher.views(batches, params.evaluate.batch_size, what)
    # PyTorch's choice of attention kernels is global, so that two networks must not run at once.
    return views if sam else prefetch(views)


def _build(
    rows: NDArray[np.int64], views: Views, names: Sequence[str], sam: SamMasks | None, neighbors: Neighbors
) -> tuple[BoolArray, FloatArray | None]:
    """The candidates of a batch, [B, K, M, M], and SAM's own estimates of its masks' IoU, [B], if it builds one."""
    refined = None if sam is None or "sam" not in names else sam.refine(rows, views.prob)
    neighbor = neighbors.masks(rows, views.prob) if "neighbor" in names else None
    made = build_candidates(views, names, None if refined is None else refined.mask, neighbor)
    return made, None if refined is None else refined.predicted_iou


def score_out_of_fold(params: Params, folds: Path) -> tuple[Candidates, CandidateTruth]:
    """Score the fold teachers' candidates on labeled sentences whose images they never saw."""
    labeled = pairs_of(params, "labeled")
    fold = fold_of_images(labeled.image_row, params.select.folds, params.seed)
    parts = []
    for left_out in range(params.select.folds):
        unseen = labeled.take((fold == left_out).nonzero()[0])
        teacher = BatchPredictor.from_run(folds / str(left_out), params.train)
        parts.append(
            score_labeled(params, teacher, batches_of(params, unseen), labeled_targets(unseen), f"fold {left_out}")
        )
    candidates, scores = zip(*parts, strict=True)
    return concatenate(candidates), concatenate(scores)


def images_of(params: Params, sent_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """IDs of labeled sentences [N] -> image row of each sentence [N]."""
    return pairs_of(params, "labeled").with_sent_ids(sent_ids).image_row


def score_labeled(
    params: Params, teacher: BatchPredictor, batches: BatchMaker, targets: Targets, what: str
) -> tuple[Candidates, CandidateTruth]:
    """Features and scores of a teacher's candidates for pairs with ground truth, in the order of the pairs."""
    names = params.select.candidate_names
    sam, neighbors = sam_masks_of(params, batches.pairs), Neighbors(batches.pairs)
    candidates, scores, visited = [], [], []
    for rows, views in _views(params, teacher, batches, sam, what):
        visited.append(rows)
        truth = batches.square_masks(targets.take(rows).label, rows)
        masks, sam_iou = _build(rows, views, names, sam, neighbors)
        candidates.append(compute_features(views, masks, names, params.select.grid, sam_iou))
        scores.append(score_candidates(views.sent_id, masks, truth, params.select.grid))
    return concatenate(candidates, visited), concatenate(scores, visited)


def score_unlabeled(params: Params, labels: PseudoLabelCandidates, truth: Targets) -> CandidateTruth:
    """Score the candidates of unlabeled sentences against the ground truth. Only the oracle uses this."""
    batches = batches_of(params, labels.pairs)
    count, scores = len(params.select.candidate_names), []
    for rows in batched_rows(len(labels.pairs), params.evaluate.batch_size, None):
        mine = np.stack(
            [batches.square_masks([labels.candidates[row][k] for row in rows], rows) for k in range(count)], axis=1
        )
        true = batches.square_masks([truth.label[row] for row in rows], rows)
        scores.append(score_candidates(labels.pairs.sent_id[rows], mine, true, params.select.grid))
    return concatenate(scores)


def select_chunks(params: Params, round_number: int, labeled: LabeledPairs, policy: Policy | None) -> pa.Table:
    """The round's pseudo-labels (records.PSEUDO_LABELS), one row per unlabeled sentence, selected chunk by chunk.

    policy: of `reinforce`. Only the oracle reads the truth. Fixed rules compare all sentences. Raises ArtifactError if
    the oracle lacks the true mask of a sentence.
    """
    is_oracle = params.select.method == "oracle"
    true_masks = load_targets(records.INDEX.masks, records.INDEX, labeled.pairs) if is_oracle else None
    ranking = rank(params.select, labeled.pairs.sent_id, labeled.confidence, labeled.prior_iou)
    tables = []
    for rows in progress(labeled.chunks, "select", "chunk"):
        labels, candidates = labeled.take(rows)
        truth = None if true_masks is None else score_unlabeled(params, labels, true_masks.take(rows))
        chosen = None if ranking is None else ranking.take(rows)
        selection = select_labels(params.select, candidates, policy, truth, chosen)
        tables.append(pseudo_label_table(params, round_number, labels, candidates, selection))
    return _in_order(tables, np.argsort(np.concatenate(labeled.chunks)))


def _in_order(tables: list[pa.Table], order: NDArray[np.int64]) -> pa.Table:
    """Rows of records.PSEUDO_LABELS in another order. Empties `tables`, so that memory holds two copies at most.

    All pixel weights may exceed the 2 GiB of a binary array.
    """
    fields = [one.with_type(pa.large_binary()) if one.type == pa.binary() else one for one in records.PSEUDO_LABELS]
    whole = pa.concat_tables(tables).cast(pa.schema(fields)).combine_chunks()
    tables.clear()
    rows = [order[first : first + records.PART_ROWS] for first in range(0, len(order), records.PART_ROWS)]
    parts = [whole.take(part).cast(records.PSEUDO_LABELS) for part in rows]
    del whole
    return pa.concat_tables(parts).combine_chunks()


def pseudo_label_table(
    params: Params, round_number: int, labels: PseudoLabelCandidates, candidates: Candidates, selection: Selection
) -> pa.Table:
    """The round's pseudo-labels (records.PSEUDO_LABELS), one row per unlabeled sentence."""
    keep = [
        _keep_rle(params, labels, selection, row, height, width)
        for row, (height, width) in enumerate(labels.pairs.hw.tolist())
    ]
    count = len(labels.pairs)
    chosen = candidates.sentence[np.arange(count), selection.choice]
    columns = {
        "round": np.full(count, round_number, np.int16),
        "sent_id": labels.pairs.sent_id,
        "height": labels.pairs.hw[:, 0].astype(np.int32),
        "width": labels.pairs.hw[:, 1].astype(np.int32),
        "rle_counts": [made[k] for made, k in zip(labels.candidates, selection.choice.tolist(), strict=True)],
        "candidate": [
            "sam" if matched else params.select.candidate_names[k]
            for k, matched in zip(selection.choice.tolist(), labels.matched or [False] * count, strict=True)
        ],
        "keep_rle": keep,
        "weight": pa.array(labels.weight, pa.binary()) if labels.weight else pa.nulls(count, pa.binary()),
        "accept_prob": selection.accept_prob.astype(np.float32),
        "reward": selection.reward.astype(np.float32),
        "prior_iou": chosen[:, SENTENCE_FEATURES.index("prior_iou")],
        "confidence": chosen[:, SENTENCE_FEATURES.index("confidence")],
        "accepted": selection.accepted,
        "method": [params.select.method] * count,
    }
    return pa.table(columns, schema=records.PSEUDO_LABELS)


def _keep_rle(
    params: Params, labels: PseudoLabelCandidates, selection: Selection, row: int, height: int, width: int
) -> bytes:
    """Valid pixels of one pseudo-label, run-length encoded. A rejected one has none."""
    if not selection.accepted[row]:
        return encode_rle(np.zeros((height, width), dtype=bool))
    if params.select.method == "threshold":
        return labels.confident[row]
    return encode_rle(expand_cells(selection.keep_cells[row : row + 1], height, width)[0])
