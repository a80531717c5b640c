"""`dvc repro` with a line before each stage: how many stages are done, and about how long the others take.

The time left is the sum of the estimates of preflight/estimate.py at REFERENCE costs. Each estimate is scaled by the
measured-to-estimated ratio of the finished stages of its kind, or, if none is finished, of all finished stages that
depend on the device's speed. Before that, and while a stage without an estimate is left, no time is shown.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field

from dvc.cli import DvcParserError
from dvc.cli.parser import get_main_parser
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

from l2l_core.artifacts import records
from l2l_core.config import Params, load_params
from l2l_core.errors import InputError, L2LError
from l2l_core.preflight.doctor import refuse_torn_dvc_files
from l2l_core.preflight.estimate import Costs, Counts, Sizes, plan

REFERENCE = Costs(
    start_s=1.0,
    network_start_s=6.0,
    read_s=1.0,
    decode_s=0.0,  # included in the steps and in the queries
    proposal_s=0.0003,
    step_s=0.1,
    predict_s=0.002,
    label_s=0.004,
    mask_s=0.0003,
    policy_step_s=0.05,
)
"""Seconds of the default run on two cores (bench/results/default_run.jsonl). Only their ratios matter: finished stages
set the scale."""
BUILTIN_QUERY_S, EVALUATE_S, REPORT_S = 0.02, 2.7, 7.2
"""The same for stages that `check` does not estimate; the first is per sentence of the built-in model."""

TRAININGS = ("warmup", "crossfit-0", "crossfit", "retrain", "distill")
COMPUTES = ("query", "training", "predict", "select")
"""Kinds of stages whose speed depends on the device."""

STARTS = re.compile(rb"Running stage '(?:[^']*:)?([^':]+)'")
ENDS = re.compile(rb"Stage '(?:[^']*:)?([^':]+)' (?:didn't change, skipping|is cached - skipping run)")


def kind_of(stage: str) -> str:
    """Stages of one kind do the same work: warmup -> training, select@2 -> select, predict-distilled -> predict."""
    name = stage.partition("@")[0]
    return "training" if name in TRAININGS else name.partition("-")[0]


def seconds_left(left: Sequence[str], expected: Mapping[str, float | None], took: Mapping[str, float]) -> float | None:
    """Seconds for the stages `left`; None if unknown.

    expected: seconds of each stage at REFERENCE; took: measured seconds of the finished stages.
    """
    ours, theirs = defaultdict[str, float](float), defaultdict[str, float](float)
    for name, seconds in took.items():
        if reference := expected.get(name):
            ours[kind_of(name)] += seconds
            theirs[kind_of(name)] += reference
    known = [kind for kind in COMPUTES if theirs[kind]]
    if not known:
        return None
    overall = sum(ours[kind] for kind in known) / sum(theirs[kind] for kind in known)
    total = 0.0
    for name in left:
        reference, kind = expected.get(name), kind_of(name)
        if reference is None:
            return None
        total += reference * (ours[kind] / theirs[kind] if theirs[kind] else overall)
    return total


def reference_seconds() -> dict[str, float | None]:
    """Seconds of each stage at REFERENCE costs; empty before the split is drawn, which sets the amount of work."""
    try:
        params = load_params()
        roles = Counter(records.read_table(records.SPLIT_PATH, records.SPLIT, ["role"])["role"].to_pylist())
    except L2LError:  # DVC's own stages report the error
        return {}
    counts = Counts(roles.total(), roles["labeled"], roles["unlabeled"], roles["eval"], 0, 0, 0)
    stages = plan(params, counts, REFERENCE, Sizes(0, 0, None), draws_refshapes=params.uses_builtin_dataset)
    found = {stage.name: stage.seconds for stage in stages}
    return found | _not_estimated(params, counts)


def _not_estimated(params: Params, counts: Counts) -> dict[str, float | None]:
    found: dict[str, float | None] = {"evaluate": EVALUATE_S, "report": REPORT_S}
    if params.priors.uses_builtin_mllm:
        found["query"] = counts.sentences * BUILTIN_QUERY_S
    return found


@dataclass
class Progress:
    """State of a run, derived from the lines that DVC prints."""

    stages: list[str]  # all stages that DVC checks, in its order
    expected: Callable[[], Mapping[str, float | None]] = reference_seconds
    clock: Callable[[], float] = time.monotonic
    seen: list[str] = field(default_factory=list)
    took: dict[str, float] = field(default_factory=dict)
    running: tuple[str, float] | None = None  # name and start time

    def before(self, line: bytes) -> str | None:
        """What to print before a line of DVC: progress if the line starts a stage, else None."""
        started, skipped = STARTS.match(line), ENDS.match(line)
        if not (started or skipped):
            return None
        now = self.clock()
        if self.running:
            name, since = self.running
            self.took[name], self.running = now - since, None
        if skipped:
            self._see(skipped[1].decode())
            return None
        assert started
        name = started[1].decode()
        done = len(self.seen) - (name in self.seen)
        self._see(name)
        self.running = name, now
        if name not in self.stages:
            return None
        left = [name, *(other for other in self.stages if other not in self.seen)]
        seconds = seconds_left(left, self.expected(), self.took)
        time_left = "" if seconds is None else f", {_about(seconds)} left"
        return f"[{done}/{len(self.stages)} stages{time_left}] {name}"

    def _see(self, name: str) -> None:
        if name in self.stages and name not in self.seen:
            self.seen.append(name)


def _about(seconds: float) -> str:
    """About 6 min; less than a minute."""
    minutes = round(seconds / 60)
    if minutes >= 120:
        return f"about {minutes / 60:.0f} h"
    return f"about {minutes} min" if minutes else "less than a minute"


def _parse(arguments: Sequence[str]) -> argparse.Namespace | None:
    """Options of `dvc repro`; None, without any output, if it only prints its help or rejects the options."""
    logging.disable()  # DVC's log keeps the stderr of its import time
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return get_main_parser().parse_args(["repro", *arguments])
    except (DvcParserError, SystemExit):
        return None
    finally:
        logging.disable(logging.NOTSET)


def planned_stages(arguments: Sequence[str]) -> list[str]:
    """Names of the stages that `dvc repro` with these arguments checks, in its order; none if it rejects them.

    Data files that DVC tracks (`.dvc`) have no command to run and are left out. Raises InputError if a file of DVC is
    torn.
    """
    parsed = _parse(arguments)
    if parsed is None:
        return []
    try:
        with Repo() as repo:
            refuse_torn_dvc_files(repo)
            graph = get_active_graph(repo.index.graph)
            targets = parsed.targets or ["dvc.yaml"]
            stages = None if parsed.all_pipelines else collect_stages(repo, targets, parsed.recursive, parsed.glob)
            if not parsed.single_item:
                stages = plan_repro(graph, stages, pipeline=parsed.pipeline, downstream=parsed.downstream)
            return [stage.addressing.rpartition(":")[2] for stage in stages or [] if stage.cmd]
    except DvcException:  # `dvc repro` itself reports it
        return []


def reproduce(arguments: Sequence[str]) -> int:
    """Run `dvc repro`, pass its output on unchanged with a line before each stage, and return its exit code.

    DVC and its stages form a separate process group. Ctrl-C, SIGTERM and SIGHUP go to the whole group, so that no stage
    keeps running; the last lines and the exit code are still passed on.

    Raises InputError for `--interactive`.
    """
    parsed = _parse(arguments)
    if parsed and parsed.interactive:
        raise InputError("run: --interactive: DVC cannot ask here; leave it out, or use dvc repro --interactive")
    command = [sys.executable, "-m", "dvc", "repro", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # stages write into a pipe: their lines must not be buffered
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,  # a background group is stopped if it reads from the terminal
        stdout=subprocess.PIPE,
        process_group=0,
    ) as process:

        def forward(signal_number: int, _: object) -> None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal_number)

        for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signal_number, forward)
        progress = Progress(planned_stages(arguments))  # while DVC itself starts
        assert process.stdout is not None
        for line in process.stdout:
            if said := progress.before(line):
                print(said, flush=True)
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
    return process.returncode if process.returncode >= 0 else 128 - process.returncode
