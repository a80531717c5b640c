"""Dataset and label budget of a run, read by the functions of the stages `ingest` and `split`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from l2l_core.artifacts import records
from l2l_core.config import Params, RefShapesParams
from l2l_core.data.folds import fold_of_images
from l2l_core.datasets import splits
from l2l_core.datasets.index import Index, summary
from l2l_core.datasets.read import load_dataset
from l2l_core.errors import ConfigError, InputError
from l2l_core.evaluation.evaluate import evaluated_sentences
from l2l_core.preflight.estimate import Counts
from l2l_core.preflight.memory import peak_of
from l2l_core.refshapes.dataset import write_refshapes

SAMPLE_IMAGES = {"train_images": 64, "val_images": 8, "test_images": 8}
"""Images drawn if the built-in dataset does not exist yet: takes about a second, and exceeds a batch of sentences."""


@dataclass(frozen=True)
class Data:
    """A dataset in the form that ingest produces, in a separate folder."""

    index: Index  # all of it; a sample if the built-in dataset is not drawn yet
    paths: records.IndexPaths  # its tables
    refs: pa.Table  # of the whole dataset: all columns of records.REFS, or those that a split needs
    read_s: float  # seconds to read and check the whole dataset
    read_bytes: int  # memory used for that
    share: float  # of the whole dataset in `index`

    @property
    def is_sample(self) -> bool:
        """Whether the dataset itself is not drawn yet."""
        return self.share < 1


def read_data(params: Params, folder: Path) -> Data:
    """Read and check the dataset as ingest does, and write its tables into a folder.

    Raises InputError that lists every bad row.
    """
    dataset, share, refs = Path(params.dataset), 1.0, None
    if params.uses_builtin_dataset and not dataset.exists():
        dataset, share = folder / "refshapes", _draw_sample(params.refshapes, folder / "refshapes")
        refs = _refs_to_come(params.refshapes)
    started = time.monotonic()
    ingest = params.ingest
    with peak_of() as peak:
        index = load_dataset(
            dataset,
            images=ingest.images,
            split_by=ingest.split_by,
            min_image_side_px=ingest.min_image_side_px,
        )
    read_s = (time.monotonic() - started) / share
    names = ("images", "refs", "objects", "masks")
    paths = records.IndexPaths(**{name: folder / f"{name}.parquet" for name in names})
    for name in names:
        records.write_table(getattr(index, name), getattr(paths, name), getattr(records, name.upper()))
    return Data(index, paths, index.refs if refs is None else refs, read_s, round(peak.ram_bytes / share), share)


def describe_data(params: Params, data: Data) -> str:
    """Content of the dataset, in one line."""
    if not data.is_sample:
        return f"{params.dataset}: {summary(data.index)}"
    images = data.refs.num_rows // params.refshapes.sentences_per_image
    return (
        f"{params.dataset}: not drawn yet, which the run does in seconds: {images} images, {data.refs.num_rows} "
        f"sentences; checked on {data.index.images.num_rows} of its images"
    )


def describe_sizes(params: Params, data: Data) -> str:
    """Image sizes, original and as the network sees them, in one line."""
    seen = params.model.image_size_px
    width, height = (data.index.images[name].to_numpy() for name in ("width", "height"))
    low, high = f"{width.min()}x{height.min()}", f"{width.max()}x{height.max()}"
    sizes = f"{low} px" if low == high else f"{low} to {high} px, median {np.median(width):.0f}x{np.median(height):.0f}"
    line = f"{sizes}; the network sees {seen}x{seen} (model.image_size_px)"
    enlarged = np.mean(np.minimum(width, height) < seen)
    return line + (f", {enlarged:.0%} of them enlarged" if enlarged else "")


def draw_split(params: Params, data: Data) -> pa.Table:
    """Spend the label budget as the stage `split` does: records.SPLIT of the whole dataset."""
    if params.split.list_file is None:
        return splits.split_by_fraction(data.refs, params.split.labeled_fraction, params.seed)
    if data.is_sample:
        raise InputError(f"split.list_file: {params.dataset} is not drawn yet; draw it first: dvc repro refshapes")
    return splits.split_by_list(data.refs, params.split.list_file)


def describe_split(data: Data, split: pa.Table) -> str:
    """Number of images and sentences per role, in one line."""
    frame = _with_roles(data, split)
    groups = {role: frame[frame["role"] == role] for role in records.ROLES}
    return "; ".join(
        f"{role}: {rows['image_id'].nunique()} images, {len(rows)} sentences" for role, rows in groups.items()
    )


def count_roles(data: Data, split: pa.Table) -> Counts:
    """Sentences and images of each role."""
    frame = _with_roles(data, split)
    groups = [frame[frame["role"] == role] for role in ("labeled", "unlabeled", "eval")]
    return Counts(len(frame), *map(len, groups), *(rows["image_id"].nunique() for rows in groups))


def check_masks(params: Params, data: Data) -> None:
    """Raise InputError if the dataset has only boxes."""
    if data.index.boxes_only:
        raise InputError(f"{params.dataset}: no annotation has a segmentation, but training needs masks to learn from")


def check_rounds(params: Params, data: Data, split: pa.Table) -> None:
    """Raise InputError if the rounds have too few labeled images, or no unlabeled sentence."""
    if params.round == 0:
        return
    frame = _with_roles(data, split)
    fold_of_images(frame.loc[frame["role"] == "labeled", "image_id"].to_numpy(), params.select.folds, params.seed)
    if not (frame["role"] == "unlabeled").any():
        raise InputError(
            f"round: got {params.round}, but no sentence is unlabeled; set it to 0 or label less "
            "(split.labeled_fraction, split.list_file)"
        )


def check_evaluation(params: Params, data: Data, split: pa.Table) -> None:
    """Raise ConfigError if evaluate.splits has no sentence to score."""
    refs, masks = data.index.refs, data.index.masks
    known = splits.split_by_fraction(refs, 1.0, params.seed) if data.is_sample else split
    try:
        evaluated_sentences(refs, masks, known, params.evaluate.splits)
    except ConfigError as error:
        raise ConfigError(f"{error}; give some pairs a split and a mask") from None


def sample_sentences(params: Params, data: Data, split: pa.Table) -> list[int]:
    """Sentences with masks to measure on, evenly selected: labeled ones, as many as the larger batch holds."""
    if data.is_sample:
        split = splits.split_by_fraction(data.index.refs, 1.0, params.seed)
    roles = records.to_frame(split)
    labeled = roles.loc[roles["role"] == "labeled", "sent_id"].to_numpy()
    count = min(len(labeled), max(params.train.batch_size, params.evaluate.batch_size))
    picked: list[int] = labeled[np.linspace(0, len(labeled) - 1, count).round().astype(int)].tolist()
    return picked


def _with_roles(data: Data, split: pa.Table) -> pd.DataFrame:
    refs = records.to_frame(data.refs.select(["sent_id", "image_id"]))
    return refs.merge(records.to_frame(split), on="sent_id")


def _draw_sample(params: RefShapesParams, folder: Path) -> float:
    """Draw some images of each split; returns their share of all images."""
    counts = {name: min(count, getattr(params, name)) for name, count in SAMPLE_IMAGES.items()}
    write_refshapes(folder, params.model_copy(update=counts))
    return sum(counts.values()) / sum(getattr(params, name) for name in counts)


def _refs_to_come(params: RefShapesParams) -> pa.Table:
    """Inputs of a split for all sentences of the built-in dataset, with the image ids that they will have."""
    images = {"train": params.train_images, "val": params.val_images, "test": params.test_images}
    split = np.repeat(list(images), list(images.values()))
    each = params.sentences_per_image
    ids = np.arange(len(split) * each)
    columns = {"sent_id": ids, "ref_id": ids, "ann_id": ids, "image_id": ids // each, "split": np.repeat(split, each)}
    return pa.table({name: pa.array(values.tolist()) for name, values in columns.items()})
