"""Tables at RefCOCO's size: how long ingest and split take, how fast the index opens, how fast masks are scored.

    python -m bench.tables

Builds annotations of RefCOCO's counts below bench/work: masks, photos and sentences of the folder L2L_REAL_DATA under
new ids where that is set, else drawn ones. The photos are few files under many names (symbolic links): reading them
from disk costs next to nothing here, while decoding, checking and hashing every name is part of the time. Appends one
JSON object a measurement to bench/results/tables.jsonl.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from l2l_core.artifacts import records
from l2l_core.core.masks import decode_rle, encode_rle, intersection_union_px, resize_mask, segmentation_to_rle

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "bench" / "work" / "tables"
RESULTS = ROOT / "bench" / "results" / "tables.jsonl"

IMAGES, REFS, SENTENCES, OBJECTS = 19_994, 50_000, 142_209, 196_771
"""RefCOCO (unc) as published; the objects are all annotations of its images, of which the refs name 50,000."""
TRAIN_IMAGES = 16_994
SCORED_MASKS, SCORED_HEIGHT, SCORED_WIDTH = 10_000, 480, 640
POLYGON_POINTS = 40  # of a drawn mask; COCO's polygons have about as many


@dataclass(frozen=True)
class Photo:
    """A photo with the segmentations and sentences that are repeated."""

    path: Path
    height: int
    width: int
    segmentations: list[Any]
    sentences: list[str]


def real_photos(folder: Path) -> list[Photo]:
    """The photos of res_mini with their true masks and sentences."""
    photos = []
    for name, split_by in (("refcoco", "unc"), ("refcocog", "umd")):
        source = folder / "res_mini" / name
        instances = json.loads((source / "instances.json").read_text())
        refs = pickle.loads((source / f"refs({split_by}).p").read_bytes())  # the project's own test data
        for image in instances["images"]:
            rows = [row["segmentation"] for row in instances["annotations"] if row["image_id"] == image["id"]]
            texts = [s["sent"] for ref in refs if ref["image_id"] == image["id"] for s in ref["sentences"]]
            path = folder / "res_mini" / "images" / "train2014" / image["file_name"]
            photos.append(Photo(path, image["height"], image["width"], rows, texts))
    return photos


def drawn_photos(folder: Path) -> list[Photo]:
    """16 noise pictures with star-shaped polygons."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    photos = []
    for number in range(16):
        path = folder / f"{number}.jpg"
        noise = rng.integers(0, 256, (SCORED_HEIGHT, SCORED_WIDTH, 3), dtype=np.uint8)
        cv2.imwrite(str(path), cv2.GaussianBlur(noise, (0, 0), 3))
        rows = [[star(rng)] for _ in range(3)]
        photos.append(Photo(path, SCORED_HEIGHT, SCORED_WIDTH, rows, ["the thing on the left", "that other thing"]))
    return photos


def star(rng: np.random.Generator) -> list[float]:
    """A polygon around a point, in COCO's order and rounding."""
    angles = np.linspace(0, 2 * np.pi, POLYGON_POINTS, endpoint=False)
    radius = rng.uniform(40, 160) * rng.uniform(0.7, 1.0, POLYGON_POINTS)
    x = np.clip(rng.uniform(100, 540) + radius * np.cos(angles), 0, SCORED_WIDTH)
    y = np.clip(rng.uniform(100, 380) + radius * np.sin(angles), 0, SCORED_HEIGHT)
    return np.stack([x, y], axis=1).round(2).ravel().tolist()


def write_data_set(folder: Path, photos: list[Photo]) -> None:
    """Refs, instances and links to the photos, at RefCOCO's counts."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(IMAGES):
        photo = photos[image_id % len(photos)]
        name = f"photo_{image_id:06d}.jpg"
        (folder / "images" / name).symlink_to(photo.path)
        images.append({"id": image_id, "file_name": name, "height": photo.height, "width": photo.width})
    for ann_id in range(OBJECTS):
        image_id = ann_id * IMAGES // REFS if ann_id < REFS else ann_id % IMAGES
        rows = photos[image_id % len(photos)].segmentations
        annotations.append(
            {
                "id": ann_id,
                "image_id": image_id,
                "category_id": 1,
                "bbox": [1.5, 2.25, 30.0, 40.0],
                "iscrowd": 0,
                "segmentation": rows[ann_id % len(rows)],
            }
        )
    refs: list[dict[str, Any]] = [
        {
            "ref_id": ref_id,
            "ann_id": ref_id,
            "image_id": annotations[ref_id]["image_id"],
            "category_id": 1,
            "split": "train" if annotations[ref_id]["image_id"] < TRAIN_IMAGES else "val",
            "sentences": [],
        }
        for ref_id in range(REFS)
    ]
    for sent_id in range(SENTENCES):
        ref = refs[sent_id * REFS // SENTENCES]
        texts = photos[ref["image_id"] % len(photos)].sentences
        text = texts[sent_id % len(texts)]
        ref["sentences"].append({"sent_id": sent_id, "sent": text, "raw": text, "tokens": text.split()})
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    categories = [{"id": 1, "name": "thing", "supercategory": "thing"}]
    (folder / "instances.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )


def run_stage(name: str, project: Path) -> dict[str, float]:
    """A stage in its own process: wall seconds and peak resident memory."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", f"stages.{name}"], cwd=project, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"stage {name} failed")
    return {"seconds": round(seconds, 2), "peak_rss_mb": round(usage.ru_maxrss / 1024)}


