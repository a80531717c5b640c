"""Torn files are found and moved aside, and then DVC goes on to the same bytes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from called import call

from l2l_core.artifacts import records
from l2l_core.core.files import scratch_folder
from l2l_core.errors import InputError
from l2l_core.preflight import doctor
from l2l_core.preflight.checks import check_repository
from l2l_core.preflight.doctor import run_doctor
from l2l_core.reporting.run import planned_stages
from l2l_core.training.checkpoint import digests_path, save_checkpoint

WRITES = f"{sys.executable} -c \"import pathlib as p; p.Path('out').mkdir(); p.Path('out/x').write_text('xx')\""
PIPELINE = {
    "stages": {
        "text": {"cmd": "printf hello > a.txt", "outs": ["a.txt"]},
        "folder": {"cmd": WRITES, "deps": ["a.txt"], "outs": ["out"]},
    }
}


def dvc(*words: str, code: int = 0) -> None:
    done = subprocess.run(["dvc", *words], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished pipeline of two stages, as the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "REWRITE_S", 0)
    dvc("init", "--quiet", "--no-scm")
    Path("dvc.yaml").write_text(yaml.safe_dump(PIPELINE))
    dvc("repro", "--quiet")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is not DVC's own."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".dvc" not in path.parts
    }


def test_finds_nothing_in_a_whole_project(project: Path) -> None:
    assert run_doctor(fix=True) == ["DVC's files, 2 artifacts with their copies in the cache, and .scratch: all whole"]


def test_names_outputs_that_the_lock_file_does_not_list(project: Path) -> None:
    """As after a kill that left a shorter dvc.lock which is still readable."""
    lock = yaml.safe_load(Path("dvc.lock").read_text())
    stage = sorted(lock["stages"])[0]
    lost = lock["stages"].pop(stage)["outs"][0]["path"]
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    _, unlisted = run_doctor(fix=False)
    assert unlisted == f"not in dvc.lock, so not checked: {lost}; dvc repro restores or computes them"


@pytest.mark.parametrize("name", ["dvc.lock", ".dvc/tmp/rwlock"])
@pytest.mark.parametrize("torn", [b"", b"{", b"schema: '2.0'\nstages:\n  text:\n    cmd: x\n    outs:\n    - path:"])
def test_a_torn_file_of_dvc_is_named_and_moved_aside(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, torn: bytes
) -> None:
    """The files of a kill while DVC wrote them, after which DVC refuses every command."""
    before = contents(project)
    Path(name).write_bytes(torn)
    dvc("repro", code=255)
    for meets_it in (check_repository, lambda: planned_stages([])):
        with pytest.raises(InputError, match=rf"^{name}: torn, .* run l2l doctor --fix"):
            meets_it()
    assert call(monkeypatch, "doctor") == 2
    expected = f"error: 1 torn file(s); l2l doctor --fix moves them aside:\n  {name}: torn: DVC refuses every command\n"
    assert capsys.readouterr().err == expected
    assert Path(name).read_bytes() == torn

    assert call(monkeypatch, "doctor", "--fix") == 0
    moved = f"{Path(name).name}.torn"
    assert f"{name}: torn: DVC refuses every command; moved to {moved}; dvc repro " in capsys.readouterr().out
    assert Path(name).with_name(moved).read_bytes() == torn
    dvc("repro")
    assert {place: content for place, content in contents(project).items() if ".torn" not in place} == before


def test_a_lock_file_that_is_just_being_written_is_not_torn(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path("dvc.lock").read_bytes()
    Path("dvc.lock").write_bytes(b"")
    monkeypatch.setattr(doctor.time, "sleep", lambda _: Path("dvc.lock").write_bytes(whole))
    assert "all whole" in run_doctor(fix=False)[0]


@pytest.mark.parametrize("name", ["a.txt", "out/x"])
@pytest.mark.parametrize("torn", [b"", b"xX", b"hellp"])
def test_a_changed_artifact_is_named_and_restored(project: Path, name: str, torn: bytes) -> None:
    before = contents(project)
    Path(name).unlink()  # a link into the cache
    Path(name).write_bytes(torn)
    problem = f"{name}: not as in dvc.lock: torn, changed, or from an unfinished run (then run dvc repro)"
    with pytest.raises(InputError, match=rf"^1 torn file\(s\); .*\n  {re.escape(problem)}$"):
        run_doctor(fix=False)
    assert run_doctor(fix=True) == [f"{problem}; moved to {Path(name).name}.torn; dvc repro restores it"]
    Path(f"{name}.torn").unlink()
    dvc("repro")
    assert contents(project) == before


def test_a_torn_copy_in_the_cache_is_computed_again(project: Path) -> None:
    """DVC trusts its cache: it would link the torn copy into the project again."""
    before = contents(project)
    copy = next(
        path for path in Path(".dvc/cache/files").rglob("*") if path.is_file() and path.read_bytes() == b"hello"
    )
    copy.chmod(0o644)
    copy.unlink()
    copy.write_bytes(b"hellp")
    lines = run_doctor(fix=True)
    assert lines == [f"{copy}: torn copy of a.txt in the cache; moved to {copy.name}.torn; dvc repro computes it again"]
    Path("a.txt").unlink()
    dvc("repro")
    assert contents(project) == before


def test_torn_scratch_files_are_named(project: Path) -> None:
    folder = Path(".scratch/warmup-1")
    folder.mkdir(parents=True)
    save_checkpoint(folder / "checkpoint.pt", {"step": 1})
    stored = {Path(".scratch/query-1/a.parquet"): records.RESPONSES}
    stored |= {Path(".scratch/proposals-1/0.parquet"): records.PROPOSALS}
    for path, schema in stored.items():
        records.write_table(schema.empty_table(), path, schema)
    (folder / "early.pt").write_bytes(b"a checkpoint of a version that wrote no digest")
    assert "all whole" in run_doctor(fix=False)[0]
    (folder / "checkpoint.pt").write_bytes(b"x")
    for path in stored:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError) as caught:
        run_doctor(fix=False)
    assert str(caught.value).splitlines()[1:] == [
        f"  {folder}/checkpoint.pt: torn checkpoint",
        "  .scratch/query-1/a.parquet: torn chunk of query",
        "  .scratch/proposals-1/0.parquet: torn chunk of proposals",
    ]
    run_doctor(fix=True)
    assert "all whole" in run_doctor(fix=False)[0]
    assert digests_path(folder / "checkpoint.pt").exists()


@pytest.fixture
def running() -> Iterator[subprocess.Popen[bytes]]:
    """A process whose command line has the word dvc."""
    with subprocess.Popen([sys.executable, "-c", "input()", "dvc"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("fix", [False, True])
def test_waits_for_a_run_in_progress(project: Path, running: subprocess.Popen[bytes], fix: bool) -> None:
    """The outputs of a stage that still writes them are not as in dvc.lock."""
    half = Path("out/x")
    half.write_text("half")
    lock = Path(".dvc/tmp/rwlock")
    writer = {"pid": running.pid, "cmd": "dvc repro"}
    lock.write_text(json.dumps({"write": {str(project / "out"): writer}, "read": {}}))
    with pytest.raises(InputError, match=rf"^in progress: dvc repro \(process {running.pid}\); its files are not comp"):
        run_doctor(fix=fix)
    assert half.read_text() == "half"
    running.kill()
    running.wait()
    with (
        scratch_folder("warmup", "1"),
        pytest.raises(InputError, match=r"^in progress: a process that holds "),
    ):
        run_doctor(fix=fix)
    assert half.read_text() == "half"
    with pytest.raises(InputError, match=r"out/x: not as in dvc\.lock"):
        run_doctor(fix=False)


def test_a_process_number_that_is_in_use_again_is_no_run(project: Path) -> None:
    writer = {"pid": os.getpid(), "cmd": "dvc repro"}
    Path(".dvc/tmp/rwlock").write_text(json.dumps({"write": {str(project / "out"): writer}, "read": {}}))
    assert "all whole" in run_doctor(fix=False)[0]


def test_says_that_the_folder_is_no_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "doctor") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: DVC cannot run here: ")
