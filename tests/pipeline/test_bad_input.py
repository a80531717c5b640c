"""Invalid parameters and data, through the stages' command lines: exit code 2, one clear line, nothing written."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.params import merged
from bench.tiny_project import ROOT, environment
from l2l_core.errors import exit_code

STAGES = {
    path.stem: ["--round", "1"] if "--round" in path.read_text(encoding="utf-8") else []
    for path in sorted((ROOT / "stages").glob("*.py"))
    if path.stem != "__init__"
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path, tiny_refcoco):
    """A project that holds only params.yaml, with its dataset beside it."""
    project = tmp_path / "project"
    project.mkdir()
    write_params(project, {"dataset": str(tiny_refcoco.folder), "priors": {"backend": "simulated"}})
    return project


def write_params(project: Path, changes: dict[str, Any]) -> None:
    source = project / "params.yaml" if (project / "params.yaml").exists() else ROOT / "params.yaml"
    params = merged(yaml.safe_load(source.read_text(encoding="utf-8")), changes)
    (project / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def run_stage(folder: Path, name: str) -> tuple[int, str]:
    """Exit code and stderr of `python -m stages.<name>`."""
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{name}"],
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        text=True,
        capture_output=True,
        check=False,
    )
    return done.returncode, done.stderr


def is_refused(folder: Path, name: str, *words: str) -> None:
    before = contents(folder)
    code, stderr = run_stage(folder, name)
    assert code == 2, stderr
    lines = stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert contents(folder) == before


# Parameters


WRONG_PARAMS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown": ({"train": {"learning_rate": 1.0}}, ["params.yaml", "train.learning_rate", "unknown parameter"]),
    "wrong type": ({"warmup": {"steps": "many"}}, ["params.yaml", "warmup.steps", "'many'", "integer"]),
    "out of range": ({"round": 6}, ["params.yaml", "round", "got 6", "less than or equal to 5"]),
    "not a number": ({"round": "two"}, ["params.yaml", "round", "'two'", "integer"]),
    "no such choice": ({"select": {"method": "best"}}, ["select.method", "'best'", "'reinforce'", "'threshold'"]),
}


@pytest.mark.parametrize("case", WRONG_PARAMS)
def test_refuses_invalid_parameters(folder, case):
    changes, words = WRONG_PARAMS[case]
    write_params(folder, changes)
    is_refused(folder, "ingest", *words)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_checks_all_parameters_first(folder, name, monkeypatch, capsys):
    write_params(folder, {"report": {"cases": 0}, "round": 9})
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *STAGES[name]])
    before = contents(folder)
    assert exit_code(importlib.import_module(f"stages.{name}").main) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 2 problems:\n")
    assert "params.yaml: round: got 9, expected" in error
    assert "params.yaml: report.cases: got 0, expected" in error
    assert contents(folder) == before


@pytest.mark.parametrize("name", [name for name in STAGES if name not in ("check", "fetch", "refshapes", "ingest")])
def test_stage_names_its_missing_input(folder, name, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *STAGES[name]])
    before = contents(folder)
    assert exit_code(importlib.import_module(f"stages.{name}").main) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "not found" in error
    assert "dvc repro" in error
    assert contents(folder) == before


def test_refuses_a_missing_params_file(tmp_path):
    is_refused(tmp_path, "ingest", "params.yaml", "not found")


# Data


def cut_jpeg(data):
    path = data.image_path(3)
    path.write_bytes(path.read_bytes()[:-200])


def empty_mask(data):
    data.annotation(400)["segmentation"] = {"size": [44, 56], "counts": [44 * 56]}


WRONG_DATA = {
    "missing image": (lambda data: data.image_path(2).unlink(), ["instances.json", "photo_2.png", "not found"]),
    "corrupt JPEG": (cut_jpeg, ["instances.json", "photo_3.jpg", "truncated"]),
    "size mismatch": (
        lambda data: data.image(2).update(width=57),
        ["instances.json", "photo_2.png", "58x42", "57x42"],
    ),
    "empty mask": (empty_mask, ["instances.json", "id 400", "empty mask"]),
    "no words": (
        lambda data: data.ref(20)["sentences"][0].update(sent=" ?! "),
        ["refs(unc).p", "ref_id 20", "' ?! '", "no words"],
    ),
    "duplicate sent_id": (
        lambda data: data.ref(20)["sentences"][1].update(sent_id=1000),
        ["refs(unc).p", "ref_id 20", "sent_id 1000", "taken", "ref_id 10"],
    ),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_refuses_invalid_data(folder, tiny_refcoco, case):
    change, words = WRONG_DATA[case]
    change(tiny_refcoco)
    tiny_refcoco.save()
    is_refused(folder, "ingest", *words)


def test_bad_input_keeps_the_existing_index(folder, tiny_refcoco):
    assert run_stage(folder, "ingest")[0] == 0
    assert (folder / "data/index/refs.parquet").exists()
    tiny_refcoco.image_path(2).unlink()
    is_refused(folder, "ingest", "photo_2.png")


class Malicious:
    """Creates a folder when it is unpickled without protection."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_refuses_a_malicious_pickle_without_running_it(folder, tiny_refcoco, tmp_path):
    target = tmp_path / "run"
    refs = tiny_refcoco.folder / "refs(unc).p"
    refs.write_bytes(pickle.dumps([Malicious(target)]))
    is_refused(folder, "ingest", "refs(unc).p", "mkdir")
    assert not target.exists()
    pickle.loads(refs.read_bytes())  # sanity check: plain unpickling runs it
    assert target.exists()


def test_refuses_a_label_budget_of_zero_images(folder):
    assert run_stage(folder, "ingest")[0] == 0
    write_params(folder, {"split": {"labeled_fraction": 0.2}})
    is_refused(folder, "split", "split.labeled_fraction", "got 0.2", "no image out of 4", "at least 0.25")
