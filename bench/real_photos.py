"""Real photos, real sentences, real responses: how good recorded boxes are as masks, and one run through every stage.

    L2L_REAL_DATA=<folder> python -m bench.real_photos        (about two minutes on a free core)

The folder holds res_mini/ (13 RefCOCO photos in the published layout) and mllm_outputs/ (Qwen2.5-VL-7B's boxes).
(a) Ingest, split, priors and proposals by their command lines; the proposals of the 10 testA sentences that have a
    recorded response, cut at 0.5, against the true masks: once rendered as boxes, once sharpened by GrabCut.
(b) `dvc repro` with 4 photos labeled, 6 unlabeled and 3 to evaluate, one round. Too few to learn from: it shows
    that every stage takes real data, and its scores mean no more than that.
Writes bench/results/real_photos.jsonl, one JSON object a method.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from bench.params import merged
from l2l_core.artifacts import records
from l2l_core.core.masks import cut_proposal, intersection_union_px
from l2l_core.core.metrics import segmentation_scores
from l2l_core.evaluation.evaluate import method_scores

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "bench" / "work" / "real_photos"
RESULTS = ROOT / "bench" / "results" / "real_photos.jsonl"

ROLES = {
    "labeled_image_ids": [154, 605, 444010, 15195],
    "unlabeled_image_ids": [40346, 120431, 352357, 370802, 389145, 464174],
    "eval_image_ids": [486606, 491707, 561454],
}
"""All photos of testB and val and one of testA teach: the other nine of testA have the recorded responses."""

STEPS = 60
PARAMS: dict[str, Any] = {
    "round": 1,
    "dataset": "data/photos/refcoco",
    "split": {"list_file": "data/photos/roles.json"},
    "priors": {"backend": "replay", "replay_file": "data/photos/responses.jsonl"},
    "model": {"image_size_px": 256},
    "train": {"batch_size": 4, "log_every": 10},
    "warmup": {"steps": STEPS},
    "select": {"fold_steps": STEPS // 3},
    "retrain": {"steps": STEPS},
    "distill": {"steps": STEPS},
    "evaluate": {"batch_size": 8},
}
"""Changes to params.yaml."""


def add_photos(project: Path, real: Path) -> None:
    """Copy photos, annotations and recorded responses into a project, and the list of who teaches."""
    folder = project / "data" / "photos"
    shutil.copytree(real / "res_mini" / "refcoco", folder / "refcoco")
    shutil.copytree(real / "res_mini" / "images", folder / "images")
    shutil.copy(real / "mllm_outputs" / "qwen25vl_refcoco_testA.jsonl", folder / "responses.jsonl")
    (folder / "roles.json").write_text(json.dumps(ROLES), encoding="utf-8")


def set_params(project: Path, changes: dict[str, Any]) -> None:
    """Change values of a project's params.yaml."""
    path = project / "params.yaml"
    params = merged(yaml.safe_load(path.read_text(encoding="utf-8")), changes)
    path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def run(project: Path, *command: str) -> str:
    """What a command writes, run in the project with this Python first in the path. Raises where it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, cwd=project, env=os.environ | {"PATH": path}, text=True, stdout=subprocess.PIPE, check=True
    ).stdout


def score_prior(project: Path, renderer: str) -> tuple[dict[str, float], int]:
    """Render the proposals by the stage's command line; scores and number of the sentences with a recorded response."""
    set_params(project, {"proposals": {"renderer": renderer}})
    run(project, "python", "-m", "stages.proposals")
    priors = _frame(project, records.PRIORS_PATH, records.PRIORS)
    recorded = priors.loc[priors["model"] != "", "sent_id"]  # others have no recorded response
    refs = _frame(project, records.INDEX.refs, records.REFS)[["sent_id", "ann_id"]]
    masks = _frame(project, records.INDEX.masks, records.MASKS)
    proposals = _frame(project, records.PROPOSALS_PATH, records.PROPOSALS).drop(columns=["height", "width"])
    rows = refs[refs["sent_id"].isin(recorded)].merge(masks, on="ann_id").merge(proposals, on="sent_id")
    sizes = rows[["height", "width"]].to_numpy(np.int64)
    cut = []
    for soft, (height, width) in zip(rows["soft"], sizes.tolist(), strict=True):
        side = int(len(soft) ** 0.5)
        cut.append(cut_proposal(np.frombuffer(soft, np.uint8).reshape(side, side), height, width))
    pixels = intersection_union_px(cut, rows["rle_counts"].tolist(), sizes)
    return segmentation_scores(pixels[:, 0], pixels[:, 1]), len(rows)


def score_run(project: Path) -> dict[str, dict[str, float]]:
    """Scores of every method after `dvc repro`."""
    return method_scores(_frame(project, records.PER_SENTENCE_PATH, records.PER_SENTENCE))


def _frame(project: Path, path: Path, schema: Any) -> pd.DataFrame:
    return records.to_frame(records.read_table(project / path, schema))


def main() -> None:
    if "L2L_REAL_DATA" not in os.environ:
        sys.exit("L2L_REAL_DATA is not set: expected the folder that holds res_mini and mllm_outputs")
    shutil.rmtree(WORK, ignore_errors=True)
    run(ROOT, "git", "clone", "--quiet", str(ROOT), str(WORK))
    add_photos(WORK, Path(os.environ["L2L_REAL_DATA"]))
    set_params(WORK, PARAMS)
    common = {
        "dataset": "13 RefCOCO photos",
        "labeled_fraction": round(len(ROLES["labeled_image_ids"]) / sum(map(len, list(ROLES.values())[:2])), 2),
        "seed": 0,
        "split": "testA",
        "device": f"cpu, {platform.machine()}",
        "commit": run(ROOT, "git", "rev-parse", "--short", "HEAD").strip(),
    }
    rows = []
    for stage in ("ingest", "split", "query", "priors"):
        print(run(WORK, "python", "-m", f"stages.{stage}"), end="")
    for renderer in ("box", "grabcut"):
        started = time.monotonic()
        scores, count = score_prior(WORK, renderer)
        rows.append(_row(f"prior, {renderer}, recorded sentences", 0, scores, 0, started) | {"sentences": count})
    set_params(WORK, PARAMS | {"proposals": {"renderer": "box"}})
    started = time.monotonic()
    print(run(WORK, "dvc", "repro"))
    evaluated = json.loads((WORK / "metrics" / "evaluate.json").read_text())["n_testA"]
    for method, scores in score_run(WORK).items():
        number = int(method.split("_")[1]) if method.startswith("round_") else 0
        steps = 0 if method == "prior" else STEPS
        rows.append(_row(f"integration run, {method}", number, scores, steps, started) | {"sentences": evaluated})
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row | common) + "\n")
            print(row)


def _row(method: str, number: int, scores: dict[str, float], steps: int, started: float) -> dict[str, Any]:
    return {
        "method": method,
        "prior": "qwen2.5-vl-7b, recorded",
        "round": number,
        **{name: round(scores[name], 2) for name in ("miou", "oiou", "pr50")},
        "steps": steps,
        "seconds": round(time.monotonic() - started, 1),
    }


if __name__ == "__main__":
    main()
