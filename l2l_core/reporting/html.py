"""Shared parts of the HTML pages: tables, templates, and a policy that forbids loading anything but the file itself."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from l2l_core.core.metrics import PR_THRESHOLDS

FOLDER = Path(__file__).parent

PARTS = "page.html.jinja"
"""Macros of every page: its head, with the one style sheet, and tables."""

PERCENT, DIFFERENCE, COUNT = "%.2f", "%+.2f", "%d"
"""Number formats. A signed number is also colored: above 0 is good."""

SCORE_NAMES = {"miou": "mIoU", "oiou": "oIoU", **{f"pr{round(100 * x)}": f"Pr@{x}" for x in PR_THRESHOLDS}}
"""Display names of the keys of `metrics.segmentation_scores`."""


@dataclass(frozen=True)
class Table:
    """Numbers with a name for each row and column; None for an undefined number."""

    title: str
    columns: Mapping[str, str]  # name -> number format
    rows: list[tuple[str, list[float | None]]]
    unit: str = "%"
    marked: str = ""  # the highlighted row


def render_page(template: str, script: str = "", **values: object) -> str:
    """Fill a template of this folder; text in `values` is escaped. script: file name of a script to embed."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    code = (FOLDER / script).read_text(encoding="utf-8") if script else ""
    shared = {"parts": PARTS, "script": Markup(code), "policy": _policy(code)}
    return environment.get_template(template).render(**shared, **values)


def _policy(script: str) -> str:
    """Content-Security-Policy of a page that runs at most one embedded script and uses no network."""
    allowed = {"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'", "img-src": "data:"}
    allowed["style-src"] = "'unsafe-inline'"  # drawings and the legend color their parts by attributes
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
        allowed["script-src"] = f"'sha256-{digest}'"
    return "; ".join(f"{kind} {source}" for kind, source in allowed.items())
