"""Time and memory of the default `dvc repro`, and of repeating it when nothing changed.

    python -m bench.default_run

Runs in a clone of this repository under bench/work/ with an empty cache; writes bench/results/default_run.jsonl.
`seconds` of the first run is wall time with all cores; `peak_rss_mb` is the largest single process.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLONE = ROOT / "bench" / "work" / "default_run"
RESULTS = ROOT / "bench" / "results" / "default_run.jsonl"
REPEATS = 5


def repro() -> tuple[float, int]:
    """Seconds of one `dvc repro`, and how many stages it ran."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    started = time.monotonic()
    done = subprocess.run(
        ["dvc", "repro"],
        cwd=CLONE,
        env={**os.environ, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    return time.monotonic() - started, done.stdout.count("Running stage")


def main() -> None:
    shutil.rmtree(CLONE, ignore_errors=True)
    subprocess.run(["git", "clone", "-q", str(ROOT), str(CLONE)], check=True)
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=CLONE, text=True).strip()
    common = {"bench": "default_run", "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}", "commit": commit}
    seconds, stages = repro()
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    rows = [{**common, "measure": "first", "seconds": round(seconds, 1), "stages": stages, "peak_rss_mb": peak_mb}]
    again = sorted(repro() for _ in range(REPEATS))
    middle = again[REPEATS // 2]
    rows.append({**common, "measure": "nothing_to_do", "seconds": round(middle[0], 2), "stages": middle[1]})
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(RESULTS.read_text(), end="")


if __name__ == "__main__":
    main()
