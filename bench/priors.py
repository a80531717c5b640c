"""How good priors and proposals are: simulated responses against the wanted rates, recorded ones, box and GrabCut.

    python -m bench.priors              (some minutes)
    python -m bench.priors --table      (the tables of the stored results again)

The folder L2L_REAL_DATA adds recorded responses on RefCOCO testA and real photos; without it only RefShapes is
measured. Writes bench/results/priors.jsonl, one JSON object a measure, and tables of them into docs/priors.md. `ms` is
CPU time a map. Wrong object: IoU below 0.5 with the own box, at least 0.5 with the box of another annotated object of
the image.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from bench import docs, refshapes
from l2l_core.artifacts import records
from l2l_core.config import PriorsParams, load_params
from l2l_core.core import grabcut
from l2l_core.core.boxes import area_xyxy, iou_xyxy, xywh_to_xyxy
from l2l_core.core.images import read_image
from l2l_core.core.masks import cut_proposal, intersection_union_px
from l2l_core.datasets.index import Index
from l2l_core.datasets.read import load_dataset
from l2l_core.mllm.coords import qwen_input_hw
from l2l_core.mllm.error_model import ERROR_MODELS, IOU_EDGES, LOW_BINS
from l2l_core.mllm.query import make_backend, make_questions, query_table
from l2l_core.priors.renderers import grabcut_input, render_box, render_grabcut
from l2l_core.priors.table import interpret

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "bench" / "work" / "priors"
RESULTS = ROOT / "bench" / "results" / "priors.jsonl"
DOCUMENT = ROOT / "docs" / "priors.md"
PARAMS = load_params(ROOT / "params.yaml")

RECORDED = {"qwen2.5-vl-7b": "qwen25vl", "internvl2.5-8b": "internvl"}  # preset -> name of its file
REFSHAPES_OBJECTS = 300  # enough for a standard error of one point
MOVED_SIDES = 0.08  # normal spread of the edges of moved boxes, in sides
GRABCUT = PARAMS.proposals.model_copy(update={"renderer": "grabcut", "ring": 0.1, "core": 0.0})
GRABCUT_VARIANTS: list[dict[str, Any]] = [  # one constant or parameter changed at a time
    *({"GRABCUT_SIDE_PX": side_px} for side_px in (128, 192, 320)),
    *({"GRABCUT_ITERATIONS": count} for count in (3, 5)),
    *({"GRABCUT_MARGIN": share} for share in (0.25, 1.0, 100.0)),
    *({"ring": ring} for ring in (0.0, 0.25, 0.5)),
    *({"core": core} for core in (0.2, 0.35)),
]

Row = dict[str, Any]


def save_index(index: Index, name: str) -> records.IndexPaths:
    """The tables on disk, where a backend reads them."""
    paths = records.IndexPaths(*(WORK / name / f"{part}.parquet" for part in ("images", "refs", "objects", "masks")))
    records.write_table(index.images, paths.images, records.IMAGES)
    records.write_table(index.refs, paths.refs, records.REFS)
    records.write_table(index.objects, paths.objects, records.OBJECTS)
    return paths


def query(paths: records.IndexPaths, **changes: Any) -> pd.DataFrame:
    """The priors of every sentence, as the stage makes them."""
    params = PriorsParams(**(PARAMS.priors.model_dump() | {"backend": "simulated"} | changes))
    return records.to_frame(interpret(query_table(make_backend(params, paths), make_questions(paths, params.samples))))


def boxes(column: pd.Series) -> NDArray[np.float64]:
    return np.stack([np.full(4, np.nan) if box is None else box for box in column]).astype(np.float64)


def judge(priors: pd.DataFrame, index: Index) -> pd.DataFrame:
    """A row per response: its IoU (0 without a box) and whether it marks a wrong object, of which category."""
    truth = records.to_frame(index.refs)[["sent_id", "image_id", "ann_id", "category", "bbox"]]
    rows = priors[["sent_id", "bbox", "score"]].merge(truth, on="sent_id", suffixes=("_said", "")).reset_index()
    said, true = boxes(rows["bbox_said"]), boxes(rows["bbox"])
    rows["has_box"] = ~np.isnan(said[:, 0])
    rows["iou"] = np.where(rows["has_box"], iou_xyxy(said, true), 0.0)
    ratio = [(box[:, 2] - box[:, 0]) / (box[:, 3] - box[:, 1]) for box in (said, true)]
    rows["aspect_error"] = np.abs(np.log(ratio[0] / ratio[1]))
    objects = records.to_frame(index.objects)
    pairs = rows.merge(objects, on="image_id", suffixes=("", "_other"))
    pairs = pairs[pairs["ann_id"] != pairs["ann_id_other"]]
    pairs["other_iou"] = iou_xyxy(boxes(pairs["bbox_said"]), boxes(pairs["bbox_other"]))
    pairs["same_category"] = pairs["category"] == pairs["category_other"]
    best = pairs.sort_values("other_iou").groupby("index").tail(1).set_index("index")
    rows["wrong"] = rows["has_box"] & (rows["iou"] < 0.5) & (best["other_iou"].reindex(rows.index) >= 0.5)
    rows["same_category"] = best["same_category"].reindex(rows.index)
    rows["others_same_category"] = pairs.groupby("index")["same_category"].mean().reindex(rows.index)
    return rows


def rates(judged: pd.DataFrame) -> Row:
    """Shares of all responses, and the low bins' counts of wrong objects, as error_model.py states them."""
    located = judged[judged["has_box"]]
    counts, _ = np.histogram(located["iou"], IOU_EDGES)
    wrong, _ = np.histogram(located.loc[located["wrong"], "iou"], IOU_EDGES)
    middle = located[located["iou"].between(0.2, 0.5, inclusive="left")]
    lost = judged[judged["wrong"]]
    return {
        "answers": len(judged),  # this key and "asked" of bench.vlm are those of the stored rows
        "no_box": share(~judged["has_box"]),
        "acc50": share(judged["iou"] >= 0.5),
        "mean_iou": share(judged["iou"]),
        "mean_iou_of_boxes": share(located["iou"]),
        "iou_histogram": [round(count / len(judged), 3) for count in counts.tolist()],
        "wrong_object": share(judged["wrong"]),
        "wrong_object_low_bins": list(zip(wrong[:LOW_BINS].tolist(), counts[:LOW_BINS].tolist(), strict=True)),
        "wrong_object_same_category": share(lost["same_category"]),
        "their_candidates_same_category": share(lost["others_same_category"]),
        "aspect_error_iou_20_50": share(middle["aspect_error"]),
    }


