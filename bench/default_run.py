"""Time and memory of the default `dvc repro`, of its stages, and of repeating it when nothing changed.

    python -m bench.default_run

Runs in a clone of this repository under bench/work/ with an empty cache; writes bench/results/default_run.jsonl,
and from it a line of README.md and a table of docs/results.md.
`seconds` of the first run is wall time with all cores, `stage_seconds` of each stage; `peak_rss_mb` is the largest
single process. `policy_percent`: training of the policies, of the time of the rounds (select, retrain and crossfit).
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import docs

ROOT = Path(__file__).resolve().parents[1]
CLONE = ROOT / "bench" / "work" / "default_run"
RESULTS = ROOT / "bench" / "results" / "default_run.jsonl"
README = ROOT / "README.md"
DOCUMENT = ROOT / "docs" / "results.md"
MARK = "default_run"
REPEATS = 5
OF_ROUNDS = ("select@", "retrain@", "crossfit@")


@dataclass(frozen=True)
class Repro:
    """One `dvc repro`."""

    seconds: float
    stage_seconds: dict[str, float]  # of the stages that ran, from one's start to the next one's
    policy_seconds: float  # of all policies, as the stage `select` says


def repro() -> Repro:
    """Run it and watch what it prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    started, starts, policy = time.monotonic(), [], 0.0
    with subprocess.Popen(["dvc", "repro"], cwd=CLONE, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"Running stage '(?:.*:)?(.+)'", line):
                starts.append((found[1], time.monotonic()))
            if found := re.search(r"policy trained in ([\d.]+) s", line):
                policy += float(found[1])
    if process.returncode:
        raise SystemExit(f"dvc repro in {CLONE} ended with {process.returncode}")
    ended = time.monotonic()
    bounds = [*(start for _, start in starts), ended]
    stages = {name: round(bounds[i + 1] - start, 1) for i, (name, start) in enumerate(starts)}
    return Repro(ended - started, stages, policy)


def line(rows: list[dict[str, Any]]) -> str:
    """What README.md says of it."""
    first, nothing = rows
    minutes, memory_gib = first["seconds"] / 60, first["peak_rss_mb"] / 1024
    return (
        f"The pipeline took {minutes:.1f} minutes and {memory_gib:.1f} GiB ({first['device']}), "
        f"and {nothing['seconds']:.1f} s where nothing had changed (`python -m bench.default_run`)."
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Seconds of the stages of the first run, and the policies' share."""
    first = rows[0]
    stages = docs.markdown(["stage", "s"], [[name, f"{took:.1f}"] for name, took in first["stage_seconds"].items()])
    share = f"Training the policies took {first['policy_percent']} % of the rounds (select, retrain, crossfit)"
    return f"{stages}\n\n{share}; {first['device']}, commit {first['commit']}."


def main() -> None:
    shutil.rmtree(CLONE, ignore_errors=True)
    subprocess.run(["git", "clone", "-q", str(ROOT), str(CLONE)], check=True)
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=CLONE, text=True).strip()
    common = {"bench": "default_run", "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}", "commit": commit}
    first = repro()
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    rounds = sum(seconds for name, seconds in first.stage_seconds.items() if name.startswith(OF_ROUNDS))
    rows = [
        {
            **common,
            "measure": "first",
            "seconds": round(first.seconds, 1),
            "stages": len(first.stage_seconds),
            "peak_rss_mb": peak_mb,
            "policy_percent": round(100 * first.policy_seconds / rounds, 1),
            "stage_seconds": first.stage_seconds,
        }
    ]
    again = sorted((repro() for _ in range(REPEATS)), key=lambda run: run.seconds)
    middle = again[REPEATS // 2]
    rows.append(
        {
            **common,
            "measure": "nothing_to_do",
            "seconds": round(middle.seconds, 2),
            "stages": len(middle.stage_seconds),
        }
    )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    docs.put(README, MARK, line(rows))
    docs.put(DOCUMENT, MARK, table(rows))
    print(RESULTS.read_text(), end="")


if __name__ == "__main__":
    main()
