"""Runs the commands of README.md's "Your own pairs" on the example dataset, through every stage."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from bench.tiny_project import ROOT, executed, make_project

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("own_pairs")]

SMALLER = {
    "model": {"image_size_px": 64, "dim": 16},
    "train": {"batch_size": 4, "log_every": 2, "engine": {"device": "cpu"}},
    "select": {"method": "all", "fold_update_steps": 2},  # in so few steps `reinforce` learns to reject every label
    "evaluate": {"batch_size": 8},
    "report": {"cases": 2},
}


def commands(start: str) -> list[list[str]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(rf"^    ({re.escape(start)} .*examples/.*)$", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_example_passes_the_check_and_runs_every_stage(tmp_path):
    project = make_project(tmp_path / "project", SMALLER)
    (check,), (run,) = commands("l2l check"), commands("dvc exp run")
    said = project.run(*check, "--no-timing")
    assert "12 images, 27 sentences (train 20, val 7), 16 masks" in said
    planned = {line.split()[0] for line in said.splitlines() if re.match(r"[a-z-]+(0|@1)? .* (-|kB|MB)$", line)}
    changes = ["-S", "warmup.steps=4", "-S", "retrain.steps=4", "-S", "distill.steps=4"]
    output = project.run(*run, *changes, "-S", "select.fold_steps=2")
    ran = set(executed(output))
    assert ran == planned - {"together"}
    assert {"ingest", "query", "warmup", "crossfit-0", "select@1", "retrain@1", "evaluate", "report"} <= ran
    assert "refshapes" not in ran
    metrics = json.loads(project.read("metrics/evaluate.json"))
    assert metrics["n_val"] == 7
    # Recorded boxes are slightly off; one belongs to another object.
    assert 35 < metrics["val_prior_miou"] < 100
    assert json.loads(project.read("metrics/priors.json"))["empty"] == 2  # one says "nothing", one is missing
    assert "<img" in project.read("report/index.html").decode()

    # Without priors, with the learned policy: proposals are flat, and candidates built from them are empty.
    without = ("-S", "priors.backend=none", "-S", "select.method=reinforce", "-S", "select.policy_steps=4")
    ran = set(executed(project.run(*run, *changes, "-S", "select.fold_steps=2", *without)))
    assert {"query", "proposals", "warmup", "select@1", "evaluate", "report"} <= ran
    assert json.loads(project.read("metrics/priors.json"))["empty"] == 27
    metrics = json.loads(project.read("metrics/evaluate.json"))
    assert metrics["val_prior_miou"] == 0
    assert metrics["val_miou"] == metrics["val_no_prior_miou"]
