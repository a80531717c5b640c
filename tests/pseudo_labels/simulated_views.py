"""A synthetic teacher: scenes of ellipses, an often wrong prior, and views that are correct, partial, or wrong."""

from __future__ import annotations

import numpy as np

from l2l_core.data.views import Views
from l2l_core.pseudo_labels.features import Candidates, CandidateTruth, compute_features, score_candidates

TEACHER = ("teacher",)


def teacher_labels(views: Views) -> np.ndarray:
    """Return the teacher's masks as the only candidate: [B, 1, M, M]."""
    return (views.prob > 0.5)[:, None]


def described(views: Views, grid: int) -> Candidates:
    return compute_features(views, teacher_labels(views), TEACHER, grid)


def judged(views: Views, truth: np.ndarray, grid: int) -> CandidateTruth:
    return score_candidates(views.sent_id, teacher_labels(views), truth, grid)


def simulated_views(count: int, seed: int, side: int = 32, first_id: int = 0) -> tuple[Views, np.ndarray]:
    """Return views of `count` sentences and their true masks [count, side, side] bool.

    The teacher spreads its belief over the objects of the scene by its own understanding and by the prior's box. It can
    therefore choose a wrong object with high or low confidence. One label in four misses a part, and every boundary is
    noisy.
    """
    rng = np.random.default_rng(seed)
    objects = 5
    rows, columns = np.mgrid[:side, :side].astype(np.float32) / side

    def shapes(centres, radii, noise):
        """Return soft ellipses [count, objects, side, side] whose boundary is bent by low-frequency noise."""
        down = (rows - centres[..., 0, None, None]) / radii[..., 0, None, None]
        right = (columns - centres[..., 1, None, None]) / radii[..., 1, None, None]
        coarse = rng.normal(size=(count, objects, 8, 8)).repeat(side // 8, -1).repeat(side // 8, -2)
        return 1 / (1 + np.exp(np.minimum(12 * (down**2 + right**2 - 1 + noise * coarse), 50)))

    centres = rng.uniform(0.15, 0.85, (count, objects, 2))
    radii = rng.uniform(0.06, 0.2, (count, objects, 2))
    solid = shapes(centres, radii, 0.0) > 0.5
    # nearer objects occlude farther ones
    visible = np.stack([solid[:, k] & ~solid[:, :k].any(1) for k in range(objects)], 1)
    truth = visible[:, 0] | (solid[:, 0] & ~visible[:, 1:].any(1))

    draw = rng.random(count)
    meant = np.where(draw < 0.5, 0, rng.integers(1, objects, count))
    has_prior = draw < 0.92
    everyone = np.arange(count)
    low = np.clip(centres - radii * rng.normal(1, 0.2, radii.shape), 0, 1)[everyone, meant]
    high = np.clip(centres + radii * rng.normal(1, 0.2, radii.shape), 0, 1)[everyone, meant]
    inside = (
        (rows >= low[:, 0, None, None])
        & (rows <= high[:, 0, None, None])
        & (columns >= low[:, 1, None, None])
        & (columns <= high[:, 1, None, None])
    )
    proposal = np.where(inside & has_prior[:, None, None], 0.9, 0.1).astype(np.float32)

    understanding = rng.normal(1.6, 1.0, count)[:, None] * (np.arange(objects) == 0) + rng.normal(
        0, 1.0, (count, objects)
    )
    follows = 1.6 * has_prior[:, None] * (np.arange(objects) == meant[:, None])
    cut = rng.random(count) < 0.25
    side_cut = (columns[None] > centres[:, :, 1, None, None].mean(1)) & cut[:, None, None]

    sureness = rng.uniform(0.7, 3.5, (count, 1))  # the teacher can be confident and wrong

    def view(prior_pull):
        belief = sureness * (understanding + prior_pull + rng.normal(0, 0.4, (count, objects)))
        belief = np.exp(belief - belief.max(1, keepdims=True))
        belief /= belief.sum(1, keepdims=True)
        drawn = shapes(centres, radii, 0.25)
        prob = (np.clip(1.3 * belief, 0, 0.98)[..., None, None] * drawn).max(1)
        prob = np.where(side_cut, 0.45 * prob, prob)
        grain = rng.normal(0, 0.05, prob.shape)
        return np.clip(prob + grain, 0.005, 0.995).astype(np.float32)

    with_prior = view(follows)
    views = Views(
        sent_id=first_id + np.arange(count, dtype=np.int64),
        image=np.zeros((count, side, side, 3), dtype=np.uint8),
        prob=with_prior,
        prob_flipped=view(follows),
        prob_no_prior=view(0.0),
        proposal=proposal,
        proposal_score=np.where(has_prior, 1.0, 0.0).astype(np.float32),
        predicted_iou=np.zeros(count, dtype=np.float32),
        words=rng.integers(1, 10, count),
    )
    return views, truth
