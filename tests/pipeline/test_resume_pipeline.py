"""A killed stage resumes at its checkpoint and gives byte-identical results."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bench.tiny_project import TINY, Project, environment, executed

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("pipeline")]

PATIENCE_S = 120
"""Time for a stage to start and write its first checkpoint on a busy machine."""


def kill_after_first_checkpoint(project: Project, target: str, run_name: str) -> Path:
    """Run a stage, kill DVC, the shell and the stage at once by SIGKILL, and return the checkpoint."""
    process = subprocess.Popen(
        ["dvc", "repro", target],
        cwd=project.folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + PATIENCE_S
    try:
        while not (found := list((project.folder / ".scratch").glob(f"{run_name}-*/checkpoint.pt"))):
            assert process.poll() is None, "the stage ended without a checkpoint"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return found[0]


@pytest.mark.parametrize(
    ("stage", "target", "run_name", "outputs"),
    [
        ("warmup", "warmup", "warmup", "data/rounds/0"),
        ("retrain@1", "stages/dvc.yaml:retrain@1", "retrain-1", "data/rounds/1"),
        ("distill", "distill", "distill", "data/distilled"),
    ],
)
def test_killed_training_resumes_to_the_same_bytes(first_run, tmp_path, stage, target, run_name, outputs):
    whole, steps = first_run.project.copy(tmp_path / "whole"), TINY["warmup"]["steps"]
    if stage != "warmup":  # a rule that accepts pseudo-labels gives two streams of pairs
        whole.change_params({"select": {"method": "threshold"}})
        whole.run("dvc", "repro")
        assert pq.read_table(whole.folder / "data/rounds/1/pseudo_labels.parquet")["accepted"].to_numpy().any()
        steps = TINY[stage.partition("@")[0]]["steps"]
    project = whole.copy(tmp_path / "project")
    project.forget(stage)
    project.forget("evaluate")
    model, curves = f"{outputs}/model", f"{outputs}/curves"
    assert not (project.folder / model).exists()

    checkpoint = kill_after_first_checkpoint(project, target, run_name)
    assert checkpoint.exists()
    assert not (project.folder / model).exists()  # the kill came before training ended

    output = project.run("dvc", "repro")
    assert executed(output) == [stage, "evaluate"]  # later stages see the same bytes and do not run
    resumed = [line for line in output.splitlines() if line.startswith(f"{run_name}: resuming at step ")]
    assert len(resumed) == 1
    assert 0 < int(resumed[0].split()[4]) < steps
    assert resumed[0].endswith(f"of {steps}")

    files = [path.relative_to(whole.folder) for path in (whole.folder / outputs).rglob("*") if path.is_file()]
    assert {f"{model}/model.safetensors"} <= {path.as_posix() for path in files}
    assert any(path.is_relative_to(curves) for path in files)
    for path in [*map(str, files), "metrics/evaluate.json"]:
        assert project.read(path) == whole.read(path), path
    assert list((project.folder / ".scratch").glob("*/checkpoint.pt")) == []


def test_killed_crossfit_keeps_finished_teachers(first_run, tmp_path):
    """After a kill during the second teacher, the first is not retrained and the second resumes."""
    target = "stages/dvc.yaml:crossfit-0"
    whole = first_run.project.copy(tmp_path / "whole")
    whole.change_params({"select": {"fold_steps": 40}})
    whole.run("dvc", "repro", target)
    project = whole.copy(tmp_path / "project")
    project.forget("crossfit-0")

    kill_after_first_checkpoint(project, target, "crossfit-0-1")
    assert not (project.folder / "data/rounds/0/folds").exists()

    output = project.run("dvc", "repro", target)
    assert "crossfit-0-0: done before" in output
    assert "crossfit-0-0: resuming" not in output
    assert "crossfit-0-1: resuming at step " in output
    files = [path.relative_to(whole.folder) for path in (whole.folder / "data/rounds/0/folds").rglob("*.safetensors")]
    assert len(files) == 2
    for path in map(str, files):
        assert project.read(path) == whole.read(path), path
    assert list((project.folder / ".scratch").iterdir()) == []
