"""Find the files that a kill, a full disk or a failing disk left torn, and move them aside.

DVC rewrites `dvc.lock` and `.dvc/tmp/rwlock` in place: a kill at that moment leaves a file that every later command
refuses. Everything else of the pipeline is written whole or not at all, and restored from DVC's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from dvc.dvcfile import Lockfile, SingleStageFile
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.rwlock import SCHEMA as RWLOCK_SCHEMA
from dvc.scm import SCMError
from voluptuous import Invalid

from l2l_core.artifacts import records
from l2l_core.core.files import is_locked, move_aside
from l2l_core.core.progress import progress
from l2l_core.errors import ArtifactError, InputError

REWRITE_S = 1.0
"""Longer than DVC takes to rewrite one of its files: a file that is still torn then is not just being written."""
RERUN = "dvc repro restores the rest from the cache"


@dataclass(frozen=True)
class Torn:
    """A torn file."""

    path: Path
    problem: str
    remedy: str  # once the file is out of the way


def run_doctor(*, fix: bool) -> list[str]:
    """Check the project in the current folder; return a line per torn file, or one line if there is none.

    fix: move torn files aside; the lines then say where and what to do next. Without it, InputError lists them. Also
    raises InputError if DVC cannot run here or a run is in progress: its unfinished files would look torn.
    """
    try:
        with Repo() as repo:
            torn = torn_dvc_files(repo)
            checked, unknown = 0, []
            if not torn:
                _refuse_during_a_run(repo)
            if not torn:  # else DVC cannot say what the artifacts are
                unknown = sorted({_unlisted(out) for out in repo.index.outs} - {""})
                outs = list(_outputs(repo))
                checked = len(outs)
                torn = [*_torn_outputs(repo, outs), *_torn_scratch(Path(repo.root_dir))]
    except (DvcException, SCMError) as error:
        raise InputError(f"{Path.cwd()}: DVC cannot run here: {str(error).splitlines()[0]}") from None
    if not torn:
        found = [f"DVC's files, {checked} artifacts with their copies in the cache, and .scratch: all whole"]
        if unknown:
            found.append(f"not in dvc.lock, so not checked: {', '.join(unknown)}; dvc repro restores or computes them")
        return found
    if not fix:
        lines = "\n".join(f"  {one.path}: {one.problem}" for one in torn)
        raise InputError(f"{len(torn)} torn file(s); l2l doctor --fix moves them aside:\n{lines}")
    return [f"{one.path}: {one.problem}; moved to {move_aside(one.path).name}; {one.remedy}" for one in torn]


def refuse_torn_dvc_files(repo: Repo) -> None:
    """Raise InputError that names `l2l doctor --fix` if DVC would refuse one of its own files."""
    if torn := torn_dvc_files(repo):
        names = ", ".join(str(one.path) for one in torn)
        raise InputError(f"{names}: torn, as after a kill while DVC wrote it; run l2l doctor --fix, then go on")


def torn_dvc_files(repo: Repo) -> list[Torn]:
    """The files of DVC in the project that DVC itself cannot read."""
    root = Path(repo.root_dir)
    readers: list[tuple[Path, Callable[[], object], str]] = []
    for path in [*root.glob("dvc.lock"), *root.glob("*/dvc.lock")]:
        readers.append((path, Lockfile(repo, str(path)).load, RERUN))
    for path in [*root.glob("*.dvc"), *root.glob("*/*.dvc")]:
        remedy = f"restore it (git checkout {path.relative_to(root)}) or fetch the data again"
        readers.append((path, SingleStageFile(repo, str(path)).load, remedy))
    lock = _rwlock(repo)
    readers.append((lock, lambda: RWLOCK_SCHEMA(json.loads(lock.read_bytes())), RERUN))
    return [
        Torn(_shown(path), "torn: DVC refuses every command", remedy)
        for path, load, remedy in sorted(readers, key=lambda reader: reader[0])
        if path.is_file() and not _is_readable(load)
    ]


def _refuse_during_a_run(repo: Repo) -> None:
    """Raise InputError if a DVC command works on a stage, or another process on a folder in .scratch."""
    lock = _rwlock(repo)
    writers: dict[int, str] = {}

    def read() -> None:
        holders = json.loads(lock.read_bytes()) if lock.is_file() else {}
        writers.update({writer["pid"]: writer["cmd"] for writer in holders.get("write", {}).values()})

    _is_readable(read)  # DVC may be just rewriting it
    running = [f"{command} (process {pid})" for pid, command in writers.items() if _is_dvc(pid)]
    scratch = sorted((Path(repo.root_dir) / ".scratch").glob("*.lock"))
    running += [f"a process that holds {_shown(path)}" for path in scratch if is_locked(path)]
    if running:
        raise InputError(f"in progress: {', '.join(running)}; its files are not complete: wait for its end, or end it")


def _rwlock(repo: Repo) -> Path:
    """DVC's list of the files that its running commands read and write."""
    return Path(repo.tmp_dir or Path(repo.root_dir) / ".dvc" / "tmp") / "rwlock"


