"""The training loop. Warm-up, fold teachers, retraining and distillation run it over one or two streams of pairs."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2l_core.config import TrainParams
from l2l_core.core.device import autocast, choose_device, resolve_precision, to_device
from l2l_core.core.progress import logger, progress
from l2l_core.core.seeding import seed_of
from l2l_core.core.threads import share_of_launched
from l2l_core.data.pairs import Batch
from l2l_core.errors import ConfigError, InputError
from l2l_core.model.losses import has_valid_pixels, segmentation_loss
from l2l_core.model.segmenter import Segmenter, attention_kernels
from l2l_core.training.checkpoint import load_checkpoint, save_checkpoint
from l2l_core.training.ema import MovingAverage
from l2l_core.training.streams import OnlineStream, Stream, share_image_cache
from l2l_core.training.workers import StepBatches, batches_of_steps, worker_count

if TYPE_CHECKING:  # takes seconds to import, and inference does not need it
    from accelerate import Accelerator


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
    *,
    seed: int,
    run_name: str,
    checkpoint: Path | None = None,
    log: Callable[[dict[str, float]], None] = lambda row: None,
) -> Trained:
    """Train for a number of steps and return the EMA teacher.

    network: the student, trained in place. params: the section `train`. run_name: for messages and the progress bar.
    `log` receives every row of the curve. After a resume, `log` first receives the stored rows.

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
            raise InputError(f"{run_name}: a stream has no pairs, so there is nothing to learn; check the label budget")
    use_share_of_cores()
    state = load_checkpoint(checkpoint) if checkpoint else None
    learner = _Learner(network, streams, params, seed, state)
    is_main = learner.accelerator.is_main_process
    curve: list[dict[str, float]] = state["curve"] if state else []
    first = state["step"] if state else 0
    if is_main:
        if state:
            logger.info(f"{run_name}: resuming at step {first} of {steps}")
        for row in curve:
            log(row)
    left = range(first, steps)
    shown = progress(left, run_name, "step", total=steps, initial=first)
    for step, batches in zip(shown, learner.batches(left), strict=True):
        losses = learner.step(step, steps, batches)
        done = step + 1
        if done % params.log_every == 0 or done == steps:
            curve.append({"step": done, **learner.log_values(losses)})
            if is_main:
                log(curve[-1])
            if not math.isfinite(curve[-1]["loss"]):
                raise ConfigError(
                    f"{run_name}: the loss is {curve[-1]['loss']} at step {done}; lower train.lr or use precision fp32"
                )
        if checkpoint and is_main and done % params.engine.checkpoint_every == 0 and done < steps:
            save_checkpoint(checkpoint, {**learner.state(), "curve": curve, "step": done})
    return Trained(learner.teacher, curve)


class _Learner:
    """Student, teacher and optimizer of a training, as this process sees them."""

    def __init__(
        self,
        network: Segmenter,
        streams: Sequence[Stream | OnlineStream],
        params: TrainParams,
        seed: int,
        state: dict[str, Any] | None,
    ) -> None:
        """state: an earlier `state()`, from which the training goes on."""
        self.params, self.seed = params, seed
        device = choose_device(params.engine.device)
        self.precision = resolve_precision(params.precision, device)
        network.precision, network.precision_setting = self.precision, params.precision
        self.accelerator = _accelerator(device)
        processes = self.accelerator.num_processes
        parts = batch_parts(params.batch_size, params.engine.micro_batch_size, processes)
        own_parts = parts[self.accelerator.process_index :: processes]
        self.workers = worker_count(params.engine.workers, streams, params.batch_size // processes, device)
        shared = share_image_cache(streams, self.workers)
        self.made = StepBatches(shared, params, seed, own_parts, self._teacher_prob)
        if params.engine.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if processes > 1 and device.type == "cuda":
            network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        self.device = self.accelerator.device
        self.network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.teacher = copy.deepcopy(self.network).eval().requires_grad_(False)
        # Fused: one kernel for hundreds of small parameters.
        self.optimizer = torch.optim.AdamW(
            self.network.parameter_groups(params.lr, params.encoder_lr_scale, params.weight_decay), fused=True
        )
        self.peak_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self._parts_of_state = {"student": self.network, "teacher": self.teacher, "optimizer": self.optimizer}
        if state is not None:
            for name, part in self._parts_of_state.items():
                part.load_state_dict(state[name])
        self.student, self.stepper = self.accelerator.prepare(self.network, self.optimizer)
        self.student.train()
        self.learning = list(self.network.parameters())
        self.average = MovingAverage(self.teacher, self.network)

    def state(self) -> dict[str, Any]:
        """Weights and moments, for a checkpoint."""
        return {name: part.state_dict() for name, part in self._parts_of_state.items()}

    def batches(self, steps: range) -> Iterator[list[Batch]]:
        """The batches of this process for each step."""
        return batches_of_steps(self.made, steps, self.workers)

    def step(self, step: int, steps: int, batches: Sequence[Batch]) -> list[Tensor]:
        """Update student and teacher once; return total, BCE and Dice loss [3] of each batch of this process."""
        torch.manual_seed(seed_of("dropout", self.seed, step, self.accelerator.process_index))
        count = sum_of(self.accelerator, [has_valid_pixels(_keep(batch)).sum() for batch in batches])
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak * schedule(step, steps, self.params.warmup_fraction, self.params.lr_decay)
        self.stepper.zero_grad()
        losses = self._backward(batches, count)
        # Not accelerate's version, which looks up the parameters each time.
        torch.nn.utils.clip_grad_norm_(self.learning, self.params.grad_clip)
        self.stepper.step()
        self.average.update(step + 1, self.params.ema_decay)
        return losses

    def log_values(self, losses: Sequence[Tensor]) -> dict[str, float]:
        """Losses of a step, summed over the batches of all processes, and its learning rate."""
        values = sum_of(self.accelerator, losses).tolist()
        row = {name: round(value, 6) for name, value in zip(("loss", "bce", "dice"), values, strict=True)}
        return row | {"lr": round(self.optimizer.param_groups[0]["lr"], 9)}

    def _teacher_prob(self, batch: Batch) -> Tensor:
        tokens = to_device(self.network.tokenize(batch), self.device)
        with torch.no_grad(), autocast(self.device, self.precision):
            prob: Tensor = self.teacher(batch.to(self.device), tokens).mask_logits.float().sigmoid()
        return prob.cpu()

    def _backward(self, batches: Sequence[Batch], count: Tensor) -> list[Tensor]:
        """Add up the gradients of one step's batches; return total, BCE and Dice loss [3] of each.

        count: samples of the whole step with at least one valid pixel.
        """
        accelerator, losses = self.accelerator, []
        for index, batch in enumerate(batches, start=1):
            tokens = to_device(self.network.tokenize(batch, padding="longest"), self.device)
            batch = batch.to(self.device)
            assert batch.label is not None  # every stream has targets or gets them online
            with nullcontext() if index == len(batches) else accelerator.no_sync(self.student), enough_samples():
                with autocast(self.device, self.precision):
                    output = self.student(batch, tokens)
                loss = segmentation_loss(output, batch.label, _keep(batch), count)
                with attention_kernels(self.device):
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


def _keep(batch: Batch) -> Tensor:
    assert batch.keep is not None  # every stream has targets or gets them online
    return batch.keep
