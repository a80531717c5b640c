"""Index tables for tests of the priors: random scenes, and RefCOCO's real annotations."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from l2l_core.artifacts import records
from l2l_core.config import PriorsParams, load_params
from l2l_core.mllm.backend import PriorBackend, Question
from l2l_core.mllm.query import query_table
from l2l_core.priors.table import interpret

ROOT = Path(__file__).parents[1]


def prior_params(engine: dict[str, object] | None = None, **changes: object) -> PriorsParams:
    """The shipped parameters with changes; by default, priors are simulated and no model is named."""
    shipped = load_params(ROOT / "params.yaml").priors.model_dump()
    plain = {"backend": "simulated", "model": None, "structured_output": True}
    return PriorsParams.model_validate(shipped | plain | changes | {"engine": shipped["engine"] | (engine or {})})


def collect_priors(backend: PriorBackend, questions: Sequence[Question]) -> pa.Table:
    """Table records.PRIORS of one batch, as the two stages make it."""
    return interpret(query_table(backend, questions))


@dataclass(frozen=True)
class Index:
    """The three tables that priors read, as frames; `save` writes them like ingest."""

    images: pd.DataFrame
    refs: pd.DataFrame
    objects: pd.DataFrame

    def save(self, folder: Path) -> records.IndexPaths:
        paths = records.IndexPaths(*(folder / f"{name}.parquet" for name in ("images", "refs", "objects", "masks")))
        for path, frame, schema in (
            (paths.images, self.images, records.IMAGES),
            (paths.refs, self.refs, records.REFS),
            (paths.objects, self.objects, records.OBJECTS),
        ):
            records.write_table(pa.Table.from_pylist(frame.to_dict("records"), schema), path, schema)
        return paths


def image_row(image_id: int, height: int, width: int) -> dict[str, object]:
    return {"image_id": image_id, "file_name": f"images/{image_id}.png", "height": height, "width": width, "sha256": ""}


def ref_row(
    sent_id: int,
    image_id: int,
    sentence: str,
    bbox: list[float] | None,
    ref_id: int = 0,
    ann_id: int = 0,
    split: str = "val",
) -> dict[str, object]:
    return {
        "sent_id": sent_id,
        "ref_id": ref_id,
        "ann_id": ann_id,
        "image_id": image_id,
        "category": "thing",
        "sentence": sentence,
        "style": "",
        "split": split,
        "bbox": bbox,
    }


def random_scenes(images: int, seed: int = 0) -> Index:
    """Images of several sizes with six objects each, of which two are referred to; objects may overlap."""
    rng = np.random.default_rng(seed)
    image_rows, ref_rows, object_rows = [], [], []
    for image_id in range(images):
        height, width = ((96, 96), (480, 640), (640, 427))[image_id % 3]
        image_rows.append(image_row(image_id, height, width))
        for place in range(6):
            sides = rng.uniform(0.12, 0.45, 2) * (width, height)
            corner = rng.uniform(0, 1, 2) * ((width, height) - sides)
            box = [float(np.float32(value)) for value in (*corner, *(corner + sides))]
            ann_id = image_id * 10 + place
            category = f"kind {place % 2}"
            object_rows.append({"ann_id": ann_id, "image_id": image_id, "category": category, "bbox": box})
            if place < 2:
                ref = ref_row(ann_id, image_id, "the red cup on the left", box, ref_id=ann_id, ann_id=ann_id)
                ref_rows.append({**ref, "category": category})
    return Index(pd.DataFrame(image_rows), pd.DataFrame(ref_rows), pd.DataFrame(object_rows))


def refcoco_testa(real_data: Path) -> Index:
    """RefCOCO's real testA: every sentence and every referred object."""
    folder = real_data / "refcoco_annotations"
    instances = json.loads((folder / "instances_bbox_only.json").read_text())
    refs = [ref for ref in pickle.loads((folder / "refs(unc).p").read_bytes()) if ref["split"] == "testA"]
    used = {ref["image_id"] for ref in refs}
    boxes = {}
    object_rows = []
    for item in instances["annotations"]:
        if item["image_id"] in used:
            x, y, width, height = item["bbox"]
            boxes[item["id"]] = [x, y, x + width, y + height]
            category = str(item["category_id"])
            row = {"ann_id": item["id"], "image_id": item["image_id"], "category": category, "bbox": boxes[item["id"]]}
            object_rows.append(row)
    ref_rows = [
        {
            **ref_row(sentence["sent_id"], ref["image_id"], sentence["sent"], boxes[ref["ann_id"]], split="testA"),
            "ref_id": ref["ref_id"],
            "ann_id": ref["ann_id"],
            "category": str(ref["category_id"]),
        }
        for ref in refs
        for sentence in ref["sentences"]
    ]
    image_rows = [
        image_row(item["id"], item["height"], item["width"]) for item in instances["images"] if item["id"] in used
    ]
    return Index(pd.DataFrame(image_rows), pd.DataFrame(ref_rows), pd.DataFrame(object_rows))


BOX_2 = {
    "found": True,
    "target": "cup",
    "attributes": [],
    "relation": "",
    "anchor": "",
    "boxes": [[1, 2, 3, 4]],
    "point": None,
    "confidence": 1,
}
"""A complete response to the prompt box-2."""
