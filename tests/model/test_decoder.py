import math

import pytest
import torch

from l2l_core.model.decoder import Border, Decoder, Gate, positions
from l2l_core.model.guidance import Guidance, fourier

DIM = 16


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(sides: tuple[int, ...] = (16, 8, 4), batch: int = 2) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    padding_mask = torch.zeros(batch, 5, dtype=torch.bool)
    padding_mask[:, 3:] = True
    return {
        "pyramid": [random(side, batch, 6 + row, side, side) for row, side in enumerate(sides)],
        "conditioning": random(1, batch, DIM),
        "memory": random(2, batch, 5, DIM),
        "padding_mask": padding_mask,
        "proposal": random(3, batch, 1, 12, 12).sigmoid(),
        "score": torch.full((batch,), 0.7),
    }


def answer(network: Decoder, given: dict) -> tuple[torch.Tensor, torch.Tensor]:
    finest = given["pyramid"][0]
    image = given.get("image", random(9, 1, 3, *(4 * side for side in finest.shape[-2:])).repeat(len(finest), 1, 1, 1))
    detail = network.border.image_detail(image, finest)
    given = {name: value for name, value in given.items() if name != "image"}
    return network(**given | {"pyramid": network.join(given["pyramid"]), "detail": detail})


def decoder(levels: int = 3) -> Decoder:
    torch.manual_seed(0)
    made = Decoder([6 + row for row in range(levels)], DIM, heads=2).eval()
    for parameter in made.parameters():  # including those initialized to zero
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize(
    ("sides", "refined_side"),
    [((16, 8, 4), 16), ((32, 16, 8), 16), ((64, 32, 24), 24), ((8, 8, 8), 8)],
)
def test_masks_and_refined_proposals_have_the_expected_size(sides, refined_side):
    """Masks are twice as fine as the finest level. Refined proposals have the size of the finest level of at most 16
    x 16 pixels, or of the coarsest level if all are larger."""
    mask_logits, refined_logits = answer(decoder(), inputs(sides))
    assert mask_logits.shape == (2, 1, 2 * sides[0], 2 * sides[0])
    assert refined_logits.shape == (2, 1, refined_side, refined_side)


def test_decoder_accepts_images_that_are_not_square():
    given = inputs()
    given["pyramid"] = [random(4, 2, 6, 12, 20), random(5, 2, 7, 6, 10), random(6, 2, 8, 3, 5)]
    mask_logits, refined_logits = answer(decoder(), given)
    assert mask_logits.shape == (2, 1, 24, 40)
    assert refined_logits.shape == (2, 1, 12, 20)


def test_decoder_ignores_padding_tokens_only():
    network, given = decoder(), inputs()
    with torch.no_grad():
        before = answer(network, given)
        given["memory"][:, 3:] = 50.0
        after = answer(network, given)
        given["memory"][:, 2] += 1.0
        other = answer(network, given)
    for first, second in zip(before, after, strict=True):
        torch.testing.assert_close(first, second)
    assert not torch.allclose(other[0], after[0])


@pytest.mark.parametrize("name", ["conditioning", "proposal", "score"])
def test_conditioning_and_proposal_affect_mask_and_refined_proposal(name):
    network, given = decoder(), inputs()
    with torch.no_grad():
        before = answer(network, given)
        given[name] = given[name] * 0.5 + 0.1
        after = answer(network, given)
    for first, second in zip(before, after, strict=True):
        assert not torch.allclose(first, second)


def test_every_pyramid_level_affects_the_mask():
    network = decoder()
    with torch.no_grad():
        before = answer(network, inputs())[0]
        for level in range(3):
            given = inputs()
            given["pyramid"][level] = given["pyramid"][level] * 0.5
            assert not torch.allclose(answer(network, given)[0], before)


def test_samples_of_a_batch_are_independent():
    network, given = decoder(), inputs(batch=3)
    with torch.no_grad():
        together = answer(network, given)
        single = {name: given[name][1:2] for name in ("conditioning", "memory", "padding_mask", "proposal", "score")}
        alone = answer(network, {"pyramid": [level[1:2] for level in given["pyramid"]], **single})
    for whole, single in zip(together, alone, strict=True):
        torch.testing.assert_close(whole[1:2], single, rtol=1e-4, atol=1e-4)


def test_a_new_gate_leaves_features_unchanged():
    """Training starts from features that do not depend on the proposal."""
    torch.manual_seed(0)
    features = random(1, 2, DIM, 8, 8)
    assert torch.equal(Gate(DIM)(features, random(2, 2, 1, 5, 5).sigmoid(), torch.ones(2)), features)


