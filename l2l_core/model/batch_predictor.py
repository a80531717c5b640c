"""The only path from a trained network to masks: batches of pairs, for evaluation, teachers and single images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from l2l_core.config import TrainParams
from l2l_core.core.device import Precision, autocast, choose_device, resolve_precision, to_device
from l2l_core.core.masks import encode_rle
from l2l_core.core.progress import progress
from l2l_core.core.threads import prefetch
from l2l_core.data.augment import mirror
from l2l_core.data.pairs import Batch, BatchMaker, Pairs
from l2l_core.data.views import Views
from l2l_core.model.segmenter import Pyramid, Segmenter

IMAGES_AT_ONCE = 16
"""Most images encoded at once, further limited by `batch_size`; enough to keep a GPU busy."""
CHUNK_PAIRS = 1024
"""Pairs that are computed and stored together. A kill loses at most these; the images of a chunk fill IMAGES_AT_ONCE
several times, so that padding its last images costs little."""


@dataclass(frozen=True)
class BatchPredictor:
    """A trained network, ready to predict for batches of pairs."""

    network: Segmenter
    device: torch.device
    precision: Precision

    @classmethod
    def of(cls, network: Segmenter, params: TrainParams) -> Self:
        """Put a network in evaluation mode on the configured device."""
        device = choose_device(params.engine.device)
        network = network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        return cls(network, device, resolve_precision(params.precision, device))

    @classmethod
    def from_run(cls, folder: str | Path, params: TrainParams) -> Self:
        """Load a model folder with a project's device and precision. Raises ArtifactError without a usable model."""
        return cls.of(Segmenter.load(folder), params)

    @torch.inference_mode()
    def encode(self, image: Tensor) -> Pyramid:
        """Images [B, 3, S, S] uint8 -> their pyramid, on the device."""
        with autocast(self.device, self.precision):
            return self.network.encode_image(image.to(self.device))

    @torch.inference_mode()
    def logits(self, batch: Batch, pyramid: Pyramid | None = None) -> Tensor:
        """Mask logits [B, 1, S, S] float32 on the CPU, after the network's number of passes.

        pyramid: of the batch's images, if already encoded.
        """
        pyramid = self.encode(batch.image) if pyramid is None else pyramid
        tokens = to_device(self.network.tokenize(batch), self.device)
        with autocast(self.device, self.precision):
            logits = self.network.predict_logits(pyramid, batch.to(self.device), tokens)
        return logits.float().cpu()

    def masks(
        self,
        batches: BatchMaker,
        batch_size: int,
        with_prior: Sequence[bool],
        what: str | None,
        *,
        fill: bool = True,
    ) -> list[list[bytes]]:
        """Masks (probability > 0.5) of all pairs at their image's own size as run lengths, in the order of the pairs.

        Returns one list per entry of `with_prior`, which says whether the network sees the priors. what: name of the
        progress bar; None shows none. fill: pad incomplete batches, so that the bytes of a mask depend only on its own
        pair and batch_size. Without it, nothing is padded and logits can differ by rounding.
        """
        found = [[b""] * len(batches.pairs) for _ in with_prior]
        for rows, masks in self.batched_masks(batches, batch_size, with_prior, what, fill=fill):
            for some, new in zip(found, masks, strict=True):
                for row, mask in zip(rows.tolist(), new, strict=True):
                    some[row] = mask
        return found

    def batched_masks(
        self,
        batches: BatchMaker,
        batch_size: int,
        with_prior: Sequence[bool],
        what: str | None,
        *,
        fill: bool = True,
    ) -> Iterator[tuple[NDArray[np.int64], list[list[bytes]]]]:
        """As `masks`, batch by batch: yields rows [B] of pairs, in the order of `rows_by_image`, with their masks."""
        pairs = batches.pairs

        def computed() -> Iterator[tuple[NDArray[np.int64], list[Tensor]]]:
            for block in self._blocks(batches, batch_size, what, fill=fill):
                logits = []
                for shown in with_prior:
                    hidden = np.full(len(block.rows), not shown)
                    batch = batches(block.rows, None, hidden, block.images.pixels)
                    logits.append(self.logits(batch, block.images.pyramid))
                yield block.rows[: block.count], logits

        for rows, logits in prefetch(computed()):
            sizes = pairs.hw[rows].tolist()
            yield (
                rows,
                [[encode_rle(at_size(one[place], *size) > 0) for place, size in enumerate(sizes)] for one in logits],
            )

    def views(
        self, batches: BatchMaker, batch_size: int, what: str | None
    ) -> Iterator[tuple[NDArray[np.int64], Views]]:
        """This teacher's predictions for all pairs: yields rows [B] of pairs, by image, with their views.

        The network runs with the prior, mirrored, and without the prior. The rows are in the order of `rows_by_image`.
        The bytes of a view depend only on its own pair and batch_size. what: name of the progress bar; None shows none.
        """
        pairs = batches.pairs
        words = np.array([len(sentence.split()) for sentence in pairs.sentence], dtype=np.int64)
        for block in self._blocks(batches, batch_size, what, fill=True, mirrored=True):
            images, count, rows = block.images, block.count, block.rows[: block.count]
            batch = batches(block.rows, None, None, images.pixels)
            bare = batches(block.rows, None, np.ones(len(block.rows), dtype=bool), images.pixels)
            size = batch.image.shape[-1]
            prob = self.logits(batch, images.pyramid).sigmoid()
            flipped = self.logits(mirror(batch), images.mirrored).sigmoid().flip(-1)
            without = self.logits(bare, images.pyramid).sigmoid()
            proposal = F.interpolate(batch.proposal, (size, size), mode="bilinear", align_corners=False)
            views = Views(
                sent_id=pairs.sent_id[rows],
                image=batch.image[:count].permute(0, 2, 3, 1).numpy(),
                prob=prob[:count, 0].numpy(),
                prob_flipped=flipped[:count, 0].numpy(),
                prob_no_prior=without[:count, 0].numpy(),
                proposal=proposal[:count, 0].numpy(),
                proposal_score=batch.proposal_score[:count].numpy(),
                predicted_iou=pairs.predicted_iou[rows],
                words=words[rows],
            )
            yield rows, views

    def _images(self, pixels: Tensor, *, mirrored: bool) -> _Images:
        return _Images(pixels, self.encode(pixels), self.encode(pixels.flip(-1)) if mirrored else None)

    def _blocks(
        self,
        batches: BatchMaker,
        batch_size: int,
        what: str | None,
        *,
        fill: bool,
        mirrored: bool = False,
    ) -> Iterator[_Block]:
        """All pairs by image, `batch_size` at a time; each image is encoded once, and once mirrored if `mirrored`.

        fill: pad incomplete batches of images and pairs with repeats, because kernels for other sizes sum in another
        order. Images are encoded min(IMAGES_AT_ONCE, batch_size) at a time, so that a smaller `batch_size` also needs
        less memory for images.
        """
        at_once = min(IMAGES_AT_ONCE, batch_size)
        order = rows_by_image(batches.pairs)
        image_rows, rank = np.unique(batches.pairs.image_row[order], return_inverse=True)
        held: dict[int, _Images] = {}
        for positions in batched_rows(len(order), batch_size, what):
            full = _filled(positions, batch_size) if fill else positions
            groups, slots = np.divmod(rank[full], at_once)
            encoded, held = held, {}
            for group in np.unique(groups).tolist():
                if group not in encoded:
                    some = image_rows[group * at_once : (group + 1) * at_once]
                    pixels = batches.pixels(_filled(some, at_once) if fill else some)
                    encoded[group] = self._images(pixels, mirrored=mirrored)
                held[group] = encoded[group]
            # Groups ascend with the positions, so the parts are in the order of the positions.
            parts = [images.take(torch.from_numpy(slots[groups == group])) for group, images in held.items()]
            yield _Block(order[full], len(positions), _Images.cat(parts))


