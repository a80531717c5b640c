"""A stage's work in chunks: computed by any number of workers, stored one by one, and resumed after a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from l2l_core.artifacts.chunks import read_chunk
from l2l_core.artifacts.records import write_table
from l2l_core.config import ClusterParams
from l2l_core.core.progress import progress_counter
from l2l_core.core.threads import limited_threads, thread_count
from l2l_core.errors import ConfigError
from l2l_core.workers.executor import Executor, Job, Start, Task, Workers
from l2l_core.workers.local import in_processes, in_this_process

IDS_SHOWN = 5


@dataclass(frozen=True)
class Work:
    """Independent units of a stage, in chunks. The chunks must not depend on the number of workers."""

    what: str  # in the progress bar and in messages
    ids: Sequence[NDArray[np.int64]]  # of each chunk: the `sent_id` of its rows, in their order
    schema: pa.Schema  # of a chunk, with the column `sent_id`
    load: Callable[[int], Any]  # number of a chunk -> the data that its computation reads; runs in this process
    start: Start


def map_chunks(work: Work, cluster: ClusterParams, folder: Path | None = None) -> Iterator[tuple[int, pa.Table]]:
    """Yield the number and the rows of each chunk, in any order, each chunk once.

    At most two chunks for each worker are in memory. folder: locked by the caller and named after everything that the
    rows depend on; finished chunks are stored there, and a later call reads them. None stores nothing. A torn chunk is
    moved aside and computed again.
    """
    waiting = []
    for number in range(len(work.ids)):
        table = None if folder is None else _stored(work, folder, number)
        if table is None:
            waiting.append(number)
        else:
            yield number, table
    if not waiting:
        return
    total, left = (sum(len(work.ids[number]) for number in some) for some in (range(len(work.ids)), waiting))
    tasks = (
        Task(number, name_units(work.what, work.ids[number].tolist(), f"{len(work.ids[number])} sentences"), data)
        for number, data in ((number, work.load(number)) for number in waiting)
    )
    workers = workers_of(cluster)
    if workers.executor == "local":
        workers = replace(workers, count=min(workers.count, len(waiting)))
    job = Job(work.what, work.start, workers)
    with (
        # Without `cpus_per_worker`, this process and its workers keep their number of threads.
        limited_threads(workers.threads) if cluster.cpus_per_worker else nullcontext(),
        progress_counter(work.what, "sentence", total, total - left) as count,
    ):
        for number, table in executor_of(workers)(job, tasks, count):
            assert _has_rows(work, number, table), f"{work.what}: chunk {number} has other rows"
            if folder is not None:
                write_table(table, chunk_path(folder, number), work.schema)
            yield number, table


def chunk_path(folder: Path, number: int) -> Path:
    """Where `map_chunks` stores a chunk."""
    return folder / f"{number}.parquet"


def worker_threads(cluster: ClusterParams) -> int:
    """Threads of each worker. With another number, sums of floats can differ in their last bits."""
    return cluster.cpus_per_worker or thread_count()


def workers_of(cluster: ClusterParams) -> Workers:
    """The workers that the parameters name."""
    return Workers(cluster.executor, cluster.workers, worker_threads(cluster), cluster.gpus_per_worker, cluster.address)


def executor_of(workers: Workers) -> Executor:
    """The executor that `workers` names. A single local worker is this process."""
    match workers.executor:
        case "local":
            return in_this_process if workers.count == 1 else in_processes
        case "ray":
            from l2l_core.workers.on_ray import on_ray  # Ray is optional

            return on_ray
        case _:
            assert_never(workers.executor)


def check_gpus(cluster: ClusterParams, device: str) -> None:
    """Raise ConfigError if the workers compute on CUDA but have no GPU each. device: cpu, cuda or mps."""
    if device == "cuda" and not cluster.gpus_per_worker and (cluster.executor, cluster.workers) != ("local", 1):
        raise ConfigError(
            "params.yaml: cluster.gpus_per_worker: got 0, expected at least 1 because the workers compute on CUDA; or "
            "set the engine's device to cpu"
        )


def _stored(work: Work, folder: Path, number: int) -> pa.Table | None:
    path = chunk_path(folder, number)
    return read_chunk(path, work.schema, "computing it again", lambda table: _has_rows(work, number, table))


def _has_rows(work: Work, number: int, table: pa.Table) -> bool:
    return np.array_equal(table["sent_id"].to_numpy(), work.ids[number])


def name_units(what: str, sent_ids: Sequence[int], size: str) -> str:
    """A chunk in messages: `query: sent_id 3, 4, 9`. Of more than IDS_SHOWN, the first ones and the chunk's size."""
    more = f", ... ({size})" if len(sent_ids) > IDS_SHOWN else ""
    return f"{what}: sent_id {', '.join(map(str, sent_ids[:IDS_SHOWN]))}{more}"
