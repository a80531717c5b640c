"""Run independent trainings as parallel processes, each with a share of the threads or its own GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from l2l_core.artifacts import records
from l2l_core.config import Params
from l2l_core.core.device import choose_device
from l2l_core.core.images import IMAGE_CACHE_BYTES
from l2l_core.core.memory import available_bytes
from l2l_core.core.progress import is_first_process, logger
from l2l_core.data.pairs import SIDE_BY_SIDE_VARIABLE
from l2l_core.errors import L2LError
from l2l_core.model.encoders import TINY
from l2l_core.model.packaged import PACKAGED
from l2l_core.model.segmenter import has_intact_weights

POLL_S = 0.1
PROCESS_BYTES = 3 << 28
"""Memory of a training process without network and images: 0.5 GB with all imports; the rest is for tables."""
NETWORK_BYTES = {"tiny": 1 << 26, "small": 3 << 28, "other": 1 << 32}
"""Memory of weights, gradients, two moments and the teacher's weights, by the size of the encoders. Tiny: five times
5 MB. Small (EfficientNet-Lite0, MiniLM): five times 0.1 GB. Others: five times 0.8 GB, as for Swin-B with BERT-base."""
PIXEL_BYTES = {"tiny": 2_000, "small": 4_000, "other": 15_000}
"""Additional memory of a training step, per pixel of the images computed at once, by the size of the encoders.

