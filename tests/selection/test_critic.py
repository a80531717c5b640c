"""Oracles: labels whose quality one feature shows, and the estimates that an honest critic must not know."""

from dataclasses import replace

import numpy as np
import pytest
from simulated_views import described, judged, simulated_views

from l2l_core.metrics import auroc
from l2l_core.selection.critic import ESTIMATE, train_critic
from l2l_core.selection.features import SENTENCE_FEATURES, Outcome

WORDS = SENTENCE_FEATURES.index("words")


@pytest.fixture(scope="module")
def seen_and_outcome():
    views, truth = simulated_views(120, seed=5)
    return described(views, 6), judged(views, truth, 6)


def told(candidates, value):
    sentence = candidates.sentence.copy()
    sentence[..., WORDS] = value
    return replace(candidates, sentence=sentence)


def test_it_finds_the_feature_that_shows_the_iou(seen_and_outcome):
    seen, outcome = seen_and_outcome
    revealed = told(seen, outcome.iou)
    learned, new = np.arange(80), np.arange(80, 120)
    critic, _ = train_critic(revealed.take(learned), outcome.take(learned), 0)
    estimate = critic.judge(revealed.take(new)).sentence[..., ESTIMATE]
    blind, _ = train_critic(seen.take(learned), outcome.take(learned), 0)
    without = blind.judge(seen.take(new)).sentence[..., ESTIMATE]
    error, error_without = (np.abs(one - outcome.iou[new]).mean() for one in (estimate, without))
    assert error < 0.75 * error_without
    assert 0 <= estimate.min() <= estimate.max() <= 1


def test_estimates_of_labeled_sentences_do_not_know_their_truth(seen_and_outcome):
    """IoUs that nothing shows: whoever estimated a sentence that it has learned from would rank them well."""
    seen, outcome = seen_and_outcome
    iou = np.random.default_rng(0).random(outcome.iou.shape).astype(np.float32)
    critic, honest = train_critic(seen, Outcome(outcome.sent_id, outcome.cells, iou), 0)
    knows = critic.judge(seen).sentence[..., ESTIMATE]
    assert auroc(honest.sentence[:, 0, ESTIMATE], iou[:, 0] > 0.5) < 58
    assert auroc(knows[:, 0], iou[:, 0] > 0.5) > auroc(honest.sentence[:, 0, ESTIMATE], iou[:, 0] > 0.5) + 10


def test_an_old_estimate_changes_nothing(seen_and_outcome):
    seen, outcome = seen_and_outcome
    critic, honest = train_critic(seen, outcome, 0)
    again, honest_again = train_critic(honest, outcome, 0)
    np.testing.assert_array_equal(honest.sentence, honest_again.sentence)
    np.testing.assert_array_equal(critic.judge(honest).sentence, again.judge(seen).sentence)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_handful_of_labeled_sentences_works(seen_and_outcome, count):
    seen, outcome = seen_and_outcome
    critic, honest = train_critic(seen.take(np.arange(count)), outcome.take(np.arange(count)), 0)
    assert np.isfinite(honest.sentence).all()
    assert np.isfinite(critic.judge(seen).sentence).all()


def test_no_sentences_are_judged_as_none(seen_and_outcome):
    seen, outcome = seen_and_outcome
    critic, _ = train_critic(seen, outcome, 0)
    assert len(critic.judge(seen.take(np.arange(0))).sent_id) == 0
