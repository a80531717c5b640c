"""Which selection of pseudo-labels pays: methods x shares of labels x priors x seeds.

    python -m bench.label_efficiency [--rates 0.05] [--presets llava-1.5-7b] [--seeds 0 1 2] [--methods all reinforce]
                                     [--rounds 1] [--workers 2] [--threads 1]
    python -m bench.label_efficiency --full      (every rate and preset)
    python -m bench.label_efficiency --table     (only tables and plots of the stored results)

Every call writes tables and pictures into README.md, docs/results.md and docs/images/ at its end.

A run is `dvc repro evaluate` of params.yaml with the settings of bench/benchmark.yaml and the changes of SELECTION or
ROUND_0, in a clone of this repository's HEAD under bench/work/. The clones share one cache: data, priors, warm-up and
fold teachers are made once for each rate, preset and seed. What is stored is not run again; after a kill the
same call goes on.

bench/results/label_efficiency.jsonl holds a JSON object for each method, rate, preset, seed, round and split:

    method, round, split            round 0 where nothing was selected
    labeled_fraction, prior, seed   share of the training images that is labeled (1.0: all), preset, seed
    miou, oiou, pr50                of `split` in percent, run with priors (`supervised`: trained and run without)
    no_prior_miou                   the same model run without priors; none of the prior itself
    distilled_miou                  of the last round: the model distilled from it, which runs without priors
    lost_objects, lost_borders      points that miou lacks of 100, in sentences below and above an IoU of 0.5
    auroc .. foreground_error_kept  of the round's pseudo-labels, against the truth that no model saw: see
                                    l2l_core/evaluation/label_quality.py (there miou_*, here label_miou_*)
    steps                           that trained the model
    seconds                         wall time of the run's last call, in which the cache supplied what was known
    edition, dataset, device, commit  see EDITION; missing in the first

and bench/results/label_efficiency_curves.jsonl the curves of each round: how many of the most trusted labels are good
(coverage, precision), how often accept_prob comes true (prob, share, count), in percent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any, get_args

import pandas as pd
import yaml

from bench import label_efficiency_page
from bench.capabilities import gpu
from bench.label_efficiency_page import FULLY_SUPERVISED, ROUND_0, WARMUP
from bench.params import BENCHMARK, EDITION, merged
from bench.vlm import MODEL
from l2l_core.artifacts import records
from l2l_core.config import PriorsParams
from l2l_core.core.files import exclusive_lock
from l2l_core.core.metrics import POSITIVE_IOU
from l2l_core.errors import InputError
from l2l_core.evaluation.evaluate import CURVES_FOLDER, DISTILLED, method_scores

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "bench" / "work" / "label_efficiency"
RESULTS = ROOT / "bench" / "results" / "label_efficiency.jsonl"
CURVES = ROOT / "bench" / "results" / "label_efficiency_curves.jsonl"

RATES = (0.01, 0.05, 0.1)
"""The label shares of the field's tables."""
PRESETS = ("llava-1.5-7b", "qwen2.5-vl-7b")
"""The weakest and the strongest of the simulated priors."""
BUILTIN = "refshapes-vlm"
"""Priors of the model that comes with the project."""

