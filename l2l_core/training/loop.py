"""The training loop. Warm-up, fold teachers and retraining are this one loop over one or two streams of pairs."""

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
from l2l_core.core.device import autocast, choose_device, resolve_precision, to_device
from l2l_core.core.progress import progress
from l2l_core.core.seeding import generator, seed_of
from l2l_core.core.threads import share_of_launched
from l2l_core.data.augment import strong_view
from l2l_core.data.pairs import BESIDE_VARIABLE, IMAGE_CACHE_BYTES, Batch, BatchMaker, Targets, move_batch
from l2l_core.errors import ConfigError, InputError
from l2l_core.model.losses import samples_that_teach, segmentation_loss
from l2l_core.model.segmenter import Segmenter, attention_kernels
from l2l_core.training.checkpoint import load_checkpoint, save_checkpoint
from l2l_core.training.ema import MovingAverage

if TYPE_CHECKING:  # it takes seconds to import, and what only predicts has no use for it
    from accelerate import Accelerator


@dataclass(frozen=True)
class Stream:
    """Pairs with what they teach, and their share of every batch."""

    batches: BatchMaker
    targets: Targets
    share: float


@dataclass(frozen=True)
class OnlineStream:
    """Pairs that the EMA teacher of the running training labels anew at every step, and their share of every batch."""

    batches: BatchMaker
    threshold: float  # a pixel teaches where the teacher's confidence max(p, 1 - p) reaches this
    share: float


@dataclass(frozen=True)
class Trained:
    """The result of a training."""

    teacher: Segmenter  # the moving average, which is what is evaluated and what labels
    curve: list[dict[str, float]]  # rows of step, loss, bce, dice, lr


def use_share_of_cores() -> None:
    """Give a process that was launched beside others its share of the cores; a user's OMP_NUM_THREADS stays.

    `threads.share_of_launched` says how a user's value is told from torchrun's default of 1.
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

    Every random choice of a step is a function of (seed, step): a run that resumes from `checkpoint` ends with the
    same bytes as one that was never interrupted. `log` gets every row of the curve, after a resume the old ones too.
    Where several processes were launched (torchrun, accelerate launch), each computes a part of every batch, and where
    `micro_batch_size` says so, in several steps: the losses are those of the whole batch. Layers that look at more than
    one sample (batch norm) see a part only; on GPUs its statistics are shared between the processes. The first process
    writes the checkpoints.
    Raises InputError where a stream is empty, ConfigError where the loss is not finite or a batch has no room for every
    stream or process.
    """
    for stream in streams:
        if not len(stream.batches.pairs):
            raise InputError(f"{what}: nothing to learn from (no pair in one of its streams); check the label budget")
    use_share_of_cores()
    device = choose_device(params.engine.device)
    precision = resolve_precision(params.precision, device)
    network.precision, network.precision_setting = precision, params.precision
    accelerator = _accelerator(device)
    parts = batch_parts(params.batch_size, params.engine.micro_batch_size, accelerator.num_processes)
    mine = parts[accelerator.process_index :: accelerator.num_processes]
    streams = share_image_cache(streams)
    if params.engine.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if accelerator.num_processes > 1 and device.type == "cuda":
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    network = network.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    teacher = copy.deepcopy(network).eval().requires_grad_(False)
    # Fused: one kernel for all parameters, of which there are hundreds of small ones.
    optimizer = torch.optim.AdamW(
        network.parameter_groups(params.lr, params.encoder_lr_scale, params.weight_decay), fused=True
    )
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    curve: list[dict[str, float]] = []
    first = 0
    state = load_checkpoint(checkpoint) if checkpoint else None
    if state is not None:
        network.load_state_dict(state["student"])
        teacher.load_state_dict(state["teacher"])
        optimizer.load_state_dict(state["optimizer"])
        curve, first = state["curve"], state["step"]
        print(f"{what}: resuming at step {first} of {steps}", flush=True)
    if accelerator.is_main_process:
        for row in curve:
            log(row)
    student, stepper = accelerator.prepare(network, optimizer)
    student.train()
    learning = list(network.parameters())
    average = MovingAverage(teacher, network)

    def ask_teacher(batch: Batch) -> Tensor:
        tokens = to_device(network.tokenize(batch), accelerator.device)
        with torch.no_grad(), autocast(device, precision):
            return teacher(move_batch(batch, accelerator.device), tokens).mask_logits.float().sigmoid().cpu()

    for step in progress(range(first, steps), what, "step", total=steps, initial=first):
        torch.manual_seed(seed_of("dropout", seed, step, accelerator.process_index))
        batches = []
        for part in mine:
            drawn = _draw(streams, params, seed, step, ask_teacher, part)
            seeds = [seed_of("view", seed, step, place) for place in part.tolist()]
            batches.append(strong_view(drawn, seeds, flip=params.flip))
        count = sum_of(accelerator, [samples_that_teach(_keep(batch)).sum() for batch in batches])
        for group, peak in zip(optimizer.param_groups, peak_lrs, strict=True):
            group["lr"] = peak * schedule(step, steps, params.warmup_fraction, params.lr_decay)
        stepper.zero_grad()
        losses = []
        for number, batch in enumerate(batches, start=1):
            tokens = to_device(network.tokenize(batch, padding="longest"), accelerator.device)
            batch = move_batch(batch, accelerator.device)
            assert batch.label is not None  # every stream has targets or is given them online
            with nullcontext() if number == len(batches) else accelerator.no_sync(student), enough_samples():
                with autocast(device, precision):
                    output = student(batch, tokens)
                loss = segmentation_loss(output, batch.label, _keep(batch), count)
                with attention_kernels(accelerator.device):
                    accelerator.backward(loss.total * accelerator.num_processes)  # which divides by that number
            losses.append(torch.stack([loss.total.detach(), loss.bce, loss.dice]))
        torch.nn.utils.clip_grad_norm_(learning, params.grad_clip)  # not the accelerator's: it looks for them each time
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
            save_checkpoint(
                checkpoint,
                {
                    "student": network.state_dict(),
                    "teacher": teacher.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "curve": curve,
                    "step": done,
                },
            )
    return Trained(teacher, curve)


