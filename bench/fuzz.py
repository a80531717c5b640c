"""Damaged and hostile inputs for every entrance: none may end in a traceback, a crash, a hang or half an output.

    python -m bench.fuzz [--inputs 20000] [--seed 0]             (about 20 inputs a second and core)
    python -m bench.fuzz --entrances labelme coco                (some of them)
    python -m bench.fuzz --only labelme --number 123             (one input again, with its output)

Each input is a valid one that random changes have spoiled: of bytes, or of values in JSON and YAML. It is read in a
process of its own with limited memory, in an empty folder. Failures are

    traceback    another exception than the one-line errors that users see
    crash        the interpreter is ended by a signal
    hang         no end after HANG_S seconds of computing, or WAIT_S seconds in all
    memory       MEMORY_BYTES more than before, or an end for lack of memory
    partial      an output although the command failed, or a temporary file left behind
    executed     code in an input has run

Writes bench/results/fuzz.jsonl: a row an entrance with `count`, `failures` and the failures by kind, as soon as the
entrance is done. --inputs is the number for all entrances together.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from PIL import Image

from l2l_core.artifacts import records
from l2l_core.cli import run_command
from l2l_core.config import load_params
from l2l_core.core.images import inspect_images, read_image
from l2l_core.core.mask_forms import read_mask
from l2l_core.datasets import jsonl, refcoco, splits
from l2l_core.errors import L2LError, exit_code
from l2l_core.mllm.replay import load_recorded
from l2l_core.priors.parse import parse_response

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "fuzz.jsonl"
HANG_S = 10
WAIT_S = 90.0
"""Longer: on a busy machine a process gets a small share of the time."""
MEMORY_BYTES = 1 << 30
LIMIT_BYTES = 6 << 30
"""Address space of the process: an allocation by a number in the input fails instead of ending other programs."""
EXECUTED = "executed"
"""File that code in an input would create."""
KINDS = ("traceback", "crash", "hang", "memory", "partial", "executed")

Json = Any
Rng = random.Random
WIDTH, HEIGHT = 60, 40


# --- changes


class _Payload:
    """Creates EXECUTED if a reader runs code."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {EXECUTED}",)


DEEP = "@deep@"
"""Stands for a deeply nested list, which Python itself can hardly copy or write."""


def odd_value(rng: Rng) -> Json:
    """A value that some reader may not expect."""
    values: list[Json] = [
        None, True, False, 0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**63, 10**18, 10**400, 0.5, -0.0, 1e308, 1e-308,
        float("nan"), float("inf"), "", " ", "x", "x" * 300, "x" * 100_000, "\ud800", "\0", "a\0b", "..", "/",
        "/dev/zero", "/proc/self/mem", "犬" * 100, "1e999", "https://user:pw@host/x.png", "train", "val",
        [], {}, [[]], [{}], [None], [1, 2], [1, 2, 3, 4], DEEP, list(range(2000)), {str(n): n for n in range(300)},
        [[0, 0, 1e6, 1e6, 0, 1e6]], {"polygon": [[0, 0, 59, 0, 59, 39] * 500]},
        {"size": [10**6, 10**6], "counts": [10**12]}, {"size": [HEIGHT, WIDTH], "counts": "x"},
    ]  # fmt: skip
    return copy.deepcopy(rng.choice(values))


def _places(node: Json) -> list[tuple[Json, Any]]:
    """Every (container, key) of a document."""
    found: list[tuple[Json, Any]] = []
    waiting = [node]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            found.append((one, key))
            waiting.append(one[key])
    return found


def spoiled(document: Json, rng: Rng) -> Json:
    """A document with one to three changed, removed, repeated or exchanged values."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(document)
        if not places or rng.random() < 0.03:
            return odd_value(rng)
        container, key = rng.choice(places)
        match rng.randrange(6):
            case 0 | 1 | 2:
                container[key] = odd_value(rng)
            case 3:
                del container[key]
            case 4 if isinstance(container, list):
                container.append(copy.deepcopy(container[key]))
            case 4:
                container[f"{key}2"] = container[key]
            case _:
                other, place = rng.choice(places)
                container[key] = copy.deepcopy(other[place]) if place in _keys(other) else None
    return document


def _keys(container: Json) -> Sequence[Any] | set[Any]:
    return range(len(container)) if isinstance(container, list) else set(container)


INSERTED = (b" " * 20_000, b"[" * 5000, b"{" * 300, b"9" * 5000, b"\n", b"\0", b"\xef\xbb\xbf")


def spoiled_bytes(content: bytes, rng: Rng) -> bytes:
    """Bytes with a few flipped bits, removed, repeated, exchanged or inserted pieces, or cut off."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 100))
        match rng.randrange(7):
            case 0 | 1 if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = data[place : place + length] * rng.choice((1, 3, 50))
            case 4:
                data[place:place] = rng.randbytes(length)
            case 5:
                data[place:place] = rng.choice(INSERTED)
            case _:
                del data[place:]
    return bytes(data)


