"""Metrics against hand-computed values, a plain loop over pixels, and changes that must not affect the result."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2l_core.core.masks import encode_rle, intersection_union_px, wrong_kept_px
from l2l_core.core.metrics import auroc, iou_from_px, precision_by_coverage, reliability, segmentation_scores

PIXELS = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), min_size=1, max_size=30)


def masks_and_counts(seed: int, pairs: int = 20) -> tuple[list[np.ndarray], list[np.ndarray], list[tuple[int, int]]]:
    """Random mask pairs of different sizes, and their intersection and union counted pixel by pixel."""
    generator = np.random.default_rng(seed)
    first, second, counts = [], [], []
    for _ in range(pairs):
        height, width = generator.integers(1, 12, 2)
        a, b = generator.random((2, height, width)) < generator.random(2)[:, None, None]
        both = either = 0
        for y in range(height):
            for x in range(width):
                both += int(a[y, x] and b[y, x])
                either += int(a[y, x] or b[y, x])
        first.append(a)
        second.append(b)
        counts.append((both, either))
    return first, second, counts


def test_scores_match_hand_computed_values() -> None:
    # IoU 1/4, 3/5 and 9/10: their mean is 7/12; sums are 13 of 19; 0.6 and 0.9 are reached exactly.
    scores = segmentation_scores([1, 3, 9], [4, 5, 10])
    assert scores["miou"] == pytest.approx(100 * 7 / 12)
    assert scores["oiou"] == pytest.approx(100 * 13 / 19)
    assert [scores[f"pr{x}"] for x in (50, 60, 70, 80, 90)] == pytest.approx(
        [200 / 3, 200 / 3, 100 / 3, 100 / 3, 100 / 3]
    )


def test_a_large_object_dominates_oiou_but_not_miou() -> None:
    # A 10,000 px object hit at 90 % and nine 100 px objects missed completely (union: 200 px each).
    scores = segmentation_scores([9000] + [0] * 9, [10000] + [200] * 9)
    assert scores["miou"] == pytest.approx(9.0)
    assert scores["oiou"] == pytest.approx(100 * 9000 / 11800)


def test_iou_is_one_for_two_empty_masks_and_zero_for_one() -> None:
    assert iou_from_px([0, 0], [0, 7]).tolist() == [1.0, 0.0]


def test_refuses_to_score_no_sentences() -> None:
    with pytest.raises(ValueError, match="no sentence"):
        segmentation_scores([], [])


@pytest.mark.parametrize("seed", range(5))
def test_rle_counts_and_scores_match_a_loop_over_pixels(seed: int) -> None:
    first, second, counts = masks_and_counts(seed)
    sizes = np.array([mask.shape for mask in first])
    pixels = intersection_union_px([encode_rle(a) for a in first], [encode_rle(b) for b in second], sizes)
    assert pixels.tolist() == [list(pair) for pair in counts]
    ious = [both / either if either else 1.0 for both, either in counts]
    scores = segmentation_scores(pixels[:, 0], pixels[:, 1])
    assert scores["miou"] == pytest.approx(100 * sum(ious) / len(ious))
    assert scores["oiou"] == pytest.approx(100 * sum(i for i, _ in counts) / sum(u for _, u in counts))
    for x in (50, 60, 70, 80, 90):
        assert scores[f"pr{x}"] == pytest.approx(100 * sum(100 * iou >= x for iou in ious) / len(ious))


def test_pixel_counts_are_symmetric_in_prediction_and_truth() -> None:
    first, second, _ = masks_and_counts(9)
    a, b = [encode_rle(mask) for mask in first], [encode_rle(mask) for mask in second]
    sizes = np.array([mask.shape for mask in first])
    assert (intersection_union_px(a, b, sizes) == intersection_union_px(b, a, sizes)).all()


def test_wrong_kept_pixels_match_boolean_arithmetic() -> None:
    label, truth, _ = masks_and_counts(3)
    keep = [np.random.default_rng(4).random(mask.shape) < 0.6 for mask in label]
    sizes = np.array([mask.shape for mask in label])
    counted = wrong_kept_px(*([encode_rle(mask) for mask in masks] for masks in (label, truth, keep)), sizes)
    expected = [[k.sum(), ((t != m) & k).sum()] for m, t, k in zip(label, truth, keep, strict=True)]
    assert counted.tolist() == np.array(expected).tolist()


@given(PIXELS, st.randoms(use_true_random=False))
def test_scores_do_not_depend_on_sentence_order(pixels: list[tuple[int, int]], random: object) -> None:
    shuffled = pixels.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    scores, again = (
        segmentation_scores(*zip(*[(i, i + rest) for i, rest in rows], strict=True)) for rows in (pixels, shuffled)
    )
    assert again == pytest.approx(scores)


def test_auroc_matches_hand_computed_values() -> None:
    # Positives score 0.9 and 0.5, negatives 0.5 and 0.1: three pairs in order, one tie, so 3.5 of 4.
    assert auroc([0.9, 0.5, 0.5, 0.1], [True, True, False, False]) == pytest.approx(87.5)
    assert auroc([0.1, 0.9], [True, False]) == 0.0


@pytest.mark.parametrize("positive", [[True, True], [False, False], []])
def test_auroc_is_none_for_a_single_class(positive: list[bool]) -> None:
    assert auroc([0.1, 0.9][: len(positive)], positive) is None


def test_precision_by_coverage_matches_hand_computed_values() -> None:
    # Best first: 1, 0, 1, 0. After each: 1/1, 1/2, 2/3, 2/4.
    curve = precision_by_coverage([0.2, 0.9, 0.1, 0.7], [1, 1, 0, 0], points=4)
    assert curve["coverage"].tolist() == [25, 50, 75, 100]
    assert curve["precision"].tolist() == pytest.approx([100, 50, 200 / 3, 50])


def test_tied_scores_count_with_their_mean_precision() -> None:
    curve = precision_by_coverage([0.5] * 4, [1, 0, 0, 0], points=4)
    assert curve["precision"].tolist() == pytest.approx([25.0] * 4)


def test_precision_by_coverage_has_at_most_one_point_per_entry() -> None:
    assert precision_by_coverage([0.3, 0.2], [1, 0], points=20)["coverage"].tolist() == [50, 100]
    assert precision_by_coverage([], [], points=20).empty


def test_reliability_matches_hand_computed_values() -> None:
    # Halves: {0.2, 0.4} of which one is good, and {0.5, 1.0} of which both are.
    table = reliability([0.2, 0.4, 0.5, 1.0], [0, 1, 1, 1], bins=2)
    assert table.to_dict("list") == {"prob": pytest.approx([30, 75]), "share": [50, 100], "count": [2, 2]}
    assert len(reliability([0.95], [1], bins=10)) == 1