SELECTION: dict[str, dict[str, Any]] = {
    "all": {"select": {"method": "all"}},
    "threshold_0.7": {"select": {"method": "threshold", "pixel_threshold": 0.7}},
    "threshold_0.95": {"select": {"method": "threshold", "pixel_threshold": 0.95}},
    "topk": {"select": {"method": "topk"}},
    "agreement": {"select": {"method": "agreement"}},
    "ranksum": {"select": {"method": "ranksum"}},
    "semires": {"select": {"method": "semires"}},
    "mean_teacher": {"select": {"method": "mean_teacher"}},
    "reinforce": {"select": {"method": "reinforce"}},
    # Selection without construction, and construction without learnt selection.
    "reinforce_teacher_only": {"select": {"method": "reinforce", "candidates": ["teacher"]}},
    "ranksum_sharpened": {"select": {"method": "ranksum", "candidates": ["sharpened"]}},
    # At about the share of labels that `reinforce` accepts.
    "ranksum_overlap": {"select": {"method": "ranksum", "candidates": ["overlap"], "keep_fraction": 0.75}},
    "agreement_overlap": {"select": {"method": "agreement", "candidates": ["overlap"], "keep_fraction": 0.75}},
    # Two passes over every pair; `evolved`: also trained on proposals that are fused with the round's pseudo-labels.
    "reinforce_two_passes": {"retrain": {"num_passes": 2}},
    "all_two_passes": {"select": {"method": "all"}, "retrain": {"num_passes": 2}},
    "reinforce_evolved": {"retrain": {"evolve_proposals": True, "num_passes": 2}},
    # Random weights at the start of a round; every sample with its own prior.
    "reinforce_from_scratch": {"retrain": {"start": "scratch"}},
    "reinforce_no_swap": {"retrain": {"prior_swap": 0.0}},
    # Fold teachers that train longer after a round; and, at the same cost, that label the images they never saw.
    "reinforce_long_folds": {"select": {"fold_update_steps": 500}},
    "reinforce_cross_label": {"select": {"fold_update_steps": 500, "cross_label": True}},
    # Bounds that read the truth: of the teacher's masks those above an IoU of 0.5; the best of all candidates.
    "oracle": {"select": {"method": "oracle", "candidates": ["teacher"]}},
    "oracle_constructed": {"select": {"method": "oracle"}},
}
"""Methods that select in `--rounds` rounds, and what each changes in params.yaml."""

METHODS = (*ROUND_0, *SELECTION)

LABEL_SCORES = {
    "auroc": "auroc",
    "coverage": "coverage",
    "precision": "precision",
    "label_miou_all": "miou_all",
    "label_miou_accepted": "miou_accepted",
    "label_miou_prior": "miou_prior",
    "label_miou_fused": "miou_fused",
    "pixel_error_all": "pixel_error_all",
    "pixel_error_kept": "pixel_error_kept",
    "foreground_error_all": "foreground_error_all",
    "foreground_error_kept": "foreground_error_kept",
}
"""Keys of a row, and what `evaluation.label_quality` calls them."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where a benchmark works, and where it stores its rows."""

    work: Path
    results: Path
    curves: Path
    data: Path | None = None  # its folders are copied into data/ of every clone


BENCH = Bench(WORK, RESULTS, CURVES)


@dataclass(frozen=True)
class Run:
    """One configuration of the pipeline."""

    method: str  # of METHODS
    rate: float
    preset: str
    seed: int
    rounds: int  # 0 for the methods of ROUND_0

    def __str__(self) -> str:
        rounds = f"_rounds_{self.rounds}" if self.rounds else ""
        return f"{self.method}_{self.rate:g}_{self.preset}_seed_{self.seed}{rounds}"

    @property
    def start(self) -> Run:
        """The run that makes what this one starts from."""
        return replace(self, method=WARMUP, rounds=0)

    @property
    def results(self) -> dict[str, tuple[str, int]]:
        """Method in the evaluation -> method and round of the row that it gives."""
        if self.method in ROUND_0:
            return {scored: (name, 0) for scored, name in ROUND_0[self.method].items()}
        return {f"round_{number}": (self.method, number) for number in range(1, self.rounds + 1)}

    @property
    def settings(self) -> dict[str, Any]:
        """Sections that replace those of params.yaml in every run."""
        return BENCHMARK

    @property
    def prior_settings(self) -> dict[str, Any]:
        """Sections that make the priors of `preset`."""
        simulated = {"backend": "simulated", "preset": self.preset, "seed": self.seed}
        return {"priors": MODEL if self.preset == BUILTIN else simulated}

    def rows(self, folder: Path, params: dict[str, Any]) -> list[Row]:
        """What the evaluation of this run below `folder` gives, without the keys of the measurement itself."""
        return read_scores(folder, self, params)

    def params(self, defaults: dict[str, Any]) -> dict[str, Any]:
        """The content of params.yaml, made from the revision's own."""
        defaults = merged(defaults, self.settings)
        steps = defaults["warmup"]["steps"]
        if self.method not in (WARMUP, *SELECTION):  # as many as the warm-up and a round together
            steps += defaults["retrain"]["steps"]
        common = {
            "seed": self.seed,
            "round": self.rounds,
            "split": {"labeled_fraction": self.rate},
            "warmup": {"steps": steps},
        }
        if not self.rounds:  # the distilled model gives no row
            common["distill"] = {"steps": 1}
        return merged(merged(merged(defaults, common), self.prior_settings), SELECTION.get(self.method, {}))


