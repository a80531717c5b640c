"""A short part of each campaign on the tiny project."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench import concurrent, disk_full, kills

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("pipeline")]


def test_a_killed_run_continues_to_the_same_bytes(first_run, tmp_path):
    for stage in ("split", "evaluate"):
        trial = kills.try_once(first_run.project, tmp_path / stage, stage, random.Random(0))
        assert not trial.failed, trial
        assert not trial.has_traceback, trial


def test_a_kill_fails_only_if_the_output_bytes_differ(first_run, tmp_path):
    expected = first_run.project.digests()
    project = first_run.project.copy(tmp_path / "project")
    assert project.different(expected) == []
    (project.folder / "metrics/evaluate.json").write_text("{}")
    (project.folder / "data/new").write_text("")
    assert project.different(expected) == ["data/new", "metrics/evaluate.json"]
    assert project.different(expected, ("data/",)) == ["metrics/evaluate.json"]


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root of a Linux system mounts a file system"
)
def test_a_full_disk_prints_one_line_and_keeps_the_outputs(first_run):
    try:
        row = disk_full.campaign(first_run.project, ["split", "priors"], 1, seed=0)
    except subprocess.CalledProcessError:
        pytest.skip("this machine mounts no file system")
    assert row["count"] == 2
    assert row["failures"] == 0, row


@pytest.mark.parametrize("pair", ["repro x repro", "repro x scores", "predict x predict"])
def test_two_commands_at_once_mix_nothing(first_run, pair):
    trial = concurrent.try_once(first_run.project, pair, random.Random(0))
    assert trial.problems == []


def test_pictures_and_their_index_belong_together(tmp_path: Path):
    (tmp_path / "predictions.jsonl").write_text('{"mask": "a.mask.png", "overlay": "a.overlay.png"}\n')
    for name in ("a.mask.png", "b.mask.png"):
        (tmp_path / name).touch()
    assert concurrent._orphans(tmp_path) == ["a.overlay.png", "b.mask.png"]
