"""Checks hand-computed decisions on five sentences, and that decisions follow the order of the sentences."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from simulated_views import described, judged, simulated_views

from l2l_core.config import SelectParams, load_params
from l2l_core.pseudo_labels.critic import Critic
from l2l_core.pseudo_labels.features import CELL_FEATURES, SENTENCE_FEATURES, Candidates, CandidateTruth
from l2l_core.pseudo_labels.policy import Actor, Policy
from l2l_core.pseudo_labels.rules import best_fraction, mean_rank
from l2l_core.pseudo_labels.select import select_labels

RULES = get_args(SelectParams.model_fields["method"].annotation)


def params_of(rule, **changes):
    return load_params().select.model_copy(
        update={"method": rule, "keep_fraction": 0.4, "wrong_cost": 1.0, "unlabeled_weight": 0.2, **changes}
    )


@pytest.fixture
def five():
    """Five labels of one foreground cell each, with the votes 0, 1/4, 1/2, 3/4, and 1."""
    votes = np.linspace(0, 1, 5)
    cells = np.zeros((5, 1, 1, 1, len(CELL_FEATURES)), dtype=np.float16)
    cells[..., CELL_FEATURES.index("candidate")] = 1
    for name in ("votes", "candidate_votes"):
        cells[:, 0, 0, 0, CELL_FEATURES.index(name)] = votes
    seen = Candidates(
        sent_id=np.array([10, 11, 12, 13, 14]),
        cells=cells,
        sentence=np.zeros((5, 1, len(SENTENCE_FEATURES)), dtype=np.float32),
        confidence=np.array([0.9, 0.6, 0.8, 0.7, 0.95], dtype=np.float32),
        prior_iou=np.array([0.0, 0.5, 0.6, 0.0, 0.1], dtype=np.float32),
    )
    right = np.array([0.9, 0.5, 0.51, 0.0, 0.2], dtype=np.float32)
    shares = np.stack([right, 1 - right, 0 * right, 0 * right], axis=-1)[:, None, None, None, :]
    return seen, CandidateTruth(seen.sent_id, shares, right[:, None])


@pytest.mark.parametrize(
    ("rule", "accepted", "accept_prob"),
    [
        ("all", [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]),
        ("threshold", [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]),
        ("semires", [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]),
        ("mean_teacher", [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]),
        ("none", [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
        ("topk", [1, 0, 0, 0, 1], [0.8, 0.2, 0.6, 0.4, 1]),
        ("agreement", [0, 1, 1, 0, 0], [0.3, 0.8, 1, 0.3, 0.6]),
        ("ranksum", [0, 0, 1, 0, 1], [0.55, 0.5, 0.8, 0.35, 0.8]),
        ("oracle", [1, 0, 1, 0, 0], [0.9, 0.5, 0.51, 0, 0.2]),
    ],
)
def test_fixed_rules_match_hand_computed_decisions(five, rule, accepted, accept_prob):
    """The best 40% of five are two. The lowest rank is 1 / 5; the two prior IoUs of 0 share the rank 1.5 / 5."""
    seen, truth = five
    selection = select_labels(params_of(rule), seen, None, truth)
    np.testing.assert_array_equal(selection.accepted, np.array(accepted, dtype=bool))
    np.testing.assert_allclose(selection.accept_prob, accept_prob, atol=1e-6)
    np.testing.assert_array_equal(selection.keep_cells[:, 0, 0], selection.accepted)


def test_reward_is_the_utility_of_the_kept_cells(five):
    """For one foreground cell with a correct share v and no background, the reward is v / 2 - (1 - v). It is 0 for a
    rejected label. The share comes from the truth if given, otherwise from the votes 0, 1/4, ..."""
    seen, truth = five
    by_truth = select_labels(params_of("oracle"), seen, None, truth).reward
    np.testing.assert_allclose(by_truth, [0.35, 0, 0.51 / 2 - 0.49, 0, 0], atol=1e-6)
    by_votes = select_labels(params_of("all"), seen, None).reward
    np.testing.assert_allclose(by_votes, [-1, 0.125 - 0.75, -0.25, 0.375 - 0.25, 0.5], atol=1e-6)


def test_refuses_rules_without_their_required_inputs(five):
    seen, truth = five
    with pytest.raises(ValueError, match="oracle needs"):
        select_labels(params_of("oracle"), seen, None)
    with pytest.raises(ValueError, match="reinforce needs"):
        select_labels(params_of("reinforce"), seen, None)
    with pytest.raises(ValueError, match="same sentences"):
        select_labels(params_of("oracle"), seen, None, replace(truth, sent_id=truth.sent_id[::-1]))


class Silent(Critic):
    def estimate(self, candidates):
        return candidates


def eager_policy(accept_bias):
    """Return a random policy that surely accepts (bias 50) or rejects (bias -50) every sentence."""
    generator = torch.Generator().manual_seed(3)
    actor = Actor(generator)
    torch.nn.init.normal_(actor.keep, generator=generator)
    torch.nn.init.normal_(actor.accept, generator=generator)
    torch.nn.init.constant_(actor.accept_bias, accept_bias)
    return Policy(Silent(()), (actor,), 1.0)


def test_reinforce_never_accepts_a_label_without_kept_foreground(five):
    seen, _ = five
    cells = seen.cells.copy()
    cells[:2, ..., CELL_FEATURES.index("candidate")] = 0
    seen = replace(seen, cells=cells)
    policy = eager_policy(50.0)
    torch.nn.init.constant_(policy.actors[0].keep_bias, 100.0)
    np.testing.assert_array_equal(select_labels(params_of("reinforce"), seen, policy).accepted, [0, 0, 1, 1, 1])
    torch.nn.init.constant_(policy.actors[0].keep_bias, -100.0)
    assert not select_labels(params_of("reinforce"), seen, policy).accepted.any()


def test_a_rejected_label_keeps_no_cell(five):
    selection = select_labels(params_of("reinforce"), five[0], eager_policy(-50.0))
    assert not selection.accepted.any()
    assert not selection.keep_cells.any()
    assert (selection.reward == 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_reordering_the_sentences_reorders_the_decisions(rule):
    """This also holds for tied scores, since many prior IoUs are 0."""
    views, truth = simulated_views(60, seed=21)
    seen, truth = described(views, 6), judged(views, truth, 6)
    order = np.random.default_rng(0).permutation(60)

    def reordered(table):
        return type(table)(**{name: values[order] for name, values in vars(table).items()})

    policy = eager_policy(0.0)
    plain = select_labels(params_of(rule), seen, policy, truth)
    shuffled = select_labels(params_of(rule), reordered(seen), policy, reordered(truth))
    np.testing.assert_array_equal(shuffled.accepted, plain.accepted[order])
    np.testing.assert_array_equal(shuffled.keep_cells, plain.keep_cells[order])
    np.testing.assert_allclose(shuffled.accept_prob, plain.accept_prob[order], atol=1e-6)
    np.testing.assert_allclose(shuffled.reward, plain.reward[order], atol=1e-5)


def test_mean_rank_matches_scipy():
    score = np.random.default_rng(5).integers(0, 6, 50).astype(np.float32)
    np.testing.assert_allclose(mean_rank(score), rankdata(score) / 50, rtol=1e-6)


def test_best_fraction_breaks_ties_by_sentence_id():
    score = np.array([1.0, 2.0, 2.0, 2.0, 0.0])
    sent_id = np.array([5, 9, 7, 8, 1])
    np.testing.assert_array_equal(best_fraction(score, sent_id, 0.4), [0, 0, 1, 1, 0])
    np.testing.assert_array_equal(best_fraction(score, sent_id, 0.5), [0, 1, 1, 1, 0])  # 2.5 is rounded up
    np.testing.assert_array_equal(best_fraction(score, sent_id, 0.01), [0, 0, 1, 0, 0])  # at least one
    assert best_fraction(score, sent_id, 1.0).all()
