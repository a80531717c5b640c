"""The table of docs/reliability.md: what the campaigns of bench.kills, fuzz, disk_full and concurrent found.

python -m bench.campaigns
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from bench import docs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DOCUMENT, MARK = ROOT / "docs" / "reliability.md", "campaigns"
CAMPAIGNS = {
    "kills": "kills of a run",
    "fuzz": "damaged and hostile inputs",
    "disk_full": "stages on a full disk",
    "concurrent": "commands at the same time",
}
"""Names of the results files, and what a campaign counts."""

Row = dict[str, Any]


def stored() -> dict[str, list[Row]]:
    """Campaign -> its rows; campaigns without a results file have none."""
    files = {name: RESULTS / f"{name}.jsonl" for name in CAMPAIGNS}
    return {
        name: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
        for name, file in files.items()
    }


def table(rows: dict[str, list[Row]]) -> str:
    """Counts of each campaign, summed over its rows."""
    body: list[list[object]] = []
    for name, what in CAMPAIGNS.items():
        if found := rows[name]:
            count, failures = (sum(row[key] for row in found) for key in ("count", "failures"))
            commits = ", ".join(sorted({row["commit"] for row in found}))
            body.append([what, f"{count:,}", failures, _details(name, found), commits])
    return docs.markdown(["campaign", "count", "failures", "details", "commit"], body) if body else "Not measured yet."


def _details(name: str, rows: list[Row]) -> str:
    if name == "kills":
        attempts: Counter[str] = Counter()
        for row in rows:
            attempts.update(row["attempts"])
        one, torn = attempts["1"], sum(row["torn"] for row in rows)
        return f"{one:,} resumed by one `dvc repro`; {torn} had torn files of DVC, which `l2l doctor --fix` moved aside"
    if name == "fuzz":
        return f"{len({row['entrance'] for row in rows})} entrances"
    if name == "disk_full":
        tracebacks, enough = (sum(row[key] for row in rows) for key in ("tracebacks", "enough"))
        return f"{tracebacks} tracebacks; {enough} had enough space"
    return f"{sum(row['refused'] for row in rows)} commands were refused in one line"


def main() -> None:
    docs.put(DOCUMENT, MARK, table(stored()))


if __name__ == "__main__":
    main()
