"""How good priors are on photographs: boxes, GrabCut and masks, each replayed and rendered as the stages do it.

    L2L_REAL_DATA=<folder> python -m bench.photo_priors        (about two minutes)
    python -m bench.photo_priors --table                       (the table of the stored results again)

The folder holds res_mini/ (RefCOCO photos), coco_photos/ (COCO photos with all their objects) and mllm_outputs/
(recorded boxes). No mask of a real system is at hand, so masks are the true ones, eroded ones, and those of another
object: they show what a mask prior of known quality becomes. Writes bench/results/photo_priors.jsonl, one JSON object
a prior and grid, and a table into docs/results.md.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from bench import docs
from l2l_core.artifacts import records
from l2l_core.config import PriorsParams, ProposalsParams, load_params
from l2l_core.core.masks import (
    cut_proposal,
    decode_rle,
    encode_rle,
    intersection_union_px,
    segmentation_to_rle,
    square_px,
)
from l2l_core.core.metrics import iou_from_px
from l2l_core.datasets.index import Index
from l2l_core.datasets.read import load_dataset
from l2l_core.mllm.query import make_backend, make_questions, query_table
from l2l_core.priors.fit import unfitted
from l2l_core.priors.proposals import make_proposals
from l2l_core.priors.table import interpret

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "bench" / "work" / "photo_priors"
RESULTS = ROOT / "bench" / "results" / "photo_priors.jsonl"
DOCUMENT, MARK = ROOT / "docs" / "results.md", "photo_priors"
PARAMS = load_params(ROOT / "params.yaml")

MIN_SHARE = 0.02  # of the image that an object covers: RefCOCO's objects cover 5 % and more, most of COCO's are tiny
ERODED_SHARE = 0.05  # of the object's size, the square root of its area, cut off on each side
FINE_PX = 96  # twice the default grid
RECORDED = {"Qwen2.5-VL-7B": "qwen25vl", "InternVL2.5-8B": "internvl"}  # model -> name of its file

Line = dict[str, Any]
"""One line of a replay file."""


@dataclass(frozen=True)
class Photos:
    """Referred objects in photographs: one sentence each."""

    name: str
    index: Index
    objects: pd.DataFrame  # by sent_id: columns of records.REFS, IMAGES and MASKS

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """sent_id and the image's height and width of each object."""
        return list(self.objects[["sent_id", "height", "width"]].itertuples(index=False, name=None))


def refcoco_photos(real: Path) -> Photos:
    """The first sentence about each object of RefCOCO's photos."""
    index = load_dataset(real / "res_mini" / "refcoco")
    return Photos("RefCOCO", index, objects_of(index).drop_duplicates("ann_id"))


def coco_photos(real: Path) -> tuple[Photos, list[bytes]]:
    """One object of each photo with two large objects of one category, and the mask of the other one."""
    instances = json.loads((real / "coco_photos" / "instances.json").read_text(encoding="utf-8"))
    sizes = {row["id"]: (row["height"], row["width"]) for row in instances["images"]}
    names = {row["id"]: row["file_name"] for row in instances["images"]}
    alike = defaultdict(list)
    for row in sorted(instances["annotations"], key=lambda row: row["id"]):
        if not row["iscrowd"] and row["area"] >= MIN_SHARE * math.prod(sizes[row["image_id"]]):
            alike[row["image_id"], row["category_id"]].append(row["segmentation"])
    pairs, others = {}, {}
    for (image_id, _), (one, *more) in sorted(alike.items()):
        if more and image_id not in pairs:
            image = str(real / "coco_photos" / "images" / names[image_id])
            pairs[image_id] = {"image": image, "sentence": "it", "mask": one, "split": "val"}
            others[image_id] = segmentation_to_rle(more[0], *sizes[image_id])
    path = WORK / "coco" / "pairs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs.values()), encoding="utf-8")
    index = load_dataset(path)
    return Photos("COCO", index, objects_of(index)), list(others.values())


def objects_of(index: Index) -> pd.DataFrame:
    """The sentences of an index with image, true box and true mask."""
    refs, images, masks = (records.to_frame(table) for table in (index.refs, index.images, index.masks))
    found = refs.merge(images, on="image_id").merge(masks[["ann_id", "rle_counts"]], on="ann_id")
    return found.sort_values("sent_id", ignore_index=True)


def proposals_of(index: Index, lines: Iterable[Line], params: ProposalsParams) -> dict[int, np.ndarray]:
    """Replay lines -> map [S, S] uint8 by sent_id, through the functions of the stages query, priors and proposals."""
    paths = records.IndexPaths(*(WORK / f"{name}.parquet" for name in ("images", "refs", "objects", "masks")))
    records.write_table(index.images, paths.images, records.IMAGES)
    records.write_table(index.refs, paths.refs, records.REFS)
    file = WORK / "responses.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    replay = PriorsParams(**(PARAMS.priors.model_dump() | {"backend": "replay", "replay_file": str(file)}))
    priors = interpret(query_table(make_backend(replay, paths), make_questions(paths, 1)))
    refs, images = (records.to_frame(table) for table in (index.refs, index.images))
    table = make_proposals(priors, refs, images, params)
    maps = (np.frombuffer(soft, np.uint8).reshape(params.size_px, -1) for soft in table["soft"].to_pylist())
    return dict(zip(table["sent_id"].to_pylist(), maps, strict=True))


