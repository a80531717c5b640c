"""User-provided pairs in JSON Lines: mask formats, unlabeled rows, and errors per line."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from l2l_core.core.masks import decode_rle
from l2l_core.datasets.jsonl import read_jsonl
from l2l_core.datasets.read import load_dataset
from l2l_core.errors import InputError

HEIGHT, WIDTH = 20, 30
TRUTH = np.zeros((HEIGHT, WIDTH), dtype=bool)
TRUTH[4:9, 6:16] = True
POLYGON = [6, 4, 16, 4, 16, 9, 6, 9]
RUNS = [6 * 20 + 4, *([5, 15] * 9), 5, 14 * 20 + 11]
"""TRUTH in column-major order: six empty columns and four pixels, then ten columns of five pixels."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    (tmp_path / "masks").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c.png"):
        Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(tmp_path / "photos" / name)
    columns = np.arange(WIDTH)
    parts = {"a": TRUTH, "left": TRUTH & (columns < 11), "right": TRUTH & (columns >= 11), "nothing": TRUTH & False}
    for name, part in parts.items():
        Image.fromarray(part.astype(np.uint8) * 255).save(tmp_path / "masks" / f"{name}.png")
    return tmp_path


def write(folder: Path, *rows: object) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(**more: object) -> dict:
    return {"image": "photos/a.png", "sentence": "the red cup"} | more


def test_reads_labeled_unlabeled_and_evaluation_pairs(folder):
    path = write(
        folder,
        pair(mask="masks/a.png"),
        pair(sentence="cup left of the plate", mask="masks/a.png"),
        pair(image="photos/b.jpg", sentence="the dog"),
        pair(image="photos/b.jpg", sentence="a dog on the sofa"),
        pair(image="./photos/c.png", sentence="die Tür", split="testA", mask={"polygon": POLYGON}),
    )
    index = read_jsonl(path)

    refs = index.refs.to_pylist()
    assert [row["sent_id"] for row in refs] == [0, 1, 2, 3, 4]
    assert [row["ref_id"] for row in refs] == [0, 0, 1, 2, 3], "one image and one mask are one ref"
    assert [row["ann_id"] for row in refs] == [0, 0, -1, -1, 3]
    assert [row["image_id"] for row in refs] == [0, 0, 1, 1, 2]
    assert [row["split"] for row in refs] == ["train"] * 4 + ["testA"]
    assert [row["bbox"] for row in refs] == [[6, 4, 16, 9]] * 2 + [None] * 2 + [[6, 4, 16, 9]]
    assert refs[4]["sentence"] == "die Tür"
    assert [Path(row["file_name"]).name for row in index.images.to_pylist()] == ["a.png", "b.jpg", "c.png"]
    assert [row["ann_id"] for row in index.objects.to_pylist()] == [0, 3]
    assert [row["ann_id"] for row in index.masks.to_pylist()] == [0, 3]


MASKS = {
    "png": "masks/a.png",
    "polygon": {"polygon": POLYGON},
    "polygons": {"polygon": [POLYGON]},
    "bare polygon": POLYGON,
    "overlapping polygons": [POLYGON, [8, 5, 12, 5, 12, 8, 8, 8]],
    "two halves": [[6, 4, 11, 4, 11, 9, 6, 9], [11, 4, 16, 4, 16, 9, 11, 9]],
    "parts in two images": ["masks/left.png", "masks/right.png"],
    "parts of three forms": ["masks/left.png", {"polygon": [11, 4, 16, 4, 16, 9, 11, 9]}, [8, 5, 12, 5, 12, 8, 8, 8]],
    "runs and an empty part": [{"size": [HEIGHT, WIDTH], "counts": RUNS}, "masks/nothing.png"],
    "runs": {"size": [HEIGHT, WIDTH], "counts": RUNS},
    "compressed runs": {
        "size": [HEIGHT, WIDTH],
        "counts": coco_mask.encode(np.asfortranarray(TRUTH.astype(np.uint8)))["counts"].decode(),
    },
}