def test_full_resolution_image_affects_the_mask():
    network, given = decoder(), inputs()
    with torch.no_grad():
        before, _ = answer(network, given | {"image": random(7, 2, 3, 64, 64)})
        after, _ = answer(network, given | {"image": random(8, 2, 3, 64, 64)})
    assert not torch.allclose(before, after)


def test_a_new_border_leaves_the_mask_unchanged():
    torch.manual_seed(0)
    coarse = random(1, 2, 1, 8, 8)
    moved = Border(DIM)(coarse, coarse, random(2, 2, DIM, 4, 4), random(3, 2, 8, 8, 8))
    assert torch.equal(moved, coarse)


def test_likeness_separates_object_and_background_beyond_the_mask():
    """The two halves of the image look different. The mask covers part of the left half and a strip of the right
    one."""
    detail = torch.zeros(1, 8, 32, 32)
    detail[..., 16:] = 1.0
    prob = torch.zeros(1, 1, 32, 32)
    prob[..., 8:24, 4:16] = 1.0
    prob[..., 8:24, 16:18] = 0.5
    likeness = Border.likeness(prob, detail)
    assert likeness.abs().max() <= 1
    assert (likeness[..., :16] > 0.3).all()  # also left of the mask
    assert (likeness[..., 16:] < -0.3).all()  # also where the mask extends too far


def test_likeness_of_a_uniform_image_is_zero():
    assert torch.equal(
        Border.likeness(random(1, 1, 1, 8, 8).sigmoid(), torch.ones(1, 8, 8, 8)), torch.zeros(1, 1, 8, 8)
    )


