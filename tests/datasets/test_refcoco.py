"""Reading the RefCOCO layout from a handmade dataset, from real ones, and from broken ones."""

import contextlib
import json
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from l2l_core.artifacts import records
from l2l_core.core.masks import decode_rle
from l2l_core.datasets.read import find_layout, load_dataset
from l2l_core.datasets.refcoco import read_refcoco
from l2l_core.errors import InputError, exit_code
from stages import ingest


def rows(table: pa.Table) -> list[dict]:
    return table.to_pylist()


def test_reads_every_row_of_the_layout(tiny_refcoco):
    index = read_refcoco(tiny_refcoco.folder)

    refs = rows(index.refs)
    assert [row["sent_id"] for row in refs] == [1000 * k + n for k in range(1, 7) for n in (0, 1)]
    assert refs[3] == {
        "sent_id": 2001,
        "ref_id": 20,
        "ann_id": 200,
        "image_id": 2,
        "category": "cup",
        "sentence": "thing 2, not the other",
        "style": "",
        "split": "train",
        "bbox": [4.0, 5.0, 40.0, 25.0],
    }
    assert [row["split"] for row in refs[::2]] == ["train"] * 4 + ["val", "testA"]
    images = rows(index.images)
    assert [(row["image_id"], row["height"], row["width"]) for row in images] == [
        (k, 40 + k, 60 - k) for k in range(1, 7)
    ]
    objects = rows(index.objects)
    assert [row["ann_id"] for row in objects] == [100, 200, 300, 400, 500, 600, 999]
    assert objects[-1] == {"ann_id": 999, "image_id": 1, "category": "cup", "bbox": [1.5, 2.0, 4.5, 6.0]}
    assert not index.boxes_only


def test_every_mask_format_gives_the_drawn_pixels(tiny_refcoco):
    """Polygon, polygons, compressed and uncompressed runs, compared with arrays filled pixel by pixel."""
    masks = rows(read_refcoco(tiny_refcoco.folder).masks)

    assert [row["ann_id"] for row in masks] == [100, 200, 300, 400, 500, 600]
    for row in masks:
        truth = tiny_refcoco.truth[row["ann_id"]]
        np.testing.assert_array_equal(decode_rle(row["rle_counts"], row["height"], row["width"]), truth)
        assert row["area_px"] == truth.sum()


@pytest.mark.parametrize("name", ["refs(unc).p", "refs(umd).json", "refs(anything).json"])
def test_reads_pickle_and_json_refs_alike(tiny_refcoco, name):
    before = read_refcoco(tiny_refcoco.folder)
    tiny_refcoco.save(name)

    assert read_refcoco(tiny_refcoco.folder).refs.equals(before.refs)


def test_row_order_in_the_files_does_not_matter(tiny_refcoco):
    before = read_refcoco(tiny_refcoco.folder)
    tiny_refcoco.refs.reverse()
    for key in ("images", "annotations"):
        tiny_refcoco.instances[key].reverse()
    tiny_refcoco.save()

    after = read_refcoco(tiny_refcoco.folder)
    for table in ("images", "refs", "objects", "masks"):
        assert getattr(after, table).equals(getattr(before, table))


def test_keeps_the_style_of_a_sentence(tiny_refcoco):
    tiny_refcoco.refs[0]["sentences"][1]["style"] = "short"
    tiny_refcoco.save()

    assert read_refcoco(tiny_refcoco.folder).refs["style"].to_pylist()[:3] == ["", "short", ""]


def test_omits_images_without_a_sentence(tiny_refcoco):
    tiny_refcoco.instances["images"].append({"id": 77, "file_name": "nowhere.jpg", "height": 9, "width": 9})
    tiny_refcoco.instances["annotations"].append(
        {"id": 770, "image_id": 77, "category_id": 1, "bbox": [0, 0, 1, 1], "segmentation": [[0, 0, 1, 0, 1, 1]]}
    )
    tiny_refcoco.save()

    index = read_refcoco(tiny_refcoco.folder)
    assert 77 not in index.images["image_id"].to_pylist()
    assert 770 not in index.objects["ann_id"].to_pylist()


