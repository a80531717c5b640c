"""Refuse parameters that cannot be. For a round that does not exist, DVC itself would only miss a file."""

from __future__ import annotations

from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.errors import exit_code


def main() -> None:
    """Write the number of the round to evaluate, which is known to exist."""
    number = load_params().round
    records.ROUND_PATH.parent.mkdir(parents=True, exist_ok=True)
    records.ROUND_PATH.write_text(f"{number}\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
