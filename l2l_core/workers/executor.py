"""The protocol between the chunks of a stage and the processes that compute them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa

from l2l_core.errors import ConfigError, L2LError, explain

KEPT = "finished chunks are kept: rerun to resume"

Compute = Callable[[Any], Iterable[pa.Table]]
"""Data of a chunk -> its rows, in one or more tables. The rows depend on nothing else."""
Start = Callable[[], Compute]
"""Loads what the computation needs, such as a network, once per worker. Picklable, unless it stays in this process."""


@dataclass(frozen=True)
class Task:
    """A chunk to compute."""

    number: int
    units: str  # names its units in messages
    data: Any  # what the computation reads; picklable


@dataclass(frozen=True)
class Workers:
    """The processes that compute, and what each of them has."""

    executor: Literal["local", "ray"]
    count: int
    threads: int
    gpus: int
    address: str | None = None  # of a running Ray cluster
    python: str | None = None  # interpreter of actors, at this path on each node; None: that of the node's Ray
    fewer: str = "cluster.workers"  # what a message advises to lower if memory runs out
    fewer_gpus: str = "cluster.gpus_per_worker"  # if no node has so many


@dataclass(frozen=True)
class Job:
    """How all chunks of a stage are computed."""

    what: str  # names the work in messages
    start: Start
    workers: Workers


class Executor(Protocol):
    """Computes chunks somewhere."""

    def __call__(
        self, job: Job, tasks: Iterator[Task], count: Callable[[int], object]
    ) -> Iterator[tuple[int, pa.Table]]:
        """Yield the number and the rows of each chunk, as soon as it is computed.

        Tasks are drawn only as workers become free, since their data can be large. count: takes the number of newly
        computed rows. If a chunk fails, all chunks that have begun are yielded, then its error is raised.
        """


def compute_parts(compute: Compute, task: Task) -> Iterator[pa.Table]:
    """The tables of a chunk. An error gets the chunk's units into its one line.

    What the user fixes elsewhere (parameters, memory, disk space) keeps its message.
    """
    try:
        yield from compute(task.data)
    except ConfigError:
        raise
    except L2LError as error:
        raise type(error)(f"{error} ({task.units}); {KEPT}") from error
    except Exception as error:
        if explain(error) is not None:
            raise
        raise L2LError(f"{task.units}: {_one_line(error)}; {KEPT}") from error


def _one_line(error: Exception) -> str:
    """Kind, text and place of a fault of the program."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} (at {Path(place.filename).name}:{place.lineno})"
