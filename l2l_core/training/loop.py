"""The training loop. Warm-up, fold teachers and retraining run it over one or two streams of pairs."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2l_core.config import TrainParams
from l2l_core.core.device import Precision, autocast, choose_device, resolve_precision, to_device
from l2l_core.core.progress import progress
from l2l_core.core.seeding import generator, seed_of
from l2l_core.core.threads import share_of_launched
from l2l_core.data.augment import strong_view
from l2l_core.data.pairs import IMAGE_CACHE_BYTES, SIDE_BY_SIDE_VARIABLE, Batch, BatchMaker, Targets
from l2l_core.data.prior_swap import prior_rows
from l2l_core.errors import ConfigError, InputError
from l2l_core.model.losses import has_valid_pixels, segmentation_loss
from l2l_core.model.segmenter import Segmenter, attention_kernels
from l2l_core.training.checkpoint import load_checkpoint, save_checkpoint
from l2l_core.training.ema import MovingAverage

if TYPE_CHECKING:  # takes seconds to import, and inference does not need it
    from accelerate import Accelerator


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


@dataclass(frozen=True)
class Trained:
    """The result of a training."""

    teacher: Segmenter  # the moving average; used for evaluation and pseudo-labels
    curve: list[dict[str, float]]  # rows of step, loss, bce, dice, lr


def use_share_of_cores() -> None:
    """Give each launched process its share of the cores. A user's OMP_NUM_THREADS takes precedence.

    `threads.share_of_launched` distinguishes a user's value from torchrun's default of 1.
    """
    share = share_of_launched()
    if share is not None:
        torch.set_num_threads(share)


def train(
    network: Segmenter,
    streams: Sequence[Stream | OnlineStream],
    steps: int,
    params: TrainParams,
    seed: int,
    what: str,
    checkpoint: Path | None = None,
    log: Callable[[dict[str, float]], None] = lambda row: None,
) -> Trained:
    """Train for a number of steps and return the EMA teacher.

    network: the student, trained in place. params: the section `train`. what: name of the run in messages and the
    progress bar. `log` receives every row of the curve. After a resume, `log` first receives the stored rows.

    The random draws of a step depend only on the seed, the step, the position in the batch and the process index. On a
    CPU, a resumed run therefore ends with the same bytes as an uninterrupted one.

    With several launched processes (torchrun, accelerate launch), each computes a part of every batch, and
    `micro_batch_size` splits this part further. The loss is that of the whole batch. Batch norm statistics cover only
    a part of the batch; on GPUs they are synchronized over the processes. The first process writes the checkpoints.

    Raises InputError if a stream has no pairs. Raises ConfigError if the loss is not finite or if a batch is too small
    for all streams or processes.
    """
    for stream in streams:
        if not len(stream.batches.pairs):
            raise InputError(f"{what}: a stream has no pairs, so there is nothing to learn; check the label budget")
    use_share_of_cores()
    device = choose_device(params.engine.device)
    precision = resolve_precision(params.precision, device)
    network.precision, network.precision_setting = precision, params.precision
    accelerator = _accelerator(device)
    parts = batch_parts(params.batch_size, params.engine.micro_batch_size, accelerator.num_processes)
    own_parts = parts[accelerator.process_index :: accelerator.num_processes]
    streams = share_image_cache(streams)
    if params.engine.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if accelerator.num_processes > 1 and device.type == "cuda":
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    network = network.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    teacher = copy.deepcopy(network).eval().requires_grad_(False)
    # Fused: one kernel for hundreds of small parameters.
    optimizer = torch.optim.AdamW(
        network.parameter_groups(params.lr, params.encoder_lr_scale, params.weight_decay), fused=True
    )
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    curve: list[dict[str, float]] = []
    first = 0
    state = load_checkpoint(checkpoint) if checkpoint else None
    checkpointed: dict[str, Any] = {"student": network, "teacher": teacher, "optimizer": optimizer}
    if state is not None:
        for name, module in checkpointed.items():
            module.load_state_dict(state[name])
        curve, first = state["curve"], state["step"]
    if accelerator.is_main_process:
        if state is not None:
            print(f"{what}: resuming at step {first} of {steps}", flush=True)
        for row in curve:
            log(row)
    student, stepper = accelerator.prepare(network, optimizer)
    student.train()
    learning = list(network.parameters())
    average = MovingAverage(teacher, network)

    def teacher_prob(batch: Batch) -> Tensor:
        tokens = to_device(network.tokenize(batch), accelerator.device)
        with torch.no_grad(), autocast(device, precision):
            return teacher(batch.to(accelerator.device), tokens).mask_logits.float().sigmoid().cpu()

    for step in progress(range(first, steps), what, "step", total=steps, initial=first):
        torch.manual_seed(seed_of("dropout", seed, step, accelerator.process_index))
        batches = []
        for part in own_parts:
            drawn = _draw(streams, params, seed, step, teacher_prob, part)
            seeds = [seed_of("view", seed, step, place) for place in part.tolist()]
            batches.append(strong_view(drawn, seeds, flip=params.flip))
        count = sum_of(accelerator, [has_valid_pixels(_keep(batch)).sum() for batch in batches])
        for group, peak in zip(optimizer.param_groups, peak_lrs, strict=True):
            group["lr"] = peak * schedule(step, steps, params.warmup_fraction, params.lr_decay)
        stepper.zero_grad()
        losses = _backward(student, network, batches, count, accelerator, precision)
        torch.nn.utils.clip_grad_norm_(learning, params.grad_clip)  # accelerate's version looks them up each time
        stepper.step()
        average.update(step + 1, params.ema_decay)
        done = step + 1
        if done % params.log_every == 0 or done == steps:
            values = sum_of(accelerator, losses).tolist()
            row = {name: round(value, 6) for name, value in zip(("loss", "bce", "dice"), values, strict=True)}
            curve.append({"step": done, **row, "lr": round(optimizer.param_groups[0]["lr"], 9)})
            if accelerator.is_main_process:
                log(curve[-1])
            if not math.isfinite(row["loss"]):
                raise ConfigError(
                    f"{what}: the loss is {row['loss']} at step {done}; lower train.lr or use precision fp32"
                )
        due = done % params.engine.checkpoint_every == 0 and done < steps
        if checkpoint and due and accelerator.is_main_process:
            weights = {name: module.state_dict() for name, module in checkpointed.items()}
            save_checkpoint(checkpoint, {**weights, "curve": curve, "step": done})
    return Trained(teacher, curve)


def _backward(
    student: torch.nn.Module,
    network: Segmenter,
    batches: Sequence[Batch],
    count: Tensor,
    accelerator: Accelerator,
    precision: Precision,
) -> list[Tensor]:
    """Add up the gradients of one step's batches; return total, BCE and Dice loss [3] of each.

    student: `network`, wrapped for several processes. count: samples of the whole step with at least one valid pixel.
    """
    losses = []
    for number, batch in enumerate(batches, start=1):
        tokens = to_device(network.tokenize(batch, padding="longest"), accelerator.device)
        batch = batch.to(accelerator.device)
        assert batch.label is not None  # every stream has targets or gets them online
        with nullcontext() if number == len(batches) else accelerator.no_sync(student), enough_samples():
            with autocast(accelerator.device, precision):
                output = student(batch, tokens)
            loss = segmentation_loss(output, batch.label, _keep(batch), count)
            with attention_kernels(accelerator.device):
                # DDP averages gradients over the processes; this restores their sum.
                accelerator.backward(loss.total * accelerator.num_processes)
        losses.append(torch.stack([loss.total.detach(), loss.bce, loss.dice]))
    return losses


def _accelerator(device: torch.device) -> Accelerator:
    """Create the Accelerator. It moves training to the device and splits it over the processes, but does not handle
    precision.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    if "WORLD_SIZE" not in os.environ:
        # Accelerate keeps the first training's device for the whole process. Launched processes share a device type.
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",  # `autocast` sets it; the accelerator would keep the first training's precision
        # A pretrained text encoder has an unused pooling layer.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def schedule(step: int, steps: int, warmup_fraction: float, decay: Literal["cosine", "poly"]) -> float:
    """Factor of the peak learning rate at a step: linear warm-up, then decay to 0.

    The decay is half a cosine, or (1 - progress) ** 0.9 as in LAVT and its successors.
    """
    rise = max(1, round(steps * warmup_fraction))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return 0.5 * (1 + math.cos(math.pi * done)) if decay == "cosine" else (1 - done) ** 0.9


