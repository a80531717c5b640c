"""Time and memory of the default `dvc repro`, of its stages, and of repeating it when nothing changed; its scores.

    python -m bench.default_run [--commit REV] [-S section.key=value ...]
    python -m bench.default_run --table      (only the texts of the stored rows)

Runs in a clone of this repository under bench/work/ with an empty cache, at HEAD or at another revision (`--commit`),
with params.yaml as it is there or with changes (`-S`, as of `dvc exp run`). Adds two rows to
bench/results/default_run.jsonl, or replaces those of the same commit, settings and machine. On each machine, the latest
commit's rows without settings are part of a line of README.md; beside the oldest commit's rows on the same machine they
make a table of docs/results.md, which also has the scores of other seeds (`-S seed=1`).

    measure                first: from an empty cache; nothing_to_do: again, when nothing changed
    seconds                wall time
    cpu_seconds            user and system time of all processes
    stage_seconds          wall time from a stage's start to the next one's
    stage_cpu_seconds      user and system time of a stage's processes
    peak_rss_mb            of the largest single process
    policy_percent         training of the policies, of the time of the rounds (select, retrain and crossfit)
    val_miou, val_miou_*   percent: of the last round; of the priors' proposals, the supervised model, each round,
                           the last round without priors, and the distilled model
    settings, environment  `-S`, and the variables that decide about threads and instructions
    committed              when, by which rows are ordered
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from dvc.utils.hydra import apply_overrides

from bench import docs
from bench.capabilities import capabilities

ROOT = Path(__file__).resolve().parents[1]
CLONE = ROOT / "bench" / "work" / "default_run"
RESULTS = ROOT / "bench" / "results" / "default_run.jsonl"
README = ROOT / "README.md"
DOCUMENT = ROOT / "docs" / "results.md"
MARK = "default_run"
REPEATS = 5
OF_ROUNDS = ("select@", "retrain@", "crossfit@")
SPEED_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")

SCORES = {
    "val_miou_proposal": "proposals",
    "val_miou_warmup": "warm-up",
    "val_miou": "last round",
    "val_miou_distilled": "distilled, without priors",
}
"""Keys of a row that README.md shows, and what it calls them."""

SEED = re.compile(r"seed=\d+")

Row = dict[str, Any]


@dataclass(frozen=True)
class Repro:
    """One `dvc repro`."""

    seconds: float
    cpu_seconds: float
    stage_seconds: dict[str, float]  # of the stages that ran, from one's start to the next one's
    stage_cpu_seconds: dict[str, float]
    policy_seconds: float  # of all policies, as the stage `select` says


def repro(folder: Path) -> Repro:
    """Run it and watch what it prints."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's first run caches bytecode for the later stages
    before = _reaped_cpu_s()
    started, marks, policy = time.monotonic(), [], 0.0
    with subprocess.Popen(["dvc", "repro"], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        watched = psutil.Process(process.pid)
        for line in process.stdout:
            if found := re.match(r"Running stage '(?:.*:)?(.+)'", line):
                marks.append((found[1], time.monotonic(), _stages_cpu_s(watched)))
            if found := re.search(r"policy trained in ([\d.]+) s", line):
                policy += float(found[1])
        ended = time.monotonic(), _stages_cpu_s(watched)
    if process.returncode:
        raise SystemExit(f"dvc repro in {folder} ended with {process.returncode}")
    bounds = [*(mark[1:] for mark in marks), ended]
    return Repro(
        seconds=ended[0] - started,
        cpu_seconds=_reaped_cpu_s() - before,
        stage_seconds={name: round(bounds[i + 1][0] - wall, 1) for i, (name, wall, _) in enumerate(marks)},
        stage_cpu_seconds={name: round(bounds[i + 1][1] - cpu, 1) for i, (name, _, cpu) in enumerate(marks)},
        policy_seconds=policy,
    )


def _reaped_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _stages_cpu_s(process: psutil.Process) -> float:
    """Of the stages that DVC has waited for; DVC's own time, which includes hashing, is not part of it."""
    times = process.cpu_times()
    return times.children_user + times.children_system


def prepare(revision: str, overrides: Sequence[str]) -> tuple[str, str]:
    """A fresh clone at a revision with changed parameters; its short commit, and when it was committed (ISO 8601)."""
    shutil.rmtree(CLONE, ignore_errors=True)
    full = subprocess.check_output(["git", "rev-parse", f"{revision}^{{commit}}"], cwd=ROOT, text=True).strip()
    subprocess.run(["git", "clone", "-q", "--no-checkout", str(ROOT), str(CLONE)], check=True)
    subprocess.run(["git", "checkout", "-q", "--detach", full], cwd=CLONE, check=True)
    if overrides:
        apply_overrides(str(CLONE / "params.yaml"), list(overrides))
    shown = ["git", "show", "--no-patch", "--format=%h %cI", full]
    commit, committed = subprocess.check_output(shown, cwd=CLONE, text=True).split()
    return commit, committed


def measure(revision: str, overrides: Sequence[str]) -> list[Row]:
    """The rows of one revision: its first run, and repeating it."""
    commit, committed = prepare(revision, overrides)
    common = {
        "bench": "default_run",
        "commit": commit,
        "committed": committed,
        "settings": " ".join(overrides),
        "environment": " ".join(f"{name}={os.environ[name]}" for name in SPEED_VARIABLES if name in os.environ),
        **capabilities(),
    }
    first = repro(CLONE)
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    rounds = sum(seconds for name, seconds in first.stage_seconds.items() if name.startswith(OF_ROUNDS))
    scores = read_scores(json.loads((CLONE / "metrics" / "evaluate.json").read_text(encoding="utf-8")))
    middle = sorted((repro(CLONE) for _ in range(REPEATS)), key=lambda run: run.seconds)[REPEATS // 2]
    return [
        {
            **common,
            "measure": "first",
            "seconds": round(first.seconds, 1),
            "cpu_seconds": round(first.cpu_seconds, 1),
            "stages": len(first.stage_seconds),
            "peak_rss_mb": peak_mb,
            "policy_percent": round(100 * first.policy_seconds / rounds, 1) if rounds else 0.0,
            **scores,
            "stage_seconds": first.stage_seconds,
            "stage_cpu_seconds": first.stage_cpu_seconds,
        },
        {
            **common,
            "measure": "nothing_to_do",
            "seconds": round(middle.seconds, 2),
            "cpu_seconds": round(middle.cpu_seconds, 2),
            "stages": len(middle.stage_seconds),
        },
    ]


def read_scores(metrics: dict[str, float]) -> Row:
    """The mIoU of val that metrics/evaluate.json holds, by the names of a row."""
    names = {"prior": "proposal", "supervised": "supervised", "round_0": "warmup"}
    names |= {f"round_{k}": f"round_{k}" for k in range(1, 9)} | {"no_prior": "no_prior", "distilled": "distilled"}
    found = {f"val_miou_{name}": metrics.get(f"val_{key}_miou") for key, name in names.items()}
    return {"val_miou": metrics["val_miou"]} | {name: value for name, value in found.items() if value is not None}


def stored() -> list[Row]:
    """All rows, in the order in which they were measured."""
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.exists() else []


def with_new(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Rows with new ones at the end, in the place of older ones of the same commit, settings and machine."""
    kept = {_key(row) for row in new}
    return [*(row for row in rows if _key(row) not in kept), *new]


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row.get(name, "") for name in ("commit", "settings", "environment", "device", "measure"))


def machines(rows: Sequence[Row]) -> list[str]:
    """Devices with rows without settings, that of the youngest commit first; without early rows, which have no date."""
    plain = [row for row in rows if row["measure"] == "first" and not row.get("settings") and "committed" in row]
    ordered = sorted(plain, key=lambda row: row["committed"], reverse=True)
    return list(dict.fromkeys(row["device"] for row in ordered))


def latest(rows: Sequence[Row], device: str, measure: str = "first") -> Row:
    """Of a machine's rows without settings, that of the youngest commit; of several, the one measured last."""
    plain = [row for row in rows if row["measure"] == measure and row["device"] == device and not row.get("settings")]
    return max(enumerate(plain), key=lambda pair: (pair[1].get("committed", ""), pair[0]))[1]


def before(rows: Sequence[Row], after: Row) -> list[Row]:
    """First runs of the oldest commit that was measured on the machine of `after`, with all settings; may be none."""
    alike = [row for row in rows if row["measure"] == "first" and row["device"] == after["device"]]
    older = [row for row in alike if row.get("committed", "") < after.get("committed", "")]
    oldest = min((row.get("committed", "") for row in older), default="")
    return [row for row in older if row.get("committed", "") == oldest]


def line(rows: Sequence[Row]) -> str:
    """What README.md says of it: time on each machine, and the scores of the youngest commit."""
    runs = [latest(rows, device) for device in machines(rows)]
    took = " or ".join(
        f"{run['seconds'] / 60:.1f} minutes and {run['peak_rss_mb'] / 1024:.1f} GiB of memory ({run['device']}; "
        f"commit {run['commit']})"
        for run in runs
    )
    first = runs[0]
    nothing = latest(rows, first["device"], "nothing_to_do")
    scores = ", ".join(f"{name} {first[key]:.1f}" for key, name in SCORES.items() if key in first)
    text = (
        f"After the installation, the first run took {took}. A rerun without changes took {nothing['seconds']:.1f} s "
        f"(`python -m bench.default_run`). mIoU on val: {scores}."
    )
    whole = text.replace("python -m ", "python\0-m\0")  # a command stays on one line
    return textwrap.fill(whole, 120, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def table(rows: Sequence[Row]) -> str:
    """The tables of each machine, that of the youngest commit first."""
    return "\n\n".join(machine_table(rows, device) for device in machines(rows))


def machine_table(rows: Sequence[Row], device: str) -> str:
    """Seconds of the stages, before and after with their ratio; then totals, scores and the policies' share."""
    after = latest(rows, device)
    old = before(rows, after)
    runs = [*old, after]
    stages = [{docs.current_name(name): one for name, one in run["stage_seconds"].items()} for run in runs]
    names = list(dict.fromkeys(name for seconds in (stages[-1], *stages) for name in seconds))
    body: list[list[object]] = [
        [name, *_compared([seconds.get(name) for seconds in stages], len(old))] for name in names
    ]
    body.append(["all, wall time", *_compared([run["seconds"] for run in runs], len(old))])
    if any("cpu_seconds" in run for run in runs):
        body.append(["all, CPU time", *_compared([run.get("cpu_seconds") for run in runs], len(old))])
    head = ["stage", *(f"{_named(run)}, s" for run in runs), *(f"{_named(run)} / {_named(after)}" for run in old)]
    text = f"**{device}**\n\n{docs.markdown(head, body)}"
    scored = [*runs, *other_seeds(rows, device)]
    scores = list(dict.fromkeys(key for run in scored for key in run if key.startswith("val_miou_")))
    if scores:
        head = ["val mIoU", *(key.removeprefix("val_miou_").replace("_", " ") for key in scores)]
        values: list[list[object]] = [
            [_named(run), *("" if key not in run else f"{run[key]:.1f}" for key in scores)] for run in scored
        ]
        text += f"\n\n{docs.markdown(head, values)}"
    share = f"Training the policies took {after['policy_percent']} % of the rounds (select, retrain, crossfit)"
    return f"{text}\n\n{share}; commit {after['commit']}."


def other_seeds(rows: Sequence[Row], device: str) -> list[Row]:
    """A machine's first runs that differ from the default in the seed alone: the youngest of each."""
    found: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.get("committed", "")):
        if row["measure"] == "first" and row["device"] == device and SEED.fullmatch(row.get("settings", "")):
            found[row["settings"]] = row
    return [row for _, row in sorted(found.items())]


def _named(run: Row) -> str:
    return " ".join(filter(None, (run["commit"], run.get("settings"))))


def _compared(seconds: list[float | None], count: int) -> list[object]:
    """Cells of a row: seconds of every run, then the ratios of the first `count` runs to the last."""
    last = seconds[-1]
    ratios = [f"{one / last:.2f}" if one is not None and last else None for one in seconds[:count]]
    return [*(None if one is None else f"{one:.1f}" for one in seconds), *ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="HEAD", metavar="REV", help="of this repository, that runs")
    parser.add_argument("-S", "--set-param", action="append", default=[], metavar="KEY=VALUE", help="as of dvc exp run")
    parser.add_argument("--table", action="store_true", help="only write the texts of the stored rows")
    arguments = parser.parse_args()
    rows = stored()
    if not arguments.table:
        new = measure(arguments.commit, arguments.set_param)
        rows = with_new(rows, new)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print("\n".join(json.dumps(row) for row in new))
    docs.put(README, MARK, line(rows))
    docs.put(DOCUMENT, MARK, table(rows))


if __name__ == "__main__":
    main()
