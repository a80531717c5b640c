"""Imports follow the layer order; stages are thin and independent of each other."""

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
    "datasets": 4,
    "workers": 4,
    "mllm": 5,
    "refshapes": 5,
    "model": 5,
    "priors": 6,
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
"""Layers of l2l_core, bottom up: packages and top-level modules. A package imports only from itself and from lower
layers. Packages of one layer are independent, so that each can be replaced alone."""

HEAVY = ("vllm", "gradio", "ray")
"""Optional, heavy dependencies: one file each, so that everything else works without them."""

POLICY = {
    "l2l_core": ["from l2l_core.core.threads import set_thread_policy", "set_thread_policy()"],
    "stages": [
        "import l2l_core as l2l_core",
        "from l2l_core.errors import explain_early_errors",
        "explain_early_errors()",
    ],
}
"""Code that two packages run before any library starts threads or fails."""

PACKAGES = {name for name, path in FILES.items() if path.name == "__init__.py"}
LIBRARY = sorted(name for name in FILES if name.startswith("l2l_core."))
STAGES = sorted(name for name in FILES if name.startswith("stages."))


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_package_has_a_layer_and_every_layer_exists():
    assert {room(module) for module in LIBRARY} == set(LEVELS)


@pytest.mark.parametrize("module", LIBRARY)
def test_modules_import_only_from_lower_layers(module):
    others = [other for other in imported_modules(module) if room(other) != room(module)]
    assert not [other for other in others if LEVELS[room(other)] >= LEVELS[room(module)]]


@pytest.mark.parametrize("module", ["stages.predict", "l2l_core.inference.predict_files", "l2l_core.inference.serve"])
def test_inference_never_imports_training(module):
    """So editing the training loop does not rerun any prediction."""
    assert not [name for name in closure(module) if name.startswith(("l2l_core.training", "l2l_core.pseudo_labels"))]


def test_imports_have_no_cycles():
    order = TopologicalSorter({module: imported_modules(module) - {module} for module in FILES})
    order.prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_module_imports_a_stage(module):
    assert not [other for other in imported_modules(module) if other.startswith("stages")]


@pytest.mark.parametrize("module", sorted(PACKAGES - {"l2l_core"}))
def test_package_init_files_run_no_code(module):
    """So no stage depends on a package just because it imports a module of it."""
    docstring, *rest = parse(module).body
    assert isinstance(docstring, ast.Expr)
    others = [node for node in rest if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant))]
    assert [ast.unparse(node) for node in others] == POLICY.get(module, [])


def test_root_package_only_sets_the_thread_policy_and_exports_the_public_api():
    kinds = [type(node).__name__ for node in parse("l2l_core").body]
    assert set(kinds) == {"Expr", "ImportFrom", "Assign", "If", "FunctionDef"}
    calls = [ast.unparse(node) for node in parse("l2l_core").body if isinstance(node, ast.Expr)]
    assert [call for call in calls if call.endswith("()")] == ["set_thread_policy()"]
    imported = [ast.unparse(node) for node in parse("l2l_core").body if isinstance(node, ast.ImportFrom)]
    project = [line for line in imported if "l2l_core" in line]
    assert project == ["from l2l_core.core.threads import set_thread_policy"]


@pytest.mark.parametrize("module", sorted(FILES))
def test_every_module_has_a_docstring(module):
    assert ast.get_docstring(parse(module))


@pytest.mark.parametrize("module", [name for name in STAGES if name not in PACKAGES])
def test_stages_have_at_most_80_lines(module):
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.parametrize("library", HEAVY)
def test_at_most_one_file_imports_each_heavy_dependency(library):
    users = [module for module in FILES if any(name.split(".")[0] == library for name in imported_names(module))]
    assert len(users) <= 1
