"""RefShapes scenes: objects, their places, the rendered image and exact masks.

A scene has few distinct shapes and colors, so that objects share them: a color or a shape alone is rarely unique.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

SIZES = ("small", "big")
TEXTURES = ("plain", "striped", "dotted", "outlined")
COLORS: dict[str, tuple[int, int, int]] = {  # RGB; hue or lightness distinct enough under any lighting
    "red": (212, 36, 36),
    "yellow": (248, 228, 50),
    "green": (40, 158, 60),
    "blue": (40, 92, 224),
    "purple": (134, 52, 176),
    "white": (242, 242, 242),
}

OBJECTS_RANGE = (3, 5)
DISTINCT_SHAPES_RANGE = (2, 3)  # with 3-5 objects, most share their shape ...
DISTINCT_COLORS_RANGE = (2, 3)  # ... and their color
PLAIN_SHARE = 0.6  # plain objects outnumber each texture, as in most images
DIAMETER_RANGE = {"small": (0.2, 0.23), "big": (0.36, 0.42)}  # image sides; areas differ 2.4 times or more
TILT_LIMIT_RAD = math.radians(12)  # more would turn a square into a diamond
CLOSENESS = 0.8  # least center distance as a share of the summed radii: mild occlusion, no ring's hole is covered
MIN_VISIBLE_SHARE = 0.7
MIN_VISIBLE_PX = 40
SAME_COLOR_GAP = 0.03  # share of the image side; touching objects of one color would look like one
BORDER = 0.02  # share of the image side kept free at the edge, so that no object is cut

CLUTTER_RANGE = (8, 20)  # scribbles and specks in the background
RIBBED_SHARE = 0.4  # backgrounds with faint ribs, so that stripes alone do not indicate an object
SUPERSAMPLING = 4
TEXTURE_PERIOD = 0.056  # share of the image side, about four stripes on a small object
OUTLINE_WIDTH = 0.016  # share of the image side; thinner lines vanish, thicker ones fill the arms of a small star
STRIPE_SHARE, DOT_RADIUS = 0.45, 0.3  # of the period
TEXTURE_SHADE = 0.24  # dark parts of a texture relative to the color; darker than any background, to keep white intact
NOISE_STD = 5.0  # gray levels of sensor noise


@dataclass(frozen=True)
class SceneObject:
    """Attributes of one object, independent of the others."""

    shape: str
    color: str
    size: str
    texture: str


@dataclass(frozen=True)
class Scene:
    """image: [S, S, 3] uint8 RGB. masks: [N, S, S] bool, the visible pixels of each object, disjoint."""

    image: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]
    masks: NDArray[np.bool_]


@dataclass(frozen=True)
class _Placement:
    """center_xy and diameter in shares of the image side, tilt in radians."""

    center_xy: tuple[float, float]
    diameter: float
    tilt: float


def _outline(name: str) -> list[NDArray[np.float64]]:
    """Contours of a shape of diameter 2 around the origin (even-odd fill), each [K, 2], y down."""
    turn = 2 * math.pi
    angles = [turn * k / 48 for k in range(48)]
    circle = [(math.cos(t), math.sin(t)) for t in angles]
    match name:
        case "circle":
            contours = [circle]
        case "ring":
            contours = [circle, [(0.46 * x, 0.46 * y) for x, y in circle]]
        case "square":
            contours = [[(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]]
        case "triangle":
            contours = [[(0.0, -1.08), (1.04, 0.72), (-1.04, 0.72)]]
        case "cross":
            quarter = [(0.36, -1.0), (0.36, -0.36), (1.0, -0.36)]
            turned = [[(-y, x) for x, y in quarter], [(-x, -y) for x, y in quarter], [(y, -x) for x, y in quarter]]
            contours = [sum(turned, start=quarter)]
        case "star":
            radii = [1.12 if k % 2 == 0 else 0.52 for k in range(10)]
            contours = [[(r * math.sin(turn * k / 10), -r * math.cos(turn * k / 10)) for k, r in enumerate(radii)]]
    return [np.array(contour) for contour in contours]


SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
_OUTLINES = {name: _outline(name) for name in SHAPES}
REACH = max(float(np.hypot(*c.T).max()) for contours in _OUTLINES.values() for c in contours)
"""Distance in radii from an object's center to the farthest corner of any shape."""


