"""Seeds, folds and even picks of rows.

Every part of the pipeline names what it draws, so that no two parts draw the same numbers.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray


def seed_of(purpose: str, *numbers: int) -> int:
    """A 63-bit seed that is a function of the purpose and the numbers (each >= 0), and of how many there are."""
    low, high = _sequence(purpose, numbers).generate_state(2).tolist()
    return int(low) | (int(high) & 0x7FFFFFFF) << 32


def derive_seed(seed: int, purpose: str) -> int:
    """A 32-bit seed for one purpose of a run, such as `warmup`."""
    return int(_sequence(purpose, (seed,)).generate_state(1)[0])


def generator(purpose: str, *numbers: int) -> np.random.Generator:
    """A NumPy generator that is seeded as in `seed_of`."""
    return np.random.default_rng(_sequence(purpose, numbers))


def folds_of(group: NDArray[np.int64], folds: int, draws: np.random.Generator) -> NDArray[np.int64]:
    """[N] group of each row, such as its image -> [N] its fold, in 0..folds - 1.

    Rows of one group share a fold. The numbers of groups in two folds differ by at most one.
    """
    groups, place = np.unique(group, return_inverse=True)
    return np.asarray((draws.permutation(len(groups)) % folds)[place])


def evenly_picked(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of the rows 0..count - 1, spread evenly from the first to the last; all if there are no more."""
    return np.linspace(0, count - 1, min(most, count)).astype(np.int64)


def _sequence(purpose: str, numbers: tuple[int, ...]) -> np.random.SeedSequence:
    # SeedSequence ignores trailing zeros: [s, e] and [s, e, 0] are the same to it. Hence the count.
    return np.random.SeedSequence([zlib.crc32(purpose.encode()), len(numbers), *numbers])
