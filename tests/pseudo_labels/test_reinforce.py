"""Checks REINFORCE training by exact gradients, synthetic teachers with known truth, and absence of collapse."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from simulated_views import described, judged, simulated_views
from sklearn.metrics import log_loss, roc_auc_score

from l2l_core.config import load_params
from l2l_core.pseudo_labels import reinforce
from l2l_core.pseudo_labels.features import CELL_FEATURES, SENTENCE_FEATURES, CandidateTruth, confusion_against_votes
from l2l_core.pseudo_labels.policy import Actor
from l2l_core.pseudo_labels.reinforce import (
    CURVE_COLUMNS,
    _reliability,
    clipped_loss,
    decision_log_prob,
    group_advantage,
    normalized_advantage,
    policy_gradient_loss,
    train_policy,
)
from l2l_core.pseudo_labels.reward import utility
from l2l_core.pseudo_labels.select import select_labels

GRID = 8
PARAMS = load_params().select.model_copy(
    update={"method": "reinforce", "policy_steps": 200, "group_size": 64, "wrong_cost": 1.0}
)


def seen_and_judged(count, seed):
    views, truth = simulated_views(count, seed)
    return described(views, GRID), judged(views, truth, GRID)


def taken(rows, table):
    return type(table)(**{name: values[rows] for name, values in vars(table).items()})


def chosen(table, mask):
    return taken(np.flatnonzero(mask), table)


@pytest.fixture(scope="module")
def labeled():
    return seen_and_judged(150, seed=11)


@pytest.fixture(scope="module")
def unlabeled():
    return seen_and_judged(400, seed=12)[0]


@pytest.fixture(scope="module")
def held_out():
    return seen_and_judged(800, seed=13)


@pytest.fixture(scope="module")
def trained(labeled, unlabeled):
    """Long enough that what it learns does not depend on the seed."""
    return train_policy(*labeled, unlabeled, PARAMS.model_copy(update={"policy_steps": 600}), seed=0)


def test_gradient_estimator_is_unbiased():
    """One sentence has two candidates of two cells, so there are 9 actions: none, or one candidate with any subset
    of its cells. The expected reward is summed over all actions and differentiated. The estimate is averaged over
    all 81 groups of two draws, weighted by their probabilities."""
    choice_logits = torch.tensor([[0.3, -0.7]], dtype=torch.float64, requires_grad=True)
    keep_logits = torch.tensor([1.1, -0.2, 0.4, 0.9], dtype=torch.float64).reshape(1, 2, 1, 2).requires_grad_()
    right = [[[0.5, 0.1, 0.3, 0.1], [0.1, 0.3, 0.2, 0.4]], [[0.3, 0.0, 0.1, 0.2], [0.4, 0.1, 0.6, 0.0]]]
    confusion = torch.tensor(right, dtype=torch.float64)[:, None]  # [K, 1, 2, 4]
    none = 2
    cells = [torch.tensor([[bits]], dtype=torch.float64) for bits in itertools.product((0.0, 1.0), repeat=2)]
    actions = [(none, torch.zeros(1, 1, 2, dtype=torch.float64))]
    actions += [(kind, kept) for kind in (0, 1) for kept in cells]

    def reward(kind, kept):
        return torch.zeros((), dtype=torch.float64) if kind == none else utility(confusion[kind], kept[0], 1.0)

    def probability(kind, kept):
        weights = torch.cat([choice_logits[0].exp(), torch.ones(1, dtype=torch.float64)])  # no candidate: exp(0)
        taken = weights[kind] / weights.sum()
        if kind == none:
            return taken
        keeps = torch.sigmoid(keep_logits[0, kind])
        return taken * torch.prod(torch.where(kept[0] > 0, keeps, 1 - keeps))

    expected = sum(probability(*action) * reward(*action) for action in actions)
    exact = torch.autograd.grad(expected, [choice_logits, keep_logits])
    assert sum(probability(*action).item() for action in actions) == pytest.approx(1.0)

    estimate = [torch.zeros_like(gradient) for gradient in exact]
    for group in itertools.product(actions, repeat=2):
        choice = torch.tensor([[kind] for kind, _ in group])
        keep = torch.stack([kept for _, kept in group])
        rewards = torch.stack([reward(*action) for action in group])[:, None]
        loss = policy_gradient_loss(choice_logits, keep_logits, choice, keep, group_advantage(rewards))
        both = (probability(*group[0]) * probability(*group[1])).detach()
        for total, gradient in zip(estimate, torch.autograd.grad(loss, [choice_logits, keep_logits]), strict=True):
            total -= both * gradient
    for found, wanted in zip(estimate, exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        assert wanted.abs().min() > 1e-3  # otherwise the check is trivial


def test_advantage_compares_with_the_rest_of_the_group():
    """Rewards 1, 2, and 6 against the means of the others: 4, 3.5, and 1.5."""
    advantage = group_advantage(torch.tensor([[1.0], [2.0], [6.0]]))
    torch.testing.assert_close(advantage, torch.tensor([[-3.0], [-1.5], [4.5]]))


def test_grpo_divides_advantages_by_the_groups_deviation():
    """Rewards 1, 2, and 6 have mean 3 and variance 14 / 3. Equal rewards have no advantage."""
    advantage = normalized_advantage(torch.tensor([[1.0, 0.3], [2.0, 0.3], [6.0, 0.3]]))
    expected = torch.tensor([[-2.0, 0.0], [-1.0, 0.0], [3.0, 0.0]]) / (14 / 3) ** 0.5
    torch.testing.assert_close(advantage, expected, rtol=1e-4, atol=1e-5)


def test_log_probabilities_of_decisions_multiply_to_those_of_actions():
    """A sentence with two candidates of two cells has 9 actions: four ways to keep the cells of each candidate, and
    none. The probability of an action is that of its choice times those of its cells. All nine sum to 1."""
    choice_logits, keep_logits = torch.tensor([[0.3, -0.7]]), torch.tensor([[[[1.1, -0.2]], [[0.4, 0.9]]]])
    weights = [np.exp(0.3), np.exp(-0.7), 1.0]
    total = 0.0
    for kind, *kept in [(2, 0, 0), *itertools.product((0, 1), repeat=3)]:
        found = decision_log_prob(choice_logits, keep_logits, torch.tensor([[kind]]), torch.tensor([[[kept]]]).float())
        assert found.shape == (1, 1, 3)
        factors = [weights[kind] / sum(weights), 1.0, 1.0]
        if kind < 2:
            prob = 1 / (1 + np.exp(-keep_logits[0, kind, 0].numpy()))
            factors[1:] = np.where(kept, prob, 1 - prob)
        np.testing.assert_allclose(found[0, 0].exp(), factors, rtol=1e-5)
        total += np.prod(factors)
    assert total == pytest.approx(1.0)


def test_grpo_clips_ratios_that_would_move_on():
    """Of ratios 1.5 and 0.5, clipped at 1.2 and 0.8, a good action gains 1.2 and 0.5, and a bad one loses 1.5 and 0.8.
    Only 0.5 of the good and 1.5 of the bad one have a gradient, which equals the ratio."""
    log_prob = torch.tensor([[[1.5, 0.5]], [[1.5, 0.5]]], dtype=torch.float64).log().requires_grad_()
    loss = clipped_loss(log_prob, torch.zeros_like(log_prob), torch.tensor([[2.0], [-2.0]], dtype=torch.float64))
    assert loss.item() == pytest.approx(-2 * (1.2 + 0.5 - 1.5 - 0.8) / 2)
    loss.backward()
    np.testing.assert_allclose(log_prob.grad, [[[0, -0.5]], [[1.5, 0]]])


def test_grpo_compares_the_moved_actor_with_the_one_that_drew(labeled, monkeypatch):
    """Against log probabilities of torch.distributions, for an actor far enough away that many ratios are clipped."""
    monkeypatch.setattr(reinforce, "CRITIC_WEIGHT", 0.0)
    params = PARAMS.model_copy(update={"update": "grpo", "entropy_bonus": 0.0, "group_size": 8})
    seen, truth = labeled
    features, rows = np.zeros((*seen.sentence.shape[:2], 1), np.float32), np.arange(20)
    seen = replace(seen, sentence=np.concatenate([seen.sentence, features], axis=2)[..., : len(SENTENCE_FEATURES)])
    actor = Actor(torch.Generator().manual_seed(0))
    group = reinforce._sample(actor, seen, rows, truth.cells[rows], params, 0.0, torch.Generator().manual_seed(1))
    with torch.no_grad():
        actor.accept_bias += 0.5
        actor.keep_bias -= 1.0
    moved = actor(group.cells, group.sentence)

    def log_prob(logits):
        choices, cells = logits
        choices = torch.cat([choices, torch.zeros(len(rows), 1)], 1)
        taken = torch.distributions.Categorical(logits=choices).log_prob(group.choice)
        all_cells = torch.distributions.Bernoulli(logits=torch.cat([cells, cells[:, :1]], 1))
        kept = all_cells.log_prob(group.keep[:, :, None].expand(-1, -1, all_cells.batch_shape[1], -1, -1))
        own = kept.gather(2, group.choice[..., None, None, None].expand(-1, -1, 1, GRID, GRID))[:, :, 0]
        own = own * (group.choice < choices.shape[1] - 1)[..., None, None]
        return torch.cat([taken[..., None], own.flatten(2)], 2)

    ratio = (log_prob(moved) - log_prob(group.logits)).exp()
    assert (ratio > 1.2).any()
    assert (ratio < 0.8).any()
    spread = group.reward.std(0, correction=0) + 1e-4
    advantage = ((group.reward - group.reward.mean(0)) / spread)[..., None]
    expected = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum(2).mean()
    torch.testing.assert_close(reinforce._loss(group, moved, params), expected, rtol=1e-4, atol=1e-4)


def test_grpo_stays_finite_for_probabilities_of_nearly_zero():
    log_prob = torch.tensor([[[500.0, -500.0]]], requires_grad=True)
    for advantage in (1.0, 0.0, -1.0):
        clipped_loss(log_prob, torch.zeros(1, 1, 2), torch.full((1, 1), advantage)).backward()
    assert log_prob.grad.isfinite().all()


def test_grpo_starts_with_the_policy_gradient():
    """With all ratios 1, the gradient is that of REINFORCE with the same advantages. Later ones match differences."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    logits, old = (draw(3, 2), draw(3, 2, 2, 2)), [draw(3, 2).detach(), draw(3, 2, 2, 2).detach()]
    choice = torch.randint(3, (5, 3), generator=generator)
    keep, advantage = (draw(5, 3, 2, 2) > 0).double(), draw(5, 3).detach()

    def loss(choice_logits, keep_logits, before):
        actions = choice, keep
        return clipped_loss(
            decision_log_prob(choice_logits, keep_logits, *actions), decision_log_prob(*before, *actions), advantage
        )

    expected = torch.autograd.grad(policy_gradient_loss(*logits, choice, keep, advantage), logits)
    first = torch.autograd.grad(loss(*logits, [one.detach() for one in logits]), logits)
    for found, wanted in zip(first, expected, strict=True):
        torch.testing.assert_close(found, wanted)
        assert wanted.abs().max() > 0.01
    assert torch.autograd.gradcheck(lambda *given: loss(*given, old), logits)
    later = torch.autograd.grad(loss(*logits, old), logits)
    assert not torch.allclose(later[1], expected[1])


