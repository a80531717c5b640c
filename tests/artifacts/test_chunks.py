"""Chunks of an interrupted stage: what is stored is read, everything else is computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from l2l_core.artifacts import chunks
from l2l_core.artifacts.chunks import resume_chunks

SCHEMA = pa.schema([("batch", pa.int64())])
BATCHES = 7
FILES = ["0.parquet", "1.parquet", "2.parquet", "3.parquet"]


class Killed(Exception):
    """Stands for a kill."""


class Stage:
    """Computes a table with its number for each batch, until it is killed."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.killed_at, self.computed = killed_at, []

    def tables_from(self, first: int) -> Iterator[pa.Table]:
        for batch in range(first, BATCHES):
            if batch == self.killed_at:
                raise Killed
            self.computed.append(batch)
            yield pa.table({"batch": [batch]}, schema=SCHEMA)

    def run(self, folder: Path | None) -> list[int]:
        tables = resume_chunks(folder, SCHEMA, "computing again", self.tables_from)
        return pa.concat_tables(tables)["batch"].to_pylist()


@pytest.fixture(autouse=True)
def _two_batches_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "PER_CHUNK", 2)


def test_without_a_folder_nothing_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Stage().run(None) == list(range(BATCHES))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("killed_at", "again"), [(0, range(7)), (1, range(7)), (4, range(4, 7)), (5, range(4, 7))])
def test_a_killed_stage_computes_only_what_is_not_stored(tmp_path: Path, killed_at: int, again: range) -> None:
    with pytest.raises(Killed):
        Stage(killed_at).run(tmp_path)
    resumed = Stage()
    assert resumed.run(tmp_path) == list(range(BATCHES))
    assert resumed.computed == list(again)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    finished = Stage()
    assert finished.run(tmp_path) == list(range(BATCHES))
    assert finished.computed == []


def test_a_torn_chunk_and_all_later_ones_are_computed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Stage().run(tmp_path)
    torn = tmp_path / "1.parquet"
    torn.write_bytes(torn.read_bytes()[:-9])
    resumed = Stage()
    assert resumed.run(tmp_path) == list(range(BATCHES))
    assert resumed.computed == [2, 3, 4, 5, 6]
    assert capsys.readouterr().err == f"note: {torn}: torn, moved to 1.parquet.torn; computing again\n"
