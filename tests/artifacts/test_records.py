"""Tables on disk: they read back unchanged, equal rows give equal bytes, and no write leaves a partial file."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from l2l_core.artifacts import records
from l2l_core.core.masks import encode_rle
from l2l_core.errors import ArtifactError

SCHEMAS = {name: value for name, value in vars(records).items() if isinstance(value, pa.Schema)}

MASK_ROWS = [
    {"ann_id": 2**40, "height": 4, "width": 5, "rle_counts": encode_rle(np.eye(4, 5)), "area_px": 4},
    {"ann_id": -1, "height": 1, "width": 1, "rle_counts": b"", "area_px": 0},
]


def test_reads_back_written_rows(tmp_path):
    path = tmp_path / "below" / "masks.parquet"
    records.write_table(records.make_table(MASK_ROWS, records.MASKS), path, records.MASKS)

    assert records.read_table(path, records.MASKS).to_pylist() == MASK_ROWS
    assert [file.name for file in path.parent.iterdir()] == ["masks.parquet"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_reads_back_every_schema(tmp_path, name):
    """An empty table and a table with one row of nulls keep their column types."""
    schema = SCHEMAS[name]
    for rows in ([], [{}]):
        records.write_table(records.make_table(rows, schema), tmp_path / "t.parquet", schema)
        table = records.read_table(tmp_path / "t.parquet", schema)
        assert table.schema.equals(schema)
        assert table.num_rows == len(rows)


def test_identical_rows_give_identical_bytes(tmp_path):
    for name in ("a", "b"):
        records.write_table(records.make_table(MASK_ROWS, records.MASKS), tmp_path / name, records.MASKS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_reads_selected_columns_in_the_requested_order(tmp_path):
    records.write_table(records.make_table(MASK_ROWS, records.MASKS), tmp_path / "t", records.MASKS)
    table = records.read_table(tmp_path / "t", records.MASKS, columns=["area_px", "ann_id"])
    assert table.to_pylist() == [{"area_px": row["area_px"], "ann_id": row["ann_id"]} for row in MASK_ROWS]


def test_stores_boxes_and_missing_boxes(tmp_path):
    rows = [{"sent_id": 1, "bbox": [1.5, 2, 3, 4]}, {"sent_id": 2, "bbox": None}]
    records.write_table(records.make_table(rows, records.REFS), tmp_path / "t", records.REFS)

    frame = records.to_frame(records.read_table(tmp_path / "t", records.REFS))
    np.testing.assert_array_equal(frame["bbox"][0], np.array([1.5, 2, 3, 4], dtype=np.float32))
    assert frame["bbox"][1] is None


def test_refuses_to_write_a_table_of_another_schema(tmp_path):
    path = tmp_path / "masks.parquet"
    records.write_table(records.make_table(MASK_ROWS, records.MASKS), path, records.MASKS)
    before = path.read_bytes()

    with pytest.raises(ArtifactError, match=r"masks\.parquet: columns differ"):
        records.write_table(pa.table({"ann_id": [1]}), path, records.MASKS)
    assert path.read_bytes() == before


def test_hard_link_to_the_old_file_keeps_its_bytes(tmp_path):
    """DVC's cache may hard-link a stage's output; writing in place would corrupt it."""
    path, link = tmp_path / "masks.parquet", tmp_path / "cached"
    records.write_table(records.make_table(MASK_ROWS, records.MASKS), path, records.MASKS)
    link.hardlink_to(path)
    before = link.read_bytes()

    records.write_table(records.make_table(MASK_ROWS[:1], records.MASKS), path, records.MASKS)
    assert link.read_bytes() == before
    assert records.read_table(path, records.MASKS).num_rows == 1


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "masks.parquet"
    records.write_table(records.make_table(MASK_ROWS, records.MASKS), path, records.MASKS)
    before = path.read_bytes()

    def fail(table, where, **options):
        where.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        records.write_table(records.make_table(MASK_ROWS[:1], records.MASKS), path, records.MASKS)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["masks.parquet"]


def in_parts(path, schema):
    """Read a table as parts, and join them."""
    return pa.concat_tables([schema.empty_table(), *records.TableParts(path, schema)])


@pytest.mark.parametrize("read", [records.read_table, in_parts])
def test_names_an_unreadable_table(tmp_path, read):
    with pytest.raises(ArtifactError, match=r"none\.parquet: not found.*dvc repro"):
        read(tmp_path / "none.parquet", records.MASKS)

    (tmp_path / "text").write_text("no parquet")
    with pytest.raises(ArtifactError, match="text: not a Parquet file"):
        read(tmp_path / "text", records.MASKS)

    pq.write_table(pa.table({"ann_id": [1]}), tmp_path / "fewer")
    with pytest.raises(ArtifactError, match=r"fewer: .*height[^\n]*$"):
        read(tmp_path / "fewer", records.MASKS)

    pq.write_table(pa.table({"sent_id": pa.array([1], pa.int32()), "role": ["eval"]}), tmp_path / "narrow")
    with pytest.raises(ArtifactError, match="with their types"):
        read(tmp_path / "narrow", records.SPLIT)


def test_parts_are_the_rows_of_the_table_in_order(tmp_path, monkeypatch):
    """Across row groups, in the requested columns, and again when iterated again."""
    monkeypatch.setattr(records, "PART_ROWS", 7)
    rows = [{"sent_id": 3 * number, "role": ("labeled", "eval")[number % 2]} for number in range(40)]
    table, path = records.make_table(rows, records.SPLIT), tmp_path / "split.parquet"
    pq.write_table(table, path, row_group_size=11)
    for columns in (None, ["sent_id"], ["role", "sent_id"]):
        whole = records.read_table(path, records.SPLIT, columns)
        for parts in (records.TableParts(path, records.SPLIT, columns), whole):
            for _ in range(2):
                found = list(records.parts_of(parts))
                assert max(map(len, found)) <= 7
                assert pa.concat_tables(found).equals(whole)
    records.write_table(records.SPLIT.empty_table(), path, records.SPLIT)
    assert list(records.TableParts(path, records.SPLIT)) == []


def test_training_columns_of_refs_contain_no_ground_truth():
    assert set(records.SENTENCE_COLUMNS) < set(records.REFS.names)
    assert not {"bbox", "ann_id", "category"} & set(records.SENTENCE_COLUMNS)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"proposals": {"renderer": "circle"}}'])
def test_names_an_unreadable_rendering_file(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        records.RENDERING_PATH.parent.mkdir(parents=True)
        records.RENDERING_PATH.write_text(content)
    with pytest.raises(ArtifactError, match=r"data/proposals/rendering\.json: not .*dvc repro"):
        records.read_rendering()


@pytest.mark.parametrize("read", [records.read_table, in_parts])
def test_no_flipped_bit_is_read_as_another_value(tmp_path, read):
    """Every bit of a file, one at a time: the table is refused, or read as it was written."""
    rows = [{"sent_id": number, "role": ("labeled", "eval")[number % 2]} for number in range(40)]
    table, path = records.make_table(rows, records.SPLIT), tmp_path / "split.parquet"
    records.write_table(table, path, records.SPLIT)
    whole, refused = path.read_bytes(), 0
    for place in range(0, 8 * len(whole), 7):  # every eighth bit of each place in a byte
        torn = bytearray(whole)
        torn[place // 8] ^= 1 << (place % 8)
        path.write_bytes(torn)
        try:
            assert read(path, records.SPLIT).equals(table), place
        except ArtifactError:
            refused += 1
    assert refused > len(whole) / 2
