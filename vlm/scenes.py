"""Scenes to learn from, without end: pictures, what lies in which patch, and sentences with their object.

They come from the generator of the data set RefShapes with a seed of their own, so that no scene of it is among them.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from l2l_core.core.progress import progress
from l2l_core.refshapes.language import STYLES, say
from l2l_core.refshapes.scene import COLORS, OBJECTS_RANGE, SHAPES, SIZES, TEXTURES, draw_scene
from l2l_core.refshapes.solver import measure, solve

SEED = 2_000_003
"""First number of every scene's random stream. Those of the data set begin with `refshapes.seed`, which must differ."""

IMAGE_SIZE_PX = 96
PATCH_PX = 8
GRID = IMAGE_SIZE_PX // PATCH_PX
TRIES = 16  # draws of a sentence a scene, in turns of the styles; more than half mean one object
SHARD_SCENES = 1000
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "texture": TEXTURES,
    "size": SIZES,
}
MAX_OBJECTS = OBJECTS_RANGE[1]


@dataclass(frozen=True)
class Scenes:
    """N scenes with M sentences, grouped by scene."""

    images: NDArray[np.uint8]  # [N, S, S, 3] RGB
    patch_object: NDArray[np.int8]  # [N, GRID * GRID] number of the object that covers most of a patch, -1: none
    attributes: NDArray[np.int8]  # [N, MAX_OBJECTS, 4] values of ATTRIBUTES, -1: no such object
    xyxy: NDArray[np.float32]  # [N, MAX_OBJECTS, 4] shares of the image
    sentences: NDArray[np.str_]  # [M]
    scene: NDArray[np.int32]  # [M] row of `images`, ascending
    target: NDArray[np.int8]  # [M] number of the object that is meant


def make_scenes(first: int, count: int) -> Scenes:
    """Scenes number first .. first + count - 1; the same numbers give the same scenes."""
    made = [_make(number) for number in range(first, first + count)]
    images, patches, attributes, boxes, named = zip(*made, strict=True)
    told = [(row, target, sentence) for row, pairs in enumerate(named) for target, sentence in pairs]
    return Scenes(
        np.stack(images),
        np.stack(patches),
        np.stack(attributes),
        np.stack(boxes),
        np.array([sentence for _, _, sentence in told]),
        np.array([row for row, _, _ in told], np.int32),
        np.array([target for _, target, _ in told], np.int8),
    )


def stored_scenes(folder: Path, shards: Iterable[int], workers: int) -> list[Path]:
    """Files of SHARD_SCENES scenes each; those that are not in the folder are made."""
    paths = {shard: folder / f"scenes-{SEED}-{shard:05d}.npz" for shard in shards}
    folder.mkdir(parents=True, exist_ok=True)
    missing = [(shard, path) for shard, path in paths.items() if not path.exists()]
    if missing:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for _ in progress(pool.map(_store, *zip(*missing, strict=True)), "scenes", "shard", total=len(missing)):
                pass
    return list(paths.values())


def read_scenes(paths: Iterable[Path]) -> Scenes:
    """The scenes of several files as one."""
    parts = [dict(np.load(path)) for path in paths]
    starts = np.cumsum([0, *(len(part["images"]) for part in parts)])
    for part, start in zip(parts, starts, strict=False):
        part["scene"] = part["scene"] + np.int32(start)
    return Scenes(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _store(shard: int, path: Path) -> None:
    scenes = make_scenes(shard * SHARD_SCENES, SHARD_SCENES)
    part = path.with_name(f".{path.name}.part.npz")
    np.savez(part, **vars(scenes))
    part.replace(path)


def _make(number: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], list[tuple[int, str]]]:
    rng = np.random.default_rng([SEED, number])
    scene = draw_scene(rng, IMAGE_SIZE_PX)
    count = len(scene.objects)
    covered = np.stack(
        [cv2.resize(m.astype(np.float32), (GRID, GRID), interpolation=cv2.INTER_AREA) for m in scene.masks]
    )
    patches = np.where(covered.max(axis=0) >= 0.3, covered.argmax(axis=0), -1).astype(np.int8).ravel()
    attributes = np.full((MAX_OBJECTS, len(ATTRIBUTES)), -1, np.int8)
    boxes = np.zeros((MAX_OBJECTS, 4), np.float32)
    for k, (item, mask) in enumerate(zip(scene.objects, scene.masks, strict=True)):
        attributes[k] = [values.index(getattr(item, name)) for name, values in ATTRIBUTES.items()]
        ys, xs = np.nonzero(mask)
        boxes[k] = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / IMAGE_SIZE_PX
    world = measure(scene.objects, scene.masks)
    named: dict[str, int] = {}
    for k in range(TRIES):
        sentence = say(int(rng.integers(count)), scene.objects, world, STYLES[k % len(STYLES)], rng)
        # Whichever object it turns out to mean: what counts is that it means one.
        target = solve(sentence, world)
        if target is not None:
            named[sentence] = target
    return scene.image, patches, attributes, boxes, [(target, sentence) for sentence, target in named.items()]
