"""The teacher: an exponential moving average of the student."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, step: int, decay: float) -> None:
    """teacher <- d * teacher + (1 - d) * student with d = min(decay, 1 - 1 / (step + 1)), step counted from 1.

    The ramp makes the teacher the plain mean of the first students instead of a trace of the random start.
    """
    rate = min(decay, 1 - 1 / (step + 1))
    for mean, value in zip(teacher.parameters(), student.parameters(), strict=True):
        mean.lerp_(value, 1 - rate)
    for kept, source in zip(teacher.buffers(), student.buffers(), strict=True):
        if kept.is_floating_point():  # running statistics must belong to the averaged weights
            kept.lerp_(source, 1 - rate)
        else:
            kept.copy_(source)
