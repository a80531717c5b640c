"""Detects the layout of a dataset and reads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from l2l_core.core.images import project_path, visible
from l2l_core.datasets import published
from l2l_core.datasets.index import Index
from l2l_core.datasets.jsonl import read_jsonl
from l2l_core.datasets.refcoco import read_refcoco, refs_files
from l2l_core.errors import InputError


def load_dataset(
    dataset: str | Path, *, images: str = "auto", split_by: str = "auto", min_image_side_px: int = 1
) -> Index:
    """Read and check the dataset in a folder, or in one .jsonl file.

    images: `auto` or a folder; split_by: `auto` or which refs(<split_by>) file. min_image_side_px: smaller images are
    errors. Problems that are not errors go to the index's `warnings`. Raises InputError with every bad row.

    >>> load_dataset("examples/tabletop").refs.column_names[:3]
    ['sent_id', 'ref_id', 'ann_id']
    """
    path = Path(dataset)
    if images != "auto" and not Path(images).is_dir():
        raise InputError(f"ingest.images: got {images!r}, expected auto or a folder that exists")
    layout, path = find_layout(path)
    match layout:
        case "refcoco":
            index = read_refcoco(path, images, split_by, min_image_side_px)
            differences = published.warnings(path, split_by, index.refs)
            return replace(index, warnings=(*index.warnings, *differences))
        case "jsonl":
            return read_jsonl(path, images, min_image_side_px)


def find_layout(path: Path) -> tuple[Literal["refcoco", "jsonl"], Path]:
    """The layout of a dataset and the folder (refcoco) or file (jsonl) to read. Raises InputError if it is unclear."""
    if path.is_file() and path.suffix == ".jsonl":
        return "jsonl", path
    if not path.is_dir():
        hint = f"; to download it: l2l fetch {path.name} images" if path.name in published.ARCHIVES else ""
        raise InputError(f"dataset: got {str(path)!r}, expected a folder or a .jsonl file that exists{hint}")
    refs, pairs = refs_files(path), visible(path.glob("*.jsonl"))
    if refs and not pairs:
        return "refcoco", path
    if len(pairs) == 1 and not refs:
        return "jsonl", pairs[0]
    found = ", ".join(file.name for file in [*refs, *pairs]) or "neither"
    raise InputError(
        f"dataset: {project_path(path)}: expected refs(<split_by>).p or .json with instances.json, "
        f"or exactly one .jsonl file; found {found}"
    )
