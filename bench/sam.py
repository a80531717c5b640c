"""The renderer `sam` with an image encoded once for its sentences, against once for every sentence, interleaved.

    python -m bench.sam [--turns 3]

Weights are random and images are noise: only the time counts. Each sentence has a box. "Once for every sentence" is the
same renderer on an index in which every sentence has an image row of its own. On a CPU, a small SAM (6 layers of 192
channels, 512 px) keeps the run short; on a GPU it is SAM's ViT-B at 1,024 px. Writes bench/results/sam.jsonl (rows of
other devices stay): images a second, by CPU time on a CPU and by the clock on a GPU, medians over the turns; and from
it a table of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from PIL import Image
from transformers import SamConfig, SamImageProcessorPil, SamModel, SamProcessor

from bench import docs
from bench.capabilities import capabilities
from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.model.sam import load_sam
from l2l_core.priors.proposals import make_proposals

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "sam.jsonl"
DOCUMENT, MARK = ROOT / "docs" / "results.md", "sam"
SENTENCES_PER_IMAGE = 7  # RefCOCO has 7.1
HW = (480, 640)
SMALL_PX = 512
SMALL: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "mlp_dim": 768,
    "image_size": SMALL_PX,
}
SMALL |= {"global_attn_indexes": [2, 5], "window_size": 14}


def save_model(folder: Path, *, small: bool) -> str:
    """A SAM with random weights, as a folder that `proposals.model` may name."""
    if small:
        prompts = {"image_size": SMALL_PX, "image_embedding_size": SMALL_PX // 16}
        config = SamConfig(vision_config=SMALL, prompt_encoder_config=prompts)
        square = {"height": SMALL_PX, "width": SMALL_PX}
        images = SamImageProcessorPil(size={"longest_edge": SMALL_PX}, pad_size=square)
    else:
        config, images = SamConfig(), SamImageProcessorPil()
    torch.manual_seed(0)
    SamModel(config).save_pretrained(folder)
    SamProcessor(images).save_pretrained(folder)
    return str(folder)


def index(folder: Path, count: int, *, shared: bool) -> tuple[pa.Table, pd.DataFrame, pd.DataFrame]:
    """Priors, sentences and images of `count` images; shared: the sentences of an image share its row."""
    rng = np.random.default_rng(0)
    sent_id = np.arange(count * SENTENCES_PER_IMAGE)
    file = [str(folder / f"{number // SENTENCES_PER_IMAGE}.png") for number in sent_id]
    for name in dict.fromkeys(file):
        Image.fromarray(rng.integers(0, 256, (*HW, 3), dtype=np.uint8)).save(name)
    corner = rng.uniform(0, 0.5, (len(sent_id), 2)) * HW[::-1]
    boxes = np.concatenate([corner, corner + rng.uniform(0.1, 0.5, (len(sent_id), 2)) * HW[::-1]], axis=1)
    rows = [{"sent_id": k, "sample_index": 0, "bbox": box} for k, box in enumerate(boxes.tolist())]
    images = pd.DataFrame({"image_id": sent_id, "file_name": file, "height": HW[0], "width": HW[1]})
    image_id = sent_id // SENTENCES_PER_IMAGE * SENTENCES_PER_IMAGE if shared else sent_id
    return pa.Table.from_pylist(rows, records.PRIORS), pd.DataFrame({"sent_id": sent_id, "image_id": image_id}), images


def measure(count: int, turns: int) -> dict[str, Any]:
    """A row of the results."""
    on_gpu = torch.cuda.is_available()
    clock: Callable[[], float] = time.perf_counter if on_gpu else time.process_time
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = save_model(folder / "model", small=not on_gpu)
        proposals = load_params().proposals.model_copy(update={"renderer": "sam", "model": model})
        ways = {name: index(folder, count, shared=name == "once") for name in ("once", "every_sentence")}
        sam = load_sam(model, "auto", "priors.engine.device")
        encoded = sam.encode([np.zeros((*HW, 3), np.uint8)])  # pays for what is made once
        assert encoded
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        found: dict[str, pa.Table] = {}
        for _ in range(turns):
            for name, tables in ways.items():
                started = clock()
                found[name] = make_proposals(*tables, proposals)
                seconds[name].append((clock() - started) / count)
    once, every = (
        np.stack([np.frombuffer(soft, np.uint8) for soft in found[name]["soft"].to_pylist()]) for name in ways
    )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    return {
        "bench": "sam",
        "model": "ViT-B" if on_gpu else "small",
        "image_px": 1024 if on_gpu else SMALL_PX,
        "precision": sam.precision,
        "sentences_per_image": SENTENCES_PER_IMAGE,
        "images": count,
        "turns": turns,
        "time": "clock" if on_gpu else "CPU",
        "images_per_s_every_sentence": round(1 / medians["every_sentence"], 3),
        "images_per_s": round(1 / medians["once"], 3),
        "ratio": round(medians["every_sentence"] / medians["once"], 2),
        "largest_difference": int(np.abs(once.astype(int) - every.astype(int)).max()),  # of the maps, in 255ths
        "threads": torch.get_num_threads(),
        "commit": commit,
        **capabilities(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row per device."""
    shown: list[list[object]] = [
        [
            f"{row['model']}, {row['image_px']} px, {row['precision']}",
            f"{row['images_per_s_every_sentence']:.2f}",
            f"{row['images_per_s']:.2f}",
            f"{row['ratio']:.1f}",
            f"{row['time']} time, {row['images']} images, {row['turns']} turns; {row['device']}; {row['commit']}",
        ]
        for row in rows
    ]
    return docs.markdown(["SAM, random weights", "once for every sentence", "once", "ratio", "measured"], shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--images", type=int, help="default: 2 on a CPU, 64 on a GPU")
    arguments = parser.parse_args()
    row = measure(arguments.images or (64 if torch.cuda.is_available() else 2), arguments.turns)
    stored = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    rows = [*(one for one in map(json.loads, stored) if one["device"] != row["device"]), row]
    RESULTS.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    docs.put(DOCUMENT, MARK, table(rows))
    print(RESULTS.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
