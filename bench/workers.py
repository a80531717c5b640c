"""Several workers: their speed beside one process, and what a killed stage with two of them leaves behind.

    python -m bench.workers [--turns 3] [--sentences 10000]
    python -m bench.workers --kills 20 [--stages proposals select predict] [--seed 0]

Both use the default dataset's tables from the first stages (bench/scale.py).

Overhead: GrabCut proposals of the tables, repeated under new ids, with one process, two, and two Ray actors, one thread
each. A turn runs each way once, in a fresh process. Wall seconds of the call, which starts and ends the workers, and
those in which Ray is imported and its cluster starts; CPU seconds of all processes, with their imports. The run ends
with an error if the ways do not give the same bytes.

Kills: `proposals`, the labeling of `select`, and `predict` with a random network, in small chunks and with two
processes. SIGKILL ends the stage with its workers, after a random number of new chunks and a random time, again and
again until it ends by itself. A trial fails unless its table has the bytes of an undisturbed run with one worker;
`rewritten` counts chunks that were stored at a kill and are not the same files later.

Appends rows to bench/results/workers.jsonl, and writes a table of docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import psutil

from bench import docs, scale

if TYPE_CHECKING:  # worker processes import this file too
    import pyarrow as pa

    from l2l_core.config import Params

ROOT = scale.ROOT
PROJECT = ROOT / "bench" / "work" / "workers"
RESULTS = ROOT / "bench" / "results" / "workers.jsonl"
DOCUMENT, MARK = ROOT / "docs" / "scale.md", "workers"
WAYS = (("local", 1), ("local", 2), ("ray", 2))
TARGET = 1.15
"""Most seconds of two Ray actors, as a multiple of those of two processes."""
CHUNK = 16
"""Sentences in a chunk of a stage that is killed."""
MOST_CHUNKS, LONGEST_S = 5, 1.0
"""A kill comes after 0 to MOST_CHUNKS new chunks and another 0 to LONGEST_S seconds."""
NUMBERS = ("seconds", "start_s", "cpu_s")
SAMPLE_S = 0.5
"""Between two looks at the processes' CPU seconds."""
PATIENCE_S = 1200
SETTINGS = ["proposals.renderer=grabcut", "proposals.ring=0.1", "proposals.core=0.0", "cluster.cpus_per_worker=1"]
SETTINGS += ["train.engine.device=cpu", "train.precision=fp32", "evaluate.batch_size=8", "model.image_size_px=64"]
TABLE, LOG = Path("table.parquet"), Path("log.txt")
"""What a child writes in the project's folder."""


# ---- the stages, in a child whose current folder is a project


def proposals(params: Params, sentences: int | None) -> pa.Table:
    """The proposals of the first sentences; None: of all."""
    import pyarrow.compute as pc

    from l2l_core.artifacts import records
    from l2l_core.core.files import scratch_folder
    from l2l_core.priors.proposals import make_proposals, render_key

    priors = records.read_table(records.PRIORS_PATH, records.PRIORS)
    refs = records.read_table(records.INDEX.refs, records.REFS, ["sent_id", "image_id"])[:sentences]
    priors = priors.filter(pc.is_in(priors["sent_id"], refs["sent_id"]))
    images = records.to_frame(records.read_table(records.INDEX.images, records.IMAGES))
    tables = [records.PRIORS_PATH, records.INDEX.refs, records.INDEX.images]
    with scratch_folder("proposals", render_key(params.proposals, tables, "cpu", params.cluster)) as folder:
        return make_proposals(priors, records.to_frame(refs), images, params.proposals, folder, "cpu", params.cluster)


