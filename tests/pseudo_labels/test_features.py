"""Checks features against hand-computed values, OpenCV's dilation, and flipped or regrouped inputs."""

from dataclasses import fields, replace

import cv2
import numpy as np
import pytest
from simulated_views import described as described_views
from simulated_views import judged, simulated_views

from l2l_core.data.views import Views
from l2l_core.pseudo_labels.evidence import EVIDENCE
from l2l_core.pseudo_labels.features import (
    CANDIDATES,
    CELL_FEATURES,
    SENTENCE_FEATURES,
    compute_features,
    concatenate,
    confident_pixels,
    confusion_against_votes,
    expand_cells,
    mask_and_surroundings,
    score_candidates,
    soft_iou,
    to_cells,
)


def one_view(prob, flipped, no_prior, proposal, score=0.7, words=3):
    def as_map(values):
        return np.asarray(values, dtype=np.float32)[None]

    return Views(
        sent_id=np.array([5]),
        image=np.zeros((1, 4, 4, 3), dtype=np.uint8),
        prob=as_map(prob),
        prob_flipped=as_map(flipped),
        prob_no_prior=as_map(no_prior),
        proposal=as_map(proposal),
        proposal_score=np.array([score], dtype=np.float32),
        predicted_iou=np.array([0.6], dtype=np.float32),
        words=np.array([words]),
    )


def cells_of(candidates, name):
    return candidates.cells[0, 0, :, :, CELL_FEATURES.index(name)].astype(np.float64)


def sentence_of(candidates, name):
    return float(candidates.sentence[0, 0, SENTENCE_FEATURES.index(name)])


QUARTER = np.zeros((4, 4))
QUARTER[:2, :2] = 1.0
HALF = np.zeros((4, 4))
HALF[:2, :] = 1.0


@pytest.fixture
def described():
    """The teacher marks the top left quarter at 0.8; the rest is at 0.5, which is not foreground. In the flipped
    view it marks the same quarter with certainty. Without the prior it marks the top half. The prior marks the top
    half at 0.9 against 0.1."""
    prob = np.where(QUARTER > 0, 0.8, 0.5)
    return described_views(one_view(prob, QUARTER, HALF, np.where(HALF > 0, 0.9, 0.1)), grid=2)


def test_cells_hold_the_means_of_their_pixels(described):
    """Each cell has 2 x 2 equal pixels, so every mean equals the pixel value."""
    expected = {
        "prob": [[0.8, 0.5], [0.5, 0.5]],
        "candidate": [[1, 0], [0, 0]],
        "proposal": [[0.9, 0.9], [0.1, 0.1]],
        "disagreement": [[0.1, 0.4], [0.4, 0.4]],
        "entropy": [[0.7219, 1], [1, 1]],  # -0.8 log2 0.8 - 0.2 log2 0.2
        "flip_change": [[0.2, 0.5], [0.5, 0.5]],
        "prior_change": [[0.2, 0.5], [0.5, 0.5]],
        "votes": [[1, 2 / 3], [0, 0]],  # flipped, without prior, proposal
        "candidate_votes": [[1, 0], [0, 0]],
        # cells are 0, 1/2, 1/2 and sqrt(1/2) away; a disc of area 1/4 has the radius sqrt(1 / (4 pi)) = 0.2821
        "distance": [[0, 0.5 / 0.2821 / 4], [0.5 / 0.2821 / 4, 0.7071 / 0.2821 / 4]],
    }
    assert set(expected) == set(CELL_FEATURES)
    for name, values in expected.items():
        np.testing.assert_allclose(cells_of(described, name), values, atol=1e-3, err_msg=name)


def test_sentence_features_match_hand_computed_values(described):
    """The label has 4 of 16 pixels. In a map of 4 x 4 pixels, the surroundings reach one pixel: 9 pixels, of which 4
    are in the label."""
    expected = {
        "confidence": (4 * 0.8 + 5 * 0.5) / 9,
        "prior_iou": 4 / 8,
        "prob_iou": (4 * 0.8) / (4 * 1 + 12 * 0.5),
        "flip_iou": (4 * 0.8) / (4 * 1 + 12 * 0.5),
        "no_prior_iou": (4 * 0.8 + 4 * 0.5) / (4 * 1 + 4 * 1 + 8 * 0.5),
        "no_prior_proposal_iou": 8 * 0.9 / (8 * 1 + 8 * 0.1),
        "agreement_iou": 4 / (4 + 4 * 2 / 3),
        "candidate_prob": 0.8,
        "candidate_flipped": 1.0,
        "candidate_no_prior": 1.0,
        "candidate_proposal": 0.9,
        "outside": 12 * 0.5 / (12 * 0.5 + 4 * 0.8),
        "outside_no_prior": 0.5,
        "size": 0.5,
        "compactness": 1.0,  # a square: 4 * 2 / 8 pixels
        "proposal_score": 0.7,
        "predicted_iou": 0.6,
        "sam_iou": 0.0,  # SAM built no candidate
        "has_prior": 1.0,
        "words": np.log(4),
        # the only candidate is the teacher's label, which agrees with itself
        **{f"with_{name}_iou": float(name == "teacher") for name in CANDIDATES},
        **{f"is_{name}": float(name == "teacher") for name in CANDIDATES},
    }
    assert {*expected, *EVIDENCE, "estimate"} == set(SENTENCE_FEATURES)
    assert sentence_of(described, "estimate") == 0  # the critic has not scored it
    for name, value in expected.items():
        assert sentence_of(described, name) == pytest.approx(value, abs=1e-5), name
    assert described.confidence[0] == pytest.approx(expected["confidence"], abs=1e-6)
    assert described.prior_iou[0] == pytest.approx(0.5)


