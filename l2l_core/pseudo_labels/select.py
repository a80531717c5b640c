"""Apply the selection rule of params.yaml: accept pseudo-labels and keep their cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import numpy as np
import torch
from numpy.typing import NDArray

from l2l_core.config import SelectParams
from l2l_core.core.arrays import BoolArray, FloatArray
from l2l_core.core.metrics import POSITIVE_IOU
from l2l_core.pseudo_labels.features import Candidates, CandidateTruth, confusion_against_votes
from l2l_core.pseudo_labels.policy import ROWS_AT_ONCE, Policy, one_thread
from l2l_core.pseudo_labels.reward import utility
from l2l_core.pseudo_labels.rules import best_fraction, mean_rank, rank_sum


@dataclass(frozen=True)
class Selection:
    """The selection for N sentences."""

    choice: NDArray[np.int64]  # [N] candidate that becomes the sentence's pseudo-label
    accept_prob: FloatArray  # [N] ranking score in [0, 1]: see `select_labels`
    accepted: BoolArray  # [N] whether the pseudo-label is used in training
    keep_cells: BoolArray  # [N, G, G] valid cells; none if rejected
    reward: FloatArray  # [N] utility of the kept cells: by the truth if given, else by agreement


@dataclass(frozen=True)
class Ranking:
    """The comparison of all sentences by a fixed rule, for N of them."""

    score: FloatArray  # [N] rank in (0, 1]
    accepted: BoolArray  # [N]

    def take(self, rows: NDArray[np.int64]) -> Ranking:
        """Select sentences by row index."""
        return Ranking(self.score[rows], self.accepted[rows])


def rank(
    params: SelectParams, sent_id: NDArray[np.int64], confidence: FloatArray, prior_iou: FloatArray
) -> Ranking | None:
    """Compare all sentences by `params.method`; None if it does not compare them. confidence, prior_iou: [N]."""
    match params.method:
        case "topk":
            score = mean_rank(confidence)
        case "agreement":
            score = mean_rank(prior_iou)
        case "ranksum":
            score = rank_sum(confidence, prior_iou)
        case _:
            return None
    return Ranking(score, best_fraction(score, sent_id, params.keep_fraction))


def select_labels(
    params: SelectParams,
    candidates: Candidates,
    policy: Policy | None,
    truth: CandidateTruth | None = None,
    ranking: Ranking | None = None,
) -> Selection:
    """Apply `params.method`. Every rule except `reinforce` keeps all cells of the pseudo-labels that it accepts.

    Fixed rules take each sentence's first candidate, the oracle the one with the highest IoU. accept_prob is the
    calibrated probability of a correct pseudo-label (reinforce), the rank of the rule's score (topk, agreement,
    ranksum), the IoU (oracle), 1 (all, threshold, semires, mean_teacher) or 0 (none). `threshold` accepts everything
    and drops pixels instead of cells, by `confident_pixels`. `semires` weights pixels. `mean_teacher` relabels during
    training. ranking: of these sentences among all; None: these are all. Raises ValueError if the rule lacks its policy
    or truth, or if the truth is of other sentences.
    """
    count, grid = len(candidates.sent_id), candidates.cells.shape[2]
    everyone, choice = np.arange(count), np.zeros(count, dtype=np.int64)
    keep = np.ones((count, grid, grid), dtype=bool)
    if truth is not None and not np.array_equal(candidates.sent_id, truth.sent_id):
        raise ValueError("candidates and truth must be rows of the same sentences")
    match params.method:
        case "all" | "threshold" | "semires" | "mean_teacher":
            score = np.ones(count, dtype=np.float32)
            accepted = score > 0.5
        case "none":
            score = np.zeros(count, dtype=np.float32)
            accepted = score > 0.5
        case "topk" | "agreement" | "ranksum":
            found = ranking or rank(params, candidates.sent_id, candidates.confidence, candidates.prior_iou)
            assert found is not None
            score, accepted = found.score, found.accepted
        case "oracle":
            if truth is None:
                raise ValueError("oracle needs the truth")
            choice = truth.iou.argmax(1)
            score = truth.iou[everyone, choice]
            accepted = score > POSITIVE_IOU
        case "reinforce":
            if policy is None:
                raise ValueError("reinforce needs a policy")
            action = policy.act(candidates)
            choice, score, accepted = action.choice, action.accept_prob, action.accepted
            keep = action.keep_prob > 0.5
        case _ as unknown:
            assert_never(unknown)
    keep = keep & accepted[:, None, None]
    return Selection(choice, score, accepted, keep, _reward(params, candidates, truth, choice, keep))


def _reward(
    params: SelectParams,
    candidates: Candidates,
    truth: CandidateTruth | None,
    choice: NDArray[np.int64],
    keep: BoolArray,
) -> FloatArray:
    """Utility of the kept cells of each sentence's pseudo-label, [N]."""
    reward = np.empty(len(keep), dtype=np.float32)
    with one_thread():
        for start in range(0, len(keep), ROWS_AT_ONCE):
            rows = np.arange(start, min(start + ROWS_AT_ONCE, len(keep)))
            chosen = rows, choice[rows]
            confusion = confusion_against_votes(candidates.cells[chosen]) if truth is None else truth.cells[chosen]
            kept = torch.from_numpy(keep[rows].astype(np.float32))
            reward[rows] = utility(torch.from_numpy(confusion), kept, params.wrong_cost).numpy()
    return reward
