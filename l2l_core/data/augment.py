"""Views of a batch: a mirrored view, and a strong view for the student."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from l2l_core.data.pairs import Batch

MAX_SCALE = 0.1
"""Largest zoom of the strong view, in or out: objects keep their size class and stay in their third of the image."""
MAX_SHIFT = 0.05
"""Largest shift of the strong view as a share of the side: words such as "left" or "top" stay true."""
MAX_BRIGHTNESS = 0.25
MAX_CONTRAST = 0.25
"""Brightness and contrast vary, but hue does not, because sentences name colors."""
MAX_NOISE = 0.04
"""Standard deviation of the strongest pixel noise, in units of the full range."""

_PAIRS = (("left", "right"), ("lft", "rt"), ("lhs", "rhs"), ("l", "r"))
_MIRRORED = {**dict(_PAIRS), **{right: left for left, right in _PAIRS}}
_SIDE_WORD = re.compile(
    r"\b(?:left|right)(?=(?:most|hand|side|ward|wards|er|s)?\b|-)"
    r"|\b(?:lft|rt|lhs|rhs)\b"
    # A single letter, except in "l-shaped", "L shape", "h&r", "r.i.p" and "they'r".
    r"|(?<![\w'’&.-])[lr](?![\w'’&-]|\.\w|\s+shape|\s*&)"
    r"|(?<![\w:.,])(?:1[0-2]|[1-9])(?=\s?o\s?['’`]?\s?clock)",
    re.IGNORECASE,
)


def mirror_sentence(sentence: str) -> str:
    """Swap left and right in an English sentence; case is kept.

    Covers left and right, also in compounds such as "leftmost" and "right-hand"; the short forms lft, rt, lhs, rhs, l
    and r; and clock positions: "3 o'clock" becomes "9 o'clock".
    """

    def swap(match: re.Match[str]) -> str:
        word = match.group(0)
        if word.isdigit():
            return str(12 - int(word) % 12)
        other = _MIRRORED[word.lower()]
        return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other

    return _SIDE_WORD.sub(swap, sentence)


def mirror(batch: Batch, which: Tensor | None = None) -> Batch:
    """Mirror images, maps, boxes and words of the samples in `which` ([B] bool; None: all)."""
    which = torch.ones(len(batch.sentence), dtype=torch.bool) if which is None else which

    def flip(maps: Tensor | None) -> Tensor | None:
        return None if maps is None else torch.where(which[:, None, None, None], maps.flip(-1), maps)

    mirrored_box = torch.stack([1 - batch.box[:, 2], batch.box[:, 1], 1 - batch.box[:, 0], batch.box[:, 3]], dim=1)
    chosen = which.tolist()
    return replace(
        batch,
        image=torch.where(which[:, None, None, None], batch.image.flip(-1), batch.image),
        sentence=[mirror_sentence(text) if m else text for text, m in zip(batch.sentence, chosen, strict=True)],
        prior_text=[mirror_sentence(text) if m else text for text, m in zip(batch.prior_text, chosen, strict=True)],
        box=torch.where((which & batch.has_box)[:, None], mirrored_box, batch.box),
        proposal=torch.where(which[:, None, None, None], batch.proposal.flip(-1), batch.proposal),
        label=flip(batch.label),
        keep=flip(batch.keep),
    )


def strong_view(batch: Batch, seeds: Sequence[int], *, flip: bool = True) -> Batch:
    """Mirror half of the samples (if `flip`), zoom and shift slightly, change light and add noise; targets follow.

    seeds: one for each of the B samples. Only its seed determines a sample's view, so it is the same in any batch.
    Pixels from outside the image are black and have keep 0.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = torch.stack([torch.rand(7, generator=generator) for generator in generators])
    flipped, strength = drawn[:, 0] < 0.5, drawn[:, 1]
    zoom_by, shift_x, shift_y, contrast, brightness = (2 * drawn[:, 2:] - 1).unbind(1)
    batch = mirror(batch, flipped) if flip else batch
    zoom, shift = 1 + zoom_by * MAX_SCALE, 2 * MAX_SHIFT * torch.stack([shift_x, shift_y], dim=1)

    def sources(height: int, width: int) -> Tensor:
        """[B, h, w, 2] source position of each pixel of the view, x and y in -1..1: (position - shift) / zoom."""
        x, y = (
            (((2 * torch.arange(side) + 1) / side - 1) - by[:, None]) / zoom[:, None]
            for side, by in ((width, shift[:, 0]), (height, shift[:, 1]))
        )
        return torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)

    def warp(maps: Tensor, grid: Tensor, mode: str, padding: str = "zeros") -> Tensor:
        return F.grid_sample(maps, grid, mode=mode, padding_mode=padding, align_corners=False)

    grid = sources(*batch.image.shape[-2:])  # for image, label and keep
    image = warp(batch.image.float() / 255, grid, "bilinear")
    image = (image - 0.5) * (1 + contrast * MAX_CONTRAST)[:, None, None, None] + 0.5
    image = image + (brightness * MAX_BRIGHTNESS)[:, None, None, None]
    noise = torch.stack([torch.randn(image.shape[1:], generator=generator) for generator in generators])
    image = image + (strength * MAX_NOISE)[:, None, None, None] * noise
    offset = torch.cat([shift, shift], dim=1)
    box = (((2 * batch.box - 1) * zoom[:, None] + offset + 1) / 2).clamp(0, 1)
    label = None if batch.label is None else warp(batch.label, grid, "nearest")
    keep = None if batch.keep is None else warp(batch.keep, grid, "nearest")
    return replace(
        batch,
        image=(image.clamp(0, 1) * 255).round().to(torch.uint8),
        box=torch.where(batch.has_box[:, None], box, batch.box),
        proposal=warp(batch.proposal, sources(*batch.proposal.shape[-2:]), "bilinear", padding="border"),
        label=label,
        keep=keep,
    )