def test_two_separate_squares_are_less_compact_than_one():
    """Two single pixels: area 2/16, perimeter 8/4 sides, so 4 sqrt(1/8) / 2 = 0.7071."""
    dots = np.zeros((4, 4))
    dots[0, 0] = dots[2, 3] = 0.9
    assert sentence_of(described_views(one_view(dots, dots, dots, dots), 2), "compactness") == pytest.approx(
        0.7071, abs=1e-4
    )


def test_prior_iou_is_zero_without_a_prior():
    described = described_views(one_view(QUARTER, QUARTER, QUARTER, QUARTER, score=0.0), 2)
    assert described.prior_iou[0] == 0
    assert sentence_of(described, "has_prior") == 0


def test_an_empty_label_has_finite_features_and_lowest_confidence():
    nothing = np.full((4, 4), 0.01)
    described = described_views(one_view(nothing, nothing, nothing, nothing), 2)
    assert np.isfinite(described.cells).all()
    assert np.isfinite(described.sentence).all()
    assert described.confidence[0] == 0.5
    np.testing.assert_array_equal(cells_of(described, "distance"), 1.0)


def test_features_stay_in_their_ranges():
    views, _ = simulated_views(64, seed=3)
    described = described_views(views, 12)
    assert described.cells.dtype == np.float16
    assert described.cells.shape == (64, 1, 12, 12, len(CELL_FEATURES))
    assert described.cells.min() >= 0
    assert described.cells.max() <= 1
    bounded = np.delete(described.sentence, SENTENCE_FEATURES.index("words"), axis=-1)
    assert bounded.min() >= 0
    assert bounded.max() <= 1 + 1e-6
    assert described.confidence.min() >= 0.5


def test_flipped_views_give_flipped_cells_and_equal_sentence_features():
    views, _ = simulated_views(16, seed=4)
    maps = ("prob", "prob_flipped", "prob_no_prior", "proposal")
    mirrored = replace(views, **{name: getattr(views, name)[:, :, ::-1].copy() for name in maps})
    plain, flipped = described_views(views, 12), described_views(mirrored, 12)
    np.testing.assert_allclose(flipped.cells[:, :, :, ::-1], plain.cells, atol=2e-3)
    np.testing.assert_allclose(flipped.sentence, plain.sentence, atol=1e-5)


def test_concatenated_batches_equal_the_full_batch():
    views, truth = simulated_views(10, seed=5)

    def part(rows):
        return Views(**{field.name: getattr(views, field.name)[rows] for field in fields(Views)})

    whole = described_views(views, 6)
    joined = concatenate([described_views(part(slice(0, 3)), 6), described_views(part(slice(3, 10)), 6)])
    for field in fields(whole):
        np.testing.assert_allclose(getattr(joined, field.name), getattr(whole, field.name), atol=1e-3)
    scores = [judged(part(rows), truth[rows], 6) for rows in (slice(0, 3), slice(3, 10))]
    np.testing.assert_array_equal(concatenate(scores).iou, judged(views, truth, 6).iou)


def test_cells_split_pixels_on_their_border():
    """Of 3 pixels in 2 cells, the middle one belongs half to each: (2 * 1 + 1 * 4) / 3 and (1 * 4 + 2 * 7) / 3."""
    ramp = np.tile(np.array([1.0, 4.0, 7.0], dtype=np.float32), (3, 1))[None]
    np.testing.assert_allclose(to_cells(ramp, 2)[0], [[2, 6], [2, 6]], rtol=1e-6)


@pytest.mark.parametrize(("side", "grid"), [(8, 4), (10, 4), (3, 7)])
def test_pooling_to_cells_preserves_the_mean_of_the_map(side, grid):
    maps = np.random.default_rng(0).random((3, side, side)).astype(np.float32)
    np.testing.assert_allclose(to_cells(maps, grid).mean((1, 2)), maps.mean((1, 2)), rtol=1e-5)


