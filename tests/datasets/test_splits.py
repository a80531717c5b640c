"""The label budget: the standard random draw, list files, and pairs that are never labeled."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from l2l_core.artifacts import records
from l2l_core.datasets.refcoco import read_refcoco
from l2l_core.datasets.splits import (
    draw_images,
    labeled_masks,
    least_fraction,
    split_by_fraction,
    split_by_list,
    summary,
)
from l2l_core.errors import ConfigError, InputError, exit_code
from stages import ingest
from stages import split as split_stage


def make_refs(*rows: tuple[int, int, int, str]) -> pa.Table:
    """(ref_id, image_id, ann_id, split) -> refs with two sentences each, sent_ids 10 * ref_id and 10 * ref_id + 1."""
    return records.make_table(
        (
            {"sent_id": 10 * ref_id + n, "ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "split": split}
            for ref_id, image_id, ann_id, split in rows
            for n in (0, 1)
        ),
        records.REFS,
    )


REFS = make_refs(
    (1, 50, 1, "train"),
    (2, 50, 2, "train"),
    (3, 40, 3, "train"),
    (4, 30, 4, "train"),
    (5, 30, -1, "train"),
    (6, 20, -1, "train"),
    (7, 10, 7, "val"),
)
"""Image 50: two refs with masks; 40: one with; 30: one with and one without; 20: one without; 10: validation."""


def roles(split: pa.Table) -> dict[int, str]:
    """ref_id -> role, after checking that both sentences of a ref have the same role."""
    table = split.to_pylist()
    found = {row["sent_id"] // 10: row["role"] for row in table}
    assert all(found[row["sent_id"] // 10] == row["role"] for row in table)
    return found


def write(folder: Path, content: object) -> Path:
    path = folder / "list.json"
    path.write_text(json.dumps(content))
    return path


def test_draw_images_reproduces_the_published_draw(real_data):
    """Independent check of protocol and order: SemiRES's 1 % list of RefCOCO's 16,994 training images.

    If the drawn positions match the published ones, position and first ref_id are nearly linear in each other (about
    2.95 refs per image), so a line fits them closely. Any other draw has a much larger misfit.
    """
    listing = json.loads((real_data / "refcoco_annotations" / "semires_refcoco_1pct.json").read_text())
    first_ref: dict[int, int] = {}
    for row in listing["train"]:
        first_ref[row["iid"]] = min(first_ref.get(row["iid"], 10**9), row["mask_id"])
    published = np.array(sorted(first_ref.values()))

    def misfit(places: list[int]) -> float:
        x = np.sort(places)
        return float(np.abs(published - np.polyval(np.polyfit(x, published, 1), x)).max())

    drawn = draw_images(list(range(16_994)), 0.01, seed=0)
    assert len(drawn) == len(published) == 169
    assert misfit(drawn) < 200
    assert misfit(draw_images(list(range(16_994)), 0.01, seed=1)) > 1_000


def test_published_list_gives_the_published_counts(real_data, tmp_path):
    source = real_data / "refcoco_annotations"
    (tmp_path / "refs(unc).p").symlink_to(source / "refs(unc).p")
    (tmp_path / "instances.json").symlink_to(source / "instances_bbox_only.json")
    index = read_refcoco(tmp_path)

    split = split_by_list(index.refs, source / "semires_refcoco_1pct.json")
    assert summary(index.refs, split).startswith("labeled: 169 images, 432 refs, 1222 sentences; unlabeled: 0 images")
    assert labeled_masks(index.refs, split, index.masks).num_rows == 0  # the dataset has only boxes


@given(count=st.integers(1, 400), percent=st.integers(1, 100), seed=st.integers(0, 2**32 - 1))
@example(count=100, percent=29, seed=0)  # 0.29 * 100 < 29 in binary
def test_draw_size_is_the_floor_of_the_percentage(count, percent, seed):
    ids = [7 * k for k in range(count)]
    drawn = draw_images(ids, percent / 100, seed)

    assert len(drawn) == count * percent // 100  # integer arithmetic; binary fractions would lose one
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(ids)
    assert drawn == draw_images(ids, percent / 100, seed)


def test_draw_labels_whole_images_in_annotation_order():
    """Images 50, 40, 30 have masks, in this order of their refs; the draw picks by position in that order."""
    random.seed(3)  # the lines of the published protocol
    expected = random.sample([50, 40, 30], 2)
    shuffled = REFS.take([6, 3, 13, 0, 9, 1, 12, 2, 5, 4, 8, 7, 10, 11])

    found = roles(split_by_fraction(shuffled, 0.67, seed=3))
    labeled = {50: {1, 2}, 40: {3}, 30: {4}}
    assert {ref for ref, role in found.items() if role == "labeled"} == set.union(*(labeled[i] for i in expected))
    assert found[7] == "eval"


def test_full_fraction_leaves_pairs_without_a_mask_unlabeled():
    assert roles(split_by_fraction(REFS, 1.0, seed=0)) == {
        1: "labeled",
        2: "labeled",
        3: "labeled",
        4: "labeled",
        5: "unlabeled",
        6: "unlabeled",
        7: "eval",
    }


def test_split_keeps_the_order_of_the_refs():
    assert split_by_fraction(REFS, 0.5, seed=0)["sent_id"].equals(REFS["sent_id"])


def test_draw_is_deterministic_and_changes_with_the_seed():
    refs = make_refs(*((k, k, k, "train") for k in range(60)))
    splits = [split_by_fraction(refs, 0.5, seed) for seed in (0, 0, 1)]
    assert splits[0].equals(splits[1])
    assert not splits[0].equals(splits[2])


@pytest.mark.parametrize(
    ("refs", "fraction", "message"),
    [
        (REFS, 0.3, r"split\.labeled_fraction: got 0\.3, which is no image out of 3; expected at least 0\.34"),
        (make_refs((1, 1, 1, "val")), 1.0, r"no training image with a mask.*split\.list_file"),
        (make_refs((1, 1, -1, "train")), 1.0, r"no training image with a mask"),
    ],
)
def test_refuses_a_fraction_that_labels_nothing(refs, fraction, message):
    with pytest.raises(ConfigError, match=message):
        split_by_fraction(refs, fraction, seed=0)


@pytest.mark.parametrize(
    ("content", "labeled"),
    [
        ([50], {1, 2}),
        ([30, 40], {3, 4}),
        ({"image_ids": [50, 30]}, {1, 2, 4}),
        ({"ref_ids": [2, 4]}, {2, 4}),
        ({"train": [{"iid": 50, "mask_id": 1, "bbox": [], "refs": []}], "val": [{"iid": 10}]}, {1}),
    ],
)
def test_reads_every_list_file_format(tmp_path, content, labeled):
    found = roles(split_by_list(REFS, write(tmp_path, content)))

    assert {ref for ref, role in found.items() if role == "labeled"} == labeled
    assert {ref for ref, role in found.items() if role == "eval"} == {7}


def test_list_file_assigns_roles_without_a_train_split(tmp_path):
    refs = make_refs((1, 11, 1, "val"), (2, 12, 2, "testA"), (3, 13, 3, "testB"), (4, 13, 4, "testB"))
    path = write(tmp_path, {"labeled_image_ids": [12], "unlabeled_image_ids": [11], "eval_image_ids": [13]})

    assert roles(split_by_list(refs, path)) == {1: "unlabeled", 2: "labeled", 3: "eval", 4: "eval"}


ROLES = {"labeled_image_ids": [50], "unlabeled_image_ids": [20, 30], "eval_image_ids": [40, 10]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([50, 99], r"image_id 99: not in the dataset"),
        ([10], r"image_id 10: not in the train split"),
        ([20], r"image_id 20: no mask to label with"),
        ([50, 50], r"listed more than once: 50"),
        (["50"], r"got '50', expected whole numbers"),
        ([True], r"got True, expected whole numbers"),
        ([], r"an empty list"),
        ({"ref_ids": [5]}, r"ref_id 5: no mask to label with"),
        ({"ref_ids": [7]}, r"ref_id 7: not in the train split"),
        ({"ref_ids": [1], "image_ids": [50]}, r"expected a list of image ids, or an object with `train`"),
        ({"images": [50]}, r"expected a list of image ids, or an object with `train`"),
        ("50", r"expected a list of image ids, or an object with `train`"),
        ({}, r"expected a list of image ids, or an object with `train`"),
        ({"train": [{"iid": 40, "mask_id": 1}]}, r"mask_id 1: the dataset has these refs on another image"),
        ({"train": [{"iid": 40}]}, r"train rows 0: expected whole numbers `iid` and `mask_id`"),
        ({"train": [{"iid": 40, "mask_id": 88}]}, r"ref_id 88: not in the dataset"),
        (ROLES | {"labeled_image_ids": [50, 40]}, r"eval_image_ids: image 40 is labeled already"),
        (ROLES | {"unlabeled_image_ids": [20]}, r"image_id 30: in no list"),
        (ROLES | {"unlabeled_image_ids": [20, 30, 31]}, r"image_id 31: not in the dataset"),
        (ROLES | {"labeled_image_ids": [50, 30], "unlabeled_image_ids": [20]}, r"image_id 30: labeled .* has no mask"),
        (ROLES | {"labeled_image_ids": [], "unlabeled_image_ids": [50, 20, 30]}, r"labeled_image_ids: empty"),
        (ROLES | {"eval_image_ids": 7}, r"eval_image_ids: expected a list of image ids"),
    ],
)
def test_refuses_wrong_list_files(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        split_by_list(REFS, write(tmp_path, content))


def test_error_names_every_wrong_id(tmp_path):
    with pytest.raises(InputError) as caught:
        split_by_list(REFS, write(tmp_path, [99, 10, 20]))
    for expected in ("99: not in the dataset", "10: not in the train split", "20: no mask"):
        assert expected in str(caught.value)


def test_refuses_missing_and_unreadable_list_files(tmp_path):
    with pytest.raises(ConfigError, match="not found"):
        split_by_list(REFS, tmp_path / "none.json")
    (tmp_path / "bad.json").write_bytes(b"\xff{")
    with pytest.raises(InputError, match="not readable as JSON"):
        split_by_list(REFS, tmp_path / "bad.json")


def test_labeled_masks_contains_only_masks_of_labeled_refs(tiny_refcoco):
    """The file that training reads holds the ground truth of labeled sentences only."""
    index = read_refcoco(tiny_refcoco.folder)
    split = split_by_fraction(index.refs, 0.5, seed=0)
    kept = labeled_masks(index.refs, split, index.masks)

    labeled = {row["sent_id"] // 1000 for row in split.to_pylist() if row["role"] == "labeled"}
    assert len(labeled) == 2
    assert kept["ann_id"].to_pylist() == sorted(100 * k for k in labeled)
    assert kept.schema.equals(records.MASKS)
    whole = {row["ann_id"]: row for row in index.masks.to_pylist()}
    assert all(row == whole[row["ann_id"]] for row in kept.to_pylist())


def test_stages_write_the_tables_of_the_library(tiny_refcoco, tmp_path, monkeypatch, capsys):
    params = (Path(__file__).parents[2] / "params.yaml").read_text()
    params = params.replace("dataset: data/refshapes", f"dataset: {tiny_refcoco.folder}")
    params = params.replace("backend: transformers", "backend: none")
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    (project / "params.yaml").write_text(params.replace("labeled_fraction: 0.05", "labeled_fraction: 0.5"))

    assert exit_code(ingest.main) == 0
    assert exit_code(split_stage.main) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"ingest: {tiny_refcoco.folder}: 6 images, 12 sentences (train 8, val 2, testA 2), 6 masks",
        "split: labeled: 2 images, 2 refs, 4 sentences; unlabeled: 2 images, 2 refs, 4 sentences; "
        "eval: 2 images, 2 refs, 4 sentences",
    ]
    index = read_refcoco(tiny_refcoco.folder)
    assert records.read_table(records.INDEX.refs, records.REFS).equals(index.refs)
    assert records.read_table(records.INDEX.objects, records.OBJECTS).equals(index.objects)
    assert records.read_table(records.SPLIT_PATH, records.SPLIT).equals(split_by_fraction(index.refs, 0.5, seed=0))

    (project / "params.yaml").write_text(params.replace("labeled_fraction: 0.05", "labeled_fraction: 0.2"))
    before = records.SPLIT_PATH.read_bytes()
    assert exit_code(split_stage.main) == 2
    assert "which is no image out of 4" in capsys.readouterr().err
    assert records.SPLIT_PATH.read_bytes() == before


@pytest.mark.parametrize("images", [1, 3, 7, 20, 99, 101, 750, 16994])
def test_least_fraction_draws_at_least_one_image(images):
    image_ids = list(range(images))
    advised = least_fraction(images)
    assert 0 < advised <= 1
    assert len(draw_images(image_ids, advised, seed=0)) >= 1
