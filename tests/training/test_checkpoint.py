import os
import subprocess
import sys
from contextlib import suppress

import pytest
import torch

from l2l_core.core import files
from l2l_core.core.files import fingerprint, scratch_folder, whole_folder
from l2l_core.errors import ArtifactError
from l2l_core.training.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder outside any DVC project."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


class Killed(Exception):
    """Stands for anything that ends a stage early."""


# --- fingerprints


@pytest.fixture
def project(here, monkeypatch):
    """Synthetic inputs and library code."""
    for name in ("l2l_core/model/net.py", "stages/warmup.py", "inputs/split.parquet", "inputs/model/a", "notes.txt"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(f"content of {name}")
    monkeypatch.setattr(files, "CODE_ROOT", here)
    return here


def key(project, stage="warmup", settings="lr=1", inputs=("inputs/split.parquet", "inputs/model")) -> str:
    return fingerprint(stage, settings, [project / name for name in inputs])


def test_fingerprint_changes_with_stage_settings_inputs_and_code(project):
    keys = [key(project), key(project, stage="retrain-1"), key(project, settings="lr=2")]
    keys.append(key(project, inputs=("inputs/split.parquet",)))
    for name in ("inputs/split.parquet", "inputs/model/a", "l2l_core/model/net.py", "stages/warmup.py"):
        (project / name).write_text("changed")
        keys.append(key(project))
    (project / "inputs/model/a").rename(project / "inputs/model/b")
    keys.append(key(project))
    (project / "l2l_core/new.py").write_text("")
    keys.append(key(project))
    assert len(set(keys)) == len(keys)


def test_fingerprint_ignores_input_order_timestamps_and_unrelated_files(project):
    before = key(project)
    assert key(project, inputs=("inputs/model", "inputs/split.parquet")) == before
    (project / "notes.txt").write_text("changed")
    (project / "l2l_core/model/__pycache__").mkdir()
    (project / "l2l_core/model/__pycache__/net.pyc").write_bytes(b"x")
    os.utime(project / "inputs/split.parquet", (1, 1))
    assert key(project) == before


# --- scratch folders


def test_scratch_folder_survives_a_failure_and_is_removed_on_success(here):
    with suppress(Killed), scratch_folder("warmup", "abc") as folder:
        (folder / "checkpoint.pt").write_text("half way")
        raise Killed
    with scratch_folder("warmup", "abc") as folder:
        assert (folder / "checkpoint.pt").read_text() == "half way"
    assert list((here / ".scratch").iterdir()) == []


def test_scratch_folder_depends_on_the_key(here):
    with suppress(Killed), scratch_folder("warmup", "abc") as folder:
        (folder / "checkpoint.pt").write_text("half way")
        raise Killed
    with scratch_folder("warmup", "abd") as other:
        assert list(other.iterdir()) == []
    assert folder.exists()


def test_scratch_folder_lies_in_the_dvc_project_root(here, monkeypatch):
    (here / "sub").mkdir()
    monkeypatch.chdir(here / "sub")
    monkeypatch.setenv("DVC_ROOT", str(here))
    with scratch_folder("warmup", "abc") as folder:
        assert folder.resolve().parent == here / ".scratch"


HOLD = """
import sys
from l2l_core.core.files import scratch_folder
with scratch_folder("warmup", "abc"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_never_share_a_scratch_folder(here):
    """A folder held by another process is refused. After that process is killed, the lock is free and its files
    remain."""
    command = [sys.executable, "-c", HOLD]
    environment = os.environ | {"PYTHONPATH": str(files.CODE_ROOT)}
    with subprocess.Popen(
        command, cwd=here, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        (here / ".scratch/warmup-abc/checkpoint.pt").write_text("half way")
        with (
            pytest.raises(ArtifactError, match="another process is running this stage"),
            scratch_folder("warmup", "abc"),
        ):
            pass
        other.kill()
        other.wait()
    with scratch_folder("warmup", "abc") as folder:
        assert (folder / "checkpoint.pt").exists()


# --- checkpoints


def test_loads_a_saved_checkpoint_and_returns_none_without_one(tmp_path):
    path = tmp_path / "checkpoint.pt"
    assert load_checkpoint(path) is None
    state = {"step": 3, "student": {"w": torch.tensor([1.5, -2.0])}, "curve": [{"step": 1, "loss": 0.25}]}
    save_checkpoint(path, state)
    loaded = load_checkpoint(path)
    assert loaded is not None
    assert torch.equal(loaded["student"].pop("w"), state["student"].pop("w"))
    assert loaded == state
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_failed_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def half(state: object, file: object) -> None:
        with open(file, "wb") as out:  # type: ignore[call-overload]
            out.write(b"half")
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", half)
        with pytest.raises(Killed):
            save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 1}
    save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 2}


# --- atomic folders


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "new" / "model"
    with whole_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_keeps_the_old_folder_and_adds_nothing(tmp_path):
    target = tmp_path / "model"
    with suppress(Killed), whole_folder(target) as folder:
        (folder / "a").write_text("1")
        raise Killed
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(Killed), whole_folder(target) as folder:
        raise Killed
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_ignores_leftovers_of_a_killed_process(tmp_path):
    target = tmp_path / "model"
    left = tmp_path / ".model.building"
    left.mkdir()
    (left / "stale").write_text("")
    target.mkdir()
    (target / "old").write_text("")
    with whole_folder(target) as folder:
        (folder / "a").write_text("1")
    assert [path.name for path in target.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [target]