Measured in fp32 by `preflight.memory.peak_of` around two steps of `train` with random weights, minus NETWORK_BYTES of
their weights: tiny 1,000 (8 images of 224 px) and 1,200 (32 of 96 px), ResNet-50 3,300, Swin-T 3,500, Swin-B with
windows of 12 12,000 (4 images of 224 px each); small 2,400 (16 of 256 px)."""
ERROR = re.compile(rb"(?:\A|(?<=[\r\n]))error: ")
"""Prefix that `errors.exit_code` writes before the message of an L2LError, at line start or over a progress bar."""
ERROR_CODE = 2
"""Exit code that `errors.exit_code` returns for an L2LError."""


@dataclass(frozen=True)
class ParallelPlan:
    """How a set of independent trainings runs."""

    at_once: int  # 1: sequentially
    threads: int  # per training, parallel or sequential
    gpus: tuple[str, ...] = ()  # one per parallel training; empty: the CPU, or the only GPU


@dataclass(frozen=True)
class Training:
    """One of a set of independent trainings, and two ways to start it."""

    output: Path  # file or folder that it writes atomically at its end
    train: Callable[[], None]  # in this process
    command: Sequence[str]  # Python arguments for a separate process (`-m stages.crossfit ...`)


def train_all(
    params: Params, trainings: Mapping[str, Training], index: records.IndexPaths, shares: int | None = None
) -> None:
    """Run named independent trainings on a dataset, in parallel or sequentially. Skip those with intact output.

    shares: number of equal shares of the threads, of which each training gets one; by default as many as trainings.
    With fewer shares than trainings, the last ones wait until a share is free.
    """
    torn = [training.output for training in trainings.values() if not has_intact_weights(training.output)]
    missing = {
        name: training
        for name, training in trainings.items()
        if training.output in torn or not training.output.exists()
    }
    for output in torn if is_first_process() else ():
        logger.warning(f"note: {output}: torn or changed, removed; training anew")
        shutil.rmtree(output)
    for name in trainings:
        if name not in missing:
            logger.info(f"{name}: done before")
    images = records.read_table(index.images, records.IMAGES, ["image_id"]).num_rows
    plan = plan_parallel(params, shares or len(trainings), images)
    if plan.at_once > 1 and len(missing) > 1:
        run_side_by_side({name: training.command for name, training in missing.items()}, plan)
        return
    torch.set_num_threads(plan.threads)
    for training in missing.values():
        training.train()


def plan_parallel(params: Params, count: int, images: int) -> ParallelPlan:
    """How `count` independent trainings on a dataset of `images` images run on this machine.

    On a CPU, each training gets the same share of the threads. They run in parallel if there are at least two threads
    and enough memory. The share depends only on the number of threads and trainings: the output bytes of a training
    depend on its threads, and must not depend on free memory. On several GPUs, each training gets one. On one GPU, they
    run sequentially. Trainings that a launcher (torchrun) spreads over several processes also run sequentially.
    """
    threads = torch.get_num_threads()
    if is_launched():
        return ParallelPlan(1, threads)
    device, wanted = choose_device(params.train.engine.device), params.train.engine.side_by_side
    if device.type == "cuda":
        gpus = visible_gpus()[:count] if wanted else ()
        return (
            ParallelPlan(len(gpus), max(1, threads // len(gpus)), gpus) if len(gpus) > 1 else ParallelPlan(1, threads)
        )
    if device.type != "cpu":
        return ParallelPlan(1, threads)
    share = max(1, threads // count)
    most, available = min(count, threads) if wanted else 1, available_bytes()
    fitting = (
        at_once for at_once in range(most, 1, -1) if at_once * training_bytes(params, images, at_once) <= available
    )
    return ParallelPlan(next(fitting, 1), share)


def is_launched() -> bool:
    """Whether torchrun or accelerate launch started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def visible_gpus() -> tuple[str, ...]:
    """The GPUs of this process, named as in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(named.split(",")) if named else tuple(map(str, range(torch.cuda.device_count())))


def training_bytes(params: Params, images: int, at_once: int) -> int:
    """Upper estimate of the memory of one training on a CPU, in bytes. It does not load the encoders.

    images: number of images in the dataset. A training keeps them decoded within its share of the cache.
    at_once: number of trainings that share the cache.
    `check` measures a step of the configured network and lists the memory of each stage.
    """
    engine, model = params.train.engine, params.model
    computed = min(engine.micro_batch_size or params.train.batch_size, params.train.batch_size)
    encoders = {model.image_encoder, model.text_encoder}
    size = "tiny" if encoders == {TINY} else "small" if encoders <= {TINY, *PACKAGED} else "other"
    step = computed * model.image_size_px**2 * PIXEL_BYTES[size]
    decoded = min(images * 3 * model.image_size_px**2, IMAGE_CACHE_BYTES // at_once)
    return PROCESS_BYTES + NETWORK_BYTES[size] + step + decoded


def run_side_by_side(commands: Mapping[str, Sequence[str]], plan: ParallelPlan) -> None:
    """Run named commands of this Python (`-m stages.crossfit ...`), `plan.at_once` at a time.

    They end with this process (see `end_with_parent`). Their stderr is forwarded as it arrives. If one fails, the
    others are killed, and L2LError is raised with its message.
    """
    waiting, free = list(commands.items()), list(range(plan.at_once))
    running: dict[int, _Child] = {}
    try:
        while waiting or running:
            while waiting and free:
                slot = free.pop(0)
                running[slot] = _Child(*waiting.pop(0), _environment(plan, slot))
            for slot, child in list(running.items()):
                if not child.is_running():
                    del running[slot]
                    free.append(slot)
                    child.finish()
            time.sleep(POLL_S)
    finally:
        for child in running.values():
            child.end()


def end_with_parent() -> None:
    """End this process as soon as the process that started it with `run_side_by_side` ends for any reason."""

    def watch() -> None:
        os.read(0, 1)  # returns when the other end of the pipe closes, since nothing is ever written
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _environment(plan: ParallelPlan, slot: int) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": str(plan.threads), "MKL_NUM_THREADS": str(plan.threads)}
    gpu = {"CUDA_VISIBLE_DEVICES": plan.gpus[slot]} if plan.gpus else {}
    return {**os.environ, SIDE_BY_SIDE_VARIABLE: str(plan.at_once), **threads, **gpu}


class _Child:
    """A running command. Its stderr goes to a separate file, so that errors of different commands do not mix.

    A line `error: ...` can be the message of an L2LError or a library's warning. It is held back, with the text that
    follows immediately, until more text arrives or the process ends.
    """

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str]) -> None:
        self._name, self._read, self._held = name, 0, b""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `_close`)
        self._process = subprocess.Popen(
            [sys.executable, *command], env=environment, stdin=subprocess.PIPE, stderr=self._stderr
        )

    def is_running(self) -> bool:
        """Whether the command still runs. Forwards its new output."""
        self._pass_on(to_the_end=False)
        return self._process.poll() is None

    def finish(self) -> None:
        """Clean up after the command ended. Raises L2LError if it failed."""
        code = self._process.wait()
        self._pass_on(to_the_end=True)
        self._close()
        if code == ERROR_CODE and self._held:
            raise L2LError(ERROR.sub(b"", self._held, count=1).decode(errors="replace").strip())
        _show(self._held)
        if code:
            ended = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            hint = "; if memory was short, set train.engine.side_by_side to false" if code < 0 else ", see above"
            raise L2LError(f"{self._name}: {ended}{hint}")

    def end(self) -> None:
        """Kill the command. Work since its last checkpoint is lost, and a held error is not shown."""
        self._process.kill()
        self._process.wait()
        self._pass_on(to_the_end=True)
        self._close()

    def _pass_on(self, *, to_the_end: bool) -> None:
        # pread: the child shares the file position, so it must not move.
        file = self._stderr.fileno()
        text = os.pread(file, os.fstat(file).st_size - self._read, self._read)
        lines = text[: len(text) if to_the_end else text.rfind(b"\n") + 1]
        if not lines:
            return
        self._read += len(lines)
        searched = 0 if to_the_end else len(self._held)  # the process still runs, so held text was not its final error
        lines = self._held + lines
        start = max((match.start() for match in ERROR.finditer(lines, searched)), default=len(lines))
        _show(lines[:start])
        self._held = lines[start:]

    def _close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._stderr.close()


def _show(text: bytes) -> None:
    sys.stderr.write(text.decode(errors="replace"))
    sys.stderr.flush()
