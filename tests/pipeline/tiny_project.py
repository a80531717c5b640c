"""A whole project in a temporary folder, small enough that every stage takes seconds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.params import merged

ROOT = Path(__file__).parents[2]

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
    "refshapes": {"image_size_px": 64, "train_images": 40, "val_images": 8, "test_images": 8},
    "split": {"labeled_fraction": 0.2},
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