def draw_scene(rng: np.random.Generator, side_px: int) -> Scene:
    """One random scene of side_px x side_px; at least MIN_VISIBLE_SHARE of every object is visible."""
    while True:
        objects = _draw_objects(rng)
        placements = _place(rng, objects)
        if placements is None:
            continue
        layers = [_rasterise(o, p, side_px) for o, p in zip(objects, placements, strict=True)]
        masks = _visible_masks(layers, side_px)
        visible_px = masks.sum(axis=(1, 2))
        full_px = np.array([layer.sum() for layer in layers]) / SUPERSAMPLING**2
        if (visible_px >= np.maximum(MIN_VISIBLE_SHARE * full_px, MIN_VISIBLE_PX)).all():
            return Scene(_paint(rng, objects, placements, layers, side_px), objects, masks)


def has_rivals(objects: tuple[SceneObject, ...], index: int) -> bool:
    """Whether one other object has the same shape, and one (possibly the same) has the same color."""
    others = objects[:index] + objects[index + 1 :]
    target = objects[index]
    return any(o.shape == target.shape for o in others) and any(o.color == target.color for o in others)


def _draw_objects(rng: np.random.Generator) -> tuple[SceneObject, ...]:
    """Attributes of a scene's objects, from few shapes and colors; at least two objects have rivals."""
    while True:
        shapes = rng.permutation(SHAPES)[: rng.integers(*DISTINCT_SHAPES_RANGE, endpoint=True)]
        colors = rng.permutation(list(COLORS))[: rng.integers(*DISTINCT_COLORS_RANGE, endpoint=True)]
        objects = tuple(
            SceneObject(
                shape=str(rng.choice(shapes)),
                color=str(rng.choice(colors)),
                size=str(rng.choice(SIZES)),
                texture="plain" if rng.random() < PLAIN_SHARE else str(rng.choice(TEXTURES[1:])),
            )
            for _ in range(rng.integers(*OBJECTS_RANGE, endpoint=True))
        )
        if sum(has_rivals(objects, k) for k in range(len(objects))) >= 2:
            return objects


def _place(rng: np.random.Generator, objects: tuple[SceneObject, ...]) -> list[_Placement] | None:
    """Random places, or None if the objects do not fit."""
    placements: list[_Placement] = []
    for index, item in enumerate(objects):
        for _ in range(60):  # tries per object; a crowded scene is redrawn as a whole
            diameter = float(rng.uniform(*DIAMETER_RANGE[item.size]))
            low = BORDER + REACH * diameter / 2
            x, y = rng.uniform(low, 1 - low, size=2).tolist()
            clear = (
                math.hypot(x - placed.center_xy[0], y - placed.center_xy[1])
                >= _least_distance(diameter, placed.diameter, same_color=item.color == other.color)
                for other, placed in zip(objects, placements, strict=False)  # those placed so far
            )
            if all(clear):
                placements.append(_Placement((x, y), diameter, float(rng.uniform(-TILT_LIMIT_RAD, TILT_LIMIT_RAD))))
                break
        if len(placements) != index + 1:
            return None
    return placements


def _least_distance(first: float, second: float, same_color: bool) -> float:
    """Least distance between the centers of objects of these diameters, in image sides."""
    if same_color:
        return REACH * (first + second) / 2 + SAME_COLOR_GAP
    return CLOSENESS * (first + second) / 2


def _rasterise(item: SceneObject, placement: _Placement, side_px: int) -> NDArray[np.bool_]:
    """The complete object (ignoring occlusion) on the supersampled grid."""
    fine = side_px * SUPERSAMPLING
    cos, sin = math.cos(placement.tilt), math.sin(placement.tilt)
    turn = np.array([[cos, sin], [-sin, cos]])
    contours = [
        np.rint((c @ turn * placement.diameter / 2 + placement.center_xy) * fine).astype(np.int32)
        for c in _OUTLINES[item.shape]
    ]
    layer = np.zeros((fine, fine), dtype=np.uint8)
    cv2.fillPoly(layer, contours, 1)
    return layer.astype(bool)


def _visible_masks(layers: list[NDArray[np.bool_]], side_px: int) -> NDArray[np.bool_]:
    """Visible masks: later layers cover earlier ones; a pixel belongs to the object that fills more than half of it."""
    top = np.zeros(layers[0].shape, dtype=np.uint8)
    for index, layer in enumerate(layers):
        top[layer] = index + 1
    shares = (
        cv2.resize((top == index + 1).astype(np.float32), (side_px, side_px), interpolation=cv2.INTER_AREA)
        for index in range(len(layers))
    )
    return np.stack([share > 0.5 for share in shares])


