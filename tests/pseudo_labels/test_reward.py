"""Checks utilities against hand-computed values and bounds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l2l_core.pseudo_labels.features import score_candidates
from l2l_core.pseudo_labels.reward import agreement_reliability, utility


def truth_of(label, truth, grid):
    return score_candidates(
        np.array([0]), np.asarray(label, dtype=bool)[None, None], np.asarray(truth, dtype=bool)[None], grid
    )


def utility_of(label, truth, keep, wrong_cost=1.0):
    keep = torch.tensor(keep, dtype=torch.float32)
    cells = torch.from_numpy(truth_of(label, truth, keep.shape[-1]).cells[0])
    return float(utility(cells, keep, wrong_cost))


# 4 x 4 pixels in 2 x 2 cells. The label is the top half, the truth the top left quarter and bottom left column.
LABEL = [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
TRUTH = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        # correct foreground 4, wrong foreground 4, missed 2: the union is 10; correct background 2 (bottom left) + 4
        ([[1, 1], [1, 1]], 4 / 10 * (1 + 6 / 6) / 2 - (4 + 2) / 10),
        ([[0, 0], [0, 0]], 0.0),
        ([[1, 0], [0, 0]], 4 / 10 / 2),
        ([[1, 0], [0, 1]], 4 / 10 * (1 + 4 / 6) / 2),
        ([[1, 0], [1, 1]], 4 / 10 * (1 + 6 / 6) / 2 - 2 / 10),
        ([[0, 1], [0, 0]], -4 / 10),
        ([[0, 0], [0, 1]], 0.0),  # correct background alone has no utility
        ([[0, 0], [1, 0]], -2 / 10),  # background with missed pixels has a cost
    ],
)
def test_utility_matches_hand_computed_values(keep, expected):
    assert utility_of(LABEL, TRUTH, keep) == pytest.approx(expected, abs=1e-6)


def test_wrong_cost_scales_only_the_cost():
    keep = [[1, 0], [1, 1]]
    assert utility_of(LABEL, TRUTH, keep, 2.5) == pytest.approx(4 / 10 - 2.5 * 2 / 10, abs=1e-6)
    assert utility_of(LABEL, TRUTH, keep, 0.0) == pytest.approx(4 / 10, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**16), st.floats(0, 3))
def test_utility_of_keeping_all_cells_follows_the_iou(seed, wrong_cost):
    """The utility is (1 + c) IoU - c, with the IoU counted in pixels: positive above IoU 0.5 at c = 1, and -c for a
    wrong object."""
    label, truth = np.random.default_rng(seed).random((2, 8, 8)) > [[[0.4]], [[0.6]]]
    iou = (label & truth).sum() / (label | truth).sum()
    expected = (1 + wrong_cost) * iou - wrong_cost
    assert utility_of(label, truth, np.ones((4, 4)), wrong_cost) == pytest.approx(expected, abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**16))
def test_utility_is_bounded_and_rewards_correct_cells(seed):
    """Adding a cell without wrong pixels never lowers it. Adding a cell without correct pixels never raises it."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 4, (3, 3))  # one kind per cell
    cells = torch.from_numpy(np.eye(4, dtype=np.float32)[kinds])
    keep = torch.from_numpy((rng.random((3, 3)) > 0.5).astype(np.float32))
    before = float(utility(cells, keep, 1.0))
    assert -1 - 1e-6 <= before <= 1 + 1e-6
    row, column = rng.integers(0, 3, 2)
    keep[row, column] = 1
    after = float(utility(cells, keep, 1.0))
    if kinds[row, column] in (0, 2):  # correct foreground, correct background
        assert after >= before - 1e-6
    else:
        assert after <= before + 1e-6


def test_utility_does_not_depend_on_object_size():
    """Label, truth, and kept cells have half the size and lie in an image corner; the rest is kept background. In
    both cases the union is 10, with 4 correct and 2 wrong foreground pixels, and all correct background is kept."""
    label, truth = np.array(LABEL), np.array(TRUTH)
    small_label, small_truth = np.zeros((8, 8)), np.zeros((8, 8))
    small_label[:4, :4], small_truth[:4, :4] = label, truth
    keep = np.ones((4, 4))
    keep[0, 1] = 0
    assert utility_of(small_label, small_truth, keep) == pytest.approx(4 / 10 - 2 / 10, abs=1e-6)
    assert utility_of(label, truth, [[1, 0], [1, 1]]) == pytest.approx(4 / 10 - 2 / 10, abs=1e-6)


def test_a_wrong_object_never_has_positive_utility():
    """This holds for every kept part of the label."""
    label, truth = np.zeros((4, 4)), np.zeros((4, 4))
    label[0, :2], truth[3, 2:] = 1, 1
    for bits in range(16):
        keep = np.array([bits >> shift & 1 for shift in range(4)]).reshape(2, 2)
        assert utility_of(label, truth, keep) <= 0


def test_an_empty_label_never_has_positive_utility():
    truth = np.zeros((4, 4))
    truth[0, 0] = 1
    for bits in range(16):
        keep = np.array([bits >> shift & 1 for shift in range(4)]).reshape(2, 2)
        assert utility_of(np.zeros((4, 4)), truth, keep) <= 0


def test_utility_broadcasts_over_groups_of_actions():
    cells = torch.from_numpy(truth_of(LABEL, TRUTH, 2).cells)
    keep = torch.tensor([[[[1, 0], [0, 0]]], [[[0, 1], [0, 0]]]], dtype=torch.float32)
    torch.testing.assert_close(utility(cells, keep, 1.0), torch.tensor([[0.2], [-0.4]]))


def test_agreement_reliability_matches_hand_computed_values():
    """AUROC 1 gives 1, 3 of 4 ordered pairs give 0.5, worse than chance gives 0, and one class (unknown) gives 0."""
    iou = np.array([0.9, 0.7, 0.2, 0.1], dtype=np.float32)
    assert agreement_reliability(np.array([4.0, 3.0, 2.0, 1.0], dtype=np.float32), iou) == pytest.approx(1.0)
    assert agreement_reliability(np.array([4.0, 2.0, 3.0, 1.0], dtype=np.float32), iou) == pytest.approx(0.5)
    assert agreement_reliability(np.array([1.0, 2.0, 3.0, 4.0], dtype=np.float32), iou) == 0
    assert agreement_reliability(np.array([1.0, 2.0], dtype=np.float32), iou[:2]) == 0
