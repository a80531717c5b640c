"""Masks for a person's own images: pictures of each, and one JSON line a pair."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from l2l_core import overlays, records
from l2l_core.config import Params
from l2l_core.data.dataset import BatchMaker, Pairs, load_pairs, read_image
from l2l_core.data.images import ImageFile, inspect_images
from l2l_core.data.index import is_utf8
from l2l_core.data.jsonl import read_jsonl
from l2l_core.errors import InputError, raise_all
from l2l_core.export.outlines import to_segmentation
from l2l_core.masks import decode_rle, rle_area_px
from l2l_core.outputs import added_to
from l2l_core.predictor import Predictor, bare_pairs
from l2l_core.progress import progress

INDEX_NAME = "predictions.jsonl"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
OVERLAY_PX = 800
"""Longer side of an overlay: a mask's outline, which is one pixel wide, shows on a screen."""
NAME_LENGTH = 40
"""Characters of image and sentence in a file's name; file systems allow 255 bytes."""
EXIF_ORIENTATION = 274
UPRIGHT = 1


@dataclass(frozen=True)
class Asked:
    """N pairs of a person's own."""

    image: list[ImageFile]
    sentence: list[str]

    def __len__(self) -> int:
        return len(self.sentence)


@dataclass(frozen=True)
class Answered:
    """Masks of N pairs at their images' own size, as run lengths."""

    rle: list[bytes]
    with_prior: NDArray[np.bool_]  # [N] whether a recorded prior was shown


def ask_about(words: Sequence[str]) -> Asked:
    """Command line words -> pairs: images or folders of images, and last the sentence about each of them.

    Raises InputError that names every image that cannot be used.
    """
    if len(words) < 2:
        raise InputError(f'predict: got {len(words)} argument(s), expected IMAGE... "SENTENCE", or --pairs FILE.jsonl')
    *places, sentence = words
    if not is_utf8(sentence) or not any(character.isalnum() for character in sentence):
        raise InputError(f"predict: sentence: got {sentence!r}, expected at least one word")
    if Path(sentence).exists():
        raise InputError(f"predict: sentence: got {sentence!r}, which is a file; the last argument is the sentence")
    paths = [path for place in places for path in _images_at(Path(place))]
    found = inspect_images(paths, 1)
    raise_all([file for file in found if isinstance(file, str)])
    files = [file for file in found if isinstance(file, ImageFile)]
    return Asked(files, [sentence] * len(files))


def ask_file(path: Path) -> Asked:
    """The pairs of a JSON-lines file as `dataset` takes it, in order of their ids. Raises InputError as ingest does."""
    index = read_jsonl(path)
    files = {row.pop("image_id"): ImageFile(**row) for row in index.images.to_pylist()}
    refs = index.refs.select(["image_id", "sentence"]).to_pydict()
    return Asked([files[image_id] for image_id in refs["image_id"]], refs["sentence"])


def turned_images(asked: Asked) -> list[str]:
    """Images that an EXIF tag turns, which every part of the pipeline ignores: masks are of the stored pixels."""
    return [name for name in dict.fromkeys(file.file_name for file in asked.image) if _is_turned(name)]


def recorded_sentences(asked: Asked) -> NDArray[np.int64]:
    """[N] sent_id of the data set's sentence with the same words about an image of the same bytes; -1 where none is."""
    refs = records.read_table(records.INDEX.refs, records.REFS, ["sent_id", "image_id", "sentence"])
    images = records.read_table(records.INDEX.images, records.IMAGES, ["image_id", "sha256"])
    known = records.to_frame(refs).merge(records.to_frame(images), on="image_id").sort_values("sent_id")
    first = known.drop_duplicates(["sha256", "sentence"])
    sent_ids = dict(zip(zip(first["sha256"], first["sentence"], strict=True), first["sent_id"], strict=True))
    keys = zip((file.sha256 for file in asked.image), asked.sentence, strict=True)
    return np.array([sent_ids.get(key, -1) for key in keys], dtype=np.int64)


