"""The campaigns' table adds up stored rows. A new row replaces the row of the same commit and seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import campaigns, tiny_project

KILLS = {"count": 150, "failures": 0, "torn": 2, "commit": "aaa"}
ROWS = {
    "kills": [KILLS | {"attempts": {"1": 148, "2": 2}}, KILLS | {"failures": 1, "attempts": {"0": 1, "1": 149}}],
    "fuzz": [{"count": 1250, "failures": n, "entrance": n, "commit": "bbb"} for n in range(3)],
    "disk_full": [],
    "concurrent": [{"count": 40, "failures": 0, "refused": 9, "commit": commit} for commit in ("ccc", "bbb")],
}


def test_the_table_sums_the_rows_of_a_campaign() -> None:
    _, _, kills, fuzz, concurrent = campaigns.table(ROWS).splitlines()
    assert kills.startswith("| kills of a run | 300 | 1 | 297 resumed by one `dvc repro`; 4 had torn files of DVC")
    assert fuzz == "| damaged and hostile inputs | 3,750 | 3 | 3 entrances | bbb |"
    assert concurrent.endswith("| 80 | 0 | 18 commands were refused in one line | bbb, ccc |")
    assert campaigns.table({name: [] for name in ROWS}) == "Not measured yet."


def test_a_row_replaces_one_of_its_own_commit_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kills.jsonl"
    for commit, seed, count in (("aaa", 0, 1), ("aaa", 1, 2), ("bbb", 0, 3), ("aaa", 0, 4)):
        monkeypatch.setattr(tiny_project.subprocess, "check_output", lambda *words, commit=commit, **named: commit)
        tiny_project.write_row(path, {"seed": seed, "count": count})
    assert [json.loads(line)["count"] for line in path.read_text().splitlines()] == [2, 3, 4]