def batch_parts(batch_size: int, micro_batch_size: int | None, processes: int) -> list[NDArray[np.int64]]:
    """Split the positions of a batch into parts of at most micro_batch_size, equally many parts per process.

    Part p belongs to process p % processes. Raises ConfigError if the batch size is not a multiple of `processes`.
    """
    share, rest = divmod(batch_size, processes)
    if rest:
        raise ConfigError(
            f"params.yaml: train.batch_size: got {batch_size}, expected a multiple of the {processes} processes"
        )
    count = processes * math.ceil(share / (micro_batch_size or share))
    # Every n-th position, so that each part has its share of every stream.
    return [np.arange(first, batch_size, count) for first in range(count)]


@contextmanager
def enough_samples() -> Iterator[None]:
    """Raise ConfigError if batch norm sees one value per channel: one sample whose map has one pixel."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError(
            "params.yaml: train.batch_size, train.engine.micro_batch_size: a process computes one sample at a time, "
            "but the image encoder's batch norm needs at least two; raise them, use fewer processes, or another encoder"
        ) from None


def sum_of(accelerator: Accelerator, values: Sequence[Tensor]) -> Tensor:
    """Sum equally shaped tensors over the sequence and all processes, on the training's device."""
    summed: Tensor = accelerator.reduce(torch.stack(list(values)).sum(0).to(accelerator.device), "sum")
    return summed


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


