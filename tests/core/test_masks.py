"""Run-length encoding against NumPy, pycocotools and hand-made strings. Malformed input must not reach the C code."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from l2l_core.core.masks import (
    MAX_EDGES_PX,
    cut_proposal,
    decode_rle,
    encode_rle,
    intersection_union_px,
    resize_mask,
    resize_prob,
    rle_area_px,
    rle_area_px_all,
    rle_box_xyxy,
    segmentation_to_rle,
    wrong_kept_px,
)

shapes = array_shapes(min_dims=2, max_dims=2, max_side=12)
masks = arrays(bool, shapes)


def runs_of(mask: np.ndarray) -> list[int]:
    """Runs down the columns, background first, counted pixel by pixel."""
    runs, current = [0], False
    for value in mask.ravel(order="F").tolist():
        if value != current:
            runs, current = [*runs, 0], value
        runs[-1] += 1
    return runs


@given(mask=masks)
def test_decoding_inverts_encoding(mask):
    counts = encode_rle(mask)

    np.testing.assert_array_equal(decode_rle(counts, *mask.shape), mask)
    assert rle_area_px(counts, *mask.shape) == mask.sum()


def test_every_nonzero_value_is_foreground():
    values = np.array([[0, 255, 1], [256, 0, 7]], dtype=np.int32)  # 256 is 0 in 8 bits
    np.testing.assert_array_equal(decode_rle(encode_rle(values), 2, 3), [[False, True, True], [True, False, True]])


def test_encodes_a_mask_to_a_hand_computed_string():
    """[[0, 1], [1, 1]] down the columns: 1 background, 3 foreground pixels -> characters 48 + 1 and 48 + 3."""
    assert encode_rle(np.array([[0, 1], [1, 1]])) == b"13"


@given(mask=arrays(bool, shapes, elements=st.booleans()).filter(np.any))
def test_box_encloses_the_mask_tightly(mask):
    ys, xs = np.nonzero(mask)
    expected = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    x1, y1, x2, y2 = rle_box_xyxy(encode_rle(mask), *mask.shape)

    assert (y1, y2) == (expected[1], expected[3])
    assert (x1, x2) == (expected[0], expected[2])


@given(data=st.data(), shape=shapes)
def test_pixel_counts_agree_with_numpy(data, shape):
    first, second, keep = (data.draw(arrays(bool, shape)) for _ in range(3))
    a, b, k = encode_rle(first), encode_rle(second), encode_rle(keep)
    sizes = np.array([shape])

    assert intersection_union_px([a], [b], sizes).tolist() == [[(first & second).sum(), (first | second).sum()]]
    assert wrong_kept_px([a], [b], [k], sizes).tolist() == [[keep.sum(), (keep & (first != second)).sum()]]


def test_counts_pixels_of_many_masks_of_different_sizes():
    """More than 255 masks, where pycocotools' list form fails under NumPy 2."""
    rng = np.random.default_rng(0)
    pairs = [rng.random((2, 3 + k % 5, 4 + k % 3)) < 0.5 for k in range(600)]
    first, second = ([encode_rle(pair[n]) for pair in pairs] for n in (0, 1))
    sizes = np.array([pair[0].shape for pair in pairs])

    found = intersection_union_px(first, second, sizes)
    assert found.dtype == np.int64
    assert found.tolist() == [[(a & b).sum(), (a | b).sum()] for a, b in pairs]
    assert rle_area_px_all(first, sizes).tolist() == [a.sum() for a, _ in pairs]
    assert intersection_union_px([], [], np.empty((0, 2), dtype=np.int64)).shape == (0, 2)


@given(mask=masks)
def test_converts_every_rle_format_to_the_same_counts(mask):
    height, width = mask.shape
    size, expected = [height, width], encode_rle(mask)

    assert segmentation_to_rle({"size": size, "counts": runs_of(mask)}, height, width) == expected
    assert segmentation_to_rle({"size": size, "counts": expected}, height, width) == expected
    assert segmentation_to_rle({"size": size, "counts": expected.decode()}, height, width) == expected


