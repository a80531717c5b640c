"""A training stage on two processes, launched through DVC as on two GPUs."""

from __future__ import annotations

import subprocess

import pytest

from bench.tiny_project import environment
from l2l_core.model.segmenter import Segmenter

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("pipeline")]


def test_stage_on_two_processes_writes_the_same_files_as_on_one(first_run, tmp_path):
    """The files are the same, the weights differ (batch norm sees half a batch), and DVC sees an up-to-date stage."""
    project = first_run.project.copy(tmp_path / "project")
    before = project.read("data/rounds/0/model/model.safetensors")
    files = sorted(str(path.relative_to(project.folder)) for path in (project.folder / "data/rounds/0").rglob("*"))
    done = subprocess.run(
        ["dvc", "repro", "--single-item", "--force", "warmup"],
        cwd=project.folder,
        env=environment() | {"L2L_LAUNCH": "torchrun --standalone --nproc-per-node=2"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert files == sorted(
        str(path.relative_to(project.folder)) for path in (project.folder / "data/rounds/0").rglob("*")
    )
    assert project.read("data/rounds/0/model/model.safetensors") != before
    Segmenter.load(project.folder / "data/rounds/0/model")
    assert not list((project.folder / ".scratch").glob("warmup*"))
    assert "up to date" in project.run("dvc", "status", "warmup")