def written(document: Json, rng: Rng, text: Callable[[Json], str] = json.dumps) -> bytes:
    """A spoiled document as a file: mostly by its values, sometimes by its bytes."""
    if rng.random() < 0.75:
        document = spoiled(document, rng)
    else:
        return spoiled_bytes(text(document).encode("utf-8", "surrogatepass"), rng)
    depth = rng.choice((5, 100, 480, 900, 980, 100_000))
    content = text(document).encode("utf-8", "surrogatepass")
    return content.replace(f'"{DEEP}"'.encode(), b"[" * depth + b"1" + b"]" * depth)


# --- valid inputs

BOX = [10, 5, 30, 5, 30, 20, 10, 20]
RUNS = {"size": [HEIGHT, WIDTH], "counts": [100, 50, HEIGHT * WIDTH - 150]}
PAIRS = [
    {"image": "a.png", "sentence": "the red cup", "mask": "mask.png", "style": "x", "id": 7},
    {"image": "b.png", "sentence": "a dog", "mask": {"polygon": [BOX]}, "split": "val", "id": 8},
    {"image": "a.png", "sentence": "the ball", "mask": RUNS, "id": 9},
    {"image": "c.png", "sentence": "no mask", "id": 10},
]
INSTANCES = {
    "images": [{"id": n, "file_name": f"{name}.png", "height": HEIGHT, "width": WIDTH} for n, name in enumerate("abc")],
    "annotations": [
        {"id": 1, "image_id": 0, "category_id": 1, "bbox": [10, 5, 20, 15], "segmentation": [BOX], "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [1, 1, 9, 9], "segmentation": RUNS, "iscrowd": 0},
        {"id": 3, "image_id": 0, "category_id": 2, "bbox": [40, 20, 9, 9], "segmentation": [[40, 20, 49, 20, 49, 29]]},
    ],
    "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}],
}
SENTENCES = [{"annotation_id": 1, "sentence": "the cup"}, {"annotation_id": 2, "caption": "a dog", "split": "val"}]
REFS = [
    {
        "ref_id": number,
        "ann_id": number,
        "image_id": image_id,
        "category_id": 1,
        "split": split,
        "sent_ids": [number],
        "sentences": [{"sent_id": number, "sent": f"thing {number}", "tokens": ["thing"], "raw": "Thing"}],
    }
    for number, image_id, split in ((1, 0, "train"), (2, 1, "val"))
]


def _region(kind: str, name: str, value: Json) -> Json:
    size = {"original_height": HEIGHT, "original_width": WIDTH, "image_rotation": 0}
    return {"id": name, "type": kind, **size, "value": value}


RECTANGLE = {"x": 10, "y": 20, "width": 30, "height": 20, "rotation": 15}
ELLIPSE = {"x": 50, "y": 50, "radiusX": 20, "radiusY": 10, "rotation": 30}
REGIONS = [
    _region("polygonlabels", "r1", {"points": [[10, 10], [50, 10], [50, 60]]}),
    _region("rectangle", "r2", RECTANGLE),
    _region("ellipselabels", "r3", ELLIPSE),
]
BRUSH = _region("brush", "r4", {"format": "rle", "rle": [0, 0, 37, 128, 57, 246, 52, 128, 3, 255]})
TEXT = {"id": "r2", "type": "textarea", "value": {"text": ["a dog"]}}
UPLOADED = {"image": "/data/upload/1/0123abcd-a.png", "sentence": "the cup", "split": "train"}
TASKS = [
    {"id": 1, "data": UPLOADED, "annotations": [{"result": REGIONS}]},
    {"id": 2, "data": {"image": "b.png"}, "annotations": [{"result": [REGIONS[1], TEXT]}]},
]
LABELME = {
    "imagePath": "a.png",
    "imageHeight": HEIGHT,
    "imageWidth": WIDTH,
    "imageData": None,
    "flags": {"split": "train"},
    "shapes": [
        {"label": "cup", "points": [[10, 5], [30, 5], [30, 25]], "shape_type": "polygon", "description": "a cup"},
        {"label": "dog", "points": [[20, 30], [5, 10]], "shape_type": "rectangle", "group_id": 1, "description": ""},
        {"label": "dog", "points": [[20, 20], [20, 18]], "shape_type": "circle", "group_id": 1},
        {"label": "cat", "points": [[1, 1], [9, 2], [8, 9], [0, 8]], "shape_type": "rotation", "group_id": None},
    ],
}
RESPONSES = [
    {"sent_id": 1, "raw_text": '{"bbox_2d": [1, 2, 30, 30], "label": "cup"}', "model": "qwen2.5-vl-7b"},
    {"sent_id": 2, "pred_box_xyxy": [1, 2, 30, 30], "score": 0.5, "height": HEIGHT, "width": WIDTH},
    {"ref_id": 3, "expression": "thing 3", "mask": RUNS, "image_id": 0},
    {"sent_id": 4, "mask": "mask.png", "coord_space": "pixel", "sample_index": 1},
]
ANSWERS = [
    '{"found": true, "target": "cup", "attributes": ["red"], "boxes": [[1, 2, 30, 30]], "point": [9, 9]}',
    "<think>maybe [1, 2, 3, 4]</think> The cup is at <box>(10, 20), (300, 400)</box>.",
    "```json\n[{'bbox_2d': [1, 2, 30, 40], 'label': 'cup'}]\n```",
    "cup<loc_1><loc_2><loc_300><loc_400> and <patch_index_0012><patch_index_0500>",
    '<points x1="12.5" y1="3" alt="cup">cup</points> {<12><30><44><60>}',
    "<answer>[[10, 20, 300, 400], [1, 2, 3, 4]]</answer>",
]
REPEATED = (
    " ", "\n", "[", "{", "(", "<", "<box>", "{'", '{"', "[[", "1,", "<think>", "and ", "<points ", '"', "<loc_1>", "{}",
    "'", "<point x=", "</box>", "</think>", "<answer>", "[1 ", "(1, 2)", '{"bbox":', "<|box_start|>", "coords = \"",
)  # fmt: skip
TABLE_ROWS: list[dict[str, object]] = [{"sent_id": number, "role": "labeled"} for number in range(40)]


def lay_out(folder: Path) -> None:
    """Valid files in the current folder of an entrance: three images, a mask and the parameters."""
    rng = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[5:20, 10:30] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    shutil.copy(ROOT / "params.yaml", folder)


# --- entrances: each writes a spoiled input into the current folder and reads it


def _lines(rows: Json) -> str:
    return "".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows]))


