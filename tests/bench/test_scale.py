"""The benchmark of costs by data size: repeated tables, and its table."""

from __future__ import annotations

import pyarrow as pa

from bench import scale
from l2l_core.artifacts import records


def test_repeated_tables_have_their_own_ids_and_the_same_other_columns() -> None:
    table = records.make_table([{"sent_id": 4, "role": "eval"}, {"sent_id": 7, "role": "labeled"}], records.SPLIT)
    again = scale.repeated(table, 3)
    assert again.schema.equals(records.SPLIT)
    assert again["sent_id"].to_pylist() == [4, 7, 10**7 + 4, 10**7 + 7, 2 * 10**7 + 4, 2 * 10**7 + 7]
    assert again["role"].to_pylist() == 3 * ["eval", "labeled"]
    assert scale.repeated(table, 1).equals(table)


def test_ids_of_a_copy_belong_together() -> None:
    refs = records.make_table([{"sent_id": 1, "ann_id": 2, "image_id": 3, "ref_id": 4}], records.REFS)
    masks = records.make_table(
        [{"ann_id": 2, "height": 1, "width": 1, "rle_counts": b"1", "area_px": 0}], records.MASKS
    )
    named, known = (scale.repeated(one, 2)["ann_id"] for one in (refs, masks))
    assert named.equals(known)
    assert isinstance(known, pa.ChunkedArray)


def row(piece: str, times: int, cpu_s: float, peak_mb: int) -> dict[str, object]:
    return {
        "piece": piece,
        "times": times,
        "sentences": 1000 * times,
        "items": 500 * times,
        "cpu_s": cpu_s,
        "peak_mb": peak_mb,
        "commit": "abc",
        "device": "cpu",
    }


def test_the_table_has_costs_per_item_and_the_memory_that_a_sentence_adds() -> None:
    """The last row of a piece and size counts."""
    rows = [row("load", 1, 9.0, 900), row("load", 1, 1.0, 100), row("load", 10, 5.0, 190), row("ingest", 1, 0.5, 80)]
    lines = scale.table(rows).splitlines()
    assert lines[0] == "| what | ms, 1,000 | ms, 10,000 | MB, 1,000 | MB, 10,000 | KB each |"
    assert lines[2] == f"| {scale.SHOWN['ingest']} | 1 |  | 80 |  |  |"
    # 1 s and 5 s of 500 and 5,000 items; 90 MB by 9,000 sentences
    assert lines[3] == f"| {scale.SHOWN['load']} | 2 | 1 | 100 | 190 | 10 |"
    assert lines[-1] == "One thread; cpu, commits abc."
