"""Fitting GrabCut to labeled masks: drawn disks and squares with tight or too small boxes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from l2l_core.artifacts import records
from l2l_core.config import ProposalsParams
from l2l_core.core.masks import encode_rle
from l2l_core.errors import InputError
from l2l_core.priors import fit as fit_module
from l2l_core.priors.fit import MIN_SENTENCES, fit_proposals, renderings_of_fit, unfitted
from l2l_core.priors.proposals import make_proposals

PARAMS = ProposalsParams(
    renderer="grabcut", ring="fit", core="fit", size_px=48, falloff=0.15, inside_prob=0.9, flat_prob=0.1
)
HW = (96, 96)
RADIUS = 14

Box = Callable[[int, int], list[float]]


def disk_images(
    folder: Path, count: int, box_of: Box, square: bool = False
) -> tuple[pa.Table, pd.DataFrame, pd.DataFrame, dict[int, bytes]]:
    """Priors, refs, images and truth: each image shows one red disk (or square) on noisy green, with one prior box."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: HW[0], : HW[1]]
    priors, images, truth = [], [], {}
    for number in range(count):
        row, column = rng.integers(40, 56, 2).tolist()
        mask = (
            (abs(y - row) <= RADIUS) & (abs(x - column) <= RADIUS)
            if square
            else (y - row) ** 2 + (x - column) ** 2 <= RADIUS**2
        )
        image = np.where(mask[..., None], (40, 40, 200), (60, 160, 60)) + rng.integers(-25, 25, (*HW, 3))
        file = folder / f"{number}.png"
        cv2.imwrite(str(file), image.clip(0, 255).astype(np.uint8))
        priors.append({"sent_id": number, "sample_index": 0, "bbox": box_of(row, column)})
        images.append({"image_id": number, "file_name": str(file), "height": HW[0], "width": HW[1]})
        truth[number] = encode_rle(mask)
    refs = pd.DataFrame({"sent_id": range(count), "image_id": range(count)})
    return pa.Table.from_pylist(priors, records.PRIORS), refs, pd.DataFrame(images), truth


def tight(row: int, column: int) -> list[float]:
    return [column - RADIUS, row - RADIUS, column + RADIUS + 1, row + RADIUS + 1]


def half_as_large(row: int, column: int) -> list[float]:
    half = RADIUS / 2
    return [column - half, row - half, column + half, row + half]


def miou(table: pa.Table, truth: dict[int, bytes]) -> float:
    from l2l_core.core.masks import decode_rle

    scores = []
    for row in table.to_pylist():
        soft = np.frombuffer(row["soft"], np.uint8).reshape(48, 48).astype(np.float32) / 255
        found = cv2.resize(soft, HW[::-1], interpolation=cv2.INTER_LINEAR) > 0.5
        mask = decode_rle(truth[row["sent_id"]], *HW)
        scores.append((found & mask).sum() / (found | mask).sum())
    return 100 * float(np.mean(scores))


def test_boxes_that_are_too_small_get_a_wide_ring(tmp_path: Path) -> None:
    """The object extends beyond the box by half of its side, so a ring below 0.5 cannot contain it."""
    *tables, truth = disk_images(tmp_path, 12, half_as_large)
    fit = fit_proposals(*tables, truth, PARAMS)
    assert fit.params.renderer == "grabcut"
    assert fit.params.ring >= 0.5
    assert fit.sentences == 12
    assert fit.box_miou < 40 < 90 < fit.miou
    # The scores equal those of the maps that are rendered with the fitted parameters.
    assert fit.miou == pytest.approx(miou(make_proposals(*tables, fit.params), truth), abs=1)
    by_box = PARAMS.model_copy(update={"renderer": "box"})
    assert fit.box_miou == pytest.approx(miou(make_proposals(*tables, by_box), truth), abs=1)


def test_tight_boxes_keep_a_narrow_ring(tmp_path: Path) -> None:
    *tables, truth = disk_images(tmp_path, 12, tight)
    fit = fit_proposals(*tables, truth, PARAMS)
    assert fit.params.renderer == "grabcut"
    assert fit.params.ring <= 0.25
    assert fit.miou > max(90, fit.box_miou)


