"""Recorded masks from the replay file to the evaluation: the proposals score what the masks themselves score."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image
from prior_tables import prior_params
from pycocotools import mask as coco_mask

from l2l_core.artifacts import records
from l2l_core.config import RefShapesParams, load_params
from l2l_core.datasets.index import Index
from l2l_core.datasets.read import load_dataset
from l2l_core.evaluation.evaluate import evaluated_sentences, score_predictions
from l2l_core.mllm.query import make_backend, make_questions, query_table
from l2l_core.priors.fit import unfitted
from l2l_core.priors.proposals import make_proposals
from l2l_core.priors.table import interpret
from l2l_core.refshapes.dataset import write_refshapes

ROOT = Path(__file__).parents[2]
PROPOSALS = unfitted(load_params(ROOT / "params.yaml").proposals)  # renders boxes by GrabCut
KINDS = ("true", "eroded", "another object")

Masks = dict[int, np.ndarray]
"""sent_id -> [H, W] bool."""


def true_masks(index: Index) -> Masks:
    rows = records.to_frame(index.refs).merge(records.to_frame(index.masks), on="ann_id")
    columns = (rows[name] for name in ("sent_id", "height", "width", "rle_counts"))
    return {
        sent_id: coco_mask.decode({"size": [height, width], "counts": counts}).astype(bool)
        for sent_id, height, width, counts in zip(*columns, strict=True)
    }


def eroded(mask: np.ndarray) -> np.ndarray:
    side = 2 * max(1, round(0.05 * mask.sum() ** 0.5)) + 1
    return cv2.erode(mask.astype(np.uint8), np.ones((side, side), np.uint8), borderValue=0) > 0


def mask_priors(index: Index, kind: str, instances: Path) -> Masks:
    """A mask for each sentence; `another object`: the largest other one in the image, none if there is no other."""
    true = true_masks(index)
    if kind == "true":
        return true
    if kind == "eroded":
        return {sent_id: eroded(mask) for sent_id, mask in true.items()}
    objects = pd.DataFrame(json.loads(instances.read_text())["annotations"]).sort_values("area", ascending=False)
    found = {}
    for row in records.to_frame(index.refs).itertuples():
        others = objects[(objects["image_id"] == row.image_id) & (objects["id"] != row.ann_id)]
        if len(others):
            segmentation, (height, width) = others["segmentation"].iloc[0], true[row.sent_id].shape
            rle = (
                coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
                if isinstance(segmentation, list)
                else segmentation
            )
            found[row.sent_id] = coco_mask.decode(rle).astype(bool)
    return found


def write_replay(masks: Masks, folder: Path) -> Path:
    """Mask files and the lines that name them, relative to the file."""
    (folder / "masks").mkdir()
    lines = []
    for sent_id, mask in masks.items():
        Image.fromarray(mask).save(folder / "masks" / f"{sent_id}.png")
        lines.append(json.dumps({"sent_id": int(sent_id), "mask": f"masks/{sent_id}.png"}) + "\n")
    (folder / "responses.jsonl").write_text("".join(lines))
    return folder / "responses.jsonl"


def scored_priors(index: Index, masks: Masks, folder: Path) -> pd.DataFrame:
    """IoU by sent_id of what comes out of query, priors, proposals and evaluate for these masks.

    Columns `iou`: of the method `prior` with the truth; `own`: of the masks with the truth; `kept`: of the proposals,
    cut at 0.5 at the image's size, with the masks.
    """
    paths = records.IndexPaths(*(folder / f"{name}.parquet" for name in ("images", "refs", "objects", "masks")))
    records.write_table(index.images, paths.images, records.IMAGES)
    records.write_table(index.refs, paths.refs, records.REFS)
    params = prior_params(backend="replay", replay_file=str(write_replay(masks, folder)))
    priors = interpret(query_table(make_backend(params, paths), make_questions(paths, 1)))
    refs, images = (records.to_frame(table) for table in (index.refs, index.images))
    images["file_name"] = "gone.png"  # masks need no image, whatever the renderer
    proposals = make_proposals(priors, refs, images, PROPOSALS)
    split = pa.table({"sent_id": index.refs["sent_id"], "role": ["eval"] * index.refs.num_rows}, schema=records.SPLIT)
    truth = evaluated_sentences(index.refs, index.masks, split, records.EVAL_SPLITS)
    nothing = [
        {"model": model, "with_prior": with_prior, "sent_id": row.Index, "height": row.height, "width": row.width}
        | {"rle_counts": coco_mask.encode(np.zeros((row.height, row.width), np.uint8, order="F"))["counts"]}
        for model, with_prior in NETWORKS
        for row in truth.itertuples()
    ]
    predictions = records.make_table(nothing, records.PREDICTIONS)
    scored = records.to_frame(score_predictions(truth, predictions, proposals, last_round=0))
    scored = scored[(scored["method"] == "prior") & scored["sent_id"].isin(masks)].set_index("sent_id")[["iou"]]
    true, soft = (
        true_masks(index),
        dict(zip(*(proposals[name].to_pylist() for name in ("sent_id", "soft")), strict=True)),
    )
    for sent_id in scored.index:
        mask = masks[sent_id]
        grid = np.frombuffer(soft[sent_id], np.uint8).reshape(PROPOSALS.size_px, -1).astype(np.float32)
        cut = cv2.resize(grid, mask.shape[::-1], interpolation=cv2.INTER_LINEAR) > 127.5
        scored.loc[sent_id, ["own", "kept"]] = iou(mask, true[sent_id]), iou(cut, mask)
    return scored


NETWORKS = (("supervised", False), ("round_0", True), ("round_0", False), ("distilled", False))


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


MOST = {"true": 0.12, "eroded": 0.06, "another object": 0.005}
"""Largest difference of a single sentence. If the border of a drawn object of 25 x 25 px moves by half a pixel, a
quarter of a cell, its area changes by 8 %. A border inside the truth or far from it matters less."""


def check(scored: pd.DataFrame, kind: str) -> None:
    difference = scored["iou"] - scored["own"]
    assert difference.abs().max() < MOST[kind]
    assert difference.abs().mean() < MOST[kind] / 2
    assert scored["kept"].mean() > 0.95
    low, high = {"true": (1, 1), "eroded": (0.5, 0.9), "another object": (0, 0.1)}[kind]
    assert low <= scored["own"].mean() <= high  # the kinds are what they are called


@pytest.mark.parametrize("kind", KINDS)
def test_proposals_of_recorded_masks_score_what_the_masks_score(tmp_path: Path, kind: str) -> None:
    counts = {"train_images": 1, "val_images": 12, "test_images": 1, "sentences_per_image": 2}
    write_refshapes(tmp_path / "shapes", RefShapesParams(seed=3, image_size_px=96, **counts))
    index = load_dataset(tmp_path / "shapes")
    scored = scored_priors(index, mask_priors(index, kind, tmp_path / "shapes" / "instances.json"), tmp_path)
    assert len(scored) == 26
    check(scored, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_proposals_of_masks_of_real_photos_score_what_the_masks_score(
    tmp_path: Path, kind: str, real_data: Path
) -> None:
    folder = real_data / "res_mini" / "refcoco"
    index = load_dataset(folder)
    scored = scored_priors(index, mask_priors(index, kind, folder / "instances.json"), tmp_path)
    assert len(scored) == (29 if kind == "another object" else 59)  # of the others, the only object is referred to
    check(scored, kind)
