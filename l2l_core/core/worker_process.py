"""What a process of a pool does first: take its GPUs, and end when its parent ends."""

from __future__ import annotations

import os
import threading
from multiprocessing import parent_process
from multiprocessing.context import BaseContext
from multiprocessing.queues import Queue


def make_ranks(context: BaseContext, workers: int) -> Queue[int]:
    """A queue with the numbers 0 to `workers` - 1, of which each process takes one."""
    ranks: Queue[int] = context.Queue()
    for rank in range(workers):
        ranks.put(rank)
    return ranks


def begin_worker(ranks: Queue[int], gpus: int) -> None:
    """Give this process its own `gpus` GPUs, unless that is 0, and let it end with its parent.

    PyTorch may be imported before, but must not have used a GPU.
    """
    rank = ranks.get()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus and listed != "":  # an empty value hides all GPUs
        first, last = rank * gpus, (rank + 1) * gpus
        own = listed.split(",")[first:last] if listed else [str(gpu) for gpu in range(first, last)]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed run must not leave a worker that holds a GPU."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