def test_encodes_runs_longer_than_16_bits():
    """Runs of a large photo: 40 million background pixels, then 24 million foreground pixels."""
    runs = [40_000_000, 24_000_000]
    counts = segmentation_to_rle({"size": [8000, 8000], "counts": runs}, 8000, 8000)
    assert rle_area_px(counts, 8000, 8000) == 24_000_000
    assert segmentation_to_rle({"size": [8000, 8000], "counts": counts}, 8000, 8000) == counts


@given(mask=masks, data=st.data())
def test_merges_empty_runs(mask, data):
    """A run split by an empty run is the same mask. The empty run would end pycocotools' merge too early."""
    runs = runs_of(mask)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(runs) - 1))
        cut = data.draw(st.integers(0, runs[place]))
        runs[place : place + 1] = [cut, 0, runs[place] - cut]
    height, width = mask.shape

    assert segmentation_to_rle({"size": [height, width], "counts": runs}, height, width) == encode_rle(mask)


@given(x=st.integers(0, 20), y=st.integers(0, 14), width=st.integers(1, 9), height=st.integers(1, 5))
def test_rasterizes_a_rectangle_to_its_exact_pixels(x, y, width, height):
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    expected = np.zeros((20, 30), dtype=bool)
    expected[y : y + height, x : x + width] = True

    np.testing.assert_array_equal(decode_rle(segmentation_to_rle([polygon], 20, 30), 20, 30), expected)


def test_merges_several_polygons():
    left, right = [1.0, 1, 6, 1, 6, 6, 1, 6], [4.0, 4, 9, 4, 9, 9, 4, 9]
    expected = np.zeros((10, 12), dtype=bool)
    expected[1:6, 1:6] = expected[4:9, 4:9] = True

    np.testing.assert_array_equal(decode_rle(segmentation_to_rle([left, right], 10, 12), 10, 12), expected)


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000))
def test_polygon_masks_agree_with_pillow(seed):
    """Pillow also draws outlines, so the masks may differ by one pixel along the border."""
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
    points = np.stack([32 + 27 * np.cos(angles), 30 + 22 * np.sin(angles)], axis=1).round(2)  # convex: no thin gaps
    drawn = Image.new("1", (64, 60))
    ImageDraw.Draw(drawn).polygon([tuple(point) for point in points], fill=1)
    expected = np.asarray(drawn)
    found = decode_rle(segmentation_to_rle([points.ravel().tolist()], 60, 64), 60, 64)

    shifted = [np.roll(expected, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert not (found & ~np.any(shifted, axis=0)).any()
    assert not (np.all(shifted, axis=0) & ~found).any()


def test_clips_a_polygon_at_the_image_border():
    mask = decode_rle(segmentation_to_rle([[-3, -2, 4, -2, 4, 3, -3, 3]], 6, 8), 6, 8)
    expected = np.zeros((6, 8), dtype=bool)
    expected[:3, :4] = True
    np.testing.assert_array_equal(mask, expected)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "an empty list"),
        (None, "NoneType"),
        ("3", "str"),
        ([1, 2, 3, 4, 5, 6], "each polygon needs"),
        ([[]], "each polygon needs"),
        ([[1, 2, 3, 4]], "each polygon needs x, y for at least 3 points, got 4 numbers"),
        ([[10, 5], [30, 5], [30, 20]], r"got points as \[x, y\]; each polygon needs one flat list"),
        ([[[10, 5], [30, 5], [30, 20]]], "got a polygon of lists or objects; each polygon needs one flat list"),
        ([{"x": 1}], "got dict for a polygon; each polygon needs one flat list"),
        ({"box": [1, 2, 3, 4]}, "got an object with the keys 'box', expected polygons or size and counts"),
        ({}, "got an object with the keys none"),
        ([[10**400, 2, 3, 4, 5, 6]], r"reach from 2 to 10{19}\.\.\. \(401 characters\), expected numbers in or near"),
        ([[1, 2, 3, 4, 5, 6, 7]], "each polygon needs"),
        ([[1, 2, 3, 4, 5, True]], "must be numbers"),
        ([[1, 2, 3, 4, 5, "6"]], "must be numbers"),
        ([[1, 2, 3, 4, 5, None]], "must be numbers"),
        ([[NAN, 2, 3, 4, 5, 6]], "in or near"),
        ([[1, 2, NAN, 4, 5, 6]], "in or near"),
        ([[1, 2, 3, 4, 5, -INF]], "in or near"),
        ([[1, 2, 3, 4, 5, 10**400]], "in or near"),
        ([[1, 2, 3, 4, 5, 2e9]], "in or near"),
        ({"counts": [30]}, "size: got None"),
        ({"size": [6, 5], "counts": [30]}, r"size: got \[6, 5\], expected \[5, 6\]"),
        ({"size": [5, 6]}, "counts: got NoneType"),
        ({"size": [5, 6], "counts": []}, "add up to 30"),
        ({"size": [5, 6], "counts": [29]}, "add up to 30"),
        ({"size": [5, 6], "counts": [31]}, "add up to 30"),
        ({"size": [5, 6], "counts": [-1, 31]}, "whole numbers >= 0"),
        ({"size": [5, 6], "counts": [15.0, 15]}, "whole numbers >= 0"),
        ({"size": [5, 6], "counts": [True, 29]}, "whole numbers >= 0"),
        ({"size": [5, 6], "counts": [2**64, 30]}, "whole numbers >= 0"),
        ({"size": [5, 6], "counts": [2**32, 30]}, "whole numbers >= 0"),
        ({"size": [5, 6], "counts": ""}, "cut off"),
        ({"size": [5, 6], "counts": "n"}, "cut off"),  # more characters must follow
        ({"size": [5, 6], "counts": "é0"}, "not a COCO"),
        ({"size": [5, 6], "counts": "\ud800"}, "not a COCO"),
        ({"size": [5, 6], "counts": " "}, "not a COCO"),
        ({"size": [5, 6], "counts": "O"}, "add up to 30"),  # -1
        ({"size": [5, 6], "counts": "6"}, "add up to 30"),  # 6
        ({"size": [5, 6], "counts": "oooooooo0"}, "longer than any image"),
        ([[-6, 0, 12, 4] * 100_000], "the edges of the polygons are 3800000 px long, expected at most 2097152"),
        ([[-6, 0, 12, 4] * 100] * 1000, "the edges of the polygons are 3800000 px long, expected at most 2097152"),
    ],
)
def test_refuses_malformed_segmentations(segmentation, message):
    with pytest.raises(ValueError, match=message):
        segmentation_to_rle(segmentation, 5, 6)