@pytest.mark.parametrize("kind", MASKS)
def test_every_mask_format_gives_the_same_mask(folder, kind):
    (row,) = read_jsonl(write(folder, pair(mask=MASKS[kind]))).masks.to_pylist()

    np.testing.assert_array_equal(decode_rle(row["rle_counts"], HEIGHT, WIDTH), TRUTH)
    assert row["area_px"] == 50


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_reads_single_channel_mask_images(folder, mode):
    values = {
        "1": Image.fromarray(TRUTH),
        "L": Image.fromarray(TRUTH.astype(np.uint8)),
        "P": Image.fromarray(TRUTH.astype(np.uint8) * 7).convert("P"),
        "I;16": Image.fromarray(TRUTH.astype(np.uint16) * 300),
    }
    assert values[mode].mode == mode
    values[mode].save(folder / "masks" / "b.png")

    (row,) = read_jsonl(write(folder, pair(mask="masks/b.png"))).masks.to_pylist()
    np.testing.assert_array_equal(decode_rle(row["rle_counts"], HEIGHT, WIDTH), TRUTH)


def test_user_ids_become_sentence_ids(folder):
    index = read_jsonl(write(folder, pair(id=40), pair(id=7)))

    assert index.refs.select(["sent_id", "ref_id"]).to_pylist() == [
        {"sent_id": 7, "ref_id": 1},
        {"sent_id": 40, "ref_id": 0},
    ]


def test_reads_images_from_another_folder(folder, tmp_path):
    (folder / "photos").rename(folder / "elsewhere")
    path = write(folder, {"image": "a.png", "sentence": "cup"})

    assert load_dataset(path, images=str(folder / "elsewhere")).refs.num_rows == 1
    with pytest.raises(InputError, match=r"line 1: image .*a\.png: not found"):
        load_dataset(folder)


def damage(folder: Path) -> None:
    (folder / "photos" / "a.png").write_bytes((folder / "photos" / "a.png").read_bytes()[:-50])
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(folder / "masks" / "empty.png")
    Image.fromarray(np.ones((HEIGHT + 1, WIDTH), np.uint8)).save(folder / "masks" / "high.png")
    Image.fromarray(np.ones((HEIGHT, WIDTH, 3), np.uint8)).save(folder / "masks" / "colour.png")
    (folder / "masks" / "cut.png").write_bytes((folder / "masks" / "a.png").read_bytes()[:-30])


