import contextlib
import json

import pytest

from l2l_core.artifacts.curves import live_curve, read_curve, read_rows, write_rows

ROWS = [{"step": 20, "loss": 1.25, "lr": 1e-05}, {"step": 40, "loss": 0.5, "lr": 2.5e-07}]


def test_reads_back_a_logged_curve(tmp_path):
    with live_curve(tmp_path / "curves") as log:
        for row in ROWS:
            log(row)
    read = read_curve(tmp_path / "curves", ("loss", "lr"))
    assert [{name: float(value) for name, value in row.items()} for row in read] == ROWS
    assert [row["step"] for row in read] == ["20", "40"]
    summary = json.loads((tmp_path / "curves" / "metrics.json").read_text())
    assert summary == {"step": 40, "loss": 0.5, "lr": 2.5e-07}


def test_returns_columns_in_the_requested_order(tmp_path):
    with live_curve(tmp_path) as log:
        log(ROWS[0])
    assert list(read_curve(tmp_path, ("lr", "loss"))[0]) == ["step", "lr", "loss"]


def test_rerun_into_the_same_folder_writes_the_same_bytes(tmp_path):
    """A killed run leaves its first rows on disk. The resumed run logs them again."""
    with live_curve(tmp_path / "whole") as log:
        for row in ROWS:
            log(row)
    with contextlib.suppress(KeyboardInterrupt), live_curve(tmp_path / "killed") as log:
        log(ROWS[0])
        raise KeyboardInterrupt
    with live_curve(tmp_path / "killed") as log:
        for row in ROWS:
            log(row)
    whole, killed = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "whole", tmp_path / "killed")
    )
    assert whole == killed


def test_writes_only_inside_the_given_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with live_curve(tmp_path / "here" / "curves") as log:
        log(ROWS[0])
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert not list((tmp_path / "here").rglob("*.yaml"))


def test_writes_and_reads_rows_as_csv(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    write_rows(path, ("name", "value"), [{"name": 'a, "b"', "value": 1}, {"name": "", "value": 0.5}])
    assert read_rows(path) == [{"name": 'a, "b"', "value": "1"}, {"name": "", "value": "0.5"}]
    write_rows(path, ("name", "value"), [])
    assert path.read_text().split() == ["name,value"]
    assert read_rows(path) == []
    assert read_rows(tmp_path / "none.csv") == []


def test_refuses_a_row_with_an_unknown_column(tmp_path):
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        write_rows(tmp_path / "rows.csv", ("name",), [{"name": 1, "other": 2}])
