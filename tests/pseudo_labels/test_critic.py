"""Checks the critic with a feature that reveals the IoU and with IoUs that no feature reveals."""

from dataclasses import replace

import numpy as np
import pytest
from simulated_views import described, judged, simulated_views

from l2l_core.core.metrics import auroc
from l2l_core.pseudo_labels.critic import ESTIMATE, train_critic
from l2l_core.pseudo_labels.features import SENTENCE_FEATURES, CandidateTruth

WORDS = SENTENCE_FEATURES.index("words")


@pytest.fixture(scope="module")
def seen_and_truth():
    views, truth = simulated_views(120, seed=5)
    return described(views, 6), judged(views, truth, 6)


def learn(labeled, truth, image=None):
    """Train a critic. By default, every sentence belongs to a different image."""
    return train_critic(labeled, truth, np.arange(len(labeled.sent_id)) if image is None else image, 0)


def told(candidates, value):
    sentence = candidates.sentence.copy()
    sentence[..., WORDS] = value
    return replace(candidates, sentence=sentence)


def test_critic_uses_a_feature_that_reveals_the_iou(seen_and_truth):
    seen, truth = seen_and_truth
    revealed = told(seen, truth.iou)
    learned, new = np.arange(80), np.arange(80, 120)
    critic, _ = learn(revealed.take(learned), truth.take(learned))
    estimate = critic.estimate(revealed.take(new)).sentence[..., ESTIMATE]
    blind, _ = learn(seen.take(learned), truth.take(learned))
    without = blind.estimate(seen.take(new)).sentence[..., ESTIMATE]
    error, error_without = (np.abs(one - truth.iou[new]).mean() for one in (estimate, without))
    assert error < 0.75 * error_without
    assert 0 <= estimate.min() <= estimate.max() <= 1


def test_out_of_fold_estimates_do_not_leak_the_truth(seen_and_truth):
    """No feature reveals the IoUs. Only a critic that trained on a sentence could rank it well."""
    seen, truth = seen_and_truth
    iou = np.random.default_rng(0).random(truth.iou.shape).astype(np.float32)
    critic, honest = learn(seen, CandidateTruth(truth.sent_id, truth.cells, iou))
    knows = critic.estimate(seen).sentence[..., ESTIMATE]
    assert auroc(honest.sentence[:, 0, ESTIMATE], iou[:, 0] > 0.5) < 58
    assert auroc(knows[:, 0], iou[:, 0] > 0.5) > auroc(honest.sentence[:, 0, ESTIMATE], iou[:, 0] > 0.5) + 10


def test_sentences_of_one_image_do_not_leak_into_each_other(seen_and_truth):
    """Each image has three sentences with the same label and the same IoU, which no feature reveals."""
    seen, truth = seen_and_truth
    image = np.arange(120) // 3
    thrice = seen.take(image * 3)
    iou = np.random.default_rng(1).random((40, 1)).astype(np.float32)[image]
    same = CandidateTruth(truth.sent_id, truth.cells, iou)

    def ranks(estimated):
        return auroc(estimated.sentence[:, 0, ESTIMATE], iou[:, 0] > 0.5)

    assert ranks(learn(thrice, same, image)[1]) < 58 < 65 < ranks(learn(thrice, same)[1])


def test_critic_ignores_previous_estimates(seen_and_truth):
    seen, truth = seen_and_truth
    critic, honest = learn(seen, truth)
    again, honest_again = learn(honest, truth)
    np.testing.assert_array_equal(honest.sentence, honest_again.sentence)
    np.testing.assert_array_equal(critic.estimate(honest).sentence, again.estimate(seen).sentence)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_critic_trains_on_few_labeled_sentences(seen_and_truth, count):
    seen, truth = seen_and_truth
    critic, honest = learn(seen.take(np.arange(count)), truth.take(np.arange(count)))
    assert np.isfinite(honest.sentence).all()
    assert np.isfinite(critic.estimate(seen).sentence).all()


def test_critic_accepts_an_empty_batch(seen_and_truth):
    seen, truth = seen_and_truth
    critic, _ = learn(seen, truth)
    assert len(critic.estimate(seen.take(np.arange(0))).sent_id) == 0
