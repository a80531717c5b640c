"""Assigns images to folds; the teacher of a fold never sees the fold's images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from l2l_core.config import Params
from l2l_core.core.seeding import folds_of, generator
from l2l_core.data.pairs import Pairs
from l2l_core.errors import InputError


def fold_of_images(image_row: NDArray[np.int64], folds: int, seed: int) -> NDArray[np.int64]:
    """[N] fold of each pair; pairs of one image share a fold, and fold sizes differ by at most one image.

    Raises InputError if there are fewer images than folds.
    """
    images = len(np.unique(image_row))
    if images < folds:
        raise InputError(f"select.folds: got {folds}, but only {images} images are labeled; lower it or label more")
    return folds_of(image_row, folds, generator("folds", seed, folds))


def fold_by_image(params: Params, labeled: Pairs) -> NDArray[np.int64]:
    """[images] fold of each image of the index, whatever the roles of its sentences; -1: of none.

    labeled: all labeled pairs. Their images have the folds of `fold_of_images`, so that each fold has labels. The other
    images have a fold only with `select.cross_label`.
    """
    images, folds = len(labeled.image_path), params.select.folds
    fold = np.full(images, -1, dtype=np.int64)
    if params.select.cross_label:
        fold = folds_of(np.arange(images), folds, generator("folds of all images", params.seed, folds))
    fold[labeled.image_row] = fold_of_images(labeled.image_row, folds, params.seed)
    return fold
