"""Tables that benches write into the documents, between `<!-- name: begin -->` and `<!-- name: end -->`."""

from __future__ import annotations

from pathlib import Path

RENAMED = {
    "ask": "query",
    "stages.ask": "stages.query",
    "colour": "color",
    "colour and shape": "color and shape",
}
"""Names in stored rows, and the names of today. Rows are kept as they were measured."""


def current_name(name: str) -> str:
    """The name of today for a name in a stored row."""
    return RENAMED.get(name, name)


def put(document: Path, name: str, text: str) -> None:
    """Replace what stands between the marks."""
    before, _, after = _parts(document, name)
    document.write_text(f"{before}{text}\n{after}", encoding="utf-8")


def get(document: Path, name: str) -> str:
    """What stands between the marks, without the line break at its end."""
    return _parts(document, name)[1].removesuffix("\n")


def markdown(head: list[str], rows: list[list[object]]) -> str:
    """A table; floats have three digits, None is empty."""
    cells = [
        [f"{cell:.3f}" if isinstance(cell, float) else "" if cell is None else str(cell) for cell in r] for r in rows
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells])


def _parts(document: Path, name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, rest = document.read_text(encoding="utf-8").split(begin)
    inside, after = rest.split(end)
    return before + begin, inside, end + after
