"""Features of the candidate masks for the policy, and their scores against the ground truth if it is available."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from l2l_core.config import Candidate
from l2l_core.core.arrays import BoolArray, FloatArray
from l2l_core.data.views import Views
from l2l_core.pseudo_labels.evidence import EVIDENCE, image_evidence

CANDIDATES: tuple[str, ...] = get_args(Candidate)

LABEL_THRESHOLD = 0.5
"""A pixel is foreground if its probability exceeds this. Evaluation uses the same threshold."""

CELL_FEATURES = (
    "prob",  # teacher's foreground probability
    "candidate",  # fraction of foreground pixels in the candidate
    "proposal",
    "disagreement",  # |prob - proposal|
    "entropy",  # of the probability, in bits
    "flip_change",  # |prob - prob_flipped|
    "prior_change",  # |prob - prob_no_prior|
    "votes",  # fraction of the three other predictions (flipped, no prior, proposal) that vote foreground
    "candidate_votes",  # the same inside the candidate alone; with `votes` it gives the cell's confusion fractions
    "distance",  # from the candidate's centroid, in radii of the candidate, scaled to [0, 1] at FAR_RADII
)
"""Channels of `Candidates.cells`, each in [0, 1]. All but `distance` are area-weighted means over the cell's pixels."""

SENTENCE_FEATURES = (
    "confidence",
    "prior_iou",
    "prob_iou",  # soft IoU of candidate and prob
    "flip_iou",  # soft IoU of prob and prob_flipped
    "no_prior_iou",  # soft IoU of prob and prob_no_prior
    "no_prior_proposal_iou",  # soft IoU of prob_no_prior and proposal: do both find the object independently?
    "agreement_iou",  # soft IoU of candidate and the votes of the three other predictions
    "candidate_prob",  # mean prob inside the candidate
    "candidate_flipped",  # mean prob_flipped inside the candidate
    "candidate_no_prior",  # mean prob_no_prior inside the candidate
    "candidate_proposal",  # mean proposal inside the candidate
    "outside",  # fraction of prob's mass outside the candidate
    "outside_no_prior",  # fraction of prob_no_prior's mass outside the candidate
    "size",  # square root of the candidate's fraction of the image area
    "compactness",  # 4 sqrt(area) / perimeter: 1 for a square, less for ragged or scattered masks
    "proposal_score",
    "predicted_iou",  # the renderer's own estimate of the proposal's IoU; 0 if it has none
    "sam_iou",  # SAM's own estimate of the IoU of the sentence's candidate `sam`; 0 if there is none
    "has_prior",  # 1 or 0
    "words",  # log(1 + words in the sentence)
    *(f"is_{name}" for name in CANDIDATES),  # 1 or 0: kind of the candidate
    *(f"with_{name}_iou" for name in CANDIDATES),  # IoU with the sentence's candidate of that kind; 0 if there is none
    *EVIDENCE,  # image evidence: see evidence.py
    "estimate",  # the critic's estimate of the IoU with the ground truth; 0 before the critic runs
)
"""Columns of `Candidates.sentence`. All are in [0, 1], except `words` >= 0. Means over an empty mask are 0,
except `confidence`, which is 0.5."""

FAR_RADII = 4.0
"""Distances are capped at this many radii of the candidate: such cells are far from any boundary."""

SURROUNDINGS = 1 / 16
"""Width of a candidate's surroundings, as a fraction of the image side: wide enough to cover its uncertain border,
narrow enough that easy, distant background does not dominate."""

EPSILON = 1e-6
"""Keeps area ratios finite. It is far below the area fraction of one pixel at any image size used here."""


@dataclass(frozen=True)
class Candidates:
    """Features of K candidate masks for each of N sentences, on a grid of G x G cells."""

    sent_id: NDArray[np.int64]  # [N]
    cells: NDArray[np.float16]  # [N, K, G, G, C] CELL_FEATURES; half precision, since it dominates memory
    sentence: FloatArray  # [N, K, D] SENTENCE_FEATURES
    # Features of the first candidate. Fixed rules rank sentences by them.
    confidence: FloatArray  # [N] mean of max(p, 1 - p) over the foreground and its surroundings, in [0.5, 1]
    prior_iou: FloatArray  # [N] IoU with the proposal thresholded at 0.5; 0 without a prior

    def take(self, rows: NDArray[np.int64]) -> Candidates:
        """Select sentences by row index."""
        return _select_rows(self, rows)


