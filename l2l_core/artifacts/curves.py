"""Training curves on disk through DVCLive, and CSV tables for the history."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def live_curve(folder: Path) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yield a function that logs one row (`step` and named values) at once; `dvc plots show` reads the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DVCLive warns if there is no Git repository
        from dvclive import Live

        with Live(str(folder), dvcyaml=None, save_dvc_exp=False, report=None, monitor_system=False) as live:

            def log(row: dict[str, float]) -> None:
                live.step = int(row["step"])
                for name, value in row.items():
                    if name != "step":
                        live.log_metric(name, value)
                live.make_summary()

            yield log


def read_curve(folder: Path, names: Sequence[str]) -> list[dict[str, str]]:
    """The rows that `live_curve` logged: `step` and the named values, as text."""
    columns = {}
    for name in names:
        with (folder / "plots" / "metrics" / f"{name}.tsv").open(newline="", encoding="utf-8") as file:
            columns[name] = list(csv.DictReader(file, delimiter="\t"))
    return [
        {"step": rows[0]["step"], **{name: row[name] for name, row in zip(names, rows, strict=True)}}
        for rows in zip(*columns.values(), strict=True)
    ]


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write a CSV file with a header, even if there are no rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns))
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file as text; no rows if the file does not exist."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
