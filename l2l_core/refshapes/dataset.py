"""RefShapes, the built-in dataset: procedural scenes with sentences that a solver found unambiguous.

The files follow the layout of lichengunc/refer, so the RefCOCO reader reads them: refs(refshapes).json,
instances.json, images/*.png. The same parameters give the same bytes. RefShapes is a benchmark: any change of a scene
or a sentence must raise REFSHAPES_VERSION.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from l2l_core.config import RefShapesParams
from l2l_core.core.files import atomic_dir
from l2l_core.core.masks import encode_rle
from l2l_core.core.progress import progress
from l2l_core.core.threads import thread_count
from l2l_core.refshapes.language import STYLES, say
from l2l_core.refshapes.scene import SHAPES, Scene, draw_scene, has_rivals
from l2l_core.refshapes.solver import World, measure, solve

REFSHAPES_VERSION = "1"

SPLIT_STREAMS = {"train": 0, "val": 1, "test": 2, "extra": 3}
"""Number that separates a split's random stream; `extra` is for scenes beyond the written dataset."""

TRIES_PER_OBJECT = 12  # sentence draws before trying another object; a style fits an object soon or never
IMAGES_PER_PROCESS = 200
"""Fewest images that justify another process: drawing them takes a few seconds, starting it about one."""
SAME_OBJECT_SHARE = 0.4  # share of an image's further sentences that repeat an earlier target


@dataclass(frozen=True)
class Expression:
    """A sentence that refers to objects[target] of its scene and to no other object."""

    target: int
    style: str
    sentence: str


def make_scene(
    seed: int, split: str, index: int, image_size_px: int = 96, sentences: int = 2
) -> tuple[Scene, tuple[Expression, ...]]:
    """Scene `index` of a split with its sentences, grouped by target; any index >= 0 exists.

    Different (seed, split, index) use different random streams. Styles alternate over the sentences of a split.
    """
    rng = np.random.default_rng([seed, SPLIT_STREAMS[split], index])
    styles = [STYLES[(index * sentences + k) % len(STYLES)] for k in range(sentences)]
    while True:
        scene = draw_scene(rng, image_size_px)
        expressions = _describe(scene, styles, rng)
        if expressions is not None:
            return scene, tuple(sorted(expressions, key=lambda e: e.target))


def write_refshapes(folder: str | Path, params: RefShapesParams) -> None:
    """Write the dataset atomically, replacing the folder; on failure, the old folder stays."""
    with atomic_dir(Path(folder)) as building:
        (building / "images").mkdir()
        _fill(building, params)


def _describe(scene: Scene, styles: list[str], rng: np.random.Generator) -> list[Expression] | None:
    """One expression per style, all distinct; None if the scene has none for some style."""
    world = measure(scene.objects, scene.masks)
    named: list[Expression] = []
    for style in styles:
        candidates = [int(k) for k in rng.permutation(len(scene.objects)) if has_rivals(scene.objects, int(k))]
        old = {expression.target for expression in named}
        again = rng.random() < SAME_OBJECT_SHARE
        candidates.sort(key=lambda k: (k in old) != again)
        for target in candidates:
            sentence = _unambiguous(target, scene, world, style, rng)
            if sentence is not None and all(sentence != expression.sentence for expression in named):
                named.append(Expression(target, style, sentence))
                break
        else:
            return None
    return named


def _unambiguous(target: int, scene: Scene, world: World, style: str, rng: np.random.Generator) -> str | None:
    for _ in range(TRIES_PER_OBJECT):
        sentence = say(target, scene.objects, world, style, rng)
        if solve(sentence, world) == target:
            return sentence
    return None


def _scenes(
    wanted: Sequence[tuple[str, int]], params: RefShapesParams
) -> Iterator[tuple[Scene, tuple[Expression, ...]]]:
    """`make_scene` of every (split, index), in order; large numbers run in one process per core."""
    splits, indices = zip(*wanted, strict=True)
    make = partial(_make, params)
    workers = min(thread_count(), len(wanted) // IMAGES_PER_PROCESS)
    if workers < 2:
        yield from map(make, splits, indices)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(make, splits, indices, chunksize=IMAGES_PER_PROCESS // 8)


def _make(params: RefShapesParams, split: str, index: int) -> tuple[Scene, tuple[Expression, ...]]:
    return make_scene(params.seed, split, index, params.image_size_px, params.sentences_per_image)


def _fill(folder: Path, params: RefShapesParams) -> None:
    side_px = params.image_size_px
    counts = {"train": params.train_images, "val": params.val_images, "test": params.test_images}
    wanted = [(split, index) for split, count in counts.items() for index in range(count)]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    refs: list[dict[str, Any]] = []
    sent_id = 0
    scenes = progress(_scenes(wanted, params), "refshapes", "image", total=len(wanted))
    for image_id, ((split, index), (scene, expressions)) in enumerate(zip(wanted, scenes, strict=True)):
        file_name = f"{split}_{index:06d}.png"
        Image.fromarray(scene.image).save(folder / "images" / file_name)
        images.append({"id": image_id, "file_name": file_name, "height": side_px, "width": side_px})
        first_ann_id = len(annotations)
        annotations += [
            _annotation(scene, k, ann_id=first_ann_id + k, image_id=image_id) for k in range(len(scene.objects))
        ]
        for target, group in groupby(expressions, key=lambda e: e.target):
            sentences = [
                {
                    "sent_id": sent_id + k,
                    "sent": e.sentence,
                    "raw": e.sentence,
                    "tokens": e.sentence.split(),
                    "style": e.style,
                }
                for k, e in enumerate(group)
            ]
            sent_id += len(sentences)
            refs.append(
                {
                    "ref_id": len(refs),
                    "ann_id": first_ann_id + target,
                    "category_id": annotations[first_ann_id + target]["category_id"],
                    "image_id": image_id,
                    "file_name": file_name,
                    "split": split,
                    "sent_ids": [sentence["sent_id"] for sentence in sentences],
                    "sentences": sentences,
                }
            )
    info = {"description": "RefShapes", "version": REFSHAPES_VERSION, "params": params.model_dump()}
    categories = [{"id": k, "name": shape, "supercategory": "shape"} for k, shape in enumerate(SHAPES, start=1)]
    instances = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    for name, content in (("refs(refshapes).json", refs), ("instances.json", instances)):
        (folder / name).write_text(json.dumps(content, sort_keys=True) + "\n", encoding="utf-8")


def _annotation(scene: Scene, index: int, ann_id: int, image_id: int) -> dict[str, Any]:
    """COCO annotation of one object's visible pixels, plus its attributes."""
    mask, item = scene.masks[index], scene.objects[index]
    ys, xs = np.nonzero(mask)
    left, top = int(xs.min()), int(ys.min())
    return {
        "id": ann_id,
        "image_id": image_id,
        "category_id": SHAPES.index(item.shape) + 1,
        "attributes": {"color": item.color, "size": item.size, "texture": item.texture},
        "segmentation": {"size": list(mask.shape), "counts": encode_rle(mask).decode("ascii")},
        "bbox": [left, top, int(xs.max()) + 1 - left, int(ys.max()) + 1 - top],
        "area": int(mask.sum()),
        "iscrowd": 0,
    }
