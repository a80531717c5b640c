"""Policy training: actors start from the critic's estimates and improve on them by REINFORCE or by GRPO.

REINFORCE (Williams, 1992): the baseline of an action is the mean reward of the other actions in its group. There is no
ratio clipping, and advantages are not divided by their standard deviation. GRPO (Shao et al., 2024) does both: it
divides by the group's standard deviation, and takes several steps on the same actions, with the clipped ratios of PPO
(Schulman et al., 2017).

Both take `policy_steps` steps of the same optimizer, on batches of the same size, with the same KL and entropy terms.
What differs is the number of draws: GRPO_EPOCHS of GRPO's steps share their sentences, noise and actions.

A KL term keeps an actor's distribution close to the critic's, so that unlikely candidates are still sampled. The actors
form an ensemble: their logits are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from l2l_core.config import SelectParams
from l2l_core.core.metrics import POSITIVE_IOU
from l2l_core.core.progress import progress
from l2l_core.core.seeding import evenly_picked, folds_of
from l2l_core.pseudo_labels.critic import ESTIMATE, train_critic
from l2l_core.pseudo_labels.features import Candidates, CandidateTruth, confusion_against_votes
from l2l_core.pseudo_labels.policy import Actor, Policy, act, one_thread
from l2l_core.pseudo_labels.reward import agreement_reliability, utility, utility_of_sums

SENTENCES_PER_STEP = 64
"""Labeled sentences per step, and as many unlabeled ones. This bounds a step's memory for any label budget."""

ACTORS = 3
"""Number of actors in the ensemble. Averaging reduces the effect of the seed."""

NOISES = (0.5, 0.0)
"""Standard deviations to try for Gaussian noise on the standardized sentence features, against overfitting. The
critic's estimate gets no noise. The value with the highest out-of-fold reward wins; in a tie, the first."""
NOISE_FOLDS = 2
NOISE_STEP_DIVISOR = 4
"""The actors that select the noise train for 1 / NOISE_STEP_DIVISOR of the steps and are scored on held-out images."""
FEWEST_FOR_NOISE = 20
"""With fewer labeled sentences, the first noise is used."""

CRITIC_SHARPNESS = 8.0
"""An actor's initial choice logit, per unit of the utility that the critic's estimate implies."""

CRITIC_WEIGHT = 0.1
"""Weight of the KL divergence between the choices of an actor and the critic."""

GRPO_EPOCHS = 4
"""Steps of GRPO on the same actions. In the first of them, all ratios are 1, and nothing is clipped."""
GRPO_CLIP = 0.2
"""Ratios of probabilities beyond 1 +- GRPO_CLIP give no gradient away from 1: the value of PPO."""
LARGEST_LOG_RATIO = 20.0
SMALLEST_REWARD_STD = 1e-4
"""Added to the standard deviation of a group's rewards. If all are equal, the advantages are 0."""

WEIGHT_DECAY = 0.01
"""The usual value of AdamW."""

UNLABELED_SENTENCES = 2000
"""Maximum unlabeled sentences in training, evenly picked. They set the feature scaling and the agreement reward."""

SMALLEST_STD = 1e-3
"""A feature with a smaller standard deviation counts as constant (proposal_score if every score is 1). It stays near 0
and gets no noise, so that it does not dominate the others."""

CURVE_COLUMNS = ("step", "reward", "keep_rate", "accept_rate", "entropy", "advantage_std")
"""Columns of the training curve: see `TrainedPolicy`."""

CURVE_EVERY = 10
"""Number of steps averaged into one row of the curve."""

SLOPES = np.logspace(-2, 1, 301)
"""Calibration slopes to try: small ones for overconfident actors, large ones for underconfident ones."""


@dataclass(frozen=True)
class TrainedPolicy:
    """A policy and the curve of its first actor: one dict per CURVE_EVERY steps.

    step: steps done. reward: mean true utility of the sampled actions. accept_rate, keep_rate: mean probability of
    taking any candidate, and of keeping a cell. entropy: of the choice plus the mean over the cells, in nats.
    advantage_std: standard deviation of the advantages. All are over the labeled sentences of the steps.
    """

    policy: Policy
    curve: list[dict[str, float]]


