"""Priors -> soft proposals: probability maps of the referred object in [0, 1], on a square grid over the image."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from l2l_core.artifacts import records
from l2l_core.config import ProposalsParams
from l2l_core.core import grabcut
from l2l_core.core.arrays import DoubleArray
from l2l_core.core.boxes import iou_xyxy
from l2l_core.core.files import fingerprint
from l2l_core.core.images import read_image
from l2l_core.core.masks import BoolMask, cell_shares, decode_rle, intersection_union_px
from l2l_core.core.metrics import iou_from_px
from l2l_core.core.progress import progress
from l2l_core.core.threads import thread_count
from l2l_core.errors import ArtifactError, InputError

Map = NDArray[np.float32]
Image = NDArray[np.uint8]

POINT_SIDE = 0.4
"""Assumed side of the object around a point, as a share of sqrt(height * width): the median of sqrt(box area) over
RefCOCO's val, testA and testB objects is 0.39 of it."""
MIN_CONFIDENCE = 0.01
"""Keeps a proposal's score above 0, which means `no prior`, if a model reports confidence 0."""

FULL_SHARE = 0.6
"""A mask whose largest share of a cell is below this may vanish at a threshold of 0.5, so its shares are scaled up."""

_GRABCUT_CHUNK = 64  # sentences that are rendered and stored together
_SAM_CHUNK = 16  # images whose sentences are rendered and stored together
CHUNK_CELLS = 2**23  # map cells rendered at once: some 64 MiB per temporary array
_BINARY_CHUNK_BYTES = 2**30


@dataclass(frozen=True)
class PriorSamples:
    """N sentences with K responses each; coordinates in original-image pixels, zeros if missing."""

    sent_id: NDArray[np.int64]  # [N] ascending
    image_row: NDArray[np.int64]  # [N] row of the images table
    image_hw: NDArray[np.int64]  # [N, 2]
    box_xyxy: DoubleArray  # [N, K, 4]
    has_box: NDArray[np.bool_]  # [N, K]
    point_xy: DoubleArray  # [N, K, 2]
    has_point: NDArray[np.bool_]  # [N, K] a point and no box
    mask: NDArray[np.object_]  # [N, K] run lengths at the image's size, or None
    has_mask: NDArray[np.bool_]  # [N, K] a mask and its box
    any_point: NDArray[np.bool_]  # [N, K] a point, with or without a box
    confidence: DoubleArray  # [N, K] in [0, 1], reported by the model; 1 if missing

    def take(self, rows: NDArray[np.int64]) -> PriorSamples:
        """The sentences of the given rows, in that order."""
        return PriorSamples(**{name: column[rows] for name, column in vars(self).items()})


def render_box(box_xyxy: ArrayLike, image_hw: ArrayLike, params: ProposalsParams) -> Map:
    """Boxes [..., 4] in pixels of images [..., 2] (height, width) -> maps [..., S, S] with S = size_px.

    The value is inside_prob inside, 1 - inside_prob outside and exactly 0.5 on the box's border. It changes smoothly
    over `falloff` of the box's side (at least a cell). A box thinner than a cell is widened to one.

    >>> from l2l_core.config import load_params
    >>> render_box([0, 0, 240, 480], (480, 640), load_params("params.yaml").proposals).shape
    (48, 48)
    """
    box, size_wh = np.asarray(box_xyxy, dtype=np.float64), np.asarray(image_hw, dtype=np.float64)[..., ::-1]
    profiles = []
    for axis in (1, 0):  # rows, columns
        cell = params.size_px / size_wh[..., axis]
        low, high = box[..., axis] * cell, box[..., axis + 2] * cell
        half = np.maximum(high - low, 1.0) / 2
        centers = np.arange(params.size_px) + 0.5
        depth = half[..., None] - np.abs(centers - ((low + high) / 2)[..., None])
        width = np.maximum(params.falloff * 2 * half, 1.0)[..., None]
        profiles.append(_smooth_step(0.5 + depth / width))
    inside = np.minimum(profiles[0][..., :, None], profiles[1][..., None, :])
    return _to_prob(inside, params)