def open_index(project: Path) -> float:
    """Seconds to read images, refs (as training sees them) and masks."""
    start = time.perf_counter()
    records.read_table(project / records.INDEX.images, records.IMAGES)
    records.to_frame(records.read_table(project / records.INDEX.refs, records.REFS, records.SENTENCE_COLUMNS))
    records.read_table(project / records.INDEX.masks, records.MASKS)
    return time.perf_counter() - start


def scored_pairs(photos: list[Photo]) -> tuple[list[bytes], list[bytes]]:
    """Masks at the scored size with a moved copy of each, as a prediction that is not far off."""
    rng = np.random.default_rng(0)
    shapes = [
        resize_mask(
            decode_rle(segmentation_to_rle(row, photo.height, photo.width), photo.height, photo.width),
            SCORED_HEIGHT,
            SCORED_WIDTH,
        )
        for photo in photos
        for row in photo.segmentations
    ]
    truth = [encode_rle(mask) for mask in shapes]
    moved = [encode_rle(np.roll(mask, rng.integers(-30, 31, 2), (0, 1))) for mask in shapes]
    picks = [k % len(shapes) for k in range(SCORED_MASKS)]
    return [moved[k] for k in picks], [truth[k] for k in picks]


def numpy_loop(predicted: list[bytes], truth: list[bytes]) -> NDArray[np.int64]:
    """What most evaluation code does: a decoded mask at a time."""
    result = []
    for one, other in zip(predicted, truth, strict=True):
        a, b = decode_rle(one, SCORED_HEIGHT, SCORED_WIDTH), decode_rle(other, SCORED_HEIGHT, SCORED_WIDTH)
        result.append([np.logical_and(a, b).sum(), np.logical_or(a, b).sum()])
    return np.array(result, dtype=np.int64)


def timed(call: Callable[[], NDArray[np.int64]]) -> tuple[float, NDArray[np.int64]]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def main() -> None:
    """Build, measure, append the results."""
    real = os.environ.get("L2L_REAL_DATA")
    shutil.rmtree(WORK, ignore_errors=True)
    photos = real_photos(Path(real)) if real else drawn_photos(WORK / "photos")
    project = WORK / "project"
    write_data_set(project / "data" / "refcoco_size", photos)
    params = (ROOT / "params.yaml").read_text(encoding="utf-8")
    for old, new in (
        ("dataset: data/refshapes", "dataset: data/refcoco_size"),
        ("backend: transformers", "backend: none"),
    ):
        params = params.replace(old, new)
    (project / "params.yaml").write_text(params)

    found: list[dict[str, Any]] = [{"measure": name} | run_stage(name, project) for name in ("ingest", "split")]
    found.append({"measure": "open_index", "seconds": round(min(open_index(project) for _ in range(3)), 3)})

    predicted, truth = scored_pairs(photos)
    sizes = np.tile([SCORED_HEIGHT, SCORED_WIDTH], (SCORED_MASKS, 1))
    run_length_s, ours = timed(lambda: intersection_union_px(predicted, truth, sizes))
    loop_s, theirs = timed(lambda: numpy_loop(predicted, truth))
    if not np.array_equal(ours, theirs):
        raise SystemExit("the two ways of scoring disagree")
    found.append(
        {
            "measure": "score_masks",
            "scored_masks": SCORED_MASKS,
            "seconds": round(run_length_s, 3),
            "numpy_loop_seconds": round(loop_s, 3),
            "ratio": round(loop_s / run_length_s, 1),
        }
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    common = {
        "bench": "tables",
        "data": "real rows repeated" if real else "drawn",
        "images": IMAGES,
        "sentences": SENTENCES,
        "masks": REFS,
        "objects": OBJECTS,
        "device": f"cpu, {os.cpu_count()} cores",
        "commit": commit.strip(),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        for row in found:
            line = json.dumps(common | row)
            print(line)
            file.write(line + "\n")


if __name__ == "__main__":
    main()
