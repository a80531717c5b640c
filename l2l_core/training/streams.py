"""Streams of pairs and their targets, and the samples that each contributes to every batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2l_core.config import TrainParams
from l2l_core.core.images import IMAGE_CACHE_BYTES
from l2l_core.core.seeding import generator, seed_of
from l2l_core.data.pairs import SIDE_BY_SIDE_VARIABLE, Batch, BatchMaker, Targets
from l2l_core.data.prior_swap import prior_rows
from l2l_core.errors import ConfigError


@dataclass(frozen=True)
class Stream:
    """Pairs with their targets, and their share of every batch."""

    batches: BatchMaker
    targets: Targets
    share: float
    prior_swap: float = 0.0  # fraction of its samples that get another sentence's prior (data/prior_swap.py)
    evolved: bool = False  # whether its proposals are fused with its labels (data/evolve.py)


@dataclass(frozen=True)
class OnlineStream:
    """Pairs that the EMA teacher relabels at every training step, and their share of every batch."""

    batches: BatchMaker
    threshold: float  # a pixel is valid if the teacher's confidence max(p, 1 - p) reaches this
    share: float
    prior_swap: float = 0.0  # as in Stream, for the student; the teacher sees each pair's own prior
    hides_priors: bool = False  # from the student; the teacher sees them


def share_image_cache(streams: Sequence[Stream | OnlineStream], workers: int = 0) -> list[Stream | OnlineStream]:
    """Give each stream an equal share of IMAGE_CACHE_BYTES, which all streams of all processes on a machine share.

    Launched processes, parallel training runs and the data workers of each count.
    """
    room = IMAGE_CACHE_BYTES // (len(streams) * trainings_here() * max(1, workers))
    return [replace(stream, batches=replace(stream.batches, cache_bytes=room)) for stream in streams]


def trainings_here() -> int:
    """Number of training processes on this machine, including this one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * int(os.environ.get(SIDE_BY_SIDE_VARIABLE, "1"))


def stream_sizes(streams: Sequence[Stream | OnlineStream], batch_size: int) -> list[int]:
    """Samples per stream in a batch: rounded shares, at least one each. The last stream fills up to `batch_size`.

    Raises ConfigError if there are more streams than samples.
    """
    if batch_size < len(streams):
        raise ConfigError(
            f"params.yaml: train.batch_size: got {batch_size}, expected at least {len(streams)}: "
            "labeled and pseudo-labeled pairs share every batch"
        )
    sizes: list[int] = []
    for after, stream in zip(range(len(streams) - 1, 0, -1), streams, strict=False):
        room = batch_size - sum(sizes) - after  # one sample for each later stream
        sizes.append(min(max(1, round(stream.share * batch_size)), room))
    return [*sizes, batch_size - sum(sizes)]


def draw(
    streams: Sequence[Stream | OnlineStream],
    params: TrainParams,
    *,
    seed: int,
    step: int,
    teacher_prob: Callable[[Batch], Tensor],
    positions: NDArray[np.int64] | None = None,
) -> Batch:
    """The step's batch, or its samples at the positions `positions`, in ascending order. Pure function.

    teacher_prob: batch -> foreground probability [B, 1, S, S] in [0, 1], for an OnlineStream.
    """
    parts, first = [], 0
    for index, (stream, size) in enumerate(zip(streams, stream_sizes(streams, params.batch_size), strict=True)):
        rows = epoch_rows(len(stream.batches.pairs), size, seed_of("stream", seed, index), step)
        no_prior = generator("prior dropout", seed, step, index).random(size) < params.prior_dropout
        swapped_rows = None
        if stream.prior_swap:
            swap = generator("prior swap", seed, step, index)
            swapped_rows = prior_rows(stream.batches.pairs, rows, stream.prior_swap, swap)
        if positions is not None:
            here = positions[(positions >= first) & (positions < first + size)] - first
            rows, no_prior = rows[here], no_prior[here]
            swapped_rows = None if swapped_rows is None else swapped_rows[here]
        first += size
        if not len(rows):
            continue
        if isinstance(stream, OnlineStream):
            no_prior = no_prior | stream.hides_priors
            # The teacher sees every prior and the original image. The student's input is augmented afterwards.
            seen = stream.batches(rows)
            taught = stream.batches(rows, None, no_prior, image=seen.image, prior_rows=swapped_rows)
            parts.append(label_online(taught, teacher_prob(seen), stream.threshold))
        else:
            parts.append(stream.batches(rows, stream.targets, no_prior, prior_rows=swapped_rows))
    return parts[0] if len(parts) == 1 else _concatenate(parts)


def label_online(batch: Batch, prob: Tensor, threshold: float) -> Batch:
    """The batch with pseudo-labels from a teacher's foreground probability prob [B, 1, S, S] in [0, 1].

    The pseudo-label is prob > 0.5, the threshold of evaluation. Pixels with max(p, 1 - p) >= threshold are valid.
    """
    return replace(batch, label=(prob > 0.5).float(), keep=(torch.maximum(prob, 1 - prob) >= threshold).float())


def epoch_rows(count: int, batch: int, seed: int, step: int) -> NDArray[np.int64]:
    """Rows [batch] int64 of step `step`. Pure function.

    Epochs of `count` shuffled rows follow each other without end.
    """
    positions = np.arange(step * batch, (step + 1) * batch)
    rows = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(positions // count):
        here = positions // count == epoch
        rows[here] = _epoch_order(count, seed, int(epoch))[positions[here] % count]
    return rows


@lru_cache(maxsize=8)  # the current epochs of all streams: an order lasts many steps
def _epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    order = generator("epoch", seed, epoch).permutation(count)
    order.flags.writeable = False
    return order


def _concatenate(parts: list[Batch]) -> Batch:
    joined: dict[str, Any] = {}
    for field in fields(Batch):
        values = [getattr(part, field.name) for part in parts]
        joined[field.name] = torch.cat(values) if isinstance(values[0], Tensor) else list(chain.from_iterable(values))
    return Batch(**joined)