def planned(
    methods: Sequence[str],
    rates: Sequence[float],
    presets: Sequence[str],
    seeds: Sequence[int],
    rounds: int,
    make: Callable[..., Run] = Run,
) -> list[Run]:
    """Every run that is asked for, the seeds of a method beside each other. All labels are one rate of their own."""
    runs = (
        make(method, 1.0 if method == FULLY_SUPERVISED else rate, preset, seed, 0 if method in ROUND_0 else rounds)
        for preset in presets
        for rate in rates
        for method in methods
        for seed in seeds
    )
    return list(dict.fromkeys(runs))


def missing(runs: Iterable[Run], rows: Iterable[Row]) -> list[Run]:
    """The runs of which no row of this EDITION is stored."""
    stored = {(r["method"], r["round"], r["labeled_fraction"], r["prior"], r["seed"]) for r in rows if is_comparable(r)}
    return [
        run
        for run in runs
        if any((*result, run.rate, run.preset, run.seed) not in stored for result in run.results.values())
    ]


def stored(path: Path) -> list[Row]:
    """The rows of a results file; none where it does not exist."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def is_comparable(row: Row) -> bool:
    """Whether a row is of the current edition. Rows of the first edition do not name theirs."""
    return bool(row.get("edition", 1) == EDITION)


STORE = Lock()


def store(path: Path, new: Sequence[Row]) -> None:
    """Put rows into a results file in place of older ones of the same key and of all earlier editions, in one step."""
    with STORE:
        rows = {_key(row): row for row in [*filter(is_comparable, stored(path)), *new]}
        whole = path.with_suffix(".new")
        whole.write_text("".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)), encoding="utf-8")
        whole.replace(path)


def _key(row: Row) -> tuple[Any, ...]:
    return row["prior"], row["labeled_fraction"], row["method"], row["round"], row["seed"], row.get("split", "")


@dataclass
class Workers:
    """Clones in which runs are done side by side, a thread each."""

    bench: Bench
    count: int
    commit: str  # of this repository, that runs
    threads: int  # of each
    defaults: dict[str, Any] = field(init=False)
    clones: SimpleQueue[Path] = field(init=False, default_factory=SimpleQueue)  # those that are free
    processes: set[subprocess.Popen[bytes]] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.commit = subprocess.check_output(["git", "rev-parse", self.commit], cwd=ROOT, text=True).strip()
        text = subprocess.check_output(["git", "show", f"{self.commit}:params.yaml"], cwd=ROOT)
        self.defaults = yaml.safe_load(text)
        for number in range(self.count):
            clone = self.bench.work / f"worker_{number}"
            if not clone.exists():
                subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
            subprocess.run(["git", "fetch", "-q"], cwd=clone, check=True)
            subprocess.run(["git", "reset", "-q", "--hard", self.commit], cwd=clone, check=True)
            self._call(clone, "dvc", "config", "--local", "cache.dir", str(self.bench.work / "cache"))
            for folder in self.bench.data.iterdir() if self.bench.data else ():
                shutil.copytree(folder, clone / "data" / folder.name, dirs_exist_ok=True)
            self.clones.put(clone)

    def do(self, runs: Sequence[Run]) -> list[Run]:
        """Do runs, the first ones first, and store each; returns those that failed."""
        failed = []
        with ThreadPoolExecutor(self.count) as pool:
            started = {pool.submit(self._do, run): run for run in runs}
            try:
                for done, future in enumerate(as_completed(started), start=1):
                    outcome = future.result()
                    print(f"{time.strftime('%H:%M')} {done}/{len(runs)} {started[future]}: {outcome}", flush=True)
                    if outcome.startswith("failed"):
                        failed.append(started[future])
            except BaseException:  # Ctrl-C, kill: what runs must not stay behind, its clone would be locked
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.processes):
                    os.killpg(process.pid, signal.SIGTERM)
                raise
        return failed

    def _do(self, run: Run) -> str:
        """Do a run in a free clone and store it; says how it went."""
        clone, log = self.clones.get(), self.bench.work / "logs" / f"{run}.log"
        try:
            params = run.params(self.defaults)
            (clone / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
            started = time.monotonic()
            targets = ["evaluate", "stages/dvc.yaml:crossfit-0"] if run.method == WARMUP else ["evaluate"]
            self._call(clone, "dvc", "repro", *targets, log=log)
            seconds = round(time.monotonic() - started)
            ran = "Running stage" in log.read_text(encoding="utf-8")
            if run.method == WARMUP and not ran and not missing([run], stored(self.bench.results)):
                return "known"  # the others start from it: only made sure that it is there
            common = {
                "edition": EDITION,
                "seconds": seconds,
                "device": gpu() or f"cpu, {self.threads} thread{'s' * (self.threads > 1)}, {platform.machine()}",
                "commit": self.commit[:7],
            }
            store(self.bench.results, [row | common for row in run.rows(clone, params)])
            store(self.bench.curves, read_curves(clone, run))
            return f"{seconds} s"
        except Exception:  # whatever happened to one run, the others go on
            with log.open("a", encoding="utf-8") as file:
                traceback.print_exc(file=file)
            return f"failed, see {log.relative_to(ROOT)}"
        finally:
            self.clones.put(clone)

    def _call(self, clone: Path, *command: str, log: Path | None = None) -> None:
        """Run a command in a clone, in a process group of its own."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        with (log or Path(os.devnull)).open("wb") as out:
            process = subprocess.Popen(command, cwd=clone, env=environment, stdout=out, stderr=out, process_group=0)
            self.processes.add(process)
            code = process.wait()
            self.processes.discard(process)
        if code:
            raise subprocess.CalledProcessError(code, command)


