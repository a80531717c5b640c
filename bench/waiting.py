"""What waiting threads and emulated bf16 cost a training step and a request of `query`, alone and near a busy process.

    python -m bench.waiting [--turns 5] [--threads 2]

Default network and RefShapes-VLM as params.yaml has them, on the CPU. Each turn runs every setting once in a fresh
process: threads that spin while they wait (active), sleep at once (passive) or after a short spin (brief, the default),
alone or beside one process that keeps a core busy, in fp32; and in bf16, alone. Writes
bench/results/waiting.jsonl, a row a setting: medians over the turns of wall and CPU milliseconds an image or a request;
and from it a table of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import docs
from l2l_core.core.threads import SPIN_COUNT

if TYPE_CHECKING:  # imports torch
    from l2l_core.core.device import Precision

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "waiting.jsonl"
DOCUMENT, MARK = ROOT / "docs" / "results.md", "waiting"
BUSY = [sys.executable, "-c", "while True: pass"]
RESPONSE_TOKENS = 48
"""A response to the prompt has about so many."""


WAITS = {
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
    "brief": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(SPIN_COUNT)},
}


@dataclass(frozen=True)
class Setting:
    """One way to do the work."""

    work: str  # training, query
    wait: str  # one of WAITS
    neighbor: str  # none, busy
    precision: Precision


KINDS = ("training", "query")
SETTINGS = [
    *(Setting(kind, wait, neighbor, "fp32") for kind in KINDS for neighbor in ("none", "busy") for wait in WAITS),
    *(Setting(kind, "brief", "none", "bf16") for kind in KINDS),
]


def training(precision: Precision) -> tuple[Callable[[], object], int]:
    """One step of the default network, and its images."""
    import torch

    from bench.training import SENTENCE, loss_of, random_batch
    from l2l_core.config import load_params
    from l2l_core.core.device import autocast
    from l2l_core.model.segmenter import Segmenter

    params = load_params()
    torch.manual_seed(0)
    batch = random_batch(params.train.batch_size, params.model.image_size_px, params.proposals.size_px)
    network = Segmenter.create(params.model, [SENTENCE], seed=0)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), params.train.lr)
    tokens = network.tokenize(batch)

    def step() -> None:
        with autocast(torch.device("cpu"), precision):
            output = network(batch, tokens)
        optimizer.zero_grad()
        loss_of(output, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step, params.train.batch_size


def query(precision: Precision) -> tuple[Callable[[], object], int]:
    """One batch of requests to RefShapes-VLM, and their number."""
    import numpy as np
    from PIL import Image

    from l2l_core.config import load_params
    from l2l_core.mllm.engine import Request
    from l2l_core.mllm.engine_transformers import TransformersEngine
    from l2l_core.mllm.prompt import prompt_text

    priors = load_params().priors
    engine = priors.engine.model_copy(update={"device": "cpu"})
    model = TransformersEngine(priors.model_copy(update={"precision": precision, "engine": engine}))
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    text = prompt_text(priors.prompt, "the small red circle on the left", "percent")
    requests = [Request(Image.fromarray(pixels), text, None, 0.0, 0, RESPONSE_TOKENS)] * engine.batch_size
    return lambda: model.generate(requests), len(requests)


WORKS = {"training": training, "query": query}


def work(setting: Setting, times: int) -> None:
    """In a separate process: print wall and CPU milliseconds an image or request."""
    step, count = WORKS[setting.work](setting.precision)
    step()  # pays for what is made once
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps([1000 * seconds / (times * count) for seconds in (wall, cpu)]))


def measure(setting: Setting, threads: int, times: int) -> tuple[float, float]:
    """Wall and CPU milliseconds an image or request, in a fresh process."""
    others = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")}
    environment = others | WAITS[setting.wait] | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "bench.waiting", "--work", json.dumps([vars(setting), times])]
    with subprocess.Popen(BUSY) if setting.neighbor == "busy" else nullcontext() as neighbor:
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, check=True)
        finally:
            if neighbor is not None:
                neighbor.kill()
    wall, cpu = json.loads(done.stdout.splitlines()[-1])
    return wall, cpu


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: every setting, and the machine."""
    shown: list[list[object]] = [
        [
            docs.current_name(row["work"]),
            *(row[key] for key in ("precision", "wait", "neighbor")),
            *(f"{row[key]:.1f}" for key in ("wall_ms", "cpu_ms")),
        ]
        for row in rows
    ]
    head = ["work", "precision", "waiting", "neighbor", "wall ms", "CPU ms"]
    first = rows[0]
    return (
        f"{docs.markdown(head, shown)}\n\nPer image (training) or request (query), {first['threads']} threads, "
        f"median of {first['turns']} turns; {first['device']}, commit {first['commit']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--times", type=int, default=3, help="steps or batches that a turn measures")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        setting, times = json.loads(arguments.work)
        work(Setting(**setting), times)
        return
    from bench.capabilities import capabilities

    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    found: dict[Setting, list[tuple[float, float]]] = {setting: [] for setting in SETTINGS}
    for _ in range(arguments.turns):
        for setting, measured in found.items():
            measured.append(measure(setting, arguments.threads, arguments.times))
            print(setting, *(f"{value:.1f} ms" for value in measured[-1]), flush=True)
    common = {"threads": arguments.threads, "turns": arguments.turns, "commit": commit} | capabilities()
    rows = [
        {"bench": "waiting", **vars(setting)}
        | {
            name: round(statistics.median(values), 2)
            for name, values in zip(("wall_ms", "cpu_ms"), zip(*measured, strict=True), strict=True)
        }
        | common
        for setting, measured in found.items()
    ]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    docs.put(DOCUMENT, MARK, table(rows))
    print(RESULTS.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
