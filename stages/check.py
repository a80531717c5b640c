"""Reject invalid parameters. For a round that does not exist, DVC alone would only report a missing file."""

from __future__ import annotations

from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.errors import run_stage


def main() -> None:
    """Validate the parameters and write the number of the round to evaluate."""
    round_number = load_params().round
    records.ROUND_PATH.parent.mkdir(parents=True, exist_ok=True)
    records.ROUND_PATH.write_text(f"{round_number}\n", encoding="utf-8")


if __name__ == "__main__":
    run_stage(main)