def _place(run: Run) -> Row:
    return {"labeled_fraction": run.rate, "prior": run.preset, "seed": run.seed}


def read_scores(folder: Path, run: Run, params: dict[str, Any]) -> list[Row]:
    """The rows of a run from what its evaluation wrote below `folder`, without the keys of the measurement itself."""
    table = records.to_frame(records.read_table(folder / records.PER_SENTENCE_PATH, records.PER_SENTENCE))
    metrics = json.loads((folder / records.METRICS_PATH).read_text(encoding="utf-8"))
    rows = []
    for split, part in table.groupby("split", sort=False):
        scores = method_scores(part)
        for scored, (method, number) in run.results.items():
            # The supervised model always runs without a prior.
            without_prior = scores.get(scored if scored == "supervised" else f"{scored}_no_prior", {})
            row: Row = {"method": method, "round": number, "split": split} | _place(run)
            row |= {name: scores[scored][name] for name in ("miou", "oiou", "pr50")}
            row["no_prior_miou"] = without_prior.get("miou")
            row |= lost_points(part.loc[part["method"] == scored, "iou"])
            if number:
                row |= {key: metrics.get(f"pseudo_round_{number}_{name}") for key, name in LABEL_SCORES.items()}
                row["distilled_miou"] = scores[DISTILLED]["miou"] if number == run.rounds else None
            row["steps"] = 0 if scored == "prior" else trained_steps(params, number)
            row["dataset"] = f"{Path(params['dataset']).name}-{metrics['dataset_version']}"
            rows.append(row)
    return rows


def trained_steps(params: dict[str, Any], number: int) -> int:
    """Steps that the weights of a round have had; those of the warm-up count where a round goes on from them."""
    if not number:
        return int(params["warmup"]["steps"])
    goes_on = params["retrain"]["start"] == "teacher" or params["select"]["method"] == "mean_teacher"
    return int(params["warmup"]["steps"] * goes_on + params["retrain"]["steps"] * (number if goes_on else 1))