def test_keeps_the_box_renderer_when_the_box_is_the_object(tmp_path: Path) -> None:
    """Image and background are the same noise: the boxes are exact and color carries no information."""
    *tables, truth = disk_images(tmp_path, 12, tight, square=True)
    rng = np.random.default_rng(1)
    for file in tables[2]["file_name"]:
        cv2.imwrite(file, rng.integers(0, 256, (*HW, 3), dtype=np.uint8))
    fit = fit_proposals(*tables, truth, PARAMS)
    assert fit.params.renderer == "box"
    assert fit.miou == fit.box_miou > 90


def test_fixed_parameters_are_not_fitted(tmp_path: Path) -> None:
    *tables, truth = disk_images(tmp_path, 12, half_as_large)
    fixed_ring = fit_proposals(*tables, truth, PARAMS.model_copy(update={"ring": 0.25}))
    assert fixed_ring.params.ring == 0.25
    assert fixed_ring.sentences == 12
    for changes in ({"ring": 0.5, "core": 0.0}, {"renderer": "box"}):
        given = PARAMS.model_copy(update=changes)
        fit = fit_proposals(*tables, truth, given)
        assert (fit.params, fit.sentences) == (unfitted(given), 0)


def test_does_not_fit_with_too_few_labeled_boxes(tmp_path: Path) -> None:
    """Sentences without a mask or without a box do not count."""
    priors, refs, images, truth = disk_images(tmp_path, MIN_SENTENCES + 2, half_as_large)
    few = {number: truth[number] for number in range(MIN_SENTENCES - 1)}
    assert fit_proposals(priors, refs, images, few, PARAMS).sentences == 0
    rows = priors.to_pylist()
    for row in rows[: MIN_SENTENCES - 7]:
        row["bbox"] = None
    without = pa.Table.from_pylist(rows, records.PRIORS)
    fit = fit_proposals(without, refs, images, truth, PARAMS)
    assert (fit.params, fit.sentences) == (unfitted(PARAMS), 0)


def test_masks_do_not_take_part_in_the_fit(tmp_path: Path) -> None:
    """The boxes of the other sentences give the same fit as without the masks, and too few of them give none."""
    priors, refs, images, truth = disk_images(tmp_path, MIN_SENTENCES + 2, half_as_large)
    rows = priors.to_pylist()
    for row in rows[:2]:
        row["mask"] = encode_rle(np.ones(HW, bool))
    few = {number: truth[number] for number in range(2, MIN_SENTENCES + 2)}
    fit = fit_proposals(pa.Table.from_pylist(rows, records.PRIORS), refs, images, truth, PARAMS)
    assert fit == fit_proposals(priors, refs, images, few, PARAMS)
    assert fit.sentences == MIN_SENTENCES
    rows[2]["mask"] = rows[0]["mask"]
    fit = fit_proposals(pa.Table.from_pylist(rows, records.PRIORS), refs, images, truth, PARAMS)
    assert (fit.params, fit.sentences) == (unfitted(PARAMS), 0)


def test_fits_on_an_evenly_spaced_subset_of_many_labeled_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *tables, truth = disk_images(tmp_path, 20, half_as_large)
    read: list[str] = []
    pixels = fit_module.read_photo
    monkeypatch.setattr(fit_module, "read_photo", lambda path, by: (read.append(Path(path).stem), pixels(path, by))[1])
    monkeypatch.setattr(fit_module, "MAX_SENTENCES", 10)
    assert fit_proposals(*tables, truth, PARAMS).sentences == 10
    assert sorted(map(int, read)) == [0, 2, 4, 6, 8, 10, 12, 14, 16, 19]


def test_renderings_of_fit_counts_every_rendering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *tables, truth = disk_images(tmp_path, 12, half_as_large)
    rendered: list[None] = []
    for name in ("render_grabcut", "render_box"):
        render = getattr(fit_module, name)
        monkeypatch.setattr(fit_module, name, lambda *given, render=render: (rendered.append(None), render(*given))[1])
    fit_proposals(*tables, truth, PARAMS)
    assert len(rendered) == renderings_of_fit(PARAMS, 12)
    assert renderings_of_fit(PARAMS.model_copy(update={"ring": 0.1, "core": 0.0}), 12) == 0


def test_missing_image_error_names_the_file(tmp_path: Path) -> None:
    *tables, truth = disk_images(tmp_path, 12, tight)
    (tmp_path / "3.png").unlink()
    with pytest.raises(InputError, match=r"3\.png: image not found"):
        fit_proposals(*tables, truth, PARAMS)
