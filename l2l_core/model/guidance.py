"""Guidance tokens: summarize the sentence, the prior and the proposal for the decoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BOX_FREQUENCIES = 4
"""Octaves of the box encoding: the finest period is 1/8 of the image, about an object's size."""


def fourier(values: Tensor, frequencies: int) -> Tensor:
    """Coordinates [..., K] in 0..1 -> sines and cosines [..., 2 * K * frequencies]."""
    octaves = math.pi * 2.0 ** torch.arange(frequencies, device=values.device, dtype=values.dtype)
    angles = (values[..., None] * octaves).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Guidance(nn.Module):
    """Learnable queries attend to the sentence, the prior's text and box, and the image inside the proposal."""

    def __init__(self, dim: int, heads: int, tokens: int, layers: int = 2) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, dim) / math.sqrt(dim))
        self.box = nn.Sequential(nn.Linear(8 * BOX_FREQUENCIES + 1, dim), nn.GELU(), nn.Linear(dim, dim))
        self.no_box = nn.Parameter(torch.zeros(dim))
        self.pooled = nn.Linear(dim, dim)
        layer = nn.TransformerDecoderLayer(
            dim, heads, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, layers, norm=nn.LayerNorm(dim))

    def forward(
        self,
        text: Tensor,
        text_padding_mask: Tensor,
        box: Tensor,
        has_box: Tensor,
        features: Tensor,
        proposal: Tensor,
        score: Tensor,
    ) -> Tensor:
        """Guidance tokens [B, T, D].

        text: [B, L, D] encoded sentence and prior text; text_padding_mask: [B, L] bool, padding. box: [B, 4] in 0..1;
        has_box: [B] bool. features: [B, D, h, w] one level of the pyramid. proposal: [B, 1, P, P] in 0..1;
        score: [B] in 0..1.
        """
        box_token = self.box(torch.cat([fourier(box, BOX_FREQUENCIES), score[:, None]], dim=1))
        box_token = torch.where(has_box[:, None], box_token, self.no_box.to(box_token.dtype))
        weight = F.interpolate(proposal, features.shape[-2:], mode="bilinear", align_corners=False)
        inside = (features * weight).sum((2, 3)) / weight.sum((2, 3)).clamp(min=1e-4)
        extra = torch.stack([box_token, self.pooled(inside)], dim=1)
        memory = torch.cat([text, extra], dim=1)
        padding_mask = F.pad(text_padding_mask, (0, extra.shape[1]), value=False)
        queries = self.queries.expand(len(text), -1, -1)
        return self.layers(queries, memory, memory_key_padding_mask=padding_mask)
