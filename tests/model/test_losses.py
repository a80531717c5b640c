import math

import pytest
import torch
from torch.nn import functional as F

from l2l_core.model.losses import masked_bce, masked_dice, segmentation_loss
from l2l_core.model.segmenter import Output


def maps(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coin(seed: int, *shape: int) -> torch.Tensor:
    return (maps(seed, *shape) > 0).double()


def test_bce_matches_hand_computed_value():
    """Logit 0 costs log 2 for any label. Logit log 3 is probability 3/4 and costs -log(3/4) or -log(1/4)."""
    logits = torch.tensor([0.0, math.log(3), math.log(3), -7.0]).view(1, 1, 2, 2)
    label = torch.tensor([1.0, 1.0, 0.0, 1.0]).view(1, 1, 2, 2)
    keep = torch.tensor([1.0, 1.0, 1.0, 0.0]).view(1, 1, 2, 2)
    expected = (math.log(2) + math.log(4 / 3) + math.log(4)) / 3
    assert masked_bce(logits, label, keep).item() == pytest.approx(expected)


def test_dice_matches_hand_computed_value():
    """Probabilities 1/2, 3/4 (label 1) and 1/4 (label 0): 1 - (2 * 1.25 + 1) / (1.5 + 2 + 1) = 1 - 3.5 / 4.5."""
    logits = torch.tensor([0.0, math.log(3), -math.log(3), 9.0]).view(1, 1, 2, 2)
    label = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 2, 2)
    keep = torch.tensor([1.0, 1.0, 1.0, 0.0]).view(1, 1, 2, 2)
    assert masked_dice(logits, label, keep).item() == pytest.approx(1 - 3.5 / 4.5)


def test_a_perfect_mask_has_zero_loss_and_an_inverted_one_the_maximum():
    label = coin(1, 1, 1, 16, 16)
    sure = 60 * (2 * label - 1)
    keep = torch.ones_like(label)
    assert masked_dice(sure, label, keep).item() == pytest.approx(0, abs=1e-9)
    assert masked_bce(sure, label, keep).item() == pytest.approx(0, abs=1e-9)
    assert masked_dice(-sure, label, keep).item() > 0.99
    assert masked_bce(-sure, label, keep).item() == pytest.approx(60)


def test_bce_equals_torch_if_all_pixels_are_kept():
    logits, label = maps(2, 3, 1, 8, 8), coin(3, 3, 1, 8, 8)
    own = masked_bce(logits, label, torch.ones_like(label))
    for row in range(3):
        assert own[row].item() == pytest.approx(F.binary_cross_entropy_with_logits(logits[row], label[row]).item())


def total(mask_logits, refined_logits, label, keep):
    """Return the loss and its gradients with respect to both kinds of logits."""
    mask_logits = mask_logits.clone().requires_grad_()
    refined_logits = refined_logits.clone().requires_grad_()
    loss = segmentation_loss(Output(mask_logits, refined_logits), label, keep)
    return loss, torch.autograd.grad(loss.total, (mask_logits, refined_logits))


def test_dropped_pixels_affect_neither_loss_nor_gradient():
    logits, refined, label, keep = maps(4, 4, 1, 8, 8), maps(5, 4, 1, 4, 4), coin(6, 4, 1, 8, 8), coin(7, 4, 1, 8, 8)
    loss, grads = total(logits, refined, label, keep)
    other, other_grads = total(
        torch.where(keep > 0, logits, maps(8, 4, 1, 8, 8) * 5), refined, torch.where(keep > 0, label, 1 - label), keep
    )
    assert other.total.item() == pytest.approx(loss.total.item(), rel=1e-12)
    for first, second in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(first, second)
    assert (grads[0][keep == 0] == 0).all()
    assert (grads[0][keep > 0] != 0).all()


def test_a_sample_without_kept_pixels_does_not_affect_the_loss():
    logits, refined, label, keep = maps(9, 3, 1, 8, 8), maps(10, 3, 1, 4, 4), coin(11, 3, 1, 8, 8), coin(12, 3, 1, 8, 8)
    keep[1] = 0
    loss, grads = total(logits, refined, label, keep)
    kept = [0, 2]
    alone, alone_grads = total(logits[kept], refined[kept], label[kept], keep[kept])
    for name in ("total", "bce", "dice"):
        assert getattr(loss, name).item() == pytest.approx(getattr(alone, name).item(), rel=1e-12)
    for together, separate in zip(grads, alone_grads, strict=True):
        torch.testing.assert_close(together[kept], separate)
        assert (together[1] == 0).all()


def test_a_batch_without_kept_pixels_has_zero_loss_and_gradient():
    logits, refined, label = maps(13, 2, 1, 8, 8), maps(14, 2, 1, 4, 4), coin(15, 2, 1, 8, 8)
    loss, grads = total(logits, refined, label, torch.zeros_like(label))
    assert loss.total.item() == 0
    assert all((gradient == 0).all() for gradient in grads)


