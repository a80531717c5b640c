"""Training throughput of the default network with and without bf16 and channels_last, interleaved in one run.

    python -m bench.training

Writes bench/results/training.jsonl: images per second (median over the turns) and the ratio to fp32, contiguous.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from l2l_core.config import load_params
from l2l_core.data.pairs import Batch
from l2l_core.model.losses import segmentation_loss
from l2l_core.model.segmenter import Output, Segmenter

RESULTS = Path(__file__).resolve().parent / "results" / "training.jsonl"
TURNS, STEPS = 7, 4  # each turn times STEPS steps of every setting; the first turn warms up
SENTENCE = "the small red circle on the left"


def random_batch(count: int, side_px: int, proposal_px: int) -> Batch:
    """A batch of noise with the default run's shapes."""
    return Batch(
        image=torch.randint(0, 256, (count, 3, side_px, side_px), dtype=torch.uint8),
        sentence=[SENTENCE] * count,
        prior_text=["circle small red"] * count,
        box=torch.rand(count, 4).sort(dim=1).values,
        has_box=torch.ones(count, dtype=torch.bool),
        proposal=torch.rand(count, 1, proposal_px, proposal_px),
        proposal_score=torch.ones(count),
        label=(torch.rand(count, 1, side_px, side_px) > 0.9).float(),
        keep=torch.ones(count, 1, side_px, side_px),
    )


def loss_of(output: Output, batch: Batch) -> Tensor:
    """The training loss of a batch with targets."""
    assert batch.label is not None
    assert batch.keep is not None
    return segmentation_loss(output, batch.label, batch.keep).total


def main() -> None:
    params = load_params()
    torch.manual_seed(0)
    batch = random_batch(params.train.batch_size, params.model.image_size_px, params.proposals.size_px)
    settings = list(itertools.product((False, True), (False, True)))
    networks = {}
    for bf16, channels_last in settings:
        network = Segmenter.create(params.model, [SENTENCE], seed=0)
        network.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        network = network.to(memory_format=network.memory_format)  # type: ignore[call-overload]
        networks[bf16, channels_last] = network, torch.optim.AdamW(network.parameters(), params.train.lr)
    seconds: dict[tuple[bool, bool], list[float]] = {setting: [] for setting in settings}
    for _ in range(TURNS):
        for setting, (network, optimizer) in networks.items():
            tokens = network.tokenize(batch)
            started = time.perf_counter()
            for _ in range(STEPS):
                with torch.autocast("cpu", torch.bfloat16, enabled=setting[0]):
                    output = network(batch, tokens)
                optimizer.zero_grad()
                loss_of(output, batch).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            seconds[setting].append(time.perf_counter() - started)
    plain = statistics.median(seconds[False, False][1:])
    with RESULTS.open("w", encoding="utf-8") as file:
        for (bf16, channels_last), times in seconds.items():
            row = {
                "bench": "training",
                "precision": "bf16" if bf16 else "fp32",
                "channels_last": channels_last,
                "images_per_s": round(params.train.batch_size * STEPS / statistics.median(times[1:]), 1),
                "ratio": round(plain / statistics.median(times[1:]), 2),
                "threads": torch.get_num_threads(),
                "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}",
            }
            file.write(json.dumps(row) + "\n")
    print(RESULTS.read_text(), end="")


if __name__ == "__main__":
    main()