def select(params: Params, _: int | None) -> pa.Table:
    """The candidate masks and features of all unlabeled sentences in round 1."""
    from dataclasses import fields

    import numpy as np
    import pyarrow as pa

    from l2l_core.core.files import scratch_folder
    from l2l_core.model.batch_predictor import BatchPredictor
    from l2l_core.pseudo_labels.features import Candidates
    from l2l_core.pseudo_labels.generate import label_key, label_unlabeled, teachers_of

    load_teachers = [partial(BatchPredictor.from_run, model) for model in teachers_of(params, 1)]
    with scratch_folder("select-1", label_key(params, 1)) as folder:
        labeled = label_unlabeled(params, load_teachers, folder)
        labels, features = labeled.take(np.arange(len(labeled.pairs)))
    columns = {
        name: [row.tobytes() for row in getattr(features, name)] for name in (f.name for f in fields(Candidates))
    }
    return pa.table(columns | {"candidates": labels.candidates})


def predict(params: Params, _: int | None) -> pa.Table:
    """The masks of all evaluated sentences by the model of round 0, with and without priors."""
    import pyarrow as pa

    from l2l_core.artifacts import records
    from l2l_core.evaluation.predict import predict as predict_masks

    with ExitStack() as until_written:
        model = records.round_folder(0) / "model"
        return pa.concat_tables(predict_masks(params, model, "round_0", [True, False], until_written))


STAGES = {"proposals": proposals, "select": select, "predict": predict}
CHUNK_SIZES = {
    "proposals": "l2l_core.priors.proposals._GRABCUT_CHUNK",
    "select": "l2l_core.model.batch_predictor.CHUNK_PAIRS",
    "predict": "l2l_core.model.batch_predictor.CHUNK_PAIRS",
}
"""Constants of the process that cuts a stage's work."""


def work(stage: str, executor: str, workers: str, sentences: str, chunk: str) -> None:
    """In a child: write TABLE, and print the seconds of the stage's function and those in which Ray starts.

    sentences: `all` or the number of the first ones. chunk: sentences of a chunk, and finished chunks stay in .scratch;
    `default`: as in a real stage.
    """
    from l2l_core.artifacts import records
    from l2l_core.config import load_params
    from l2l_core.core.files import file_sha256
    from l2l_core.workers import on_ray

    params = load_params(overrides=[*SETTINGS, f"cluster.executor={executor}", f"cluster.workers={workers}"])
    first = None if sentences == "all" else int(sentences)
    start_s: list[float] = []
    cluster = on_ray._cluster

    @contextmanager
    def timed(*arguments: Any) -> Iterator[Any]:
        before = time.perf_counter()
        with cluster(*arguments) as ray:
            start_s.append(time.perf_counter() - before)
            yield ray

    begun = time.perf_counter()
    with mock.patch.object(on_ray, "_cluster", timed):
        table = STAGES[stage](params, first) if chunk == "default" else in_chunks(stage, params, first, int(chunk))
    seconds = time.perf_counter() - begun
    records.write_table(table, TABLE, table.schema)
    found = {"sentences": len(set(table["sent_id"].to_pylist())), "seconds": round(seconds, 3)}
    found["start_s"] = round(sum(start_s), 3)
    print()
    print(json.dumps(found | {"digest": file_sha256(TABLE)[:16]}))


def in_chunks(stage: str, params: Params, first: int | None, chunk: int) -> pa.Table:
    """A stage's table, computed in chunks of so many sentences, which stay in .scratch when it ends."""
    from l2l_core.core.files import scratch_folder

    with (
        # First, since the stage's modules import the function by its name.
        mock.patch("l2l_core.core.files.scratch_folder", partial(scratch_folder, keep=True)),
        mock.patch(CHUNK_SIZES[stage], chunk),
    ):
        return STAGES[stage](params, first)


# ---- the processes


