"""Computes chunks in this process, or in several processes of this machine."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import active_children, get_context
from multiprocessing.queues import Queue

import pyarrow as pa

from l2l_core.core.worker_process import begin_worker, make_ranks
from l2l_core.errors import L2LError
from l2l_core.workers.executor import KEPT, Compute, Job, Start, Task, compute_parts

Result = tuple[int, pa.Table]


def in_this_process(job: Job, tasks: Iterator[Task], count: Callable[[int], object]) -> Iterator[Result]:
    """An `Executor` without further processes. It counts the rows of a chunk as they come."""
    compute: Compute | None = None
    for task in tasks:
        compute = compute or job.start()
        parts = []
        for part in compute_parts(compute, task):
            parts.append(part)
            count(len(part))
        yield task.number, pa.concat_tables(parts)


def in_processes(job: Job, tasks: Iterator[Task], count: Callable[[int], object]) -> Iterator[Result]:
    """An `Executor` with a process for each worker, which inherit this process's number of threads.

    Raises L2LError if one is killed.
    """
    workers = job.workers.count
    context = get_context("spawn")  # CUDA does not survive a fork
    pool = ProcessPoolExecutor(workers, context, _begin, (job.start, make_ranks(context, workers), job.workers.gpus))
    others = set(active_children())
    failure: Exception | None = None
    finished = False
    try:
        # A second task for each worker waits in the pool, so that no worker waits for this process.
        running: set[Future[Result]] = {pool.submit(_run, task) for task in islice(tasks, 2 * workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            # What is finished comes before what a killed worker broke, so that it is stored.
            for future in sorted(done, key=lambda one: isinstance(one.exception(), BrokenProcessPool)):
                try:
                    number, table = future.result()
                except BrokenProcessPool:
                    raise
                except Exception as error:
                    failure = failure or error
                    running = {left for left in running if not left.cancel()}
                else:
                    count(len(table))
                    yield number, table
            if failure is None:
                running |= {pool.submit(_run, task) for task in islice(tasks, len(done))}
        finished = True
    except BrokenProcessPool:
        raise L2LError(
            f"{job.what}: a worker process was killed, most often because memory ran out (lower {job.workers.fewer}); "
            f"{KEPT}"
        ) from None
    finally:
        if not finished:  # a killed worker, Ctrl-C, or a full disk: chunks that run now would be lost
            for child in set(active_children()) - others:
                child.kill()
        pool.shutdown(cancel_futures=True)
        # Stages end without Python's own cleanup, which would complain about the pool's semaphores.
        del pool
        gc.collect()
    if failure is not None:
        raise failure


_start: Start
_compute: Compute | None = None
"""What a worker process has loaded, for its whole lifetime."""


def _begin(start: Start, ranks: Queue[int], gpus: int) -> None:
    global _start
    _start = start
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C, the stage's own process prints its one line and ends
    begin_worker(ranks, gpus)


def _run(task: Task) -> Result:
    global _compute
    if _compute is None:  # not in _begin: exceptions raised there do not reach the user
        _compute = _start()
    return task.number, pa.concat_tables(compute_parts(_compute, task))
