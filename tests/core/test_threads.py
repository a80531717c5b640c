"""The number of threads of a process, set before any library starts threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest

from l2l_core.core import threads
from l2l_core.core.threads import (
    DEFAULT_VARIABLE,
    prefetch,
    set_thread_policy,
    share_of_launched,
    thread_count,
    usable_cores,
)

ROOT = Path(__file__).parents[2]
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("*.py") if path.stem != "__init__")
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OPENCV_FOR_THREADS_NUM", DEFAULT_VARIABLE)


@pytest.fixture
def unset(monkeypatch):
    """Unset all thread variables; changes by a test are undone."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is restored afterwards
        monkeypatch.delenv(name)
    return monkeypatch


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def siblings(*cores: str) -> dict[str, str]:
    """Files of logical CPUs 0..N-1, each listing the CPUs that share its core."""
    return {f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{c}\n" for n, c in enumerate(cores)}


V1 = "5:devices:/\n4:memory:/\n3:cpu,cpuacct:/jobs/mine\n"
CASES = {
    "no cgroups": ({}, 8),
    "version 2 without limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
    "version 2": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
    "version 2, part of a core": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
    "version 2, two and a half": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
    "version 2, more than there are": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 8),
    "version 2, limit of a parent": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
        },
        2,
    ),
    "version 1": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu,cpuacct/jobs/mine/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu,cpuacct/jobs/mine/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
    "version 1 in a container, whose own cgroup lies at the root": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n",
        },
        2,
    ),
    "version 1 without limit": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/jobs/mine/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/jobs/mine/cpu.cfs_period_us": "100000\n",
        },
        8,
    ),
    "two hyperthreads a core": (siblings("0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"), 4),
    "unreadable": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "many of them\n"}, 8),
}


@pytest.mark.parametrize("case", CASES)
def test_cgroups_and_hyperthreads_limit_usable_cores(tmp_path, monkeypatch, case):
    files, cores = CASES[case]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert usable_cores(machine(tmp_path, files)) == cores


def test_cpu_affinity_limits_usable_cores(tmp_path, monkeypatch):
    """CPUs 0 and 4 share one core."""
    files = siblings("0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4, 5}, raising=False)
    assert usable_cores(machine(tmp_path, files)) == 2


def test_all_cores_are_usable_if_the_affinity_cannot_be_read(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert usable_cores() == 5


def test_thread_policy_sets_unset_variables(unset):
    unset.setattr(threads, "usable_cores", lambda: 3)
    set_thread_policy()
    assert [os.environ[name] for name in VARIABLES] == ["PASSIVE", "1000", "3", "3", "3"]


def test_thread_policy_keeps_existing_variables(unset):
    unset.setenv("OMP_WAIT_POLICY", "ACTIVE")
    unset.setenv("OMP_NUM_THREADS", "7")
    unset.setenv("OPENCV_FOR_THREADS_NUM", "2")
    set_thread_policy()
    assert [os.environ.get(name) for name in VARIABLES] == ["ACTIVE", None, "7", "2", None]


def test_opencv_in_a_child_process_uses_the_child_thread_count(unset):
    unset.setenv("OPENCV_FOR_THREADS_NUM", "8")  # set by the parent
    unset.setenv("OMP_NUM_THREADS", "2")
    set_thread_policy()
    assert os.environ["OPENCV_FOR_THREADS_NUM"] == "2"


@pytest.mark.parametrize(("value", "count"), [("4", 4), ("2,1", 2), (" 3 ", 3), ("", 6), ("0", 6), ("many", 6)])
def test_parses_the_thread_count_like_openmp(unset, value, count):
    unset.setattr(threads, "usable_cores", lambda: 6)
    unset.setenv("OMP_NUM_THREADS", value)
    assert thread_count() == count


LAUNCHED = {
    "torchrun's own value": ("1", {}, 3),
    "a user's value of 1": ("1", {"OMP_NUM_THREADS": "1"}, None),
    "a user's value of 2": ("2", {"OMP_NUM_THREADS": "2"}, None),
    "an option of accelerate launch": ("2", {}, None),
    "a default of this project, handed down": ("7", {"OMP_NUM_THREADS": "7", DEFAULT_VARIABLE: "7"}, 3),
    "a user's value below such a default": ("1", {"OMP_NUM_THREADS": "1", DEFAULT_VARIABLE: "7"}, None),
    "a launcher whose environment is unreadable": ("1", None, 3),
}
"""OMP_NUM_THREADS of one of two processes on 7 cores, the environment of their launcher, the expected threads."""


@pytest.mark.parametrize("case", LAUNCHED)
def test_launched_processes_share_cores_unless_the_user_sets_a_thread_count(tmp_path, unset, case):
    value, launcher, expected = LAUNCHED[case]
    unset.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    unset.setattr(os, "getppid", lambda: 41)
    unset.setenv("LOCAL_WORLD_SIZE", "2")
    unset.setenv("OMP_NUM_THREADS", value)
    text = "".join(f"{name}={entry}\0" for name, entry in {"HOME": "/", **(launcher or {})}.items())
    root = tmp_path if launcher is None else machine(tmp_path, {"proc/41/environ": text})
    assert share_of_launched(root) == expected


def test_share_of_launched_processes_follows_the_cpu_quota(tmp_path, unset):
    unset.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    unset.setenv("LOCAL_WORLD_SIZE", "2")
    unset.setenv("OMP_NUM_THREADS", "1")
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "800000 100000\n"}
    assert share_of_launched(machine(tmp_path, files)) == 4


def test_single_process_has_no_share(unset):
    unset.setenv("OMP_NUM_THREADS", "1")
    unset.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert share_of_launched() is None


@pytest.mark.parametrize(("given", "expected"), [({}, usable_cores() // 2 or 1), ({"OMP_NUM_THREADS": "1"}, None)])
def test_child_detects_the_thread_setting_of_its_launcher(given, expected):
    """Like torchrun, the launcher sets the variable after it starts."""
    child = "from l2l_core.core.threads import share_of_launched; print(share_of_launched())"
    launcher = f"""
import os, subprocess, sys
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["LOCAL_WORLD_SIZE"] = "2"
subprocess.run([sys.executable, "-c", {child!r}], check=True)
"""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | given
    command = [sys.executable, "-c", launcher]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=True)
    assert done.stdout.split() == [str(expected)]


def test_libraries_use_the_configured_thread_count():
    code = (
        "import l2l_core, cv2, pyarrow, torch; print(torch.get_num_threads(), cv2.getNumThreads(), pyarrow.cpu_count())"
    )
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        check=True,
    )
    assert done.stdout.split() == ["1", "1", "1"]


# --- imports of every stage, in a fresh process

HEAVY = ("torch", "transformers", "accelerate", "dvclive", "sklearn", "scipy", "matplotlib")
NETWORK = ("torch", "transformers")
NEEDED = dict.fromkeys(("warmup", "crossfit", "retrain", "select", "distill", "predict"), NETWORK) | {
    "report": ("torch", "matplotlib"),
    "select": (*NETWORK, "sklearn", "scipy"),  # the critic
}
"""Heavy packages that importing a stage may load. Other packages load on use or never."""

WATCH = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "numpy", "cv2", "pyarrow") and not os.environ.get("OMP_WAIT_POLICY"):
            print(f"{name} before the policy")
sys.meta_path.insert(0, Watch())
import importlib
importlib.import_module(sys.argv[1])
print(*[name for name in sys.argv[2:] if name in sys.modules])
print(os.environ["OMP_WAIT_POLICY"], os.environ["OMP_NUM_THREADS"])
"""


def imported(module: str) -> list[str]:
    """Output lines of a fresh process that imports a module with no thread variables set."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-c", WATCH, module, *HEAVY]
    return subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, check=True
    ).stdout.splitlines()


