"""The batches of each training step, computed by the training process or by data workers."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from l2l_core.config import TrainParams
from l2l_core.core.seeding import seed_of
from l2l_core.core.threads import usable_cores
from l2l_core.data.augment import strong_view
from l2l_core.data.pairs import Batch
from l2l_core.errors import L2LError
from l2l_core.training.streams import OnlineStream, Stream, draw, trainings_here

MOST_WORKERS = 8
"""Most workers that `auto` starts."""
AHEAD = 2
"""Steps that each worker computes ahead."""
SHARED_MEMORY = "/dev/shm"
"""Where Linux keeps the batches on their way from a worker; a container's is often small."""


@dataclass(frozen=True)
class StepBatches(Dataset[list[Batch] | L2LError]):
    """Step -> the strong views of its samples, one batch for each of `parts`.

    Depends only on seed, step and positions, unless a stream is labeled online.
    """

    streams: Sequence[Stream | OnlineStream]
    params: TrainParams
    seed: int
    parts: Sequence[NDArray[np.int64]]  # positions in the step's batch
    teacher_prob: Callable[[Batch], Tensor]  # as in `draw`

    def batches(self, step: int) -> list[Batch]:
        """The batches of a step. Raises InputError if an image cannot be read."""
        return [self._batch(step, positions) for positions in self.parts]

    def __getitem__(self, step: int) -> list[Batch] | L2LError:
        """The batches of a step, or the error to raise in the training process: workers wrap what they raise."""
        try:
            return self.batches(step)
        except L2LError as error:
            return error

    def _batch(self, step: int, positions: NDArray[np.int64]) -> Batch:
        drawn = draw(
            self.streams, self.params, seed=self.seed, step=step, teacher_prob=self.teacher_prob, positions=positions
        )
        seeds = [seed_of("view", self.seed, step, position) for position in positions.tolist()]
        return strong_view(drawn, seeds, flip=self.params.flip)


def worker_count(
    setting: int | Literal["auto"],
    streams: Sequence[Stream | OnlineStream],
    batch_size: int,
    device: torch.device,
    shared_memory: str = SHARED_MEMORY,
) -> int:
    """Number of data workers of this process.

    auto: on a GPU one for each core of this process but one, at most MOST_WORKERS, and only as many as `shared_memory`
    has room for. 0 on a CPU, whose cores all compute. 0 for an OnlineStream: only the training process has the teacher
    that labels its samples.
    """
    if any(isinstance(stream, OnlineStream) for stream in streams):
        return 0
    if setting != "auto":
        return setting
    if device.type != "cuda":
        return 0
    cores = usable_cores() // trainings_here()
    free = shutil.disk_usage(shared_memory).free // trainings_here() if os.path.isdir(shared_memory) else 0
    batch_bytes = batch_size * max(sample_bytes(stream) for stream in streams if isinstance(stream, Stream))
    return max(0, min(MOST_WORKERS, cores - 1, free // ((AHEAD + 1) * batch_bytes)))


def sample_bytes(stream: Stream) -> int:
    """Bytes of one sample in a batch: image, label and keep, and the proposal."""
    size_px, proposal = stream.batches.size_px, stream.batches.pairs.proposal
    return (3 + 4 + 4) * size_px**2 + 4 * proposal.shape[1] ** 2


def batches_of_steps(made: StepBatches, steps: range, workers: int) -> Iterator[list[Batch]]:
    """The batches of consecutive steps, in order; the same bytes for any number of workers.

    workers: processes that compute AHEAD steps each while the caller trains; 0: none. Raises InputError if an image
    cannot be read, L2LError if a worker ends.
    """
    if not workers or not steps:
        yield from map(made.batches, steps)
        return
    read_end, write_end = os.pipe()
    loader = DataLoader(
        made,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=AHEAD,
        collate_fn=_unchanged,
        worker_init_fn=partial(_end_with_parent, read_end, write_end),
        generator=torch.Generator(),  # leaves the global one alone
        multiprocessing_context="fork",  # shares the pairs' memory
    )
    try:
        with _no_opencv_pool():
            source = iter(loader)
        for found in source:
            if isinstance(found, L2LError):
                raise found
            yield found
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise L2LError(
            f"a data worker ended: {str(error).splitlines()[0]}; if memory or {SHARED_MEMORY} is short, set "
            "train.engine.workers to 0"
        ) from None
    finally:
        os.close(write_end)
        os.close(read_end)


def _unchanged(found: list[Batch] | L2LError) -> list[Batch] | L2LError:
    return found


@contextmanager
def _no_opencv_pool() -> Iterator[None]:
    """OpenCV without threads: those of its pool do not exist in a forked process, which would wait for them."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _end_with_parent(read_end: int, write_end: int, _worker: int) -> None:
    """End this worker as soon as the training process ends for any reason.

    A worker inherits the training's locks. One that outlives a killed training would block the next run.
    """
    os.close(write_end)

    def watch() -> None:
        os.read(read_end, 1)  # returns when the training process's end of the pipe closes
        os._exit(0)  # a failure would interrupt a training process that is just ending

    threading.Thread(target=watch, daemon=True).start()
