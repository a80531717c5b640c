"""Imports point down a list of layers; stages are thin and know nothing of each other."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

import pytest
from source_tree import FILES, imported_modules, imported_names, parse

LEVELS = {
    "errors": 0,
    "geometry": 0,
    "grabcut": 0,
    "masks": 0,
    "memory": 0,
    "optional": 0,
    "progress": 0,
    "threads": 0,
    "seeds": 0,
    "config": 1,
    "device": 1,
    "outputs": 1,
    "page": 1,
    "records": 1,
    "metrics": 1,
    "data": 2,
    "newest": 2,
    "proposals": 2,
    "proposal_fit": 2,
    "priors": 3,
    "model": 3,
    "selection": 3,
    "engine": 4,
    "predictor": 4,
    "evaluation": 4,
    "breakdown": 4,
    "history": 4,
    "overlays": 5,
    "figures": 5,
    "gallery": 5,
    "report": 5,
    "compare": 5,
    "export": 5,
    "predictions": 5,
    "preflight": 5,
    "repro": 5,
    "serve": 5,
    "cli": 6,
    "__main__": 7,
}
"""Rooms of l2l_core: modules and packages. A room imports from its own level (never in a circle) and from below."""

APART = ("priors", "model", "selection")
"""Rooms of one level that must not know each other: each can be swapped alone."""

HEAVY = ("vllm", "ray", "gradio")
"""Optional, heavy dependencies: one file each, so that everything else works without them."""

POLICY = {
    "l2l_core": ["from l2l_core.threads import set_thread_policy", "set_thread_policy()"],
    "stages": ["import l2l_core as l2l_core"],
}
"""What two packages run, before any library starts threads."""

PACKAGES = {name for name, path in FILES.items() if path.name == "__init__.py"}
LIBRARY = sorted(name for name in FILES if name.startswith("l2l_core."))
STAGES = sorted(name for name in FILES if name.startswith("stages."))


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_a_level_and_every_level_a_room():
    assert {room(module) for module in LIBRARY} == set(LEVELS)


@pytest.mark.parametrize("module", LIBRARY)
def test_imports_point_down(module):
    upward = [other for other in imported_modules(module) if LEVELS[room(other)] > LEVELS[room(module)]]
    assert not upward


@pytest.mark.parametrize("module", [name for name in LIBRARY if room(name) in APART])
def test_swappable_parts_do_not_know_each_other(module):
    others = {room(other) for other in imported_modules(module)} & set(APART) - {room(module)}
    assert not others


def test_no_module_imports_itself_through_others():
    order = TopologicalSorter({module: imported_modules(module) - {module} for module in FILES})
    order.prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", sorted(FILES))
def test_nobody_imports_a_stage(module):
    assert not [other for other in imported_modules(module) if other.startswith("stages")]


@pytest.mark.parametrize("module", sorted(PACKAGES))
def test_packages_run_no_code(module):
    """Hence no stage has to depend on a package because a module lies in it. The root only sets how threads behave."""
    docstring, *rest = parse(module).body
    assert isinstance(docstring, ast.Expr)
    others = [node for node in rest if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant))]
    assert [ast.unparse(node) for node in others] == POLICY.get(module, [])


@pytest.mark.parametrize("module", sorted(FILES))
def test_every_module_says_what_it_is_for(module):
    assert ast.get_docstring(parse(module))


@pytest.mark.parametrize("module", [name for name in STAGES if name not in PACKAGES])
def test_stages_are_thin(module):
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.parametrize("library", HEAVY)
def test_heavy_dependencies_are_imported_in_one_file(library):
    users = [module for module in FILES if any(name.split(".")[0] == library for name in imported_names(module))]
    assert len(users) <= 1