def _command(*words: str) -> None:
    sys.argv = ["l2l", *words]
    run_command()


def read_pairs(rng: Rng) -> None:
    Path("pairs.jsonl").write_bytes(written(PAIRS, rng, _lines))
    jsonl.read_jsonl(Path("pairs.jsonl"))


def read_refs(rng: Rng) -> None:
    """instances.json, or refs as JSON."""
    names = {"instances.json": INSTANCES, "refs(unc).json": REFS}
    spoil = rng.choice(list(names))
    for name, document in names.items():
        Path(name).write_bytes(written(document, rng) if name == spoil else json.dumps(document).encode())
    refcoco.read_refcoco(Path(), images=".")


def read_pickle(rng: Rng) -> None:
    Path("instances.json").write_text(json.dumps(INSTANCES))
    kind = rng.randrange(4)
    if kind == 0:
        content = pickle.dumps([*REFS, _Payload()], rng.randrange(5))
    elif kind == 1:
        content = spoiled_bytes(pickle.dumps([_Payload(), *REFS], rng.randrange(5)), rng)
    else:
        content = pickle.dumps(REFS if kind == 2 else spoiled(REFS, rng), rng.randrange(5))
        content = spoiled_bytes(content, rng) if kind == 2 else content
    Path("refs(unc).p").write_bytes(content)
    refcoco.read_refcoco(Path(), images=".")


