"""Checks sentence groups and differences between predictions against hand-computed values."""

import numpy as np
import pandas as pd
import pytest

from l2l_core.evaluation.error_analysis import OUTCOMES, changes, mean_interval, outcomes, size_limits, sizes


def answers(*pixels: tuple[int, int, int]) -> pd.DataFrame:
    """Return rows as in the per-sentence table, from pixel counts of intersection, prediction, and truth."""
    rows = pd.DataFrame(pixels, columns=["intersection_px", "pred_area_px", "gt_area_px"])
    return rows.assign(union_px=rows["pred_area_px"] + rows["gt_area_px"] - rows["intersection_px"])


@pytest.mark.parametrize(
    ("pixels", "name"),
    [
        ((0, 50, 50), "wrong object"),
        ((0, 0, 50), "empty"),
        ((0, 0, 0), "right"),  # no object and no prediction
        ((0, 9, 0), "wrong object"),  # no object
        ((9, 49, 60), "wrong object"),  # 9 / 100
        ((10, 50, 60), "misplaced"),  # 10 / 100: IoU 0.1 is no longer a wrong object
        ((49, 100, 49), "too large"),  # 49 / 100, covers the truth at twice its size
        ((20, 80, 40), "too large"),  # twice the truth
        ((20, 79, 40), "misplaced"),
        ((20, 40, 80), "too small"),
        ((20, 41, 80), "misplaced"),
        ((50, 100, 50), "boundary"),  # IoU 0.5 although twice as large
        ((69, 100, 69), "boundary"),
        ((70, 100, 70), "right"),  # IoU 0.7
        ((50, 50, 50), "right"),
    ],
)
def test_assigns_the_outcome_of_each_sentence(pixels: tuple[int, int, int], name: str) -> None:
    assert outcomes(answers(pixels)).tolist() == [name]


def test_outcomes_keep_the_row_index() -> None:
    rows = answers((0, 0, 50), (50, 50, 50)).set_axis([7, 3])
    assert outcomes(rows).to_dict() == {7: "empty", 3: "right"}
    assert set(outcomes(rows)) < set(OUTCOMES)


def test_sizes_split_sentences_into_thirds() -> None:
    share = pd.Series([0.30, 0.01, 0.02, 0.10, 0.11, 0.03, 0.12, 0.40, 0.50], index=range(10, 19))
    limits = size_limits(share)
    assert 0.03 < limits[0] <= 0.10
    assert 0.12 < limits[1] <= 0.30
    assert sizes(share, limits).to_dict() == {
        **dict.fromkeys([11, 12, 15], "small"),
        **dict.fromkeys([13, 14, 16], "medium"),
        **dict.fromkeys([10, 17, 18], "large"),
    }


def test_a_size_at_a_limit_counts_as_the_larger_one() -> None:
    assert sizes(pd.Series([0.1, 0.2]), (0.1, 0.2)).tolist() == ["medium", "large"]


def test_counts_changes_between_predictions() -> None:
    #                 0.40           0.50          0.52           0.80           0.30
    before = answers((40, 100, 40), (50, 100, 50), (52, 100, 52), (80, 100, 80), (30, 100, 30))
    #                0.60           0.48           0.10           0.84           0.30
    after = answers((60, 100, 60), (48, 100, 48), (10, 100, 10), (84, 100, 84), (30, 100, 30))
    change = changes(before, after)
    # 0.50 to 0.48 and 0.80 to 0.84 are too small to count, but the former falls below 0.5.
    assert change.pop("mean") == pytest.approx(100 * (0.20 - 0.02 - 0.42 + 0.04) / 5)
    assert change == {"better": 1, "worse": 1, "reached": 1, "lost": 2}


def test_interval_of_independent_values_matches_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(2, 5, 400)
    low, high = mean_interval(values, np.arange(400), seed=0)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 8)


def test_duplicate_values_of_an_image_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(4).normal(size=50)
    images = np.arange(50)
    once = mean_interval(values, images, seed=1)
    assert mean_interval(np.tile(values, 2), np.tile(images, 2), seed=1) == pytest.approx(once)
    as_if_independent = mean_interval(np.tile(values, 2), np.arange(100), seed=1)
    assert as_if_independent[1] - as_if_independent[0] < 0.8 * (once[1] - once[0])


def test_interval_has_zero_width_for_equal_values_and_is_deterministic() -> None:
    assert mean_interval(np.full(7, 0.25), np.array([1, 1, 2, 3, 3, 3, 4]), seed=5) == (0.25, 0.25)
    values, images = np.random.default_rng(6).normal(size=30), np.repeat(range(10), 3)
    assert mean_interval(values, images, seed=5) == mean_interval(values, images, seed=5)
    assert mean_interval(values, images, seed=5) != mean_interval(values, images, seed=6)