def start(folder: Path, *arguments: object) -> subprocess.Popen[bytes]:
    """A child at `work` in a separate process group, with a project as its current folder."""
    command = [sys.executable, "-m", "bench.workers", "--work", *map(str, arguments)]
    with (folder / LOG).open("wb") as log:
        return subprocess.Popen(
            command, cwd=folder, env=scale.environment(), stdout=log, stderr=log, start_new_session=True
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the child and its workers."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def measure(folder: Path, *arguments: object) -> dict[str, Any]:
    """What an undisturbed child printed, and the CPU seconds of all its processes. Raises RuntimeError if it fails."""
    process, cpu_s = start(folder, *arguments), dict[int, float]()
    try:
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                driver = psutil.Process(process.pid)
                for one in [driver, *driver.children(recursive=True)]:
                    times = one.cpu_times()
                    cpu_s[one.pid] = times.user + times.system
            time.sleep(SAMPLE_S)
    finally:
        end(process)
    said = (folder / LOG).read_text(encoding="utf-8")
    if process.returncode:
        raise RuntimeError(said)
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found | {"cpu_s": round(sum(cpu_s.values()), 2)}


def overhead(turns: int, sentences: int) -> Iterator[dict[str, Any]]:
    """A row for each turn and way. Raises RuntimeError if a table has other bytes than the first one."""
    scale.child("--build", "1")
    held = json.loads((scale.WORK / "1x" / "counts.json").read_text())
    times = math.ceil(sentences / held["sentences"])
    scale.child("--build", str(times))
    digests = set()
    for turn in range(turns):
        for executor, workers in WAYS:
            found = measure(scale.WORK / f"{times}x", "proposals", executor, workers, sentences, "default")
            digests.add(found["digest"])
            if len(digests) > 1:
                raise RuntimeError(f"{executor} {workers}: other bytes than with local 1")
            yield {"bench": "workers", "measure": "overhead", "way": f"{executor} {workers}", "turn": turn} | found


# ---- kills


def make_project() -> None:
    """The default project's data and a random network as the model of round 0, below bench/work."""
    import torch

    from l2l_core.artifacts import records
    from l2l_core.config import load_params
    from l2l_core.model.segmenter import Segmenter

    source = scale.WORK / "1x"
    shutil.rmtree(PROJECT, ignore_errors=True)
    (PROJECT / "data").mkdir(parents=True)
    shutil.copy(source / "params.yaml", PROJECT)
    for path in (source / "data").iterdir():
        (PROJECT / "data" / path.name).symlink_to(path)
    sentences = records.read_table(source / records.INDEX.refs, records.REFS, ["sentence"])["sentence"].to_pylist()
    model = load_params(PROJECT / "params.yaml", SETTINGS).model
    network = Segmenter.create(model, sentences, seed=0)
    torch.manual_seed(0)
    for parameter in network.decoder.parameters():
        # With its first weights, the network gives all sentences the same mask without a prior.
        torch.nn.init.normal_(parameter, std=0.3)
    network.save(PROJECT / records.round_folder(0) / "model")


def chunks(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each stored chunk."""
    stats = {path.name: path.stat() for path in folder.glob(".scratch/*/*.parquet")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def kill(process: subprocess.Popen[bytes], folder: Path, new_chunks: int, more_s: float) -> None:
    """SIGKILL a child some time after it has stored so many chunks, unless it ends before."""
    before, deadline = len(chunks(folder)), time.monotonic() + PATIENCE_S
    try:
        while process.poll() is None and len(chunks(folder)) < before + new_chunks and time.monotonic() < deadline:
            time.sleep(0.005)
        with suppress(subprocess.TimeoutExpired):
            process.wait(more_s)
    finally:
        end(process)


def campaign(
    folder: Path, stage: str, kills: int, seed: int, chunk: int = CHUNK, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The row of a stage after so many kills in the project `folder`."""
    rng = random.Random(seed)
    shutil.rmtree(folder / ".scratch", ignore_errors=True)
    undisturbed = measure(folder, stage, "local", 1, "all", chunk)
    expected, stored = (folder / TABLE).read_bytes(), len(chunks(folder))
    count = trials = failures = rewritten = 0
    while count < kills:
        shutil.rmtree(folder / ".scratch")
        (folder / TABLE).unlink()
        known: dict[str, tuple[int, int]] = {}
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            process = start(folder, stage, "local", 2, "all", chunk)
            if count < kills:
                kill(process, folder, rng.randint(0, MOST_CHUNKS), rng.uniform(0, LONGEST_S))
            else:
                kill(process, folder, stored + 1, 0)  # it ends before
            code, now = process.returncode, chunks(folder)
            rewritten += sum(now.get(name) != state for name, state in known.items())
            known = now
            count += code == -signal.SIGKILL
        trials += 1
        is_same = code == 0 and (folder / TABLE).read_bytes() == expected
        failures += not is_same
        error = (folder / LOG).read_text(encoding="utf-8") if code else ""
        say(f"{stage}: {count} kills, {'same bytes' if is_same else 'FAILED'}, {rewritten} chunks rewritten {error}")
    row = {"bench": "workers", "measure": "kills", "stage": stage, "count": count, "trials": trials}
    row |= {"failures": failures, "rewritten": rewritten, "sentences": undisturbed["sentences"], "chunks": stored}
    return row | {"seed": seed}


# ---- results


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: medians over the turns of the last commit that measured them, and the last kills of each stage."""
    measured = [row for row in rows if row["measure"] == "overhead"]
    killed = {row["stage"]: row for row in rows if row["measure"] == "kills"}
    return "\n\n".join([*(overhead_parts(measured) if measured else []), *(kills_parts(killed) if killed else [])])


def medians(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Way -> seconds over the turns of the last row's commit."""
    rows = [row for row in rows if row["commit"] == rows[-1]["commit"]]
    return {
        way: {name: statistics.median(row[name] for row in rows if row["way"] == way) for name in NUMBERS}
        for way in dict.fromkeys(row["way"] for row in rows)
    }


def overhead_parts(rows: list[dict[str, Any]]) -> list[str]:
    """The table of seconds, and what was measured."""
    last, found = rows[-1], medians(rows)
    shown: list[list[object]] = [
        [way, *(f"{value:.1f}" for value in took.values()), f"{took['seconds'] / found['local 2']['seconds']:.2f}"]
        for way, took in found.items()
    ]
    head = ["`executor`, `workers`", "s", "start of Ray, s", "CPU s", "times `local` with 2"]
    below = (
        f"`python -m bench.workers`: `proposals` with GrabCut, {last['sentences']:,} sentences, one thread a worker, "
        f"median of {last['turn'] + 1} turns, same bytes; {last['device']}, commit {last['commit']}."
    )
    return [docs.markdown(head, shown), below]


def kills_parts(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The table of kills by stage, and what was measured."""
    head = ["stage", "sentences", "chunks", "kills", "failures", "chunks computed twice"]
    columns = ["sentences", "chunks", "count", "failures", "rewritten"]
    shown = docs.markdown(head, [[f"`{stage}`", *map(row.get, columns)] for stage, row in rows.items()])
    commits = ", ".join(sorted({row["commit"] for row in rows.values()}))
    return [
        shown,
        f"`python -m bench.workers --kills N`: `local` with two workers, N kills a stage; commits {commits}.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=10_000)
    parser.add_argument("--kills", type=int, help="measure kills, so many for each stage, and not the overhead")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="that are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work)
        return
    from bench.capabilities import capabilities

    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    common = {"commit": commit} | capabilities()
    made: Iterator[dict[str, Any]]
    if arguments.kills:
        scale.child("--build", "1")
        make_project()
        say = partial(print, flush=True)
        made = (campaign(PROJECT, stage, arguments.kills, arguments.seed, say=say) for stage in arguments.stages)
    else:
        made = overhead(arguments.turns, arguments.sentences)
    for row in made:
        print(json.dumps(row), flush=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | common) + "\n")
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    shown = table(rows)
    docs.put(DOCUMENT, MARK, shown)
    print(shown)
    if not arguments.kills:
        found = medians([row for row in rows if row["measure"] == "overhead"])
        ratio = found["ray 2"]["seconds"] / found["local 2"]["seconds"]
        print(f"two Ray actors take {ratio:.2f} times as long as two processes; the target is at most {TARGET}")


if __name__ == "__main__":
    main()
