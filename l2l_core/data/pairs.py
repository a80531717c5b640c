"""Pairs (image, sentence, prior, proposal) as columns, their targets, and batches as tensors.

`Pairs` never holds ground truth. Targets live in a separate `Targets`, which exists only for labeled and
pseudo-labeled pairs. Training on the ground truth of an unlabeled sentence is therefore a type error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from l2l_core.artifacts import records
from l2l_core.core.images import IMAGE_CACHE_BYTES, read_image
from l2l_core.core.masks import decode_rle, resize_mask
from l2l_core.errors import ArtifactError

PRIOR_COLUMNS = ("sent_id", "sample_index", "target", "attributes", "relation", "bbox")
"""Columns of a prior that the network reads, with its keys."""
SIDE_BY_SIDE_VARIABLE = "L2L_TRAININGS_SIDE_BY_SIDE"
"""Number of concurrent training runs on this machine, including this one, that share IMAGE_CACHE_BYTES; default 1."""


@dataclass(frozen=True)
class Pairs:
    """N image-sentence pairs; geometry is relative to the image (0..1 in x and y)."""

    sent_id: NDArray[np.int64]  # [N]
    sentence: list[str]
    prior_text: list[str]  # target, attributes and relation from the MLLM; "" without a prior
    image_row: NDArray[np.int64]  # [N] row of image_path
    image_path: list[str]
    image_hw: NDArray[np.int64]  # [images, 2] original height, width in pixels
    box: NDArray[np.float32]  # [N, 4] x1 y1 x2 y2 in 0..1, zeros without a prior
    has_box: NDArray[np.bool_]  # [N]
    proposal: NDArray[np.uint8]  # [N, P, P], 0..255 is probability 0..1
    proposal_score: NDArray[np.float32]  # [N], 0 without a prior
    predicted_iou: NDArray[np.float32]  # [N] the renderer's own estimate of the proposal's IoU; 0 if it has none

    def __len__(self) -> int:
        return len(self.sent_id)

    def take(self, rows: NDArray[np.int64]) -> Pairs:
        """The pairs of the given rows, in that order."""
        return Pairs(
            sent_id=self.sent_id[rows],
            sentence=[self.sentence[row] for row in rows],
            prior_text=[self.prior_text[row] for row in rows],
            image_row=self.image_row[rows],
            image_path=self.image_path,
            image_hw=self.image_hw,
            box=self.box[rows],
            has_box=self.has_box[rows],
            proposal=self.proposal[rows],
            proposal_score=self.proposal_score[rows],
            predicted_iou=self.predicted_iou[rows],
        )

    def only(self, rows: NDArray[np.int64]) -> Pairs:
        """As `take`, with no other images in the lists: small enough to send to another process."""
        images, image_row = np.unique(self.image_row[rows], return_inverse=True)
        paths = [self.image_path[image] for image in images.tolist()]
        return replace(self.take(rows), image_row=image_row, image_path=paths, image_hw=self.image_hw[images])

    def with_sent_ids(self, sent_ids: NDArray[np.int64]) -> Pairs:
        """The pairs of the given sentences, in that order. Raises ArtifactError if one is unknown."""
        order = np.argsort(self.sent_id)
        found = np.searchsorted(self.sent_id, sent_ids, sorter=order)
        rows = order[np.minimum(found, len(order) - 1)] if len(order) else np.zeros(0, dtype=np.int64)
        if len(rows) != len(sent_ids) or (self.sent_id[rows] != sent_ids).any():
            raise ArtifactError("a table names a sent_id that the index lacks; run dvc repro")
        return self.take(rows)

    def of_image(self, image_row: int) -> NDArray[np.int64]:
        """Rows of the pairs of one image, ascending."""
        by_image, first = self._by_image
        return by_image[first[image_row] : first[image_row + 1]]

    @cached_property
    def _by_image(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows sorted by image, and where each image's rows start: a look at all pairs for each sample takes long."""
        by_image = np.argsort(self.image_row, kind="stable")
        return by_image, np.searchsorted(self.image_row[by_image], np.arange(len(self.image_path) + 1))

    @property
    def hw(self) -> NDArray[np.int64]:
        """[N, 2] original height and width of each pair's image."""
        return np.asarray(self.image_hw[self.image_row])


