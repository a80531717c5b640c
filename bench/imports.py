"""What importing each stage costs, against another revision of the project, interleaved in one run.

    python -m bench.imports REVISION [--turns 5]

REVISION is a Git revision, such as the commit before a change; it is checked out under bench/work/. Each turn imports
every module once in a fresh process of either side, after one turn that fills the bytecode caches. Writes
bench/results/imports.jsonl: median CPU seconds (user and system) a module, with the interpreter's own start in them;
and from it a table of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import docs
from bench.capabilities import capabilities

ROOT = Path(__file__).resolve().parents[1]
OTHER = ROOT / "bench" / "work" / "imports"
RESULTS = ROOT / "bench" / "results" / "imports.jsonl"
DOCUMENT, MARK = ROOT / "docs" / "results.md", "imports"
MODULES = [f"stages.{path.stem}" for path in sorted((ROOT / "stages").glob("*.py")) if path.stem != "__init__"]
HELP = "-m l2l_core --help"
COMMANDS = {HELP: ["-m", "l2l_core", "--help"]} | {name: ["-c", f"import {name}"] for name in MODULES}


def cpu_seconds(command: list[str], folder: Path) -> float:
    """User and system time of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, *command], cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def short_hash(revision: str) -> str:
    return subprocess.check_output(["git", "rev-parse", "--short", revision], cwd=ROOT, text=True).strip()


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: CPU seconds of every module before and after, and the machine."""
    shown: list[list[object]] = [
        [f"`{docs.current_name(row['module'])}`", *(f"{row[key]:.2f}" for key in ("cpu_s_before", "cpu_s", "ratio"))]
        for row in rows
    ]
    first = rows[0]
    head = ["module", f"CPU s at {first['before']}", f"CPU s at {first['commit']}", "ratio"]
    return f"{docs.markdown(head, shown)}\n\nMedian of {first['turns']} turns; {first['device']}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", help="to compare with")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    before, here = short_hash(arguments.revision), short_hash("HEAD")
    shutil.rmtree(OTHER, ignore_errors=True)
    subprocess.run(["git", "clone", "-q", str(ROOT), str(OTHER)], check=True)
    subprocess.run(["git", "checkout", "-q", before], cwd=OTHER, check=True)
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in COMMANDS}
    for turn in range(1 + arguments.turns):
        for name, command in COMMANDS.items():
            for folder, times in zip((OTHER, ROOT), seconds[name], strict=True):
                took = cpu_seconds(command, folder)
                if turn:  # the first one compiles
                    times.append(took)
    common: dict[str, Any] = {"bench": "imports", "before": before, "commit": here, "turns": arguments.turns}
    rows = []
    for name, (old, new) in seconds.items():
        old_s, new_s = statistics.median(old), statistics.median(new)
        measured = {"module": name, "cpu_s_before": round(old_s, 2), "cpu_s": round(new_s, 2)}
        rows.append(common | measured | {"ratio": round(old_s / new_s, 2)} | capabilities())
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    docs.put(DOCUMENT, MARK, table(rows))
    print(RESULTS.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
