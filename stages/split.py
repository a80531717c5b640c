"""Stage `split`: choose the labeled sentences and copy their masks (data/split)."""

from __future__ import annotations

from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.datasets import splits
from l2l_core.errors import run_stage


def main() -> None:
    """Draw a fraction of the images, or use the list file."""
    params = load_params()
    refs = records.read_table(records.INDEX.refs, records.REFS)
    masks = records.read_table(records.INDEX.masks, records.MASKS)
    if params.split.list_file is None:
        split = splits.split_by_fraction(refs, params.split.labeled_fraction, params.seed)
    else:
        split = splits.split_by_list(refs, params.split.list_file)
    labeled = splits.labeled_masks(refs, split, masks)
    records.write_table(split, records.SPLIT_PATH, records.SPLIT)
    records.write_table(labeled, records.LABELED_MASKS_PATH, records.MASKS)
    print(f"split: {splits.summary(refs, split)}")


if __name__ == "__main__":
    run_stage(main)
