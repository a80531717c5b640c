"""Chunks of toy work in this process and in several: the same rows, resumed after any kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from queue import SimpleQueue

import psutil
import pytest
import torch
import toy_work
from toy_pairs import toy_params
from toy_work import CHUNKS, IDS, PATHS, SQUARES, attempts, cluster_of, squares, work_of

from l2l_core.config import ClusterParams
from l2l_core.core.threads import limited_threads, thread_count
from l2l_core.core.worker_process import begin_worker
from l2l_core.errors import ConfigError, InputError, L2LError
from l2l_core.preflight.backends import describe_cluster
from l2l_core.workers.chunks import check_gpus, map_chunks

PATIENCE_S = 90


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    (tmp_path / "traces").mkdir()
    return tmp_path / "traces"


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def test_any_number_of_workers_gives_the_same_rows_and_the_same_files(tmp_path: Path, traces: Path) -> None:
    for workers in (1, 2, 3):
        assert squares(work_of(traces), cluster_of(workers), tmp_path / str(workers)) == SQUARES
    one, two, three = (stored(tmp_path / str(workers)) for workers in (1, 2, 3))
    assert sorted(one) == sorted(f"{number}.parquet" for number in range(CHUNKS))
    assert set(one) == set(two) == set(three)
    assert len(list(traces.glob("started-*"))) == 1 + 2 + 3  # what a worker needs is loaded once
    assert Counter(attempts(traces)) == dict.fromkeys(range(CHUNKS), 3)


@pytest.mark.parametrize("workers", [1, 2])
def test_without_a_folder_nothing_is_stored(
    tmp_path: Path, traces: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert squares(work_of(traces), cluster_of(workers)) == SQUARES
    assert list(Path.cwd().iterdir()) == []


def test_a_finished_work_loads_and_computes_nothing(tmp_path: Path, traces: Path) -> None:
    squares(work_of(traces), cluster_of(), tmp_path / "scratch")
    again = work_of(tmp_path / "gone", lambda number: pytest.fail("loads the data of a chunk"))
    assert squares(again, cluster_of(2), tmp_path / "scratch") == SQUARES


def test_only_torn_chunks_and_chunks_of_other_rows_are_computed_again(
    tmp_path: Path, traces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "scratch"
    squares(work_of(traces), cluster_of(), folder)
    whole = stored(folder)
    torn, other = folder / "4.parquet", folder / "7.parquet"
    torn.write_bytes(torn.read_bytes()[:-9])
    other.write_bytes((folder / "8.parquet").read_bytes())
    assert squares(work_of(traces), cluster_of(), folder) == SQUARES
    assert attempts(traces)[CHUNKS:] == [4, 7]
    assert stored(folder) == whole
    assert capsys.readouterr().err.splitlines() == [
        f"note: {torn}: torn, moved to 4.parquet.torn; computing it again",
        f"note: {other}: not the expected rows, moved to 7.parquet.torn; computing it again",
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_few_chunks_are_in_memory(traces: Path, workers: int) -> None:
    """A consumer that is slower than the workers holds them up."""
    loaded: list[int] = []
    for done, _ in enumerate(map_chunks(work_of(traces, loaded.append), cluster_of(workers)), start=1):
        time.sleep(0.1)
        assert len(loaded) - done <= 2 * workers
    assert sorted(loaded) == list(range(CHUNKS))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_chunk_is_named_and_finished_chunks_are_kept(tmp_path: Path, traces: Path, workers: int) -> None:
    (traces / "fail-5").write_text("bug")
    shown = ", ".join(map(str, IDS[5].tolist()))
    with pytest.raises(L2LError) as caught:
        squares(work_of(traces), cluster_of(workers), tmp_path / "scratch")
    assert str(caught.value).startswith(f"toy: sent_id {shown}: ValueError: broken value (at toy_work.py:")
    assert str(caught.value).endswith("; finished chunks are kept: rerun to resume")
    begun, kept = set(attempts(traces)), {int(name.split(".")[0]) for name in stored(tmp_path / "scratch")}
    assert kept == begun - {5}  # also those that ran beside it
    (traces / "fail-5").unlink()
    assert squares(work_of(traces), cluster_of(workers), tmp_path / "scratch") == SQUARES
    assert Counter(attempts(traces)) == Counter(range(CHUNKS)) + Counter([5])


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("input", InputError, r"^photo\.png: image not found \(toy: sent_id .*\); finished chunks are kept"),
        ("config", ConfigError, r"^params\.yaml: x: got 1, expected 2$"),
        ("memory", MemoryError, "^no room$"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_errors_that_a_user_can_fix_keep_their_kind(
    traces: Path, workers: int, name: str, kind: type[Exception], message: str
) -> None:
    (traces / "fail-0").write_text(name)
    with pytest.raises(kind, match=message):
        squares(work_of(traces), cluster_of(workers))


def test_a_killed_worker_ends_the_run_and_loses_only_what_was_in_flight(tmp_path: Path, traces: Path) -> None:
    for number in (3, 8):
        (traces / f"die-{number}").touch()
        with pytest.raises(L2LError, match=r"^toy: a worker process was killed.*cluster\.workers.*rerun to resume$"):
            squares(work_of(traces), cluster_of(2), tmp_path / "scratch")
    assert squares(work_of(traces), cluster_of(2), tmp_path / "scratch") == SQUARES
    assert CHUNKS < len(attempts(traces)) <= CHUNKS + 2 * 2 * 2  # two kills, two workers, a waiting chunk for each


def drive(traces: Path, executor: str, workers: int, address: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, toy_work.__file__, str(traces), executor, str(workers), address]
    environment = os.environ | {"PYTHONPATH": PATHS}
    return subprocess.Popen(
        command,
        cwd=traces,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


def wait_for(process: subprocess.Popen[str], traces: Path, chunks: int) -> None:
    """Return once so many chunks have begun."""
    deadline = time.monotonic() + PATIENCE_S
    while len(attempts(traces)) < chunks:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_driver_takes_its_workers_with_it_and_resumes(traces: Path, workers: int) -> None:
    kills = (3, 8)
    for chunks in kills:
        process = drive(traces, "local", workers)
        wait_for(process, traces, chunks)
        process.kill()
        children = [int(path.name.split("-")[1]) for path in traces.glob("started-*")]
        process.communicate(timeout=PATIENCE_S)  # the workers hold the other end: this returns when they have ended
        assert not any(_runs(pid) for pid in children)
        assert not (traces / "finished").exists()
    process = drive(traces, "local", workers)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, output) == (0, "")
    assert (traces / "finished").exists()
    assert list((traces / ".scratch").iterdir()) == []
    assert CHUNKS < len(attempts(traces)) <= CHUNKS + len(kills) * 2 * workers


@pytest.mark.parametrize(("name", "said"), [("fail-5", "broken value"), ("die-3", "was killed")])
def test_a_failed_stage_prints_one_line(traces: Path, name: str, said: str) -> None:
    (traces / name).write_text("bug")
    process = drive(traces, "local", 2)
    (line,) = process.communicate(timeout=PATIENCE_S)[0].splitlines()
    assert process.returncode == 2
    assert line.startswith("error: toy: ")
    assert said in line


def test_ctrl_c_ends_a_stage_with_one_line(traces: Path) -> None:
    process = drive(traces, "local", 2)
    wait_for(process, traces, 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    (line,) = process.communicate(timeout=PATIENCE_S)[0].splitlines()
    assert process.returncode == 130
    assert line.startswith("error: interrupted")


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_have_the_given_number_of_threads(traces: Path, workers: int) -> None:
    squares(work_of(traces), cluster_of(workers, cpus_per_worker=2))
    assert [path.read_text() for path in traces.glob("started-*")] == ["2"] * workers


def test_a_limit_of_threads_holds_within_its_block_and_in_new_processes() -> None:
    before = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    code = "import l2l_core, torch; print(torch.get_num_threads())"
    for count in (1, 2):
        with limited_threads(count):
            assert (torch.get_num_threads(), thread_count()) == (count, count)
            assert subprocess.check_output([sys.executable, "-c", code], text=True) == f"{count}\n"
    assert (torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")) == before


def test_workers_on_cuda_need_a_gpu_each() -> None:
    for cluster in (cluster_of(2), cluster_of(1, executor="ray")):
        check_gpus(cluster, "cpu")
        with pytest.raises(ConfigError, match=r"cluster\.gpus_per_worker: got 0, expected at least 1"):
            check_gpus(cluster, "cuda")
    check_gpus(cluster_of(1), "cuda")
    check_gpus(cluster_of(2, gpus_per_worker=1), "cuda")


@pytest.mark.parametrize(
    ("listed", "expected"), [("", [""] * 2), ("4,6", ["4", "6"]), (None, ["0", "1"])], ids=["hidden", "listed", "all"]
)
def test_each_worker_sees_only_its_own_visible_gpu(
    monkeypatch: pytest.MonkeyPatch, listed: str | None, expected: list[str]
) -> None:
    seen = []
    for rank in range(2):
        ranks: SimpleQueue[int] = SimpleQueue()
        ranks.put(rank)
        with monkeypatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", listed or "")
            if listed is None:
                patch.delenv("CUDA_VISIBLE_DEVICES")
            begin_worker(ranks, 1)  # type: ignore[arg-type]
            seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
            os.environ.pop("CUDA_VISIBLE_DEVICES")
    assert seen == expected


def test_check_names_a_missing_ray_and_too_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def described(cluster: ClusterParams) -> str:
        return describe_cluster(toy_params().model_copy(update={"cluster": cluster}))

    monkeypatch.setattr("l2l_core.preflight.backends.usable_cores", lambda: 4)
    assert described(cluster_of(4)) == "4 (local), 1 threads each"
    assert described(cluster_of(4, cpus_per_worker=2)).endswith(
        "more than the 4 cores: set cluster.cpus_per_worker (docs/scale.md)"
    )
    monkeypatch.setattr("l2l_core.workers.on_ray.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"cluster\.executor: got 'ray', which is not installed: pip install -e '\.\[ray\]'"
    ):
        described(cluster_of(4, executor="ray"))


@pytest.mark.parametrize(("data_parallel", "is_refused"), [(2, True), ("auto", False)])
def test_check_looks_for_ray_where_query_runs(
    monkeypatch: pytest.MonkeyPatch, data_parallel: int | str, is_refused: bool
) -> None:
    params = toy_params()
    engine = params.priors.engine.model_copy(update={"python": "other/python", "data_parallel": data_parallel})
    changes = {"priors": params.priors.model_copy(update={"engine": engine}), "cluster": cluster_of(2, executor="ray")}
    monkeypatch.setattr("l2l_core.preflight.backends.require_ray", lambda: None)
    monkeypatch.setattr("l2l_core.preflight.backends.has_package", lambda python, package: False)
    refused = pytest.raises(ConfigError, match=r"engine\.python: 'other/python' has no Ray")
    with refused if is_refused else nullcontext():
        describe_cluster(params.model_copy(update=changes))
