"""Masks for a user's own images: the pairs, their priors, and the output files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from l2l_core.artifacts import records
from l2l_core.config import LIVE_BACKENDS, Params, ProposalsParams
from l2l_core.core.files import scratch_folder, staged_output
from l2l_core.core.images import ImageFile, inspect_images, is_exif_rotated, read_image, visible
from l2l_core.core.masks import BoolMask, decode_rle, rle_area_px
from l2l_core.core.progress import logger, progress
from l2l_core.data.pairs import BatchMaker, Pairs, with_priors
from l2l_core.datasets.index import is_utf8, too_long
from l2l_core.datasets.jsonl import read_jsonl
from l2l_core.errors import ConfigError, InputError, raise_all
from l2l_core.export.outlines import to_segmentation
from l2l_core.mllm.backend import Question
from l2l_core.mllm.query import make_backend, query_all, query_key
from l2l_core.model.batch_predictor import BatchPredictor, bare_pairs
from l2l_core.priors.proposals import make_proposals
from l2l_core.priors.table import interpret
from l2l_core.viz import overlays

INDEX_NAME = "predictions.jsonl"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
OVERLAY_PX = 800
"""Longer side of an overlay: a mask's outline, one pixel wide, stays visible on a screen."""
NAME_BYTES = 40
"""Limit for image and sentence each in a file name, UTF-8; file systems allow 255 bytes in all, encrypted ones 143."""
PICTURES = ("mask", "overlay")
PICTURE_NAME = re.compile(r"\d{4,}_[^/\0]*\.(mask|overlay)\.png")
"""Names that `_picture_names` makes; the index may have been edited."""


@dataclass(frozen=True)
class PairList:
    """N user-supplied pairs."""

    images: list[ImageFile]
    sentence: list[str]

    def __len__(self) -> int:
        return len(self.sentence)


@dataclass(frozen=True)
class PriorTables:
    """Priors and proposals for N pairs. A pair whose sent_id is not in the tables has no prior."""

    sent_id: NDArray[np.int64]  # [N]
    priors: pa.Table  # records.PRIORS
    proposals: pa.Table  # records.PROPOSALS


@dataclass(frozen=True)
class PredictedMasks:
    """The network's input pairs (N), and their masks at their images' original size, as run lengths."""

    pairs: Pairs
    rle: list[bytes]

    @property
    def with_prior(self) -> NDArray[np.bool_]:
        """[N] whether the network's input had a prior with a box or a point."""
        return self.pairs.proposal_score > 0


QueryMllm = Callable[[list[Question]], pa.Table]
"""Questions -> records.RESPONSES."""


def pairs_of_images(words: Sequence[str]) -> PairList:
    """Parse command-line arguments: images or folders, then one sentence that applies to all of them.

    Raises InputError that names every unusable image.
    """
    if len(words) < 2:
        raise InputError(f'predict: got {len(words)} argument(s), expected IMAGE... "SENTENCE", or --pairs FILE.jsonl')
    *paths, sentence = words
    if os.path.exists(sentence):  # Path.exists() raises if a sentence is too long for a path
        raise InputError(f"predict: sentence: got {sentence!r}, which is a file; the last argument is the sentence")
    return pairs_of_paths([file for path in paths for file in _images_at(Path(path))], sentence)


def pairs_of_paths(paths: Sequence[Path], sentence: str) -> PairList:
    """Pair each image with the same sentence. Raises InputError that names every unusable image."""
    if problem := too_long(sentence):
        raise InputError(problem)
    if not is_utf8(sentence) or not any(character.isalnum() for character in sentence):
        raise InputError(f"sentence: got {sentence!r}, expected at least one word")
    found = inspect_images(paths, 1)
    unnamed = [f"image {path!r}: its name is not UTF-8; rename it" for path in map(str, paths) if not is_utf8(path)]
    raise_all([*unnamed, *(file for file in found if isinstance(file, str))])
    files = [file for file in found if isinstance(file, ImageFile)]
    return PairList(files, [sentence] * len(files))


