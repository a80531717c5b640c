"""Data workers compute the batches of the training process, byte for byte, and never outlive it."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from toy_pairs import TRAIN, toy_batches, toy_network, toy_pairs
from toy_streams import streams_of, with_

from l2l_core.data.pairs import SIDE_BY_SIDE_VARIABLE, Pairs, Targets
from l2l_core.errors import InputError, L2LError
from l2l_core.training import workers
from l2l_core.training.loop import train
from l2l_core.training.streams import OnlineStream, Stream
from l2l_core.training.workers import StepBatches, batches_of_steps, worker_count

STEPS = 6
ROOT = Path(__file__).parents[2]


def made_of(toy: tuple[Pairs, Targets], **changes: object) -> StepBatches:
    """Two streams with swapped priors, and two parts per step, of one process."""
    streams = [replace(stream, prior_swap=0.5) for stream in streams_of(toy, 0.25, 0.75)]
    params = with_(batch_size=8, **changes)
    return StepBatches(streams, params, 3, [np.arange(0, 8, 2), np.arange(1, 8, 2)], lambda batch: batch.proposal)


def with_workers(count: int) -> dict[str, object]:
    return {"engine": TRAIN.engine.model_copy(update={"workers": count, "checkpoint_every": 2})}


@pytest.mark.parametrize("count", [1, 2])
def test_workers_give_the_batches_of_the_training_process(toy, count):
    """In order, from any first step, whatever number of threads the training process has."""
    made, threads = made_of(toy), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = [made.batches(step) for step in range(5, 5 + STEPS)]
        found = list(batches_of_steps(made, range(5, 5 + STEPS), count))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == STEPS
    for parts, others in zip(found, expected, strict=True):
        for batch, other in zip(parts, others, strict=True):
            for name, value in vars(other).items():
                got = getattr(batch, name)
                assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value, name


def test_workers_are_other_processes(toy, monkeypatch):
    monkeypatch.setattr(workers, "strong_view", lambda batch, seeds, flip: replace(batch, sentence=[str(os.getpid())]))
    found = batches_of_steps(made_of(toy), range(4), 2)
    pids = [batch.sentence[0] for parts in found for batch in parts]
    assert len(set(pids)) == 2
    assert str(os.getpid()) not in pids


def test_any_number_of_workers_trains_and_resumes_to_the_same_bytes(toy, tmp_path):
    """A training that is killed with one number of workers and resumed with another one ends with the same weights."""

    class Killed(Exception):
        pass

    def weights(count: int, checkpoint: Path | None = None, kill_at: int | None = None) -> bytes:
        def log(row: dict[str, float]) -> None:
            if row["step"] == kill_at:
                raise Killed

        AcceleratorState._reset_state(True)
        trained = train(
            toy_network(toy[0]),
            streams_of(toy, 0.25, 0.75),
            STEPS,
            with_().model_copy(update=with_workers(count)),
            seed=3,
            run_name="test",
            checkpoint=checkpoint,
            log=log,
        )
        trained.teacher.save(tmp_path / "model")
        return (tmp_path / "model" / "model.safetensors").read_bytes()

    whole = weights(0)
    assert weights(1) == whole
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        weights(2, checkpoint, kill_at=3)
    assert checkpoint.exists()
    with pytest.raises(Killed):
        weights(0, checkpoint, kill_at=5)
    assert weights(2, checkpoint) == whole


def test_an_error_in_a_worker_is_the_one_line_of_the_training_process(toy):
    Path(toy[0].image_path[2]).unlink()
    messages = []
    for count in (0, 1):
        with pytest.raises(InputError) as raised:
            list(batches_of_steps(made_of(toy), range(STEPS), count))
        messages.append(str(raised.value))
    assert messages[0] == messages[1] == f"{toy[0].image_path[2]}: image not found"


def test_a_killed_worker_is_one_line(toy, monkeypatch):
    monkeypatch.setattr(workers, "draw", lambda *given, **named: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(L2LError, match=r"^a data worker ended: .*; if memory .* set train\.engine\.workers to 0$"):
        list(batches_of_steps(made_of(toy), range(2), 1))


def test_an_abandoned_training_ends_its_workers_and_its_threads_stay(toy):
    import cv2

    others, opencv, left_open = set(children()), cv2.getNumThreads(), []
    for _ in range(3):  # what the first one opens for the whole process stays
        batches = batches_of_steps(made_of(toy), range(100), 2)
        next(batches)
        assert len(set(children()) - others) >= 2
        batches.close()
        del batches
        gc.collect()
        assert not set(children()) - others
        left_open.append(open_files())
    assert left_open[2] <= left_open[0]
    assert cv2.getNumThreads() == opencv


def test_a_killed_training_process_leaves_no_worker(tmp_path):
    """Otherwise its workers would hold the lock of its scratch folder."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    with subprocess.Popen(
        [sys.executable, __file__, tmp_path], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2
        process.kill()
    # PyTorch's own check of the parent runs every 5 s.
    deadline = time.monotonic() + 4
    while left := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