def test_grpo_takes_as_many_steps_as_reinforce_on_fewer_draws(labeled, unlabeled, monkeypatch):
    drawn, steps, sample, step = [], [], reinforce._sample, torch.optim.AdamW.step

    def noted_sample(*given):
        drawn.append(len(steps))
        return sample(*given)

    def noted_step(*given):
        steps.append(1)
        return step(*given)

    monkeypatch.setattr(reinforce, "_sample", noted_sample)
    monkeypatch.setattr(torch.optim.AdamW, "step", noted_step)
    monkeypatch.setattr(reinforce, "NOISES", (0.5,))
    monkeypatch.setattr(reinforce, "NOISE_STEP_DIVISOR", 1000)
    monkeypatch.setattr(reinforce, "ACTORS", 1)
    for update, every in (("grpo", 4), ("reinforce", 1)):
        drawn.clear()
        steps.clear()
        params = PARAMS.model_copy(update={"policy_steps": 14, "group_size": 16, "update": update})
        trained = train_policy(*labeled, unlabeled, params, seed=0)
        assert (len(steps), sorted(set(drawn))) == (14, list(range(0, 14, every)))
        assert [row["step"] for row in trained.curve] == [10, 14]


def test_cells_of_rejected_candidates_get_no_gradient():
    """The first sentence takes no candidate, the other its second one."""
    keep_logits = torch.zeros(2, 2, 2, 2, requires_grad=True)
    choice = torch.tensor([[2, 1], [2, 1]])
    advantage = torch.tensor([[1.0, 1.0], [-3.0, -3.0]])
    policy_gradient_loss(torch.zeros(2, 2), keep_logits, choice, torch.ones(2, 2, 2, 2), advantage).backward()
    assert (keep_logits.grad[0] == 0).all()
    assert (keep_logits.grad[1, 0] == 0).all()
    assert (keep_logits.grad[1, 1] != 0).all()


