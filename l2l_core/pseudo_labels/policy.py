"""The policy: a critic's estimates, and actors that say how much each candidate is wanted and which cells are kept."""

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

from l2l_core.pseudo_labels.critic import Critic
from l2l_core.pseudo_labels.features import CELL_FEATURES, SENTENCE_FEATURES, BoolArray, Candidates, FloatArray

HIDDEN = 16
"""Width of the hidden layers: about 1,900 weights, since a few hundred labelled sentences must not be learnt by
heart."""

KEEP_BIAS = 3.0
"""Where the cells' logits start: 95 % are kept. From 50 % every label looks worthless at first, right ones too, and
with a `wrong_cost` of 2 the policy learns to reject all of them before it learns which cells are wrong."""

MAX_DEVIATIONS = 4.0
"""Standardised features are cut here, so that no outlier of an unlabelled sentence drives a decision."""

ROWS_AT_ONCE = 512
"""Sentences per forward pass outside training: a few tens of MB."""


class Actor(nn.Module):
    """Two heads over the standardized features of one candidate: how much it is wanted, and which cells to keep.

    One of a sentence's candidates is taken, or none: the softmax of their logits and of 0 for "none". The cell head
    sees a cell, the mean of its 3 x 3 neighbourhood and the sentence, so that mirrored input gives mirrored decisions.
    It starts undecided about labels (all are as likely as "none") and with nearly all of their cells (KEEP_BIAS).
    """

    sentence_mean: Tensor
    sentence_std: Tensor
    cell_mean: Tensor
    cell_std: Tensor

    def __init__(self, generator: torch.Generator) -> None:
        """Random hidden layers from the generator, identity scaling."""
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
        """Features in standard deviations from their mean, within MAX_DEVIATIONS; shapes stay, float32."""
        return (
            ((cells.float() - self.cell_mean) / self.cell_std).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS),
            ((sentence - self.sentence_mean) / self.sentence_std).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS),
        )

    def forward(self, cells: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised cells [..., G, G, C] and sentences [..., D] -> take logits [...], keep logits [..., G, G]."""
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
    """What a policy does with N sentences: the candidate that it wants most stands for the sentence."""

    choice: NDArray[np.int64]  # [N]
    accept_logit: FloatArray  # [N] of taking any candidate rather than none
    accept_prob: FloatArray  # [N] calibrated probability that the label of the chosen candidate is right
    accepted: BoolArray  # [N] may it teach?
    keep_prob: FloatArray  # [N, G, G] of its cells


def act(actors: Sequence[Actor], candidates: Candidates, slope: float = 1.0) -> Action:
    """What the mean of the actors' logits chooses for every sentence.

    slope: calibrates accept_prob, which exceeds 0.5 exactly where the actors' own probability does. A candidate without
    a kept foreground cell would teach "there is nothing", which is never what a sentence means: it is not accepted, and
    chosen only where the sentence has no other.
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
            said = [actor(*actor.standardize(cells, sentence)) for actor in actors]
            wanted, keep_logit = (torch.stack(logits).mean(0) for logits in zip(*said, strict=True))
            teaches = ((keep_logit > 0) & (cells[..., CELL_FEATURES.index("label")] > 0)).any(-1).any(-1)
            possible = teaches | ~teaches.any(1, keepdim=True)
            wanted = wanted.masked_fill(~possible, -math.inf)
            chosen, any_of_them = wanted.argmax(1), wanted.logsumexp(1)
            here = torch.arange(len(sentence)), chosen
            choice[rows] = chosen.numpy()
            accept_logit[rows] = any_of_them.numpy()
            accepted[rows] = ((any_of_them > 0) & teaches[here]).numpy()
            keep_prob[rows] = torch.sigmoid(keep_logit[here]).numpy()
        accept_prob = torch.sigmoid(slope * torch.from_numpy(accept_logit)).numpy()
    return Action(choice, accept_logit, accept_prob, accepted, keep_prob)


@dataclass(frozen=True)
class Policy:
    """A trained critic with the actors that improve on it."""

    critic: Critic
    actors: tuple[Actor, ...]
    slope: float  # see `act`

    def act(self, candidates: Candidates) -> Action:
        """What is chosen of every sentence's candidates, which the critic judges first."""
        return act(self.actors, self.critic.judge(candidates), self.slope)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: sums come out the same to the bit whatever the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _weights(outputs: int, inputs: int, generator: torch.Generator | None = None) -> nn.Parameter:
    """[outputs, inputs] normal weights that keep the variance of standardized input, or zeros without a generator."""
    if generator is None:
        return nn.Parameter(torch.zeros(outputs, inputs))
    return nn.Parameter(torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs))