@pytest.mark.parametrize("hw", [(10**6, 10**6), (2**16, 2**16), (2**31, 2), (0, 5), (3, 0)])
@pytest.mark.parametrize("form", ["polygon", "runs"])
def test_refuses_sizes_that_native_code_cannot_count(hw, form):
    """pycocotools multiplies height and width as 32-bit integers and writes where the result points."""
    height, width = hw
    runs = {"size": [height, width], "counts": [2**31] * (height * width // 2**31) + [height * width % 2**31]}
    with pytest.raises(ValueError, match="expected 1 to 134217728 pixels"):
        segmentation_to_rle([[0, 0, 1, 0, 1, 1]] if form == "polygon" else runs, height, width)


def test_draws_an_outline_of_the_longest_permitted_length():
    """A zigzag over the whole image, as long as native code is trusted with: it still ends, and in the same mask."""
    height, width = 64, 1000
    there_and_back = [0, 10, width, 10, width, 20, 0, 20]
    once = segmentation_to_rle([there_and_back], height, width)
    edges = sum((width + 1, 11, width + 1, 11))
    times = MAX_EDGES_PX // edges
    assert segmentation_to_rle([there_and_back] * times, height, width) == once
    with pytest.raises(ValueError, match="edges of the polygons"):
        segmentation_to_rle([there_and_back] * (times + 1), height, width)


def characters(number: int) -> str:
    """A number in COCO's characters: two's complement, 5 bits each, lowest first; bit 6 marks continuation."""
    text = ""
    while True:
        low, number = number & 31, number >> 5
        done = number == (-1 if low & 16 else 0)
        text += chr(48 + low + (0 if done else 32))
        if done:
            return text


def compress(runs: list[int]) -> str:
    """COCO's compressed counts, even for runs that no mask has."""
    return "".join(characters(run - runs[k - 2] if k > 2 else run) for k, run in enumerate(runs))


@given(mask=masks)
def test_encoder_of_this_test_matches_coco(mask):
    assert compress(runs_of(mask)).encode() == encode_rle(mask)


@settings(max_examples=200)
@given(
    runs=st.lists(st.integers(-2, 5) | st.integers(0, 5000), min_size=1, max_size=12),
    beyond=st.sampled_from([0, 0, 1, -1, 2**31]),
)
def test_accepts_counts_only_if_they_fill_the_image(runs, beyond):
    """Negative runs and wrong pixel totals never reach the C decoder, which would overrun."""
    width = max(1, sum(runs) + beyond)
    segmentation = {"size": [1, width], "counts": compress(runs)}
    if min(runs) < 0 or sum(runs) != width:
        with pytest.raises(ValueError, match="add up to"):
            segmentation_to_rle(segmentation, 1, width)
        return
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    np.testing.assert_array_equal(decode_rle(segmentation_to_rle(segmentation, 1, width), 1, width)[0], pixels)


@given(mask=masks)
def test_refuses_truncated_counts(mask):
    """A shorter string lacks pixels or ends inside a number."""
    height, width = mask.shape
    counts = encode_rle(mask)
    for length in range(len(counts)):
        with pytest.raises(ValueError, match=r"cut off|add up to"):
            segmentation_to_rle({"size": [height, width], "counts": counts[:length]}, height, width)


@given(counts=st.binary(max_size=40))
def test_refuses_arbitrary_bytes_or_makes_them_canonical(counts):
    try:
        accepted = segmentation_to_rle({"size": [7, 9], "counts": counts}, 7, 9)
    except ValueError:
        return
    assert accepted == encode_rle(decode_rle(accepted, 7, 9))


def test_counts_match_pycocotools():
    """Convert the same mask with pycocotools' annotation functions."""
    rng = np.random.default_rng(1)
    mask = rng.random((33, 47)) < 0.3
    ours = segmentation_to_rle({"size": [33, 47], "counts": runs_of(mask)}, 33, 47)
    theirs = coco_mask.frPyObjects({"size": [33, 47], "counts": runs_of(mask)}, 33, 47)
    assert ours == theirs["counts"]


def test_resizing_a_mask_by_an_integer_factor_repeats_its_pixels():
    mask = np.array([[True, False], [False, True]])
    np.testing.assert_array_equal(resize_mask(mask, 4, 6), np.kron(mask, np.ones((2, 3), dtype=bool)))
    np.testing.assert_array_equal(resize_mask(resize_mask(mask, 4, 6), 2, 2), mask)


def test_downsampling_does_not_shift_a_mask():
    """Rectangles in a 480 x 640 photo, resized to 96 px: on average, their centers must not shift."""
    generator = np.random.default_rng(0)
    moved = []
    for _ in range(300):
        top, left = generator.integers(0, (300, 400))
        height, width = generator.integers(60, 160, 2)
        mask = np.zeros((480, 640), dtype=bool)
        mask[top : top + height, left : left + width] = True
        rows, columns = np.nonzero(resize_mask(mask, 96, 96))
        centre = (rows.mean() + 0.5) * 480 / 96, (columns.mean() + 0.5) * 640 / 96
        moved.append((centre[0] - (top + height / 2), centre[1] - (left + width / 2)))
    assert np.abs(np.mean(moved, axis=0)).max() < 0.4  # in photo pixels; half a pixel of the small mask is 2.5 to 3.3


def test_resizing_probabilities_preserves_their_range_and_mean():
    prob = np.random.default_rng(0).random((8, 8), dtype=np.float32)
    larger = resize_prob(prob, 32, 16)
    assert larger.shape == (32, 16)
    assert larger.min() >= prob.min()
    assert larger.max() <= prob.max()
    assert larger.mean() == pytest.approx(prob.mean(), abs=0.05)
    assert resize_prob(np.full((3, 5), 0.25, np.float32), 7, 2) == pytest.approx(0.25)


def test_a_cut_proposal_covers_the_same_part_of_a_larger_image() -> None:
    soft = np.zeros((4, 8), np.uint8)
    soft[:2, 2:6] = 255  # upper half, middle half
    mask = decode_rle(cut_proposal(soft, 40, 160), 40, 160)
    expected = np.zeros((40, 160), bool)
    expected[:20, 40:120] = True
    assert (mask[:15] == expected[:15]).all()
    assert (mask[:, 60:100] == expected[:, 60:100]).all()
    assert not (mask & ~expected).any()  # bilinear interpolation rounds the two lower corners off