@pytest.mark.parametrize("update", ["reinforce", "grpo"])
def test_learns_a_feature_that_reveals_the_truth(labeled, unlabeled, held_out, update):
    """The column `words` states whether the label is correct. The policy must discover this through the reward alone
    and use it on unseen sentences."""

    def revealed(candidates, right):
        sentence = candidates.sentence.copy()
        sentence[..., SENTENCE_FEATURES.index("words")] = right
        return replace(candidates, sentence=sentence)

    seen, truth = labeled
    test_seen, test_truth = held_out
    params = PARAMS.model_copy(update={"update": update})
    policy = train_policy(revealed(seen, truth.iou > 0.5), truth, revealed(unlabeled, 0.5), params, seed=0).policy
    selection = select_labels(PARAMS, revealed(test_seen, test_truth.iou > 0.5), policy, test_truth)
    assert roc_auc_score(test_truth.iou[:, 0] > 0.5, selection.accept_prob) > 0.97
    assert np.mean(selection.accepted == (test_truth.iou[:, 0] > 0.5)) > 0.9


def test_beats_fixed_rules_on_unseen_sentences(trained, held_out):
    seen, truth = held_out
    right = truth.iou[:, 0] > 0.5

    def apply(rule):
        return select_labels(PARAMS.model_copy(update={"method": rule}), seen, trained.policy, truth)

    rules = {rule: apply(rule) for rule in ("all", "none", "topk", "agreement", "ranksum", "reinforce")}
    worth = {rule: selection.reward.mean() for rule, selection in rules.items()}
    learned = worth.pop("reinforce")
    assert learned > max(worth.values()) + 0.02, (learned, worth)
    auroc = {rule: roc_auc_score(right, rules[rule].accept_prob) for rule in ("reinforce", "ranksum")}
    assert auroc["reinforce"] > auroc["ranksum"] + 0.02, auroc


