"""Trainings in parallel processes: errors, environment, and termination."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr

import psutil
import pytest
import torch
import yaml
from synthetic_run import write_run
from toy_pairs import PARAMS_FILE, TRAIN, toy_pairs, toy_params

from l2l_core.artifacts import records
from l2l_core.core.files import CODE_ROOT
from l2l_core.data.pairs import SIDE_BY_SIDE_VARIABLE, BatchMaker
from l2l_core.errors import L2LError, exit_code
from l2l_core.model.segmenter import Segmenter
from l2l_core.preflight.memory import peak_of
from l2l_core.training import loop, side_by_side
from l2l_core.training.loop import train
from l2l_core.training.side_by_side import ParallelPlan, Training, plan_parallel, run_side_by_side
from l2l_core.training.streams import Stream

PATIENCE_S = 60
GIB = 1 << 30
IMAGES = 100


def params(*, side_by_side: bool = True, device: str = "cpu"):
    engine = TRAIN.engine.model_copy(update={"side_by_side": side_by_side, "device": device})
    return toy_params(train={"engine": engine})


@pytest.fixture
def machine(monkeypatch):
    """Return a function that sets threads, free memory, and GPUs."""

    def make(threads: int, free: int = 64 * GIB, gpus: int = 0) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(side_by_side, "available_bytes", lambda: free)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("WORLD_SIZE", raising=False)

    return make


def test_parallel_trainings_share_the_threads(machine):
    machine(2)
    assert plan_parallel(params(), 2, IMAGES) == ParallelPlan(2, 1)
    machine(9)
    assert plan_parallel(params(), 2, IMAGES) == ParallelPlan(2, 4)
    machine(2)
    assert plan_parallel(params(), 5, IMAGES) == ParallelPlan(2, 1)


def test_trains_sequentially_with_one_thread(machine):
    machine(1)
    assert plan_parallel(params(), 2, IMAGES) == ParallelPlan(1, 1)


def test_thread_count_does_not_depend_on_running_in_parallel(machine):
    """Otherwise the resulting bytes would depend on the free memory."""
    machine(4)
    wanted = plan_parallel(params(), 2, IMAGES)
    machine(4, free=1)
    short = plan_parallel(params(), 2, IMAGES)
    machine(4)
    unwanted = plan_parallel(params(side_by_side=False), 2, IMAGES)
    assert (wanted.at_once, short.at_once, unwanted.at_once) == (2, 1, 1)
    assert wanted.threads == short.threads == unwanted.threads == 2


def test_assigns_one_gpu_to_each_training(machine, monkeypatch):
    machine(8, gpus=4)
    assert plan_parallel(params(device="auto"), 2, IMAGES) == ParallelPlan(2, 4, ("0", "1"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert plan_parallel(params(device="auto"), 3, IMAGES) == ParallelPlan(2, 4, ("5", "7"))
    machine(8, gpus=1)
    assert plan_parallel(params(device="auto"), 2, IMAGES) == ParallelPlan(1, 8)


def test_trains_sequentially_in_a_multi_process_launch(machine, monkeypatch):
    machine(8, gpus=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert plan_parallel(params(device="auto"), 2, IMAGES) == ParallelPlan(1, 8)


@pytest.mark.parametrize(("share", "expected"), [(3, [3]), (None, [])])
def test_a_launched_process_uses_its_share_of_the_cores(monkeypatch, share, expected):
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(loop, "share_of_launched", lambda: share)
    loop.use_share_of_cores()
    assert found == expected


def test_large_networks_train_in_parallel_only_if_memory_holds_both(machine):
    """For a network like Swin-B with BERT-base, weights, gradients, moments, and teacher take 5 x 0.8 GB."""
    large = params()
    model = large.model.model_copy(update={"image_encoder": "swin", "text_encoder": "bert", "image_size_px": 224})
    large = large.model_copy(update={"model": model})
    machine(2, free=8 * GIB)
    assert plan_parallel(large, 2, IMAGES).at_once == 1
    assert plan_parallel(params(), 2, IMAGES).at_once == 2
    machine(2, free=16 * GIB)
    assert plan_parallel(large, 2, IMAGES).at_once == 2


def test_memory_estimate_depends_on_the_size_of_the_encoders():
    """A step of the preset `small` (16 images of 256 px) was measured at 3.0 GB with weights and moments."""
    large = toy_params(train={"batch_size": 16})
    sizes = []
    for image, text in (
        ("tiny", "tiny"),
        ("efficientnet-lite0", "minilm"),
        ("efficientnet-lite0", "bert-base-uncased"),
    ):
        encoders = {"image_encoder": image, "text_encoder": text, "image_size_px": 256}
        settings = large.model_copy(update={"model": large.model.model_copy(update=encoders)})
        sizes.append(side_by_side.training_bytes(settings, 0, 1) - side_by_side.PROCESS_BYTES)
    assert 0 < sizes[0] < 3.0e9 < sizes[1] < 6.5e9 < sizes[2]


def test_memory_estimate_covers_the_actual_use(tmp_path):
    """The comparison excludes the process itself, which already runs."""
    size, batch = 96, 8
    pairs, targets = toy_pairs(tmp_path, batch)
    settings = toy_params(train={"batch_size": batch})
    wide = settings.model.model_copy(update={"image_size_px": size, "dim": 64, "heads": 4})
    settings = settings.model_copy(update={"model": wide})
    network = Segmenter.create(wide, pairs.sentence, 0)
    with peak_of() as peak:
        train(network, [Stream(BatchMaker(pairs, size, 0.1), targets, 1.0)], 2, settings.train, seed=0, run_name="test")
    assert 0 < peak.ram_bytes < side_by_side.training_bytes(settings, batch, 2) - side_by_side.PROCESS_BYTES


def test_memory_estimate_includes_a_shared_image_cache():
    small, image = params(), 3 * params().model.image_size_px ** 2
    without = side_by_side.training_bytes(small, 0, 1)
    assert side_by_side.training_bytes(small, 100, 1) - without == 100 * image
    assert side_by_side.training_bytes(small, 10**9, 1) - without == 2 * GIB
    assert side_by_side.training_bytes(small, 10**9, 4) - without == GIB / 2


def test_trains_in_parallel_only_if_memory_holds_the_decoded_images(machine):
    """Two processes take 0.8 GB each. One or two trainings together cache 2 GiB of images."""
    machine(2, free=3 * GIB)
    assert plan_parallel(params(), 2, IMAGES).at_once == 2
    assert plan_parallel(params(), 2, 10**9).at_once == 1
    machine(2, free=4 * GIB)
    assert plan_parallel(params(), 2, 10**9).at_once == 2


def code(text: str) -> list[str]:
    return ["-c", text]


def test_commands_get_their_threads_and_gpus(tmp_path):
    text = """if True:
        import os, pathlib, sys
        pathlib.Path(sys.argv[1]).write_text(os.environ['OMP_NUM_THREADS'] + os.environ['CUDA_VISIBLE_DEVICES'])
    """
    run_side_by_side({name: [*code(text), str(tmp_path / name)] for name in "ab"}, ParallelPlan(2, 3, ("5", "7")))
    assert {(tmp_path / name).read_text() for name in "ab"} == {"35", "37"}


def test_commands_know_how_many_run_at_once(tmp_path):
    text = f"import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.environ['{SIDE_BY_SIDE_VARIABLE}'])"
    run_side_by_side({name: [*code(text), str(tmp_path / name)] for name in "abc"}, ParallelPlan(2, 1))
    assert {(tmp_path / name).read_text() for name in "abc"} == {"2"}


def test_more_commands_than_places_run_one_after_another(tmp_path):
    text = """if True:
        import pathlib, sys, time
        now = pathlib.Path(sys.argv[1]) / "now"
        now.mkdir()  # fails where another one is at work
        time.sleep(0.2)
        now.rmdir()
    """
    run_side_by_side({str(number): [*code(text), str(tmp_path)] for number in range(3)}, ParallelPlan(1, 1))


def test_forwards_progress_and_raises_an_error_once(capsys):
    failing = r"import sys; sys.stderr.write('a: 1 of 2\nerror: 2 problems:\n  x\n  y\n'); sys.exit(2)"
    with pytest.raises(L2LError) as caught:
        run_side_by_side({"a": code(failing), "b": code(failing)}, ParallelPlan(2, 1))
    assert str(caught.value) == "2 problems:\n  x\n  y"
    shown = capsys.readouterr().err
    assert "a: 1 of 2\n" in shown
    assert "error:" not in shown


def test_an_error_line_of_a_successful_command_is_no_failure(capsys):
    """All its text is shown, whether more lines follow later or never."""
    writes = "import sys, time\nfor text in {}:\n    sys.stderr.write(text); sys.stderr.flush(); time.sleep(0.3)"
    parts = ["error: no plugin\n", "a: 1 of 2\n", "a: 2 of 2\nerror: no cache\n  of fonts"]
    run_side_by_side({"a": code(writes.format(parts))}, ParallelPlan(1, 1))
    assert capsys.readouterr().err == "".join(parts)


def test_shows_text_after_an_error_line_while_the_command_runs(tmp_path):
    """The command waits until its text is shown."""
    shown = tmp_path / "shown"
    waits = f"""if True:
        import pathlib, sys, time
        sys.stderr.write("error: no plugin\\n"); sys.stderr.flush()
        time.sleep(0.3)
        sys.stderr.write("a: 1 of 2\\n"); sys.stderr.flush()
        deadline = time.monotonic() + {PATIENCE_S}
        while "1 of 2" not in pathlib.Path({str(shown)!r}).read_text():
            if time.monotonic() > deadline: sys.exit(1)
            time.sleep(0.01)
    """
    with shown.open("w") as file, redirect_stderr(file):
        run_side_by_side({"a": code(waits)}, ParallelPlan(1, 1))


@pytest.mark.parametrize("before", ["", "a: 1 of 2\n", "Loading: 50%\r", "error: no plugin\n"])
def test_raises_the_message_of_exit_code_2_and_shows_earlier_text(capsys, before):
    failing = f"import sys; sys.stderr.write({before + 'error: real'!r}); sys.exit(2)"
    with pytest.raises(L2LError, match=r"\Areal\Z"):
        run_side_by_side({"a": code(failing)}, ParallelPlan(1, 1))
    assert capsys.readouterr().err == before


def test_shows_all_text_of_other_failures(capsys):
    failing = "import sys; sys.stderr.write('error: no plugin\\n' + 'x' * 3_000_000 + '\\nTraceback'); sys.exit(1)"
    with pytest.raises(L2LError, match="a: ended with exit code 1, see above"):
        run_side_by_side({"a": code(failing)}, ParallelPlan(1, 1))
    assert capsys.readouterr().err == "error: no plugin\n" + "x" * 3_000_000 + "\nTraceback"


def test_error_code_equals_the_exit_code_of_the_command_line():
    def fail() -> None:
        raise L2LError("x")

    assert exit_code(fail) == side_by_side.ERROR_CODE


def test_names_a_killed_command():
    with pytest.raises(
        L2LError, match=r"b: ended by signal 9; if memory was short, set train.engine.side_by_side to false"
    ):
        run_side_by_side({"b": code("import os; os.kill(os.getpid(), 9)")}, ParallelPlan(1, 1))


def test_a_failure_terminates_the_other_commands(tmp_path):
    pid = tmp_path / "pid"
    slow = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(600)"
    fails = f"import pathlib\nwhile not (p := pathlib.Path({str(pid)!r})).exists() or not p.read_text(): pass\nexit(3)"
    with pytest.raises(L2LError, match="fails: ended with exit code 3"):
        run_side_by_side({"slow": code(slow), "fails": code(fails)}, ParallelPlan(2, 1))
    assert not psutil.pid_exists(int(pid.read_text()))


PARENT = '''
from l2l_core.training.side_by_side import ParallelPlan, run_side_by_side
child = """if True:
    import os, time
    from l2l_core.training.side_by_side import end_with_parent
    end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(600)
