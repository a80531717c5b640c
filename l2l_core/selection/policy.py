"""The policy network: how likely it accepts a sentence's label and keeps each of its cells."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from l2l_core.selection.features import CELL_FEATURES, SENTENCE_FEATURES, Candidates, FloatArray

HIDDEN = 16
"""Width of the hidden layers: about 1,200 weights, since a few hundred labelled sentences must not be learnt by
heart."""

MAX_DEVIATIONS = 4.0
"""Standardised features are cut here, so that no outlier of an unlabelled sentence drives a decision."""

ROWS_AT_ONCE = 1024
"""Sentences per forward pass outside training: a few tens of MB."""


class Policy(nn.Module):
    """Two heads over standardised features: one decision a sentence, one a cell.

    The cell head sees a cell, the mean of its 3 x 3 neighbourhood and the sentence, so that mirrored input gives
    mirrored decisions. It starts undecided: every probability is 0.5.
    """

    sentence_mean: Tensor
    sentence_std: Tensor
    cell_mean: Tensor
    cell_std: Tensor
    slope: Tensor

    def __init__(self, generator: torch.Generator | None = None) -> None:
        """Random hidden layers from the generator (zeros where there is none: to be loaded), identity scaling."""
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
        self.register_buffer("sentence_mean", torch.zeros(sentences))
        self.register_buffer("sentence_std", torch.ones(sentences))
        self.register_buffer("cell_mean", torch.zeros(cells))
        self.register_buffer("cell_std", torch.ones(cells))
        self.register_buffer("slope", torch.ones(()))

    def standardise(self, cells: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        """Features in standard deviations from their mean, within MAX_DEVIATIONS; shapes stay, float32."""
        return (
            ((cells.float() - self.cell_mean) / self.cell_std).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS),
            ((sentence - self.sentence_mean) / self.sentence_std).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS),
        )

    def forward(self, cells: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised cells [B, G, G, C] and sentences [B, D] -> accept logits [B], keep logits [B, G, G]."""
        hidden = torch.tanh(sentence @ self.sentence_hidden.T + self.sentence_bias)
        accept = hidden @ self.accept.T + sentence @ self.accept_direct.T + self.accept_bias

        around = functional.avg_pool2d(cells.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False).permute(0, 2, 3, 1)
        whole = (sentence @ self.cell_sentence.T + self.cell_bias)[:, None, None, :]
        seen = functional.gelu(torch.cat([cells, around], dim=-1) @ self.cell_hidden.T + whole)
        seen = functional.gelu(seen @ self.cell_second.T + self.cell_second_bias)
        return accept[:, 0], (seen @ self.keep.T + self.keep_bias)[..., 0]


def act(policy: Policy, candidates: Candidates) -> tuple[FloatArray, FloatArray]:
    """Probabilities of accepting each label [N], calibrated, and of keeping each cell [N, G, G].

    The calibrated accept probability exceeds 0.5 exactly where the policy's own does.
    """
    accept_prob = np.empty(len(candidates.sent_id), dtype=np.float32)
    keep_prob = np.empty(candidates.cells.shape[:3], dtype=np.float32)
    with one_thread(), torch.no_grad():
        for start in range(0, len(accept_prob), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            cells, sentence = torch.from_numpy(candidates.cells[rows]), torch.from_numpy(candidates.sentence[rows])
            accept_logit, keep_logit = policy(*policy.standardise(cells, sentence))
            accept_prob[rows] = torch.sigmoid(policy.slope * accept_logit).numpy()
            keep_prob[rows] = torch.sigmoid(keep_logit).numpy()
    return accept_prob, keep_prob


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
    """[outputs, inputs] normal weights that keep the variance of standardised input, or zeros without a generator."""
    if generator is None:
        return nn.Parameter(torch.zeros(outputs, inputs))
    return nn.Parameter(torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs))
