"""Parameters of a project, changed in part, and those of the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

BENCHMARK: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("benchmark.yaml").read_text(encoding="utf-8")
)
"""Sections that replace those of params.yaml key by key, so that results do not depend on its training settings."""

EDITION = 3
"""Of the method: results of different editions never stand in one table. The second one fits GrabCut to the labeled
masks, starts the network at its proposal, and has a critic. The third one trains at a third of the learning rate, for
longer, and offers the candidate `neighbor`."""


def merged(params: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """params with changes, section by section; what changes does not name stays. Raises KeyError for a new section."""
    return params | {
        key: merged(params[key], value) if isinstance(value, dict) else value for key, value in changes.items()
    }
