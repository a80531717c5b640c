"""Assigns labeled images to folds; the teacher of a fold never sees the fold's images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from l2l_core.core.seeding import folds_of, generator
from l2l_core.errors import InputError


def fold_of_images(image_row: NDArray[np.int64], folds: int, seed: int) -> NDArray[np.int64]:
    """[N] fold of each pair; pairs of one image share a fold, and fold sizes differ by at most one image.

    Raises InputError if there are fewer images than folds.
    """
    images = len(np.unique(image_row))
    if images < folds:
        raise InputError(f"select.folds: got {folds}, but only {images} images are labeled; lower it or label more")
    return folds_of(image_row, folds, generator("folds", seed, folds))
