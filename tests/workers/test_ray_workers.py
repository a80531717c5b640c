"""Chunks on a small Ray cluster of this machine: the same rows, whatever dies."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy_work
from toy_work import CHUNKS, PATHS, SQUARES, attempts, cluster_of, squares, work_of

from l2l_core.errors import ConfigError, InputError, L2LError
from l2l_core.workers import on_ray
from l2l_core.workers.chunks import map_chunks

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402  (after importorskip)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("ray")]

PATIENCE_S = 120
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    (tmp_path / "traces").mkdir()
    return tmp_path / "traces"


@pytest.fixture(autouse=True)
def _workers_find_toy_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PATHS)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs and two nodes with one each, all on the loopback."""
    made = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0}, connect=False)
    for _ in range(2):
        made.add_node(**{key: value for key, value in NODE.items() if key != "include_dashboard"})
    made.wait_for_nodes()
    yield made
    made.shutdown()


def on(cluster: Any, workers: int = 2, **changes: object):
    return cluster_of(workers, executor="ray", address=cluster.address, **changes)


def stored(folder: Path) -> set[int]:
    return {int(path.stem) for path in folder.glob("*.parquet")}


def test_two_workers_give_the_rows_of_one_process(cluster: Any, tmp_path: Path, traces: Path) -> None:
    assert squares(work_of(traces), on(cluster), tmp_path / "scratch") == SQUARES
    assert stored(tmp_path / "scratch") == set(range(CHUNKS))
    assert Counter(attempts(traces)) == dict.fromkeys(range(CHUNKS), 1)
    assert [path.read_text() for path in traces.glob("started-*")] == ["1", "1"]
    assert squares(work_of(tmp_path / "gone"), on(cluster), tmp_path / "scratch") == SQUARES  # needs no cluster


def test_few_chunks_are_in_memory(cluster: Any, traces: Path) -> None:
    loaded: list[int] = []
    for done, _ in enumerate(map_chunks(work_of(traces, loaded.append), on(cluster)), start=1):
        time.sleep(0.1)
        assert len(loaded) - done <= 2 * 2


def test_ray_replaces_a_killed_worker(cluster: Any, traces: Path) -> None:
    (traces / "die-3").touch()
    assert squares(work_of(traces), on(cluster)) == SQUARES
    assert Counter(attempts(traces)) == Counter(range(CHUNKS)) + Counter([3])


def test_a_chunk_that_kills_every_worker_ends_the_run(
    cluster: Any, tmp_path: Path, traces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "RESTARTS", 1)
    (traces / "always-5").touch()
    with pytest.raises(L2LError, match=r"^toy: a worker died 2 times on Ray.*; finished chunks are kept"):
        squares(work_of(traces), on(cluster), tmp_path / "scratch")
    assert attempts(traces).count(5) == 2
    assert stored(tmp_path / "scratch") == set(attempts(traces)) - {5}
    (traces / "always-5").unlink()
    assert squares(work_of(traces), on(cluster), tmp_path / "scratch") == SQUARES
    assert Counter(attempts(traces)) == Counter(range(CHUNKS)) + Counter([5, 5])


def test_a_failed_chunk_is_named_and_finished_chunks_are_kept(cluster: Any, tmp_path: Path, traces: Path) -> None:
    (traces / "fail-5").write_text("input")
    with pytest.raises(InputError, match=r"^photo\.png: image not found \(toy: sent_id .*\); finished chunks are kept"):
        squares(work_of(traces), on(cluster), tmp_path / "scratch")
    assert stored(tmp_path / "scratch") == set(attempts(traces)) - {5}


def test_work_of_a_lost_node_runs_elsewhere(cluster: Any, tmp_path: Path, traces: Path) -> None:
    """The lost node is not replaced: its worker gets the place of the other, when that one has nothing left to do."""
    lost = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    done = 0
    for number, table in map_chunks(work_of(traces), on(cluster, 3), tmp_path / "scratch"):
        assert table["square"].to_pylist() == SQUARES[number]
        done += 1
        if done == 3:
            cluster.remove_node(lost, allow_graceful=False)
    assert done == CHUNKS
    assert stored(tmp_path / "scratch") == set(range(CHUNKS))
    assert len(attempts(traces)) <= CHUNKS + 1 + 3  # the node's chunk, and results that it still held


def test_a_killed_driver_takes_its_workers_with_it_and_resumes(cluster: Any, traces: Path) -> None:
    command = [sys.executable, toy_work.__file__, str(traces), "ray", "2", cluster.address]
    process = subprocess.Popen(command, cwd=traces, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE_S
    while len(attempts(traces)) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE_S)
    assert not (traces / "finished").exists()
    subprocess.run(command, cwd=traces, check=True, timeout=PATIENCE_S, capture_output=True)
    assert (traces / "finished").exists()
    assert CHUNKS < len(attempts(traces)) <= CHUNKS + 4


def test_explains_a_node_without_the_code(cluster: Any, traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(InputError, match=r"^toy: a worker cannot start on its Ray node: .*No module named 'toy_work'"):
        squares(work_of(traces), on(cluster))


def test_explains_a_cluster_without_room_and_a_cluster_that_is_not_there(cluster: Any, traces: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"needs 1 GPUs, but the Ray cluster has 0: lower cluster\.gpus_per_worker or"
    ):
        squares(work_of(traces), on(cluster, gpus_per_worker=1))
    nowhere = cluster_of(1, executor="ray", address="127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"cluster\.address: got '127\.0\.0\.1:1', expected a Ray cluster"):
        squares(work_of(traces), nowhere)