def share(values: pd.Series) -> float:
    return round(float(values.astype(float).mean()), 3)


def simulated(index: Index, paths: records.IndexPaths, data: str) -> list[Row]:
    """Each preset's rates beside those that it should have."""
    found = []
    for preset, model in ERROR_MODELS.items():
        judged = judge(query(paths, preset=preset), index)
        located = judged[judged["has_box"]]
        found.append(
            {"measure": "simulated", "data": data, "preset": preset}
            | rates(judged)
            | {"confidence_auroc": round(float(roc_auc_score(located["iou"] >= 0.5, located["score"])), 3)}
            | {"wanted_iou_histogram": model.iou_share, "wanted_wrong_object": round(model.wrong_object_rate, 3)}
        )
    return found


def recorded(real: Path) -> list[Row]:
    """Recorded responses, as they are and (Qwen) taken as pixels of the resized input; presets on the same refs."""
    layout = WORK / "refcoco_layout"  # the annotations under the names that the reader expects
    shutil.rmtree(layout, ignore_errors=True)
    layout.mkdir(parents=True)
    for name, published in (("instances_bbox_only.json", "instances.json"), ("refs(unc).p", "refs(unc).p")):
        (layout / published).symlink_to(real / "refcoco_annotations" / name)
    index = load_dataset(layout)
    refs = records.to_frame(index.refs)
    recorded_ids = refs[refs["split"] == "testA"].drop_duplicates("ref_id")["sent_id"]
    paths = save_index(index, "refcoco")
    found = []
    for preset, name in RECORDED.items():
        file = real / "mllm_outputs" / f"{name}_refcoco_testA.jsonl"
        priors = query(paths, backend="replay", replay_file=str(file))
        found.append({"measure": "replayed", "preset": preset} | rates(judge(priors[priors["model"] != ""], index)))
        found.append({"measure": "recorded_boxes", "preset": preset} | box_facts(file))
    lines = map(json.loads, (real / "mllm_outputs" / "qwen25vl_refcoco_testA.jsonl").read_text().splitlines())
    converted = WORK / "qwen_resized.jsonl"
    keys = ("input_height", "input_width")
    converted.write_text(
        "".join(
            json.dumps(
                row
                | {"coord_space": "resized_pixel"}
                | dict(zip(keys, qwen_input_hw(row["height"], row["width"]), strict=True))
            )
            + "\n"
            for row in lines
        )
    )
    priors = query(paths, backend="replay", replay_file=str(converted))
    judged = judge(priors[priors["model"] != ""], index)
    found.append({"measure": "replayed_as_resized", "preset": "qwen2.5-vl-7b"} | rates(judged))
    first = Index(index.images, index.refs.filter(np.isin(refs["sent_id"], recorded_ids)), index.objects, index.masks)
    found += simulated(first, save_index(first, "refcoco_testa"), "refcoco testA, first sentences")
    found.append({"measure": "object_side", "data": "refcoco val, testA, testB"} | object_sides(index))
    return found


