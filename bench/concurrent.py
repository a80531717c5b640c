"""Two commands at once in one project: each succeeds or is refused in one line, and results are never mixed.

    python -m bench.concurrent [--repeats 5] [--seed 0]          (a minute each on two cores)

    repro x repro       both run `dvc repro` of one stage that DVC knows nothing of, the second a moment later
    repro x COMMAND     predict, export coco, compare, scores or check beside such a run
    predict x predict   into one folder
    queue               two workers of `dvc queue` with two experiments

A trial fails if a command ends in a traceback or with another code than 0, 2 (one line) and DVC's 255 for a busy
project; if a later `dvc repro` does not give the same bytes as an undisturbed run; or if predictions.jsonl and the
pictures beside it do not belong together.

Writes bench/results/concurrent.jsonl, one JSON object: `count` of trials, `failures`, and how many commands were
`refused`.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.tiny_project import ROOT, Project, environment, finished_project, write_row

RESULTS = ROOT / "bench" / "results" / "concurrent.jsonl"
PATIENCE_S = 1200
LONGEST_LAG_S = 3.0
REPRO = ("-m", "dvc", "repro")
OUT = "predictions"
PREDICT = ("-m", "l2l_core", "predict", "data/refshapes/images", "the red star", "--out", OUT)
BESIDE: dict[str, Sequence[str]] = {
    "predict": PREDICT,
    "export coco": ("-m", "l2l_core", "export", "coco", "--out", "export"),
    "compare": ("-m", "l2l_core", "compare", ".", "HEAD", "--out", "export"),
    "scores": ("-m", "l2l_core", "scores"),
    "check": ("-m", "l2l_core", "check", "--no-timing"),
}
QUEUE = "queue"
PAIRS = ("repro x repro", *(f"repro x {name}" for name in BESIDE), "predict x predict", QUEUE)
OWN_FOLDERS = (f"{OUT}/", "export/")
BUSY = ("busy", "Unable to acquire lock")
"""DVC's messages when another run holds a file, or the project for longer than DVC waits."""


@dataclass(frozen=True)
class Trial:
    """Two commands and what followed."""

    pair: str
    problems: list[str]
    refused: int  # commands that were refused in one line


def try_once(whole: Project, pair: str, rng: random.Random) -> Trial:
    """One trial in a copy of the finished project."""
    with tempfile.TemporaryDirectory() as folder:
        project = whole.copy(Path(folder) / "project")
        expected = project.digests()
        if pair == QUEUE:
            return Trial(pair, _queue_problems(project), 0)
        first, second = pair.split(" x ")
        if first == "repro":
            project.forget(rng.choice(["ingest", "split", "priors", "evaluate", "report"]))
        commands = [REPRO if name == "repro" else BESIDE[name] for name in (first, second)]
        running = []
        for number, command in enumerate(commands):
            time.sleep(rng.uniform(0, LONGEST_LAG_S) * number)
            running.append(_start(project, command))
        problems, refused = [], 0
        for command, process in zip(commands, running, strict=True):
            output, _ = process.communicate(timeout=PATIENCE_S)
            is_refused = process.returncode == 2 or (
                process.returncode == 255 and any(words in output for words in BUSY)
            )
            refused += is_refused
            if "Traceback" in output or not (process.returncode == 0 or is_refused):
                problems.append(f"{' '.join(command)}: {process.returncode}: {output[-300:]}")
        problems += _orphans(project.folder / OUT)
        code, output = project.call(*REPRO)
        problems += [output[-300:]] * (code != 0)
        problems += project.different(expected, OWN_FOLDERS)
        return Trial(pair, problems, refused)


def _start(project: Project, command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=project.folder,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _orphans(folder: Path) -> list[str]:
    """Pictures that the index does not list, and listed ones that are not there."""
    if not folder.is_dir():
        return []
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    listed = {row[kind] for row in rows for kind in ("mask", "overlay")}
    return sorted(listed ^ {path.name for path in folder.glob("*.png")})


def _queue_problems(project: Project) -> list[str]:
    """Two experiments by two workers: both must succeed."""
    for cases in (1, 3):
        project.run("dvc", "exp", "run", "--queue", "-S", f"report.cases={cases}")
    project.run("dvc", "queue", "start", "--jobs", "2")
    deadline = time.monotonic() + PATIENCE_S
    while "Running" in (status := project.out("dvc", "queue", "status")) or "Queued" in status:
        if time.monotonic() > deadline:
            break
        time.sleep(2)
    return [] if status.count("Success") == 2 else [status]


def campaign(
    whole: Project, pairs: Sequence[str], repeats: int, seed: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """So many trials of each pair; the row about them."""
    rng, trials = random.Random(seed), []
    for pair in [*pairs] * repeats:
        trials.append(trial := try_once(whole, pair, rng))
        say(f"{pair}: {f'FAILED: {trial.problems}' if trial.problems else 'ok'}, {trial.refused} refused")
    return {
        "bench": "concurrent",
        "count": len(trials),
        "failures": sum(bool(trial.problems) for trial in trials),
        "refused": sum(trial.refused for trial in trials),
        "seed": seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with finished_project() as whole:
        write_row(RESULTS, campaign(whole, PAIRS, given.repeats, given.seed, partial(print, flush=True)))


if __name__ == "__main__":
    main()
