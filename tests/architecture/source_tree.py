"""What the project's Python files import, read from their source."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


def module_name(path: Path) -> str:
    """l2l_core/datasets/index.py -> l2l_core.datasets.index; a package's __init__.py is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for top in ("l2l_core", "stages") for path in sorted((ROOT / top).rglob("*.py"))}


@cache
def parse(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def imported_names(module: str) -> set[str]:
    """Full names after `import` and `from x import`, also inside functions and under `if TYPE_CHECKING`."""
    names: set[str] = set()
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@cache
def imported_modules(module: str) -> set[str]:
    """Project modules that a module imports; a package counts only if a name of its __init__.py is imported."""
    found = set()
    for name in imported_names(module):
        if name.split(".")[0] in ("l2l_core", "stages"):
            found.add(name if name in FILES else name.rpartition(".")[0])
    return found


def closure(module: str) -> set[str]:
    """A module and all project modules that it imports, directly or indirectly."""
    seen, waiting = set(), [module]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += imported_modules(current)
    return seen