def import_coco(rng: Rng) -> None:
    if rng.random() < 0.5:
        Path("instances.json").write_bytes(written(INSTANCES, rng))
        Path("sentences.json").write_text(json.dumps(SENTENCES))
    else:
        Path("instances.json").write_text(json.dumps(INSTANCES))
        Path("sentences.json").write_bytes(written(SENTENCES, rng))
    _command("import", "coco", "instances.json", "sentences.json", "--images", ".", "--out", "out")


def import_coco_generated(rng: Rng) -> None:
    Path("instances.json").write_bytes(written(INSTANCES, rng))
    _command("import", "coco", "instances.json", "--generate-sentences", "--images", ".", "--out", "out")


def import_label_studio(rng: Rng) -> None:
    tasks = TASKS if rng.random() < 0.7 else [{"data": UPLOADED, "annotations": [{"result": [BRUSH]}]}]
    Path("export.json").write_bytes(written(tasks, rng))
    skip = ["--skip-unknown"] * (rng.random() < 0.3)
    _command("import", "label-studio", "export.json", "--images", ".", "--out", "out", *skip)


def import_labelme(rng: Rng) -> None:
    Path("labels").mkdir()
    Path("a.png").rename("labels/a.png")
    Path("labels/a.json").write_bytes(written(LABELME, rng))
    _command("import", "labelme", "labels", "--out", "out", *["--skip-unknown"] * (rng.random() < 0.3))


