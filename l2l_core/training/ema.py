"""The teacher: an exponential moving average of the student."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """Keeps a teacher's weights as the moving average of a student's. The tensors of both are collected once."""

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        """Both networks have the same architecture. Their tensors must stay the same objects."""
        self._means: list[Tensor] = []
        self._values: list[Tensor] = []
        self._counts: list[tuple[Tensor, Tensor]] = []
        for mean, value in zip(_tensors(teacher), _tensors(student), strict=True):
            if mean.is_floating_point():  # also running statistics, which must match the averaged weights
                self._means.append(mean)
                self._values.append(value)
            else:
                self._counts.append((mean, value))

    def update(self, step: int, decay: float) -> None:
        """teacher <- d * teacher + (1 - d) * student with d = min(decay, 1 - 1 / (step + 1)), step counted from 1.

        With this ramp, the teacher starts as the plain mean of the first students, not as a trace of the random start.
        """
        move = get_ema_multi_avg_fn(min(decay, 1 - 1 / (step + 1)))  # type: ignore[no-untyped-call]
        move(self._means, self._values, step)
        for kept, source in self._counts:
            kept.copy_(source)


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    return chain(network.parameters(), network.buffers())
