"""Seeds, folds and evenly spaced rows.

Every random draw names its purpose, so that no two parts of the pipeline draw the same numbers.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray


def seed_of(purpose: str, *numbers: int) -> int:
    """A 63-bit seed that depends on the purpose, the numbers (each >= 0) and their count."""
    low, high = _sequence(purpose, numbers).generate_state(2).tolist()
    return int(low) | (int(high) & 0x7FFFFFFF) << 32


def derive_seed(seed: int, purpose: str) -> int:
    """A 32-bit seed for one purpose of a run, such as `warmup`."""
    return int(_sequence(purpose, (seed,)).generate_state(1)[0])


def generator(purpose: str, *numbers: int) -> np.random.Generator:
    """A NumPy generator, seeded as in `seed_of`."""
    return np.random.default_rng(_sequence(purpose, numbers))


def folds_of(group: NDArray[np.int64], folds: int, draws: np.random.Generator) -> NDArray[np.int64]:
    """[N] group of each row, such as its image -> [N] fold of each row, in 0..folds - 1.

    Rows of one group share a fold. Fold sizes differ by at most one group.
    """
    groups, index = np.unique(group, return_inverse=True)
    return np.asarray((draws.permutation(len(groups)) % folds)[index])


def evenly_picked(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of the rows 0..count - 1, evenly spaced from first to last; all rows if count <= most."""
    return np.linspace(0, count - 1, min(most, count)).astype(np.int64)


def _sequence(purpose: str, numbers: tuple[int, ...]) -> np.random.SeedSequence:
    # SeedSequence ignores trailing zeros: it treats [s, e] and [s, e, 0] alike. Hence the count.
    return np.random.SeedSequence([zlib.crc32(purpose.encode()), len(numbers), *numbers])