def test_candidate_scores_match_hand_computed_values():
    """The label is the top left quarter, the truth the left half. 4 pixels are correct, 4 are missed: IoU 4 / 8."""
    left = np.zeros((4, 4), dtype=bool)
    left[:, :2] = True
    labels = np.stack([QUARTER > 0, left])[None]  # the second candidate is the truth itself
    truth = score_candidates(np.array([1]), labels, left[None], grid=2)
    np.testing.assert_array_equal(truth.iou, [[0.5, 1.0]])
    expected = [[[1, 0, 0, 0], [0, 0, 1, 0]], [[0, 0, 0, 1], [0, 0, 1, 0]]]
    np.testing.assert_array_equal(truth.cells[0, 0], expected)
    np.testing.assert_array_equal(truth.cells[0, 1, ..., [1, 3]], 0)  # the truth has no wrong pixels


def test_the_iou_of_two_empty_masks_is_zero():
    empty = np.zeros((1, 4, 4), dtype=bool)
    assert score_candidates(np.array([1]), empty[:, None], empty, 2).iou[0, 0] == 0


def test_agreement_treats_the_votes_as_the_truth(described):
    """Top left: labeled, and all three vote for it. Top right: not labeled, but two of three vote for it."""
    expected = [[[1, 0, 0, 0], [0, 0, 1 / 3, 2 / 3]], [[0, 0, 1, 0], [0, 0, 1, 0]]]
    np.testing.assert_allclose(confusion_against_votes(described.cells)[0, 0], expected, atol=1e-3)


def test_agreement_with_unanimous_true_masks_equals_the_scores():
    """If all three other views equal the true mask, the fractions must equal those against the truth."""
    views, truth = simulated_views(12, seed=6)
    unanimous = replace(
        views, **{name: truth.astype(np.float32) for name in ("prob_flipped", "prob_no_prior", "proposal")}
    )
    truth = judged(views, truth, 12)
    np.testing.assert_allclose(confusion_against_votes(described_views(unanimous, 12).cells), truth.cells, atol=2e-3)


def test_features_identify_and_compare_candidates():
    """The teacher marks the top left quarter and the prior the top half, so their IoU is 4 / 8."""
    views = one_view(QUARTER, QUARTER, QUARTER, HALF)
    labels = np.stack([QUARTER > 0, HALF > 0])[None]
    seen = compute_features(views, labels, ("teacher", "prior"), grid=2)
    columns = [
        SENTENCE_FEATURES.index(name) for name in ("is_teacher", "is_prior", "with_teacher_iou", "with_prior_iou")
    ]
    np.testing.assert_allclose(seen.sentence[0][:, columns], [[1, 0, 1, 0.5], [0, 1, 0.5, 1]], atol=1e-6)
    size = seen.sentence[0, :, SENTENCE_FEATURES.index("size")]
    np.testing.assert_allclose(size, np.sqrt([1 / 4, 1 / 2]), rtol=1e-6)
    # The fixed rules rank the first candidate.
    assert seen.prior_iou[0] == 0.5


def test_confident_pixels_include_foreground_and_background():
    prob = np.array([0.04, 0.05, 0.06, 0.5, 0.94, 0.95, 1.0])
    np.testing.assert_array_equal(confident_pixels(prob, 0.95), [True, True, False, False, False, True, True])


def test_cells_expand_to_the_pixels_whose_centers_they_contain():
    """5 columns in 2 cells: the centers are 0.5, 1.5, 2.5, 3.5, and 4.5 of 5. The middle one is on the border and
    goes right."""
    keep = np.array([[[True, False], [False, False]]])
    expected = np.zeros((4, 5), dtype=bool)
    expected[:2, :2] = True
    np.testing.assert_array_equal(expand_cells(keep, 4, 5)[0], expected)


def test_pooling_undoes_expansion():
    keep = np.random.default_rng(1).random((2, 6, 6)) > 0.5
    np.testing.assert_array_equal(to_cells(expand_cells(keep, 30, 30).astype(np.float32), 6) > 0.5, keep)


def test_surroundings_equal_a_dilation():
    views, _ = simulated_views(8, seed=7)
    label = (views.prob > 0.5).astype(np.float32)
    square = np.ones((5, 5), dtype=np.uint8)  # 32 / 16 = 2 pixels to each side
    expected = [cv2.dilate(mask, square, borderType=cv2.BORDER_CONSTANT, borderValue=0) for mask in label]
    np.testing.assert_array_equal(mask_and_surroundings(label), expected)


def test_soft_iou_of_binary_maps_equals_the_iou():
    first, second = np.random.default_rng(2).random((2, 5, 9, 9)) > 0.6
    expected = (first & second).sum((1, 2)) / (first | second).sum((1, 2))
    np.testing.assert_allclose(soft_iou(first.astype(np.float32), second.astype(np.float32)), expected, rtol=1e-6)
