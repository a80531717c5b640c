"""Labeling with an image encoded once, against once for every sentence and view, interleaved in one run.

    python -m bench.encode_once

Writes bench/results/encode_once.jsonl: CPU seconds a sentence (median over the turns) and the ratio, for the tiny
network at 96 px and one with a backbone of the size of Swin-T at 480 px. Weights are random, images are noise.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoBackbone, SwinConfig

from bench.capabilities import capabilities
from l2l_core.config import load_params
from l2l_core.data.augment import mirror
from l2l_core.data.pairs import BatchMaker
from l2l_core.model import batch_predictor
from l2l_core.model.batch_predictor import BatchPredictor, bare_pairs
from l2l_core.model.segmenter import Segmenter

RESULTS = Path(__file__).resolve().parent / "results" / "encode_once.jsonl"
SENTENCES_PER_IMAGE = 7  # RefCOCO has 7.1
SENTENCE = "the small red circle on the left"


def save_swin_t(folder: Path) -> str:
    """A backbone of the size of Swin-T with random weights, as a folder that `model.image_encoder` may name."""
    config = SwinConfig(out_features=["stage1", "stage2", "stage3", "stage4"], drop_path_rate=0.0)
    AutoBackbone.from_config(config).save_pretrained(folder)
    return str(folder)


def once_a_view(predictor: BatchPredictor, batches: BatchMaker, batch_size: int) -> Iterator[torch.Tensor]:
    """Every sentence and view goes through the whole network."""
    for rows in np.split(np.arange(len(batches.pairs)), range(batch_size, len(batches.pairs), batch_size)):
        batch = batches(rows)
        yield predictor.logits(batch)
        yield predictor.logits(mirror(batch))
        yield predictor.logits(batches(rows, None, np.ones(len(rows), dtype=bool)))


def measure(name: str, encoder: str, size_px: int, images: int, batch_size: int, turns: int) -> dict[str, object]:
    """A row of the results."""
    params = load_params()
    model = params.model.model_copy(update={"image_encoder": encoder, "image_size_px": size_px})
    predictor = BatchPredictor.of(
        Segmenter.create(model, [SENTENCE], 0), params.train.model_copy(update={"precision": "fp32"})
    )
    count = images * SENTENCES_PER_IMAGE
    pairs = bare_pairs([""] * count, [(size_px, size_px)] * count, [SENTENCE] * count, params.proposals.size_px)
    pairs.image_row[:] = np.arange(count) // SENTENCES_PER_IMAGE
    batches = BatchMaker(pairs, size_px, params.proposals.flat_prob)
    noise = np.random.default_rng(0).integers(0, 256, (images, size_px, size_px, 3), dtype=np.uint8)
    batch_predictor.IMAGES_AT_ONCE = images  # no filler: so few would otherwise be filled up
    batches.images._cache.update(enumerate(noise))  # instead of files
    ways: dict[str, Callable[[], object]] = {
        "once_a_view": lambda: list(once_a_view(predictor, batches, batch_size)),
        "once": lambda: list(predictor.views(batches, batch_size, name)),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns):
        for way, label in ways.items():
            started = time.process_time()
            label()
            seconds[way].append((time.process_time() - started) / count)
    old, new = (statistics.median(seconds[way]) for way in ways)
    return {
        "bench": "encode_once",
        "network": name,
        "image_px": size_px,
        "sentences_per_image": SENTENCES_PER_IMAGE,
        "images": images,
        "cpu_s_per_sentence_before": round(old, 4),
        "cpu_s_per_sentence": round(new, 4),
        "ratio": round(old / new, 2),
        "turns": turns,
        "threads": torch.get_num_threads(),
        **capabilities(),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            measure("tiny", "tiny", 96, images=16, batch_size=28, turns=5),
            measure("Swin-T", save_swin_t(Path(folder)), 480, images=2, batch_size=14, turns=1),
        ]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
