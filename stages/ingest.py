"""Stage `ingest`: read and check the dataset and write it as tables (data/index)."""

from __future__ import annotations

import sys

from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.datasets.index import summary
from l2l_core.datasets.read import load_dataset
from l2l_core.errors import run_stage


def main() -> None:
    """Write the tables only after every row of the dataset passes the checks."""
    params = load_params()
    ingest = params.ingest
    index = load_dataset(
        params.dataset,
        images=ingest.images,
        split_by=ingest.split_by,
        min_image_side_px=ingest.min_image_side_px,
    )
    paths = records.INDEX
    records.write_table(index.images, paths.images, records.IMAGES)
    records.write_table(index.refs, paths.refs, records.REFS)
    records.write_table(index.objects, paths.objects, records.OBJECTS)
    records.write_table(index.masks, paths.masks, records.MASKS)
    for warning in index.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"ingest: {params.dataset}: {summary(index)}")


if __name__ == "__main__":
    run_stage(main)
