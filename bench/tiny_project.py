"""A whole project in a temporary folder, small enough that every stage takes seconds; tests and campaigns run it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.params import merged

ROOT = Path(__file__).resolve().parents[1]

NEEDED = (
    "l2l_core",
    "stages",
    "data/dvc.yaml",
    "dvc.yaml",
    "params.yaml",
    ".dvc",
    ".dvcignore",
    ".gitignore",
    "examples",
    "vlm",
)
"""Files that the pipeline needs; tests, documentation and benchmarks are not copied."""

TINY: dict[str, Any] = {
    "round": 1,
    "dataset": "data/refshapes",
    "refshapes": {"image_size_px": 64, "train_images": 40, "val_images": 8, "test_images": 8},
    "ingest": {"images": "auto", "split_by": "auto"},
    "split": {"labeled_fraction": 0.2, "list_file": None},
    "priors": {"backend": "simulated"},
    "model": {"image_size_px": 64, "dim": 16},
    "train": {"batch_size": 4, "log_every": 2, "engine": {"checkpoint_every": 2, "device": "cpu"}},
    "warmup": {"steps": 40},
    "select": {"fold_steps": 4, "fold_update_steps": 4, "policy_steps": 10, "grid": 8},
    "retrain": {"steps": 40},
    "distill": {"steps": 40},
    "report": {"cases": 2},
}
"""Changes to params.yaml. The trainings but the fold teachers run some extra steps, so that a kill hits them after
their first checkpoint."""


def environment() -> dict[str, str]:
    """Environment with this Python first on PATH, as in `make`, and one thread, as in all tests."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }


@dataclass(frozen=True)
class Project:
    """A Git and DVC repository of the project's files."""

    folder: Path

    def run(self, *command: str, code: int | None = 0) -> str:
        """Combined stdout and stderr of a command. code: the expected exit code; None accepts any."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert code is None or done.returncode == code, f"{' '.join(command)}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def call(self, *words: str) -> tuple[int, str]:
        """Exit code and output of this Python with some words, such as `-m dvc repro`."""
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.folder,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        return done.returncode, done.stdout

    def different(self, expected: dict[str, str], ignored: tuple[str, ...] = ()) -> list[str]:
        """Files, but those below `ignored`, that are not as in the `digests` of another project."""
        found = self.digests()
        names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        return [name for name in names if not name.startswith(ignored)]

    def out(self, *command: str) -> str:
        """The stdout of a command."""
        return subprocess.run(
            command, cwd=self.folder, env=environment(), text=True, capture_output=True, check=True
        ).stdout

    def stages_run(self, *command: str) -> list[str]:
        """Stages that a dvc command executed, in order; stages from the cache do not count."""
        return executed(self.run(*command))

    def change_params(self, changes: dict[str, Any]) -> None:
        path = self.folder / "params.yaml"
        path.write_text(yaml.safe_dump(merged(yaml.safe_load(path.read_text()), changes), sort_keys=False))

    def commit(self) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", "state")

    def back(self) -> None:
        """Restore the last commit in Git and DVC; experiments stay in the cache."""
        self.run("git", "reset", "--quiet", "--hard")
        self.run("dvc", "checkout", "--quiet", code=None)  # complains about rounds that never ran

    def read(self, path: str) -> bytes:
        return (self.folder / path).read_bytes()

    def forget(self, stage: str) -> None:
        """Remove a stage's outputs and its entry in dvc.lock, and the cached runs of all stages.

        The next `dvc repro` runs it again; the stages after it see the same bytes and do not run.
        """
        shutil.rmtree(self.folder / ".dvc/cache/runs", ignore_errors=True)
        for path in self.lock_files():
            lock = yaml.safe_load(path.read_text(encoding="utf-8"))
            outs = [*lock["stages"].pop(stage, {}).get("outs", ())]
            for out in outs:
                self.run("rm", "-rf", out["path"])
            if outs:
                path.write_text(yaml.safe_dump(lock, sort_keys=False), encoding="utf-8")

    def lock_files(self) -> list[Path]:
        return sorted([*self.folder.glob("dvc.lock"), *self.folder.glob("*/dvc.lock")])

    def stages(self) -> list[str]:
        """All stages of the last run."""
        return [
            name for path in self.lock_files() for name in yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
        ]

    def digests(self) -> dict[str, str]:
        """SHA-256 of every file but those of Git and DVC and what was moved aside; of dvc.lock, that of its content."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            if not path.is_file() or {".git", ".dvc", "__pycache__"} & set(name.parts) or ".torn" in path.name:
                continue
            content = path.read_bytes()
            if path.name == "dvc.lock":
                content = json.dumps(yaml.safe_load(content), sort_keys=True).encode()
            found[name.as_posix()] = hashlib.sha256(content).hexdigest()
        return found

    def copy(self, folder: Path) -> Project:
        shutil.copytree(self.folder, folder, symlinks=True)
        return Project(folder)


def executed(output: str) -> list[str]:
    """Stages of `Running stage 'stages/dvc.yaml:select@1':`, without the file's name."""
    return [name.rpartition(":")[2] for name in re.findall(r"^Running stage '([^']+)'", output, re.MULTILINE)]


def make_project(folder: Path, changes: dict[str, Any]) -> Project:
    """A fresh project with changed parameters, not yet run."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *NEEDED]
    names = subprocess.run(listed, cwd=ROOT, text=True, capture_output=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    project = Project(folder)
    project.change_params(changes)
    project.run("git", "init", "--quiet", "--initial-branch", "main")
    project.run("git", "config", "user.name", "Test")
    project.run("git", "config", "user.email", "test@example.com")
    project.commit()
    return project


@contextmanager
def finished_project() -> Iterator[Project]:
    """A temporary project after its first run, committed; `folder.parent` is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="l2l-tiny-") as folder:
        project = make_project(Path(folder) / "whole", TINY)
        project.run("dvc", "repro")
        project.commit()
        yield project


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Add the row of a campaign, with the commit that it ran at, in place of one of the same commit and seed."""
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    new = row | {"commit": commit}
    stored = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    rows = [old for old in stored if any(old.get(key) != new.get(key) for key in ("commit", "seed"))]
    path.write_text("".join(json.dumps(one) + "\n" for one in [*rows, new]), encoding="utf-8")
    print(json.dumps(row))
