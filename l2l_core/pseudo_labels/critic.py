"""The critic: estimates each candidate's IoU from its features and those of the sentence's other candidates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

from l2l_core.core.arrays import FloatArray
from l2l_core.core.seeding import evenly_picked, folds_of
from l2l_core.pseudo_labels.features import SENTENCE_FEATURES, Candidates, CandidateTruth

ESTIMATE = SENTENCE_FEATURES.index("estimate")
FOLDS = 5
"""Folds of the labeled images. Each member of the ensemble leaves out one fold."""
MAX_SENTENCES = 500
"""Maximum labeled sentences per member, evenly picked: training time grows with their number."""
SVR_C, SVR_GAMMA_SCALE, SVR_EPSILON = 0.3, 0.5, 0.05
"""C, gamma times the number of features, and epsilon of the support vector regression. A small C keeps the estimates
smooth, since there are few labeled sentences."""


@dataclass(frozen=True)
class Critic:
    """An ensemble of support vector regressions, one per left-out fold."""

    members: tuple[Pipeline, ...]

    def estimate(self, candidates: Candidates) -> Candidates:
        """Fill in the feature `estimate`: the expected IoU with the ground truth, in [0, 1]."""
        if not len(candidates.sent_id):
            return candidates
        features = _features(candidates)
        estimates = [member.predict(features) for member in self.members]
        return _with_estimate(candidates, np.mean(estimates, axis=0))


def train_critic(
    labeled: Candidates, truth: CandidateTruth, image_row: NDArray[np.int64], seed: int
) -> tuple[Critic, Candidates]:
    """Learn each candidate's IoU. Return the critic, and the labeled candidates with out-of-fold estimates.

    image_row: int64 [N], image row of each sentence. Sentences of one image often refer to the same object, so folds
    consist of whole images: the estimate of a labeled sentence comes from the member that saw no sentence of its image.
    With a single image, nothing can be left out, and the estimates are in-sample.
    """
    kinds = labeled.sentence.shape[1]
    folds = min(FOLDS, len(np.unique(image_row)))
    fold = folds_of(image_row, folds, np.random.default_rng(seed))
    features, iou = _features(labeled).reshape(len(fold), kinds, -1), truth.iou
    out_of_fold = np.empty(iou.shape, dtype=np.float64)
    members = []
    for held_out in range(folds):
        left_out = (fold == held_out).nonzero()[0]
        known = (fold != held_out).nonzero()[0] if folds > 1 else left_out
        known = known[evenly_picked(len(known), MAX_SENTENCES)]
        regression = SVR(C=SVR_C, gamma=SVR_GAMMA_SCALE / features.shape[-1], epsilon=SVR_EPSILON)
        member = make_pipeline(StandardScaler(), regression)
        member.fit(features[known].reshape(-1, features.shape[-1]), iou[known].ravel())
        out_of_fold[left_out] = member.predict(features[left_out].reshape(-1, features.shape[-1])).reshape(-1, kinds)
        members.append(member)
    return Critic(tuple(members)), _with_estimate(labeled, out_of_fold)


def _features(candidates: Candidates) -> FloatArray:
    """[N * K, 2 D]: a candidate's features, and their differences from the mean over the sentence's candidates."""
    features = candidates.sentence.copy()
    features[..., ESTIMATE] = 0
    relative = features - features.mean(axis=1, keepdims=True)
    return np.concatenate([features, relative], axis=-1).reshape(-1, 2 * features.shape[-1])


def _with_estimate(candidates: Candidates, estimate: NDArray[np.float64]) -> Candidates:
    """The candidates with new estimates [N * K], clipped to [0, 1]."""
    sentence = candidates.sentence.copy()
    sentence[..., ESTIMATE] = estimate.clip(0, 1).reshape(sentence.shape[:2])
    return replace(candidates, sentence=sentence)
