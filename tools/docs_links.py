"""A hook of MkDocs: links that leave docs/ become plain paths, since the site holds docs/ alone."""

from __future__ import annotations

import re

OUTSIDE = re.compile(r"(?<!!)\[([^\]]*)\]\(\.\./([^)#\s]+)[^)]*\)")


def on_page_markdown(markdown: str, page: object, **_: object) -> str:
    """Replace `[model card](../vlm/README.md)` by: model card (`vlm/README.md`); on pages directly in docs/."""
    file = getattr(page, "file", None)
    return markdown if "/" in getattr(file, "src_uri", "") else OUTSIDE.sub(r"\1 (`\2`)", markdown)
