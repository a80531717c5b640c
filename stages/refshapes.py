"""Stage `refshapes`: write the built-in dataset to data/refshapes."""

from __future__ import annotations

from l2l_core.config import BUILTIN_DATASET, load_params
from l2l_core.errors import run_stage
from l2l_core.refshapes.dataset import write_refshapes


def main() -> None:
    """Draw the scenes and write them in RefCOCO's layout."""
    write_refshapes(BUILTIN_DATASET, load_params().refshapes)


if __name__ == "__main__":
    run_stage(main)