def _paint(
    rng: np.random.Generator,
    objects: tuple[SceneObject, ...],
    placements: list[_Placement],
    layers: list[NDArray[np.bool_]],
    side_px: int,
) -> NDArray[np.uint8]:
    """Background, objects from back to front, then lighting and noise; [S, S, 3] uint8 RGB."""
    canvas = _background(rng, side_px * SUPERSAMPLING)
    for item, placement, layer in zip(objects, placements, layers, strict=True):
        color = np.clip(np.array(COLORS[item.color]) + rng.integers(-8, 9, size=3), 0, 255)
        window = _window(placement, canvas.shape[0])
        part = layer[window]
        canvas[window][part] = color
        dark = part & _dark_part(rng, item.texture, part, canvas.shape[0])
        canvas[window][dark] = (TEXTURE_SHADE * color).astype(np.uint8)
    image = cv2.resize(canvas, (side_px, side_px), interpolation=cv2.INTER_AREA).astype(np.float32)
    ramp = np.linspace(-1, 1, side_px, dtype=np.float32)
    slope_x, slope_y = rng.uniform(-0.1, 0.1, size=2)  # light varies by at most a fifth per axis
    light = 1.0 + slope_x * ramp[None, :] + slope_y * ramp[:, None]
    noisy = image * light[..., None] + rng.normal(0.0, NOISE_STD, size=image.shape)
    return np.asarray(np.clip(np.rint(noisy), 0, 255), dtype=np.uint8)


def _window(placement: _Placement, fine: int) -> tuple[slice, slice]:
    """Rows and columns of the supersampled grid that contain the object; BORDER keeps them inside the image."""
    half = math.ceil(REACH * placement.diameter / 2 * fine) + 1
    x, y = (round(share * fine) for share in placement.center_xy)
    return slice(y - half, y + half), slice(x - half, x + half)


def _dark_part(rng: np.random.Generator, texture: str, part: NDArray[np.bool_], fine: int) -> NDArray[np.bool_]:
    """Dark pixels of a texture, [h, w] bool like part, the object's pixels; fine: the grid's side."""
    if texture == "plain":
        return np.zeros(part.shape, dtype=bool)
    if texture == "outlined":
        depth_px = cv2.distanceTransform(part.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        return np.asarray(depth_px <= OUTLINE_WIDTH * fine)
    angle = float(rng.uniform(0, math.pi))
    steps = (np.arange(part.shape[0]) - part.shape[0] / 2) / (TEXTURE_PERIOD * fine)
    dx, dy = steps[None, :], steps[:, None]
    along = dx * math.cos(angle) + dy * math.sin(angle)
    if texture == "striped":
        return np.asarray(along % 1.0 < STRIPE_SHARE)
    across = dy * math.cos(angle) - dx * math.sin(angle)
    return np.asarray(np.hypot(along - np.rint(along), across - np.rint(across)) < DOT_RADIUS)


def _background(rng: np.random.Generator, fine: int) -> NDArray[np.uint8]:
    """Dull blotches, sometimes ribbed, with scribbles and specks as distractors; [fine, fine, 3] uint8."""
    cells = int(rng.integers(2, 8))
    tone = rng.uniform(90, 150) + rng.uniform(-16, 16, size=3)  # dull, so that every object color stands out
    blotches = tone + rng.uniform(-28, 28, size=(cells, cells, 1)) + rng.uniform(-10, 10, size=(cells, cells, 3))
    canvas = cv2.resize(np.clip(blotches, 0, 255).astype(np.uint8), (fine, fine), interpolation=cv2.INTER_CUBIC)
    if rng.random() < RIBBED_SHARE:
        slope_x, slope_y = rng.uniform(-1, 1, size=2) / TEXTURE_PERIOD / fine
        phase = slope_x * np.arange(fine)[None, :] + slope_y * np.arange(fine)[:, None]
        canvas[phase % 1.0 < 0.5] //= 10
        canvas[phase % 1.0 < 0.5] *= 9
    for _ in range(int(rng.integers(*CLUTTER_RANGE, endpoint=True))):
        shade = np.clip(tone + rng.uniform(-55, 55) + rng.uniform(-18, 18, size=3), 0, 255).tolist()
        x, y = rng.uniform(0, fine, size=2).tolist()
        if rng.random() < 0.5:
            steps = rng.uniform(-0.1, 0.1, size=(4, 2)) * fine
            scribble = np.rint(np.cumsum(np.vstack([[x, y], steps]), axis=0)).astype(np.int32)
            cv2.polylines(canvas, [scribble], False, shade, thickness=max(1, int(rng.uniform(0.006, 0.016) * fine)))
        else:  # at most a quarter of a small object's diameter
            cv2.circle(canvas, (int(x), int(y)), max(1, int(rng.uniform(0.006, 0.02) * fine)), shade, -1)
    return np.asarray(canvas, dtype=np.uint8)
