import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from l2l_core.core import files
from l2l_core.core.files import atomic_dir, fingerprint, scratch_folder, staged_output
from l2l_core.errors import ArtifactError, InputError


def test_adds_files_to_an_existing_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    (out / "a.txt").write_text("old")
    with staged_output(out) as folder:
        (folder / "a.txt").write_text("new")
        (folder / "b.txt").write_text("b")
        assert (out / "a.txt").read_text() == "old"
    assert {path.name: path.read_text() for path in out.iterdir()} == {"mine.txt": "mine", "a.txt": "new", "b.txt": "b"}
    assert list(tmp_path.iterdir()) == [out]


def test_leaves_no_files_after_an_error(tmp_path):
    def fail() -> None:
        with staged_output(tmp_path / "deep" / "out") as folder:
            (folder / "half").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.rglob("*half*"))
    assert not (tmp_path / "deep" / "out").exists()


def test_leaves_no_files_after_sigterm(tmp_path):
    script = """if True:
        import time
        from pathlib import Path
        from l2l_core.core.files import staged_output, end_on_sigterm
        end_on_sigterm()
        with staged_output(Path("out")) as folder:
            (folder / "half").write_text("half")
            print("writing", flush=True)
            time.sleep(60)
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_refuses_an_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match=r"--out: .*out is a file"), staged_output(tmp_path / "out"):
        pass
    with (
        pytest.raises(InputError, match=r"--out: .*inside cannot be written: "),
        staged_output(tmp_path / "out" / "inside"),
    ):
        pass
    assert (tmp_path / "out").read_text() == "mine"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder outside any DVC project."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


class Killed(Exception):
    """Stands for anything that ends a stage early."""


# --- atomic folders


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "new" / "model"
    with atomic_dir(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_keeps_the_old_folder_and_adds_nothing(tmp_path):
    target = tmp_path / "model"
    with suppress(Killed), atomic_dir(target) as folder:
        (folder / "a").write_text("1")
        raise Killed
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(Killed), atomic_dir(target) as folder:
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
    with atomic_dir(target) as folder:
        (folder / "a").write_text("1")
    assert [path.name for path in target.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_replacement_keeps_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    replace = os.replace

    def fail(source, to):
        if source.name == ".model.building":
            raise OSError("no permission")
        replace(source, to)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no permission"), atomic_dir(target) as folder:
        (folder / "a").write_text("1")
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_restores_the_old_folder_after_a_kill_during_the_replacement(tmp_path):
    target, retired = tmp_path / "model", tmp_path / ".model.retired"
    retired.mkdir()
    (retired / "old").write_text("old")
    with pytest.raises(Killed), atomic_dir(target):
        raise Killed
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


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