def train_policy(
    labeled: Candidates,
    truth: CandidateTruth,
    unlabeled: Candidates,
    params: SelectParams,
    seed: int,
    image_row: NDArray[np.int64] | None = None,
) -> TrainedPolicy:
    """Learn which candidates to accept and which cells to keep. Runs on one CPU thread and is bitwise reproducible.

    labeled, truth: the same labeled sentences in the same order. Their candidates come from teachers that never saw
    their images.
    unlabeled: may be empty. Training reads at most UNLABELED_SENTENCES of them.
    image_row: [N] image row of each labeled sentence. None: every sentence belongs to a different image.

    If all candidates are wrong, the policy learns to keep nothing. If all are correct, it keeps nearly everything.
    Below FEWEST_FOR_NOISE labeled sentences, the first of NOISES is used. Raises ValueError if there is no labeled
    sentence or if the rows do not match.
    """
    if not len(labeled.sent_id) or not np.array_equal(labeled.sent_id, truth.sent_id):
        raise ValueError("labeled and truth must be rows of the same sentences, at least one")
    image_row = np.arange(len(labeled.sent_id)) if image_row is None else image_row
    with one_thread():
        critic, labeled_with_estimates = train_critic(labeled, truth, image_row, seed)
        unlabeled = critic.estimate(unlabeled.take(evenly_picked(len(unlabeled.sent_id), UNLABELED_SENTENCES)))
        scaling = _scaling(labeled_with_estimates, unlabeled)
        noise = _choose_noise(scaling, labeled_with_estimates, truth, image_row, unlabeled, params, seed)
        actors, curves = [], []
        for index in range(ACTORS):
            generator = torch.Generator().manual_seed(seed + index)
            actor = _new_actor(scaling, params, generator)
            curve = _train_actor(
                actor, labeled_with_estimates, truth, unlabeled, params, params.policy_steps, noise, generator
            )
            curves.append(curve)
            actors.append(actor)
        slope = _calibrate(actors, labeled_with_estimates, truth)
    return TrainedPolicy(Policy(critic, tuple(actors), slope), curves[0])


def policy_gradient_loss(
    choice_logits: Tensor, keep_logits: Tensor, choice: Tensor, keep: Tensor, advantage: Tensor
) -> Tensor:
    """REINFORCE surrogate loss.

    Its gradient is an unbiased estimate of the negative gradient of the mean expected reward.
    choice_logits [B, K] and keep_logits [B, K, G, G] require gradients. choice [S, B] and keep [S, B, G, G] are sampled
    actions: the chosen candidate (K for none), and 1 for each of its cells that is kept, else 0. advantage: [S, B].
    If none is chosen, the cells are not part of the action, since they cannot change the reward.
    """
    # Matrix products over the cells are far cheaper than one map per sampled action.
    kept = torch.einsum("sbij,bkij->sbk", keep, keep_logits)
    of_cells = _of_choice(kept - functional.softplus(keep_logits).sum((-2, -1)), choice)
    log_prob = _with_none(choice_logits).log_softmax(1)[torch.arange(len(choice_logits)), choice] + of_cells
    return -(advantage * log_prob).mean()


def group_advantage(reward: Tensor) -> Tensor:
    """Leave-one-out advantage: reward minus the mean reward of the other actions in the group.

    [S, B] -> [S, B] for S >= 2 actions per sentence.
    """
    size = reward.shape[0]
    return (reward - reward.mean(0)) * (size / (size - 1))


def normalized_advantage(reward: Tensor) -> Tensor:
    """GRPO's advantage: reward minus the group's mean, over the group's standard deviation. [S, B] -> [S, B]."""
    return (reward - reward.mean(0)) / (reward.std(0, correction=0) + SMALLEST_REWARD_STD)


def clipped_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> Tensor:
    """PPO's clipped surrogate loss, with one ratio for each decision of an action, as GRPO has one for each token.

    log_prob: [S, B, D] of `decision_log_prob`, requires gradients. old_log_prob: that of the actor that drew the
    actions. advantage: [S, B]. At ratio 1, the gradient is that of `policy_gradient_loss`. The decisions of an action
    are summed. Their mean, as in GRPO, would weigh an action's choice less the more decisions follow it.
    """
    # Far beyond the clipping, and small enough for exp: an infinite ratio times 0 would give no number.
    log_ratio = (log_prob - old_log_prob).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    ratio, advantage = log_ratio.exp(), advantage[..., None]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - GRPO_CLIP, 1 + GRPO_CLIP) * advantage)
    return -gain.sum(-1).mean()


