"""Imports point down a list of layers; stages are thin and know nothing of each other."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

import pytest
from source_tree import FILES, closure, imported_modules, imported_names, parse

LEVELS = {
    "errors": 0,
    "config": 1,
    "core": 2,
    "artifacts": 3,
    "data": 4,
    "mllm": 4,
    "datasets": 4,
    "refshapes": 5,
    "model": 5,
    "priors": 5,
    "training": 6,
    "pseudo_labels": 6,
    "evaluation": 6,
    "export": 6,
    "viz": 7,
    "preflight": 7,
    "reporting": 8,
    "inference": 8,
    "cli": 9,
    "__main__": 10,
}
"""Floors of l2l_core, bottom up: packages and the few modules at its top. A room imports from itself and from floors
below; rooms of one floor do not know each other, so that each can be swapped alone."""

HEAVY = ("vllm", "ray", "gradio")
"""Optional, heavy dependencies: one file each, so that everything else works without them."""

POLICY = {
    "l2l_core": ["from l2l_core.core.threads import set_thread_policy", "set_thread_policy()"],
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
    others = [other for other in imported_modules(module) if room(other) != room(module)]
    assert not [other for other in others if LEVELS[room(other)] >= LEVELS[room(module)]]


@pytest.mark.parametrize("module", ["stages.predict", "l2l_core.inference.predict_files", "l2l_core.inference.serve"])
def test_inference_never_imports_training(module):
    """Hence an edit of the training loop leaves every prediction as it is."""
    assert not [name for name in closure(module) if name.startswith(("l2l_core.training", "l2l_core.pseudo_labels"))]


def test_no_module_imports_itself_through_others():
    order = TopologicalSorter({module: imported_modules(module) - {module} for module in FILES})
    order.prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", sorted(FILES))
def test_nobody_imports_a_stage(module):
    assert not [other for other in imported_modules(module) if other.startswith("stages")]


@pytest.mark.parametrize("module", sorted(PACKAGES - {"l2l_core"}))
def test_packages_run_no_code(module):
    """Hence no stage has to depend on a package because a module lies in it."""
    docstring, *rest = parse(module).body
    assert isinstance(docstring, ast.Expr)
    others = [node for node in rest if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant))]
    assert [ast.unparse(node) for node in others] == POLICY.get(module, [])


def test_the_root_only_sets_how_threads_behave_and_names_what_is_public():
    kinds = [type(node).__name__ for node in parse("l2l_core").body]
    assert set(kinds) == {"Expr", "ImportFrom", "Assign", "If", "FunctionDef"}
    calls = [ast.unparse(node) for node in parse("l2l_core").body if isinstance(node, ast.Expr)]
    assert [call for call in calls if call.endswith("()")] == ["set_thread_policy()"]
    imported = [ast.unparse(node) for node in parse("l2l_core").body if isinstance(node, ast.ImportFrom)]
    project = [line for line in imported if "l2l_core" in line]
    assert project == ["from l2l_core.core.threads import set_thread_policy"]


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
