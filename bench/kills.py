"""Kills a run at random moments of random stages: the next `dvc repro` must give the same bytes.

    python -m bench.kills [--kills 300] [--seed 0]          (half a minute each on two cores)

A tiny project runs once undisturbed. Each trial starts from a copy in which DVC knows nothing of one stage, runs
`dvc repro`, and ends it some seconds after the stage has started (or, in every fourth trial, while DVC rewrites its
lock file) by SIGKILL, SIGTERM or Ctrl-C to the whole process group, or by SIGKILL to the stage alone. Then `dvc repro`
runs again; if DVC refuses its own torn files, after `l2l doctor --fix`. A trial fails unless every file is the same as
in the undisturbed run, byte for byte.

Writes bench/results/kills.jsonl, one JSON object: `count` of kills, `failures`, `attempts` (how many trials needed one
`dvc repro` afterwards, and how many two), `torn` (trials in which doctor had to move files of DVC aside), `tracebacks`
(trials whose output held one), and how often each signal and stage was drawn.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from bench.tiny_project import ROOT, Project, environment, finished_project, write_row

RESULTS = ROOT / "bench" / "results" / "kills.jsonl"
PATIENCE_S = 1200
LONGEST_S = 8.0
"""Most seconds between a stage's start and its kill."""
REWRITE_S = 0.4
"""About the time in which DVC rewrites dvc.lock after it said so."""
WAYS = ("SIGKILL", "SIGTERM", "SIGINT", "stage SIGKILL")


@dataclass(frozen=True)
class Trial:
    """A kill and what followed."""

    stage: str
    way: str
    attempts: int  # of `dvc repro` until one ended with 0; 0: none did
    is_torn: bool  # doctor moved files of DVC aside
    different: list[str]  # files that differ from the undisturbed run
    has_traceback: bool

    @property
    def failed(self) -> bool:
        return not self.attempts or bool(self.different)


def kill(project: Project, way: str, needle: str, delay_s: float) -> str:
    """Run `dvc repro` and end it `delay_s` after a line with `needle`; what it printed."""
    process = subprocess.Popen(
        ["dvc", "repro"],
        cwd=project.folder,
        env=environment() | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A campaign in the background of a shell ignores Ctrl-C, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    lines: list[str] = []
    seen = threading.Event()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if needle in line:
                seen.set()
        seen.set()

    listener = threading.Thread(target=listen)
    listener.start()
    seen.wait(PATIENCE_S)
    time.sleep(delay_s)
    number = signal.Signals[way.split()[-1]]
    if way == "stage SIGKILL":
        for child in _children(process.pid):
            child.kill()
    else:
        _end_group(process.pid, number)
    try:
        process.wait(PATIENCE_S)
    finally:
        _end_group(process.pid, signal.SIGKILL)
        listener.join()
        assert process.stdout is not None
        process.stdout.close()
    return "".join(lines)


def _children(process_id: int) -> list[psutil.Process]:
    try:
        return psutil.Process(process_id).children(recursive=True)
    except psutil.NoSuchProcess:  # the run had ended before
        return []


def _end_group(process_id: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process_id, number)


def try_once(whole: Project, folder: Path, stage: str, rng: random.Random) -> Trial:
    """One trial in a copy of the finished project."""
    project = whole.copy(folder)
    expected = project.digests()
    project.forget(stage)
    way = rng.choice(WAYS)
    if rng.random() < 0.25:
        output = kill(project, way, "Updating lock file", rng.uniform(0, REWRITE_S))
    else:
        output = kill(project, way, f"{stage}'", rng.uniform(0, LONGEST_S))
    attempts, is_torn = 0, False
    for attempt in (1, 2):
        code, said = project.call("-m", "dvc", "repro")
        output += said
        if not code:
            attempts = attempt
            break
        is_torn |= "moved to" in project.call("-m", "l2l_core", "doctor", "--fix")[1]
    return Trial(stage, way, attempts, is_torn, project.different(expected), "Traceback" in output)


def campaign(whole: Project, kills: int, seed: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """So many trials, each stage about equally often; the row about them."""
    rng, stages = random.Random(seed), whole.stages()
    drawn = [stages[number % len(stages)] for number in range(kills)]
    rng.shuffle(drawn)
    trials = []
    for number, stage in enumerate(drawn, start=1):
        with tempfile.TemporaryDirectory() as folder:
            trials.append(trial := try_once(whole, Path(folder) / "project", stage, rng))
        verdict = f"FAILED: {trial.different[:5]}" if trial.failed else "same bytes"
        say(f"{number}/{kills} {stage}, {trial.way}: {verdict}, {trial.attempts} attempt(s)")
    return {
        "bench": "kills",
        "count": len(trials),
        "failures": sum(trial.failed for trial in trials),
        "attempts": dict(sorted(Counter(str(trial.attempts) for trial in trials).items())),
        "torn": sum(trial.is_torn for trial in trials),
        "tracebacks": sum(trial.has_traceback for trial in trials),
        "ways": dict(sorted(Counter(trial.way for trial in trials).items())),
        "stages": dict(sorted(Counter(trial.stage for trial in trials).items())),
        "seed": seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with finished_project() as whole:
        write_row(RESULTS, campaign(whole, given.kills, given.seed, partial(print, flush=True)))


if __name__ == "__main__":
    main()
