from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2l_core.artifacts import records
from l2l_core.config import ProposalsParams
from l2l_core.core.images import read_image
from l2l_core.core.masks import encode_rle
from l2l_core.errors import ArtifactError, InputError
from l2l_core.priors import proposals
from l2l_core.priors.proposals import make_proposals
from l2l_core.priors.renderers import grabcut_input, render_box, render_grabcut

PARAMS = ProposalsParams(renderer="box", ring=0.1, core=0.0, size_px=48, falloff=0.15, inside_prob=0.9, flat_prob=0.1)
GRABCUT = PARAMS.model_copy(update={"renderer": "grabcut"})
HW = (240, 480)
# Boxes from fractions of the image, at least 3 cells of the map wide.
boxes = st.tuples(st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0.07, 1), st.floats(0.07, 1)).map(
    lambda b: (b[0] * HW[1], b[1] * HW[0], min(b[0] + b[2], 1) * HW[1], min(b[1] + b[3], 1) * HW[0])
)


def prior(sent_id: int, sample_index: int = 0, **found: Any) -> dict[str, Any]:
    return {"sent_id": sent_id, "sample_index": sample_index, **found}


def run(
    *priors: dict[str, Any], params: ProposalsParams = PARAMS, image: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Maps [N, S, S] uint8 and scores [N] of sentences about a single image."""
    sent_ids = sorted({row["sent_id"] for row in priors})
    refs = pd.DataFrame({"sent_id": sent_ids, "image_id": 1})
    images = pd.DataFrame([{"image_id": 1, "file_name": str(image), "height": HW[0], "width": HW[1]}])
    table = make_proposals(pa.Table.from_pylist(list(priors), records.PRIORS), refs, images, params)
    assert table.schema == records.PROPOSALS
    assert table["sent_id"].to_pylist() == sent_ids
    size = params.size_px
    assert set(table["height"].to_pylist()) == set(table["width"].to_pylist()) == {size}
    maps = np.stack([np.frombuffer(soft, np.uint8).reshape(size, size) for soft in table["soft"].to_pylist()])
    return maps, table["score"].to_numpy()


# --- the table: several responses, no response, and scores ---


def test_a_missing_prior_gives_a_flat_map_with_score_zero() -> None:
    maps, scores = run(prior(1), prior(2, bbox=[120, 0, 360, 240]), prior(3))
    assert (maps[[0, 2]] == round(0.1 * 255)).all()
    assert maps[1].max() == round(0.9 * 255)
    assert scores.tolist() == [0, 1, 0]


def test_averages_the_maps_of_all_responses() -> None:
    box, other = [120, 0, 360, 240], [0, 0, 120, 120]
    (mean, one, two, flat), scores = run(
        *[prior(1, 0, bbox=box), prior(1, 1, bbox=other), prior(1, 2)],
        *[prior(2, sample, bbox=box) for sample in range(3)],
        *[prior(3, sample, bbox=other) for sample in range(3)],
        *[prior(4, sample) for sample in range(3)],
    )
    expected = (one.astype(float) + two + flat) / 3
    assert np.abs(mean - expected).max() <= 1  # rounding
    assert scores == pytest.approx([2 / 3 * 1 / 2, 1, 1, 0])  # two of three, disjoint; all identical; none


def test_scores_match_hand_computed_values() -> None:
    """Two boxes with IoU 1/3 (halves overlapping by half): agreement (1 + 1 + 1/3 + 1/3) / 4 = 2/3."""
    _, scores = run(
        prior(1, 0, bbox=[0, 0, 200, 100], score=0.5),
        prior(1, 1, bbox=[100, 0, 300, 100], score=0.9),
        prior(2, 0, bbox=[0, 0, 200, 100], score=0.0),
        prior(2, 1, bbox=[0, 0, 200, 100], score=0.0),
        prior(3, 0, bbox=[0, 0, 200, 100], score=0.8),
        prior(3, 1, score=0.1),
    )
    assert scores == pytest.approx([2 / 3 * 0.7, 0.01, 0.5 * 0.8])


def test_points_are_used_only_without_a_box() -> None:
    maps, scores = run(
        prior(1, point=[105.0, 52.5]), prior(2, point=[100.0, 50.0], bbox=[200, 100, 300, 200], score=0.5)
    )
    assert maps[0, 10, 10] == maps[0].max() == round(0.9 * 255)
    assert maps[1, 10, 10] == round(0.1 * 255)  # the box takes precedence over the point
    assert scores == pytest.approx([1.0, 0.5])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.none() | boxes, st.none() | st.floats(0, 1)), min_size=1, max_size=8), st.integers(1, 2))
def test_proposals_do_not_depend_on_row_order(found: list[tuple[Any, Any]], samples: int) -> None:
    found = found[: max(samples, len(found) - len(found) % samples)] * samples
    rows = [prior(k // samples, k % samples, bbox=box, score=score) for k, (box, score) in enumerate(found)]
    rows = rows[: len(rows) - len(rows) % samples]
    maps, scores = run(*rows)
    again, scores_again = run(*rows[::-1])
    np.testing.assert_array_equal(maps, again)
    np.testing.assert_array_equal(scores, scores_again)
    has_place = [any(row["bbox"] for row in rows if row["sent_id"] == k) for k in range(len(scores))]
    assert ((scores > 0) == has_place).all()
    assert (scores <= 1).all()


def test_chunk_size_does_not_change_the_proposals(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [prior(k, bbox=[k, k, 200 + k, 100 + k]) for k in range(7)]
    maps, scores = run(*rows)
    monkeypatch.setattr(proposals, "CHUNK_CELLS", 2 * 48 * 48)
    monkeypatch.setattr(proposals, "_BINARY_CHUNK_BYTES", 3 * 48 * 48)
    again, scores_again = run(*rows)
    np.testing.assert_array_equal(maps, again)
    np.testing.assert_array_equal(scores, scores_again)


@pytest.mark.parametrize("spoil", [lambda table: table[:-9], lambda table: b""], ids=["truncated", "empty"])
def test_a_torn_chunk_is_moved_aside_and_rendered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spoil: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(proposals, "CHUNK_CELLS", 2 * 48 * 48)
    table = pa.Table.from_pylist([prior(k, bbox=[k, k, 200 + k, 100 + k]) for k in range(7)], records.PRIORS)
    refs = pd.DataFrame({"sent_id": range(7), "image_id": 1})
    images = pd.DataFrame([{"image_id": 1, "file_name": "x", "height": HW[0], "width": HW[1]}])
    whole = make_proposals(table, refs, images, PARAMS, tmp_path)
    torn = tmp_path / "1.parquet"
    torn.write_bytes(spoil(torn.read_bytes()))
    assert make_proposals(table, refs, images, PARAMS, tmp_path).equals(whole)
    assert f"note: {torn}: torn, moved to 1.parquet.torn; computing it again" in capsys.readouterr().err


def test_refuses_priors_that_do_not_match_the_index() -> None:
    with pytest.raises(ArtifactError, match="differ in their number of responses"):
        run(prior(1), prior(1, 1), prior(2))
    table = pa.Table.from_pylist([prior(1)], records.PRIORS)
    images = pd.DataFrame([{"image_id": 1, "file_name": "x", "height": 10, "width": 10}])
    refs = pd.DataFrame({"sent_id": [1, 2], "image_id": [1, 1]})
    with pytest.raises(ArtifactError, match="not those of the index"):
        make_proposals(table, refs, images, PARAMS)


# --- masks ---


def mask_prior(sent_id: int, mask: np.ndarray, sample_index: int = 0, **more: Any) -> dict[str, Any]:
    """A prior with a mask and, as the priors table always has, a box; by default the mask's."""
    ys, xs = mask.nonzero()
    box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    return prior(sent_id, sample_index, **{"mask": encode_rle(mask), "bbox": [float(side) for side in box]} | more)


def part(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros(HW, dtype=bool)
    mask[rows, columns] = True
    return mask


def test_a_mask_becomes_the_covered_share_of_each_cell() -> None:
    """Cells are 5 x 10 px. The mask's first 15 columns and 12 rows cover cells by 1, 1/2, 2/5 and 1/5."""
    (soft,), scores = run(mask_prior(1, part(slice(0, 12), slice(0, 15)), score=0.8))
    low, span = 0.1, 0.8
    expected = np.full((48, 48), low)
    expected[:2, 0], expected[:2, 1] = low + span, low + span / 2
    expected[2, 0], expected[2, 1] = low + span * 2 / 5, low + span / 5
    assert np.abs(soft / 255 - expected).max() <= 0.5 / 255 + 1e-6
    assert scores == pytest.approx([0.8])


@pytest.mark.parametrize(("rows", "columns"), [(slice(20, 220), slice(103, 106)), (slice(52, 55), slice(203, 207))])
def test_a_mask_thinner_than_a_cell_still_marks_its_cells(rows: slice, columns: slice) -> None:
    """A pole and a dot: of 5 x 10 px, each cell has at most a third. All values above 0.5 lie in cells of the mask."""
    mask = part(rows, columns)
    (soft,), _ = run(mask_prior(1, mask))
    touched = mask.reshape(48, 5, 48, 10).any(axis=(1, 3))
    marked = soft / 255 > 0.5
    assert marked.any()
    assert not (marked & ~touched).any()
    assert marked.any(axis=1).sum() == (rows.stop - rows.start) // 5 or marked.sum() == 1


def test_masks_are_used_as_they_are_by_every_renderer() -> None:
    """GrabCut would need the image, and boxes would lose the shape; a box beside the mask changes nothing."""
    ring = part(slice(40, 200), slice(100, 300)) & ~part(slice(80, 160), slice(150, 250))
    rows = [mask_prior(1, ring), mask_prior(2, ring, bbox=[0.0, 0.0, 50.0, 50.0])]
    by_box, scores = run(*rows)
    cut, _ = run(*rows, params=GRABCUT, image=Path("gone.png"))
    np.testing.assert_array_equal(by_box, cut)
    np.testing.assert_array_equal(by_box[0], by_box[1])
    assert by_box[0, 24, 20] == round(0.1 * 255)  # the hole, which the box's map fills
    assert scores.tolist() == [1, 1]


def test_averages_masks_boxes_and_missing_responses() -> None:
    left, box = part(slice(0, 240), slice(0, 240)), [240.0, 0.0, 480.0, 240.0]
    (mean, mask, by_box, flat), _ = run(
        *[mask_prior(1, left), prior(1, 1, bbox=box), prior(1, 2)],
        *[mask_prior(2, left, sample) for sample in range(3)],
        *[prior(3, sample, bbox=box) for sample in range(3)],
        *[prior(4, sample) for sample in range(3)],
    )
    assert np.abs(mean - (mask.astype(float) + by_box + flat) / 3).max() <= 1  # rounding


def test_masks_agree_by_their_pixels_and_not_by_their_boxes() -> None:
    """1: opposite quarters of the image and the other two: boxes of IoU 1, masks of IoU 0, agreement 1/2.

    2: upper and left half, IoU 1/3, agreement 2/3. 3: a mask and a box are compared by their boxes, the whole image and
    its left half, IoU 1/2, agreement 3/4.
    """
    top, left = part(slice(0, 120), slice(0, 480)), part(slice(0, 240), slice(0, 240))
    cross = top ^ left  # upper right and lower left quarter
    _, scores = run(
        *[mask_prior(1, cross), mask_prior(1, ~cross, 1)],
        *[mask_prior(2, top), mask_prior(2, left, 1)],
        *[mask_prior(3, cross), prior(3, 1, bbox=[0, 0, 240, 240])],
    )
    assert scores == pytest.approx([1 / 2, 2 / 3, 3 / 4])


# --- GrabCut ---


@pytest.fixture
def disc(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A noisy red disk on noisy green, and its true mask."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: HW[0], : HW[1]]
    mask = (x - 200) ** 2 + (y - 120) ** 2 < 80**2
    image = np.where(mask[..., None], (40, 40, 200), (60, 160, 60)) + rng.integers(-25, 25, (*HW, 3))
    cv2.imwrite(str(tmp_path / "disc.png"), image.astype(np.uint8))
    return tmp_path / "disc.png", mask


def iou_at_half(soft: np.ndarray, mask: np.ndarray) -> float:
    cut = cv2.resize(soft.astype(np.float32), HW[::-1], interpolation=cv2.INTER_LINEAR) > 127.5
    return float((cut & mask).sum() / (cut | mask).sum())


@pytest.mark.parametrize("box", [[120, 40, 280, 200], [125, 50, 290, 190], [110, 30, 270, 205]])
def test_grabcut_finds_the_shape_in_the_box(box: list[float], disc: tuple[Path, np.ndarray]) -> None:
    """A disk fills pi / 4 = 0.79 of its box; GrabCut must come much closer, even from slightly inaccurate boxes."""
    path, mask = disc
    by_box, _ = run(prior(1, bbox=box))
    cut, scores = run(prior(1, bbox=box), params=GRABCUT, image=path)
    assert iou_at_half(by_box[0], mask) < 0.82
    assert iou_at_half(cut[0], mask) > 0.93
    assert cut.min() >= round(0.1 * 255)
    assert cut.max() <= round(0.9 * 255)
    assert scores.tolist() == [1]


def test_grabcut_does_not_depend_on_other_rows(disc: tuple[Path, np.ndarray]) -> None:
    rows = [prior(k, bbox=[100 + 3 * k, 30, 280, 200]) for k in range(4)]
    maps, _ = run(*rows, params=GRABCUT, image=disc[0])
    for k in reversed(range(4)):
        alone, _ = run(rows[k], params=GRABCUT, image=disc[0])
        np.testing.assert_array_equal(alone[0], maps[k])


def test_grabcut_falls_back_to_the_box(disc: tuple[Path, np.ndarray]) -> None:
    image = read_image(disc[0])
    whole = (0.0, 0.0, 480.0, 240.0)  # leaves no background
    tiny = (100.0, 100.0, 102.0, 102.0)
    for box in (whole, tiny):
        np.testing.assert_array_equal(
            render_grabcut(grabcut_input(image), box, HW, GRABCUT), render_box(box, HW, GRABCUT)
        )
    box = (100.0, 50.0, 200.0, 150.0)
    plain = np.full((*HW, 3), 128, dtype=np.uint8)  # foreground and background look the same
    dotted = plain.copy()
    dotted[95:105, 145:155] = (255, 0, 0)  # 1 % of the box
    for image in (plain, dotted):
        np.testing.assert_array_equal(
            render_grabcut(grabcut_input(image), box, HW, GRABCUT), render_box(box, HW, GRABCUT)
        )


def test_grabcut_needs_no_image_for_sentences_without_a_box() -> None:
    maps, _ = run(prior(1), params=GRABCUT, image=Path("gone.png"))
    assert (maps == round(0.1 * 255)).all()


def test_missing_image_error_names_the_file() -> None:
    with pytest.raises(InputError, match=r"gone\.png: image not found; GrabCut needs it"):
        run(prior(1, bbox=[1, 2, 30, 40]), params=GRABCUT, image=Path("gone.png"))
