"""Tables that an interrupted stage has stored, chunk by chunk, and that its next run reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from l2l_core.artifacts.records import read_table
from l2l_core.core.files import move_aside
from l2l_core.core.progress import logger
from l2l_core.errors import ArtifactError


def read_chunk(path: Path, schema: pa.Schema, again: str, is_expected: Callable[[pa.Table], bool]) -> pa.Table | None:
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