GPU, CPU = torch.device("cuda"), torch.device("cpu")
Usage = namedtuple("Usage", "free")  # as of shutil.disk_usage


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a function that sets the cores and the shared memory in bytes of this machine."""

    def set_to(cores: int, free: int = 1 << 40) -> str:
        monkeypatch.setattr(workers, "usable_cores", lambda: cores)
        monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: Usage(free))
        return str(tmp_path)

    return set_to


def test_a_gpu_gets_a_worker_for_each_core_but_one(toy, machine, monkeypatch):
    streams = streams_of(toy)
    counts = [worker_count("auto", streams, 4, GPU, machine(cores)) for cores in (1, 2, 4, 64)]
    assert counts == [0, 1, 3, workers.MOST_WORKERS]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv(SIDE_BY_SIDE_VARIABLE, "2")
    assert worker_count("auto", streams, 4, GPU, machine(16)) == 3


def test_a_small_shared_memory_limits_the_workers(toy, machine):
    """A toy sample has 32 x 32 pixels of 3 + 4 + 4 bytes and 16 x 16 of 4: 12,288 bytes. Three batches per worker."""
    assert worker_count("auto", streams_of(toy), 4, GPU, machine(16, free=2 * 3 * 4 * 12_288)) == 2
    assert worker_count("auto", streams_of(toy), 4, GPU, machine(16, free=3 * 4 * 12_288 - 1)) == 0


def test_a_sample_has_the_estimated_bytes(toy):
    (stream,) = streams_of(toy)
    batch = stream.batches(np.arange(4), stream.targets)
    maps = [batch.image, batch.label, batch.keep, batch.proposal]
    assert sum(one.nbytes for one in maps) == 4 * workers.sample_bytes(stream)


def test_a_cpu_has_workers_only_on_request_and_online_labels_never(toy, machine):
    streams = streams_of(toy)
    assert worker_count("auto", streams, 4, CPU, machine(16)) == 0
    assert worker_count(3, streams, 4, CPU, machine(1)) == 3
    online = [streams[0], OnlineStream(toy_batches(toy[0]), 0.7, 0.5)]
    assert [worker_count(setting, online, 4, GPU, machine(16)) for setting in ("auto", 3)] == [0, 0]


def children() -> list[int]:
    return [
        int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split() if is_running(int(pid))
    ]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


if __name__ == "__main__":  # the process that test_a_killed_training_process_leaves_no_worker kills
    pairs, targets = toy_pairs(Path(sys.argv[1]) / "images", 5)
    started = StepBatches(
        [Stream(toy_batches(pairs), targets, 1.0)], TRAIN, 0, [np.arange(4)], lambda batch: batch.proposal
    )
    running = batches_of_steps(started, range(1000), 2)
    next(running)
    print(*children(), flush=True)
    time.sleep(60)