def read_list(rng: Rng) -> None:
    rows: list[dict[str, object]] = [
        {"sent_id": n, "ref_id": n, "ann_id": n, "image_id": n // 2, "split": ("train", "val")[n // 6]}
        for n in range(8)
    ]
    roles = {"labeled_image_ids": [0], "unlabeled_image_ids": [1, 2], "eval_image_ids": [3]}
    listings = ([0, 1], {"image_ids": [0, 2]}, {"ref_ids": [1, 2]}, {"train": [{"iid": 0, "mask_id": 1}]}, roles)
    Path("list.json").write_bytes(written(rng.choice(listings), rng))
    splits.split_by_list(records.make_table(rows, records.REFS), "list.json")


def read_a_mask(rng: Rng) -> None:
    if rng.random() < 0.6:
        Path("mask.png").write_bytes(spoiled_bytes(Path("mask.png").read_bytes(), rng))
        mask: Json = "mask.png"
    else:
        mask = spoiled({"mask": rng.choice((RUNS, [BOX], {"polygon": [BOX]}, ["mask.png", RUNS]))}, rng)
        mask = mask.get("mask") if isinstance(mask, dict) else mask
    try:
        read_mask(mask, Path(), HEIGHT, WIDTH)
    except ValueError as error:  # its documented error; the readers add the place
        raise L2LError(str(error)) from None


def read_an_image(rng: Rng) -> None:
    kinds = ["RGB.png", "P.png", "RGBA.png", "L.jpg", "RGB.jpg", "CMYK.jpg", "RGB.webp", "RGB.bmp", "RGB.tif", "1.tif"]
    mode, _, suffix = rng.choice(kinds).partition(".")
    path = Path(f"x.{suffix}")
    Image.open("a.png").convert(mode).save(path)
    path.write_bytes(spoiled_bytes(path.read_bytes(), rng))
    (found,) = inspect_images([path], 1)
    try:
        pixels = read_image(path)
    except L2LError:
        assert isinstance(found, str), "check and use disagree"
        raise
    assert not isinstance(found, str), "check and use disagree"
    assert pixels.shape == (found.height, found.width, 3)


def parse_an_answer(rng: Rng) -> None:
    text = spoiled_bytes(rng.choice(ANSWERS).encode(), rng).decode("utf-8", "surrogateescape")
    if rng.random() < 0.3:
        piece = rng.choice(REPEATED)
        text = text[: rng.randrange(len(text) + 1)] + piece * rng.choice((100, 20_000, 200_000)) + text
    for space in ("pixel", "norm1000", "unit_yx"):
        found = parse_response(text, space, (HEIGHT, WIDTH))
        for box in [] if found.bbox is None else [found.bbox]:
            assert 0 <= box[0] < box[2] <= WIDTH, box
            assert 0 <= box[1] < box[3] <= HEIGHT, box


def replay(rng: Rng) -> None:
    Path("responses.jsonl").write_bytes(written(RESPONSES, rng, _lines))
    refs = pd.DataFrame([{"sent_id": n, "ref_id": n, "image_id": 0, "sentence": f"thing {n}"} for n in range(1, 6)])
    images = pd.DataFrame([{"image_id": 0, "height": HEIGHT, "width": WIDTH}])
    load_recorded("responses.jsonl", refs, images, rng.choice(("auto", "pixel", "norm1000")))


YAML_VALUES = (
    "2020-13-45", "0x_", "0b_", "9" * 5000, "!!int x", "!!timestamp x", "&a [*a]", "*a", "[" * 3000, "{? {} : 1}", "~",
    "'", f"!!python/object/apply:os.system ['touch {EXECUTED}']", "!!binary x", "1e999", ".nan", "|", "1_0", "<<: 1",
)  # fmt: skip
OVERRIDE_KEYS = (
    "seed", "round", "priors.backend", "priors.engine", "priors", "", "x", "+x", "~seed", "++seed", ".", "seed.x",
    "a b", "select.candidates", "priors@x", "x" * 300,
)  # fmt: skip
OVERRIDE_VALUES = (
    "", "1", "x", "[1,2]", "{a: 1}", "${seed}", "${oc.env:HOME}", "~", "null", "1e999", "-1", "x" * 1000, "[" * 500,
    "\\", "'", "=", ",", "2020-13-45", "&a [*a]", "\ud800",
)  # fmt: skip
COMMANDS = ("scores", "import", "export", "predict", "compare", "stage", "fetch", "doctor")
WORDS = (
    "scores", "import", "coco", "labelme", "label-studio", "export", "onnx", "predict", "refcoco2", "compare", "stage",
    "--out", "--images", "--pairs", "--run", "--round", "-S", "seed=1", "a.png", "mask.png", ".", "..", "/dev/zero", "",
    "x" * 300, "-1", "1e9", "--help", "the red cup", "--polygons", "params.yaml", "out", "--fix", "doctor", "check",
)  # fmt: skip


def read_params(rng: Rng) -> None:
    content = Path("params.yaml").read_bytes()
    if rng.random() < 0.5:
        content = spoiled_bytes(content, rng)
    else:
        lines = content.decode().splitlines()
        numbers = [number for number, line in enumerate(lines) if ":" in line and not line.lstrip().startswith("#")]
        for _ in range(rng.choice((1, 1, 3))):
            number = rng.choice(numbers)
            value = rng.choice(YAML_VALUES) if rng.random() < 0.6 else json.dumps(odd_value(rng))
            lines[number] = f"{lines[number].partition(':')[0]}: {value}"
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
    Path("params.yaml").write_bytes(content)
    load_params("params.yaml")


def override_params(rng: Rng) -> None:
    given = []
    for _ in range(rng.choice((1, 2))):
        given.append(rng.choice(OVERRIDE_KEYS) + rng.choice(("=", "=", "=", "", "==")) + rng.choice(OVERRIDE_VALUES))
    load_params("params.yaml", given)


def command_line(rng: Rng) -> None:
    """Known words in any order, and odd ones."""
    _command(rng.choice(COMMANDS), *rng.choices(WORDS, k=rng.randrange(6)))


def read_a_table(rng: Rng) -> None:
    table = records.make_table(TABLE_ROWS, records.SPLIT)
    records.write_table(table, "t.parquet", records.SPLIT)
    Path("t.parquet").write_bytes(spoiled_bytes(Path("t.parquet").read_bytes(), rng))
    assert records.read_table("t.parquet", records.SPLIT).equals(table), "other values were read"


ENTRANCES: dict[str, Callable[[Rng], None]] = {
    "pairs": read_pairs,
    "refcoco": read_refs,
    "pickle": read_pickle,
    "coco": import_coco,
    "coco_generated": import_coco_generated,
    "label_studio": import_label_studio,
    "labelme": import_labelme,
    "split_list": read_list,
    "mask": read_a_mask,
    "image": read_an_image,
    "answer": parse_an_answer,
    "replay": replay,
    "params": read_params,
    "overrides": override_params,
    "command_line": command_line,
    "table": read_a_table,
}


LOADED_BEFORE = ("l2l_core.inference.predict_files", "dvc.repo", "dvc.utils.hydra")
"""Loaded once instead of in each process: they take seconds."""

# --- running them


@dataclass(frozen=True)
class Outcome:
    """What an input led to: one of KINDS, or "" if all is well; and what was printed."""

    kind: str
    output: str


def run_one(
    entrance: Callable[[Rng], None], rng: Rng, folder: Path, hang_s: int = HANG_S, wait_s: float = WAIT_S
) -> Outcome:
    """Read one spoiled input in a process of its own, in an empty folder."""
    before = psutil.Process().memory_info().rss
    lay_out(folder)
    log = folder.with_name(f"{folder.name}.log")
    child = os.fork()
    if child == 0:
        _in_child(entrance, rng, folder, log, hang_s)
    deadline = time.monotonic() + wait_s
    while not (ended := os.wait4(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.wait4(child, 0)
            return Outcome("hang", log.read_text(errors="replace"))
        time.sleep(0.002)
    _, status, usage = ended
    output = log.read_text(errors="replace")
    code = os.waitstatus_to_exitcode(status)
    left = [path.name for path in folder.iterdir() if path.name.startswith(".") or (path.name == "out" and code)]
    if (folder / EXECUTED).exists():
        return Outcome("executed", output)
    if code == -signal.SIGXCPU:
        return Outcome("hang", output)
    if code < 0:
        return Outcome("crash", f"{output}\nsignal {-code}")
    if code not in (0, 2) or (code == 2 and "rror" not in output and "Usage" not in output):
        return Outcome("traceback", output)
    if usage.ru_maxrss * 1024 > before + MEMORY_BYTES or "error: out of memory" in output:
        return Outcome("memory", f"{output}\n{usage.ru_maxrss // 1024} MiB")
    return Outcome("partial", f"{output}\n{left}") if left else Outcome("", output)


def _in_child(entrance: Callable[[Rng], None], rng: Rng, folder: Path, log: Path, hang_s: int) -> None:
    code = 1
    try:
        sys.stdout = sys.stderr = log.open("w", errors="backslashreplace")
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (hang_s, hang_s + 5))
        os.chdir(folder)
        code = exit_code(lambda: entrance(rng))
    except SystemExit as ended:  # of the command line
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def input_of(name: str, seed: int, number: int) -> Rng:
    """The random stream of one input."""
    return random.Random(f"{seed} {name} {number}")


def campaign(
    inputs: int, seed: int, names: Sequence[str] = tuple(ENTRANCES), say: Callable[[str], None] = print
) -> Iterator[dict[str, Any]]:
    """Read inputs / len(ENTRANCES) inputs for each of the named entrances; yields a row an entrance."""
    for module in LOADED_BEFORE:
        import_module(module)
    each = -(-inputs // len(ENTRANCES))
    for name in names:
        found: Counter[str] = Counter()
        for number in range(each):
            with tempfile.TemporaryDirectory() as folder:
                (work := Path(folder) / "work").mkdir()
                outcome = run_one(ENTRANCES[name], input_of(name, seed, number), work)
            if outcome.kind:
                found[outcome.kind] += 1
                last = (outcome.output.strip().splitlines() or [""])[-1][:160]
                say(f"{outcome.kind}: --only {name} --seed {seed} --number {number}: {last}")
        say(f"{name}: {each} inputs, {found.total()} failures")
        yield (
            {"bench": "fuzz", "entrance": name, "count": each, "failures": found.total()}
            | {kind: found[kind] for kind in KINDS}
            | {"seed": seed}
        )


def store(row: dict[str, Any]) -> None:
    """Put a row into the results, in place of the one of its entrance."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    rows = {old["entrance"]: old for old in map(json.loads, text.splitlines())} | {row["entrance"]: row}
    ordered = [rows[name] for name in ENTRANCES if name in rows]
    RESULTS.write_text("".join(json.dumps(one) + "\n" for one in ordered), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--entrances", nargs="+", choices=ENTRANCES, default=list(ENTRANCES))
    parser.add_argument("--only", choices=ENTRANCES)
    parser.add_argument("--number", type=int)
    given = parser.parse_args()
    if given.only is not None:
        folder = Path(tempfile.mkdtemp()) / "work"
        folder.mkdir()
        outcome = run_one(ENTRANCES[given.only], input_of(given.only, given.seed, given.number or 0), folder)
        print(f"{folder}\n{outcome.output}\n{outcome.kind or 'no failure'}")
        return
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    rows = []
    for row in campaign(given.inputs, given.seed, given.entrances, partial(print, flush=True)):
        rows.append(row)
        store(row | {"commit": commit})
    print(f"{sum(row['count'] for row in rows)} inputs, {sum(row['failures'] for row in rows)} failures")


if __name__ == "__main__":
    main()
