"""Checks the critic with a feature that reveals the IoU and with IoUs that no feature reveals."""

from dataclasses import replace

import numpy as np
import pytest
from simulated_views import described, judged, simulated_views

from l2l_core.core.metrics import auroc
from l2l_core.pseudo_labels.critic import ESTIMATE, train_critic
from l2l_core.pseudo_labels.features import SENTENCE_FEATURES, Outcome

WORDS = SENTENCE_FEATURES.index("words")


@pytest.fixture(scope="module")
def seen_and_outcome():
    views, truth = simulated_views(120, seed=5)
    return described(views, 6), judged(views, truth, 6)


def learn(labeled, outcome, image=None):
    """Train a critic. By default, every sentence belongs to a different image."""
    return train_critic(labeled, outcome, np.arange(len(labeled.sent_id)) if image is None else image, 0)


def told(candidates, value):
    sentence = candidates.sentence.copy()
    sentence[..., WORDS] = value
    return replace(candidates, sentence=sentence)


def test_critic_uses_a_feature_that_reveals_the_iou(seen_and_outcome):
    seen, outcome = seen_and_outcome
    revealed = told(seen, outcome.iou)
    learned, new = np.arange(80), np.arange(80, 120)
    critic, _ = learn(revealed.take(learned), outcome.take(learned))
    estimate = critic.judge(revealed.take(new)).sentence[..., ESTIMATE]
    blind, _ = learn(seen.take(learned), outcome.take(learned))
    without = blind.judge(seen.take(new)).sentence[..., ESTIMATE]
    error, error_without = (np.abs(one - outcome.iou[new]).mean() for one in (estimate, without))
    assert error < 0.75 * error_without
    assert 0 <= estimate.min() <= estimate.max() <= 1


def test_out_of_fold_estimates_do_not_leak_the_truth(seen_and_outcome):
    """No feature reveals the IoUs. Only a critic that trained on a sentence could rank it well."""
    seen, outcome = seen_and_outcome
    iou = np.random.default_rng(0).random(outcome.iou.shape).astype(np.float32)
    critic, honest = learn(seen, Outcome(outcome.sent_id, outcome.cells, iou))
    knows = critic.judge(seen).sentence[..., ESTIMATE]
    assert auroc(honest.sentence[:, 0, ESTIMATE], iou[:, 0] > 0.5) < 58
    assert auroc(knows[:, 0], iou[:, 0] > 0.5) > auroc(honest.sentence[:, 0, ESTIMATE], iou[:, 0] > 0.5) + 10


def test_sentences_of_one_image_do_not_leak_into_each_other(seen_and_outcome):
    """Each image has three sentences with the same label and the same IoU, which no feature reveals."""
    seen, outcome = seen_and_outcome
    image = np.arange(120) // 3
    thrice = seen.take(image * 3)
    iou = np.random.default_rng(1).random((40, 1)).astype(np.float32)[image]
    same = Outcome(outcome.sent_id, outcome.cells, iou)

    def ranks(estimated):
        return auroc(estimated.sentence[:, 0, ESTIMATE], iou[:, 0] > 0.5)

    assert ranks(learn(thrice, same, image)[1]) < 58 < 65 < ranks(learn(thrice, same)[1])


def test_critic_ignores_previous_estimates(seen_and_outcome):
    seen, outcome = seen_and_outcome
    critic, honest = learn(seen, outcome)
    again, honest_again = learn(honest, outcome)
    np.testing.assert_array_equal(honest.sentence, honest_again.sentence)
    np.testing.assert_array_equal(critic.judge(honest).sentence, again.judge(seen).sentence)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_critic_trains_on_few_labeled_sentences(seen_and_outcome, count):
    seen, outcome = seen_and_outcome
    critic, honest = learn(seen.take(np.arange(count)), outcome.take(np.arange(count)))
    assert np.isfinite(honest.sentence).all()
    assert np.isfinite(critic.judge(seen).sentence).all()


def test_critic_accepts_an_empty_batch(seen_and_outcome):
    seen, outcome = seen_and_outcome
    critic, _ = learn(seen, outcome)
    assert len(critic.judge(seen.take(np.arange(0))).sent_id) == 0