def pairs_of_file(path: Path) -> PairList:
    """The pairs of a JSON-lines file in the format of `dataset`, ordered by id. Raises InputError as ingest does."""
    index = read_jsonl(path)
    files = {row.pop("image_id"): ImageFile(**row) for row in index.images.to_pylist()}
    refs = index.refs.select(["image_id", "sentence"]).to_pydict()
    return PairList([files[image_id] for image_id in refs["image_id"]], refs["sentence"])


def exif_rotated_images(requested: PairList) -> list[str]:
    """Images with an EXIF rotation or mirroring. The pipeline ignores it: masks match the stored pixels."""
    return [name for name in dict.fromkeys(file.file_name for file in requested.images) if is_exif_rotated(name)]


def get_priors(requested: PairList, params: Params) -> PriorTables:
    """Priors of the pairs by `priors.backend`: queried if the backend accepts any image, otherwise read from the stored
    tables.

    Responses are stored in .scratch as they arrive, so that an interrupted call resumes. Raises L2LError if the backend
    cannot be queried, or the dataset's tables are missing.
    """
    if params.priors.backend not in LIVE_BACKENDS:
        return recorded_priors(requested)
    if params.priors.uses_builtin_mllm:
        logger.info(
            f"note: {params.priors.model} is trained only on the synthetic scenes of RefShapes; "
            "its responses for photographs are meaningless"
        )

    def query(questions: list[Question]) -> pa.Table:
        settings = query_key(params.priors, records.INDEX)
        key = hashlib.sha256(f"{settings} {questions}".encode()).hexdigest()[:16]
        make = partial(make_backend, params.priors, records.INDEX)
        with scratch_folder("predict", key) as folder:
            return query_all(make, questions, folder, params.priors)

    return live_priors(requested, params, query)


def with_trained_proposals(params: Params, trained: ProposalsParams) -> Params:
    """A project's parameters, with the proposal parameters that the network was trained with.

    A SAM model that the project names takes the place of the trained one, which may have moved. Raises ConfigError if
    the project's priors are recorded and its proposals were rendered with other parameters.
    """
    if params.priors.backend not in LIVE_BACKENDS:
        recorded = records.read_rendering()
        for name, expected in trained:
            got = getattr(recorded, name)
            if got != expected and name not in trained.unused:
                raise ConfigError(
                    f"{records.RENDERING_PATH}: proposals.{name}: got {got}, but the model was trained with "
                    f"{expected}; recorded priors only fit a model of the same proposals"
                )
        return params.model_copy(update={"proposals": trained})
    proposals = trained.model_copy(update={"model": params.proposals.model or trained.model}).rendering
    return params.model_copy(update={"proposals": proposals})


def recorded_priors(requested: PairList) -> PriorTables:
    """Stored priors of dataset sentences with the same text and an image with the same bytes."""
    refs = records.read_table(records.INDEX.refs, records.REFS, ["sent_id", "image_id", "sentence"])
    images = records.read_table(records.INDEX.images, records.IMAGES, ["image_id", "sha256"])
    known = records.to_frame(refs).merge(records.to_frame(images), on="image_id").sort_values("sent_id")
    first = known.drop_duplicates(["sha256", "sentence"])
    sent_ids = dict(zip(zip(first["sha256"], first["sentence"], strict=True), first["sent_id"], strict=True))
    keys = zip((file.sha256 for file in requested.images), requested.sentence, strict=True)
    return PriorTables(
        np.array([sent_ids.get(key, own) for key, own in zip(keys, _pair_ids(requested), strict=True)], dtype=np.int64),
        records.read_table(records.PRIORS_PATH, records.PRIORS),
        records.read_table(records.PROPOSALS_PATH, records.PROPOSALS),
    )