def decision_log_prob(choice_logits: Tensor, keep_logits: Tensor, choice: Tensor, keep: Tensor) -> Tensor:
    """Log probability of each decision of the actions: the choice, then the cells. [S, B, 1 + G * G].

    Arguments as in `policy_gradient_loss`. If none is chosen, no cell is decided: 0.
    """
    sentence, kinds = torch.arange(len(choice_logits)), choice_logits.shape[1]
    of_choice = _with_none(choice_logits).log_softmax(1)[sentence, choice]
    logits = keep_logits[sentence, choice.clamp(max=kinds - 1)]
    of_cells = (keep * logits - functional.softplus(logits)) * (choice < kinds)[..., None, None]
    return torch.cat([of_choice[..., None], of_cells.flatten(2)], dim=-1)


def _choose_noise(
    scaling: Mapping[str, Tensor],
    labeled: Candidates,
    truth: CandidateTruth,
    image_row: NDArray[np.int64],
    unlabeled: Candidates,
    params: SelectParams,
    seed: int,
) -> float:
    """Select the noise of NOISES by cross-validation: highest reward on held-out labeled images."""
    steps = params.policy_steps // NOISE_STEP_DIVISOR
    if len(image_row) < FEWEST_FOR_NOISE or len(np.unique(image_row)) < NOISE_FOLDS or not steps:
        return NOISES[0]
    fold = folds_of(image_row, NOISE_FOLDS, np.random.default_rng(seed))
    rewards = []
    for noise in NOISES:
        total_reward = 0.0
        for held_out in range(NOISE_FOLDS):
            train_rows, val_rows = (fold != held_out).nonzero()[0], (fold == held_out).nonzero()[0]
            generator = torch.Generator().manual_seed(seed + held_out)
            actor = _new_actor(scaling, params, generator)
            train_truth = truth.take(train_rows)
            _train_actor(actor, labeled.take(train_rows), train_truth, unlabeled, params, steps, noise, generator)
            total_reward += _expected_reward(actor, labeled.take(val_rows), truth.take(val_rows), params)
        rewards.append(total_reward)
    return NOISES[int(np.argmax(rewards))]


def _expected_reward(actor: Actor, candidates: Candidates, truth: CandidateTruth, params: SelectParams) -> float:
    """Expected reward over the choice, summed over the sentences. Cells with a positive keep logit are kept."""
    with torch.no_grad():
        choice_logits, keep_logits = actor(
            *actor.standardize(torch.from_numpy(candidates.cells), torch.from_numpy(candidates.sentence))
        )
        utilities = utility(torch.from_numpy(truth.cells), (keep_logits > 0).float(), params.wrong_cost)
        return float((_with_none(choice_logits).softmax(1)[:, :-1] * utilities).sum())


def _new_actor(scaling: Mapping[str, Tensor], params: SelectParams, generator: torch.Generator) -> Actor:
    """An actor initialized so that its choice logit equals CRITIC_SHARPNESS times the estimated utility."""
    actor = Actor(generator)
    for name, values in scaling.items():
        getattr(actor, name).copy_(values)
    mean, std = actor.sentence_mean[ESTIMATE], actor.sentence_std[ESTIMATE]
    best, worst = (_critic_logit(torch.tensor(estimate), params) for estimate in (1.0, 0.0))
    with torch.no_grad():
        # The logit is linear in the estimate. The actor sees it as (estimate - mean) / std.
        actor.accept_bias.fill_(_critic_logit(mean, params))
        actor.accept_direct[0, ESTIMATE] = (best - worst) * std
    return actor


def _critic_logit(estimate: Tensor, params: SelectParams) -> Tensor:
    """Choice logit of a candidate with this estimated IoU, by its utility: any shape -> same shape."""
    return CRITIC_SHARPNESS * ((1 + params.wrong_cost) * estimate - params.wrong_cost)


