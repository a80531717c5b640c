"""Draws the example data set `examples/tabletop`: cups, books and balls on a table.

    python examples/draw_tabletop.py [FOLDER]

Writes images/*.jpg and pairs.jsonl there, and beside it FOLDER_responses.jsonl. Everything is drawn and written here;
no photo, model or other data set is part of it. The responses imitate a multimodal LLM: they are the drawn places,
moved a little; one is missing, one says that there is nothing, one is another object's.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 160, 120
SCALE = 4  # drawn larger and shrunk, for smooth edges
TABLE_Y = 62  # where wall and table meet
BOX_NOISE_PX = 4  # of the responses' corners
QUALITY = 88  # of the JPEGs: some 5 kB each

COLORS = {
    "red": (196, 52, 44),
    "blue": (48, 88, 176),
    "green": (62, 138, 74),
    "yellow": (226, 184, 52),
    "white": (232, 230, 222),
    "black": (44, 44, 50),
    "orange": (226, 124, 44),
}
WALLS = ((208, 200, 184), (186, 198, 204), (202, 188, 180), (190, 200, 182))
TABLES = ((142, 100, 64), (168, 130, 92), (112, 82, 62))


@dataclass(frozen=True)
class Thing:
    """One object: kind (cup, book, ball), color, center of its foot and height in pixels."""

    kind: str
    color: str
    x: int
    y: int
    size: int


@dataclass(frozen=True)
class Said:
    """A sentence about things[target]; response: the imitated one: "box", "none", "missing", "wrong"."""

    sentence: str
    target: int
    response: str = "box"


Scene = tuple[str, bool, list[Thing], list[Said]]  # split, whether there are masks

SCENES: list[Scene] = [
    (
        "train",
        True,
        [Thing("cup", "red", 40, 92, 30), Thing("book", "blue", 112, 96, 16)],
        [Said("the red cup", 0), Said("the book on the right", 1)],
    ),
    (
        "train",
        True,
        [Thing("ball", "orange", 46, 98, 26), Thing("ball", "green", 116, 90, 22)],
        [Said("orange ball", 0), Said("the ball on the right side", 1)],
    ),
    (
        "train",
        True,
        [Thing("book", "green", 50, 100, 18), Thing("cup", "white", 118, 94, 32)],
        [Said("the white mug", 1), Said("the green book", 0, "wrong")],
    ),
    (
        "train",
        True,
        [Thing("cup", "blue", 34, 90, 28), Thing("cup", "yellow", 84, 100, 28), Thing("ball", "red", 132, 94, 20)],
        [Said("the yellow cup in the middle", 1), Said("the cup on the left", 0), Said("red ball", 2)],
    ),
    (
        "train",
        False,
        [Thing("ball", "blue", 44, 92, 24), Thing("cup", "green", 112, 98, 30)],
        [Said("the blue ball", 0), Said("green mug on the right", 1)],
    ),
    (
        "train",
        False,
        [Thing("book", "red", 48, 96, 16), Thing("book", "yellow", 116, 98, 18)],
        [Said("the red book", 0), Said("the book on the right, not the red one", 1, "missing")],
    ),
    (
        "train",
        False,
        [Thing("cup", "black", 46, 98, 34), Thing("ball", "yellow", 118, 92, 20)],
        [Said("the black cup", 0), Said("a yellow ball", 1)],
    ),
    (
        "train",
        False,
        [Thing("ball", "red", 30, 94, 22), Thing("cup", "white", 80, 92, 28), Thing("book", "blue", 128, 100, 14)],
        [Said("ball left of the white cup", 0), Said("the blue book", 2), Said("the cup between ball and book", 1)],
    ),
    (
        "train",
        False,
        [Thing("cup", "orange", 52, 94, 30), Thing("cup", "blue", 110, 100, 30)],
        [Said("the orange mug", 0), Said("cup on the right", 1, "none")],
    ),
    (
        "val",
        True,
        [Thing("cup", "green", 40, 96, 30), Thing("ball", "orange", 110, 94, 24)],
        [Said("the green cup", 0), Said("the ball on the right", 1)],
    ),
    (
        "val",
        True,
        [Thing("book", "red", 52, 98, 16), Thing("cup", "yellow", 118, 96, 32)],
        [Said("yellow mug", 1), Said("the red book on the left", 0)],
    ),
    (
        "val",
        True,
        [Thing("ball", "blue", 36, 96, 24), Thing("ball", "yellow", 84, 92, 22), Thing("cup", "red", 130, 98, 28)],
        [Said("the blue ball", 0), Said("the ball in the middle", 1), Said("a red cup", 2)],
    ),
]


def main() -> None:
    """Write the data set."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "tabletop"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pairs: list[dict[str, Any]] = []
    responses: list[dict[str, Any]] = []
    for number, (split, has_masks, things, said) in enumerate(SCENES, start=1):
        name = f"images/{number:02d}.jpg"
        draw_scene(number, things, rng).save(folder / name, quality=QUALITY)
        outlines = [outline(thing) for thing in things]
        for one in said:
            pair: dict[str, Any] = {"image": name, "sentence": one.sentence}
            if has_masks:
                pair["mask"] = {"polygon": outlines[one.target]}
            if split != "train":
                pair["split"] = split
            corners = np.reshape(outlines[one.target if one.response != "wrong" else one.target - 1], (-1, 2))
            box = np.concatenate([corners.min(0), corners.max(0)]) + rng.integers(-BOX_NOISE_PX, BOX_NOISE_PX + 1, 4)
            box = box.clip(0, [WIDTH, HEIGHT, WIDTH, HEIGHT]).round().astype(int)
            text = {"bbox": None if one.response == "none" else box.tolist()}
            if one.response != "missing":
                responses.append(
                    {
                        "sent_id": len(pairs),
                        "expression": one.sentence,
                        "raw_text": json.dumps(text),
                        "coord_space": "pixel",
                    }
                )
            pairs.append(pair)
    # Not in the folder: a data set of pairs has one .jsonl file.
    for path, rows in (
        (folder / "pairs.jsonl", pairs),
        (folder.with_name(f"{folder.name}_responses.jsonl"), responses),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def draw_scene(number: int, things: list[Thing], rng: np.random.Generator) -> Image.Image:
    """The things on a table before a wall, [HEIGHT, WIDTH] RGB."""
    canvas = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), WALLS[number % len(WALLS)])
    draw = ImageDraw.Draw(canvas)
    table = TABLES[number % len(TABLES)]
    draw.rectangle(_scaled(0, TABLE_Y, WIDTH, HEIGHT), fill=table)
    for _ in range(40):  # the grain of the wood
        x, y = rng.uniform(-20, WIDTH), rng.uniform(TABLE_Y + 2, HEIGHT)
        shade = _shade(table, rng.uniform(0.86, 1.1))
        draw.line(
            _scaled(x, y, x + rng.uniform(20, 80), y + rng.uniform(-1, 1)), fill=shade, width=int(rng.integers(1, 4))
        )
    left = int(rng.integers(10, 100))  # a window in the wall
    draw.rectangle(_scaled(left, 8, left + 36, 46), fill=(240, 240, 236))
    draw.rectangle(_scaled(left + 3, 11, left + 33, 43), fill=(174, 206, 228))
    draw.line(_scaled(left + 18, 11, left + 18, 43), fill=(240, 240, 236), width=2 * SCALE)
    shadows = Image.new("L", canvas.size, 0)
    for thing in things:
        reach = thing.size * (1.1 if thing.kind == "book" else 0.55)
        ImageDraw.Draw(shadows).ellipse(
            _scaled(thing.x - reach + 4, thing.y - 4, thing.x + reach + 8, thing.y + 4), fill=110
        )
    canvas.paste((30, 24, 20), mask=shadows.filter(ImageFilter.GaussianBlur(2 * SCALE)))
    for thing in things:
        _draw_thing(canvas, thing)
    small = np.asarray(canvas.resize((WIDTH, HEIGHT), Image.Resampling.BOX), dtype=np.float64)
    light = np.linspace(1.06, 0.92, WIDTH)[None, :, None]  # from the left
    noisy = small * light + rng.normal(0, 3, small.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def outline(thing: Thing) -> list[float]:
    """The thing's outer line as a polygon x, y, x, y, ... in pixels, as a person would click it."""
    canvas = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE))
    _draw_thing(canvas, thing)
    drawn = (np.asarray(canvas).max(axis=2) > 0).astype(np.uint8)
    found, _ = cv2.findContours(drawn, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    corners = cv2.approxPolyDP(max(found, key=cv2.contourArea), SCALE * 0.5, closed=True)  # half a pixel off at most
    return np.round(corners.reshape(-1) / SCALE, 1).tolist()


def _draw_thing(canvas: Image.Image, thing: Thing) -> None:
    {"cup": _draw_cup, "book": _draw_book, "ball": _draw_ball}[thing.kind](canvas, thing, COLORS[thing.color])


def _draw_cup(canvas: Image.Image, cup: Thing, color: tuple[int, int, int]) -> None:
    draw = ImageDraw.Draw(canvas)
    half, top, rim = cup.size * 0.4, cup.y - cup.size, cup.size * 0.12
    handle = _scaled(cup.x + half - 4, top + cup.size * 0.22, cup.x + half + cup.size * 0.3, cup.y - cup.size * 0.2)
    draw.ellipse(handle, outline=_shade(color, 0.8), width=int(cup.size * 0.11 * SCALE))
    for column in range(int(2 * half * SCALE)):  # darker towards the right: round, and lit from the left
        share = column / (2 * half * SCALE)
        x = (cup.x - half) * SCALE + column
        bottom = cup.y * SCALE + math.sqrt(max(0.0, 1 - (2 * share - 1) ** 2)) * rim * SCALE * 0.7 - rim * SCALE * 0.5
        draw.line((x, top * SCALE, x, bottom), fill=_shade(color, 1.08 - 0.4 * share), width=1)
    draw.ellipse(_scaled(cup.x - half, top - rim, cup.x + half, top + rim), fill=_shade(color, 1.15))
    draw.ellipse(
        _scaled(cup.x - half + 1.5, top - rim + 1, cup.x + half - 1.5, top + rim - 1), fill=_shade(color, 0.45)
    )


def _draw_book(canvas: Image.Image, book: Thing, color: tuple[int, int, int]) -> None:
    draw = ImageDraw.Draw(canvas)
    half, thick, depth = book.size * 1.1, book.size * 0.4, book.size * 0.75
    front, back = book.y - thick, book.y - thick - depth
    lean = depth * 0.5
    cover = (book.x - half, front, book.x - half + lean, back, book.x + half + lean, back, book.x + half, front)
    draw.polygon(_scaled(*cover), fill=color)
    draw.rectangle(_scaled(book.x - half, front, book.x + half, book.y), fill=_shade(color, 0.7))
    draw.rectangle(_scaled(book.x - half + 2, front + 1.5, book.x + half, book.y - 1.5), fill=(236, 230, 212))
    side = (book.x + half, front, book.x + half + lean, back, book.x + half + lean, back + thick, book.x + half, book.y)
    draw.polygon(_scaled(*side), fill=(206, 200, 184))
    title = (book.x - half * 0.5 + lean / 2, (front + back) / 2, book.x + half * 0.5 + lean / 2, (front + back) / 2)
    draw.line(_scaled(*title), fill=_shade(color, 1.4), width=SCALE)


def _draw_ball(canvas: Image.Image, ball: Thing, color: tuple[int, int, int]) -> None:
    draw = ImageDraw.Draw(canvas)
    radius, y = ball.size / 2, ball.y - ball.size / 2 + 2
    for step in range(24):  # from the dark rim to the light spot
        share = 1 - step / 24
        x, shift = ball.x - radius * 0.35 * (1 - share), radius * 0.35 * (1 - share)
        size = radius * share
        draw.ellipse(
            _scaled(x - size, y - shift - size, x + size, y - shift + size),
            fill=_shade(color, 0.6 + 0.9 * (1 - share)),
        )


def _shade(color: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    """Lighter or darker, never quite black: what is drawn is told from what is not."""
    red, green, blue = (min(255, max(1, round(value * factor))) for value in color)
    return red, green, blue


def _scaled(*pixels: float) -> list[float]:
    return [value * SCALE for value in pixels]


if __name__ == "__main__":
    main()