def _is_dvc(pid: int) -> bool:
    """Whether a process runs DVC. DVC's lock may name a killed process, whose number another one has got."""
    try:
        return pid != os.getpid() and any("dvc" in word for word in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def _is_readable(load: Callable[[], object]) -> bool:
    for wait in (REWRITE_S, 0):
        try:
            load()
        except (DvcException, OSError, ValueError, Invalid):
            time.sleep(wait)
        else:
            return True
    return False


@dataclass(frozen=True)
class _File:
    """One file of an output: where it lies, and its MD5 in dvc.lock."""

    path: Path
    md5: str


def _outputs(repo: Repo) -> Iterator[_File]:
    """Every file that dvc.lock lists as written by a stage. A folder without its listing in the cache is left out."""
    for out in repo.index.outs:
        stated = out.hash_info.value if out.stage.cmd and out.hash_info else None
        if not stated:
            continue
        if not stated.endswith(".dir"):
            yield _File(Path(out.fs_path), stated)
            continue
        try:
            listing = json.loads(_in_cache(repo, stated).read_bytes())
            files = [_File(Path(out.fs_path) / row["relpath"], row["md5"]) for row in listing]
        except (OSError, ValueError, TypeError, KeyError):
            continue
        yield from files


def _unlisted(out: Any) -> str:
    """The path of a DVC output that is there, although dvc.lock does not list it; else nothing."""
    path = Path(out.fs_path)
    return "" if out.hash_info or not out.stage.cmd or not path.exists() else str(_shown(path))


def _torn_outputs(repo: Repo, files: Iterable[_File]) -> Iterator[Torn]:
    """Files of outputs, and their copies in the cache, with another content than dvc.lock says."""
    for file in progress(list(files), "artifacts", "file"):
        copy = _in_cache(repo, file.md5)
        if copy.is_file() and _md5(copy) != file.md5:
            yield Torn(_shown(copy), f"torn copy of {_shown(file.path)} in the cache", "dvc repro computes it again")
        if file.path.is_file() and _md5(file.path) != file.md5:
            problem = "not as in dvc.lock: torn, changed, or from an unfinished run (then run dvc repro)"
            yield Torn(_shown(file.path), problem, "dvc repro restores it")


def _torn_scratch(root: Path) -> Iterator[Torn]:
    """Files of interrupted stages that are not as they were written. The stage itself does them again."""
    # Not at the top: `l2l run` needs no torch.
    from l2l_core.evaluation.predict import MASKS
    from l2l_core.pseudo_labels.generate import LABELED
    from l2l_core.training.checkpoint import digests_path, is_intact

    remedy = "the next run does it again"
    for path in sorted(root.glob(".scratch/**/*.pt")):
        if digests_path(path).exists() and not is_intact(path):  # earlier versions wrote no digests
            yield Torn(_shown(path), "torn checkpoint", remedy)
    schemas = {"query": records.RESPONSES, "predict": records.RESPONSES, "proposals": records.PROPOSALS}
    schemas |= {"masks": MASKS, "select": LABELED}
    for stage, schema in schemas.items():
        for path in sorted(root.glob(f".scratch/{stage}-*/*.parquet")):
            try:
                records.read_table(path, schema)
            except ArtifactError:
                yield Torn(_shown(path), f"torn chunk of {stage}", remedy)


def _in_cache(repo: Repo, md5: str) -> Path:
    return Path(repo.cache.local.oid_to_path(md5))


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _shown(path: Path) -> Path:
    """Relative to the current folder if inside it."""
    here = Path.cwd().resolve()
    return path.relative_to(here) if path.is_relative_to(here) else path
