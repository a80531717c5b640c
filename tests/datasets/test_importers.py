"""Importing annotations of other tools; masks have hand-counted pixels and are read back as ingest reads them."""

import base64
import io
import json
import os
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from called import call
from PIL import Image
from synthetic_run import write_run

from l2l_core.artifacts import records
from l2l_core.core.masks import decode_rle
from l2l_core.datasets.importers.label_studio import brush_alpha
from l2l_core.datasets.index import Index
from l2l_core.datasets.jsonl import read_jsonl
from l2l_core.export.review import brush_rle

HEIGHT, WIDTH = 40, 60


def box_mask(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    """True inside boxes x1 y1 x2 y2 (end-exclusive)."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = True
    return mask


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project with photos/a.png, photos/b.png and photos/c.png of 60x40 pixels."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in "abc":
        Image.new("RGB", (WIDTH, HEIGHT), "gray").save(tmp_path / "photos" / f"{name}.png")
    return tmp_path


def write(name: str, content: object) -> str:
    Path(name).write_text(json.dumps(content))
    return name


def imported() -> Index:
    return read_jsonl(Path("mine/pairs.jsonl"))


def rows_by_sentence(index: Index) -> dict[str, dict]:
    """Split, sent_id, image name and mask (None: unlabeled) of every sentence."""
    images = {row["image_id"]: row["file_name"] for row in index.images.to_pylist()}
    masks = {row["ann_id"]: row for row in index.masks.to_pylist()}
    found = {}
    for ref in index.refs.to_pylist():
        mask = masks.get(ref["ann_id"])
        found[ref["sentence"]] = {
            "split": ref["split"],
            "sent_id": ref["sent_id"],
            "image": images[ref["image_id"]],
            "mask": None if mask is None else decode_rle(mask["rle_counts"], mask["height"], mask["width"]),
        }
    return found


def is_refused(monkeypatch, capsys, *command: str, words: list[str], one_line: bool = True) -> None:
    before = sorted(Path().rglob("*"))
    assert call(monkeypatch, "import", *command, "--out", "mine") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 or not one_line
    assert error.startswith("error: ")
    for word in words:
        assert word in error
    assert sorted(Path().rglob("*")) == before


# --- COCO

BOX = [10, 5, 30, 5, 30, 20, 10, 20]  # 20 x 15 pixels
SMALL = [40, 0, 44, 0, 44, 3, 40, 3]  # 4 x 3 pixels


def instances() -> dict:
    # Columns 2 to 6 and rows 3 to 8 in column-major order, 40 pixels per column: 5 x 6 pixels.
    runs = [2 * 40 + 3, *[6, 40 - 6] * 4, 6, 40 - 9 + 53 * 40]
    return {
        "images": [
            {"id": number, "file_name": f"{name}.png", "height": HEIGHT, "width": WIDTH}
            for number, name in enumerate("abc", start=1)
        ],
        "annotations": [
            {"id": 11, "image_id": 1, "segmentation": [BOX, SMALL]},
            {"id": 12, "image_id": 2, "segmentation": {"size": [HEIGHT, WIDTH], "counts": runs}},
        ],
        "categories": [],
    }


SENTENCES = [
    {"annotation_id": 11, "sentence": "the cup"},
    {"ann_id": 12, "image_id": 2, "caption": "the dog", "split": "val"},
    {"image_id": 3, "sentence": "nothing is drawn here"},
]
COCO = ("coco", "instances.json", "sentences.json", "--images", "photos")


def test_coco_annotations_become_masks(folder, monkeypatch, capsys):
    write("instances.json", instances())
    write("sentences.json", SENTENCES)
    assert call(monkeypatch, "import", *COCO, "--out", "mine") == 0
    assert "3 pairs, 2 of them with a mask: mine/pairs.jsonl" in capsys.readouterr().out
    rows = rows_by_sentence(imported())
    np.testing.assert_array_equal(rows["the cup"]["mask"], box_mask((10, 5, 30, 20), (40, 0, 44, 3)))
    assert rows["the cup"]["mask"].sum() == 20 * 15 + 4 * 3
    np.testing.assert_array_equal(rows["the dog"]["mask"], box_mask((2, 3, 7, 9)))
    assert rows["nothing is drawn here"]["mask"] is None
    assert [row["split"] for row in rows.values()] == ["train", "val", "train"]
    assert [row["image"] for row in rows.values()] == ["photos/a.png", "photos/b.png", "photos/c.png"]
    assert sorted(path.name for path in Path("mine").iterdir()) == ["pairs.jsonl"]  # nothing is copied


def test_does_not_overwrite_an_earlier_import(folder, monkeypatch, capsys):
    write("instances.json", instances())
    write("sentences.json", SENTENCES)
    assert call(monkeypatch, "import", *COCO, "--out", "mine") == 0
    Path("mine/pairs.jsonl").write_text("edited by hand")
    assert call(monkeypatch, "import", *COCO, "--out", "mine") == 2
    assert "mine/pairs.jsonl exists and may hold your own changes" in capsys.readouterr().err
    assert Path("mine/pairs.jsonl").read_text() == "edited by hand"


@pytest.mark.parametrize("form", ["lines", "captions"])
def test_reads_sentences_from_json_lines_or_coco_captions(folder, monkeypatch, form):
    rows = [{**row, "sent_id": 7 + number} for number, row in enumerate(SENTENCES)]
    write("instances.json", instances())
    if form == "lines":
        name = "sentences.jsonl"
        Path(name).write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        name = write("captions.json", {"annotations": rows})
    assert call(monkeypatch, "import", "coco", "instances.json", name, "--images", "photos", "--out", "mine") == 0
    found = rows_by_sentence(imported())
    assert [row["sent_id"] for row in found.values()] == [7, 8, 9]
    assert found["the cup"]["mask"].sum() == 312


def changed(rows: list[dict], **values: object) -> list[dict]:
    return [{**rows[0], **values}, *rows[1:]]


WRONG_SENTENCES = {
    "unknown annotation": (changed(SENTENCES, annotation_id=99), ["sentences.json: entry 1", "annotation_id: got 99"]),
    "not a number": (changed(SENTENCES, annotation_id="11"), ["entry 1: annotation_id: got '11', expected a whole"]),
    "two images": (changed(SENTENCES, image_id=2), ["entry 1: image_id: got 2, but annotation 11 is of image 1"]),
    "no sentence": (changed(SENTENCES, sentence=None), ["entry 1: sentence: got None, expected a text"]),
    "no words": (changed(SENTENCES, sentence="?!"), ["entry 1: sentence '?!' has no words"]),
    "no such split": (changed(SENTENCES, split="dev"), ["entry 1: split: got 'dev', expected one of train, val"]),
    "evaluated without mask": (
        [*SENTENCES[:2], {**SENTENCES[2], "split": "val"}],
        ["entry 3: mask: missing, expected one because split is val"],
    ),
    "both sides": (
        [*SENTENCES, {**SENTENCES[1], "split": "train"}],
        ["sentences.json: 1 image(s) are in train and in an evaluation split: photos/b.png"],
    ),
    "some ids": (changed(SENTENCES, sent_id=1), ["entry 2: sent_id: missing, but others have one"]),
    "not an object": ([*SENTENCES, "the cup"], ["entry 4: got 'the cup', expected an object"]),
    "empty": ([], ["sentences.json: no pairs in it"]),
    "no list": ("text", ["sentences.json: got 'text', expected a list"]),
}


@pytest.mark.parametrize("case", WRONG_SENTENCES)
def test_refuses_wrong_sentences(folder, monkeypatch, capsys, case):
    sentences, words = WRONG_SENTENCES[case]
    write("instances.json", instances())
    write("sentences.json", sentences)
    is_refused(monkeypatch, capsys, *COCO, words=words)


def no_image(document):
    document["images"][0]["file_name"] = "z.png"


def other_size(document):
    document["images"][2]["width"] = 61


def short_polygon(document):
    document["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]


def outside(document):
    document["annotations"][0]["segmentation"] = [[70, 5, 80, 5, 80, 9]]


def taken(document):
    document["annotations"][1]["id"] = 11


WRONG_INSTANCES = {
    no_image: ["sentences.json: entry 1: image photos/z.png: not found"],
    other_size: ["sentences.json: entry 3: size: got 61x40, but photos/c.png has 60x40 px"],
    short_polygon: ["entry 1: annotation 11: segmentation: each polygon needs x, y for at least 3 points"],
    outside: ["entry 1: annotation 11: mask: empty"],
    taken: ["instances.json: annotations: entry 2: id 11 is taken"],
}


@pytest.mark.parametrize("change", WRONG_INSTANCES)
def test_refuses_wrong_instances(folder, monkeypatch, capsys, change):
    document = instances()
    change(document)
    write("instances.json", document)
    write("sentences.json", SENTENCES)
    is_refused(monkeypatch, capsys, *COCO, words=WRONG_INSTANCES[change])


def test_reports_all_problems_at_once(folder, monkeypatch, capsys):
    document = instances()
    no_image(document)
    write("instances.json", document)
    write("sentences.json", [*SENTENCES, {"image_id": 9, "sentence": "x"}])
    assert call(monkeypatch, "import", *COCO, "--out", "mine") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 2 problems:\n")
    assert "entry 4: image_id: got 9, which no image has" in error
    assert "photos/z.png: not found" in error


# --- COCO, generated sentences

GENERATED = ("coco", "instances.json", "--generate-sentences", "--images", "photos")


def box_polygon(x1: int, y1: int, x2: int, y2: int) -> list[list[int]]:
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


def unspoken() -> dict:
    """Two dogs and a cup in image 1; a dog and a crowd of dogs in image 2; an incomplete kind in image 3."""
    names = {1: "dog", 2: "Cup_(blue)"}
    left, right, low = (4, 10, 16, 22), (40, 10, 52, 22), (24, 24, 36, 36)
    rows = [(1, 1, left), (1, 1, right), (1, 2, low), (2, 1, left), (2, 1, right), (3, 1, left), (3, 2, right)]
    annotations = [
        {"id": number, "image_id": image_id, "category_id": kind, "segmentation": box_polygon(*box), "iscrowd": 0}
        for number, (image_id, kind, box) in enumerate(rows, start=1)
    ]
    annotations[4]["iscrowd"] = 1
    images = [row | {"split": "val" if row["id"] == 3 else "train"} for row in instances()["images"]]
    images[2]["not_exhaustive_category_ids"] = [1]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in names.items()],
    }


def generated(monkeypatch, document: dict, out: str = "mine", seed: int = 0) -> list[dict]:
    write("instances.json", document)
    assert call(monkeypatch, "import", *GENERATED, "--out", out, "--seed", str(seed)) == 0
    return [json.loads(line) for line in Path(out, "pairs.jsonl").read_text().splitlines()]


def test_coco_annotations_get_sentences_of_three_styles(folder, monkeypatch, capsys):
    rows = generated(monkeypatch, unspoken())
    output = capsys.readouterr()
    assert "3 object(s) left out: its kind is also a crowd 2, crowd 1" in output.err
    counts = {style: sum(row["style"] == style for row in rows) for style in ("refcoco", "refcoco+", "refcocog")}
    assert f"styles: {', '.join(f'{style} {count}' for style, count in counts.items())}" in output.out
    assert min(counts.values()) > 0
    index = imported()
    assert index.refs["style"].to_pylist() == [row["style"] for row in rows]
    assert {row["image"]: row["split"] for row in rows} == {"../photos/a.png": "train", "../photos/c.png": "val"}
    for row in rows:
        kind = re.search("dog|cup", row["sentence"]).group()
        dog = (4, 10, 16, 22) if "left" in row["sentence"] else (40, 10, 52, 22)
        cup = (24, 24, 36, 36) if row["image"].endswith("a.png") else (40, 10, 52, 22)
        mask = decode_rle(row["mask"]["counts"].encode(), HEIGHT, WIDTH)
        np.testing.assert_array_equal(mask, box_mask(dog if kind == "dog" else cup), row["sentence"])


def test_generated_sentences_depend_on_content_and_seed_only(folder, monkeypatch):
    document = unspoken()
    rows = generated(monkeypatch, document)
    mixed = {key: list(reversed(value)) for key, value in document.items()}
    assert generated(monkeypatch, mixed, "mixed") == rows
    others = [generated(monkeypatch, document, f"seed{seed}", seed) for seed in (1, 2, 3)]
    assert any(other != rows for other in others)
    kept = {**document, "annotations": document["annotations"][:3]}
    assert generated(monkeypatch, kept, "kept") == [row for row in rows if row["image"] == "../photos/a.png"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"category_id": 7}, ["annotation 1: category_id: got 7, which is not in the file"]),
        ({"image_id": 9}, ["annotation 1: image_id: got 9, which is not in the file"]),
        ({"segmentation": []}, ["annotation 1: segmentation: got an empty list"]),
        ({"iscrowd": "no"}, ["annotation 1: iscrowd: got 'no', expected 0 or 1"]),
    ],
)
def test_refuses_to_generate_from_unreadable_annotations(folder, monkeypatch, capsys, change, words):
    document = unspoken()
    document["annotations"][0] |= change
    write("instances.json", document)
    is_refused(monkeypatch, capsys, *GENERATED, words=words)


def test_sentences_are_either_read_or_generated(folder, monkeypatch, capsys):
    write("instances.json", unspoken())
    write("sentences.json", SENTENCES)
    words = ["expected either a file SENTENCES or --generate-sentences"]
    is_refused(monkeypatch, capsys, *COCO, "--generate-sentences", words=words)
    is_refused(monkeypatch, capsys, "coco", "instances.json", "--images", "photos", words=words)


def test_keeps_the_style_of_given_sentences(folder, monkeypatch):
    write("instances.json", instances())
    write("sentences.json", [{**SENTENCES[0], "style": "refcoco+"}, SENTENCES[1]])
    assert call(monkeypatch, "import", *COCO, "--out", "mine") == 0
    assert imported().refs["style"].to_pylist() == ["refcoco+", ""]


# --- Label Studio

FRAME = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0, "from_name": "mask"}


def polygon(*percent: tuple[float, float]) -> dict:
    return {**FRAME, "type": "polygonlabels", "value": {"points": [list(point) for point in percent]}}


# 10 % to 50 % of 60 px is columns 6 to 29; 25 % to 75 % of 40 px is rows 10 to 29: 24 x 20 pixels.
QUARTERS = polygon((10, 25), (50, 25), (50, 75), (10, 75))
# 90 % to 100 % is columns 54 to 59; 0 to 10 % is rows 0 to 3: 6 x 4 pixels.
CORNER = polygon((90, 0), (100, 0), (100, 10), (90, 10))


def task(image: str, sentence: str, *results: list | None, **data: object) -> dict:
    annotations = [{"id": 1, "was_cancelled": False, "result": result} for result in results]
    return {"id": 5, "data": {"image": image, "sentence": sentence, **data}, "annotations": annotations}


LABEL_STUDIO = ("label-studio", "export.json", "--images", ".")


def test_label_studio_polygons_are_in_percent_of_the_image(folder, monkeypatch, capsys):
    tasks = [
        task("/data/local-files/?d=photos/a.png", "the cup", [QUARTERS, CORNER], split="val"),
        task("http://somewhere:8000/files/photos/b.png?x=1", "never opened"),
        task("/data/upload/3/0a1b2c3d-photos%2Fc.png", "looked at, nothing drawn", []),
    ]
    tasks[1]["annotations"] = [{"was_cancelled": True, "result": [CORNER]}]
    write("export.json", tasks)
    assert call(monkeypatch, "import", *LABEL_STUDIO, "--out", "mine") == 2
    assert "task 5: image: got '/data/upload/3/0a1b2c3d-photos%2Fc.png'" in capsys.readouterr().err
    tasks[2]["data"]["image"] = "/data/upload/3/0a1b2c3d-c.png"
    write("export.json", tasks)
    assert call(monkeypatch, "import", "label-studio", "export.json", "--images", "photos", "--out", "mine") == 0
    assert "3 pairs, 1 of them with a mask" in capsys.readouterr().out
    rows = rows_by_sentence(imported())
    np.testing.assert_array_equal(rows["the cup"]["mask"], box_mask((6, 10, 30, 30), (54, 0, 60, 4)))
    assert [row["split"] for row in rows.values()] == ["val", "train", "train"]
    assert [row["image"] for row in rows.values()] == ["photos/a.png", "photos/b.png", "photos/c.png"]


def packed(*parts: tuple[int, int]) -> list[int]:
    """Numbers as (value, bits) -> bytes, highest bit first."""
    bits = "".join(f"{value:0{width}b}" for value, width in parts)
    bits = bits.ljust(-(-len(bits) // 8) * 8, "0")
    return [int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)]


HEAD = ((7, 5), (2, 4), (3, 4), (7, 4), (15, 4))  # values of 8 bits, lengths of 3, 4, 8 or 16 bits


def test_brush_alpha_decodes_a_handmade_brush():
    """An image of 3 x 1 pixels, 12 values: pixel 0 empty, pixel 1 with colors and alpha 200, pixel 2 all 255."""
    rle = packed(
        (12, 32),
        *HEAD,
        *((1, 1), (0, 2), (4 - 1, 3), (0, 8)),  # four times 0
        *((0, 1), (1, 2), (4 - 1, 4), (9, 8), (8, 8), (7, 8), (200, 8)),  # four distinct values
        *((1, 1), (0, 2), (4 - 1, 3), (255, 8)),  # four times 255
    )
    assert brush_alpha(rle, 1, 3).tolist() == [[0, 200, 255]]


@pytest.mark.parametrize(
    ("rle", "words"),
    [
        ("no", "rle: got 'no', expected a list of bytes"),
        ([1, 256], "expected a list of bytes"),
        (packed((16, 32), *HEAD), "got 16 values of 8 bits, expected 12 of 8 bits for 3x1 px"),
        (packed((12, 32), (0, 5), *HEAD[1:]), "got 12 values of 1 bits"),
        (packed((12, 32), *HEAD, (1, 1), (0, 2), (3, 3), (0, 8)), "ends after"),
        (packed((12, 32), *HEAD, (1, 1), (1, 2), (12, 4), (0, 8)), "more than the 12 values"),
        ([0, 0], "ends after 2 bytes"),
    ],
)
def test_refuses_a_damaged_brush(rle, words):
    with pytest.raises(ValueError, match=words):
        brush_alpha(rle, 1, 3)


def test_merges_brushes_and_polygons(folder, monkeypatch):
    drawn = np.random.default_rng(0).random((HEIGHT, WIDTH)) > 0.5
    brush = {**FRAME, "type": "brushlabels", "value": {"format": "rle", "rle": brush_rle(drawn)}}
    write("export.json", [task("photos/a.png", "the cup", [brush, QUARTERS])])
    assert call(monkeypatch, "import", *LABEL_STUDIO, "--out", "mine") == 0
    np.testing.assert_array_equal(rows_by_sentence(imported())["the cup"]["mask"], drawn | box_mask((6, 10, 30, 30)))


def test_uses_the_ground_truth_among_several_annotations(folder, monkeypatch):
    both = task("photos/a.png", "the cup", [QUARTERS], [CORNER])
    both["annotations"][1]["ground_truth"] = True
    write("export.json", [both])
    assert call(monkeypatch, "import", *LABEL_STUDIO, "--out", "mine") == 0
    assert rows_by_sentence(imported())["the cup"]["mask"].sum() == 24


WRONG_TASKS = {
    "two annotations": (
        task("photos/a.png", "the cup", [QUARTERS], [CORNER]),
        ["export.json: task 5: annotations: got 2, 0 of them marked as ground truth, expected one"],
    ),
    "min": ({"id": 5, "image": "photos/a.png"}, ["task 5: annotations: missing", "not as JSON-MIN"]),
    "not an object": (7, ["task 1: annotations: missing"]),
    "no data": ({"id": 5, "annotations": []}, ["task 5: got None, expected an object"]),
    "no sentence": (task("photos/a.png", ""), ["task 5: sentence: got '', expected a text"]),
    "a key point": (
        task("photos/a.png", "the cup", [{**FRAME, "type": "keypointlabels", "value": {"x": 1, "y": 2}}]),
        ["task 5: type: got 'keypointlabels', expected polygon, rectangle, ellipse or brush; --skip-unknown leaves"],
    ),
    "a rectangle without sides": (
        task("photos/a.png", "the cup", [{**FRAME, "type": "rectanglelabels", "value": {"x": 1, "y": 2}}]),
        ["task 5: width: got None, expected a number"],
    ),
    "a turned image": (
        task("photos/a.png", "the cup", [{**QUARTERS, "image_rotation": 90}]),
        ["task 5: image_rotation: got 90, expected 0"],
    ),
    "no size": (
        task("photos/a.png", "the cup", [{"type": "polygonlabels", "value": QUARTERS["value"]}]),
        ["task 5: original_height: got None, expected a whole number"],
    ),
    "another size": (
        task("photos/a.png", "the cup", [{**QUARTERS, "original_width": 61}]),
        ["task 5: size: got 61x40, but photos/a.png has 60x40 px"],
    ),
    "two sizes": (
        task("photos/a.png", "the cup", [CORNER, {**QUARTERS, "original_width": 61}]),
        ["task 5: original_height, original_width: got (40, 61), and (40, 60)"],
    ),
    "two points": (task("photos/a.png", "the cup", [polygon((1, 1), (5, 5))]), ["task 5: ", "at least 3 points"]),
    "a point of texts": (
        task("photos/a.png", "the cup", [polygon((1, 1), (5, 5), ("a", 1))]),
        ["task 5: points: got ['a', 1], expected pairs of numbers x, y"],
    ),
    "outside": (
        task("photos/a.png", "the cup", [polygon((110, 1), (120, 5), (120, 1))]),
        ["task 5: mask: empty, expected at least one pixel"],
    ),
}


@pytest.mark.parametrize("case", WRONG_TASKS)
def test_refuses_wrong_tasks(folder, monkeypatch, capsys, case):
    wrong, words = WRONG_TASKS[case]
    write("export.json", [wrong])
    is_refused(monkeypatch, capsys, *LABEL_STUDIO, words=words)


def rectangle(x: float, y: float, width: float, height: float, **more: object) -> dict:
    value = {"x": x, "y": y, "width": width, "height": height, **more}
    return {**FRAME, "type": "rectanglelabels", "value": value}


def says(region: dict, *texts: str, kind: str = "textarea") -> dict:
    """The result that Label Studio stores for a region's text: the position of the region and the text."""
    return {**region, "type": kind, "from_name": "said", "value": {**region["value"], "text": list(texts)}}


def test_label_studio_rectangles_and_ellipses_become_masks(folder, monkeypatch):
    write(
        "export.json",
        [
            # 10 % and 40 % of 60 px: columns 6 to 29; 25 % and 50 % of 40 px: rows 10 to 29.
            task("photos/a.png", "plain", [rectangle(10, 25, 40, 50)]),
            # Rotated clockwise by 90 degrees about its corner (30, 10) px: it extends 24 px down and 20 px to the left.
            task("photos/b.png", "askew", [rectangle(50, 25, 40, 50, rotation=90)]),
            # A disk of radius 2 around the pixel corner (30, 20).
            task(
                "photos/c.png",
                "round",
                [{**FRAME, "type": "ellipse", "value": {"x": 50, "y": 50, "radiusX": 10 / 3, "radiusY": 5}}],
            ),
        ],
    )
    assert call(monkeypatch, "import", *LABEL_STUDIO, "--out", "mine") == 0
    rows = rows_by_sentence(imported())
    np.testing.assert_array_equal(rows["plain"]["mask"], box_mask((6, 10, 30, 30)))
    np.testing.assert_array_equal(rows["askew"]["mask"], box_mask((10, 10, 30, 34)))
    np.testing.assert_array_equal(rows["round"]["mask"], box_mask((29, 18, 31, 22), (28, 19, 32, 21)))


def test_ignores_results_that_are_not_shapes(folder, monkeypatch):
    """Ignores relations, choices, ratings and region labels; if the task has a sentence, also region texts."""
    one = {**QUARTERS, "id": "one"}
    others = [
        {"type": "relation", "from_id": "one", "to_id": "two", "direction": "right"},
        {"type": "choices", "from_name": "quality", "to_name": "image", "value": {"choices": ["sharp"]}},
        {**one, "type": "choices", "value": {**one["value"], "choices": ["easy"]}},
        {**one, "type": "labels", "value": {**one["value"], "labels": ["object"]}},
        {**one, "type": "rating", "value": {**one["value"], "rating": 3}},
        says(one, "a remark"),
    ]
    for number, extra in enumerate(others):
        write("export.json", [task("photos/a.png", "both boxes", [extra, one, {**CORNER, "id": "two"}])])
        out = f"mine{number}"
        assert call(monkeypatch, "import", *LABEL_STUDIO, "--out", out) == 0
        (line,) = Path(out, "pairs.jsonl").read_text().splitlines()
        assert json.loads(line)["sentence"] == "both boxes"
        (mask,) = read_jsonl(Path(out, "pairs.jsonl")).masks.to_pylist()
        assert mask["area_px"] == 24 * 20 + 6 * 4


def without_sentence(image: str, *results: list) -> dict:
    one = task(image, "", *results)
    del one["data"]["sentence"]
    return one


def test_region_texts_become_sentences(folder, monkeypatch, capsys):
    """A photo may have several sentences: each text means its region; the same text on two regions means both."""
    one, two = {**QUARTERS, "id": "one"}, {**CORNER, "id": "two"}
    result = [
        one,
        two,
        says(one, "the cup", "the left one"),
        says(two, "the spoon"),
        says(two, "both"),
        says(one, "both"),
    ]
    whole = {"type": "textarea", "from_name": "said", "to_name": "image", "value": {"text": ["all of it"]}, "id": "x"}
    write(
        "export.json",
        [
            without_sentence("photos/a.png", result),
            without_sentence("photos/b.png", [one, two, whole]),
            without_sentence("photos/c.png", []),
        ],
    )
    assert call(monkeypatch, "import", *LABEL_STUDIO, "--out", "mine") == 0
    assert "warning: export.json: 1 task(s) without a sentence left out" in capsys.readouterr().err
    areas = {sentence: row["mask"].sum() for sentence, row in rows_by_sentence(imported()).items()}
    big, small = 24 * 20, 6 * 4
    assert areas == {
        "the cup": big,
        "the left one": big,
        "the spoon": small,
        "both": big + small,
        "all of it": big + small,
    }
    write("export.json", [without_sentence("photos/a.png", [one, two, says(one, "the cup")])])
    assert call(monkeypatch, "import", *LABEL_STUDIO, "--out", "other") == 2
    assert "task 5: 1 region(s) without a text, expected `sentence`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "address", ["C:\\pictures\\photos\\a.png", "/data/local-files/?d=photos%5Ca.png", "photos\\a.png"]
)
def test_windows_backslashes_separate_folders(folder, monkeypatch, address):
    write("export.json", [task(address, "the cup", [QUARTERS])])
    assert call(monkeypatch, "import", *LABEL_STUDIO, "--out", "mine") == 0
    assert rows_by_sentence(imported())["the cup"]["image"] == "photos/a.png"


