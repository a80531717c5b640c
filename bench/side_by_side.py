"""Two independent trainings of the default network: in turn with all threads, and beside each other with half of them.

    python -m bench.side_by_side

Writes bench/results/side_by_side.jsonl: seconds until both are trained (median over the turns, which alternate), with
and without the start of the processes, and how many times faster they are beside each other. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench.capabilities import capabilities
from bench.training import loss_of, random_batch
from l2l_core.config import load_params
from l2l_core.model.segmenter import Segmenter
from l2l_core.training.side_by_side import ParallelPlan, run_side_by_side

RESULTS = Path(__file__).resolve().parent / "results" / "side_by_side.jsonl"
TRAININGS, TURNS, STEPS = 2, 3, 40


def train(steps: int, note: Path) -> None:
    """Train on noise in fp32 with the threads of this process; writes when the first and the last step ended."""
    params = load_params()
    torch.manual_seed(0)
    batch = random_batch(params.train.batch_size, params.model.image_size_px, params.proposals.size_px)
    network = Segmenter.create(params.model, [*batch.sentence, *batch.prior_text], 0).train()
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer, tokens = torch.optim.AdamW(network.parameters(), params.train.lr), network.tokenize(batch)
    first = 0.0
    for step in range(1 + steps):  # the first one pays for whatever is made once
        if step == 1:
            first = time.time()
        optimizer.zero_grad()
        loss_of(network(batch, tokens), batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    note.write_text(json.dumps([first, time.time()]))


def measure(places: ParallelPlan) -> tuple[float, float]:
    """Seconds until all are trained, and those in which at least one took its steps."""
    with TemporaryDirectory() as folder:
        notes = [Path(folder) / str(number) for number in range(TRAININGS)]
        command = ["-m", "bench.side_by_side", "--steps", str(STEPS), "--note"]
        started = time.monotonic()
        run_side_by_side({note.name: [*command, str(note)] for note in notes}, places)
        whole = time.monotonic() - started
        spans = [json.loads(note.read_text()) for note in notes]
    if places.at_once == 1:
        return whole, sum(last - first for first, last in spans)
    return whole, max(last for _, last in spans) - min(first for first, _ in spans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="train so many steps in this process")
    parser.add_argument("--note", type=Path)
    given = parser.parse_args()
    if given.steps:
        train(given.steps, given.note)
        return
    found = capabilities()
    threads = int(str(found["cores"]))
    settings = {
        "in_turn": ParallelPlan(1, threads),
        "side_by_side": ParallelPlan(TRAININGS, max(1, threads // TRAININGS)),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
    for turn in range(TURNS):
        for name, places in settings.items():
            times[name].append(measure(places))
            print(f"turn {turn + 1} of {TURNS}: {name} {times[name][-1][0]:.1f} s", flush=True)
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    with RESULTS.open("w", encoding="utf-8") as file:
        for name, (whole, steps) in medians.items():
            row = {
                "bench": "side_by_side",
                **found,
                "setting": name,
                "trainings": TRAININGS,
                "threads_each": settings[name].threads,
                "steps": STEPS,
                "seconds": round(whole, 2),
                "step_seconds": round(steps, 2),
                "times_faster": round(medians["in_turn"][0] / whole, 2),
                "times_faster_steps": round(medians["in_turn"][1] / steps, 2),
            }
            file.write(json.dumps(row) + "\n")
            print(row)


if __name__ == "__main__":
    main()