def live_priors(requested: PairList, params: Params, query: QueryMllm) -> PriorTables:
    """Query the multimodal LLM once about every distinct pair, and render its responses as the pipeline does.

    Raises InputError if every request fails, and whatever `query` raises.
    """
    sent_id = _pair_ids(requested)
    pairs = zip(sent_id, zip(requested.images, requested.sentence, strict=True), strict=True)
    # Sorted by image, so that a model can reuse computed tokens.
    unique_pairs = dict(sorted(pairs, key=lambda pair: pair[1][0].sha256))
    responses = query(
        [
            Question(key, sample, file.file_name, (file.height, file.width), sentence)
            for key, (file, sentence) in unique_pairs.items()
            for sample in range(params.priors.samples)
        ]
    )
    failed = [reason for reason in responses["reason"].to_pylist() if reason]
    if failed and len(failed) == responses.num_rows:
        raise InputError(f"priors.backend {params.priors.backend}: every request failed, the first with {failed[0]!r}")
    priors = interpret(responses)
    refs = pd.DataFrame({"sent_id": list(unique_pairs), "image_id": list(unique_pairs)})  # one image per pair
    images = pd.DataFrame([vars(file) for file, _ in unique_pairs.values()]).assign(image_id=refs["image_id"])
    proposals = make_proposals(priors, refs, images, params.proposals, device=params.priors.engine.device)
    return PriorTables(np.array(sent_id), priors, proposals)


def predict_masks(
    predictor: BatchPredictor, requested: PairList, prior_tables: PriorTables | None, batch_size: int = 1
) -> PredictedMasks:
    """Predict a mask for every pair, with its prior if it has one; prior_tables None: without priors.

    At most `batch_size` pairs form a batch. Masks equal those of the stage `predict` with the same priors,
    except for pixels whose logit rounds to another side of 0: the stage pads all batches to one size.
    """
    paths = [file.file_name for file in requested.images]
    sizes = [(file.height, file.width) for file in requested.images]
    network = predictor.network
    proposals = network.known_proposals()
    pairs = bare_pairs(paths, sizes, requested.sentence, proposals.size_px)
    if prior_tables is not None:
        pairs = replace(pairs, sent_id=prior_tables.sent_id)
        pairs = with_priors(pairs, prior_tables.priors, prior_tables.proposals, proposals.flat_prob)
    batches = BatchMaker(pairs, network.params.image_size_px, proposals.flat_prob)
    (masks,) = predictor.masks(batches, batch_size, [prior_tables is not None], "predict", fill=False)
    return PredictedMasks(pairs, masks)


@contextmanager
def predictions_folder(out: Path) -> Iterator[Path]:
    """A folder to fill; if the block succeeds, its files move into `out` and replace the pictures of an earlier call.

    Files that no predictions.jsonl lists stay. Raises InputError if `out` cannot be used.
    """
    earlier: set[str] = set()

    def remove_earlier() -> None:
        for name in earlier - _pictures_of(out / INDEX_NAME):
            (out / name).unlink(missing_ok=True)

    with staged_output(out, remove_earlier) as folder:
        earlier |= _pictures_of(out / INDEX_NAME)
        yield folder


def check_file_names(requested: PairList, folder: Path) -> None:
    """Check that the file system accepts every output name, before any computation.

    Raises InputError that names the first rejected name.
    """
    for name in [INDEX_NAME, *(name for names in _picture_names(requested) for name in names.values())]:
        try:
            (folder / name).touch()
            (folder / name).unlink()
        except OSError as error:
            raise InputError(
                f"--out: no file {name!r} can be written there: {error.strerror}; name another folder"
            ) from None


def save_mask(mask: BoolMask, path: Path) -> None:
    """Write a mask [H, W] as a PNG of one channel, 255 is foreground."""
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)