@dataclass(frozen=True)
class CandidateTruth:
    """Scores of the candidates of N sentences against the ground truth: for labeled sentences and the oracle only."""

    sent_id: NDArray[np.int64]  # [N]
    # [N, K, G, G, 4] fractions of a cell's pixels: true positives, false positives, true negatives, false negatives
    cells: FloatArray
    iou: FloatArray  # [N, K] IoU with the true mask

    def take(self, rows: NDArray[np.int64]) -> CandidateTruth:
        """Select sentences by row index."""
        return _select_rows(self, rows)


Rows = TypeVar("Rows", Candidates, CandidateTruth)


def compute_features(
    views: Views, candidate_masks: BoolArray, names: Sequence[str], grid: int, sam_iou: FloatArray | None = None
) -> Candidates:
    """Compute the features of candidate masks [B, K, M, M] bool.

    names: the kind of each candidate (of CANDIDATES). sam_iou: [B] SAM's own estimates for its masks.
    Cells are area-weighted means, so any map side M works with any grid. Memory: a few maps per batch.
    """
    masks = [mask.astype(np.float32) for mask in candidate_masks.swapaxes(0, 1)]
    shared = _shared_features(views, grid, sam_iou)
    described = [_candidate_features(views, shared, mask, grid) for mask in masks]
    for row, (name, (_, sentence)) in enumerate(zip(names, described, strict=True)):
        sentence |= {f"is_{name}": np.ones(len(views.sent_id))}
        sentence |= {f"with_{other}_iou": soft_iou(masks[row], mask) for other, mask in zip(names, masks, strict=True)}
    evidence = image_evidence(views.image, candidate_masks)
    for row, (_, sentence) in enumerate(described):
        sentence |= dict(zip(EVIDENCE, evidence[:, row].T, strict=True))
    nothing = np.zeros(len(views.sent_id))
    columns = [[sentence.get(name, nothing) for name in SENTENCE_FEATURES] for _, sentence in described]
    first = described[0][1]
    return Candidates(
        sent_id=views.sent_id,
        cells=np.stack([cells for cells, _ in described], axis=1),
        sentence=np.stack([np.stack(column, axis=-1) for column in columns], axis=1).astype(np.float32),
        confidence=first["confidence"].astype(np.float32),
        prior_iou=first["prior_iou"].astype(np.float32),
    )


@dataclass(frozen=True)
class _Shared:
    """Features that all candidates of a sentence share, for B sentences."""

    votes: FloatArray  # [B, M, M] fraction of the other predictions that vote foreground
    cells: dict[str, FloatArray]  # [B, G, G] each
    sentence: dict[str, NDArray[Any]]  # [B] each


def _shared_features(views: Views, grid: int, sam_iou: FloatArray | None) -> _Shared:
    """Compute the shared features once for all candidates."""
    prob, flipped, no_prior, proposal = views.prob, views.prob_flipped, views.prob_no_prior, views.proposal
    votes = np.stack([prediction > LABEL_THRESHOLD for prediction in (flipped, no_prior, proposal)]).mean(
        0, dtype=np.float32
    )
    cells = {
        "prob": to_cells(prob, grid),
        "proposal": to_cells(proposal, grid),
        "disagreement": to_cells(np.abs(prob - proposal), grid),
        "entropy": to_cells(_entropy_bits(prob), grid),
        "flip_change": to_cells(np.abs(prob - flipped), grid),
        "prior_change": to_cells(np.abs(prob - no_prior), grid),
        "votes": to_cells(votes, grid),
    }
    sentence = {
        "flip_iou": soft_iou(prob, flipped),
        "no_prior_iou": soft_iou(prob, no_prior),
        "no_prior_proposal_iou": soft_iou(no_prior, proposal),
        "proposal_score": views.proposal_score,
        "predicted_iou": views.predicted_iou,
        "sam_iou": np.zeros(len(views.sent_id)) if sam_iou is None else sam_iou,
        "has_prior": (views.proposal_score > 0).astype(np.float32),
        "words": np.log1p(views.words),
    }
    return _Shared(votes, cells, sentence)


