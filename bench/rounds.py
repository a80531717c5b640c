"""Does self-evolution pay? mIoU from supervised-only to warm-up to each round, `reinforce` beside `all`, several seeds.

    python -m bench.rounds [--seeds 0 1 2] [--workers 2]      (about 2 hours on two cores)
    python -m bench.rounds --table                            (the table of the stored results again)

Every run is `dvc repro` of the default configuration in a clone of this repository under bench/work/, with `seed` and
`select.policy` changed; a run that is repeated resumes from DVC's cache. Results go to bench/results/rounds.jsonl, one
JSON object a method, split and seed; their table is printed and written into README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import pandas as pd
import yaml

from bench.docs import markdown, put
from l2l_core import records
from l2l_core.evaluation import method_scores

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "bench" / "work" / "rounds"
RESULTS = ROOT / "bench" / "results" / "rounds.jsonl"
RUNS = ("reinforce", "all", "none", "fully_supervised")
ORDER = ("prior", "supervised", "warmup", "none", "all", "reinforce", "fully_supervised")
STORE = Lock()


def changes_of(run: str, params: dict[str, Any]) -> dict[str, Any]:
    """What a run changes in params.yaml. `none` retrains on the labels alone, for as many steps as a round."""
    match run:
        case "fully_supervised":
            return {
                "round": 0,
                "split": {**params["split"], "labeled_fraction": 1.0},
                "warmup": {**params["warmup"], "steps": params["retrain"]["steps"]},
            }
        case "none":
            return {"round": 1, "select": {**params["select"], "policy": "none"}}
        case policy:
            return {"select": {**params["select"], "policy": policy}}


def run_seed(seed: int, threads: int, runs: list[str]) -> None:
    """All runs of one seed in one clone, so that they share priors and warm-up; each is stored when it is done."""
    clone = WORK / f"seed_{seed}"
    if not clone.exists():
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    defaults = yaml.safe_load(subprocess.check_output(["git", "show", "HEAD:params.yaml"], cwd=clone))
    for run in runs:
        params = {**defaults, "seed": seed, **changes_of(run, defaults)}
        (clone / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
        seconds = timed_repro(clone, environment, WORK / f"seed_{seed}_{run}")
        store(read_run(clone, run, params, seconds, threads))
        print(f"seed {seed}: {run} done", flush=True)


def store(rows: list[dict[str, Any]]) -> None:
    """Put rows into the results in place of older ones of the same run."""
    with STORE:
        lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
        kept = [json.loads(line) for line in lines]
        new = {(row["run"], row["seed"]) for row in rows}
        kept = sorted([row for row in kept if (row["run"], row["seed"]) not in new] + rows, key=_place)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return RUNS.index(row["run"]), row["seed"], row["split"], row["round"], row["method"]


def timed_repro(clone: Path, environment: dict[str, str], note: Path) -> int:
    """Run what is stale; wall seconds of all the calls that it took, which a note keeps across restarts."""
    known, log = note.with_suffix(".seconds"), note.with_suffix(".log")
    before = int(known.read_text()) if known.exists() else 0
    started = time.monotonic()
    with log.open("w") as file:
        subprocess.run(["dvc", "repro"], cwd=clone, env=environment, stdout=file, stderr=file, check=True)
    if "Running stage" in log.read_text():
        before += round(time.monotonic() - started)
        known.write_text(str(before))
    return before


def read_run(clone: Path, name: str, params: dict[str, Any], seconds: int, threads: int) -> list[dict[str, Any]]:
    """The scores of every method of one run; what does not depend on the policy comes from the `reinforce` run."""
    table = records.to_frame(records.read_table(clone / records.PER_SENTENCE_PATH, records.PER_SENTENCE))
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=clone, text=True).strip()
    rows = []
    for split, part in table.groupby("split", sort=False):
        for method, scores in method_scores(part).items():
            number = int(method.split("_")[1]) if method.startswith("round_") else None
            if name == "fully_supervised":
                if method != "round_0":
                    continue
                label = name
            elif not number:
                if name != "reinforce":
                    continue
                label = method.replace("round_0", "warmup")
            else:
                label = name + method.removeprefix(f"round_{number}")
            rows.append(
                {
                    "run": name,
                    "method": label,
                    "dataset": f"refshapes-{_dataset_version(clone)}",
                    "labeled_fraction": params["split"]["labeled_fraction"],
                    "prior": params["priors"]["preset"],
                    "seed": params["seed"],
                    "round": number or 0,
                    "split": split,
                    "miou": scores["miou"],
                    "oiou": scores["oiou"],
                    "pr50": scores["pr50"],
                    "steps": params["retrain" if number else "warmup"]["steps"] if method != "prior" else 0,
                    "seconds": seconds,
                    "device": f"cpu, {threads} thread{'s' * (threads > 1)}, {platform.machine()}",
                    "commit": commit,
                }
            )
    return rows


def _dataset_version(clone: Path) -> str:
    return str(json.loads((clone / "metrics" / "evaluate.json").read_text())["dataset_version"])


def table(rows: pd.DataFrame) -> str:
    """Markdown: mean over the seeds, smallest and largest, of mIoU and oIoU, for each method."""
    body: list[list[object]] = []
    shown = rows[rows["method"].isin(ORDER)]
    for (method, number), group in sorted(
        shown.groupby(["method", "round"]), key=lambda item: (ORDER.index(item[0][0]), item[0][1])
    ):
        cells: list[object] = [method.replace("_", " "), number, group["seed"].nunique()]
        for split in ("val", "test"):
            part = group[group["split"] == split]
            cells.append(f"{part['miou'].mean():.1f} ({part['miou'].min():.1f} to {part['miou'].max():.1f})")
            cells.append(f"{part['oiou'].mean():.1f}")
        body.append(cells)
    return markdown(["method", "round", "seeds", "val mIoU (min to max)", "val oIoU", "test mIoU", "test oIoU"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="seeds that run side by side, one thread each")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--table", action="store_true", help="only make the table of the stored results")
    arguments = parser.parse_args()
    if not arguments.table:
        WORK.mkdir(parents=True, exist_ok=True)
        threads = max(1, (os.cpu_count() or 1) // arguments.workers)
        with ThreadPoolExecutor(arguments.workers) as pool:
            list(pool.map(lambda seed: run_seed(seed, threads, arguments.runs), arguments.seeds))
    text = table(pd.read_json(RESULTS, lines=True))
    print(text)
    put(ROOT / "README.md", "rounds", text)


if __name__ == "__main__":
    main()