def test_dropping_cells_increases_the_reward(trained, held_out):
    """For accepted sentences, the kept cells have a higher utility than all cells."""
    seen, truth = held_out
    selection = select_labels(PARAMS, seen, trained.policy, truth)
    cells = torch.from_numpy(truth.cells[:, 0])
    everything = utility(cells, torch.ones(cells.shape[:3]), 1.0).numpy()
    assert selection.reward[selection.accepted].mean() > everything[selection.accepted].mean() + 0.01


def test_kept_cells_contain_foreground_and_background(trained, held_out):
    """The policy does not collapse to background only or to foreground only."""
    seen, _ = held_out
    selection = select_labels(PARAMS, seen, trained.policy)
    label = seen.cells[:, 0, ..., CELL_FEATURES.index("candidate")].astype(np.float32)
    kept, accepted = selection.keep_cells, selection.accepted
    assert (label * kept).sum((1, 2))[accepted].min() > 0
    assert (label * kept)[accepted].sum() > 0.5 * label[accepted].sum()
    assert ((1 - label) * kept)[accepted].sum() > 0.5 * (1 - label)[accepted].sum()


def test_accepts_small_objects_nearly_as_often_as_large_ones(trained, held_out):
    """Compares the smaller and the larger half of the correct labels."""
    seen, truth = held_out
    selection = select_labels(PARAMS, seen, trained.policy)
    right = truth.iou[:, 0] > 0.5
    size = seen.sentence[:, 0, SENTENCE_FEATURES.index("size")]
    small = size < np.median(size[right])
    assert selection.accepted[right & small].mean() > 0.75 * selection.accepted[right & ~small].mean()


def test_calibration_improves_the_log_loss_on_unseen_sentences(trained, held_out):
    """Calibrated probabilities have a lower log loss than the policy's overconfident ones and than the constant base
    rate. The decisions do not change."""
    seen, truth = held_out
    right = truth.iou[:, 0] > 0.5
    accept_prob = trained.policy.act(seen).accept_prob
    own = 1 / (1 + np.exp(-trained.policy.act(seen).accept_logit.astype(np.float64)))
    calibrated = log_loss(right, accept_prob)
    assert calibrated < log_loss(right, own)
    assert calibrated < log_loss(right, np.full(len(right), right.mean()))
    np.testing.assert_array_equal(accept_prob > 0.5, own > 0.5)


