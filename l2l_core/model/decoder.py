"""The hierarchical decoder: coarse to fine, conditioned by guidance tokens and gated by the proposal at every level."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2l_core.model.guidance import fourier

POSITION_FREQUENCIES = 3
SCORE_WEIGHT = 1.5
"""Extra weight of a proposal of score 1 over one of score 0: its logit is multiplied by 1 + SCORE_WEIGHT * score. The
thresholded mask stays the same, but the loss is low where the proposal is right: gradients come from its errors."""
CERTAIN = 0.02
"""Proposals are clamped to [CERTAIN, 1 - CERTAIN] before the logit, so that the network can correct every pixel."""
CROSS_ATTENTION_LEVELS = 3
"""Number of coarsest levels whose pixels attend to the sentence, for any image size; finer levels only sharpen."""
MAX_COMPARED_PIXELS = 256
"""Most pixels (16 x 16) in self-attention, whose cost grows with their square."""
DETAIL_CHANNELS = 8
"""Channels of the fine image detail for the border. Color and its local changes need few."""
BORDER_HIDDEN = 16
SMALLEST_AREA = 1e-3
"""Least divisor for the area of an object or its surroundings, in pixels."""
SMALLEST_DISTANCE = 1e-4
"""Added to the divisor of the likeness, which is 0 where a pixel equals both means."""
NEAR_CELLS = 16
"""Cells per side to which an object mask is pooled, to find its surroundings."""


def positions(height: int, width: int, device: torch.device) -> Tensor:
    """[H * W, 4 * POSITION_FREQUENCIES + 2] float32 encoding of pixel centers (y, x) in 0..1: sentences name places."""
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.cat([grid, fourier(grid, POSITION_FREQUENCIES)], dim=1)


def resized(maps: Tensor, like: Tensor) -> Tensor:
    """Maps [B, 1, h, w] at the height and width of `like`, bilinear."""
    return F.interpolate(maps, like.shape[-2:], mode="bilinear", align_corners=False)


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with weights and bias set to zero: before training, what follows it changes nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class Gate(nn.Module):
    """The proposal as a spatial gate: scales features by 1 + g(proposal, score), per channel and position."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        last = zeroed(nn.Conv2d(dim, dim, 1))  # the gate starts open
        self.net = nn.Sequential(nn.Conv2d(2, dim, 1), nn.GELU(), last)

    def forward(self, features: Tensor, proposal: Tensor, score: Tensor) -> Tensor:
        """features [B, D, h, w]; proposal [B, 1, P, P] in 0..1; score [B] in 0..1 -> [B, D, h, w]."""
        soft = resized(proposal, features)
        trust = score[:, None, None, None].expand_as(soft)
        gated: Tensor = features * (1 + self.net(torch.cat([soft, trust], dim=1)))
        return gated


class Level(nn.Module):
    """One decoder level: join features, condition on sentence and guidance, gate by the proposal, mix neighbors."""

    def __init__(self, channels: int, dim: int, heads: int) -> None:
        super().__init__()
        self.join = nn.Conv2d(channels, dim, 1)
        self.place = nn.Linear(4 * POSITION_FREQUENCIES + 2, dim)
        self.modulate = nn.Linear(dim, 2 * dim)
        self.norm = nn.GroupNorm(1, dim)
        self.gate = Gate(dim)
        self.mix = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1), nn.GroupNorm(1, dim), nn.GELU(), nn.Conv2d(dim, dim, 1)
        )
        self.read_norm = nn.LayerNorm(dim)
        self.read = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(
        self,
        features: Tensor,
        coarser: Tensor | None,
        conditioning: Tensor,
        memory: Tensor | None,
        padding_mask: Tensor,
        proposal: Tensor,
        score: Tensor,
    ) -> Tensor:
        """features [B, D, h, w]; coarser [B, D, h', w']; conditioning [B, D]; memory [B, M, D] -> [B, D, h, w].

        A position encoding is added to each pixel. `conditioning`, the pooled sentence and guidance, then scales and
        shifts every channel (FiLM, Perez et al. 2018). If a memory (guidance and text tokens) is given, each pixel
        attends to it, except to the padding marked in `padding_mask` [B, M] bool. Levels without a memory only sharpen
        the mask.
        """
        x = features
        if coarser is not None:
            x = x + F.interpolate(coarser, x.shape[-2:], mode="bilinear", align_corners=False)
        height, width = x.shape[-2:]
        x = x + self.placed(height, width, x.device).to(x.dtype)
        scale, shift = self.modulate(conditioning)[:, :, None, None].chunk(2, dim=1)
        x = x + self.mix(self.gate(F.gelu(self.norm(x) * (1 + scale) + shift), proposal, score))
        if memory is not None:
            pixels = self.read_norm(x.flatten(2).transpose(1, 2))
            read, _ = self.read(pixels, memory, memory, key_padding_mask=padding_mask, need_weights=False)
            x = x + read.transpose(1, 2).reshape(x.shape)
        return x

    def placed(self, height: int, width: int, device: torch.device) -> Tensor:
        """[1, D, h, w] float32, even under autocast: in bf16, neighboring positions coincide beyond 256 per side."""
        with torch.autocast(device.type, enabled=False):
            return self.place(positions(height, width, device)).T.reshape(1, -1, height, width)