def answer(predictor: Predictor, asked: Asked, sent_ids: NDArray[np.int64], params: Params) -> Answered:
    """Ask the network about every pair; those with a sent_id (not -1) are shown the prior recorded for it.

    Masks are bit for bit those of the stage `predict` with the same parameters.
    """
    has_record = sent_ids >= 0
    rle = [b""] * len(asked)
    with_prior = np.zeros(len(asked), dtype=bool)
    for is_shown, what in ((True, "with prior"), (False, "no prior")):
        rows = np.flatnonzero(has_record == is_shown)
        pairs = _pairs(asked, rows, params)
        if is_shown and len(rows):
            pairs = _with_priors(pairs, sent_ids[rows], params)
        batches = BatchMaker(pairs, predictor.network.params.image_size_px, params.proposals.flat_prob)
        masks = predictor.masks(batches, params.evaluate.batch_size, with_prior=is_shown, what=f"predict, {what}")
        for row, counts in zip(rows.tolist(), masks, strict=True):
            rle[row] = counts
        with_prior[rows] = pairs.proposal_score > 0
    return Answered(rle, with_prior)


@contextmanager
def predictions_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that is added to `out` when the block ends well; the pictures of an earlier call there go then.

    Files that no predictions.jsonl names stay. Raises InputError where `out` cannot be used.
    """
    earlier = _pictures_of(out / INDEX_NAME)
    with added_to(out) as folder:
        yield folder
    for name in earlier - _pictures_of(out / INDEX_NAME):
        (out / name).unlink(missing_ok=True)


def write_predictions(asked: Asked, answered: Answered, folder: Path, *, polygons: bool) -> None:
    """Write for each pair a mask (PNG, 255 is foreground) and an overlay into a folder, and predictions.jsonl."""
    rows = list(zip(asked.image, asked.sentence, answered.rle, answered.with_prior.tolist(), strict=True))
    lines = []
    for number, (file, sentence, rle, with_prior) in enumerate(progress(rows, "pictures", "pair")):
        size = file.height, file.width
        mask = decode_rle(rle, *size)
        name = f"{number:04d}_{_slug(Path(file.file_name).stem)}_{_slug(sentence)}"
        pictures = {"mask": f"{name}.mask.png", "overlay": f"{name}.overlay.png"}
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / pictures["mask"])
        overlay = overlays.with_mask(overlays.fit(read_image(file.file_name), OVERLAY_PX), mask)
        Image.fromarray(overlay).save(folder / pictures["overlay"])
        line = {
            "image": file.file_name,
            "sentence": sentence,
            "height": file.height,
            "width": file.width,
            "with_prior": with_prior,
            "area_px": rle_area_px(rle, *size),
            "segmentation": to_segmentation(rle, *size, polygons=polygons),
        }
        lines.append(json.dumps(line | pictures, ensure_ascii=False) + "\n")
    (folder / INDEX_NAME).write_text("".join(lines), encoding="utf-8")


def _is_turned(path: str) -> bool:
    with Image.open(path) as image:
        return bool(image.getexif().get(EXIF_ORIENTATION, UPRIGHT) != UPRIGHT)


def _images_at(place: Path) -> list[Path]:
    """A path, or the images in a folder by name. Raises InputError where a folder has none."""
    if not place.is_dir():
        return [place]
    found = sorted(path for path in place.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise InputError(f"{place}: no image in this folder, expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return found


def _pairs(asked: Asked, rows: NDArray[np.int64], params: Params) -> Pairs:
    files = [asked.image[row] for row in rows]
    paths, sizes = [file.file_name for file in files], [(file.height, file.width) for file in files]
    return bare_pairs(paths, sizes, [asked.sentence[row] for row in rows], params.proposals.size_px)


def _with_priors(pairs: Pairs, sent_ids: NDArray[np.int64], params: Params) -> Pairs:
    """The pairs with what the tables hold of their sentences; the images stay the person's own."""
    size, flat = params.proposals.size_px, params.proposals.flat_prob
    known = load_pairs(records.INDEX, sent_ids, records.PRIORS_PATH, records.PROPOSALS_PATH, size, flat)
    return replace(known, image_row=pairs.image_row, image_path=pairs.image_path, image_hw=pairs.image_hw)


def _pictures_of(index: Path) -> set[str]:
    """Names of the pictures that an earlier call wrote beside its index."""
    if not index.is_file():
        return set()
    try:
        rows: Iterable[dict[str, str]] = [json.loads(line) for line in index.read_text(encoding="utf-8").splitlines()]
        return {Path(row[key]).name for row in rows for key in ("mask", "overlay")}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{index}: not written by this command; name another folder with --out") from None


def _slug(text: str) -> str:
    """A text as part of a file's name."""
    return "-".join(re.findall(r"\w+", text))[:NAME_LENGTH]
