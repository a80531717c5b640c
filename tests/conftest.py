"""Shared fixtures."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a separate environment run only if `-m` names their marker."""
    if "vllm" not in config.option.markexpr:
        apart = [item for item in items if item.get_closest_marker("vllm")]
        items[:] = [item for item in items if item not in apart]
        config.hook.pytest_deselected(items=apart)


@pytest.fixture
def real_data() -> Path:
    """The folder of real datasets; tests that need it are skipped if it is missing."""
    folder = os.environ.get("L2L_REAL_DATA")
    if not folder:
        pytest.skip("L2L_REAL_DATA is not set: no real data to test with")
    return Path(folder)


@dataclass
class TinyRefcoco:
    """A dataset in RefCOCO's layout on disk. Change its rows, `save()`, and read it again."""

    folder: Path
    refs: list[dict[str, Any]]
    instances: dict[str, Any]
    truth: dict[int, np.ndarray]  # ann_id -> [H, W] bool, drawn pixel by pixel

    def save(self, refs_name: str = "refs(unc).p") -> None:
        for old in self.folder.glob("*refs(*"):
            old.unlink()
        content = pickle.dumps(self.refs, 2) if refs_name.endswith(".p") else json.dumps(self.refs).encode()
        (self.folder / refs_name).write_bytes(content)
        (self.folder / "instances.json").write_text(json.dumps(self.instances), encoding="utf-8")

    def ref(self, ref_id: int) -> dict[str, Any]:
        return next(row for row in self.refs if row["ref_id"] == ref_id)

    def annotation(self, ann_id: int) -> dict[str, Any]:
        return next(row for row in self.instances["annotations"] if row["id"] == ann_id)

    def image(self, image_id: int) -> dict[str, Any]:
        return next(row for row in self.instances["images"] if row["id"] == image_id)

    def image_path(self, image_id: int) -> Path:
        return self.folder / "images" / self.image(image_id)["file_name"]


def box_mask(height: int, width: int, *boxes: tuple[int, int, int, int]) -> np.ndarray:
    """[H, W] bool, true inside boxes x1 y1 x2 y2 (end-exclusive)."""
    mask = np.zeros((height, width), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = True
    return mask


def corners(x1: int, y1: int, x2: int, y2: int) -> list[float]:
    return [float(value) for value in (x1, y1, x2, y1, x2, y2, x1, y2)]


def column_runs(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed counts: lengths of the runs down the columns, background first."""
    runs, current = [0], False
    for value in mask.ravel(order="F").tolist():
        if value != current:
            runs.append(0)
            current = value
        runs[-1] += 1
    return runs


@pytest.fixture
def tiny_refcoco(tmp_path: Path) -> TinyRefcoco:
    """Six images (four train, one val, one testA), masks as polygon, polygons, compressed and uncompressed runs.

    ref_id, ann_id and image_id are 10 k, 100 k and k for k = 1..6; sent_ids are 1000 k and 1000 k + 1. Annotation 999
    of image 1 is an object that no sentence refers to.
    """
    folder = tmp_path / "tiny"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    refs: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    truth: dict[int, np.ndarray] = {}
    splits = ("train", "train", "train", "train", "val", "testA")
    for k, split in enumerate(splits, start=1):
        height, width = 40 + k, 60 - k
        boxes = [(4, 5, 20 + k, 25), (30, 10, 40, 10 + 3 * k)][: 2 if k % 2 == 0 else 1]
        mask = box_mask(height, width, *boxes)
        truth[100 * k] = mask
        compressed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        segmentation: object = [corners(*box) for box in boxes]
        if k in (3, 5):
            segmentation = {"size": [height, width], "counts": compressed["counts"].decode("ascii")}
        if k == 4:
            segmentation = {"size": [height, width], "counts": column_runs(mask)}
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        file_name = f"photo_{k}.{'jpg' if k % 2 else 'png'}"
        Image.fromarray(pixels).save(folder / "images" / file_name)
        images.append({"id": k, "file_name": file_name, "height": height, "width": width})
        right, bottom = max(box[2] for box in boxes), max(box[3] for box in boxes)
        annotations.append(
            {
                "id": 100 * k,
                "image_id": k,
                "category_id": 1 + k % 2,
                "bbox": [4.0, 5.0, right - 4.0, bottom - 5.0],
                "area": int(mask.sum()),
                "iscrowd": int(k == 4),
                "segmentation": segmentation,
            }
        )
        texts = (f"the left thing of photo {k}", f"thing {k}, not the other")
        refs.append(
            {
                "ref_id": 10 * k,
                "ann_id": 100 * k,
                "image_id": k,
                "category_id": 1 + k % 2,
                "file_name": f"photo_{k}_{100 * k}.jpg",  # as published: with the annotation's id, no real file
                "split": split,
                "sent_ids": [1000 * k, 1000 * k + 1],
                "sentences": [
                    {"sent_id": 1000 * k + n, "sent": text, "raw": text.upper(), "tokens": text.split()}
                    for n, text in enumerate(texts)
                ],
            }
        )
    annotations.append(
        {"id": 999, "image_id": 1, "category_id": 1, "bbox": [1.5, 2, 3, 4], "iscrowd": 0, "segmentation": []}
    )
    categories = [
        {"id": 1, "name": "cup", "supercategory": "thing"},
        {"id": 2, "name": "cat", "supercategory": "thing"},
    ]
    data = TinyRefcoco(folder, refs, {"images": images, "annotations": annotations, "categories": categories}, truth)
    data.save()
    return data
