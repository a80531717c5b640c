"""The benchmark of several workers: two kills of a small stage, and its table."""

from __future__ import annotations

import shutil
from pathlib import Path

from synthetic_run import write_run

from bench import workers


def test_killed_proposals_resume_with_the_same_bytes(tmp_path: Path) -> None:
    write_run(tmp_path)
    shutil.copy(workers.ROOT / "params.yaml", tmp_path)
    row = workers.campaign(tmp_path, "proposals", kills=2, seed=0, chunk=2)
    assert (row["sentences"], row["chunks"], row["count"]) == (48, 24, 2)
    assert (row["failures"], row["rewritten"]) == (0, 0)


def timed(way: str, turn: int, seconds: float, commit: str = "abc") -> dict[str, object]:
    row = {"measure": "overhead", "way": way, "turn": turn, "seconds": seconds, "cpu_s": 2 * seconds, "start_s": 0.5}
    return row | {"sentences": 1000, "device": "cpu", "commit": commit}


def killed(stage: str, count: int) -> dict[str, object]:
    row = {"measure": "kills", "stage": stage, "count": count, "failures": 1, "rewritten": 0}
    return row | {"sentences": 80, "chunks": 5, "commit": "abc"}


def test_the_table_has_medians_of_the_last_commit_and_the_last_kills() -> None:
    rows = [timed("local 2", 0, 99.0, "old"), killed("select", 7), killed("select", 9)]
    for turn in range(3):
        rows += [timed("local 2", turn, 10.0 + turn), timed("ray 2", turn, 12.0 + turn)]
    lines = workers.table(rows).splitlines()
    assert lines[2] == "| local 2 | 11.0 | 0.5 | 22.0 | 1.00 |"
    assert lines[3] == "| ray 2 | 13.0 | 0.5 | 26.0 | 1.18 |"  # 13 / 11
    assert "1,000 sentences, one thread a worker, median of 3 turns" in lines[5]
    assert lines[9] == "| `select` | 80 | 5 | 9 | 1 | 0 |"
    assert workers.table(rows[1:3]).splitlines()[2] == lines[9]
