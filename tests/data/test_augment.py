from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from l2l_core.data import augment
from l2l_core.data.augment import mirror, mirror_sentence, strong_view
from l2l_core.data.pairs import Batch

SIDE = 64


def squares(count: int, inside: int = 255) -> Batch:
    """Black images with one bright rectangle each, in different places; label, box and proposal mark that rectangle."""
    image = torch.zeros(count, 3, SIDE, SIDE, dtype=torch.uint8)
    label = torch.zeros(count, 1, SIDE, SIDE)
    box = torch.zeros(count, 4)
    for row in range(count):
        x, y = 20 + row % 7, 22 + row % 5
        image[row, :, y : y + 16, x : x + 12] = inside
        label[row, :, y : y + 16, x : x + 12] = 1
        box[row] = torch.tensor([x, y, x + 12, y + 16]) / SIDE
    return Batch(
        image=image,
        sentence=["the square on the left"] * count,
        prior_text=["left square"] * count,
        box=box,
        has_box=torch.ones(count, dtype=torch.bool),
        proposal=label.clone(),
        proposal_score=torch.ones(count),
        label=label,
        keep=torch.ones_like(label),
    )


def seeds_of(batch: Batch, seed: int) -> list[int]:
    """One seed per sample."""
    return [1000 * seed + place for place in range(len(batch.sentence))]


def centre(weight: Tensor) -> np.ndarray:
    """Center of mass (x, y) of an [H, W] map in pixels."""
    y, x = np.mgrid[: weight.shape[0], : weight.shape[1]] + 0.5
    values = weight.numpy().astype(float)
    return np.array([(x * values).sum(), (y * values).sum()]) / values.sum()


def assert_same(first: Batch, second: Batch) -> None:
    for field in fields(Batch):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert torch.allclose(a, b, atol=1e-6) if isinstance(a, Tensor) else a == b, field.name


@pytest.mark.parametrize(
    ("said", "mirrored"),
    [
        ("man on the left", "man on the right"),
        ("Left of the right cup", "Right of the left cup"),
        ("LEFT", "RIGHT"),
        ("leftmost, not rightmost", "rightmost, not leftmost"),
        ("left-hand side, righthand cup", "right-hand side, lefthand cup"),
        ("far right's friend", "far left's friend"),
        ("leftward and rightwards", "rightward and leftwards"),
        ("bright upright thing in a frightening copyright", "bright upright thing in a frightening copyright"),
        ("leftover food, righteous", "leftover food, righteous"),
        ("cleft palate aloft", "cleft palate aloft"),
        ("bottom-left corner", "bottom-right corner"),
        ("guy on lft", "guy on rt"),
        ("RT bowl, lhs", "LFT bowl, rhs"),
        ("r girl", "l girl"),
        ("man (L)", "man (R)"),
        ("2nd from l.", "2nd from r."),
        ("donut at 3 o'clock", "donut at 9 o'clock"),
        ("11 oclock slice", "1 oclock slice"),
        ("1 o clock, not 12 o\u2019clock", "11 o clock, not 12 o\u2019clock"),
        ("6 o'clock", "6 o'clock"),
        ("3 people, row 9 o", "3 people, row 9 o"),
        ("clock says 10:09 o'clock", "clock says 10:09 o'clock"),
        ("l-shaped sofa by the L shaped desk", "l-shaped sofa by the L shaped desk"),
        ("h&r block, d.r. and they'r r2d2 art girl", "h&r block, d.r. and they'r r2d2 art girl"),
        ("", ""),
    ],
)
def test_mirror_sentence_swaps_only_left_and_right_words(said, mirrored):
    assert mirror_sentence(said) == mirrored
    assert mirror_sentence(mirrored) == said


WORDS = [
    "left",
    "Right",
    "LEFT",
    "rightmost",
    "left-hand",
    "bright",
    "upright",
    "leftover",
    "cup",
    "é",
    "2nd",
    "",
    "lft",
    "RT",
    "r",
    "L",
    "4 o'clock",
    "12 oclock",
]


@given(st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from([" ", ", ", "-", "'s ", "."]))))
def test_mirroring_words_twice_is_the_identity(parts):
    text = "".join(word + gap for word, gap in parts)
    assert mirror_sentence(mirror_sentence(text)) == text