@dataclass(frozen=True)
class _Images:
    """B images with their encodings."""

    pixels: Tensor  # [B, 3, S, S] uint8
    pyramid: Pyramid
    mirrored: Pyramid | None  # of the mirrored images

    def take(self, rows: Tensor) -> _Images:
        mirrored = None if self.mirrored is None else self.mirrored.take(rows)
        return _Images(self.pixels[rows], self.pyramid.take(rows), mirrored)

    @classmethod
    def cat(cls, parts: Sequence[_Images]) -> _Images:
        if len(parts) == 1:
            return parts[0]
        mirrored = [part.mirrored for part in parts if part.mirrored is not None]
        return cls(
            torch.cat([part.pixels for part in parts]),
            Pyramid.cat([part.pyramid for part in parts]),
            Pyramid.cat(mirrored) if mirrored else None,
        )


@dataclass(frozen=True)
class _Block:
    """Pairs that are processed together."""

    rows: NDArray[np.int64]  # [B]
    count: int  # number of requested rows; the rows after them repeat the last one
    images: _Images  # of each row


def _filled(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Rows [N], padded to `count` with the last one."""
    return np.pad(rows, (0, count - len(rows)), mode="edge")


def bare_pairs(
    image_path: list[str], image_hw: Sequence[tuple[int, int]], sentence: list[str], proposal_size_px: int
) -> Pairs:
    """N pairs without priors, each with its own image, for `with_prior=False`; sent_id is the index."""
    count = len(sentence)
    return Pairs(
        sent_id=np.arange(count),
        sentence=sentence,
        prior_text=[""] * count,
        image_row=np.arange(count),
        image_path=image_path,
        image_hw=np.array(image_hw, dtype=np.int64).reshape(count, 2),
        box=np.zeros((count, 4), np.float32),
        has_box=np.zeros(count, dtype=bool),
        proposal=np.zeros((count, proposal_size_px, proposal_size_px), np.uint8),
        proposal_score=np.zeros(count, np.float32),
        predicted_iou=np.zeros(count, np.float32),
    )


def rows_by_image(pairs: Pairs) -> NDArray[np.int64]:
    """[N] rows, ordered by image; those of one image keep their order."""
    return np.argsort(pairs.image_row, kind="stable")


def chunk_rows(batch_size: int) -> int:
    """Rows of a chunk, before it is extended to whole images: about CHUNK_PAIRS, in whole batches."""
    return batch_size * max(1, CHUNK_PAIRS // batch_size)


def chunks_of(pairs: Pairs, batch_size: int, chosen: NDArray[np.bool_] | None = None) -> list[NDArray[np.int64]]:
    """`rows_by_image` in chunks of about CHUNK_PAIRS rows. All sentences of an image are in one chunk.

    chosen: [N] the rows to return, of whole images; None: all.
    """
    size = chunk_rows(batch_size)
    order = rows_by_image(pairs)
    order = order if chosen is None else order[chosen[order]]
    of_image = pairs.image_row[order]
    # Each chunk ends with the image that its last row belongs to.
    ends = np.searchsorted(of_image, of_image[size - 1 :: size], side="right")
    return [part for part in np.split(order, np.unique(ends)) if len(part)]


def batched_rows(count: int, batch_size: int, what: str | None) -> Iterator[NDArray[np.int64]]:
    """Rows 0..count in order, `batch_size` at a time, with a progress bar if it has a name."""
    starts = range(0, count, batch_size)
    for start in starts if what is None else progress(starts, what, "batch"):
        yield np.arange(start, min(start + batch_size, count))


def at_size(logits: Tensor, height: int, width: int) -> NDArray[np.float32]:
    """Logits [1, S, S] -> [height, width], bilinear; evaluation thresholds them at 0."""
    resized = F.interpolate(logits[None], (height, width), mode="bilinear", align_corners=False)
    return np.asarray(resized[0, 0].numpy())