B = {"image": "photos/b.jpg", "sentence": "dog"}
BAD_LINES = {
    "truncated image": (pair(), r"line 2: image .*photos/a\.png: cannot be read"),
    "missing image": (B | {"image": "photos/z.png"}, r"line 2: image .*photos/z\.png: not found"),
    "a folder": (B | {"image": "photos"}, r"line 2: image .*photos: not a regular file"),
    "no image": ({"sentence": "dog"}, r"line 2: image: missing, expected a text"),
    "no sentence": ({"image": "photos/b.jpg"}, r"line 2: sentence: missing, expected a text"),
    "long sentence": (B | {"sentence": "a" * 2001}, r"line 2: sentence: 2001 characters, expected at most 2000"),
    "null byte in a name": (B | {"image": "a\0b.png"}, r"line 2: image .*: cannot be read: embedded null byte"),
    "name of 300 characters": (B | {"image": "x" * 300}, r"line 2: image .*: cannot be read: .*File name too long"),
    "null byte in a mask's name": (B | {"mask": "a\0b.png"}, r"line 2: mask: .* is not a readable PNG"),
    "deep mask": (B | {"mask": json.loads("[" * 900 + "]" * 900)}, r"line 2: mask: "),
    "no words": (B | {"sentence": "..."}, r"line 2: sentence '\.\.\.' has no words"),
    "half a character": (B | {"sentence": "a \ud800"}, r"line 2: sentence: got 'a \\ud800'"),
    "unknown key": (
        B | {"masks": "x"},
        r"line 2: unknown key 'masks', expected some of image, sentence, mask, split, style, id",
    ),
    "unknown split": (B | {"split": "dev"}, r"line 2: split: got 'dev', expected one of train, val"),
    "style of no type": (B | {"style": 3}, r"line 2: style: got 3, expected a text"),
    "split of no type": (B | {"split": 3}, r"line 2: split: got 3"),
    "evaluation without mask": (B | {"split": "val"}, r"line 2: mask: missing, expected one because split is val"),
    "text as id": (B | {"id": "7"}, r"line 2: id: got '7', expected a whole number"),
    "a list": ([1, 2], r"line 2: got a JSON list, expected an object"),
    "mask of no type": (B | {"mask": 5}, r"line 2: mask: got 5"),
    "missing mask": (B | {"mask": "masks/z.png"}, r"line 2: mask: .*masks/z\.png not found"),
    "empty mask": (B | {"mask": "masks/empty.png"}, r"line 2: mask: empty"),
    "mask of another size": (B | {"mask": "masks/high.png"}, r"line 2: mask: .*high\.png is 30x21 px, expected 30x20"),
    "coloured mask": (B | {"mask": "masks/colour.png"}, r"line 2: mask: .*colour\.png has mode RGB"),
    "truncated mask": (B | {"mask": "masks/cut.png"}, r"line 2: mask: .*cut\.png is not a readable PNG"),
    "jpeg mask": (B | {"mask": "photos/b.jpg"}, r"line 2: mask: .*b\.jpg is not a readable PNG"),
    "bad polygon": (B | {"mask": [1, 2, 3]}, r"line 2: mask: segmentation: each polygon needs"),
    "polygon outside": (
        B | {"mask": [-5, -5, -2, -5, -2, -2]},
        r"line 2: mask: the polygons reach from x -5, y -5 to x -2, y -2, outside the image of",
    ),
    "polygon without a pixel": (
        B | {"mask": [0.1, 0.1, 0.4, 0.1, 0.4, 0.2]},
        r"line 2: mask: empty: the polygons enclose no pixel",
    ),
    "empty part": (B | {"mask": ["masks/nothing.png"]}, r"line 2: mask: empty, expected at least one foreground pixel"),
    "part of no type": (
        B | {"mask": ["masks/a.png", 5]},
        r"line 2: mask: polygon: got int, expected the path of a PNG",
    ),
    "wrong runs": (B | {"mask": {"size": [HEIGHT, WIDTH], "counts": [1, 2]}}, r"line 2: mask: segmentation\.counts"),
    "other object": (
        B | {"mask": {"box": [1, 2]}},
        r"line 2: mask: got an object with the keys 'box', expected the path of a PNG, polygons as .*, or run lengths",
    ),
    "misspelled polygon": (
        B | {"mask": {"polygons": [POLYGON]}},
        r"mask: got an object with the keys 'polygons', exp",
    ),
    "points in lists": (
        B | {"mask": {"polygon": [[10, 5], [30, 5], [30, 20]]}},
        r"mask: segmentation: got points as \[x, y\]; each polygon needs one flat list: x1, y1, x2",
    ),
    "no polygon": (B | {"mask": {"polygon": "x"}}, r"line 2: mask: polygon: got str, expected the path of a PNG"),
    "no runs": (B | {"mask": {"size": [HEIGHT, WIDTH]}}, r"line 2: mask: segmentation\.counts: got NoneType"),
    "large id": (B | {"id": 2**63}, r"line 2: id: got 9223372036854775808, expected a whole number from -\d+ to 92"),
    "overlap": (
        {"image": "photos/../photos/c.png", "sentence": "dog", "split": "val", "mask": POLYGON},
        r"1 image\(s\) are in train and in an evaluation split: .*c\.png",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_error_names_the_bad_line(folder, name):
    damage(folder)
    row, message = BAD_LINES[name]

    with pytest.raises(InputError, match=message):
        read_jsonl(write(folder, {"image": "photos/c.png", "sentence": "fine"}, row))


def warnings_of(path: Path) -> list[str]:
    return [warning.replace(f"{path.parent}/", "") for warning in read_jsonl(path).warnings]


def test_warns_about_identical_photos_in_train_and_evaluation(folder):
    (folder / "photos" / "copy of a.png").write_bytes((folder / "photos" / "a.png").read_bytes())
    other = pair(image="photos/copy of a.png", mask="masks/a.png")
    assert warnings_of(write(folder, pair(mask="masks/a.png"), other)) == []  # both in train
    assert warnings_of(write(folder, pair(mask="masks/a.png"), other | {"split": "val"})) == [
        "pairs.jsonl: 1 image(s) of train are, byte for byte, images of an evaluation split: "
        "photos/a.png = photos/copy of a.png; leave one of each out, or scores are too high"
    ]


def test_refuses_a_symlinked_photo_in_both_train_and_evaluation(folder):
    (folder / "photos" / "link.png").symlink_to(folder / "photos" / "a.png")
    with pytest.raises(InputError, match=r"1 image\(s\) are in train and in an evaluation split"):
        read_jsonl(write(folder, pair(), pair(image="photos/link.png", mask="masks/a.png", split="val")))


def test_warns_about_a_sentence_with_two_masks_in_one_image(folder):
    elsewhere = {"polygon": [1, 1, 5, 1, 5, 4]}
    same = pair(mask={"polygon": POLYGON}, sentence="The red  cup")  # the same pixels as the mask image
    two = pair(mask=elsewhere)
    path = write(folder, pair(mask="masks/a.png"), same, pair(), pair(image="photos/b.jpg", mask=elsewhere))
    assert warnings_of(path) == []
    path = write(folder, pair(mask="masks/a.png"), same, two, two | {"sentence": "the RED cup"})
    assert warnings_of(path) == [
        "pairs.jsonl: 1 sentence(s) have two different masks in one image, of which at most one is right: "
        "pairs.jsonl: line 1 and pairs.jsonl: line 3 ('the red cup'); say which object is meant, or unite its parts in "
        "one mask"
    ]


def test_warns_about_photos_with_an_exif_rotation(folder):
    exif = Image.Exif()
    exif[0x0112] = 3
    for number in range(7):
        Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(folder / f"{number}.jpg", exif=exif)
    rows = [pair(image=f"{number}.jpg", mask=POLYGON) for number in range(7)]
    (said,) = warnings_of(write(folder, pair(), *rows))
    assert said.startswith("pairs.jsonl: 7 image(s): an EXIF tag turns 0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 2 more; ")
    assert said.endswith(
        "pixels are used as stored, so save the photo upright, and draw their masks on the upright photo"
    )


def test_ignores_hidden_files_when_locating_the_dataset(folder):
    path = write(folder, pair())
    (folder / "._pairs.jsonl").write_bytes(b"\0\5\26\7\0")
    assert load_dataset(folder).refs.equals(read_jsonl(path).refs)


def test_all_bad_lines_are_reported_at_once(folder):
    damage(folder)
    names = ["unknown key", "missing image", "empty mask", "no words", "text as id", "evaluation without mask"]
    path = write(folder, *(BAD_LINES[name][0] for name in names))
    with path.open("a") as file:
        file.write("{not json\n")

    with pytest.raises(InputError) as caught:
        read_jsonl(path)
    for number in range(1, len(names) + 2):
        assert f"line {number}: " in str(caught.value)
    assert "not JSON: Expecting property name enclosed in double quotes at column 2; expected one" in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([pair(id=1), pair(id=1)], r"line 2: sent_id 1 is taken by .*line 1"),
        ([pair(id=1), pair()], r"line 2: id: missing, but other lines have one"),
        ([], "no pairs"),
    ],
)
def test_refuses_duplicate_or_missing_ids_and_empty_files(folder, rows, message):
    with pytest.raises(InputError, match=message):
        read_jsonl(write(folder, *rows))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.sampled_from(["size", "counts", "polygon"]), inner),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mask=json_values, extra=st.dictionaries(st.sampled_from(["id", "split", "sentence", "image"]), json_values))
def test_any_json_line_is_read_or_refused(folder, mask, extra):
    """For any line, the reader either raises InputError or reads one pair; no other exception escapes."""
    path = write(folder, pair(mask=mask) | extra)
    try:
        index = read_jsonl(path)
    except InputError:
        return
    assert index.refs.num_rows == 1