def test_skip_unknown_skips_and_counts_unknown_shapes(folder, monkeypatch, capsys):
    point = {**FRAME, "type": "keypointlabels", "value": {"x": 1, "y": 2, "width": 1}}
    write("export.json", [task("photos/a.png", "the cup", [QUARTERS, point, point])])
    assert call(monkeypatch, "import", *LABEL_STUDIO, "--out", "mine", "--skip-unknown") == 0
    assert "export.json: 2 region(s) of an unknown kind left out: keypointlabels 2" in capsys.readouterr().err
    assert rows_by_sentence(imported())["the cup"]["mask"].sum() == 24 * 20

    line = {**TRIANGLE, "label": "wire", "shape_type": "linestrip"}
    write("photos/a.json", labelme([TRIANGLE, line, {**line, "shape_type": "point"}, line]))
    assert call(monkeypatch, "import", *LABELME, "--out", "other", "--skip-unknown") == 0
    assert "photos: 3 shape(s) of an unknown kind left out: linestrip 2, point 1" in capsys.readouterr().err
    assert [row["sentence"] for row in read_jsonl(Path("other/pairs.jsonl")).refs.to_pylist()] == ["cup"]


def test_refuses_a_file_that_is_not_an_export(folder, monkeypatch, capsys):
    write("export.json", {"data": {}})
    is_refused(monkeypatch, capsys, *LABEL_STUDIO, words=["export.json: got {'data': {}}, expected a list of tasks"])
    Path("export.json").write_text("[{")
    is_refused(monkeypatch, capsys, *LABEL_STUDIO, words=["export.json: not JSON: "])
    Path("export.json").unlink()
    is_refused(monkeypatch, capsys, *LABEL_STUDIO, words=["export.json: not found, expected a JSON file"])