def test_mirroring_twice_is_the_identity():
    batch = squares(6)
    assert_same(mirror(mirror(batch)), batch)
    once = mirror(batch)
    assert once.label is not None
    assert not torch.equal(once.image, batch.image)


def test_mirror_flips_images_masks_boxes_and_words():
    batch = squares(1)
    batch = replace(batch, box=torch.tensor([[0.1, 0.2, 0.4, 0.9]]))
    mirrored = mirror(batch)
    assert torch.allclose(mirrored.box, torch.tensor([[0.6, 0.2, 0.9, 0.9]]))
    np.testing.assert_array_equal(mirrored.image.numpy(), batch.image.numpy()[..., ::-1])
    for name in ("label", "keep", "proposal"):
        np.testing.assert_array_equal(getattr(mirrored, name).numpy(), getattr(batch, name).numpy()[..., ::-1])
    assert mirrored.sentence == ["the square on the right"]
    assert mirrored.prior_text == ["right square"]


def test_mirrors_only_the_chosen_samples_and_keeps_missing_boxes_missing():
    batch = squares(3)
    batch = replace(
        batch,
        has_box=torch.tensor([True, False, True]),
        box=batch.box * torch.tensor([[1.0], [0.0], [1.0]]),
    )
    mirrored = mirror(batch, torch.tensor([True, True, False]))
    assert mirrored.sentence == ["the square on the right", "the square on the right", "the square on the left"]
    assert torch.equal(mirrored.image[2], batch.image[2])
    assert torch.equal(mirrored.box[2], batch.box[2])
    assert torch.equal(mirrored.box[1], torch.zeros(4))
    assert not torch.equal(mirrored.image[1], batch.image[1])


def test_views_of_a_batch_without_targets_have_no_targets():
    batch = replace(squares(2), label=None, keep=None)
    for view in (mirror(batch), strong_view(batch, seeds_of(batch, 0))):
        assert view.label is None
        assert view.keep is None


@pytest.fixture
def wide_limits(monkeypatch):
    """Sets wide augmentation limits, independent of those that training uses."""
    monkeypatch.setattr(augment, "MAX_SCALE", 0.25)
    monkeypatch.setattr(augment, "MAX_SHIFT", 0.15)


@pytest.mark.usefixtures("wide_limits")
def test_strong_view_keeps_image_label_proposal_and_box_aligned():
    batch = squares(40)
    view = strong_view(batch, seeds_of(batch, 1))
    assert view.label is not None
    moved = 0
    for row in range(40):
        grey = view.image[row].float().mean(0)
        bright = grey > (grey.min() + grey.max()) / 2
        label = view.label[row, 0]
        np.testing.assert_allclose(centre(bright.float()), centre(label), atol=1.0)
        np.testing.assert_allclose(centre(view.proposal[row, 0]), centre(label), atol=1.0)
        assert bright.sum().item() == pytest.approx(label.sum().item(), rel=0.35)  # blurred edges
        ys, xs = np.nonzero(label.numpy())
        tight = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        np.testing.assert_allclose(view.box[row].numpy() * SIDE, tight, atol=1.5)
        named_left = view.sentence[row] == "the square on the left"
        moved += abs(centre(label)[0] - centre(batch.label[row, 0])[0]) > 2 if named_left else 0
    assert moved > 5  # the views differ from their originals


