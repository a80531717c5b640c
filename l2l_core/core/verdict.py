"""Which objects a sentence means: surely, possibly, or not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Verdict:
    """Per object: surely meant, possibly meant; sure implies possible. Both [N] bool."""

    sure: NDArray[np.bool_]
    possible: NDArray[np.bool_]

    def __and__(self, other: Verdict) -> Verdict:
        return Verdict(self.sure & other.sure, self.possible & other.possible)

    def __invert__(self) -> Verdict:
        return Verdict(~self.possible, ~self.sure)

    def only(self) -> int | None:
        """The one object that surely fits if no other possibly fits, else None."""
        if self.sure.sum() == 1 and self.possible.sum() == 1:
            return int(self.sure.argmax())
        return None