def _candidate_features(
    views: Views, shared: _Shared, mask: FloatArray, grid: int
) -> tuple[NDArray[np.float16], dict[str, NDArray[Any]]]:
    """One candidate [B, M, M] (0 or 1) per sentence -> its cells [B, G, G, C] and its sentence features, each [B]."""
    prob, flipped, no_prior, proposal = views.prob, views.prob_flipped, views.prob_no_prior, views.proposal
    side = mask.shape[-1]
    nearby = mask_and_surroundings(mask)
    area = mask.mean((1, 2))
    bordered = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    perimeter = (np.abs(np.diff(bordered, axis=1)).sum((1, 2)) + np.abs(np.diff(bordered, axis=2)).sum((1, 2))) / side
    sentence = shared.sentence | {
        "confidence": np.where(area > 0, _mean_inside(np.maximum(prob, 1 - prob), nearby), 0.5),
        "prior_iou": shared.sentence["has_prior"] * soft_iou(mask, (proposal > LABEL_THRESHOLD).astype(np.float32)),
        "prob_iou": soft_iou(mask, prob),
        "agreement_iou": soft_iou(mask, shared.votes),
        "candidate_prob": _mean_inside(prob, mask),
        "candidate_flipped": _mean_inside(flipped, mask),
        "candidate_no_prior": _mean_inside(no_prior, mask),
        "candidate_proposal": _mean_inside(proposal, mask),
        "outside": _mean_inside(1 - mask, prob),
        "outside_no_prior": _mean_inside(1 - mask, no_prior),
        "size": np.sqrt(area),
        "compactness": 4 * np.sqrt(area) / np.maximum(perimeter, EPSILON),
    }

    cells = shared.cells | {
        "candidate": to_cells(mask, grid),
        "candidate_votes": to_cells(mask * shared.votes, grid),
    }
    cells["distance"] = _distance_in_radii(cells["candidate"]) / FAR_RADII
    return np.stack([cells[name] for name in CELL_FEATURES], axis=-1).astype(np.float16), sentence


def score_candidates(
    sent_id: NDArray[np.int64], candidate_masks: BoolArray, truth: BoolArray, grid: int
) -> CandidateTruth:
    """Score candidates [B, K, M, M] against true masks [B, M, M], all bool. The IoU of two empty masks is 0."""
    true = truth.astype(np.float32)
    cells, iou = [], []
    for mask in candidate_masks.swapaxes(0, 1):
        parts = (mask & truth, mask & ~truth, ~mask & ~truth, ~mask & truth)
        cells.append(np.stack([to_cells(part.astype(np.float32), grid) for part in parts], axis=-1))
        iou.append(soft_iou(mask.astype(np.float32), true))
    return CandidateTruth(sent_id=sent_id, cells=np.stack(cells, axis=1), iou=np.stack(iou, axis=1))


def confusion_against_votes(cells: NDArray[np.float16]) -> FloatArray:
    """Confusion fractions against the votes, which replace the ground truth.

    Cell features [..., C] -> [..., 4] as in `CandidateTruth.cells`.
    """
    mask, votes, mask_votes = (
        cells[..., CELL_FEATURES.index(name)].astype(np.float32) for name in ("candidate", "votes", "candidate_votes")
    )
    background_votes = votes - mask_votes
    confusion = np.stack([mask_votes, mask - mask_votes, 1 - mask - background_votes, background_votes], axis=-1)
    return np.clip(confusion, 0.0, 1.0)  # half precision can give values slightly below 0


def concatenate(parts: Sequence[Rows], positions: Sequence[NDArray[np.int64]] | None = None) -> Rows:
    """Concatenate at least one batch, with rows in order.

    positions: for each batch, the positions [B] of its rows in the result; together they are 0..N-1.
    """
    first = parts[0]
    order = slice(None) if positions is None else np.argsort(np.concatenate(positions))
    return type(first)(
        **{field.name: np.concatenate([getattr(part, field.name) for part in parts])[order] for field in fields(first)}
    )


