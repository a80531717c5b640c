"""The policy: a critic that estimates IoU, and actors that choose a candidate and the cells to keep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from l2l_core.core.arrays import BoolArray, FloatArray
from l2l_core.pseudo_labels.critic import Critic
from l2l_core.pseudo_labels.features import CELL_FEATURES, SENTENCE_FEATURES, Candidates

HIDDEN = 16
"""Width of the hidden layers. It gives about 1,900 weights, few enough not to overfit a few hundred labeled
sentences."""

KEEP_BIAS = 3.0
"""Initial logit of the cells: 95 % are kept. At 50 %, even correct candidates look worthless at first. With a
`wrong_cost` of 2, the policy then learns to reject all of them before it learns which cells are wrong."""

MAX_DEVIATIONS = 4.0
"""Standardized features are clipped here, so that no outlier of an unlabeled sentence drives a decision."""

ROWS_AT_ONCE = 512
"""Sentences per forward pass outside training: a few tens of MB."""


class Actor(nn.Module):
    """Two heads over the standardized features of one candidate: a choice logit, and a keep logit for each cell.

    The policy takes one of a sentence's candidates or none: a softmax over their choice logits and 0 for "none". The
    cell head sees the cell, the mean of its 3 x 3 neighborhood and the sentence features. It is equivariant to
    mirroring. At the start, all candidates are as likely as "none", and nearly all cells are kept (KEEP_BIAS).
    """

    sentence_mean: Tensor
    sentence_std: Tensor
    cell_mean: Tensor
    cell_std: Tensor

    def __init__(self, generator: torch.Generator) -> None:
        """Draw the hidden layers from the generator; set the scaling to identity."""
        super().__init__()
        sentences, cells = len(SENTENCE_FEATURES), len(CELL_FEATURES)
        self.sentence_hidden = _weights(HIDDEN, sentences, generator)
        self.sentence_bias = _weights(1, HIDDEN)
        self.accept = _weights(1, HIDDEN)
        self.accept_direct = _weights(1, sentences)
        self.accept_bias = _weights(1, 1)
        self.cell_hidden = _weights(HIDDEN, 2 * cells, generator)
        self.cell_sentence = _weights(HIDDEN, sentences, generator)
        self.cell_bias = _weights(1, HIDDEN)
        self.cell_second = _weights(HIDDEN, HIDDEN, generator)
        self.cell_second_bias = _weights(1, HIDDEN)
        self.keep = _weights(1, HIDDEN)
        self.keep_bias = _weights(1, 1)
        nn.init.constant_(self.keep_bias, KEEP_BIAS)
        self.register_buffer("sentence_mean", torch.zeros(sentences))
        self.register_buffer("sentence_std", torch.ones(sentences))
        self.register_buffer("cell_mean", torch.zeros(cells))
        self.register_buffer("cell_std", torch.ones(cells))

    def standardize(self, cells: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        """Standardize features and clip them to MAX_DEVIATIONS: same shapes, float32."""
        return (
            ((cells.float() - self.cell_mean) / self.cell_std).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS),
            ((sentence - self.sentence_mean) / self.sentence_std).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS),
        )

    def forward(self, cells: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        """Standardized cells [..., G, G, C] and sentences [..., D] -> choice logits [...], keep logits [..., G, G]."""
        leading, (grid, channels) = sentence.shape[:-1], cells.shape[-2:]
        sentence = sentence.reshape(-1, sentence.shape[-1])
        cells = cells.reshape(-1, grid, grid, channels)
        hidden = torch.tanh(sentence @ self.sentence_hidden.T + self.sentence_bias)
        accept = hidden @ self.accept.T + sentence @ self.accept_direct.T + self.accept_bias

        around = functional.avg_pool2d(cells.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False).permute(0, 2, 3, 1)
        whole = (sentence @ self.cell_sentence.T + self.cell_bias)[:, None, None, :]
        seen = functional.gelu(torch.cat([cells, around], dim=-1) @ self.cell_hidden.T + whole)
        seen = functional.gelu(seen @ self.cell_second.T + self.cell_second_bias)
        keep = seen @ self.keep.T + self.keep_bias
        return accept.reshape(leading), keep.reshape(*leading, grid, grid)


@dataclass(frozen=True)
class Action:
    """The policy's action for N sentences. It chooses the candidate with the highest choice logit."""

    choice: NDArray[np.int64]  # [N]
    accept_logit: FloatArray  # [N] logit of taking any candidate rather than none
    accept_prob: FloatArray  # [N] calibrated probability that the chosen candidate is correct
    accepted: BoolArray  # [N] whether it becomes a pseudo-label
    keep_prob: FloatArray  # [N, G, G] keep probability of its cells


def act(actors: Sequence[Actor], candidates: Candidates, slope: float = 1.0) -> Action:
    """Choose a candidate for every sentence by the mean of the actors' logits.

    slope: calibrates accept_prob, which exceeds 0.5 exactly if the actors' probability does. A candidate without a kept
    foreground cell gives an empty mask. It is never accepted, because every sentence refers to an object. It is chosen
    only if the sentence has no other.
    """
    count, _, grid = candidates.cells.shape[:3]
    choice = np.empty(count, dtype=np.int64)
    accept_logit = np.empty(count, dtype=np.float32)
    accepted = np.empty(count, dtype=bool)
    keep_prob = np.empty((count, grid, grid), dtype=np.float32)
    with one_thread(), torch.no_grad():
        for start in range(0, count, ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            cells, sentence = torch.from_numpy(candidates.cells[rows]), torch.from_numpy(candidates.sentence[rows])
            outputs = [actor(*actor.standardize(cells, sentence)) for actor in actors]
            choice_logits, keep_logits = (torch.stack(logits).mean(0) for logits in zip(*outputs, strict=True))
            has_foreground = ((keep_logits > 0) & (cells[..., CELL_FEATURES.index("candidate")] > 0)).any(-1).any(-1)
            possible = has_foreground | ~has_foreground.any(1, keepdim=True)
            choice_logits = choice_logits.masked_fill(~possible, -math.inf)
            chosen, any_of_them = choice_logits.argmax(1), choice_logits.logsumexp(1)
            here = torch.arange(len(sentence)), chosen
            choice[rows] = chosen.numpy()
            accept_logit[rows] = any_of_them.numpy()
            accepted[rows] = ((any_of_them > 0) & has_foreground[here]).numpy()
            keep_prob[rows] = torch.sigmoid(keep_logits[here]).numpy()
        accept_prob = torch.sigmoid(slope * torch.from_numpy(accept_logit)).numpy()
    return Action(choice, accept_logit, accept_prob, accepted, keep_prob)


@dataclass(frozen=True)
class Policy:
    """A trained critic and the actors that improve on it."""

    critic: Critic
    actors: tuple[Actor, ...]
    slope: float  # see `act`

    def act(self, candidates: Candidates) -> Action:
        """Estimate IoU with the critic, then choose a candidate for every sentence."""
        return act(self.actors, self.critic.estimate(candidates), self.slope)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, so that sums are bitwise equal on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _weights(outputs: int, inputs: int, generator: torch.Generator | None = None) -> nn.Parameter:
    """[outputs, inputs] normal weights that preserve the variance of standardized input; zeros without a generator."""
    if generator is None:
        return nn.Parameter(torch.zeros(outputs, inputs))
    return nn.Parameter(torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs))