def render_point(point_xy: ArrayLike, image_hw: ArrayLike, params: ProposalsParams) -> Map:
    """Points [..., 2] in pixels -> Gaussian blobs [..., S, S], 0.5 at the border of a disc of width POINT_SIDE.

    >>> from l2l_core.config import load_params
    >>> soft = render_point([320, 240], (480, 640), load_params("params.yaml").proposals)
    >>> soft.shape, bool(soft[24, 24] > 0.8)
    ((48, 48), True)
    """
    point, hw = np.asarray(point_xy, dtype=np.float64), np.asarray(image_hw, dtype=np.float64)
    radius_px = POINT_SIDE / 2 * np.sqrt(hw[..., 0] * hw[..., 1])
    squares = []
    for axis in (1, 0):
        centers = (np.arange(params.size_px) + 0.5) * (hw[..., 1 - axis] / params.size_px)[..., None]
        squares.append(((centers - point[..., axis, None]) / radius_px[..., None]) ** 2)
    distance2 = squares[0][..., :, None] + squares[1][..., None, :]
    return _to_prob(np.exp2(-distance2), params)


def render_mask(mask: BoolMask, params: ProposalsParams) -> Map:
    """A mask [H, W] -> map [S, S] of the share of each cell's area that the mask covers.

    The value is inside_prob in a covered cell, 1 - inside_prob in a free one, and in between at the mask's border. A
    mask that fills no cell, such as a thin pole, would vanish at 0.5: its shares are relative to the largest one.
    """
    share = cell_shares(mask, params.size_px, params.size_px)
    peak = float(share.max())
    return _to_prob(share / peak if 0 < peak < FULL_SHARE else share, params)


