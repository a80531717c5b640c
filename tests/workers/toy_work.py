"""Work whose chunks take a moment, leave a trace of each attempt, and fail where a test asks for it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from l2l_core.config import ClusterParams
from l2l_core.core.files import scratch_folder
from l2l_core.errors import ConfigError, InputError, run_stage
from l2l_core.workers.chunks import Work, map_chunks

SCHEMA = pa.schema([("sent_id", pa.int64()), ("square", pa.int64())])
CHUNKS, ROWS = 12, 3
IDS = [np.arange(start, start + ROWS) * 7 % 101 for start in range(0, CHUNKS * ROWS, ROWS)]
SQUARES = {number: [value**2 for value in ids.tolist()] for number, ids in enumerate(IDS)}
PATHS = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
"""PYTHONPATH of processes that import this file."""
ERRORS: dict[str, Exception] = {
    "bug": ValueError("broken\nvalue"),
    "input": InputError("photo.png: image not found"),
    "config": ConfigError("params.yaml: x: got 1, expected 2"),
    "memory": MemoryError("no room"),
}


def work_of(traces: Path, load: Callable[[int], object] = lambda number: None) -> Work:
    """load: called in the driver before the chunk's data are made.

    A file `traces/die-N` kills the worker of chunk N once, `traces/always-N` each time; `traces/fail-N` names an entry
    of ERRORS that is raised as long as the file exists.
    """

    def data(number: int) -> tuple[int, list[int]]:
        load(number)
        return number, IDS[number].tolist()

    return Work(what="toy", ids=IDS, schema=SCHEMA, load=data, start=partial(_start, traces))


def cluster_of(workers: int = 1, **changes: object) -> ClusterParams:
    settings = {"executor": "local", "address": None, "cpus_per_worker": 1, "gpus_per_worker": 0}
    return ClusterParams.model_validate(settings | {"workers": workers} | changes)


def attempts(traces: Path) -> list[int]:
    """Numbers of the chunks in the order in which workers began them, with repetitions."""
    return [int(path.name.split("-")[1]) for path in sorted(traces.glob("began-*"), key=lambda p: p.stat().st_mtime_ns)]


def squares(work: Work, cluster: ClusterParams, folder: Path | None = None) -> dict[int, list[int]]:
    found = {}
    for number, table in map_chunks(work, cluster, folder):
        assert number not in found
        assert table["sent_id"].to_pylist() == IDS[number].tolist()
        found[number] = table["square"].to_pylist()
    return found


def _start(traces: Path) -> Callable[[tuple[int, list[int]]], Iterator[pa.Table]]:
    (traces / f"started-{os.getpid()}-{time.monotonic_ns()}").write_text(os.environ["OMP_NUM_THREADS"])

    def compute(data: tuple[int, list[int]]) -> Iterator[pa.Table]:
        number, ids = data
        (traces / f"began-{number}-{os.getpid()}-{time.monotonic_ns()}").touch()
        time.sleep(0.05)
        fail, die, always = (traces / f"{name}-{number}" for name in ("fail", "die", "always"))
        if fail.exists():
            raise ERRORS[fail.read_text()]
        if die.exists() or always.exists():
            die.unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)
        for row in ids:
            yield pa.table({"sent_id": [row], "square": [row**2]}, schema=SCHEMA)

    return compute


def main() -> None:
    """A driver for tests that kill it: traces, executor, workers, address."""
    traces, executor, workers, address = sys.argv[1:]
    cluster = cluster_of(int(workers), executor=executor, address=address or None)
    with scratch_folder("toy", "key") as folder:
        found = squares(work_of(Path(traces)), cluster, folder)
        assert found == SQUARES
        (Path(traces) / "finished").touch()


if __name__ == "__main__":
    run_stage(main)
