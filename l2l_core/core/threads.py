"""Thread count and wait policy; `l2l_core/__init__.py` sets them before any library is loaded.

OpenMP (PyTorch, MKL), OpenBLAS (NumPy) and Arrow read their thread count from OMP_NUM_THREADS, OpenCV from
OPENCV_FOR_THREADS_NUM. OpenMP reads its variables once, when its library is loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TypeVar

Item = TypeVar("Item")

DEFAULT_VARIABLE = "L2L_DEFAULT_THREADS"
"""Marks the value of OMP_NUM_THREADS as set by this module, so that child processes can tell it from a user's value."""


SPIN_COUNT = 1000
"""Rounds that a waiting thread of GNU OpenMP spins before it sleeps: long enough for the gap between two layers, too
short to take time from another process (bench/waiting.py)."""


def set_thread_policy() -> None:
    """Make waiting threads sleep soon, and use as many threads as there are usable cores.

    OMP variables that are already set stay. By default, waiting OpenMP threads spin. If another process is busy,
    spinning takes time from the other threads (bench/waiting.py). OpenCV gets at most as many threads as OpenMP, even
    if a parent process with a larger share has set its variable. Child processes inherit all variables.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = os.environ[DEFAULT_VARIABLE] = str(usable_cores())
    opencv = os.environ.get("OPENCV_FOR_THREADS_NUM", "")
    if not opencv.isdecimal() or int(opencv) > thread_count():
        os.environ["OPENCV_FOR_THREADS_NUM"] = str(thread_count())


def thread_count() -> int:
    """Number of threads for this process: OMP_NUM_THREADS, or `usable_cores` if it is not a positive number."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list has one number per nesting level
    return int(first) if first.isdecimal() and int(first) else usable_cores()


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Within the block, this process computes with `count` threads, and processes that it starts inherit the number."""
    torch = sys.modules.get("torch")  # if it is loaded later, it reads the variable
    before, torch_before = os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads() if torch else 0
    os.environ["OMP_NUM_THREADS"] = str(count)
    if torch:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
        if torch:
            torch.set_num_threads(torch_before)


def prefetch(items: Iterable[Item]) -> Iterator[Item]:
    """The items in order, where the next one is computed in a thread while the caller uses the current one.

    Worth it if both sides release Python's global lock, as PyTorch, OpenCV and NumPy do for large arrays.
    """
    source, none_left = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, source, none_left)
        while (item := following.result()) is not none_left:
            following = pool.submit(next, source, none_left)
            yield item  # type: ignore[misc]  # not `none_left`


def share_of_launched(root: Path = Path("/")) -> int | None:
    """Threads per process under torchrun or accelerate launch: an equal share of the usable cores.

    None: this is the only process on the machine, or the user has set OMP_NUM_THREADS. Both launchers set it to 1 if
    it is missing. The launcher's own initial environment (/proc/PID/environ) tells their 1 from a user's. If it cannot
    be read (not Linux), 1 counts as the launcher's. root: folder that contains proc and sys.
    """
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if beside < 2:
        return None
    threads, given = os.environ.get("OMP_NUM_THREADS"), _environment(os.getppid(), root)
    by_launcher = threads == "1" and "OMP_NUM_THREADS" not in given
    by_default = threads is None or threads == given.get("OMP_NUM_THREADS") == given.get(DEFAULT_VARIABLE)
    return max(1, usable_cores(root) // beside) if by_launcher or by_default else None


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores that this process may use, at least 1, given its CPU affinity and the CPU quotas of its cgroups.

    root: folder that contains proc and sys. If Python cannot read the affinity (not Linux): all logical cores.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    # Hyperthreads of one core share its arithmetic units. One thread per core is fastest, and MKL's choice too.
    cores = {_read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return max(1, int(min([len(cores), *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """Every CPU limit of this process's cgroups and their parents, in CPUs; cgroup versions 1 and 2."""
    mount = root / "sys/fs/cgroup"
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        inside = PurePosixPath(path.lstrip("/"))
        for folder in (inside, *inside.parents):  # a container may see its own cgroup at the root instead
            if hierarchy == "0" and not controllers:
                quota, _, period = (_read(mount / folder / "cpu.max") or "").partition(" ")
            elif "cpu" in controllers.split(","):
                here = mount / controllers / folder if (mount / controllers).is_dir() else mount / "cpu" / folder
                quota, period = (_read(here / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period"))
            else:
                break
            if quota.isdecimal() and period.isdecimal() and int(period):  # `max`, -1 or no such file: no limit
                yield int(quota) / int(period)


def _environment(process: int, root: Path) -> dict[str, str]:
    """Environment with which a process was started, without later changes. Empty if unreadable."""
    try:
        text = (root / f"proc/{process}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    pairs = (entry.partition("=") for entry in text.split("\0"))
    return {name: value for name, _, value in pairs}


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