def test_imports_reviewed_tasks_as_labels(tmp_path, monkeypatch):
    """The export of the review, with predictions accepted as annotations except for one that was redrawn."""
    write_run(tmp_path, rounds=1, images_per_split=6)
    monkeypatch.chdir(tmp_path)
    history = records.round_folder(1) / "history/pseudo_labels.parquet"
    labels = records.read_table(history, records.PSEUDO_LABELS).to_pylist()
    history.rename(records.round_folder(1) / "pseudo_labels.parquet")
    assert call(monkeypatch, "export", "label-studio") == 0
    tasks = json.loads(Path("export/review_round_1.json").read_text())
    drawn = {**polygon((0, 0), (50, 0), (50, 50), (0, 50)), "original_width": 64, "original_height": 48}
    for number, one in enumerate(tasks):
        result = [drawn] if number == 0 else one.pop("predictions")[0]["result"]
        one["annotations"] = [{"result": result}]
    write("export.json", tasks)
    assert call(monkeypatch, "import", *LABEL_STUDIO, "--out", "mine") == 0
    index = imported()
    masks = {row["ann_id"]: row["rle_counts"] for row in index.masks.to_pylist()}
    found = {row["sent_id"]: (row["sentence"], masks.get(row["ann_id"])) for row in index.refs.to_pylist()}
    known = {
        row["sent_id"]: row["sentence"] for row in records.read_table(records.INDEX.refs, records.REFS).to_pylist()
    }
    first = tasks[0]["data"]["sent_id"]
    assert decode_rle(found[first][1], 48, 64).sum() == 32 * 24
    assert len(labels) == len(found) > 5
    for row in labels:
        sentence, mask = found[row["sent_id"]]
        assert sentence == known[row["sent_id"]]
        if row["sent_id"] != first:
            assert mask == row["rle_counts"]