@dataclass(frozen=True)
class Targets:
    """Training targets of N pairs; masks are run lengths at the image's own size."""

    label: list[bytes]
    keep: list[bytes] | None = None  # valid pixels; None: all
    weight: NDArray[np.uint8] | None = None  # [N, P, P], 0..255 is pixel weight 0..1; None: all 1

    def take(self, rows: NDArray[np.int64]) -> Targets:
        """The targets of the given rows, in that order."""
        keep = None if self.keep is None else [self.keep[row] for row in rows]
        weight = None if self.weight is None else self.weight[rows]
        return Targets([self.label[row] for row in rows], keep, weight)


@dataclass(frozen=True)
class Batch:
    """B pairs as tensors; S is the training size, P the proposal's, L the number of text tokens."""

    image: Tensor  # [B, 3, S, S] uint8, RGB
    sentence: list[str]
    prior_text: list[str]
    box: Tensor  # [B, 4] float32, 0..1
    has_box: Tensor  # [B] bool
    proposal: Tensor  # [B, 1, P, P] float32, 0..1
    proposal_score: Tensor  # [B] float32
    label: Tensor | None = None  # [B, 1, S, S] float32, 0 or 1
    keep: Tensor | None = None  # [B, 1, S, S] float32, pixel weights in 0..1

    def to(self, device: torch.device) -> Batch:
        """The batch with all tensors on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


class ImageStore:
    """Images by row, resized to the network's square input; caches decoded images up to `cache_bytes`."""

    def __init__(self, paths: Sequence[str], size_px: int, cache_bytes: int = IMAGE_CACHE_BYTES) -> None:
        self._paths = paths
        self._size_px = size_px
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._room = cache_bytes // (3 * size_px * size_px)

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        """[S, S, 3] uint8 RGB."""
        image = self._cache.get(row)
        if image is None:
            image = resize_image(read_image(self._paths[row]), self._size_px)
            if len(self._cache) < self._room:
                self._cache[row] = image
        return image