def share_image_cache(streams: Sequence[Stream | OnlineStream]) -> list[Stream | OnlineStream]:
    """Give each stream an equal share of IMAGE_CACHE_BYTES, which all streams of all processes on a machine share.

    Launched processes and parallel training runs both count.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * int(os.environ.get(SIDE_BY_SIDE_VARIABLE, "1"))
    room = IMAGE_CACHE_BYTES // (len(streams) * processes)
    return [replace(stream, batches=replace(stream.batches, cache_bytes=room)) for stream in streams]


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


def label_online(batch: Batch, prob: Tensor, threshold: float) -> Batch:
    """The batch with pseudo-labels from a teacher's foreground probability prob [B, 1, S, S] in [0, 1].

    The pseudo-label is prob > 0.5, the threshold of evaluation. Pixels with max(p, 1 - p) >= threshold are valid.
    """
    return replace(batch, label=(prob > 0.5).float(), keep=(torch.maximum(prob, 1 - prob) >= threshold).float())


def _draw(
    streams: Sequence[Stream | OnlineStream],
    params: TrainParams,
    seed: int,
    step: int,
    teacher_prob: Callable[[Batch], Tensor],
    positions: NDArray[np.int64] | None = None,
) -> Batch:
    """The step's batch, or its samples at the positions `positions`, in ascending order."""
    parts, first = [], 0
    for number, (stream, size) in enumerate(zip(streams, stream_sizes(streams, params.batch_size), strict=True)):
        rows = epoch_rows(len(stream.batches.pairs), size, seed_of("stream", seed, number), step)
        no_prior = generator("prior dropout", seed, step, number).random(size) < params.prior_dropout
        swapped_rows = None
        if stream.prior_swap:
            swap = generator("prior swap", seed, step, number)
            swapped_rows = prior_rows(stream.batches.pairs, rows, stream.prior_swap, swap)
        if positions is not None:
            here = positions[(positions >= first) & (positions < first + size)] - first
            rows, no_prior = rows[here], no_prior[here]
            swapped_rows = None if swapped_rows is None else swapped_rows[here]
        first += size
        if not len(rows):
            continue
        if isinstance(stream, OnlineStream):
            # The teacher sees every prior and the original image. The student's input is augmented afterwards.
            prob = teacher_prob(stream.batches(rows))
            parts.append(
                label_online(stream.batches(rows, None, no_prior, prior_rows=swapped_rows), prob, stream.threshold)
            )
        else:
            parts.append(stream.batches(rows, stream.targets, no_prior, prior_rows=swapped_rows))
    return parts[0] if len(parts) == 1 else _concatenate(parts)


def _keep(batch: Batch) -> Tensor:
    assert batch.keep is not None  # every stream has targets or gets them online
    return batch.keep


def _concatenate(parts: list[Batch]) -> Batch:
    joined: dict[str, Any] = {}
    for field in fields(Batch):
        values = [getattr(part, field.name) for part in parts]
        joined[field.name] = torch.cat(values) if isinstance(values[0], Tensor) else list(chain.from_iterable(values))
    return Batch(**joined)
