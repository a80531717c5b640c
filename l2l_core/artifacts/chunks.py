"""Tables that an interrupted stage has stored, part by part, and that its next run reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa

from l2l_core.artifacts.records import read_table, write_table
from l2l_core.core.files import move_aside
from l2l_core.core.progress import logger
from l2l_core.errors import ArtifactError

PER_CHUNK = 16
"""Batches of a chunk: a kill loses at most these, and a chunk takes much longer to compute than to write."""


def read_chunk(
    path: Path, schema: pa.Schema, again: str, is_expected: Callable[[pa.Table], bool] = lambda table: True
) -> pa.Table | None:
    """Read a table of an interrupted run, or return None if it does not exist.

    A torn table, or one whose rows are not the expected ones, is moved aside with a note, and None is returned.
    again: the caller's next action, for the printed note.
    """
    if not path.exists():
        return None
    try:
        table = read_table(path, schema)
        reason = "" if is_expected(table) else "not the expected rows"
    except ArtifactError:
        reason = "torn"
    if not reason:
        return table
    logger.warning(f"note: {path}: {reason}, moved to {move_aside(path).name}; {again}")
    return None


def resume_chunks(
    folder: Path | None, schema: pa.Schema, again: str, tables_from: Callable[[int], Iterator[pa.Table]]
) -> Iterator[pa.Table]:
    """Yield the tables of all batches, PER_CHUNK together: first the stored chunks, then new ones, stored as they come.

    tables_from: number of a batch -> the tables of this batch and of all later ones. folder: where chunks are stored;
    None stores nothing. again: the caller's action after a torn chunk, for the printed note.
    """
    number = 0
    if folder is not None:
        while (table := read_chunk(folder / f"{number}.parquet", schema, again)) is not None:
            yield table
            number += 1
    tables = tables_from(number * PER_CHUNK)
    while some := list(islice(tables, PER_CHUNK)):
        table = pa.concat_tables(some)
        if folder is not None:
            write_table(table, folder / f"{number}.parquet", schema)
        yield table
        number += 1
