"""Inference: the only path from a trained network to masks, for evaluation, for teachers and for a single image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from l2l_core.config import Params, TrainParams, load_params
from l2l_core.data.augment import mirror
from l2l_core.data.dataset import Batch, BatchMaker, Pairs, read_image
from l2l_core.engine.loop import choose_device, move_batch, to_device
from l2l_core.masks import BoolMask, decode_rle, encode_rle
from l2l_core.model.segmenter import Segmenter
from l2l_core.progress import progress
from l2l_core.selection.features import Views


@dataclass(frozen=True)
class Predictor:
    """A network ready to be asked."""

    network: Segmenter
    device: torch.device
    precision: str

    @classmethod
    def of(cls, network: Segmenter, params: TrainParams) -> Predictor:
        """Put a network in evaluation mode on the configured device."""
        device = choose_device(params.engine.device)
        network = network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        return cls(network, device, params.precision)

    @classmethod
    def from_run(cls, folder: str | Path, params: TrainParams | None = None) -> Predictor:
        """Load a model folder, for example data/rounds/2/model; `params` are those in the current folder unless given.

        Raises ArtifactError where it is not one, ConfigError where there are no parameters.
        """
        return cls.of(Segmenter.load(folder), params or load_params().train)

    def predict(self, image: str | Path, sentence: str, params: Params | None = None) -> BoolMask:
        """Mask [H, W] of what a sentence means in an image (JPEG, PNG, ...), at the image's own size; without a prior.

        It is the evaluated model's, bit for bit. `params` are those in the current folder unless given. Raises
        InputError where the image cannot be read, ConfigError where there are no parameters.
        """
        project = params or load_params()
        height, width = read_image(image).shape[:2]
        pairs = bare_pairs([str(image)], [(height, width)], [sentence], project.proposals.size_px)
        batches = BatchMaker(pairs, self.network.params.image_size_px, project.proposals.flat_prob)
        (counts,) = self.masks(batches, project.evaluate.batch_size, with_prior=False, what="predict")
        return decode_rle(counts, height, width)

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """Mask logits [B, 1, S, S] float32 on the CPU, after as many passes as the network was made for."""
        tokens = to_device(self.network.tokenize(batch), self.device)
        cast = torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()
        with cast:
            logits = self.network.ask(move_batch(batch, self.device), tokens)
        return logits.float().cpu()

    def masks(self, batches: BatchMaker, batch_size: int, *, with_prior: bool, what: str) -> Iterator[bytes]:
        """Masks of all pairs at their image's own size as run lengths, in order (probability > 0.5)."""
        pairs = batches.pairs
        hidden = np.full(batch_size, not with_prior)
        for rows in batched_rows(len(pairs), batch_size, what):
            # Filled up with repeats: kernels for other sizes sum in another order, and a mask must not depend on how
            # many others are asked for.
            full = np.resize(rows, batch_size)
            logits = self.logits(batches(full, None, hidden))[: len(rows)]
            for one, (height, width) in zip(logits, pairs.hw[rows], strict=True):
                yield encode_rle(at_size(one, int(height), int(width)) > 0)

    def views(self, batches: BatchMaker, batch_size: int, what: str) -> Iterator[Views]:
        """What this teacher says of all pairs, batch by batch: with prior, mirrored, and without prior."""
        pairs = batches.pairs
        words = np.array([len(sentence.split()) for sentence in pairs.sentence], dtype=np.int64)
        for rows in batched_rows(len(pairs), batch_size, what):
            batch = batches(rows)
            size = batch.image.shape[-1]
            prob = self.logits(batch).sigmoid()
            flipped = self.logits(mirror(batch)).sigmoid().flip(-1)
            without = self.logits(batches(rows, None, np.ones(len(rows), dtype=bool))).sigmoid()
            proposal = F.interpolate(batch.proposal, (size, size), mode="bilinear", align_corners=False)
            yield Views(
                sent_id=pairs.sent_id[rows],
                image=batch.image.permute(0, 2, 3, 1).numpy(),
                prob=prob[:, 0].numpy(),
                prob_flipped=flipped[:, 0].numpy(),
                prob_no_prior=without[:, 0].numpy(),
                proposal=proposal[:, 0].numpy(),
                proposal_score=batch.proposal_score.numpy(),
                words=words[rows],
            )


def bare_pairs(
    image_path: list[str], image_hw: Sequence[tuple[int, int]], sentence: list[str], proposal_size_px: int
) -> Pairs:
    """N pairs without priors, each with an image of its own, to be asked `with_prior=False`; sent_id is the place."""
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
    )


def batched_rows(count: int, batch_size: int, what: str) -> Iterator[NDArray[np.int64]]:
    """Rows 0..count in order, `batch_size` at a time, with a progress bar."""
    starts = range(0, count, batch_size)
    for start in progress(starts, what, "batch"):
        yield np.arange(start, min(start + batch_size, count))


def at_size(logits: Tensor, height: int, width: int) -> NDArray[np.float32]:
    """Logits [1, S, S] -> [height, width], bilinear: what evaluation cuts at 0."""
    resized = F.interpolate(logits[None], (height, width), mode="bilinear", align_corners=False)
    return np.asarray(resized[0, 0].numpy())