def _accelerator(device: torch.device) -> Accelerator:
    """What moves the training to its device and shares it between launched processes. Precision is not its concern."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    if "WORLD_SIZE" not in os.environ:
        # It keeps the first training's device for the whole process; launched processes share one kind of device.
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",  # by `autocast` instead: the accelerator would keep the first training's precision too
        # A pretrained text encoder brings a pooling layer that is not asked.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def schedule(step: int, steps: int, warmup_fraction: float, decay: Literal["cosine", "poly"]) -> float:
    """Factor of the peak learning rate at a step: linear rise, then down to 0.

    By half a cosine, or by (1 - share of the way) ** 0.9, as LAVT and those who build on it.
    """
    rise = max(1, round(steps * warmup_fraction))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return 0.5 * (1 + math.cos(math.pi * done)) if decay == "cosine" else (1 - done) ** 0.9


def batch_parts(batch_size: int, micro_batch_size: int | None, processes: int) -> list[NDArray[np.int64]]:
    """The places of a batch that are computed at once: as many parts a process, of at most micro_batch_size places.

    Part p is process p % processes's. Raises ConfigError where the batch cannot be shared evenly.
    """
    share, rest = divmod(batch_size, processes)
    if rest:
        raise ConfigError(
            f"params.yaml: train.batch_size: got {batch_size}, expected a multiple of the {processes} processes"
        )
    count = processes * math.ceil(share / (micro_batch_size or share))
    # Every n-th place, so that each part has its share of every stream.
    return [np.arange(first, batch_size, count) for first in range(count)]


@contextmanager
def enough_samples() -> Iterator[None]:
    """Raises ConfigError where batch norm sees one value per channel: one sample whose map has one pixel."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError(
            "params.yaml: train.batch_size, train.engine.micro_batch_size: a process computes one sample at once, but "
            "the image encoder's batch norm needs at least two; raise them, use fewer processes, or another encoder"
        ) from None


def sum_of(accelerator: Accelerator, values: Sequence[Tensor]) -> Tensor:
    """The sum of equally shaped tensors over all of them and all processes, on the training's device."""
    summed: Tensor = accelerator.reduce(torch.stack(list(values)).sum(0).to(accelerator.device), "sum")
    return summed


