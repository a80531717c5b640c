"""How long a training step waits for its batch, without and with data workers, at full size's 480 px.

    python -m bench.data_workers [--networks tiny swin-b] [--turns 2] [--threads 2]

Photos of 640 x 480 pixels are decoded for every sample, as if the cache of images had no room: those of the folder
L2L_REAL_DATA, else noise. Swin-B and BERT-base have random weights. Each turn trains once in a fresh process for every
number of workers. The first step is left out. Writes bench/results/data_workers.jsonl, a row a network and number of
workers, with medians over the turns: milliseconds a sample, the share of the time in which the training waited for a
batch, and the milliseconds that a sample's data takes in the training process; and from it a table of
docs/full_size.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from bench import docs

if TYPE_CHECKING:
    from l2l_core.data.pairs import Pairs, Targets

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "bench" / "work" / "data_workers"
RESULTS = ROOT / "bench" / "results" / "data_workers.jsonl"
DOCUMENT, MARK = ROOT / "docs" / "full_size.md", "data_workers"
SIZE_PX, PROPOSAL_PX = 480, 120
WORKERS = (0, 1, 2)
STEPS = {"tiny": (8, 6), "swin-b": (2, 3)}
"""Network -> samples of a step, and steps, of which the first is not timed."""


def photo_pairs() -> tuple[Pairs, Targets]:
    """A pair for each true mask of the photos."""
    import numpy as np

    from bench.tables import drawn_photos, real_photos
    from l2l_core.core.masks import segmentation_to_rle
    from l2l_core.data.pairs import Pairs, Targets

    real = os.environ.get("L2L_REAL_DATA")
    photos = real_photos(Path(real)) if real else drawn_photos(WORK / "photos")
    chosen = [
        (row, segmentation_to_rle(one, photo.height, photo.width))
        for row, photo in enumerate(photos)
        for one in photo.segmentations
    ]
    count = len(chosen)
    rng = np.random.default_rng(0)
    pairs = Pairs(
        sent_id=np.arange(count),
        sentence=["the large thing on the left"] * count,
        prior_text=["large thing"] * count,
        image_row=np.array([row for row, _ in chosen]),
        image_path=[str(photo.path) for photo in photos],
        image_hw=np.array([(photo.height, photo.width) for photo in photos]),
        box=np.sort(rng.random((count, 4), np.float32).reshape(count, 2, 2), axis=1).reshape(count, 4),
        has_box=np.ones(count, bool),
        proposal=rng.integers(0, 256, (count, PROPOSAL_PX, PROPOSAL_PX), np.uint8),
        proposal_score=np.ones(count, np.float32),
        predicted_iou=np.zeros(count, np.float32),
    )
    return pairs, Targets([rle for _, rle in chosen])


def work(network: str, workers: int) -> None:
    """In a separate process: train, and print the seconds of the timed steps and those in which training waited."""
    from bench.gpu import FULL, save_encoders
    from l2l_core.config import load_params
    from l2l_core.data.pairs import BatchMaker
    from l2l_core.model.segmenter import Segmenter
    from l2l_core.training import loop, streams
    from l2l_core.training.workers import StepBatches, batches_of_steps

    batch_size, steps = STEPS[network]
    overrides = [f"model.image_size_px={SIZE_PX}", f"train.batch_size={batch_size}", f"proposals.size_px={PROPOSAL_PX}"]
    params = load_params(ROOT / "params.yaml", overrides=overrides)
    model = params.model
    if network == "swin-b":
        folder = WORK / "swin-b"
        if not (folder / "bert" / "config.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            save_encoders(folder, FULL)
        encoders = {"image_encoder": str(folder / "swin"), "text_encoder": str(folder / "bert")}
        model = model.model_copy(update=encoders | {"dim": 256, "guidance_tokens": 16})
    pairs, targets = photo_pairs()
    waits, started = [], []

    def timed(made: StepBatches, left: range, count: int) -> Iterator[Any]:
        source = batches_of_steps(made, left, count)
        for _ in left:
            before = time.perf_counter()
            found = next(source)
            waits.append(time.perf_counter() - before)
            started.append(before)
            yield found

    engine = params.train.engine.model_copy(update={"workers": workers, "device": "cpu"})
    settings = params.train.model_copy(update={"engine": engine, "precision": "fp32"})
    segmenter = Segmenter.create(model, pairs.sentence, 0)
    stream = streams.Stream(BatchMaker(pairs, SIZE_PX, params.proposals.flat_prob), targets, 1.0)
    with mock.patch.object(loop, "batches_of_steps", timed), mock.patch.object(streams, "IMAGE_CACHE_BYTES", 0):
        loop.train(segmenter, [stream], steps, settings, seed=0, run_name="bench")
    print()
    print(json.dumps({"seconds": time.perf_counter() - started[1], "waited": sum(waits[1:])}))


def measure(network: str, workers: int, threads: int) -> tuple[float, float]:
    """Seconds of the timed steps in a fresh process, and those in which training waited."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "bench.data_workers", "--work", network, str(workers)]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["seconds"], found["waited"]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: time and share of waiting by network and number of workers."""
    shown: list[list[object]] = [
        [row["network"], row["workers"], f"{row['sample_ms']:,.0f}", f"{row['data_ms']:.0f}", f"{row['waited']:.1f}"]
        for row in rows
    ]
    first = rows[0]
    head = ["network", "workers", "ms a sample", "of it waiting for data", "waiting, %"]
    return (
        f"{docs.markdown(head, shown)}\n\n{first['threads']} threads, median of {first['turns']} turns; "
        f"{first['data']}; {first['device']}, commit {first['commit']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work[0], int(arguments.work[1]))
        return
    from bench.capabilities import capabilities

    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    data = "photos of RefCOCO" if os.environ.get("L2L_REAL_DATA") else "noise"
    common = {"threads": arguments.threads, "turns": arguments.turns, "data": data, "commit": commit} | capabilities()
    settings = [(network, workers) for network in arguments.networks for workers in WORKERS]
    found: dict[tuple[str, int], list[tuple[float, float]]] = {setting: [] for setting in settings}
    for _ in range(arguments.turns):
        for (network, workers), measured in found.items():
            measured.append(measure(network, workers, arguments.threads))
            print(network, workers, *(f"{value:.2f} s" for value in measured[-1]), flush=True)
    rows = []
    for (network, workers), measured in found.items():
        batch_size, steps = STEPS[network]
        samples = batch_size * (steps - 1)
        row = {"bench": "data_workers", "network": network, "workers": workers, "batch_size": batch_size}
        row["sample_ms"] = round(1000 * statistics.median(seconds for seconds, _ in measured) / samples, 1)
        row["data_ms"] = round(1000 * statistics.median(waited for _, waited in measured) / samples, 2)
        row["waited"] = round(100 * statistics.median(waited / seconds for seconds, waited in measured), 2)
        rows.append(row | common)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    docs.put(DOCUMENT, MARK, table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
