"""Parameters of a project, changed in part."""

from __future__ import annotations

from typing import Any


def merged(params: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """params with changes, section by section; what changes does not name stays. Raises KeyError for a new section."""
    return params | {
        key: merged(params[key], value) if isinstance(value, dict) else value for key, value in changes.items()
    }