def _select_rows(table: Rows, rows: NDArray[np.int64]) -> Rows:
    return type(table)(**{field.name: getattr(table, field.name)[rows] for field in fields(table)})


def confident_pixels(prob: NDArray[np.floating[Any]], threshold: float) -> BoolArray:
    """Pixels whose confidence max(p, 1 - p) reaches the threshold: any shape -> bool of the same shape."""
    return np.asarray(np.maximum(prob, 1 - prob) >= threshold)


def expand_cells(keep_cells: BoolArray, height: int, width: int) -> BoolArray:
    """Cells [N, G, G] -> pixels [N, height, width]. A pixel belongs to the cell that contains its center."""
    grid = keep_cells.shape[-1]
    rows = ((np.arange(height) + 0.5) * grid / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * grid / width).astype(np.int64)
    return keep_cells[:, rows[:, None], columns[None, :]]


def to_cells(maps: FloatArray, grid: int) -> FloatArray:
    """[B, M, M] -> [B, G, G] area-weighted means. A pixel on a cell border counts for both cells by its overlap."""
    pool = _overlaps(maps.shape[-1], grid)
    return np.asarray(pool @ maps @ pool.T)


def soft_iou(first: FloatArray, second: FloatArray) -> FloatArray:
    """sum(min) / sum(max) over the pixels of [B, M, M] maps -> [B] in [0, 1]; two empty maps give 0."""
    intersection = np.minimum(first, second).sum((1, 2))
    union = np.maximum(first, second).sum((1, 2))
    return np.asarray(intersection / np.maximum(union, EPSILON), dtype=np.float32)


def mask_and_surroundings(mask: FloatArray) -> FloatArray:
    """0/1 mask [B, M, M] -> the mask dilated by SURROUNDINGS with a square, also 0/1."""
    side = mask.shape[-1]
    reach = max(1, round(SURROUNDINGS * side))
    near = (np.abs(np.subtract.outer(np.arange(side), np.arange(side))) <= reach).astype(np.float32)
    return (near @ mask @ near.T > 0.5).astype(np.float32)


def _mean_inside(values: FloatArray, weight: FloatArray) -> FloatArray:
    """Weighted mean over the pixels, 0 if all weights are 0: two [B, M, M] maps -> [B]."""
    return np.asarray((values * weight).sum((1, 2)) / np.maximum(weight.sum((1, 2)), EPSILON))


def _entropy_bits(prob: FloatArray) -> FloatArray:
    """Binary entropy in bits, [0, 1]."""
    p = np.clip(prob, EPSILON, 1 - EPSILON)
    return np.asarray(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)))


def _distance_in_radii(mask_cells: FloatArray) -> FloatArray:
    """Distance of each cell from the mask's centroid, in radii of a disc of the same area, at most FAR_RADII.

    [B, G, G] foreground fractions -> [B, G, G]. For an empty mask, every distance is FAR_RADII.
    """
    grid = mask_cells.shape[-1]
    centers = (np.arange(grid, dtype=np.float32) + 0.5) / grid
    area = mask_cells.mean((1, 2))
    total = np.maximum(mask_cells.sum((1, 2)), EPSILON)
    row = (mask_cells.sum(2) @ centers) / total
    column = (mask_cells.sum(1) @ centers) / total
    down, right = centers - row[:, None], centers - column[:, None]
    distance = np.sqrt(down[:, :, None] ** 2 + right[:, None, :] ** 2)
    radius = np.sqrt(area / np.pi)[:, None, None]
    return np.where(radius > 0, np.minimum(distance / np.maximum(radius, EPSILON), FAR_RADII), FAR_RADII)


def _overlaps(side: int, grid: int) -> FloatArray:
    """[grid, side] fraction of each cell's length that each pixel covers; rows sum to 1."""
    edges = np.arange(grid + 1) * side / grid
    pixels = np.arange(side)
    low = np.maximum(edges[:-1, None], pixels[None, :])
    high = np.minimum(edges[1:, None], pixels[None, :] + 1)
    return (np.clip(high - low, 0, None) * grid / side).astype(np.float32)
