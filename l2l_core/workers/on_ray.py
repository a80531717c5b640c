"""Computes chunks in actors of a Ray cluster. The only file that uses Ray (the extra `ray`).

Ray places the actors, restarts those that died or whose node was lost, and repeats their chunk.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa

from l2l_core.core.files import CODE_ROOT
from l2l_core.errors import ConfigError, InputError, L2LError
from l2l_core.workers.executor import KEPT, Compute, Job, Start, Task, Workers, compute_parts

RESTARTS = 5
"""How often Ray replaces a worker that died or whose node was lost. A chunk that always kills its worker thus ends the
run. Attempts to reach a worker are not limited: many fail before Ray notices that a node is gone."""
CONNECT_S = 10.0
"""Ray itself tries for minutes to reach an address where nothing answers."""


def on_ray(job: Job, tasks: Iterator[Task], count: Callable[[int], object]) -> Iterator[tuple[int, pa.Table]]:
    """An `Executor` with an actor for each worker, on the cluster at their address or on one of this machine.

    Raises ConfigError if Ray is missing or the cluster cannot be used, L2LError if workers die again and again.
    """
    workers = job.workers
    with _cluster(workers) as ray:
        from ray.util import ActorPool

        environment: dict[str, Any] = {
            "env_vars": {"OMP_NUM_THREADS": str(workers.threads), "PYTHONPATH": _python_path()}
        }
        if workers.python is not None:
            environment["py_executable"] = workers.python
        worker = ray.remote(_Worker).options(
            num_cpus=workers.threads,
            num_gpus=workers.gpus,
            max_restarts=RESTARTS,
            max_task_retries=-1,
            runtime_env=environment,
        )
        pool = ActorPool([worker.remote(job.start, str(Path.cwd())) for _ in range(workers.count)])
        failure: Exception | None = None
        while True:
            while failure is None and pool.has_free() and (task := next(tasks, None)) is not None:
                pool.submit(lambda actor, task: actor.run.remote(task), task)
            # The others leave, so that Ray can restart a worker whose node was lost in their place.
            while (idle := pool.pop_idle()) is not None:
                ray.kill(idle)
            if not pool.has_next():
                break
            try:
                number, table = pool.get_next_unordered()
            except ray.exceptions.RayTaskError as error:
                failure = failure or error.cause
            except ray.exceptions.RayError as error:
                failure = failure or _explained(job, error)
            else:
                count(len(table))
                yield number, table
        if failure is not None:
            raise failure


def require_ray() -> None:
    """Raise ConfigError if Ray is not installed."""
    if find_spec("ray") is None:
        raise ConfigError("params.yaml: cluster.executor: got 'ray', which is not installed: pip install -e '.[ray]'")


class _Worker:
    """An actor. The data and the code must be at the same path on each node."""

    def __init__(self, start: Start, folder: str) -> None:
        self._start, self._folder = start, folder
        self._compute: Compute | None = None

    def run(self, task: Task) -> tuple[int, pa.Table]:
        if self._compute is None:  # not in __init__: exceptions raised there do not reach the user
            try:
                os.chdir(self._folder)
            except OSError as error:
                node = os.uname().nodename
                raise InputError(
                    f"{self._folder}: not found on the Ray node {node} ({error.strerror}); each node needs the project "
                    "at the same path (docs/scale.md)"
                ) from None
            self._compute = self._start()
        return task.number, pa.concat_tables(compute_parts(self._compute, task))


def _explained(job: Job, error: Exception) -> L2LError:
    """A worker that never began, or one that died again and again."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "error raised in its creation task" in lines[0]:
        return InputError(
            f"{job.what}: a worker cannot start on its Ray node: {lines[-1]}; each node needs the project and its "
            "packages at the same paths (docs/scale.md)"
        )
    return L2LError(
        f"{job.what}: a worker died {RESTARTS + 1} times on Ray, most often because memory ran out: {lines[0]}; {KEPT}"
    )


def _python_path() -> str:
    """This code, before what the user has set."""
    return os.pathsep.join(filter(None, [str(CODE_ROOT), os.environ.get("PYTHONPATH")]))


def _reach(address: str | None) -> None:
    """Raise OSError if an address HOST:PORT cannot be reached."""
    host, _, port = (address or "").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.removeprefix("ray://"), int(port)), CONNECT_S).close()


@contextmanager
def _cluster(workers: Workers) -> Iterator[Any]:
    """The module `ray`, connected to a cluster with room for at least one worker."""
    # The driver's choice of device counts (Work), so that Ray need not hide the GPUs of workers without one.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Of a cluster started here. By default, workers get a low priority and starve beside other programs.
    os.environ.setdefault("RAY_worker_niceness", "0")
    require_ray()
    import ray

    address = workers.address
    own = {"num_cpus": workers.count * workers.threads, "include_dashboard": False} if address is None else {}
    try:
        _reach(address)
        ray.init(address=address or "local", log_to_driver=False, logging_level="WARNING", **own)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"params.yaml: cluster.address: got {address!r}, expected a Ray cluster with this version of Ray "
            f"and Python, and RAY_AUTH_MODE=token if it asks for a token (docs/scale.md): {reason}"
        ) from None
    try:
        for resource, wanted, fewer in (
            ("CPU", workers.threads, "cluster.cpus_per_worker"),
            ("GPU", workers.gpus, workers.fewer_gpus),
        ):
            found = ray.cluster_resources().get(resource, 0)
            if wanted > found:
                raise ConfigError(
                    f"params.yaml: a worker needs {wanted} {resource}s, but the Ray cluster has {found:g}: lower "
                    f"{fewer} or add nodes"
                )
        yield ray
    finally:
        ray.shutdown()