def test_training_is_deterministic_for_any_thread_count(labeled, unlabeled):
    params = PARAMS.model_copy(update={"policy_steps": 20})
    torch.manual_seed(1)
    first = train_policy(*labeled, unlabeled, params, seed=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(2)  # no draw may come from the global generator
    state = torch.get_rng_state()
    second = train_policy(*labeled, unlabeled, params, seed=3)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    other = train_policy(*labeled, unlabeled, params, seed=4)
    assert first.curve == second.curve
    for one, two in zip(first.policy.actors, second.policy.actors, strict=True):
        for name, value in one.state_dict().items():
            assert torch.equal(value, two.state_dict()[name]), name
    assert first.policy.slope == second.policy.slope
    assert not torch.equal(first.policy.actors[0].accept, other.policy.actors[0].accept)


def test_reward_curve_rises(trained):
    assert [row["step"] for row in trained.curve] == list(range(10, 601, 10))
    assert tuple(trained.curve[0]) == CURVE_COLUMNS
    assert trained.curve[-1]["reward"] > trained.curve[0]["reward"] + 0.05
    assert trained.curve[-1]["entropy"] < trained.curve[0]["entropy"]


def test_entropy_bonus_keeps_the_policy_exploring(labeled, unlabeled):
    def last_entropy(bonus):
        params = PARAMS.model_copy(update={"policy_steps": 60, "entropy_bonus": bonus})
        return train_policy(*labeled, unlabeled, params, seed=0).curve[-1]["entropy"]

    assert last_entropy(1.0) > last_entropy(0.0) + 0.1


def test_unlabeled_term_increases_agreement(labeled, unlabeled):
    """With a large weight of the term, the kept cells of unlabeled sentences agree better with the other views."""

    def agreement_kept(weight):
        params = PARAMS.model_copy(update={"policy_steps": 100, "unlabeled_weight": weight})
        return select_labels(params, unlabeled, train_policy(*labeled, unlabeled, params, seed=0).policy).reward.mean()

    assert agreement_kept(20.0) > agreement_kept(0.0) + 0.01


def test_training_runs_on_one_thread(labeled, unlabeled, monkeypatch):
    """Small sums can be equal on two threads too, so equal bits alone would not prove this."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []

    def watched(steps, *_):
        seen.append(torch.get_num_threads())
        return iter(steps)

    monkeypatch.setattr("l2l_core.pseudo_labels.reinforce.progress", watched)
    try:
        train_policy(*labeled, unlabeled, PARAMS.model_copy(update={"policy_steps": 1}), seed=0)
    finally:
        torch.set_num_threads(threads)
    assert set(seen) == {1}


def test_learns_to_keep_nothing_from_all_wrong_labels(labeled, unlabeled):
    seen, truth = labeled
    wrong = truth.iou[:, 0] < 0.1
    policy = train_policy(chosen(seen, wrong), chosen(truth, wrong), unlabeled, PARAMS, seed=0).policy
    selection = select_labels(PARAMS, seen, policy)
    # Sentences unlike the wrong ones are new to the policy, but it keeps almost none of their cells.
    assert selection.keep_cells.mean() < 0.05
    assert not selection.accepted[wrong].any()


def test_learns_to_keep_nearly_all_from_all_correct_labels(labeled, unlabeled):
    seen, truth = labeled
    right = truth.iou[:, 0] > 0.8
    policy = train_policy(chosen(seen, right), chosen(truth, right), unlabeled, PARAMS, seed=0).policy
    selection = select_labels(PARAMS, chosen(seen, right), policy)
    assert selection.accepted.mean() > 0.9
    assert selection.keep_cells.mean() > 0.8


@pytest.mark.parametrize("count", [1, 4])
def test_trains_on_few_labeled_sentences(labeled, unlabeled, count):
    seen, truth = labeled
    params = PARAMS.model_copy(update={"policy_steps": 30})
    policy = train_policy(taken(slice(0, count), seen), taken(slice(0, count), truth), unlabeled, params, 0).policy
    action = policy.act(unlabeled)
    assert np.isfinite(action.accept_prob).all()
    assert np.isfinite(action.keep_prob).all()


def test_trains_without_unlabeled_sentences(labeled, unlabeled):
    params = PARAMS.model_copy(update={"policy_steps": 10})
    trained = train_policy(*labeled, taken(slice(0, 0), unlabeled), params, seed=0)
    assert len(trained.curve) == 1
    assert not select_labels(PARAMS, taken(slice(0, 0), unlabeled), trained.policy).accepted.size


def test_refuses_mismatched_or_empty_labeled_sentences(labeled, unlabeled):
    seen, truth = labeled
    with pytest.raises(ValueError, match="same sentences"):
        train_policy(seen, taken(slice(None, None, -1), truth), unlabeled, PARAMS, seed=0)
    with pytest.raises(ValueError, match="at least one"):
        train_policy(taken(slice(0, 0), seen), taken(slice(0, 0), truth), unlabeled, PARAMS, seed=0)


def test_uses_unlabeled_agreement_only_if_it_is_reliable(labeled, unlabeled):
    """If the agreement of labeled sentences says nothing about the truth (one constant view), the term is switched
    off. Other unlabeled sentences with the same scaling then change nothing."""
    seen, truth = labeled
    constant = replace(seen, cells=np.repeat(seen.cells[:1], len(seen.sent_id), axis=0))
    turned = taken(slice(None, None, -1), unlabeled)  # other draws, but the same set and the same scaling
    params = PARAMS.model_copy(update={"policy_steps": 30, "unlabeled_weight": 5.0})

    def curve(candidates, teaching):
        return [row["reward"] for row in train_policy(candidates, truth, teaching, params, seed=0).curve]

    np.testing.assert_allclose(curve(constant, unlabeled), curve(constant, turned), rtol=1e-5)
    assert not np.allclose(curve(seen, unlabeled), curve(seen, turned), rtol=1e-5)


def test_agreement_reliability_covers_all_candidates(labeled):
    """If agreement separates correct from wrong labels, its reliability is 1. A second candidate with equal
    agreement and inverted IoUs reduces it to 0."""
    seen, truth = labeled
    confusion = torch.from_numpy(confusion_against_votes(seen.cells[:, 0]))
    order = utility(confusion, torch.ones(confusion.shape[:-1]), PARAMS.wrong_cost).numpy().argsort().argsort()
    iou = (order / len(order)).astype(np.float32)[:, None]
    both = replace(seen, cells=np.concatenate([seen.cells] * 2, axis=1))
    cells = np.concatenate([truth.cells] * 2, axis=1)
    assert _reliability(seen, CandidateTruth(truth.sent_id, truth.cells, iou), PARAMS) == pytest.approx(1.0)
    told = _reliability(both, CandidateTruth(truth.sent_id, cells, np.concatenate([iou, 1 - iou], axis=1)), PARAMS)
    assert told == pytest.approx(0.0, abs=0.02)


def test_constant_features_get_no_noise(labeled, unlabeled, monkeypatch):
    """Even with very large noise, only the varying columns change."""
    seen, truth = labeled
    words = SENTENCE_FEATURES.index("words")

    def fixed(candidates):
        sentence = candidates.sentence.copy()
        sentence[..., words] = 2.0
        return replace(candidates, sentence=sentence)

    inputs = []
    forward = Actor.forward

    def watched(self, cells, sentence):
        inputs.append(sentence.detach().numpy())
        return forward(self, cells, sentence)

    monkeypatch.setattr(Actor, "forward", watched)
    monkeypatch.setattr("l2l_core.pseudo_labels.reinforce.NOISES", (2.0,))
    train_policy(fixed(seen), truth, fixed(unlabeled), PARAMS.model_copy(update={"policy_steps": 1}), seed=0)
    training = inputs[0]  # [B, K, D]; later inputs are for calibration, without noise
    np.testing.assert_array_equal(training[..., words], 0)
    spread = training.std((0, 1))
    assert spread[SENTENCE_FEATURES.index("confidence")] > 1.5  # 2 of noise, 1 of the feature itself


def test_chooses_a_correct_candidate_and_rejects_sentences_without_one(labeled):
    """Each sentence has two candidates, each correct or wrong as a whole at random. `words` reveals which; all else
    is equal. The policy must choice a correct candidate if there is one, and none if both are wrong."""
    seen, _ = labeled
    right = np.random.default_rng(0).random((len(seen.sent_id), 2)) > 0.5
    share = seen.cells[..., CELL_FEATURES.index("candidate")].astype(np.float32)
    nothing = np.zeros_like(share)
    when_right = np.stack([share, nothing, 1 - share, nothing], axis=-1)
    when_wrong = np.stack([nothing, share, 1 - share, nothing], axis=-1)
    sentence = np.concatenate([seen.sentence, seen.sentence], axis=1)
    sentence[..., SENTENCE_FEATURES.index("words")] = right
    both = replace(seen, cells=np.concatenate([seen.cells, seen.cells], axis=1), sentence=sentence)
    cells = np.where(right[..., None, None, None], when_right, when_wrong)
    policy = train_policy(
        both, CandidateTruth(seen.sent_id, cells, right * 0.9), taken(slice(0, 0), both), PARAMS, 0
    ).policy
    selection = select_labels(PARAMS, both, policy)
    has_right = right.any(1)
    assert (selection.accepted == has_right).mean() > 0.95
    assert right[np.arange(len(right)), selection.choice][has_right].mean() > 0.95


def test_chooses_the_better_of_two_correct_candidates(labeled):
    """Both candidates are worth taking, but one has a tenth more wrong pixels; `words` reveals which. Scored
    separately, both would be accepted, and nothing would show which one is better."""
    seen, _ = labeled
    better = np.random.default_rng(1).random(len(seen.sent_id)) > 0.5
    better = np.stack([better, ~better], axis=1)
    share = seen.cells[..., CELL_FEATURES.index("candidate")].astype(np.float32)
    wrong = np.where(better[..., None, None], 0.0, 0.1) * share
    cells = np.stack(np.broadcast_arrays(share - wrong, wrong, 1 - share, np.float32(0)), axis=-1).astype(np.float32)
    sentence = np.concatenate([seen.sentence, seen.sentence], axis=1)
    sentence[..., SENTENCE_FEATURES.index("words")] = better
    both = replace(seen, cells=np.concatenate([seen.cells, seen.cells], axis=1), sentence=sentence)
    truth = CandidateTruth(seen.sent_id, cells, np.where(better, 1.0, 0.9))
    selection = select_labels(PARAMS, both, train_policy(both, truth, taken(slice(0, 0), both), PARAMS, 0).policy)
    labels = share[:, 0].any((1, 2))
    assert selection.accepted[labels].mean() > 0.95
    assert better[np.arange(len(better)), selection.choice][labels].mean() > 0.95


def test_policy_starts_from_the_estimates_of_the_critic(labeled, unlabeled):
    """Without training steps, the policy accepts a label exactly if the critic predicts a positive utility: an IoU
    above 0.5."""
    trained = train_policy(*labeled, unlabeled, PARAMS.model_copy(update={"policy_steps": 0}), seed=0)
    judged = trained.policy.critic.estimate(unlabeled)
    estimate = judged.sentence[..., SENTENCE_FEATURES.index("estimate")]
    clear = np.abs(estimate[:, 0] - 0.5) > 0.01
    has_label = (unlabeled.cells[:, 0, ..., CELL_FEATURES.index("candidate")] > 0).any((1, 2))
    accepted = trained.policy.act(unlabeled).accepted
    np.testing.assert_array_equal(accepted[clear & has_label], estimate[clear & has_label, 0] > 0.5)
    assert 0.1 < accepted.mean() < 0.9


def test_seed_barely_changes_the_accepted_labels(labeled, unlabeled, held_out):
    """With the same data and other draws, nearly the same labels are accepted."""
    seen, _ = held_out
    params = PARAMS.model_copy(update={"policy_steps": 60})
    first, second = (train_policy(*labeled, unlabeled, params, seed).policy.act(seen).accepted for seed in (0, 1))
    assert (first == second).mean() > 0.93


def test_selects_the_noise_with_the_highest_out_of_fold_reward(labeled, unlabeled, monkeypatch):
    """The rewards are fixed by hand. With few labeled sentences, the first noise is used without comparison."""
    seen, truth = labeled
    used, earned = [], {0.5: 1.0, 0.0: 2.0}

    def train_actor(actor, candidates, *rest):
        used.append(rest[-2])
        return []

    monkeypatch.setattr(reinforce, "_train_actor", train_actor)
    monkeypatch.setattr(reinforce, "_expected_reward", lambda *_: earned[used[-1]])
    train_policy(seen, truth, unlabeled, PARAMS, seed=0)
    assert used == [0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    used.clear()
    train_policy(taken(slice(0, 12), seen), taken(slice(0, 12), truth), unlabeled, PARAMS, seed=0)
    assert used == [0.5, 0.5, 0.5]