@pytest.mark.parametrize("stage", STAGES)
def test_stage_sets_the_thread_policy_first_and_imports_only_what_it_needs(stage):
    loaded, policy = imported(f"stages.{stage}")
    assert policy == f"PASSIVE {usable_cores()}"
    assert set(loaded.split()) <= set(NEEDED.get(stage, ()))


@pytest.mark.parametrize("module", ["l2l_core.__main__", "bench.training", "vlm.losses"])
def test_other_entry_points_set_the_thread_policy_first(module):
    loaded, policy = imported(module)
    assert policy == f"PASSIVE {usable_cores()}"
    if module == "l2l_core.__main__":
        assert loaded == ""


def test_help_loads_no_heavy_packages():
    """`python -m l2l_core --help` takes 0.2 CPU-seconds; each of these packages would add as much."""
    code = """
import runpy, sys
sys.argv = ["l2l_core", "--help"]
try:
    runpy.run_module("l2l_core", run_name="__main__")
except SystemExit:
    print([name for name in ("pandas", "pydantic", "cv2", "dvc", "torch") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert "Usage:" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_prediction_loads_neither_accelerate_nor_sklearn(tmp_path):
    code = """
import sys
from toy_pairs import toy_batches, toy_network, toy_pairs, TRAIN
from l2l_core.model.batch_predictor import BatchPredictor
from pathlib import Path
from threading import Event
pairs, _ = toy_pairs(Path(sys.argv[1]))
(masks,) = BatchPredictor.of(toy_network(pairs), TRAIN).masks(toy_batches(pairs), 4, [True], "test")
print(len(masks), [name for name in ("accelerate", "dvclive", "sklearn", "scipy") if name in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["4", "[]\n"]


def test_prefetch_computes_the_next_item_while_the_caller_uses_the_current_one():
    started = [Event() for _ in range(4)]

    def items():
        for number, event in enumerate(started):
            event.set()
            yield number

    found = []
    for item in prefetch(items()):
        found.append(item)
        assert all(event.wait(60) for event in started[: item + 2])  # the next one has begun
        assert not any(event.is_set() for event in started[item + 2 :])  # but not the one after it
    assert found == [0, 1, 2, 3]
    assert list(prefetch([])) == []


def test_prefetch_raises_an_error_of_the_source_in_its_place():
    def items():
        yield 1
        raise ValueError("broken")

    found = prefetch(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="broken"):
        next(found)