# --- LabelMe


def labelme(shapes: list[dict], name: str = "a", **values: object) -> dict:
    return {
        "imagePath": f"{name}.png",
        "imageHeight": HEIGHT,
        "imageWidth": WIDTH,
        "flags": {},
        "shapes": shapes,
        **values,
    }


TRIANGLE = {"label": "cup", "points": [[10.0, 5.0], [30.0, 5.0], [30.0, 25.0]], "shape_type": "polygon"}
RECTANGLE = {"label": "dog", "points": [[20, 30], [5, 10]], "shape_type": "rectangle"}  # 15 x 20 pixels
CIRCLE = {"label": "ball", "points": [[20, 20], [20, 18]], "shape_type": "circle"}
LABELME = ("labelme", "photos")


def test_labelme_shapes_become_masks(folder, monkeypatch, capsys):
    shapes = [{**TRIANGLE, "description": "the cup on the table"}, {**RECTANGLE, "description": ""}, CIRCLE]
    write("photos/a.json", labelme(shapes))
    write("photos/b.json", labelme([RECTANGLE], "..\\photos\\b", flags={"split": "val"}))
    write("photos/c.json", labelme([], "c"))
    assert call(monkeypatch, "import", *LABELME, "--out", "mine") == 0
    assert "4 pairs, 4 of them with a mask" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path("mine/pairs.jsonl").read_text().splitlines()]
    assert [line["sentence"] for line in lines] == ["the cup on the table", "dog", "ball", "dog"]
    assert [line["split"] for line in lines] == ["train", "train", "train", "val"]
    index = imported()
    areas = [row["area_px"] for row in index.masks.to_pylist()]
    # Half of 20 x 20 pixels, up to pixels on the diagonal. A disk of radius 2 around a pixel corner holds the 12 pixels
    # whose centers are at most 2 away: 4 at (0.5, 0.5) and 8 at (0.5, 1.5).
    assert areas[0] == pytest.approx(200, abs=20)
    assert areas[1:] == [15 * 20, 12, 15 * 20]
    rows = rows_by_sentence(index)
    np.testing.assert_array_equal(rows["dog"]["mask"], box_mask((5, 10, 20, 30)))
    np.testing.assert_array_equal(rows["ball"]["mask"], box_mask((19, 18, 21, 22), (18, 19, 22, 21)))