@dataclass(frozen=True)
class BatchMaker:
    """Turns rows of pairs into batches of tensors."""

    pairs: Pairs
    size_px: int
    flat_prob: float  # value of the proposal without a prior
    cache_bytes: int = IMAGE_CACHE_BYTES  # of decoded images

    @cached_property
    def images(self) -> ImageStore:
        """The images, decoded on first access."""
        return ImageStore(self.pairs.image_path, self.size_px, self.cache_bytes)

    def pixels(self, image_rows: NDArray[np.int64]) -> Tensor:
        """Images by row [B] -> [B, 3, S, S] uint8 RGB. Raises InputError if an image cannot be read."""
        unique, position = np.unique(image_rows, return_inverse=True)  # an image of several sentences is read once
        images = [self.images[row] for row in unique.tolist()]
        return torch.from_numpy(np.stack([images[row] for row in position])).permute(0, 3, 1, 2)

    def __call__(
        self,
        rows: NDArray[np.int64],
        targets: Targets | None = None,
        no_prior: NDArray[np.bool_] | None = None,
        image: Tensor | None = None,
        prior_rows: NDArray[np.int64] | None = None,
    ) -> Batch:
        """Rows [B] -> batch. `targets` has one entry per row of `pairs`; `no_prior` [B] hides the priors of pairs.

        image: the rows' `pixels`, if already loaded. prior_rows: [B] rows that supply box and proposal (None: the
        pair's own row).
        """
        pairs = self.pairs.take(rows)
        if prior_rows is not None:
            names = ("box", "has_box", "proposal", "proposal_score")
            pairs = replace(pairs, **{name: getattr(self.pairs, name)[prior_rows] for name in names})
        hidden = np.zeros(len(rows), dtype=bool) if no_prior is None else no_prior
        proposal = pairs.proposal.astype(np.float32) / 255.0
        proposal[hidden] = np.float32(_flat_level(self.flat_prob)) / 255.0
        batch = Batch(
            image=self.pixels(pairs.image_row) if image is None else image,
            sentence=pairs.sentence,
            prior_text=["" if is_hidden else text for text, is_hidden in zip(pairs.prior_text, hidden, strict=True)],
            box=torch.from_numpy(np.where(hidden[:, None], np.float32(0), pairs.box)),
            has_box=torch.from_numpy(pairs.has_box & ~hidden),
            proposal=torch.from_numpy(proposal)[:, None],
            proposal_score=torch.from_numpy(np.where(hidden, np.float32(0), pairs.proposal_score)),
        )
        if targets is None:
            return batch
        chosen = targets.take(rows)
        label = torch.from_numpy(self.square_masks(chosen.label, rows)).float()[:, None]
        keep = torch.ones_like(label)
        if chosen.keep is not None:
            keep = torch.from_numpy(self.square_masks(chosen.keep, rows)).float()[:, None]
        if chosen.weight is not None:
            weight = torch.from_numpy(chosen.weight).float()[:, None] / 255
            keep = keep * F.interpolate(weight, (self.size_px, self.size_px), mode="bilinear", align_corners=False)
        return replace(batch, label=label, keep=keep)

    def square_masks(self, rles: list[bytes], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Masks of the pairs in `rows` at their image's size -> [B, S, S] bool at the network's input size."""
        size, hw = self.size_px, self.pairs.hw[rows].tolist()
        masks = [resize_mask(decode_rle(rle, h, w), size, size) for rle, (h, w) in zip(rles, hw, strict=True)]
        return np.stack(masks)


def resize_image(image: NDArray[np.uint8], size_px: int) -> NDArray[np.uint8]:
    """[H, W, 3] -> [S, S, 3], stretched as is usual in the field; area-averaged if it shrinks."""
    shrinks = image.shape[0] > size_px or image.shape[1] > size_px
    mode = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (size_px, size_px), interpolation=mode), dtype=np.uint8)


def load_pairs(
    index: records.IndexPaths,
    sent_ids: NDArray[np.int64] | None,
    priors_path: Path | None,
    proposals_path: Path | None,
    proposal_size_px: int,
    flat_prob: float,
) -> Pairs:
    """Read the pairs of the given sentences (None: all) from the tables; ground truth is not read.

    Without priors (both paths None) every pair has the flat proposal and score 0.
    """
    refs = records.to_frame(records.read_table(index.refs, records.REFS, ["sent_id", "image_id", "sentence"]))
    sizes = ["image_id", "file_name", "height", "width"]
    images = records.to_frame(records.read_table(index.images, records.IMAGES, sizes))
    if sent_ids is not None:
        refs = refs.set_index("sent_id").reindex(sent_ids)
        if refs["image_id"].isna().any():
            raise ArtifactError(f"{index.refs}: lacks sentences that the split names; run dvc repro")
        refs = refs.reset_index()
    image_row = images["image_id"].reset_index(drop=True).reset_index().set_index("image_id")["index"]
    count = len(refs)
    columns = {
        "sent_id": refs["sent_id"].to_numpy(np.int64),
        "sentence": refs["sentence"].tolist(),
        "image_row": image_row.loc[refs["image_id"].astype(np.int64)].to_numpy(np.int64),
        "image_path": images["file_name"].tolist(),
        "image_hw": images[["height", "width"]].to_numpy(np.int64),
    }
    if priors_path is None or proposals_path is None:
        return Pairs(
            **columns,
            prior_text=[""] * count,
            box=np.zeros((count, 4), np.float32),
            has_box=np.zeros(count, bool),
            proposal=np.full((count, proposal_size_px, proposal_size_px), _flat_level(flat_prob), np.uint8),
            proposal_score=np.zeros(count, np.float32),
            predicted_iou=np.zeros(count, np.float32),
        )
    proposals = records.TableParts(proposals_path, records.PROPOSALS)
    rendered = records.read_table(proposals_path, records.PROPOSALS, ["sent_id"])
    rows = _rows_in(rendered, columns["sent_id"])
    if (rows < 0).any():
        raise ArtifactError(f"{proposals_path}: lacks sentences of the index; run dvc repro")
    priors = records.read_table(priors_path, records.PRIORS, PRIOR_COLUMNS)
    hw = columns["image_hw"][columns["image_row"]]
    return Pairs(
        **columns,
        **_response_columns(columns["sent_id"], hw, priors),
        **_proposal_columns(rows, proposals, proposal_size_px, flat_prob),
    )


def with_priors(pairs: Pairs, priors: pa.Table, proposals: pa.Table, flat_prob: float) -> Pairs:
    """Add priors and proposals to pairs by sent_id; a pair missing in the tables has the flat proposal and score 0.

    priors: records.PRIORS; only a sentence's first response counts. proposals: records.PROPOSALS.
    """
    size_px, rows = pairs.proposal.shape[1], _rows_in(proposals, pairs.sent_id)
    return replace(
        pairs,
        **_response_columns(pairs.sent_id, pairs.hw, priors.select(PRIOR_COLUMNS)),
        **_proposal_columns(rows, [proposals], size_px, flat_prob),
    )


def load_targets(masks_path: Path, index: records.IndexPaths, pairs: Pairs) -> Targets:
    """Ground-truth masks of labeled pairs. Raises ArtifactError if one is missing."""
    masks = records.to_frame(records.read_table(masks_path, records.MASKS, ["ann_id", "rle_counts"]))
    refs = records.to_frame(records.read_table(index.refs, records.REFS, ["sent_id", "ann_id"]))
    ann_id = refs.set_index("sent_id").loc[pairs.sent_id, "ann_id"]
    label = masks.set_index("ann_id")["rle_counts"].reindex(ann_id)
    if label.isna().any():
        raise ArtifactError(f"{masks_path}: lacks the mask of a labeled sentence; run dvc repro")
    return Targets(label=label.tolist())


def _response_columns(sent_id: NDArray[np.int64], image_hw: NDArray[np.int64], priors: pa.Table) -> dict[str, Any]:
    """The columns of Pairs from priors, for sentences [N] with image sizes [N, 2]."""
    responses = records.to_frame(priors)
    responses = responses[responses["sample_index"] == 0].set_index("sent_id").reindex(sent_id)
    has_box = responses["bbox"].notna().to_numpy()
    box = np.zeros((len(sent_id), 4), np.float32)
    if has_box.any():
        size_wh = image_hw[has_box][:, ::-1]
        box[has_box] = np.stack(responses["bbox"][has_box].tolist()) / np.concatenate([size_wh, size_wh], axis=1)
    return {
        "prior_text": [
            _prior_text(*row)
            for row in zip(responses["target"], responses["attributes"], responses["relation"], strict=True)
        ],
        "box": box,
        "has_box": has_box,
    }


def _proposal_columns(
    rows: NDArray[np.int64],
    proposals: Iterable[pa.Table],
    proposal_size_px: int,  # used if the table is empty
    flat_prob: float,
) -> dict[str, Any]:
    """The columns of Pairs from the rows [N] of records.PROPOSALS, given as consecutive parts; row -1: no proposal."""
    by_row, first = np.argsort(rows, kind="stable"), 0
    soft = np.empty((len(rows), proposal_size_px**2), np.uint8)
    score, predicted_iou = np.zeros(len(rows), np.float32), np.zeros(len(rows), np.float32)
    for part in proposals:
        if first == 0 and len(part):
            side = math.isqrt(len(part["soft"][0].as_py()))
            if soft.shape[1] != side**2:
                soft = np.empty((len(rows), side**2), np.uint8)
        start, end = np.searchsorted(rows, [first, first + len(part)], sorter=by_row)
        pairs = by_row[start:end]
        if len(pairs):
            chosen = part.take(rows[pairs] - first)
            soft[pairs] = np.frombuffer(b"".join(chosen["soft"].to_pylist()), np.uint8).reshape(len(pairs), -1)
            score[pairs] = chosen["score"].fill_null(0).to_numpy()
            predicted_iou[pairs] = chosen["predicted_iou"].fill_null(0).to_numpy()
        first += len(part)
    soft[rows < 0] = _flat_level(flat_prob)
    side = math.isqrt(soft.shape[1])
    return {"proposal": soft.reshape(-1, side, side), "proposal_score": score, "predicted_iou": predicted_iou}


def _rows_in(proposals: pa.Table, sent_id: NDArray[np.int64]) -> NDArray[np.int64]:
    """The row of each sentence in a table with one row per sent_id; -1 if it has none."""
    known = records.to_frame(proposals.select(["sent_id"])).set_index("sent_id").index
    return np.asarray(known.get_indexer(sent_id), dtype=np.int64)


def _flat_level(flat_prob: float) -> int:
    """The flat proposal's value, 0..255: a hidden prior looks exactly like a missing one."""
    return round(flat_prob * 255)


def _prior_text(target: object, attributes: object, relation: object) -> str:
    words = [target if isinstance(target, str) else ""]
    words += [str(word) for word in attributes] if isinstance(attributes, np.ndarray | list) else []
    words += [relation if isinstance(relation, str) else ""]
    return " ".join(word for word in words if word)
