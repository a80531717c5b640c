"""What RefShapes-VLM responds about the built-in dataset: how many boxes are right, how far off others are, its time.

    python -m bench.vlm              (some minutes)
    python -m bench.vlm --table      (tables and picture of the stored results again)

Queries every sentence as the stage `query` does. Writes bench/results/vlm.jsonl, one JSON object a split, a style or a
stated confidence, tables of them into vlm/README.md, and the curve of the training (vlm/curve.jsonl) as
docs/images/vlm_curve.png. Shares are of all sentences of a row; `seconds` is wall time of all splits together.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot

from bench import docs, refshapes
from bench.priors import PARAMS, join, judge, query, rates, save_index
from l2l_core.artifacts import records
from l2l_core.core.device import resolve_precision
from l2l_core.core.metrics import auroc
from l2l_core.datasets.read import load_dataset
from l2l_core.mllm.error_model import ERROR_MODELS, IOU_EDGES, LOW_BINS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "vlm.jsonl"
DOCUMENT = ROOT / "vlm" / "README.md"
CURVE, PICTURE = ROOT / "vlm" / "curve.jsonl", ROOT / "docs" / "images" / "vlm_curve.png"
COMPARED = "llava-1.5-7b"

MODEL: dict[str, Any] = {
    "backend": "transformers",
    "model": "vlm/refshapes-vlm",
    "precision": "auto",
    "structured_output": "auto",
}
"""What queries the model, as params.yaml ships it."""

Row = dict[str, Any]


def measure() -> list[Row]:
    refshapes.draw()
    index = load_dataset(refshapes.FOLDER)
    paths = save_index(index, "vlm")
    started = time.perf_counter()
    engine = PARAMS.priors.engine.model_copy(update={"device": "cpu"})
    priors = query(paths, **MODEL, engine=engine)
    seconds = round(time.perf_counter() - started, 1)
    known = records.to_frame(index.refs)[["sent_id", "split", "style"]].merge(
        priors[["sent_id", "status"]], on="sent_id"
    )
    judged = judge(priors, index).merge(known, on="sent_id")
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    common = {
        "data": f"refshapes-{refshapes.load()[2]}",
        "commit": commit,
        "seconds": seconds,
        "asked": len(judged),
        "precision": resolve_precision(MODEL["precision"], torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}",
    }
    groups = [{"split": split} for split in ("train", "val", "test")]
    groups += [{"split": "val", "style": style} for style in sorted(judged["style"].unique())]
    judged["confidence"] = (10 * judged["score"].astype(float)).round() / 10
    groups += [{"split": "val", "confidence": said} for said in sorted(judged["confidence"].unique().tolist())]
    rows = []
    for group in groups:
        mine = judged[np.logical_and.reduce([judged[key] == value for key, value in group.items()])]
        if len(mine):
            valid = round(float((mine["status"] == "ok").mean()), 4)
            rows.append({"bench": "vlm"} | group | {"valid": valid} | rates(mine) | trust(mine) | common)
    return rows


def trust(judged: pd.DataFrame) -> Row:
    """How well the stated confidence tells right boxes from others; nothing where all are alike."""
    percent = auroc(judged["score"].to_numpy(), (judged["iou"] >= 0.5).to_numpy())
    return {} if percent is None else {"confidence_auroc": round(percent / 100, 3)}


def responses_table(rows: list[Row]) -> str:
    """Markdown: the splits, beside the error model of a large model on photos."""
    lines: list[list[object]] = []
    for row in rows:
        if "style" not in row and "confidence" not in row:
            shown = [row[key] for key in ("answers", "valid", "acc50", "mean_iou", "wrong_object", "confidence_auroc")]
            lines.append([row["split"], *shown, join(row["iou_histogram"])])
    shares = ERROR_MODELS[COMPARED].iou_share
    right = sum(shares[LOW_BINS:])
    lines.append([f"(photos: {COMPARED}, RefCOCO testA)", None, None, right, None, None, None, join(shares)])
    head = ["split", "sentences", "valid", "IoU >= 0.5", "mean IoU", "another object", "AUROC of confidence"]
    return docs.markdown([*head, "IoU histogram, bins " + "/".join(f"{edge:g}" for edge in IOU_EDGES)], lines)


def styles_table(rows: list[Row]) -> str:
    """Markdown: val by the style of the sentence."""
    lines: list[list[object]] = [
        [row["style"], row["answers"], row["acc50"], row["mean_iou"]] for row in rows if "style" in row
    ]
    return docs.markdown(["style (val)", "sentences", "IoU >= 0.5", "mean IoU"], lines)


def confidence_table(rows: list[Row]) -> str:
    """Markdown: val by the confidence that the response states."""
    lines: list[list[object]] = [
        [f"{row['confidence']:.1f}", row["answers"], row["acc50"]] for row in rows if "confidence" in row
    ]
    return docs.markdown(["confidence (val)", "responses", "IoU >= 0.5"], lines)


def time_text(rows: list[Row]) -> str:
    row = rows[0]
    threads, precision = f"{row['threads']} thread{'s' * (row['threads'] > 1)}", row.get("precision", "bf16")
    return (
        f"The queries for all {row['asked']:,} sentences of the dataset took {row['seconds']:.0f} s "
        f"({threads}, {row['device']}, `transformers`, {precision})."
    )


PARTS = {"responses": responses_table, "styles": styles_table, "confidences": confidence_table, "time": time_text}
"""Marks in the model card, and what stands between them."""


def draw_curve() -> None:
    """Both trainings: what patches tell, then the responses' losses and how often the pointer hits."""
    matplotlib.use("Agg")
    lines = pd.DataFrame(json.loads(line) for line in CURVE.read_text(encoding="utf-8").splitlines())
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3), layout="constrained")
    tower, responses = (lines[lines["part"] == part] for part in ("tower", "answers"))
    for name in ("shape", "color", "texture", "size"):
        axes[0].plot(tower["step"], tower[name], label=name)
    axes[0].set(title="tower: patches right, held-out scenes", xlabel="step", ylim=(0, 1))
    for name, label in (("words", "words"), ("numbers", "coordinates")):
        axes[1].plot(responses["step"], responses[name], label=label)
    axes[1].set(title="responses: cross-entropy, held-out", xlabel="step")
    axes[1].set_ylim(bottom=0)
    axes[2].plot(responses["step"], responses["pointed"], label="right object pointed at")
    axes[2].set(title="responses: pointer, held-out", xlabel="step", ylim=(0, 1))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(PICTURE, dpi=100, metadata={"Software": None})


def main() -> None:
    if "--table" not in sys.argv:
        rows = measure()
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    for name, make in PARTS.items():
        docs.put(DOCUMENT, name, make(rows))
        print(make(rows))
    draw_curve()


if __name__ == "__main__":
    main()