def _train_actor(
    actor: Actor,
    labeled: Candidates,
    truth: CandidateTruth,
    unlabeled: Candidates,
    params: SelectParams,
    num_steps: int,
    noise: float,
    generator: torch.Generator,
) -> list[dict[str, float]]:
    """Train the actor in place and return the curve."""
    weight = params.unlabeled_weight * _reliability(labeled, truth, params)
    epochs = GRPO_EPOCHS if params.update == "grpo" else 1
    groups: list[tuple[float, _Group]] = []
    optimizer = torch.optim.AdamW(actor.parameters(), lr=params.policy_lr, weight_decay=WEIGHT_DECAY)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, num_steps))
    steps = []
    for step in progress(range(num_steps), "policy", "step"):
        is_first = step % epochs == 0
        if is_first:
            rows = torch.randperm(len(labeled.sent_id), generator=generator)[:SENTENCES_PER_STEP].numpy()
            groups = [(1.0, _sample(actor, labeled, rows, truth.cells[rows], params, noise, generator))]
            if len(unlabeled.sent_id) and weight > 0:
                rows = torch.randint(len(unlabeled.sent_id), (SENTENCES_PER_STEP,), generator=generator).numpy()
                confusion = confusion_against_votes(unlabeled.cells[rows])
                groups.append((weight, _sample(actor, unlabeled, rows, confusion, params, noise, generator)))
        terms = [
            share * _loss(group, group.logits if is_first else actor(group.cells, group.sentence), params)
            for share, group in groups
        ]
        loss = torch.stack(terms).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        cosine.step()
        steps.append(groups[0][1].curve)
    return [
        {
            "step": min(start + CURVE_EVERY, len(steps)),
            **{
                name: float(np.mean([step[name] for step in steps[start : start + CURVE_EVERY]]))
                for name in CURVE_COLUMNS[1:]
            },
        }
        for start in range(0, len(steps), CURVE_EVERY)
    ]


@dataclass(frozen=True)
class _Group:
    """Actions drawn for B sentences, S for each, and the inputs and outputs of the actor that drew them."""

    cells: Tensor  # [B, K, G, G, C] standardized
    sentence: Tensor  # [B, K, D] standardized, with noise
    critic_logit: Tensor  # [B, K]
    logits: tuple[Tensor, Tensor]  # of the actor, with gradients for the first step
    choice: Tensor  # [S, B]
    keep: Tensor  # [S, B, G, G]
    reward: Tensor  # [S, B]
    curve: dict[str, float]


def _sample(
    actor: Actor,
    candidates: Candidates,
    rows: NDArray[np.int64],
    confusion: NDArray[np.float32],
    params: SelectParams,
    feature_noise: float,
    generator: torch.Generator,
) -> _Group:
    """Sample a group of actions per row and score them by `confusion` [B, K, G, G, 4]."""
    cells, sentence = actor.standardize(
        torch.from_numpy(candidates.cells[rows]), torch.from_numpy(candidates.sentence[rows])
    )
    varies = actor.sentence_std > SMALLEST_STD
    varies[ESTIMATE] = False
    noise = feature_noise * varies * torch.randn(sentence.shape, generator=generator)
    sentence = sentence + noise
    choice_logits, keep_logits = actor(cells, sentence)
    prob = _with_none(choice_logits.detach()).softmax(1)
    choice = torch.multinomial(prob, params.group_size, replacement=True, generator=generator).T
    candidate = choice.clamp(max=choice_logits.shape[1] - 1)
    keep_prob = torch.sigmoid(keep_logits.detach())[torch.arange(len(rows)), candidate]
    keep = (torch.rand(keep_prob.shape, generator=generator) < keep_prob).float()
    whole = torch.from_numpy(confusion)
    kept = torch.einsum("sbij,bkijc->sbkc", keep, whole)
    reward = _of_choice(utility_of_sums(kept, whole.sum((2, 3)), params.wrong_cost), choice)
    critic_logit = _critic_logit(torch.from_numpy(candidates.sentence[rows][..., ESTIMATE]), params)
    curve = {
        "reward": float(reward.mean()),
        "accept_rate": float(1 - prob[:, -1].mean()),
        "keep_rate": float(torch.sigmoid(keep_logits.detach()).mean()),
        "entropy": float(_entropy(choice_logits.detach(), keep_logits.detach())),
        "advantage_std": float(_advantage(reward, params).std()),
    }
    return _Group(cells, sentence, critic_logit, (choice_logits, keep_logits), choice, keep, reward, curve)


