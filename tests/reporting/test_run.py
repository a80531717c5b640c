"""`dvc repro` with progress: the line before each stage, and DVC's output and exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from synthetic_run import write_run

from l2l_core.config import load_params
from l2l_core.errors import InputError
from l2l_core.preflight.estimate import stage_names
from l2l_core.reporting.run import Progress, planned_stages, reference_seconds, reproduce, seconds_left

ROOT = Path(__file__).parents[2]
STAGES = ["query", "warmup", "retrain@1", "select@1", "report"]
EXPECTED = {"query": 10.0, "warmup": 100.0, "retrain@1": 200.0, "select@1": 50.0, "report": 5.0}


def said(lines: list[tuple[float, str]], expected: dict[str, float | None]) -> list[str | None]:
    """Progress printed before lines that arrive at given seconds."""
    now = 0.0
    progress = Progress(STAGES, lambda: expected, lambda: now)
    found = []
    for now, line in lines:  # noqa: B007 (the clock reads it)
        found.append(progress.before(f"{line}\n".encode()))
    return found


def test_stage_count_includes_skipped_and_cached_stages() -> None:
    lines = [
        (0, "Stage 'query' didn't change, skipping"),
        (0, "Stage 'warmup' is cached - skipping run, checking out outputs"),
        (1, "Running stage 'stages/dvc.yaml:retrain@1':"),
        (1, "> python -m stages.retrain --round 1"),
        (9, "Running stage 'stages/dvc.yaml:select@1':"),
    ]
    assert said(lines, {}) == [None, None, "[2/5 stages] retrain@1", None, "[3/5 stages] select@1"]


def test_scales_the_time_left_by_finished_stages() -> None:
    """`query` takes twice its estimate, so all others do; then training takes half, and the others 70 / 110."""
    lines = [
        (0, "Running stage 'query':"),
        (20, "Running stage 'warmup':"),
        (70, "Running stage 'stages/dvc.yaml:retrain@1':"),
    ]
    # 2 x (100 + 200 + 50 + 5) = 710 s; 200 / 2 + 55 x 70 / 110 = 135 s.
    assert said(lines, EXPECTED) == [
        "[0/5 stages] query",
        "[1/5 stages, about 12 min left] warmup",
        "[2/5 stages, about 2 min left] retrain@1",
    ]


def test_shows_no_time_while_a_stage_without_an_estimate_remains() -> None:
    unknown = EXPECTED | {"report": None}
    assert seconds_left(["select@1", "report"], unknown, {"warmup": 100.0}) is None
    assert seconds_left(["select@1"], unknown, {"warmup": 200.0}) == 100.0
    assert seconds_left(["unheard-of"], unknown, {"warmup": 100.0}) is None
    assert seconds_left(["select@1"], EXPECTED, {"report": 5.0}) is None  # says nothing about the device


def test_the_distilled_model_counts_as_a_training_and_a_prediction() -> None:
    """Trainings take twice their estimate, predictions three times."""
    expected = {"warmup": 100.0, "predict": 10.0, "distill": 50.0, "predict-distilled": 5.0}
    took = {"warmup": 200.0, "predict": 30.0}
    assert seconds_left(["distill", "predict-distilled"], expected, took) == 100.0 + 15.0


def test_shows_short_remaining_times_as_less_than_a_minute() -> None:
    lines = [(0, "Running stage 'warmup':"), (10, "Running stage 'report':")]
    assert said(lines, {"warmup": 100.0, "query": 1.0, "retrain@1": 1.0, "select@1": 1.0, "report": 5.0})[1] == (
        "[1/5 stages, less than a minute left] report"
    )


def test_plans_the_stages_that_check_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    params = load_params()
    found = planned_stages([])
    assert sorted(found) == sorted(stage_names(params, draws_refshapes=params.uses_builtin_dataset))
    order = ["ingest", "split", "warmup", "select@1", "evaluate", "report"]
    assert [name for name in found if name in order] == order
    assert planned_stages(["split"]) == [name for name in found if name in ("refshapes", "ingest", "split")]
    assert planned_stages(["-s", "split"]) == ["split"]
    assert planned_stages(["nothing-of-that-name"]) == []


def test_every_stage_except_refshapes_has_an_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert reference_seconds() == {}
    shutil.copy(ROOT / "params.yaml", tmp_path)
    assert reference_seconds() == {}
    write_run(tmp_path, rounds=2)
    params = load_params()
    names = set(stage_names(params, draws_refshapes=params.uses_builtin_dataset)) - {"refshapes"}
    assert {name for name, seconds in reference_seconds().items() if seconds} == names


def dvc_project(folder: Path, stages: dict[str, object]) -> Path:
    (folder / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=folder, check=True)
    return folder


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `l2l_core run` in a new process session, without `dvc` on PATH."""
    return subprocess.Popen(
        [sys.executable, "-m", "l2l_core", "run", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": os.defpath},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.mark.pipeline
def test_passes_through_output_and_exit_code_of_dvc(tmp_path: Path) -> None:
    stages = {
        "one": {"cmd": "echo first && touch one", "outs": ["one"]},
        "two": {"cmd": "echo second && exit 3", "deps": ["one"]},
    }
    process = start(dvc_project(tmp_path, stages))
    out, err = process.communicate()
    lines = out.splitlines()
    begin = lines.index("[0/2 stages] one")
    assert lines[begin + 1 : begin + 4] == ["Running stage 'one':", "> echo first && touch one", "first"]
    assert lines[lines.index("[1/2 stages] two") + 1] == "Running stage 'two':"
    assert "failed to reproduce 'two'" in err
    assert process.returncode == 255
    again = start(tmp_path, "one")
    out, _ = again.communicate()
    assert "Stage 'one' didn't change, skipping" in out
    assert "[" not in out
    assert again.returncode == 0


@pytest.mark.pipeline
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_dvc_and_the_stage_processes(tmp_path: Path, number: signal.Signals) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as nohup and background jobs do, and so by the command")
    stages = {"long": {"cmd": "sh -c 'echo $$ > pid && exec sleep 600'; true", "outs": ["never"]}}
    process = start(dvc_project(tmp_path, stages))
    assert process.stdout is not None
    assert any(line == "[0/1 stages] long\n" for line in process.stdout)
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    try:
        process.communicate(timeout=60)  # until no process holds stderr open, which the stage inherits
    except subprocess.TimeoutExpired:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        raise
    assert process.returncode not in (0, None)
    assert not (tmp_path / "never").exists()


@pytest.mark.pipeline
def test_does_not_count_tracked_data_as_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = dvc_project(tmp_path, {"one": {"cmd": "cp mine one", "deps": ["mine"], "outs": ["one"]}})
    (folder / "mine").write_text("data")
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "mine"], cwd=folder, check=True)
    monkeypatch.chdir(folder)
    assert planned_stages([]) == ["one"]
    assert planned_stages(["-P"]) == ["one"]
    assert planned_stages(["mine.dvc"]) == []


@pytest.mark.pipeline
def test_invalid_option_prints_dvc_usage_once(tmp_path: Path) -> None:
    process = start(dvc_project(tmp_path, {}), "--no-such-option")
    out, err = process.communicate()
    assert (out + err).count("usage: dvc repro") == 1
    assert (out + err).count("unrecognized arguments: --no-such-option") == 1
    assert process.returncode == 254


@pytest.mark.parametrize("option", ["-h", "--no-such-option", "--fo"])
def test_options_handled_by_dvc_plan_no_stages_and_print_nothing(
    option: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert planned_stages([option]) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("option", ["-i", "--interactive", "--inter", "-fi"])
def test_refuses_interactive_in_one_line(option: str) -> None:
    with pytest.raises(InputError, match=r"\Arun: --interactive: .+\Z"):
        reproduce([option])