def lost_points(iou: pd.Series) -> dict[str, float]:
    """Points that mIoU lacks of 100: in sentences below POSITIVE_IOU (mostly another object) and above (borders)."""
    wrong = iou < POSITIVE_IOU
    loss = 100 * (1 - iou.astype(float))
    return {
        "lost_objects": round(float((loss * wrong).mean()), 2),
        "lost_borders": round(float((loss * ~wrong).mean()), 2),
    }


def read_curves(folder: Path, run: Run) -> list[Row]:
    """A row for each round of selection."""
    rows = []
    for method, number in run.results.values():
        if number:
            coverage, reliability = (
                pd.read_csv(folder / CURVES_FOLDER / kind / f"round_{number}.csv")
                for kind in ("coverage", "reliability")
            )
            columns = coverage.to_dict("list") | reliability.to_dict("list")
            rows.append({"method": method, "round": number, "edition": EDITION} | _place(run) | columns)
    return rows


def measure(bench: Bench, runs: Sequence[Run], workers: int, threads: int, again: bool, commit: str) -> list[Run]:
    """Do the runs that are not stored (all of them: `again`), what they start from before them; returns the failed."""
    wanted = list(runs) if again else missing(runs, stored(bench.results))
    # All warm-ups before all else, so that no two workers train the same one.
    starts = list(dict.fromkeys(run.start for run in wanted if run.method in (WARMUP, *SELECTION)))
    print(f"{len(wanted)} of {len(runs)} runs to do, {len(starts)} starting points", flush=True)
    if not wanted:
        return []
    (bench.work / "logs").mkdir(parents=True, exist_ok=True)
    busy = InputError(f"another call of this bench works in {bench.work.relative_to(ROOT)}")
    with exclusive_lock(bench.work / "lock", busy):
        farm = Workers(bench, workers, commit, threads)
        failed = farm.do(starts)
        rest = [run for run in wanted if run.method != WARMUP]
        blocked = [run for run in rest if run.method in SELECTION and run.start in failed]
        return [*failed, *blocked, *farm.do([run for run in rest if run not in blocked])]


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def make_parser(description: str | None, rate: float, methods: Sequence[str], rounds: int) -> argparse.ArgumentParser:
    """The arguments that benchmarks share, with these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[rate])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods))
    parser.add_argument("--rounds", type=int, default=rounds, help="of selection; each of them gives rows")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side; they share the cores")
    parser.add_argument("--threads", type=int, help="of each worker; its share of the cores unless given")
    parser.add_argument("--commit", default="HEAD", help="of this repository, that runs")
    parser.add_argument("--again", action="store_true", help="also runs whose rows are stored")
    parser.add_argument("--table", action="store_true", help="only make tables and plots of the stored results")
    return parser


def carry_out(bench: Bench, runs: Sequence[Run], arguments: argparse.Namespace) -> list[Run]:
    """Do the runs that are not stored, as the arguments say; returns the failed. Raises SystemExit when stopped."""
    signal.signal(signal.SIGTERM, _stop)
    threads = arguments.threads or max(1, (os.cpu_count() or 1) // arguments.workers)
    try:
        return measure(bench, runs, arguments.workers, threads, arguments.again, arguments.commit)
    except InputError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same call goes on") from None


def main() -> None:
    parser = make_parser(__doc__, 0.05, METHODS, 1)
    presets = (*get_args(PriorsParams.model_fields["preset"].annotation), BUILTIN)
    parser.add_argument("--presets", nargs="+", choices=presets, default=[PRESETS[0]])
    parser.add_argument("--full", action="store_true", help=f"rates {RATES}, presets {PRESETS}")
    arguments = parser.parse_args()
    failed: list[Run] = []
    if not arguments.table:
        rates, chosen = (RATES, PRESETS) if arguments.full else (arguments.rates, arguments.presets)
        runs = planned(arguments.methods, rates, chosen, arguments.seeds, arguments.rounds)
        failed = carry_out(BENCH, runs, arguments)
    rows = stored(RESULTS)
    if rows:
        label_efficiency_page.write(pd.DataFrame(rows), pd.DataFrame(stored(CURVES)))
        print("tables and pictures: README.md, docs/results.md, docs/images/")
    if failed:
        raise SystemExit("failed or not started: " + ", ".join(map(str, failed)))


if __name__ == "__main__":
    main()