def shrink(image_bgr: Image) -> Image:
    """Resize an image [H, W, 3] for GrabCut: its longer side becomes at most GRABCUT_SIDE_PX pixels."""
    height, width = image_bgr.shape[:2]
    scale = min(1.0, grabcut.GRABCUT_SIDE_PX / max(height, width))
    size_wh = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(image_bgr, size_wh, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def render_grabcut(image_bgr: Image, box_xyxy: ArrayLike, image_hw: tuple[int, int], params: ProposalsParams) -> Map:
    """Segment the object in a box [4] of an image with GrabCut -> map [S, S].

    image_bgr: as `shrink` returns it (BGR, as OpenCV reads it). box_xyxy: in pixels of the image of size image_hw.
    The map is that of GrabCut's mask. If GrabCut finds almost nothing, the result is the box's map. Raises ValueError
    if ring or core of `params` are not fitted yet.
    """
    if params.ring == "fit" or params.core == "fit":
        raise ValueError("proposals.ring and proposals.core must be numbers here; see l2l_core/priors/fit.py")
    (height, width), (small_height, small_width) = image_hw, image_bgr.shape[:2]
    box = np.asarray(box_xyxy, dtype=np.float64)
    scaled = box * np.tile(np.array((small_width, small_height)) / (width, height), 2)
    cut = grabcut.grabcut(image_bgr, grabcut.box_trimap(small_height, small_width, scaled, params.ring, params.core))
    if cut is None:
        return render_box(box, image_hw, params)
    return render_mask(cut, params)


def prior_score(samples: PriorSamples) -> DoubleArray:
    """[N] reliability of a proposal, in (0, 1]; 0 for a sentence without any response that gives a place.

    Share of the responses that give a place x their agreement x their mean confidence. Agreement is the expected IoU of
    two of them drawn with replacement: 1 for one response or equal ones, 1 / m for m disjoint ones. It is the IoU of
    masks where both are masks, else of boxes.
    """
    located = samples.has_box | samples.has_point
    boxes = np.where(samples.has_box[..., None], samples.box_xyxy, _point_box(samples.point_xy, samples.image_hw))
    both = located[:, :, None] & located[:, None, :]
    iou = iou_xyxy(boxes[:, :, None], boxes[:, None, :])
    row, first, second = np.nonzero(np.triu(samples.has_mask[:, :, None] & samples.has_mask[:, None, :], 1))
    pixels = intersection_union_px(
        samples.mask[row, first].tolist(), samples.mask[row, second].tolist(), samples.image_hw[row]
    )
    iou[row, first, second] = iou[row, second, first] = iou_from_px(*pixels.T)
    agreement = (iou * both).sum(axis=(1, 2)) / np.maximum(both.sum(axis=(1, 2)), 1)
    count = located.sum(axis=1)
    confidence = (np.maximum(samples.confidence, MIN_CONFIDENCE) * located).sum(axis=1) / np.maximum(count, 1)
    return np.asarray(count / located.shape[1] * agreement * confidence)


def render_key(params: ProposalsParams, tables: Sequence[Path], device: str = "auto") -> str:
    """Hex digest of everything that proposals depend on: a run reuses stored chunks only if it would write the same.

    tables: the files of priors, sentences and images. device: where SAM computes, which decides about its precision.
    """
    state: list[str] = []
    if params.renderer == "sam":
        from l2l_core.model.sam import precision_on  # it loads PyTorch, which the other renderers do not need

        model = Path(str(params.model))
        files = sorted(model.iterdir()) if model.is_dir() else []  # gigabytes: file times show whether it changed
        state = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
        state.append(precision_on(device))
    return fingerprint("proposals", f"{params.rendering.model_dump_json()}\n{state}", tables)


def make_proposals(
    priors: pa.Table,
    refs: pd.DataFrame,
    images: pd.DataFrame,
    params: ProposalsParams,
    folder: Path | None = None,
    device: str = "auto",
) -> pa.Table:
    """Tables records.PRIORS -> records.PROPOSALS, one row per sentence, sorted by sent_id.

    refs: sent_id, image_id. images: image_id, file_name, height, width. A sentence's map is the average over its
    responses; a response without a place counts as a flat map at flat_prob. A mask is used as it is, whatever the
    renderer. Only GrabCut and SAM read the images.
    folder: where finished chunks are stored and, after a kill, found again. device: where SAM computes.
    Raises InputError if an image cannot be read, ConfigError if SAM's model cannot be loaded.
    """
    samples = to_samples(priors, refs, images)
    files = images["file_name"].tolist()
    count = len(samples.sent_id)
    soft = np.empty((count, params.size_px, params.size_px), dtype=np.uint8)
    predicted = np.empty(count, dtype=np.float32)
    for number, rows in enumerate(progress(_chunks(samples, params), f"proposals ({params.renderer})", "batch")):
        path = None if folder is None else folder / f"{number}.parquet"
        if path is not None and path.exists():
            table = records.read_table(path, records.PROPOSALS)
        else:
            table = _render(samples.take(rows), params, files, device)
            if path is not None:
                records.write_table(table, path, records.PROPOSALS)
        soft[rows] = np.frombuffer(b"".join(table["soft"].to_pylist()), np.uint8).reshape(len(rows), *soft.shape[1:])
        predicted[rows] = table["predicted_iou"].fill_null(np.nan).to_numpy()
    return _to_table(samples.sent_id, soft, prior_score(samples), predicted)


def _chunks(samples: PriorSamples, params: ProposalsParams) -> list[NDArray[np.int64]]:
    """Rows that are rendered together, ordered by image; SAM encodes an image once for all its sentences."""
    order = np.argsort(samples.image_row, kind="stable")
    match params.renderer:
        case "box":
            size = max(1, CHUNK_CELLS // (params.size_px**2 * samples.has_box.shape[1]))
        case "grabcut":
            size = _GRABCUT_CHUNK
        case "sam":
            _, first = np.unique(samples.image_row[order], return_index=True)
            return np.split(order, first[_SAM_CHUNK::_SAM_CHUNK]) if len(order) else []
        case _:
            assert_never(params.renderer)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _render(samples: PriorSamples, params: ProposalsParams, files: Sequence[str], device: str) -> pa.Table:
    """records.PROPOSALS of some sentences."""
    maps, predicted = _mean_maps(samples, params, files, device)
    return _to_table(samples.sent_id, np.rint(maps * 255).astype(np.uint8), prior_score(samples), predicted)


def _mean_maps(
    samples: PriorSamples, params: ProposalsParams, files: Sequence[str], device: str
) -> tuple[Map, NDArray[np.float32]]:
    """[N, S, S]: each sentence's maps, averaged over its responses; and [N] mean predicted IoUs, NaN for none."""
    maps = np.full((*samples.has_box.shape, params.size_px, params.size_px), params.flat_prob, dtype=np.float32)
    predicted = np.full(samples.has_box.shape, np.nan, dtype=np.float32)
    row, response = np.nonzero(samples.has_point)
    maps[row, response] = render_point(samples.point_xy[row, response], samples.image_hw[row], params)
    for place in zip(*np.nonzero(samples.has_mask), strict=True):
        height, width = samples.image_hw[place[0]].tolist()
        maps[place] = render_mask(decode_rle(samples.mask[place], height, width), params)
    row, response = np.nonzero(samples.has_box & ~samples.has_mask)
    match params.renderer:
        case "box":
            maps[row, response] = render_box(samples.box_xyxy[row, response], samples.image_hw[row], params)
        case "grabcut":
            # OpenCV releases the GIL, so threads run in parallel. Each reads an image once.
            image_row = samples.image_row[row]

            def cut(image: int) -> None:
                pixels = shrink(read_bgr(files[image]))
                for place in (image_row == image).nonzero()[0].tolist():
                    here = row[place], response[place]
                    height, width = samples.image_hw[row[place]].tolist()
                    maps[here] = render_grabcut(pixels, samples.box_xyxy[here], (height, width), params)

            with ThreadPoolExecutor(thread_count()) as pool:
                list(pool.map(cut, np.unique(image_row).tolist()))
        case "sam":
            _render_sam(samples, params, files, device, maps, predicted)
        case _:
            assert_never(params.renderer)
    return np.asarray(maps.mean(axis=1)), _mean_of_known(predicted)


def _render_sam(
    samples: PriorSamples, params: ProposalsParams, files: Sequence[str], device: str, maps: Map, predicted: Map
) -> None:
    """Write the maps [N, K, S, S] and predicted IoUs [N, K] of all responses with a box or a point and no mask."""
    from l2l_core.model import sam as sam_module  # it loads PyTorch, which the other renderers do not need

    row, response = np.nonzero((samples.has_box | samples.any_point) & ~samples.has_mask)
    if not len(row):
        return
    sam = sam_module.load_sam(str(params.model), device, "priors.engine.device")
    image_row = samples.image_row[row]
    image_rows = np.unique(image_row)
    for start in range(0, len(image_rows), sam_module.IMAGES_AT_ONCE):
        some = image_rows[start : start + sam_module.IMAGES_AT_ONCE].tolist()
        with ThreadPoolExecutor(thread_count()) as pool:
            photos = list(pool.map(lambda image: _read(files[image], "SAM"), some))
        for image, encoded in zip(some, sam.encode(photos), strict=True):
            mine = image_row == image
            here = row[mine], response[mine]
            box = np.where(samples.has_box[here][:, None], samples.box_xyxy[here], np.nan)
            point = np.where(samples.any_point[here][:, None], samples.point_xy[here], np.nan)
            found = sam.segment(encoded, sam_module.Prompts(box, point))
            maps[here] = sam.probabilities(found.logits, encoded, params.size_px)
            predicted[here] = found.predicted_iou


def _mean_of_known(values: Map) -> NDArray[np.float32]:
    """[N, K] -> [N] means without NaN; NaN where all are."""
    known = ~np.isnan(values)
    count = known.sum(axis=1)
    mean = np.where(known, values, 0).sum(axis=1) / np.maximum(count, 1)
    return np.where(count > 0, mean, np.nan).astype(np.float32)


def _smooth_step(ramp: DoubleArray) -> DoubleArray:
    """0 below 0, 1 above 1, and a cubic with flat ends in between; 0.5 stays 0.5."""
    t = np.clip(ramp, 0.0, 1.0)
    return np.asarray(t * t * (3 - 2 * t))


def _to_prob(inside: NDArray[np.floating[Any]], params: ProposalsParams) -> Map:
    """Coverage of a cell, 0..1 -> probability between 1 - inside_prob and inside_prob."""
    low = 1 - params.inside_prob
    return np.asarray(low + (params.inside_prob - low) * inside, dtype=np.float32)


def _point_box(point_xy: DoubleArray, image_hw: NDArray[np.int64]) -> DoubleArray:
    """[N, K, 2] points -> [N, K, 4] squares with the assumed side of an object around a point."""
    half = POINT_SIDE / 2 * np.sqrt(image_hw[:, 0] * image_hw[:, 1])[:, None, None]
    return np.concatenate([point_xy - half, point_xy + half], axis=-1)


def read_bgr(path: str) -> Image:
    """The image [H, W, 3] in OpenCV's channel order (BGR). Raises InputError."""
    return np.ascontiguousarray(_read(path, "GrabCut")[..., ::-1])


def _read(path: str, renderer: str) -> Image:
    """The image [H, W, 3] in RGB. Raises InputError that says which renderer needs it."""
    try:
        return read_image(path)
    except InputError as error:
        raise InputError(f"{error}; {renderer} needs it, the box renderer does not") from None


def to_samples(priors: pa.Table, refs: pd.DataFrame, images: pd.DataFrame) -> PriorSamples:
    """The responses of all sentences; tables as in `make_proposals`. Raises ArtifactError if they do not match."""
    priors = priors.sort_by([("sent_id", "ascending"), ("sample_index", "ascending")])
    sent_id = priors["sent_id"].to_numpy()
    responses = int(pc.max(priors["sample_index"]).as_py() or 0) + 1
    shape = (len(sent_id) // responses, responses)
    is_whole = len(sent_id) == shape[0] * responses
    if not is_whole or (priors["sample_index"].to_numpy().reshape(shape) != np.arange(responses)).any():
        raise ArtifactError(f"priors: sentences differ in their number of responses (up to {responses}); run dvc repro")
    sent_id = sent_id.reshape(shape)[:, 0]
    image_id = refs.set_index("sent_id")["image_id"].reindex(sent_id)
    if image_id.isna().any() or len(refs) != len(sent_id):
        raise ArtifactError("priors: their sentences are not those of the index; run dvc repro")
    image_row = pd.Index(images["image_id"]).get_indexer(image_id)
    box_xyxy, has_box = _fixed_lists(priors["bbox"], 4)
    point_xy, has_point = _fixed_lists(priors["point"], 2)
    mask = np.array(priors["mask"].to_pylist(), dtype=np.object_)
    return PriorSamples(
        sent_id=sent_id,
        image_row=image_row,
        image_hw=images[["height", "width"]].to_numpy(np.int64)[image_row],
        box_xyxy=box_xyxy.reshape(*shape, 4),
        has_box=has_box.reshape(shape),
        point_xy=point_xy.reshape(*shape, 2),
        has_point=(has_point & ~has_box).reshape(shape),
        mask=mask.reshape(shape),
        has_mask=priors["mask"].is_valid().to_numpy().reshape(shape),
        any_point=has_point.reshape(shape),
        confidence=priors["score"].fill_null(1.0).to_numpy().astype(np.float64).reshape(shape),
    )


def _fixed_lists(column: pa.ChunkedArray, length: int) -> tuple[DoubleArray, NDArray[np.bool_]]:
    """A column of lists or nulls -> [N, length] with zeros for null, and [N] whether a list is present."""
    is_there = column.is_valid().to_numpy()
    values = np.zeros((len(column), length))
    values[is_there] = column.drop_null().combine_chunks().flatten().to_numpy().reshape(-1, length)
    return values, is_there


def _to_table(
    sent_id: NDArray[np.int64], soft: NDArray[np.uint8], score: DoubleArray, predicted_iou: NDArray[np.float32]
) -> pa.Table:
    count, size = soft.shape[:2]
    # One chunk per block of rows: Arrow's binary arrays hold less than 2 GiB each.
    step = max(1, _BINARY_CHUNK_BYTES // (size * size))
    blocks = [_to_binary(soft[start : start + step].reshape(-1, size * size)) for start in range(0, count, step)]
    columns = {
        "sent_id": pa.array(sent_id, pa.int64()),
        "height": pa.array(np.full(count, size), pa.int16()),
        "width": pa.array(np.full(count, size), pa.int16()),
        "soft": pa.chunked_array(blocks, pa.binary()),
        "score": pa.array(score, pa.float32()),
        "predicted_iou": pa.array(predicted_iou, pa.float32(), from_pandas=True),  # NaN: null
    }
    return pa.table(columns, schema=records.PROPOSALS)


def _to_binary(rows: NDArray[np.uint8]) -> pa.Array:
    """[N, bytes] -> N binary values, without N intermediate Python objects."""
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * np.int32(rows.shape[1])
    return pa.Array.from_buffers(pa.binary(), len(rows), [None, pa.py_buffer(offsets), pa.py_buffer(rows)])