def epoch_rows(count: int, batch: int, seed: int, step: int) -> NDArray[np.int64]:
    """[batch] rows of step `step` in an endless walk through shuffled epochs of `count` rows; a pure function."""
    positions = np.arange(step * batch, (step + 1) * batch)
    rows = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(positions // count):
        here = positions // count == epoch
        rows[here] = _epoch_order(count, seed, int(epoch))[positions[here] % count]
    return rows


@lru_cache(maxsize=8)  # the current epochs of a training's streams: an order lasts for many steps
def _epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    order = generator("epoch", seed, epoch).permutation(count)
    order.flags.writeable = False
    return order


def share_image_cache(streams: Sequence[Stream | OnlineStream]) -> list[Stream | OnlineStream]:
    """The streams with their shares of IMAGE_CACHE_BYTES, which all streams of all processes of a machine share.

    Processes are those that a launcher started (torchrun), and trainings beside this one.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * int(os.environ.get(BESIDE_VARIABLE, "1"))
    room = IMAGE_CACHE_BYTES // (len(streams) * processes)
    return [replace(stream, batches=replace(stream.batches, cache_bytes=room)) for stream in streams]


def stream_sizes(streams: Sequence[Stream | OnlineStream], batch_size: int) -> list[int]:
    """Samples of each stream in a batch: shares rounded, at least one each, `batch_size` in all (the last fills up).

    Raises ConfigError where there are more streams than samples.
    """
    if batch_size < len(streams):
        raise ConfigError(
            f"params.yaml: train.batch_size: got {batch_size}, expected at least {len(streams)}: "
            "labelled and pseudo-labelled pairs share every batch"
        )
    sizes: list[int] = []
    for after, stream in zip(range(len(streams) - 1, 0, -1), streams, strict=False):
        room = batch_size - sum(sizes) - after  # one sample for each of the streams after this one
        sizes.append(min(max(1, round(stream.share * batch_size)), room))
    return [*sizes, batch_size - sum(sizes)]


def label_online(batch: Batch, prob: Tensor, threshold: float) -> Batch:
    """The batch with a teacher's labels: prob [B, 1, S, S] in 0..1 is its foreground probability.

    The label is prob > 0.5, the cut of evaluation; the pixels with max(p, 1 - p) >= threshold may teach.
    """
    return replace(batch, label=(prob > 0.5).float(), keep=(torch.maximum(prob, 1 - prob) >= threshold).float())


def _draw(
    streams: Sequence[Stream | OnlineStream],
    params: TrainParams,
    seed: int,
    step: int,
    ask_teacher: Callable[[Batch], Tensor],
    places: NDArray[np.int64] | None = None,
) -> Batch:
    """The step's batch, or the samples at some of its places, in ascending order."""
    parts, first = [], 0
    for number, (stream, size) in enumerate(zip(streams, stream_sizes(streams, params.batch_size), strict=True)):
        rows = epoch_rows(len(stream.batches.pairs), size, seed_of("stream", seed, number), step)
        no_prior = generator("prior dropout", seed, step, number).random(size) < params.prior_dropout
        if places is not None:
            here = places[(places >= first) & (places < first + size)] - first
            rows, no_prior = rows[here], no_prior[here]
        first += size
        if not len(rows):
            continue
        if isinstance(stream, OnlineStream):
            # The teacher sees every prior and the image as it is; what the student sees is made harder afterwards.
            prob = ask_teacher(stream.batches(rows))
            parts.append(label_online(stream.batches(rows, None, no_prior), prob, stream.threshold))
        else:
            parts.append(stream.batches(rows, stream.targets, no_prior))
    return parts[0] if len(parts) == 1 else _concatenate(parts)


def _keep(batch: Batch) -> Tensor:
    assert batch.keep is not None  # every stream has targets or is given them online
    return batch.keep


def _concatenate(parts: list[Batch]) -> Batch:
    joined: dict[str, Any] = {}
    for field in fields(Batch):
        values = [getattr(part, field.name) for part in parts]
        joined[field.name] = torch.cat(values) if isinstance(values[0], Tensor) else list(chain.from_iterable(values))
    return Batch(**joined)