def test_file_names_are_relative_to_the_project(tiny_refcoco, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    inside = read_refcoco(Path("tiny")).images["file_name"].to_pylist()
    assert inside[0] == "tiny/images/photo_1.jpg"

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    outside = read_refcoco(Path("../tiny")).images["file_name"].to_pylist()
    assert outside[0] == (tmp_path / "tiny/images/photo_1.jpg").as_posix()


@pytest.mark.parametrize(
    "below", ["images/train2014", "../images", "../images/train2014", "../images/mscoco/images/train2014"]
)
def test_finds_the_published_image_folders(tiny_refcoco, below):
    before = read_refcoco(tiny_refcoco.folder)
    folder = tiny_refcoco.folder / below
    shutil.copytree(tiny_refcoco.folder / "images", tiny_refcoco.folder / "moving")
    shutil.rmtree(tiny_refcoco.folder / "images")
    folder.parent.mkdir(parents=True, exist_ok=True)
    (tiny_refcoco.folder / "moving").rename(folder)

    after = read_refcoco(tiny_refcoco.folder)
    assert after.images["sha256"].equals(before.images["sha256"])
    assert read_refcoco(tiny_refcoco.folder, images=str(folder)).images.equals(after.images)


def test_requires_a_choice_among_several_refs_files(tiny_refcoco):
    shutil.copy(tiny_refcoco.folder / "refs(unc).p", tiny_refcoco.folder / "refs(google).p")

    assert read_refcoco(tiny_refcoco.folder, split_by="unc").refs.num_rows == 12
    with pytest.raises(InputError, match=r"found refs\(google\)\.p, refs\(unc\)\.p, .*ingest\.split_by"):
        read_refcoco(tiny_refcoco.folder)
    with pytest.raises(
        InputError, match=r"expected refs\(umd\)\.p or \.json; choose by ingest\.split_by: google or unc"
    ):
        read_refcoco(tiny_refcoco.folder, split_by="umd")


def test_accepts_any_split_by_name_and_refuses_duplicate_refs_files(tiny_refcoco):
    """refclef.zip has refs(berkeley).p beside refs(unc).p. Two file formats of one name are an error."""
    tiny_refcoco.save("refs(berkeley).p")
    shutil.copy(tiny_refcoco.folder / "refs(berkeley).p", tiny_refcoco.folder / "refs(unc).p")
    with pytest.raises(InputError, match=r"choose by ingest\.split_by: berkeley or unc$"):
        read_refcoco(tiny_refcoco.folder)
    assert read_refcoco(tiny_refcoco.folder, split_by="berkeley").refs.num_rows == 12

    (tiny_refcoco.folder / "refs(berkeley).p").unlink()
    (tiny_refcoco.folder / "refs(unc).json").write_text(json.dumps(tiny_refcoco.refs))
    for split_by in ("auto", "unc"):
        with pytest.raises(InputError, match=r"refs\(unc\)\.json and refs\(unc\)\.p are both .* unc; remove one$"):
            read_refcoco(tiny_refcoco.folder, split_by=split_by)


def test_treats_one_file_under_two_ids_as_one_image(tiny_refcoco):
    """As after merging two COCO files: one photo is in train under one id and in val under the other."""
    tiny_refcoco.instances["images"].append(tiny_refcoco.image(1) | {"id": 7})
    tiny_refcoco.instances["annotations"].append(tiny_refcoco.annotation(100) | {"id": 700, "image_id": 7})
    more = {"ref_id": 70, "ann_id": 700, "image_id": 7, "split": "val", "sentences": [{"sent_id": 7, "sent": "it"}]}
    tiny_refcoco.refs.append(more)
    tiny_refcoco.save()
    with pytest.raises(InputError, match=r"1 image\(s\) are in train and in an evaluation split: \S+photo_1\.jpg;"):
        read_refcoco(tiny_refcoco.folder)

    shutil.copy(tiny_refcoco.image_path(1), tiny_refcoco.folder / "images" / "copy.jpg")
    tiny_refcoco.image(7)["file_name"] = "copy.jpg"
    tiny_refcoco.save()
    (said,) = read_refcoco(tiny_refcoco.folder).warnings
    assert "1 image(s) of train are, byte for byte, images of an evaluation split" in said
    assert "photo_1.jpg = " in said


def test_grefcoco_merges_several_targets_and_skips_sentences_without_a_target(tiny_refcoco):
    """Image 1 has objects 100 and 999. Two refs mean both of them, one ref means one, and two refs have no target."""
    tiny_refcoco.annotation(999)["segmentation"] = [[50, 30, 55, 30, 55, 36, 50, 36]]
    tiny_refcoco.annotation(999)["bbox"] = [50, 30, 5, 6]
    truth = tiny_refcoco.truth[100].copy()
    truth[30:36, 50:55] = True
    for row in tiny_refcoco.refs:
        row["ann_id"] = [row["ann_id"]]
    said = iter(range(1, 9))

    def ref(ref_id: int, ann_id: list[int], **more: object) -> dict[str, object]:
        sentences = [{"sent_id": next(said), "sent": "all of them"}]
        return {"ref_id": ref_id, "ann_id": ann_id, "image_id": 1, "split": "train", "sentences": sentences, **more}

    tiny_refcoco.refs += [ref(1, [100, 999]), ref(2, [999, 100]), ref(3, [-1], no_target=True), ref(4, [-1])]
    tiny_refcoco.save("grefs(unc).json")
    index = load_dataset(tiny_refcoco.folder, split_by="unc")
    assert index.warnings == (
        f"{tiny_refcoco.folder}/grefs(unc).json: 2 sentence(s) without a target (no_target) are left out",
    )
    rows = {row["sent_id"]: row for row in index.refs.to_pylist()}
    assert len(rows) == 12 + 2
    assert rows[1]["ann_id"] == rows[2]["ann_id"] == 1000  # one above the largest existing id
    assert rows[1]["bbox"] == [4, 5, 55, 36]
    masks = {row["ann_id"]: row for row in index.masks.to_pylist()}
    np.testing.assert_array_equal(decode_rle(masks[1000]["rle_counts"], 41, 59), truth)
    assert masks[1000]["area_px"] == truth.sum()
    np.testing.assert_array_equal(decode_rle(masks[100]["rle_counts"], 41, 59), tiny_refcoco.truth[100])

    for wrong, message in (([100, 200], "which are of several images"), ([100, 5], "expected ids of usable")):
        tiny_refcoco.refs[-1] = ref(4, wrong)
        tiny_refcoco.save("grefs(unc).json")
        with pytest.raises(InputError, match=rf"ref 9 \(ref_id 4\): ann_id: got \[100, \d+\], {message}"):
            read_refcoco(tiny_refcoco.folder)


# Each case breaks one thing in the dataset it is called with; the message must name file, row and value.
def _set(path: str, value: object) -> Callable:
    """`ref.30.split` -> the row, the id, the key (numbers index lists)."""
    kind, row_id, *keys = path.split(".")

    def change(data):
        row = getattr(data, {"ref": "ref", "ann": "annotation", "img": "image"}[kind])(int(row_id))
        for key in keys[:-1]:
            row = row[int(key) if key.isdigit() else key]
        row[keys[-1]] = value

    return change


def _append(what: str, row: object) -> Callable:
    return lambda data: (data.refs if what == "refs" else data.instances[what]).append(row)


def _truncate(data):
    path = data.image_path(3)
    path.write_bytes(path.read_bytes()[:-200])


def _truncate_png(data):
    path = data.image_path(2)
    path.write_bytes(path.read_bytes()[:-200])


BROKEN = {
    "missing image": (
        lambda data: data.image_path(2).unlink(),
        r"instances\.json: image 1 \(id 2\): image photo_2\.png not found",
    ),
    "truncated jpeg": (_truncate, r"image 2 \(id 3\): image .*photo_3\.jpg: cannot be read: .*truncated"),
    "truncated png": (_truncate_png, r"image 1 \(id 2\): image .*photo_2\.png: cannot be read"),
    "not an image": (
        lambda data: data.image_path(1).write_bytes(b"hello"),
        r"image 0 \(id 1\): .*photo_1\.jpg: corrupt",
    ),
    "empty file": (lambda data: data.image_path(1).write_bytes(b""), r"image 0 \(id 1\): .*photo_1\.jpg: corrupt"),
    "size mismatch": (
        _set("img.2.width", 57),
        r"image 1 \(id 2\): .*photo_2\.png is 58x42 px, the annotations say 57x42",
    ),
    "no size": (_set("img.2.width", None), r"image 1 \(id 2\): width: got None"),
    "negative size": (_set("img.2.width", -58), r"image 1 \(id 2\): height, width: got 42, -58"),
    "empty mask": (
        _set("ann.300.segmentation.counts", None),
        r"annotation 2 \(id 300\): segmentation\.counts: got NoneType",
    ),
    "mask without pixels": (
        _set("ann.400.segmentation", {"size": [44, 56], "counts": [44 * 56]}),
        r"annotation 3 \(id 400\): empty mask",
    ),
    "no segmentation": (_set("ann.200.segmentation", []), r"annotation 1 \(id 200\): segmentation: got an empty list"),
    "bad polygon": (
        _set("ann.100.segmentation", [[1, 2, 3, 4]]),
        r"annotation 0 \(id 100\): segmentation: each polygon",
    ),
    "text in polygon": (_set("ann.100.segmentation", [[1, 2, 3, 4, "5", 6]]), r"annotation 0 \(id 100\): .*numbers"),
    "far polygon": (_set("ann.100.segmentation", [[1, 2, 3, 4, 1e12, 6]]), r"annotation 0 \(id 100\): .*in or near"),
    "wrong counts": (
        _set("ann.300.segmentation.counts", "55"),
        r"annotation 2 \(id 300\): segmentation\.counts: runs",
    ),
    "wrong mask size": (
        _set("ann.300.segmentation.size", [5, 5]),
        r"annotation 2 \(id 300\): segmentation\.size: got \[5, 5\]",
    ),
    "nan box": (_set("ann.999.bbox", [0, float("nan"), 1, 1]), r"annotation 6 \(id 999\): bbox: got .*nan"),
    "infinite box": (_set("ann.999.bbox", [0, 0, float("inf"), 1]), r"annotation 6 \(id 999\): bbox: got .*inf"),
    "negative box": (_set("ann.999.bbox", [0, 0, -1, 1]), r"annotation 6 \(id 999\): bbox: .*width and height >= 0"),
    "three numbers": (_set("ann.999.bbox", [0, 0, 1]), r"annotation 6 \(id 999\): bbox: .*4 numbers"),
    "object's unknown image": (_set("ann.999.image_id", 55), r"annotation 6 \(id 999\): image_id 55: no usable image"),
    "unknown category": (_set("ann.200.category_id", 9), r"annotation 1 \(id 200\): category_id 9"),
    "no words": (
        _set("ref.20.sentences.0.sent", " ?! "),
        r"refs\(unc\)\.p: ref 1 \(ref_id 20\), sentence 0: sentence ' \?! ' has no words",
    ),
    "sentence of no type": (
        _set("ref.20.sentences.1.sent", 3),
        r"ref 1 \(ref_id 20\), sentence 1: sent: got 3, expected str",
    ),
    "no sentences": (_set("ref.20.sentences", []), r"ref 1 \(ref_id 20\): sentences: got an empty list"),
    "duplicate sent_id": (
        _set("ref.20.sentences.1.sent_id", 1000),
        r"ref 1 \(ref_id 20\), sentence 1: sent_id 1000 is taken by .*ref 0 \(ref_id 10\), sentence 0",
    ),
    "duplicate ref_id": (_set("ref.30.ref_id", 10), r"ref 2 \(ref_id 10\): ref_id is taken"),
    "text as id": (_set("ref.30.ref_id", "30"), r"ref 2: ref_id: got '30', expected a whole number"),
    "id beyond 64 bits": (_set("ref.30.ref_id", 2**63), r"ref 2: ref_id: got 9223372036854775808"),
    "half a character": (
        _set("ref.30.sentences.0.sent", "a \ud800"),
        r"ref 2 \(ref_id 30\), sentence 0: sent: .*UTF-8",
    ),
    "size beyond reason": (_set("img.2.width", 10**12), r"image 1 \(id 2\): height, width: got 42, 1000000000000"),
    "true as id": (_set("ref.30.ann_id", True), r"ref 2 \(ref_id 30\): ann_id: got True, expected a whole number"),
    "unknown split": (
        _set("ref.30.split", "dev"),
        r"ref 2 \(ref_id 30\), sentence 0: split: got 'dev', expected one of train, val",
    ),
    "unknown annotation": (_set("ref.30.ann_id", 31), r"ref 2 \(ref_id 30\): ann_id 31: no usable annotation"),
    "another image": (
        _set("ref.30.image_id", 2),
        r"ref 2 \(ref_id 30\): image_id: got 2, but annotation 300 is of image 3",
    ),
    "overlap": (
        _append(
            "refs",
            {"ref_id": 11, "ann_id": 999, "image_id": 1, "split": "val", "sentences": [{"sent_id": 5, "sent": "it"}]},
        ),
        r"1 image\(s\) are in train and in an evaluation split: \S+/images/photo_1\.jpg",
    ),
    "row is a list": (_append("refs", [1]), r"ref 6: got \[1\], expected an object"),
    "annotation is a text": (_append("annotations", "x"), r"annotation 7: got 'x', expected an object"),
    "duplicate annotation": (_append("annotations", {"id": 100}), r"annotation 7 \(id 100\): id is taken"),
    "duplicate image": (_append("images", {"id": 1}), r"image 6 \(id 1\): id is taken"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_error_names_the_broken_row(tiny_refcoco, name):
    breaks, message = BROKEN[name]
    breaks(tiny_refcoco)
    tiny_refcoco.save()

    with pytest.raises(InputError, match=message):
        read_refcoco(tiny_refcoco.folder)


def test_all_problems_are_reported_at_once(tiny_refcoco):
    for name in ("missing image", "truncated jpeg", "no words", "unknown split", "bad polygon", "nan box"):
        BROKEN[name][0](tiny_refcoco)
    tiny_refcoco.save()

    with pytest.raises(InputError) as caught:
        read_refcoco(tiny_refcoco.folder)
    text = str(caught.value)
    for expected in ("photo_2.png not found", "photo_3.jpg: cannot", "has no words", "'dev'", "id 100", "id 999"):
        assert expected in text


def test_refuses_small_images(tiny_refcoco):
    assert read_refcoco(tiny_refcoco.folder, min_image_side_px=41).images.num_rows == 6  # image 1 is 41 px high
    with pytest.raises(InputError, match=r"photo_1\.jpg: 59x41 px, expected sides >= 42 px"):
        read_refcoco(tiny_refcoco.folder, min_image_side_px=42)
    Image.new("RGB", (40, 90)).save(tiny_refcoco.image_path(1))
    with pytest.raises(InputError, match=r"photo_1\.jpg: 40x90 px, expected sides >= 41 px"):
        read_refcoco(tiny_refcoco.folder, min_image_side_px=41)


def test_a_malicious_pickle_is_refused_and_does_not_run(tiny_refcoco, tmp_path):
    trace = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {trace}",)

    content = pickle.dumps([Payload()])
    pickle.loads(content)
    assert trace.exists(), "the payload must work where nothing guards against it"
    trace.unlink()
    (tiny_refcoco.folder / "refs(unc).p").write_bytes(content)

    with pytest.raises(InputError, match=r"refs\(unc\)\.p: not a pickle of plain data: .*posix\.system"):
        read_refcoco(tiny_refcoco.folder)
    assert not trace.exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_refs_are_read_or_refused(tiny_refcoco, data):
    """For any flipped or truncated bytes, the reader raises InputError or reads rows; no other exception escapes."""
    content = bytearray(pickle.dumps(tiny_refcoco.refs, data.draw(st.integers(0, 4))))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tiny_refcoco.folder / "refs(unc).p"
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))

    with contextlib.suppress(InputError):
        assert read_refcoco(tiny_refcoco.folder).refs.num_rows > 0


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"images": [], "annotations": []}', b"[" * 100_000]
)
def test_refuses_broken_instances(tiny_refcoco, content):
    (tiny_refcoco.folder / "instances.json").write_bytes(content)

    with pytest.raises(InputError, match=r"instances\.json"):
        read_refcoco(tiny_refcoco.folder)


