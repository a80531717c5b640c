"""Oracle: symmetry."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from simulated_views import simulated_views

from l2l_core.selection.features import describe
from l2l_core.selection.policy import Policy, act


@pytest.fixture
def policy():
    """Random in every weight, as after training."""
    generator = torch.Generator().manual_seed(0)
    result = Policy(generator)
    for weight in result.parameters():
        torch.nn.init.normal_(weight, generator=generator)
    result.sentence_mean.fill_(0.4)
    result.cell_std.fill_(0.3)
    result.slope.fill_(0.5)
    return result


@pytest.fixture(scope="module")
def candidates():
    return describe(simulated_views(40, seed=1)[0], 8)


def test_a_new_policy_is_undecided(candidates):
    accept_prob, keep_prob = act(Policy(torch.Generator().manual_seed(0)), candidates)
    np.testing.assert_array_equal(accept_prob, 0.5)
    np.testing.assert_array_equal(keep_prob, 0.5)


def test_mirrored_cells_give_mirrored_decisions(policy, candidates):
    accept_prob, keep_prob = act(policy, candidates)
    mirrored = replace(candidates, cells=candidates.cells[:, :, ::-1].copy())
    mirrored_accept, mirrored_keep = act(policy, mirrored)
    np.testing.assert_allclose(mirrored_accept, accept_prob, rtol=1e-5)
    np.testing.assert_allclose(mirrored_keep[:, :, ::-1], keep_prob, atol=1e-5)
    assert np.ptp(keep_prob) > 0.5  # a constant would be symmetric too


def test_cells_far_away_do_not_matter(policy, candidates):
    """A cell's decision depends on its 3 x 3 neighbourhood and on the sentence, on nothing else."""
    cells = candidates.cells.copy()
    cells[:, 0, 0] = 1 - cells[:, 0, 0]
    _, before = act(policy, candidates)
    _, after = act(policy, replace(candidates, cells=cells))
    changed = (np.abs(after - before) > 1e-6).any(0)
    assert changed[:2, :2].all()
    changed[:2, :2] = False
    assert not changed.any()


def test_cells_at_the_border_decide_like_inner_ones(policy, candidates):
    """Where all cells look alike, so do all decisions of a sentence: the image's edge is no feature."""
    cells = np.broadcast_to(candidates.cells[:, :1, :1], candidates.cells.shape).copy()
    _, keep_prob = act(policy, replace(candidates, cells=cells))
    np.testing.assert_allclose(keep_prob, np.broadcast_to(keep_prob[:, 4:5, 4:5], keep_prob.shape), atol=1e-5)