def scenes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rectangles of one color on another [N, 3, 32, 32], their masks, and blurred mask logits [N, 1, 8, 8]."""
    draws = torch.Generator().manual_seed(seed)
    colors = torch.rand(count, 2, 3, 1, 1, generator=draws)
    low, size = (torch.randint(*span, (count, 2), generator=draws) for span in ((2, 14), (9, 16)))
    place = torch.arange(32)
    inside = [(place >= low[:, [axis]]) & (place < (low + size)[:, [axis]]) for axis in (0, 1)]
    mask = (inside[0][:, :, None] & inside[1][:, None, :])[:, None].float()
    coarse = torch.nn.functional.adaptive_avg_pool2d(mask, 8).clamp(0.05, 0.95).logit()
    return torch.where(mask > 0, colors[:, 0], colors[:, 1]), mask, coarse


def test_border_learns_to_follow_image_edges():
    """After training on some scenes, it sharpens the masks of scenes with unseen colors."""
    torch.manual_seed(0)
    border = Border(DIM)
    optimizer = torch.optim.Adam(border.parameters(), lr=0.01)

    def ask(image: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
        features = torch.zeros(len(image), DIM, 16, 16)
        return border(coarse, coarse, features, border.image_detail(image, features))

    for step in range(60):
        image, mask, coarse = scenes(16, step)
        torch.nn.functional.binary_cross_entropy_with_logits(ask(image, coarse), mask).backward()
        optimizer.step()
        optimizer.zero_grad()
    image, mask, coarse = scenes(32, 1000)
    with torch.no_grad():
        found = ask(image, coarse) > 0
    blurred = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear") > 0
    wrong, wrong_before = ((guess != (mask > 0)).float().mean() for guess in (found, blurred))
    assert wrong < 0.7 * wrong_before


CPU = torch.device("cpu")


@pytest.mark.parametrize("image_px", [96, 480, 640])
def test_the_three_coarsest_levels_read_the_sentence_at_any_image_size(image_px):
    network = decoder(levels=4)
    given = inputs(tuple(image_px // stride for stride in (4, 8, 16, 32)), batch=1)
    answer(network, given)[0].square().mean().backward()
    read = [level.read.in_proj_weight.grad is not None for level in network.levels]
    assert read == [True, True, True, False]  # coarsest first


@pytest.mark.parametrize("side", [16, 17, 40])
def test_comparison_covers_the_whole_map_with_at_most_256_cells(side):
    network, seen = decoder(), []
    memory, padding_mask = random(1, 1, 5, DIM), torch.zeros(1, 5, dtype=torch.bool)
    network.fusion.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    x = random(2, 1, DIM, side, side).requires_grad_()
    changed = network.compare(x, memory, padding_mask) - x
    assert changed.shape == x.shape
    assert len(seen) == 1
    assert 15 * 15 <= seen[0] <= 256
    (gradient,) = torch.autograd.grad(changed[0, :, 0, 0].sum(), x)  # every pixel affects this corner
    assert (gradient[0].abs().sum(0) > 0).all()


def test_comparing_cells_equals_comparing_pixels_on_a_flat_map():
    """Averages of equal pixels are exact, so a map of 20 x 20 changes like a map of 16 x 16."""
    network = decoder()
    memory, padding_mask = random(1, 1, 5, DIM), torch.zeros(1, 5, dtype=torch.bool)
    flat = random(2, 1, DIM, 1, 1)
    with torch.no_grad():
        large, small = (network.compare(flat.expand(1, DIM, side, side), memory, padding_mask) for side in (20, 16))
    torch.testing.assert_close(large, small[..., :1, :1].expand_as(large), rtol=1e-4, atol=1e-4)


def test_neighboring_positions_differ_in_half_precision():
    """At 640 px, the finest level has 160 positions per side. bf16 cannot separate 1,024 positions in 0..1."""
    network = decoder().levels[0]
    with torch.autocast("cpu", torch.bfloat16):
        placed = network.placed(1, 1024, CPU)
    assert placed.dtype == torch.float32
    assert (placed[0, :, 0, 1:] - placed[0, :, 0, :-1]).abs().amax(0).min() > 1e-4
    torch.testing.assert_close(placed, network.placed(1, 1024, CPU))


def test_positions_are_pixel_centers_in_row_order():
    places = positions(2, 4, CPU)
    expected = [(y, x) for y in (0.25, 0.75) for x in (0.125, 0.375, 0.625, 0.875)]
    torch.testing.assert_close(places[:, :2], torch.tensor(expected))
    assert len({tuple(row) for row in places.tolist()}) == 8


def test_fourier_features_match_hand_computed_values():
    """0.25 at the octaves pi and 2 pi gives the angles pi / 4 and pi / 2."""
    half = math.sqrt(0.5)
    expected = torch.tensor([[half, 1.0, half, 0.0]])
    torch.testing.assert_close(fourier(torch.tensor([[0.25]]), 2), expected, atol=1e-6, rtol=0)


# --- guidance tokens


def guidance_inputs() -> dict[str, torch.Tensor]:
    padding_mask = torch.zeros(2, 4, dtype=torch.bool)
    padding_mask[:, 3] = True
    return {
        "text": random(1, 2, 4, DIM),
        "text_padding_mask": padding_mask,
        "box": torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.3, 0.3, 0.9, 0.8]]),
        "has_box": torch.tensor([True, False]),
        "features": random(2, 2, DIM, 4, 4),
        "proposal": random(3, 2, 1, 8, 8).sigmoid(),
        "score": torch.tensor([0.8, 0.0]),
    }


def guidance() -> Guidance:
    torch.manual_seed(1)
    made = Guidance(DIM, heads=2, tokens=3).eval()
    torch.nn.init.normal_(made.no_box)
    return made


def test_guidance_depends_on_text_box_features_score_and_proposal():
    network = guidance()
    with torch.no_grad():
        before = network(**guidance_inputs())
        assert before.shape == (2, 3, DIM)
        for name in ("text", "box", "features", "score"):
            given = guidance_inputs()
            given[name] = given[name] * 0.5
            assert not torch.allclose(network(**given)[0], before[0]), name
        given = guidance_inputs()
        given["proposal"] = 1 - given["proposal"]
        assert not torch.allclose(network(**given)[0], before[0])


def test_guidance_ignores_padding_and_missing_boxes():
    network, given = guidance(), guidance_inputs()
    with torch.no_grad():
        before = network(**given)
        given["text"][:, 3] = 9.0
        given["box"][1] = 0.7
        after = network(**given)
    torch.testing.assert_close(before, after)


def test_an_empty_proposal_gives_finite_guidance():
    given = guidance_inputs()
    given["proposal"] = torch.zeros_like(given["proposal"])
    assert guidance()(**given).isfinite().all()


def test_guidance_pools_features_only_inside_the_proposal():
    network, given = guidance(), guidance_inputs()
    given["proposal"] = torch.zeros(2, 1, 4, 4)
    given["proposal"][:, :, :2] = 1
    with torch.no_grad():
        before = network(**given)
        given["features"][:, :, 2:] = -3.0
        outside_changed = network(**given)
        given["features"][:, :, :2] = -3.0
        inside_changed = network(**given)
    torch.testing.assert_close(before, outside_changed)
    assert not torch.allclose(before, inside_changed)