@pytest.mark.usefixtures("wide_limits")
def test_strong_view_warps_maps_by_the_affine_transform_of_the_box():
    """Maps move as `affine_grid` would move them with the zoom and shift of the box."""
    batch = squares(6)
    whole = torch.tensor([[0.3, 0.3, 0.7, 0.7]]).expand(6, 4)
    view = strong_view(replace(batch, box=whole), seeds_of(batch, 3), flip=False)
    zoom = (view.box[:, 2:] - view.box[:, :2]) / 0.4
    shift = view.box[:, :2] + view.box[:, 2:] - 1
    theta = torch.zeros(6, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = 1 / zoom[:, 0], 1 / zoom[:, 1], -shift / zoom
    grid = functional.affine_grid(theta, [6, 1, SIDE, SIDE], align_corners=False)
    expected = functional.grid_sample(batch.proposal, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(view.proposal, expected, rtol=0, atol=1e-3)


def test_strong_view_darkens_and_masks_out_pixels_outside_the_image():
    batch = squares(30)
    batch = replace(batch, image=torch.full_like(batch.image, 255))
    view = strong_view(batch, seeds_of(batch, 2))
    assert view.keep is not None
    assert set(view.keep.unique().tolist()) == {0.0, 1.0}
    for row in range(30):
        grey, keep = view.image[row].float().mean(0), view.keep[row, 0] > 0
        edge = torch.nn.functional.max_pool2d((~keep)[None].float(), 3, 1, 1)[0] > 0  # edge pixels may blend both
        if (~keep).any():
            assert grey[~keep].median() < grey[keep & ~edge].min()
    assert ((view.keep == 0).flatten(1).any(1)).sum() > 10


@pytest.mark.usefixtures("wide_limits")
def test_strong_view_warps_the_keep_mask_with_the_image():
    batch = squares(10)
    batch = replace(batch, keep=1 - batch.label)
    view = strong_view(batch, seeds_of(batch, 3))
    assert (view.keep * view.label).sum() == 0


def test_strong_view_of_a_sample_does_not_depend_on_its_batch():
    batch = squares(6)
    seeds, some = seeds_of(batch, 7), [4, 1]
    whole = strong_view(batch, seeds)
    taken = {
        field.name: getattr(batch, field.name)[some]
        if isinstance(getattr(batch, field.name), Tensor)
        else [getattr(batch, field.name)[row] for row in some]
        for field in fields(Batch)
    }
    part = strong_view(Batch(**taken), [seeds[row] for row in some])
    for field in fields(Batch):
        one, other = getattr(part, field.name), getattr(whole, field.name)
        assert torch.equal(one, other[some]) if isinstance(one, Tensor) else one == [other[row] for row in some]


def test_strong_view_can_disable_mirroring():
    batch = squares(60)
    flipped, straight = strong_view(batch, seeds_of(batch, 1)), strong_view(batch, seeds_of(batch, 1), flip=False)
    assert straight.sentence == batch.sentence
    assert flipped.sentence != batch.sentence
    kept = [row for row in range(60) if flipped.sentence[row] == batch.sentence[row]]
    assert torch.equal(flipped.image[kept], straight.image[kept])  # all other random choices are identical


def test_strong_view_depends_only_on_the_seeds_and_keeps_its_input_unchanged():
    batch, untouched = squares(8), squares(8)
    first = strong_view(batch, seeds_of(batch, 5))
    torch.rand(3)
    again = strong_view(batch, seeds_of(batch, 5))
    other = strong_view(batch, seeds_of(batch, 6))
    for field in fields(Batch):
        a, b = getattr(first, field.name), getattr(again, field.name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert not torch.equal(first.image, other.image)
    assert_same(batch, untouched)


def test_strong_view_mirrors_half_of_the_samples():
    batch = squares(400)
    named = strong_view(batch, seeds_of(batch, 0)).sentence
    share = np.mean([text.endswith("right") for text in named])
    assert 0.4 < share < 0.6  # four standard deviations for 400 fair coin flips


def test_strong_view_keeps_the_hue():
    """Brightness and contrast change, but hue does not: red stays the strongest channel of a red square."""
    batch = squares(20)
    batch.image[:, 1:] //= 4
    view = strong_view(batch, seeds_of(batch, 4))
    for row in range(20):
        inside = view.label[row, 0] > 0
        red, green, blue = (view.image[row, channel][inside].float().mean() for channel in range(3))
        assert red > green + 50
        assert red > blue + 50


def test_strong_view_keeps_values_in_range():
    batch = squares(20)
    view = strong_view(batch, seeds_of(batch, 8))
    assert view.image.dtype == torch.uint8
    assert (view.box >= 0).all()
    assert (view.box <= 1).all()
    assert set(view.label.unique().tolist()) <= {0.0, 1.0}
    assert view.proposal.min() >= 0
    assert view.proposal.max() <= 1