def eroded(rle: bytes, height: int, width: int) -> bytes:
    """A mask without its border; the mask itself if nothing would remain."""
    mask = decode_rle(rle, height, width).astype(np.uint8)
    smaller = cv2.erode(mask, square_px(ERODED_SHARE * mask.sum() ** 0.5), borderValue=0)
    return encode_rle(smaller) if smaller.any() else rle


def filled(box_xyxy: Sequence[float] | None, height: int, width: int) -> bytes:
    """The pixels of a box as a mask; none without a box."""
    if box_xyxy is None:
        return encode_rle(np.zeros((height, width), bool))
    x1, y1, x2, y2 = map(float, box_xyxy)
    return segmentation_to_rle([[x1, y1, x2, y1, x2, y2, x1, y2]], height, width)


def miou(masks: Sequence[bytes], objects: pd.DataFrame) -> float:
    """Mean IoU with the true masks, in percent."""
    sizes = objects[["height", "width"]].to_numpy(np.int64)
    return 100 * float(iou_from_px(*intersection_union_px(masks, objects["rle_counts"].tolist(), sizes).T).mean())


def measured(photos: Photos, prior: str, own: Sequence[bytes], lines: Sequence[Line]) -> list[Line]:
    """Rows of one prior: the IoU of the prior itself, and of its proposals by each renderer or grid."""
    plain = unfitted(PARAMS.proposals)
    if "mask" in lines[0]:
        ways = {"mask": plain, f"mask, proposals.size_px = {FINE_PX}": plain.model_copy(update={"size_px": FINE_PX})}
    else:
        ways = {name: plain.model_copy(update={"renderer": name}) for name in ("box", "grabcut")}
    found = []
    for name, params in ways.items():
        maps = proposals_of(photos.index, lines, params)
        cuts = [cut_proposal(maps[sent_id], height, width) for sent_id, height, width in photos.places]
        row = {"photos": photos.name, "objects": len(cuts), "prior": prior, "rendered": name}
        scores = {"prior_miou": miou(own, photos.objects), "miou": miou(cuts, photos.objects)}
        found.append(row | {key: round(score, 1) for key, score in scores.items()})
        print(found[-1], flush=True)
    return found


def boxes(photos: Photos, prior: str, given: Sequence[Sequence[float] | None]) -> list[Line]:
    """Rows of a box, or None, for each object."""
    own, lines = [], []
    for box, (sent_id, height, width) in zip(given, photos.places, strict=True):
        own.append(filled(box, height, width))
        lines.append({"sent_id": sent_id, "pred_box_xyxy": None if box is None else list(map(float, box))})
    return measured(photos, prior, own, lines)


def masks(photos: Photos, prior: str, given: Sequence[bytes]) -> list[Line]:
    """Rows of a mask for each object."""
    lines = [
        {"sent_id": sent_id, "mask": {"size": [height, width], "counts": rle.decode()}}
        for rle, (sent_id, height, width) in zip(given, photos.places, strict=True)
    ]
    return measured(photos, prior, given, lines)


def measure(real: Path) -> list[Line]:
    cv2.setNumThreads(1)
    rows = []
    refcoco, (coco, others) = refcoco_photos(real), coco_photos(real)
    for name, file in RECORDED.items():
        text = (real / "mllm_outputs" / f"{file}_refcoco_testA.jsonl").read_text(encoding="utf-8")
        said = {line["ref_id"]: line["pred_box_xyxy"] for line in map(json.loads, text.splitlines())}
        known = replace(refcoco, objects=refcoco.objects[refcoco.objects["ref_id"].isin(said)])
        rows += boxes(known, f"{name}'s box", [said[ref_id] for ref_id in known.objects["ref_id"]])
    for photos in (refcoco, coco):
        true = photos.objects["rle_counts"].tolist()
        rows += boxes(photos, "true box", photos.objects["bbox"].tolist())
        rows += masks(photos, "true mask", true)
        smaller = [eroded(rle, height, width) for rle, (_, height, width) in zip(true, photos.places, strict=True)]
        rows += masks(photos, "eroded mask", smaller)
    return rows + masks(coco, "mask of another object of the category", others)


def table(rows: Sequence[Line]) -> str:
    """Markdown: mean IoU of every prior and of its proposals, in percent."""
    head = ["photos", "objects", "prior", "rendered as", "IoU of the prior", "IoU of its proposal"]
    keys = ("prior_miou", "miou")
    lines: list[list[object]] = [
        [row["photos"], row["objects"], row["prior"], row["rendered"], *(f"{row[key]:.1f}" for key in keys)]
        for row in rows
    ]
    return docs.markdown(head, lines)


def main() -> None:
    if "--table" not in sys.argv:
        if "L2L_REAL_DATA" not in os.environ:
            sys.exit("L2L_REAL_DATA is not set: expected the folder that holds res_mini, coco_photos and mllm_outputs")
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
        found = [
            {"bench": "photo_priors", "commit": commit} | row for row in measure(Path(os.environ["L2L_REAL_DATA"]))
        ]
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    docs.put(DOCUMENT, MARK, table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