@pytest.mark.parametrize(("orientation", "code"), [(1, 0), (3, 2)])
def test_refuses_a_mask_on_a_photo_with_an_exif_rotation(folder, monkeypatch, capsys, orientation, code):
    """An EXIF tag of 3 rotates the photo by 180 degrees in LabelMe, so its masks do not fit the stored pixels."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (WIDTH, HEIGHT), "gray").save("photos/d.jpg", exif=exif)
    write("photos/d.json", labelme([TRIANGLE], imagePath="d.jpg"))
    assert call(monkeypatch, "import", *LABELME, "--out", "mine") == code
    said = capsys.readouterr().err
    assert ("d.json: shape 1: an EXIF tag turns photos/d.jpg; pixels are used as stored" in said) == (code == 2)
    assert Path("mine").exists() == (code == 0)


def test_shapes_of_one_group_form_one_mask(folder, monkeypatch):
    other = {**RECTANGLE, "points": [[40, 0], [44, 3]]}
    grouped = [{**shape, "group_id": 1} for shape in (RECTANGLE, other)]
    write("photos/a.json", labelme([*grouped, {**other, "label": "cat", "group_id": 1}, other]))
    assert call(monkeypatch, "import", *LABELME, "--out", "mine") == 0
    areas = [row["area_px"] for row in imported().masks.to_pylist()]
    assert areas == [15 * 20 + 4 * 3, 4 * 3]  # cat and the ungrouped dog share one mask


WRONG_FILES = {
    "a line": (labelme([{**TRIANGLE, "shape_type": "line"}]), ["a.json: shape 1: shape_type: got 'line', expected"]),
    "three corners": (
        labelme([{**RECTANGLE, "points": [[1, 1], [2, 2], [3, 3]]}]),
        ["a.json: shape 1: points: got 3, expected two opposite corners"],
    ),
    "no points": (labelme([{"label": "cup"}]), ["a.json: shape 1: points: got None, expected a list"]),
    "no label": (labelme([{**TRIANGLE, "label": None}]), ["a.json: shape 1: label: got None, expected a text"]),
    "not an object": (labelme(["x"]), ["a.json: shape 1: got 'x', expected an object"]),
    "not finite": (
        labelme([{**CIRCLE, "points": [[float("nan"), 1], [2, 2]]}]),
        ["a.json: shape 1: got a shape with center x, y and radius nan"],
    ),
    "no image": (labelme([TRIANGLE], "z"), ["a.json: shape 1: image photos/z.png: not found"]),
    "no size": (labelme([TRIANGLE], imageHeight=None), ["a.json: imageHeight: got None, expected a whole number"]),
    "no image's size": (
        labelme([CIRCLE], imageHeight=10**12),
        ["a.json: imageHeight, imageWidth: got 1000000000000, 60, expected an image's size"],
    ),
    "another size": (labelme([TRIANGLE], imageWidth=50), ["a.json: shape 1: size: got 50x40, but photos/a.png has"]),
    "no such split": (labelme([TRIANGLE], flags={"split": "dev"}), ["a.json: shape 1: split: got 'dev'"]),
    "no shapes": ({"imagePath": "a.png"}, ["a.json: shapes: got None, expected a list"]),
    "empty": (labelme([]), ["photos: no pairs in it"]),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_refuses_wrong_labelme_files(folder, monkeypatch, capsys, case):
    wrong, words = WRONG_FILES[case]
    write("photos/a.json", wrong)
    is_refused(monkeypatch, capsys, *LABELME, words=words)


def test_refuses_a_folder_without_labelme_files(folder, monkeypatch, capsys):
    is_refused(monkeypatch, capsys, *LABELME, words=["photos: got a folder without *.json"])
    Path("photos/a.json").write_text("{")
    is_refused(monkeypatch, capsys, *LABELME, words=["photos/a.json: not JSON"])


def sentences_of(out: str = "mine") -> list[str]:
    return [json.loads(line)["sentence"] for line in Path(out, "pairs.jsonl").read_text().splitlines()]


def areas_of(out: str = "mine") -> list[int]:
    masks = {row["ann_id"]: row["area_px"] for row in read_jsonl(Path(out, "pairs.jsonl")).masks.to_pylist()}
    return [masks[row["ann_id"]] for row in read_jsonl(Path(out, "pairs.jsonl")).refs.to_pylist()]


def test_skips_and_counts_reserved_labels(folder, monkeypatch, capsys):
    reserved = ["__ignore__", "_background_", "__ignore__", "ignore", "Background"]
    shapes = [TRIANGLE, *({**RECTANGLE, "label": label, "description": "hard to see"} for label in reserved)]
    write("photos/a.json", labelme(shapes))
    assert call(monkeypatch, "import", *LABELME, "--out", "mine") == 0
    expected = "photos: 5 shape(s) with a reserved label left out: __ignore__ 2, _background_ 1, ignore 1, Background 1"
    assert expected in capsys.readouterr().err
    assert sentences_of() == ["cup"]


@pytest.mark.parametrize("stated", [True, False])
def test_reasonseg_texts_become_sentences(folder, monkeypatch, capsys, stated):
    """All targets form one object with several sentences; the image size is the default if none is stated."""
    shapes = [{**RECTANGLE, "label": "target"}, {**TRIANGLE, "label": "ignore"}]
    shapes += [{**RECTANGLE, "label": "target", "points": [[40, 0], [44, 3]]}, {**TRIANGLE, "label": "flag"}]
    document = labelme(shapes, text=["what one drinks from", "the thing for tea"], is_sentence=True)
    if not stated:
        document = {key: document[key] for key in ("shapes", "text")}
    write("photos/a.json", document)
    assert call(monkeypatch, "import", *LABELME, "--out", "mine") == 0
    assert sentences_of() == ["what one drinks from", "the thing for tea"]
    assert areas_of() == [15 * 20 + 4 * 3] * 2
    assert "2 shape(s) with a reserved label left out: ignore 1, flag 1" in capsys.readouterr().err


def test_reasonseg_labels_do_not_become_sentences(folder, monkeypatch, capsys):
    shapes = [{**RECTANGLE, "label": "target"}, {**TRIANGLE, "label": "ignore"}]
    write("photos/a.json", labelme(shapes))
    is_refused(monkeypatch, capsys, *LABELME, words=["a.json: text: got None, expected ReasonSeg's sentences"])
    write("photos/a.json", labelme([{**RECTANGLE, "label": "target", "description": "the red target"}]))
    assert call(monkeypatch, "import", *LABELME, "--out", "mine") == 0
    assert sentences_of() == ["the red target"]


def test_parts_of_one_object_form_one_mask(folder, monkeypatch):
    """Shapes with the same group and label (or description) form one mask; any one of them may have the description."""
    other = {**RECTANGLE, "points": [[40, 0], [44, 3]]}
    parts = [{**RECTANGLE, "label": "bus", "group_id": 1, "description": "the bus behind the pole"}]
    parts += [{**other, "label": "bus", "group_id": 1, "description": ""}]
    named = [{**RECTANGLE, "label": "front", "group_id": 2, "description": "the lorry"}]
    named += [{**other, "label": "rear", "group_id": 2, "description": "the lorry"}]
    twice = [{**RECTANGLE, "label": "cat", "group_id": 3, "description": "the cat"}]
    twice += [{**other, "label": "cat", "group_id": 3, "description": "the striped one"}]
    write("photos/a.json", labelme([*parts, *named, *twice]))
    assert call(monkeypatch, "import", *LABELME, "--out", "mine") == 0
    assert sentences_of() == ["the bus behind the pole", "the lorry", "the cat", "the striped one"]
    assert areas_of() == [15 * 20 + 4 * 3] * 4


def test_warns_about_a_sentence_with_two_masks(folder, monkeypatch, capsys):
    other = {**RECTANGLE, "points": [[40, 0], [44, 3]]}
    write("photos/a.json", labelme([RECTANGLE, other, {**other, "label": "Dog "}, TRIANGLE]))
    write("photos/b.json", labelme([{**TRIANGLE, "label": "dog"}], "b"))
    assert call(monkeypatch, "import", *LABELME, "--out", "mine") == 0
    said = capsys.readouterr().err
    assert "warning: photos: 1 sentence(s) have two different masks in one image, of which at most one is right" in said
    assert "photos/a.json: shape 1 and photos/a.json: shape 2 ('dog')" in said


def base64_of(array: np.ndarray, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def test_reads_labelme_masks_and_x_anylabeling_corners(folder, monkeypatch):
    drawn = np.random.default_rng(0).random((5, 8)) > 0.5
    mask = {**TRIANGLE, "shape_type": "mask", "points": [[10, 20], [17, 24]], "mask": base64_of(drawn)}
    ones = {**mask, "label": "ones", "mask": base64_of(np.ones((5, 8), np.uint8))}
    four = {**RECTANGLE, "points": [[5, 10], [20, 10], [20, 30], [5, 30]]}
    # A square that stands on its corner, with diagonal 8: half of 8 x 8 pixels, up to its edge.
    askew = {**RECTANGLE, "label": "kite", "shape_type": "rotation", "points": [[30, 10], [34, 14], [30, 18], [26, 14]]}
    write("photos/a.json", labelme([mask, ones, four, askew]))
    assert call(monkeypatch, "import", *LABELME, "--out", "mine") == 0
    rows = rows_by_sentence(imported())
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[20:25, 10:18] = drawn
    np.testing.assert_array_equal(rows["cup"]["mask"], expected)
    np.testing.assert_array_equal(rows["ones"]["mask"], box_mask((10, 20, 18, 25)))
    np.testing.assert_array_equal(rows["dog"]["mask"], box_mask((5, 10, 20, 30)))
    assert rows["kite"]["mask"].sum() == pytest.approx(32, abs=8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"points": [[10, 20], [16, 24]]}, "mask: 8x5 px, expected 7x5 as its points say"),
        ({"points": [[55, 20], [62, 24]]}, "points: got [[55, 20], [62, 24]], expected a box inside 60x40 px"),
        ({"mask": None}, "mask: got None, expected a file in base64"),
        ({"mask": "%%%"}, "mask: not a readable PNG"),
        ({"points": [[10**400, 1], [2, 2]]}, "expected pairs of numbers x, y"),
        ({"points": [[float("inf"), 1], [2, 2]]}, "expected finite numbers"),
    ],
)
def test_refuses_wrong_labelme_masks(folder, monkeypatch, capsys, change, words):
    mask = {**TRIANGLE, "shape_type": "mask", "points": [[10, 20], [17, 24]], "mask": base64_of(np.ones((5, 8), bool))}
    write("photos/a.json", labelme([{**mask, **change}]))
    is_refused(monkeypatch, capsys, *LABELME, words=["photos/a.json: shape 1: ", words])


def test_writes_an_embedded_photo_beside_the_pairs(folder, monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    write("photos/d.json", labelme([TRIANGLE], "..\\elsewhere\\d", imageData=base64_of(pixels)))
    write("photos/a.json", labelme([RECTANGLE], imageData=base64_of(pixels)))  # photos/a.png exists
    assert call(monkeypatch, "import", *LABELME, "--out", "mine") == 0
    assert "2 pairs, 2 of them with a mask, 1 photos out of the files themselves" in capsys.readouterr().out
    np.testing.assert_array_equal(np.asarray(Image.open("mine/d.png")), pixels)
    rows = rows_by_sentence(imported())
    assert (rows["cup"]["image"], rows["dog"]["image"]) == ("mine/d.png", "photos/a.png")
    Path("mine/pairs.jsonl").unlink()
    assert call(monkeypatch, "import", *LABELME, "--out", "mine") == 2  # it may be another photo with the same name
    assert "mine/d.png: exists, but photos/d.json: shape 1 holds its photo; remove it" in capsys.readouterr().err
    Path("mine/d.png").unlink()
    write("photos/d.json", labelme([TRIANGLE], "e", imageData=base64.b64encode(b"no photo").decode()))
    is_refused(
        monkeypatch, capsys, *LABELME, words=["photos/d.json: shape 1: image mine/d.png: corrupt, or not one of"]
    )


def test_ignores_hidden_files_beside_the_annotations(folder, monkeypatch):
    write("photos/a.json", labelme([TRIANGLE]))
    Path("photos/._a.json").write_bytes(b"\0\5\26\7\0")
    assert call(monkeypatch, "import", *LABELME, "--out", "mine") == 0
    assert sentences_of() == ["cup"]


def test_warns_about_a_photo_with_an_exif_rotation_and_no_mask(folder, monkeypatch, capsys):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (WIDTH, HEIGHT), "gray").save("photos/d.jpg", exif=exif)
    write("export.json", [task("photos/d.jpg", "the cup", [])])
    assert call(monkeypatch, "import", *LABEL_STUDIO, "--out", "mine") == 0
    assert "1 image(s): an EXIF tag turns photos/d.jpg; pixels are used as stored" in capsys.readouterr().err


# --- stated sizes and impossible names


@pytest.mark.parametrize("count", [1, 200])
def test_a_stated_size_takes_no_memory(folder, monkeypatch, capsys, count):
    """A file of a kilobyte states 89 megapixels; its image, as usual, has a few thousand."""
    side = 9000
    shapes = [TRIANGLE, {**CIRCLE, "points": [[20, 20], [5000, 20]]}, RECTANGLE] * count
    write("photos/a.json", labelme(shapes, imageHeight=side, imageWidth=side))
    tracemalloc.start()
    words = ["shape 1: size: got 9000x9000, but photos/a.png has 60x40 px"]
    is_refused(monkeypatch, capsys, *LABELME, words=words, one_line=False)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_a_stated_size_takes_no_memory_in_label_studio(folder, monkeypatch, capsys):
    ellipse = {"x": 50, "y": 50, "radiusX": 50, "radiusY": 50}
    region = {"type": "ellipse", "original_height": 9000, "original_width": 9000, "value": ellipse}
    export = write("export.json", [task("a.png", "cup", [region])])
    tracemalloc.start()
    words = ["task 5: size: got 9000x9000, but photos/a.png has 60x40 px"]
    is_refused(monkeypatch, capsys, "label-studio", export, "--images", "photos", words=words)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize("label", [["cup"], {"cup": 1}, 7, ""])
def test_refuses_a_label_that_is_no_text(folder, monkeypatch, capsys, label):
    write("photos/a.json", labelme([{**TRIANGLE, "label": label}]))
    is_refused(monkeypatch, capsys, *LABELME, words=["photos/a.json: shape 1: label: got", "expected a text"])


@pytest.mark.parametrize("edge", [[20, 1e200], [20, 400]])
def test_refuses_a_circle_far_larger_than_its_image(folder, monkeypatch, capsys, edge):
    write("photos/a.json", labelme([{**CIRCLE, "points": [[20, 20], edge]}]))
    words = ["a.json: shape 1: got a shape with center x, y and radius 20, 20, ", "near an image of 60x40 pixels"]
    is_refused(monkeypatch, capsys, *LABELME, words=words)
    ellipse = {"x": 50, "y": 50, "radiusX": 1e200, "radiusY": 50}
    region = {"type": "ellipse", "original_height": 40, "original_width": 60, "value": ellipse}
    export = write("export.json", [task("a.png", "cup", [region])])
    is_refused(monkeypatch, capsys, "label-studio", export, "--images", "photos", words=["task 5", "60x40 pixels"])


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a\0b.png", "photos", ""])
def test_refuses_impossible_image_names_in_one_line(folder, monkeypatch, capsys, name):
    write("photos/a.json", labelme([TRIANGLE], imagePath=name))
    is_refused(monkeypatch, capsys, *LABELME, words=["a.json"])
    document = instances()
    document["images"][0]["file_name"] = name
    command = ("coco", write("instances.json", document), write("s.json", SENTENCES), "--images", "photos")
    is_refused(monkeypatch, capsys, *command, words=["entry 1"])
    export = write("export.json", [task(name, "cup")])
    is_refused(monkeypatch, capsys, "label-studio", export, "--images", "photos", words=["task 5"])


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_refuses_special_files_in_one_line(folder, monkeypatch, capsys, kind):
    os.mkfifo("x.json") if kind == "pipe" else Path("x.json").mkdir()
    for command in (("coco", "x.json", "--generate-sentences"), ("label-studio", "x.json")):
        is_refused(monkeypatch, capsys, *command, "--images", "photos", words=["x.json", "expected a file"])