def object_sides(index: Index) -> Row:
    """Median of sqrt(box area / image area) of the referred objects whose image's size is known."""
    refs = records.to_frame(index.refs).query("split != 'train'").drop_duplicates("ref_id")
    known = refs.merge(records.to_frame(index.images).query("height > 0"), on="image_id")
    side = np.sqrt(area_xyxy(boxes(known["bbox"])) / (known["height"] * known["width"]))
    return {"objects": len(known), "median_side": round(float(side.median()), 3)}


def box_facts(file: Path) -> Row:
    """Recorded boxes: inverted (right if swapped?), beyond the image, beyond and at the edge of Qwen2.5-VL's input."""
    rows = [row for row in map(json.loads, file.read_text().splitlines()) if row["pred_box_xyxy"] is not None]
    box = np.array([row["pred_box_xyxy"] for row in rows], dtype=np.float64)
    original = np.array([[row["width"], row["height"]] for row in rows])
    resized = np.array([qwen_input_hw(row["height"], row["width"])[::-1] for row in rows])
    inverted = (box[:, 2:] < box[:, :2]).any(axis=1)
    swapped = np.concatenate([np.minimum(box[:, :2], box[:, 2:]), np.maximum(box[:, :2], box[:, 2:])], axis=1)
    true = xywh_to_xyxy([row["gt_bbox_xywh"] for row in rows])
    return {
        "boxes": len(rows),
        "inverted": int(inverted.sum()),
        "inverted_right_if_swapped": int((iou_xyxy(swapped, true)[inverted] >= 0.5).sum()),
        "leave_the_original_image": int((box[:, 2:] > original).any(axis=1).sum()),
        "leave_the_resized_input": int((box[:, 2:] > resized).any(axis=1).sum()),
        "end_at_its_right_edge": int((box[:, 2] == resized[:, 0]).sum()),
    }


def referred(index: Index) -> pd.DataFrame:
    """The referred objects with true box, mask and image."""
    refs = records.to_frame(index.refs).drop_duplicates("ann_id")
    with_image = refs.merge(records.to_frame(index.images), on="image_id")
    return with_image.merge(records.to_frame(index.masks)[["ann_id", "rle_counts"]], on="ann_id")