def test_reads_a_dataset_with_only_boxes(tiny_refcoco):
    """Without segmentations, the reader needs neither masks nor images; it uses the image sizes that are stated."""
    for annotation in tiny_refcoco.instances["annotations"]:
        annotation["segmentation"] = []
    tiny_refcoco.image(2).update(height=None, width=None)
    tiny_refcoco.image(3).update(height=None, width=None)
    tiny_refcoco.image_path(3).unlink()
    tiny_refcoco.image_path(4).unlink()
    tiny_refcoco.save()

    index = read_refcoco(tiny_refcoco.folder)
    assert index.boxes_only
    assert index.masks.num_rows == 0
    assert index.refs.num_rows == 12
    images = {row["image_id"]: row for row in rows(index.images)}
    assert (images[2]["height"], images[2]["width"]) == (42, 58)  # read from the file
    assert (images[3]["height"], images[3]["width"], images[3]["sha256"]) == (0, 0, "")
    assert (images[4]["height"], images[4]["width"], images[4]["sha256"]) == (44, 56, "")

    tiny_refcoco.image_path(1).write_bytes(b"not an image")
    with pytest.raises(InputError, match="photo_1"):
        read_refcoco(tiny_refcoco.folder)


def test_find_layout_detects_the_dataset_layout(tiny_refcoco, tmp_path):
    assert find_layout(tiny_refcoco.folder) == ("refcoco", tiny_refcoco.folder)
    load_dataset(tiny_refcoco.folder)
    for wrong, message in ((tmp_path / "none", "exists"), (tmp_path, "found neither")):
        with pytest.raises(InputError, match=message):
            find_layout(wrong)
    (tiny_refcoco.folder / "pairs.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"found refs\(unc\)\.p, pairs\.jsonl"):
        find_layout(tiny_refcoco.folder)
    with pytest.raises(InputError, match=r"ingest\.images"):
        load_dataset(tiny_refcoco.folder, images=str(tmp_path / "no-such-folder"))


@pytest.mark.parametrize(
    ("name", "images", "refs", "splits"),
    [
        ("refcoco", 13, 19, {"val": 15, "testA": 30, "testB": 14}),
        ("refcoco+", 13, 19, {"val": 15, "testA": 27, "testB": 12}),
        ("refcocog", 3, 4, {"val": 6, "test": 2}),
    ],
)
def test_real_photos_match_their_annotations(real_data, name, images, refs, splits):
    """Counts match the README of the data; mask areas and boxes match those in the annotations."""
    folder = real_data / "res_mini" / name
    index = read_refcoco(folder, min_image_side_px=16)

    assert index.images.num_rows == images
    assert index.masks.num_rows == refs
    found = index.refs["split"].to_pylist()
    assert {split: found.count(split) for split in set(found)} == splits
    stated = {row["id"]: row for row in json.loads((folder / "instances.json").read_text())["annotations"]}
    boxes = {row["ann_id"]: row["bbox"] for row in rows(index.refs)}
    for row in rows(index.masks):
        assert row["area_px"] == pytest.approx(stated[row["ann_id"]]["area"], rel=0.01)
        mask = decode_rle(row["rle_counts"], row["height"], row["width"])
        x1, y1, x2, y2 = boxes[row["ann_id"]]
        inside = np.zeros_like(mask)
        inside[max(0, int(y1) - 3) : int(y2) + 4, max(0, int(x1) - 3) : int(x2) + 4] = True
        assert not (mask & ~inside).any(), "masks lie in their boxes, up to the published rounding"
    for row in rows(index.images):
        with Image.open(row["file_name"]) as image:
            assert image.size == (row["width"], row["height"])


def test_real_full_size_annotations_have_the_published_counts(real_data, tmp_path):
    """8,028 RefCOCO refs with only boxes; the evaluation splits have the published numbers of refs and sentences."""
    source = real_data / "refcoco_annotations"
    (tmp_path / "refs(unc).p").symlink_to(source / "refs(unc).p")
    (tmp_path / "instances.json").symlink_to(source / "instances_bbox_only.json")

    index = read_refcoco(tmp_path)
    frame = records.to_frame(index.refs)
    assert index.boxes_only
    assert frame.groupby("split")["ref_id"].nunique().to_dict() == {
        "train": 432,
        "val": 3811,
        "testA": 1975,
        "testB": 1810,
    }
    assert frame["split"].value_counts().to_dict() == {"train": 1222, "val": 10834, "testA": 5657, "testB": 5095}


def test_bad_input_exits_with_code_2_and_leaves_no_files(tiny_refcoco, tmp_path, monkeypatch, capsys):
    params = Path(__file__).parents[2] / "params.yaml"
    project = tmp_path / "project"
    project.mkdir()
    text = params.read_text().replace("dataset: data/refshapes", f"dataset: {tiny_refcoco.folder}")
    text = text.replace("backend: transformers", "backend: none")
    (project / "params.yaml").write_text(text)
    monkeypatch.chdir(project)
    BROKEN["truncated jpeg"][0](tiny_refcoco)

    assert exit_code(ingest.main) == 2
    assert "photo_3.jpg" in capsys.readouterr().err
    assert [path.name for path in project.iterdir()] == ["params.yaml"]


def refused_reason(folder, content: bytes) -> str:
    (folder / "refs(unc).p").write_bytes(content)
    with pytest.raises(InputError, match=r"refs\(unc\)\.p: ") as caught:
        read_refcoco(folder)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def test_reads_tuples_as_lists(tiny_refcoco):
    as_lists = read_refcoco(tiny_refcoco.folder).refs
    for protocol in range(5):
        refs = tuple({**ref, "sentences": tuple(ref["sentences"])} for ref in tiny_refcoco.refs)
        (tiny_refcoco.folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol))
        assert read_refcoco(tiny_refcoco.folder).refs.equals(as_lists)


