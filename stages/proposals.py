"""Render every sentence's priors into one soft map of where the referred object is."""

from __future__ import annotations

from l2l_core import records
from l2l_core.config import load_params
from l2l_core.errors import exit_code
from l2l_core.proposals import make_proposals


def main() -> None:
    """data/priors -> data/proposals/proposals.parquet, one row a sentence."""
    params = load_params()
    columns = ["sent_id", "sample_index", "bbox", "point", "score"]
    priors = records.read_table(records.PRIORS_PATH, records.PRIORS, columns)
    refs = records.to_frame(records.read_table(records.INDEX.refs, records.REFS, ["sent_id", "image_id"]))
    sizes = ["image_id", "file_name", "height", "width"]
    images = records.to_frame(records.read_table(records.INDEX.images, records.IMAGES, sizes))
    records.write_table(
        make_proposals(priors, refs, images, params.proposals), records.PROPOSALS_PATH, records.PROPOSALS
    )


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
