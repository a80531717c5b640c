"""Table of priors -> table of soft proposals: each sentence's responses rendered, averaged and scored, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import assert_never

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from l2l_core.artifacts import records
from l2l_core.config import ONE_PROCESS, ClusterParams, ProposalsParams
from l2l_core.core.arrays import DoubleArray
from l2l_core.core.files import fingerprint, folder_state
from l2l_core.core.images import read_image
from l2l_core.core.masks import decode_rle
from l2l_core.core.threads import thread_count
from l2l_core.errors import InputError
from l2l_core.priors.renderers import Image, Map, grabcut_input, render_box, render_grabcut, render_mask, render_point
from l2l_core.priors.samples import PriorSamples, prior_score, to_samples
from l2l_core.workers.chunks import Work, check_gpus, map_chunks, worker_threads

_GRABCUT_CHUNK = 64  # sentences that are rendered and stored together
_SAM_CHUNK = 16  # images whose sentences are rendered and stored together
CHUNK_CELLS = 2**23  # map cells rendered at once: some 64 MiB per temporary array
_BINARY_CHUNK_BYTES = 2**30

ReadImage = Callable[[int], Image]
ChunkData = tuple[PriorSamples, dict[int, str]]
"""Sentences that are rendered together, and the files of their images by row."""


def render_key(
    params: ProposalsParams, tables: Sequence[Path], device: str = "auto", cluster: ClusterParams = ONE_PROCESS
) -> str:
    """Hex digest of everything that proposals depend on: a run reuses stored chunks only if it would write the same.

    tables: the files of priors, sentences and images. device: where SAM computes, which decides about its precision.
    """
    state: list[str] = []
    if params.renderer == "sam":
        from l2l_core.core.device import choose_device, device_state  # PyTorch, which the other renderers do not need
        from l2l_core.model.sam import precision_on

        threads = worker_threads(cluster)
        state = [folder_state(str(params.model)), device_state(choose_device(device), precision_on(device), threads)]
    return fingerprint("proposals", f"{params.rendering.model_dump_json()}\n{state}", tables)


def make_proposals(
    priors: pa.Table,
    refs: pd.DataFrame,
    images: pd.DataFrame,
    params: ProposalsParams,
    folder: Path | None = None,
    device: str = "auto",
    cluster: ClusterParams = ONE_PROCESS,
) -> pa.Table:
    """Tables records.PRIORS -> records.PROPOSALS, one row per sentence, sorted by sent_id.

    refs: sent_id, image_id. images: image_id, file_name, height, width. A sentence's map is the average over its
    responses; a response without a place counts as a flat map at flat_prob. A mask is used as it is, whatever the
    renderer. Only GrabCut and SAM read the images.
    folder: where finished chunks are stored and, after a kill, found again. device: where SAM computes.
    Raises InputError if an image cannot be read, ConfigError if SAM's model cannot be loaded.
    """
    samples, files = to_samples(priors, refs, images), images["file_name"].tolist()
    if params.renderer == "sam":
        from l2l_core.core.device import choose_device  # it loads PyTorch, which the other renderers do not need

        device = choose_device(device, "params.yaml: priors.engine.device").type
        check_gpus(cluster, device)
    chunks = _chunks(samples, params)

    def load(number: int) -> ChunkData:
        some = samples.take(chunks[number])
        return some, {row: files[row] for row in set(some.image_row.tolist())}

    work = Work(
        what=f"proposals ({params.renderer})",
        ids=[samples.sent_id[rows] for rows in chunks],
        schema=records.PROPOSALS,
        load=load,
        start=partial(_start_rendering, params, device),
    )
    count = len(samples.sent_id)
    soft = np.empty((count, params.size_px, params.size_px), dtype=np.uint8)
    predicted = np.empty(count, dtype=np.float32)
    for number, table in map_chunks(work, cluster, folder):
        rows = chunks[number]
        soft[rows] = np.frombuffer(b"".join(table["soft"].to_pylist()), np.uint8).reshape(len(rows), *soft.shape[1:])
        predicted[rows] = table["predicted_iou"].fill_null(np.nan).to_numpy()
    return _to_table(samples.sent_id, soft, prior_score(samples), predicted)


def _start_rendering(params: ProposalsParams, device: str) -> Callable[[ChunkData], Iterable[pa.Table]]:
    """The rendering of a chunk (records.PROPOSALS)."""
    needed_by = "SAM" if params.renderer == "sam" else "GrabCut"

    def render(data: ChunkData) -> Iterable[pa.Table]:
        samples, files = data
        yield render_table(samples, params, lambda row: read_photo(files[row], needed_by), device)

    return render


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


def render_table(samples: PriorSamples, params: ProposalsParams, read: ReadImage, device: str) -> pa.Table:
    """records.PROPOSALS of the sentences, rendered together.

    read: row of an image -> its pixels [H, W, 3] RGB; called only for GrabCut and SAM. device: where SAM computes.
    """
    soft, predicted = _mean_maps(samples, params, read, device)
    return _to_table(samples.sent_id, soft, prior_score(samples), predicted)


def _mean_maps(
    samples: PriorSamples, params: ProposalsParams, read: ReadImage, device: str
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Each sentence's maps, averaged over its responses, and the mean of the renderer's own estimates of their IoU.

    Returns [N, S, S] uint8, where 0..255 is probability 0..1, and [N] float32 in [0, 1], NaN for none.
    """
    maps = np.full((*samples.has_box.shape, params.size_px, params.size_px), params.flat_prob, dtype=np.float32)
    predicted = np.full(samples.has_box.shape, np.nan, dtype=np.float32)
    row, response = np.nonzero(samples.has_point)
    maps[row, response] = render_point(samples.point_xy[row, response], samples.image_hw[row], params)
    for here in zip(*np.nonzero(samples.has_mask), strict=True):
        height, width = samples.image_hw[here[0]].tolist()
        maps[here] = render_mask(decode_rle(samples.mask[here], height, width), params)
    row, response = np.nonzero(samples.has_box & ~samples.has_mask)
    match params.renderer:
        case "box":
            maps[row, response] = render_box(samples.box_xyxy[row, response], samples.image_hw[row], params)
        case "grabcut":
            # OpenCV releases the GIL, so threads run in parallel. Each reads an image once.
            image_row = samples.image_row[row]

            def cut(image: int) -> None:
                pixels = grabcut_input(read(image))
                for index in (image_row == image).nonzero()[0].tolist():
                    here = row[index], response[index]
                    height, width = samples.image_hw[row[index]].tolist()
                    maps[here] = render_grabcut(pixels, samples.box_xyxy[here], (height, width), params)

            with ThreadPoolExecutor(thread_count()) as pool:
                list(pool.map(cut, np.unique(image_row).tolist()))
        case "sam":
            _render_sam(samples, params, read, device, maps, predicted)
        case _:
            assert_never(params.renderer)
    return np.rint(maps.mean(axis=1) * 255).astype(np.uint8), _mean_of_known(predicted)


def _render_sam(
    samples: PriorSamples, params: ProposalsParams, read: ReadImage, device: str, maps: Map, predicted: Map
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
            photos = list(pool.map(read, some))
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


def read_photo(path: str, renderer: str) -> Image:
    """The image [H, W, 3] in RGB. Raises InputError that says which renderer needs it."""
    try:
        return read_image(path)
    except InputError as error:
        raise InputError(f"{error}; {renderer} needs it, the box renderer does not") from None


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
