"""Write docs/reference/: commands, parameters, the Python API and the tables, from the code itself.

    python -m tools.reference

A test compares the files with what this writes.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import typer

import l2l_core
from l2l_core.cli import app

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
WIDTH = 100


def pages() -> dict[str, str]:
    """File name -> content."""
    return {
        "cli.md": "# Commands\n\n" + _written_by() + "\n".join(_commands(typer.main.get_command(app), "l2l", None)),
        "parameters.md": _parameters(),
        "python.md": "# Python API\n\n" + _written_by() + "\n".join(_api()),
        "artifacts.md": _artifacts(),
    }


def _written_by() -> str:
    return "Written by `python -m tools.reference`.\n\n"


def _commands(command: Any, name: str, parent: click.Context | None) -> Iterator[str]:
    """A heading and the help of each command, its subcommands after it; hidden ones are left out."""
    context = click.Context(command, parent=parent, info_name=name.split()[-1], max_content_width=WIDTH)
    context.terminal_width = WIDTH
    yield f"## `{name}`\n\n```text\n{command.get_help(context)}\n```\n"
    commands = getattr(command, "commands", {})  # of a group, which typer brings itself
    for sub, inner in sorted(commands.items()):
        if not inner.hidden:
            yield from _commands(inner, f"{name} {sub}", context)


def _parameters() -> str:
    """params.yaml, section by section."""
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    return f"# Parameters\n\n{_written_by()}`params.yaml`, with its defaults:\n\n```yaml\n{text.rstrip()}\n```\n"


def _api() -> Iterator[str]:
    for name in sorted(l2l_core.__all__):
        public = getattr(l2l_core, name)
        yield _entry(f"l2l_core.{name}", public)
        if inspect.isclass(public) and not issubclass(public, Exception):
            for key, value in vars(public).items():
                if key.startswith("_") and key != "__call__":
                    continue
                inner = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if inspect.isfunction(inner) and inspect.getdoc(inner):
                    yield _entry(f"{name}.{key}", inner, level=3)


def _entry(name: str, public: object, level: int = 2) -> str:
    signature = ""
    if inspect.isfunction(public):
        signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(public)))  # annotations as written
    doc = (inspect.getdoc(public) or "").strip()
    head = name.rpartition(".")[2] + signature
    return f"{'#' * level} `{name}`\n\n```text\n{head}\n\n{doc}\n```\n"


def _artifacts() -> str:
    """The tables between stages: schemas of l2l_core/artifacts/records.py with the comments beside their columns."""
    source = (ROOT / "l2l_core" / "artifacts" / "records.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    parts = [f"# Tables\n\n{_written_by()}{ast.get_docstring(ast.parse(source))}\n"]
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
            continue
        if ast.unparse(node.value.func) != "pa.schema":
            continue
        parts.append(f"## {ast.unparse(node.targets[0])}\n")
        if about := _comment(lines[node.lineno - 1]):
            parts.append(f"{about}\n")
        parts.append("| column | type | note |\n| --- | --- | --- |")
        columns = node.value.args[0]
        assert isinstance(columns, ast.List)
        for column in columns.elts:
            assert isinstance(column, ast.Tuple)
            kind = ast.unparse(column.elts[1])
            alone = lines[column.lineno - 1].count('("') == 1
            note = _comment(lines[column.lineno - 1]) if alone else ""
            parts.append(f"| `{ast.literal_eval(column.elts[0])}` | {_type(kind)} | {note} |")
        parts.append("")
    return "\n".join(parts)


def _type(kind: str) -> str:
    named = {"_BOX": "float32[4]", "_POINT": "float32[2]", "pa.list_(pa.string())": "list of string"}
    return named.get(kind, kind.removeprefix("pa.").removesuffix("()").rstrip("_"))


def _comment(line: str) -> str:
    comment = line.partition("  # ")[2]
    return f"{comment[:1].upper()}{comment[1:]}." if comment else ""


def main() -> None:
    """Write every page."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, content in pages().items():
        (FOLDER / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