"""
run_side_by_side({"a": ["-c", child], "b": ["-c", child]}, ParallelPlan(2, 1))
'''


def test_a_killed_parent_leaves_no_child():
    environment = os.environ | {"PYTHONPATH": str(CODE_ROOT)}
    with subprocess.Popen([sys.executable, "-c", PARENT], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        children = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + PATIENCE_S
        while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def stage(folder, *command: str, threads: int, side_by_side: bool):
    """Start a training stage as its own command and return the running process."""
    project = yaml.safe_load(PARAMS_FILE.read_text())
    project["model"] |= {"image_size_px": 32, "dim": 16, "heads": 2, "guidance_tokens": 2}
    project["proposals"]["size_px"] = 24
    project["train"] |= {"batch_size": 2, "precision": "fp32"}
    project["train"]["engine"] |= {"device": "cpu", "side_by_side": side_by_side, "checkpoint_every": 1}
    project["select"]["fold_steps"] = project["warmup"]["steps"] = 8
    (folder / "params.yaml").write_text(yaml.safe_dump(project))
    environment = {name: value for name, value in os.environ.items() if name != "DVC_ROOT"}
    environment |= {"PYTHONPATH": str(CODE_ROOT), "OMP_NUM_THREADS": str(threads)}
    full = [sys.executable, "-m", *command]
    return subprocess.Popen(full, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


def labeled_run(folder):
    """Write a synthetic run in which two images have one labeled sentence each."""
    folder.mkdir()
    write_run(folder, rounds=0, images_per_split=4)
    split = folder / records.SPLIT_PATH
    rows = records.read_table(split, records.SPLIT).to_pylist()
    for row in rows:
        row["role"] = "labeled" if row["sent_id"] in (0, 2) else "unlabeled"
    records.write_table(records.make_table(rows, records.SPLIT), split, records.SPLIT)
    masks = records.read_table(folder / records.INDEX.masks, records.MASKS)
    records.write_table(masks, folder / records.LABELED_MASKS_PATH, records.MASKS)
    return folder


def written(folder) -> dict[str, bytes]:
    roots = (folder / "data/rounds", folder / records.SUPERVISED_FOLDER)
    files = [path for root in roots for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


TRAINING_STAGES = {
    ("stages.crossfit", "--round", "0"): {
        "crossfit-0-0": "data/rounds/0/folds/0",
        "crossfit-0-1": "data/rounds/0/folds/1",
    },
    ("stages.warmup",): {"supervised": "data/supervised/model", "warmup": "data/rounds/0/model"},
}
"""Commands, and the folders in which their independent trainings write the weights."""


@pytest.mark.parametrize(("command", "trainings"), TRAINING_STAGES.items())
def test_parallel_and_resumed_trainings_write_the_same_bytes_as_sequential_ones(tmp_path, command, trainings):
    """Each training has one of two threads. The parallel trainings are killed with their parent and then resumed."""
    folder = labeled_run(tmp_path / "run")
    for output in ("data/rounds", "data/supervised"):
        shutil.rmtree(folder / output, ignore_errors=True)
    with stage(folder, *command, threads=2, side_by_side=False) as in_turn:
        assert in_turn.wait() == 0
    expected = written(folder)
    assert {f"{place}/model.safetensors" for place in trainings.values()} <= expected.keys()
    for output in ("data/rounds", "data/supervised"):
        shutil.rmtree(folder / output, ignore_errors=True)

    with stage(folder, *command, threads=2, side_by_side=True) as killed:
        while not all(list(folder.glob(f".scratch/{name}-*/checkpoint.pt")) for name in trainings):
            assert killed.poll() is None
            time.sleep(0.005)
        children = psutil.Process(killed.pid).children()
        assert len(children) == 2
        killed.kill()
    psutil.wait_procs(children, PATIENCE_S)
    assert not written(folder)

    with stage(folder, *command, threads=2, side_by_side=True) as resumed:
        output = resumed.stdout.read()
    assert resumed.returncode == 0
    assert "resuming at step" in output
    assert written(folder) == expected
    assert list((folder / ".scratch").iterdir()) == []


def test_does_not_retrain_a_finished_baseline_after_a_kill(tmp_path):
    folder = labeled_run(tmp_path / "run")
    with stage(folder, "stages.warmup", threads=1, side_by_side=False) as killed:  # sequential, baseline first
        while not list(folder.glob(".scratch/warmup-*/checkpoint.pt")):
            assert killed.poll() is None
            time.sleep(0.005)
        killed.kill()
    with stage(folder, "stages.warmup", threads=1, side_by_side=False) as resumed:
        output = resumed.stdout.read()
    assert resumed.returncode == 0
    assert "supervised: done before" in output
    assert "warmup: resuming at step" in output


def test_trains_a_torn_finished_network_anew(tmp_path, monkeypatch, machine, capsys):
    """A finished model in the scratch folder whose weights are not as they were written must not become an output."""
    machine(1)
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, rounds=0, images_per_split=1)
    trained: list[str] = []

    def training(name: str, digest: str) -> Training:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_text(json.dumps({"sha256": digest}))
        return Training(folder, lambda: trained.append(name), [])

    whole, torn = hashlib.sha256(b"weights").hexdigest(), hashlib.sha256(b"other").hexdigest()
    side_by_side.train_all(params(), {"one": training("one", whole), "two": training("two", torn)}, records.INDEX)
    assert trained == ["two"]
    assert not (tmp_path / "two").exists()
    captured = capsys.readouterr()
    assert captured.err == f"note: {tmp_path / 'two'}: torn or changed, removed; training anew\n"
    assert captured.out == "one: done before\n"