def test_batch_loss_is_the_mean_over_samples():
    logits, refined, label, keep = (
        maps(16, 3, 1, 8, 8),
        maps(17, 3, 1, 4, 4),
        coin(18, 3, 1, 8, 8),
        coin(19, 3, 1, 8, 8),
    )
    keep[2, :, :4] = 0  # samples have equal weight, whatever their number of kept pixels
    whole, _ = total(logits, refined, label, keep)
    each = [total(*(part[row : row + 1] for part in (logits, refined, label, keep)))[0] for row in range(3)]
    assert whole.total.item() == pytest.approx(sum(loss.total.item() for loss in each) / 3)
    assert whole.bce.item() == pytest.approx(masked_bce(logits, label, keep).mean().item())
    assert whole.dice.item() == pytest.approx(masked_dice(logits, label, keep).mean().item())


def test_weighted_losses_match_hand_computed_values():
    """BCE costs log 2 at weight 1, log 4/3 at 1/2, and log 4 at 1/4. Dice: 1 - (2 * 0.875 + 1) / (1.0625 + 1.5 + 1)."""
    logits = torch.tensor([0.0, math.log(3), math.log(3), -7.0]).view(1, 1, 2, 2)
    label = torch.tensor([1.0, 1.0, 0.0, 1.0]).view(1, 1, 2, 2)
    weight = torch.tensor([1.0, 0.5, 0.25, 0.0]).view(1, 1, 2, 2)
    expected = (math.log(2) + math.log(4 / 3) / 2 + math.log(4) / 4) / 1.75
    assert masked_bce(logits, label, weight).item() == pytest.approx(expected)
    assert masked_dice(logits, label, weight).item() == pytest.approx(1 - 2.75 / 3.5625)


def test_a_perfect_mask_has_zero_loss_for_any_weights():
    label, weight = coin(20, 1, 1, 16, 16), maps(21, 1, 1, 16, 16).sigmoid()
    sure = 60 * (2 * label - 1)
    assert masked_dice(sure, label, weight).item() == pytest.approx(0, abs=1e-9)
    assert masked_bce(sure, label, weight).item() == pytest.approx(0, abs=1e-9)


def test_two_pixels_of_half_weight_equal_one_pixel():
    """Every pixel is doubled, each copy with half the weight. The loss does not change, whatever the weights."""
    logits, refined, label = maps(22, 3, 1, 8, 8), maps(23, 3, 1, 4, 4), coin(24, 3, 1, 8, 8)
    weight = maps(25, 3, 1, 8, 8).sigmoid() * coin(26, 3, 1, 8, 8)
    once, _ = total(logits, refined, label, weight)
    wide_logits, wide_label, half = (part.repeat_interleave(2, dim=-1) for part in (logits, label, weight / 2))
    twice, _ = total(wide_logits, refined, wide_label, half)
    for name in ("total", "bce", "dice"):
        assert getattr(twice, name).item() == pytest.approx(getattr(once, name).item(), rel=1e-12)


def test_halving_all_weights_keeps_the_gradient():
    """This is exact for BCE, which is a mean. Dice differs by its smoothing of one pixel."""
    logits, label, weight = maps(27, 2, 1, 32, 32), coin(28, 2, 1, 32, 32), coin(29, 2, 1, 32, 32)
    for loss_of, tolerance in ((masked_bce, 1e-12), (masked_dice, 1e-2)):
        grads = []
        for scale in (1.0, 0.5):
            leaf = logits.clone().requires_grad_()
            grads.append(torch.autograd.grad(loss_of(leaf, label, scale * weight).sum(), leaf)[0])
        assert (grads[0] - grads[1]).norm() <= tolerance * grads[0].norm()
        assert grads[0].norm() > 0


def test_a_sample_with_tiny_weights_contributes_fully():
    """One pixel has the smallest weight that a stored map can hold. The batch loss is the loss of this sample, not
    half of it."""
    logits, refined, label = maps(30, 2, 1, 8, 8), maps(31, 2, 1, 4, 4), coin(32, 2, 1, 8, 8)
    weight = torch.zeros_like(label)
    weight[0, 0, 3, 3] = 1 / 255
    loss, grads = total(logits, refined, label, weight)
    assert loss.bce.item() == pytest.approx(
        F.binary_cross_entropy_with_logits(logits[0, 0, 3, 3], label[0, 0, 3, 3]).item()
    )
    assert (grads[0] != 0).sum() == 1


def test_refined_proposal_learns_the_label_share_of_each_cell():
    """Cells of 4 x 4 pixels have foreground shares of 1/4, 0, 1, and 1/2."""
    label = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    label[0, 0, :2, :2], label[0, 0, 4:, :4], label[0, 0, 4:, 4:6] = 1, 1, 1
    refined = torch.zeros(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([refined], max_iter=200)
    logits = torch.zeros_like(label)

    def closure():
        optimizer.zero_grad()
        loss = segmentation_loss(Output(logits, refined), label, torch.ones_like(label)).total
        loss.backward()
        return loss

    optimizer.step(closure)
    share = refined.sigmoid().detach().flatten()
    torch.testing.assert_close(share, torch.tensor([0.25, 0, 1, 0.5], dtype=torch.float64), atol=1e-3, rtol=0)