class Border(nn.Module):
    """Moves a mask's border to the edge of the object's appearance, at twice the finest level's size.

    Every pixel is compared with the mean appearance of the object and of its surroundings, both from the coarse mask.
    GrabCut does the same with colors; this is one learnable step. The change is zero before training.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(3, DETAIL_CHANNELS, 3, padding=1), nn.GELU(), nn.Conv2d(DETAIL_CHANNELS, DETAIL_CHANNELS, 1)
        )
        self.project = nn.Conv2d(dim, DETAIL_CHANNELS, 1)
        last = zeroed(nn.Conv2d(BORDER_HIDDEN, 1, 3, padding=1))
        self.change = nn.Sequential(nn.Conv2d(2 * DETAIL_CHANNELS + 4, BORDER_HIDDEN, 3, padding=1), nn.GELU(), last)

    def forward(self, coarse: Tensor, given: Tensor, features: Tensor, detail: Tensor) -> Tensor:
        """Mask logits [B, 1, H, W] float32.

        coarse: mask logits [B, 1, h, w]; given: logits of the proposal, same shape; features: [B, D, h', w'] of the
        finest level; detail: [B, C, H, W] output of `look` on the image.
        """
        logits, given = resized(coarse.float(), detail), resized(given.float(), detail)
        prob = logits.sigmoid()
        likeness = self.likeness(prob, detail.float())
        context = resized(self.project(features), detail)
        inputs = torch.cat([logits / 4, prob, given / 4, likeness, context, detail], dim=1)
        return logits + self.change(inputs.to(detail.dtype)).float()

    def image_detail(self, image: Tensor, like: Tensor) -> Tensor:
        """Scaled images [B, 3, S, S] and the finest features [B, C', h, w] -> image detail [B, C, 2 h, 2 w]."""
        size = [2 * side for side in like.shape[-2:]]
        return cast(Tensor, self.look(F.interpolate(image, size, mode="area")))

    @staticmethod
    def likeness(prob: Tensor, detail: Tensor) -> Tensor:
        """[B, 1, H, W] in -1..1: 1 where a pixel looks like the object, -1 where it looks like the surroundings.

        prob: [B, 1, H, W] object probability; detail: [B, C, H, W].
        """
        near = resized(F.adaptive_avg_pool2d(prob, NEAR_CELLS), detail) * (1 - prob)
        inside, outside = (
            (detail * weight).sum((2, 3), keepdim=True) / weight.sum((2, 3), keepdim=True).clamp(min=SMALLEST_AREA)
            for weight in (prob, near)
        )
        to_object, to_surroundings = (((detail - mean) ** 2).sum(1, keepdim=True) for mean in (inside, outside))
        return (to_surroundings - to_object) / (to_surroundings + to_object + SMALLEST_DISTANCE)


class Decoder(nn.Module):
    """Pyramid + guidance -> mask logits at twice the finest level's size, and a refined proposal."""

    def __init__(self, channels: list[int], dim: int, heads: int, fusion_layers: int = 1) -> None:
        super().__init__()
        self.levels = nn.ModuleList([Level(count, dim, heads) for count in reversed(channels)])  # coarse first
        layer = nn.TransformerDecoderLayer(
            dim, heads, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.fusion = nn.TransformerDecoder(layer, fusion_layers)
        # An untrained network returns its proposal unchanged.
        self.refine = zeroed(nn.Conv2d(dim, 1, 1))
        # Four sub-pixels per position: the mask is twice as fine as the finest level, for one 1x1 convolution.
        last = zeroed(nn.Conv2d(dim, 4, 1))
        self.head = nn.Sequential(nn.GroupNorm(1, dim), last, nn.PixelShuffle(2))
        self.border = Border(dim)

    def forward(
        self,
        pyramid: list[Tensor],
        detail: Tensor,
        conditioning: Tensor,
        memory: Tensor,
        padding_mask: Tensor,
        proposal: Tensor,
        score: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(mask_logits [B, 1, 2 * h0, 2 * w0] float32, refined_logits [B, 1, hf, wf]).

        The mask logits are those of the given proposal plus a correction, which is zero before training.
        pyramid: output of `join`; detail: output of `border.image_detail`; conditioning: [B, D] pooled sentence and
        guidance; memory: [B, M, D] their tokens; padding_mask: [B, M] bool, padding; proposal: [B, 1, P, P] and its
        score [B], both in 0..1.
        Self-attention over pixels compares objects (ordinals, relations). It runs on the finest level that is small
        enough, or on a reduced coarsest level. The proposal is refined there, and the refined proposal gates the finer
        levels instead of the given one.
        """
        trust = 1 + SCORE_WEIGHT * score.float()[:, None, None, None]
        given = trust * proposal.float().clamp(CERTAIN, 1 - CERTAIN).logit()
        coarse_first = pyramid[::-1]
        sizes = [features.shape[-2] * features.shape[-1] for features in coarse_first]
        fuse_at = max((row for row, size in enumerate(sizes) if size <= MAX_COMPARED_PIXELS), default=0)
        x: Tensor | None = None
        refined = proposal
        for row, (level, features) in enumerate(zip(self.levels, coarse_first, strict=True)):
            x = level(
                features,
                x,
                conditioning,
                memory if row < CROSS_ATTENTION_LEVELS else None,
                padding_mask,
                refined,
                score,
            )
            if row == fuse_at:
                x = self.compare(x, memory, padding_mask)
                refined_logits = self.refine(x)
                refined = refined_logits.float().sigmoid().to(x.dtype)
                # From here on, the gate uses the network's own estimate, which exists without a prior too.
                score = torch.ones_like(score)
        correction = self.head(x)
        given = resized(given, correction)
        return self.border(correction + given, given, x, detail), refined_logits

    def join(self, features: list[Tensor]) -> list[Tensor]:
        """Project a backbone's levels [B, C, h, w], finest first, to [B, D, h, w] each."""
        joins = [cast(Level, level).join for level in reversed(self.levels)]
        return [join(one) for join, one in zip(joins, features, strict=True)]

    def compare(self, x: Tensor, memory: Tensor, padding_mask: Tensor) -> Tensor:
        """Self-attention over pixels [B, D, h, w], with cross-attention to the memory -> [B, D, h, w].

        More than MAX_COMPARED_PIXELS pixels are first averaged in cells; each pixel then gets its cell's change.
        """
        height, width = x.shape[-2:]
        if height * width <= MAX_COMPARED_PIXELS:
            pixels = self.fusion(x.flatten(2).transpose(1, 2), memory, memory_key_padding_mask=padding_mask)
            return pixels.transpose(1, 2).reshape(x.shape)
        shrink = math.sqrt(MAX_COMPARED_PIXELS / (height * width))
        cells = F.adaptive_avg_pool2d(x, (max(1, int(height * shrink)), max(1, int(width * shrink))))
        change = self.compare(cells, memory, padding_mask) - cells
        return x + F.interpolate(change, (height, width), mode="bilinear", align_corners=False)