def _loss(group: _Group, logits: tuple[Tensor, Tensor], params: SelectParams) -> Tensor:
    """Loss of the group's actions under an actor with these logits for choices and cells."""
    choice_logits, keep_logits = logits
    advantage, entropy = _advantage(group.reward, params), _entropy(choice_logits, keep_logits)
    if params.update == "grpo":
        first_choice, first_keep = (before.detach() for before in group.logits)
        old_log_prob = decision_log_prob(first_choice, first_keep, group.choice, group.keep)
        log_prob = decision_log_prob(choice_logits, keep_logits, group.choice, group.keep)
        loss = clipped_loss(log_prob, old_log_prob, advantage)
    else:
        loss = policy_gradient_loss(choice_logits, keep_logits, group.choice, group.keep, advantage)
    return loss + CRITIC_WEIGHT * _divergence(choice_logits, group.critic_logit) - params.entropy_bonus * entropy


def _advantage(reward: Tensor, params: SelectParams) -> Tensor:
    return normalized_advantage(reward) if params.update == "grpo" else group_advantage(reward)


def _of_choice(values: Tensor, choice: Tensor) -> Tensor:
    """Candidate values [S, B, K] and sampled choices [S, B] -> values of the actions [S, B], 0 for none."""
    return functional.pad(values, (0, 1)).gather(2, choice[..., None])[..., 0]


def _with_none(choice_logits: Tensor) -> Tensor:
    """Append the logit 0 for "none" to the candidates' logits: [..., K] -> [..., K + 1]."""
    return functional.pad(choice_logits, (0, 1))


def _divergence(choice_logits: Tensor, critic_logit: Tensor) -> Tensor:
    """Mean KL(actor || critic) of the choice among the candidates and none, in nats; both logits are [B, K]."""
    actor, critic = (_with_none(logit).log_softmax(1) for logit in (choice_logits, critic_logit))
    return (actor.exp() * (actor - critic)).sum(1).mean()


def _entropy(choice_logits: Tensor, keep_logits: Tensor) -> Tensor:
    """Mean entropy of the choice plus mean entropy of a cell's decision, in nats."""
    log_prob = _with_none(choice_logits).log_softmax(1)
    of_cells = functional.softplus(keep_logits) - torch.sigmoid(keep_logits) * keep_logits
    return of_cells.mean() - (log_prob.exp() * log_prob).sum(1).mean()


def _reliability(labeled: Candidates, truth: CandidateTruth, params: SelectParams) -> float:
    """How well agreement predicts whether the candidates of labeled sentences are correct, in [0, 1].

    One value covers all candidate kinds, since the agreement reward compares them. The proposal is one of the
    predictions that vote, so candidates built from it agree by construction. If they are wrong, reliability drops.
    """
    confusion = torch.from_numpy(confusion_against_votes(labeled.cells))
    by_agreement = utility(confusion, torch.ones(confusion.shape[:-1]), params.wrong_cost).numpy()
    return agreement_reliability(by_agreement.ravel(), truth.iou.ravel())


def _scaling(labeled: Candidates, unlabeled: Candidates) -> dict[str, Tensor]:
    """Means and standard deviations of the features, keyed by the actor's buffer names."""
    sentence = np.concatenate([labeled.sentence, unlabeled.sentence]).astype(np.float64)
    cells = np.concatenate([labeled.cells, unlabeled.cells]).astype(np.float32)
    found = {
        "sentence_mean": sentence.mean((0, 1)),
        "sentence_std": sentence.std((0, 1)).clip(SMALLEST_STD),
        "cell_mean": cells.mean((0, 1, 2, 3), dtype=np.float64),
        "cell_std": cells.std((0, 1, 2, 3), dtype=np.float64).clip(SMALLEST_STD),
    }
    return {name: torch.from_numpy(values).float() for name, values in found.items()}


def _calibrate(actors: Sequence[Actor], labeled: Candidates, truth: CandidateTruth) -> float:
    """The slope that minimizes the log loss of accept_prob as the probability that the chosen candidate is correct.

    Uses the labeled sentences with their out-of-fold estimates. A slope without offset (Platt scaling without bias)
    leaves every decision unchanged. Platt's smoothed targets (1999) keep the probabilities away from 0 and 1 when there
    are few sentences.
    """
    action = act(actors, labeled)
    logit = action.accept_logit.astype(np.float64)
    right = truth.iou[np.arange(len(logit)), action.choice] > POSITIVE_IOU
    target = np.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2))
    scaled = SLOPES[:, None] * logit
    log_loss = (np.logaddexp(0, scaled) - target * scaled).mean(1)
    return float(SLOPES[log_loss.argmin()])