def test_small_pickles_take_little_memory(tiny_refcoco):
    """Python's reader in C takes 16 GiB for the first and the stated size for the second, before it reads on."""
    remembers = b"]" + pickle.LONG_BINPUT + (2**31 - 1).to_bytes(4, "little") + b"."
    states = b"\x80\x05" + pickle.BYTEARRAY8 + (2**34).to_bytes(8, "little") + b"x."
    for content in (remembers, states):
        tracemalloc.start()
        refused_reason(tiny_refcoco.folder, content)
        assert tracemalloc.get_traced_memory()[1] < 1e7
        tracemalloc.stop()


def test_deep_and_endless_pickles_are_refused(tiny_refcoco):
    """A nested tuple as a key overflows the C stack when it is hashed; a set has such keys too."""
    deep_key = b"}" + b")" + b"\x85" * 200_000 + b"Ns."
    assert "unhashable" in refused_reason(tiny_refcoco.folder, deep_key)
    assert "a set or a byte array" in refused_reason(tiny_refcoco.folder, pickle.dumps([frozenset([1])], 4))
    bomb = ["x"]
    for _ in range(60):
        bomb = [bomb, bomb]
    endless: list[object] = [1]
    endless.append(endless)
    for rows in (bomb, [bomb], [{"ref_id": bomb}], endless, [{"ref_id": endless}]):
        assert "expected" in refused_reason(tiny_refcoco.folder, pickle.dumps(rows))
