"""Every stage on a full disk: one line, and the same bytes once there is space again.

    sudo python -m bench.disk_full [--repeats 2] [--seed 0]          (Linux; half a minute a trial on two cores)

A finished tiny project lies on a small file system in memory, which the script mounts and fills up to a few kilobytes.
DVC knows nothing of one stage; the stage runs. Then the space is freed and `dvc repro` runs. A trial fails unless the
stage ends with one line `error: disk full: ...` (or succeeds, if the rest was enough), and every file is afterwards the
same as before, byte for byte.

Writes bench/results/disk_full.jsonl, one JSON object: `count` of trials, `failures`, how many stages found the rest
`enough`, the number of `tracebacks`, and of results that were `different` after space was freed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bench.tiny_project import ROOT, Project, environment, finished_project, write_row

RESULTS = ROOT / "bench" / "results" / "disk_full.jsonl"
ROOM_BYTES = 150 << 20
"""Size of the file system beyond the project: a run needs less."""
LEFT_KIB = (0, 4, 40, 400)
"""What is left on the full disk."""


@dataclass(frozen=True)
class Trial:
    """A stage on a full disk and what followed."""

    stage: str
    left_kib: int
    code: int
    output: str
    different: list[str]  # files that differ after a run with enough space

    @property
    def is_one_line(self) -> bool:
        errors = [line for line in self.output.splitlines() if line.startswith("error: ")]
        return self.code == 2 and len(errors) == 1 and errors[0].startswith("error: disk full: ")

    @property
    def failed(self) -> bool:
        return "Traceback" in self.output or bool(self.different) or not (self.code == 0 or self.is_one_line)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of `size` bytes at a folder. Raises CalledProcessError if this user may not mount one."""
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True, capture_output=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def try_once(whole: Project, stage: str, left_kib: int) -> Trial:
    """One trial in a copy of the finished project."""
    expected = whole.digests()
    size = sum(path.stat().st_size for path in whole.folder.rglob("*") if path.is_file() and not path.is_symlink())
    with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder) / "disk", size + ROOM_BYTES):
        project = whole.copy(Path(folder) / "disk" / "project")
        command = command_of(project, stage)
        project.forget(stage)
        ballast = Path(folder) / "disk" / "ballast"
        free = shutil.disk_usage(ballast.parent).free - 1024 * left_kib
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free)
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=project.folder,
            env=environment() | {"PYTHONDONTWRITEBYTECODE": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        ballast.unlink()
        code, said = project.call("-m", "dvc", "repro")
        different = project.different(expected) or [said[-300:]] * (code != 0)
        return Trial(stage, left_kib, done.returncode, done.stdout, different)


def command_of(project: Project, stage: str) -> str:
    """The command of a stage, as dvc.lock states it."""
    locks = (yaml.safe_load(path.read_text(encoding="utf-8"))["stages"] for path in project.lock_files())
    return next(str(lock[stage]["cmd"]) for lock in locks if stage in lock)


def campaign(
    whole: Project, stages: list[str], repeats: int, seed: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """So many trials of each stage; the row about them."""
    rng, trials = random.Random(seed), []
    for stage in stages * repeats:
        trials.append(trial := try_once(whole, stage, rng.choice(LEFT_KIB)))
        last = (trial.output.strip().splitlines() or [""])[-1][:120]
        say(f"{stage}, {trial.left_kib} KiB: {'FAILED ' * trial.failed}{trial.code}, {trial.different[:3]}: {last}")
    return {
        "bench": "disk_full",
        "count": len(trials),
        "failures": sum(trial.failed for trial in trials),
        "enough": sum(trial.code == 0 for trial in trials),
        "tracebacks": sum("Traceback" in trial.output for trial in trials),
        "different": sum(bool(trial.different) for trial in trials),
        "seed": seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with finished_project() as whole:
        say = partial(print, flush=True)
        write_row(RESULTS, campaign(whole, whole.stages(), given.repeats, given.seed, say))


if __name__ == "__main__":
    main()