def write_predictions(requested: PairList, predicted: PredictedMasks, folder: Path, *, polygons: bool) -> str:
    """Write a mask (PNG, 255 is foreground) and an overlay for each pair, and predictions.jsonl, into a folder.

    If the pictures cannot be written (such as on a full disk), keep only predictions.jsonl. It then holds every mask
    but no picture names. Return the error message, or an empty string on success. Raises InputError if
    predictions.jsonl cannot be written.
    """
    lines: list[dict[str, object]] = [
        {
            "image": file.file_name,
            "sentence": sentence,
            "height": file.height,
            "width": file.width,
            "with_prior": with_prior,
            "area_px": rle_area_px(rle, file.height, file.width),
            "segmentation": to_segmentation(rle, file.height, file.width, polygons=polygons),
        }
        for file, sentence, rle, with_prior in zip(
            requested.images, requested.sentence, predicted.rle, predicted.with_prior.tolist(), strict=True
        )
    ]
    names = _picture_names(requested)
    try:
        _write_index(lines, folder)
    except OSError as error:
        raise InputError(f"--out: {INDEX_NAME} cannot be written: {error.strerror}; name another folder") from None
    try:
        rows = list(zip(requested.images, predicted.rle, names, strict=True))
        for file, rle, name in progress(rows, "pictures", "pair"):
            mask = decode_rle(rle, file.height, file.width)
            save_mask(mask, folder / name["mask"])
            overlay = overlays.with_mask(overlays.fit(read_image(file.file_name), OVERLAY_PX), mask)
            # Compressing it at the default level 6 takes longer than computing the mask.
            Image.fromarray(overlay).save(folder / name["overlay"], compress_level=1)
        _write_index([line | name for line, name in zip(lines, names, strict=True)], folder)
    except OSError as error:
        for picture in (folder / name[kind] for name in names for kind in PICTURES):
            picture.unlink(missing_ok=True)
        return f"the pictures cannot be written: {error.strerror or error}; {INDEX_NAME} holds every mask"
    return ""


def _write_index(lines: Sequence[dict[str, object]], folder: Path) -> None:
    """Write the index atomically: the earlier one stays if the disk is full."""
    building = folder / f".{INDEX_NAME}.tmp"
    try:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        building.write_text(text, encoding="utf-8")
        building.replace(folder / INDEX_NAME)
    finally:
        building.unlink(missing_ok=True)


def _picture_names(requested: PairList) -> list[dict[str, str]]:
    """The files of each pair by kind."""
    names = [
        f"{index:04d}_{_slug(Path(file.file_name).stem)}_{_slug(sentence)}"
        for index, (file, sentence) in enumerate(zip(requested.images, requested.sentence, strict=True))
    ]
    return [{kind: f"{name}.{kind}.png" for kind in PICTURES} for name in names]


def _images_at(path: Path) -> list[Path]:
    """The path itself, or the images in a folder by name. Raises InputError if a folder has none."""
    if not path.is_dir():
        return [path]
    found = [file for file in visible(path.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise InputError(f"{path}: no image in this folder, expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return found


def _pair_ids(requested: PairList) -> list[int]:
    """63-bit ids, hashed from image and sentence, so that the random draws of a pair do not depend on other pairs."""
    keys = (f"{file.sha256} {sentence}" for file, sentence in zip(requested.images, requested.sentence, strict=True))
    return [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1 for key in keys]


def _pictures_of(index: Path) -> set[str]:
    """Names of the pictures that an earlier call wrote beside its index."""
    if not index.is_file():
        return set()
    try:
        rows: Iterable[dict[str, str]] = [json.loads(line) for line in index.read_text(encoding="utf-8").splitlines()]
        names = (row[kind] for row in rows if row["segmentation"] is not None for kind in PICTURES if kind in row)
        return {name for name in names if PICTURE_NAME.fullmatch(name)}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{index}: not written by this command; name another folder with --out") from None


def _slug(text: str) -> str:
    """Convert a text to a part of a file name, at most NAME_BYTES long."""
    name = "-".join(re.findall(r"\w+", text)).encode("utf-8", "ignore")
    return name[:NAME_BYTES].decode("utf-8", "ignore")  # only whole characters