def rendered(data: str, known: pd.DataFrame, variants: list[dict[str, Any]]) -> list[Row]:
    """Mean IoU, with the true masks, of maps cut at 0.5: by box and by GrabCut, from true and from moved boxes."""
    true = boxes(known["bbox"])
    noise = np.random.default_rng(0).normal(0, MOVED_SIDES, true.shape)
    limits = known[["width", "height", "width", "height"]].to_numpy(np.float64)
    moved = np.clip(true + noise * np.tile(true[:, 2:] - true[:, :2], 2), 0, limits)
    sizes = known[["height", "width"]].to_numpy(np.int64)
    images = [read_image(path) for path in known["file_name"]]
    found = []
    for renderer, changes in [("box", {}), ("grabcut", {}), *(("grabcut", change) for change in variants)]:
        row: Row = {"measure": "proposal", "data": data, "objects": len(known), "renderer": renderer} | changes
        started = time.process_time()
        constants = {name: value for name, value in changes.items() if name.isupper()}
        params = GRABCUT.model_copy(update={name: value for name, value in changes.items() if name.islower()})
        with patch.multiple(grabcut, **constants) if constants else nullcontext():
            for name, given in (("true", true), ("moved", moved)):
                cuts = []
                for image, box, size in zip(images, given, sizes.tolist(), strict=True):
                    if renderer == "box":
                        soft = render_box(box, size, params)
                    else:
                        soft = render_grabcut(grabcut_input(image), box, size, params)
                    cuts.append(cut_proposal(np.rint(soft * 255).astype(np.uint8), *size))
                both = intersection_union_px(cuts, known["rle_counts"].tolist(), sizes)
                row[f"miou_{name}_boxes"] = round(float((both[:, 0] / both[:, 1]).mean()), 3)
        row["ms"] = round(1000 * (time.process_time() - started) / (2 * len(known)), 1)
        found.append(row)
    return found


def measure() -> list[Row]:
    cv2.setNumThreads(1)
    refshapes.draw()
    index = load_dataset(refshapes.FOLDER)
    version = f"refshapes-{refshapes.load()[2]}"
    rows = simulated(index, save_index(index, "refshapes"), version)
    rows += rendered(version, referred(index).query("split != 'train'")[:REFSHAPES_OBJECTS], [])
    real = os.environ.get("L2L_REAL_DATA")
    if real:
        rows += recorded(Path(real))
        photos = [load_dataset(Path(real) / "res_mini" / name) for name in ("refcoco", "refcocog")]
        rows += rendered("real photos", pd.concat(map(referred, photos)), GRABCUT_VARIANTS)
    else:
        print("L2L_REAL_DATA is not set: no recorded responses, no photos")
    return rows


def responses_table(rows: list[Row]) -> str:
    """Markdown: real responses, the rates that each preset should have, and those that it has."""
    lines: list[list[object]] = []
    for preset, model in ERROR_MODELS.items():
        shares = model.iou_share
        low, right = sum(shares[:LOW_BINS]), sum(shares[LOW_BINS:])
        lines.append([preset, "wanted", None, 1 - low - right, right, model.wrong_object_rate, join(shares)])
        for row in rows:
            if row.get("preset") == preset and "iou_histogram" in row:
                said = {"replayed": "real", "replayed_as_resized": "real, taken as resized pixels"}
                source = said.get(row["measure"]) or f"simulated, {row['data']}"
                rates_shown = [row[key] for key in ("answers", "no_box", "acc50", "wrong_object")]
                lines.append([preset, source, *rates_shown, join(row["iou_histogram"])])
    bins = "IoU histogram, bins " + "/".join(f"{edge:g}" for edge in IOU_EDGES)
    return docs.markdown(["preset", "responses", "number", "no box", "IoU >= 0.5", "another object", bins], lines)


def proposals_table(rows: list[Row]) -> str:
    """Markdown: mean IoU of the renderers, and of GrabCut with other constants."""
    lines: list[list[object]] = []
    for row in rows:
        if row["measure"] == "proposal":
            changed = [f"{key} = {row[key]}" for key in row if key.startswith(("GRABCUT", "ring", "core"))]
            name = ", ".join([row["renderer"], *changed])
            ious = [row["miou_true_boxes"], row["miou_moved_boxes"]]
            lines.append([f"{row['objects']}, {row['data']}", name, *ious, f"{row['ms']:.1f}"])
    return docs.markdown(["objects", "renderer", "true boxes", "moved boxes", "ms"], lines)


def join(shares: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}".removeprefix("0") for value in shares)


def main() -> None:
    if "--table" not in sys.argv:
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
        found = [{"bench": "priors", "commit": commit} | row for row in measure()]
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    for name, text in (("responses", responses_table(rows)), ("proposals", proposals_table(rows))):
        docs.put(DOCUMENT, name, text)
        print(text)


if __name__ == "__main__":
    main()
