"""Checks the policy by symmetries of its inputs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from simulated_views import described, simulated_views

from l2l_core.pseudo_labels.features import CELL_FEATURES, SENTENCE_FEATURES, Candidates
from l2l_core.pseudo_labels.policy import Actor, act


@pytest.fixture
def actor():
    """An actor with random values in every weight, as after training. It keeps some foreground of most labels."""
    generator = torch.Generator().manual_seed(3)
    result = Actor(generator)
    for weight in result.parameters():
        torch.nn.init.normal_(weight, generator=generator)
    result.sentence_mean.fill_(0.4)
    result.cell_std.fill_(0.3)
    return result


@pytest.fixture(scope="module")
def candidates():
    return described(simulated_views(40, seed=1)[0], 8)


def test_a_new_policy_is_neutral_and_keeps_most_cells(candidates):
    action = act([Actor(torch.Generator().manual_seed(0))], candidates)
    np.testing.assert_array_equal(action.accept_prob, 0.5)
    np.testing.assert_allclose(action.keep_prob, 1 / (1 + np.exp(-3)), rtol=1e-6)


def test_flipped_cells_give_flipped_decisions(actor, candidates):
    plain = act([actor], candidates)
    mirrored = act([actor], replace(candidates, cells=candidates.cells[:, :, :, ::-1].copy()))
    np.testing.assert_allclose(mirrored.accept_prob, plain.accept_prob, rtol=1e-5)
    np.testing.assert_allclose(mirrored.keep_prob[:, :, ::-1], plain.keep_prob, atol=1e-5)
    assert np.ptp(plain.keep_prob) > 0.5  # a constant would be symmetric too


def test_cell_decisions_ignore_distant_cells(actor, candidates):
    """A cell's selection depends only on its 3 x 3 neighborhood and on the sentence."""
    cells = candidates.cells.copy()
    cells[:, :, 0, 0] = 1 - cells[:, :, 0, 0]
    before = act([actor], candidates).keep_prob
    after = act([actor], replace(candidates, cells=cells)).keep_prob
    changed = (np.abs(after - before) > 1e-6).any(0)
    assert changed[:2, :2].all()
    changed[:2, :2] = False
    assert not changed.any()


def test_border_cells_decide_like_inner_cells(actor, candidates):
    """If all cells are equal, all decisions of a sentence are equal: the image border is no feature."""
    cells = np.broadcast_to(candidates.cells[:, :, :1, :1], candidates.cells.shape).copy()
    keep_prob = act([actor], replace(candidates, cells=cells)).keep_prob
    np.testing.assert_allclose(keep_prob, np.broadcast_to(keep_prob[:, 4:5, 4:5], keep_prob.shape), atol=1e-5)


def test_never_accepts_a_candidate_without_kept_foreground(actor, candidates):
    """Each sentence has two candidates. The second is an empty copy with a higher logit, but the policy takes the
    first. If both are empty, the policy accepts neither, whatever its probability."""
    column = SENTENCE_FEATURES.index("words")
    with torch.no_grad():
        actor.accept_direct[0, column] = 100.0
        actor.keep_bias.fill_(500.0)
    empty = candidates.cells.copy()
    empty[..., CELL_FEATURES.index("candidate")] = 0
    wanted = candidates.sentence.copy()
    wanted[..., column] += 1.0
    first = np.where(np.arange(len(empty))[:, None, None, None, None] == 7, empty, candidates.cells)
    both = replace(
        candidates,
        cells=np.concatenate([first, empty], axis=1),
        sentence=np.concatenate([candidates.sentence, wanted], axis=1),
    )
    action = act([actor], both)
    labeled = (candidates.cells[:, 0, ..., CELL_FEATURES.index("candidate")] > 0).any((1, 2))
    labeled[7] = False
    np.testing.assert_array_equal(action.choice, ~labeled)  # if both are empty: the one with the higher logit
    assert not action.accepted[~labeled].any()
    assert action.accepted[labeled].any()
    with torch.no_grad():
        actor.keep_bias.fill_(-500.0)
    assert not act([actor], candidates).accepted.any()  # no cell of any label is kept


def test_chooses_the_candidate_with_the_highest_logit(actor, candidates):
    """The labels of three sentences become the candidates of one sentence. It gets the cells of the best candidate.
    Its acceptance probability follows from the summed odds of all candidates against none."""
    slope = 0.5
    alone = act([actor], candidates, slope)
    foreground = candidates.cells[:, 0, ..., CELL_FEATURES.index("candidate")] > 0
    rows = np.flatnonzero(((alone.keep_prob > 0.5) & foreground).any((1, 2)))[:9].reshape(3, 3)
    joined = Candidates(
        candidates.sent_id[:3],
        candidates.cells[rows, 0],
        candidates.sentence[rows, 0],
        candidates.confidence[:3],
        candidates.prior_iou[:3],
    )
    action = act([actor], joined, slope)
    odds = np.exp(alone.accept_logit[rows].astype(np.float64))
    np.testing.assert_array_equal(action.choice, odds.argmax(1))
    assert len(set(action.choice.tolist())) > 1  # a constant choice would prove nothing
    np.testing.assert_allclose(action.accept_prob, 1 / (1 + odds.sum(1) ** -slope), rtol=1e-5)
    np.testing.assert_array_equal(action.accepted, odds.sum(1) > 1)
    np.testing.assert_allclose(action.keep_prob, alone.keep_prob[rows[np.arange(3), action.choice]], atol=1e-6)


def test_several_actors_average_their_logits(candidates):
    """The logits of two actors differ by a constant. Together they decide as one actor with half that constant."""
    actors = [Actor(torch.Generator().manual_seed(4)) for _ in range(3)]
    for actor, (wanted, kept) in zip(actors, [(0.0, 0.0), (2.0, -4.0), (1.0, -2.0)], strict=True):
        with torch.no_grad():
            actor.accept_bias += wanted
            actor.keep_bias += kept
    both, expected = act(actors[:2], candidates), act(actors[2:], candidates)
    np.testing.assert_allclose(both.accept_logit, expected.accept_logit, rtol=1e-5)
    np.testing.assert_allclose(both.keep_prob, expected.keep_prob, rtol=1e-5)
