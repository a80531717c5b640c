"""The DVC files against the code: a stage depends on all the code it runs and on the parameters it reads."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from source_tree import FILES, ROOT, closure, parse

from l2l_core.config import PRESETS, SelectParams, TrainParams

LEARNERS = ("warmup", "crossfit-0", "crossfit", "select", "retrain", "distill")
"""Stages that must not see the ground truth of unlabeled and evaluated sentences. (select's `oracle`, a policy for
comparison, opens the masks itself; its result does not depend on when that table was written.)"""


@dataclass(frozen=True)
class Stage:
    """One entry of a DVC file; for a `foreach`, its `do` block."""

    file: str
    name: str
    body: dict[str, Any]

    @property
    def module(self) -> str:
        return self.body["cmd"].partition(" -m ")[2].strip("'").split()[0]

    @property
    def deps(self) -> list[str]:
        return self.body["deps"]

    def depends_on(self, path: str) -> bool:
        return any(path == dep or path.startswith(f"{dep}/") for dep in self.deps)


def load_stages() -> list[Stage]:
    found = []
    for file in ("dvc.yaml", "stages/dvc.yaml", "data/dvc.yaml"):
        for name, entry in yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))["stages"].items():
            body = entry.get("do", entry)
            # Paths and commands are relative to the project's root.
            assert (PurePosixPath(file).parent / body.get("wdir", ".")) in (
                PurePosixPath("."),
                PurePosixPath("stages/.."),
                PurePosixPath("data/.."),
            )
            found.append(Stage(file, name, body))
    return found


STAGES = load_stages()
each_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage.file}:{stage.name}")


def code_of(module: str) -> set[str]:
    """Files that a script runs, as paths from the root: modules, and files beside them that they name (templates)."""
    files = set()
    for name in closure(module):
        path = FILES[name]
        texts = {node.value for node in ast.walk(parse(name)) if isinstance(node, ast.Constant)}
        beside = {other for other in path.parent.iterdir() if other.is_file() and other.name in texts}
        files |= {found.relative_to(ROOT).as_posix() for found in {path, *beside}}
    return files


def files_in(dep: str) -> list[str]:
    """A file itself, or all code below a folder except each __init__.py."""
    if not (ROOT / dep).is_dir():
        return [dep]
    found = [path for path in (ROOT / dep).rglob("*") if path.suffix in (".py", ".jinja", ".js")]
    return [path.relative_to(ROOT).as_posix() for path in found if path.name != "__init__.py"]


def is_code(path: str) -> bool:
    return path.startswith(("l2l_core", "stages"))


def test_every_script_is_a_stage():
    scripts = {f"stages.{path.stem}" for path in (ROOT / "stages").glob("*.py")} - {"stages.__init__"}
    assert {stage.module for stage in STAGES} == scripts


@each_stage
def test_stage_depends_on_all_its_code(stage):
    missing = sorted(path for path in code_of(stage.module) if not stage.depends_on(path))
    assert not missing, "add to deps: " + ", ".join(missing)


@each_stage
def test_stage_depends_on_little_unused_code(stage):
    """A stage may depend on a folder if it runs more than half of the files in it."""
    code = code_of(stage.module)
    for dep in filter(is_code, stage.deps):
        files = files_in(dep)
        used = [path for path in files if path in code]
        assert 2 * len(used) > len(files), f"remove from deps: {dep}, of which the stage runs {used}"


@each_stage
def test_code_dependencies_exist(stage):
    assert not [dep for dep in stage.deps if is_code(dep) and not (ROOT / dep).exists()]


@each_stage
def test_stage_parameters_exist(stage):
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for path in stage.body["params"]:
        value = params
        for key in path.split("."):
            assert key in value, path
            value = value[key]


@each_stage
def test_only_check_depends_on_the_number_of_rounds(stage):
    """`round` only selects the input of evaluate and report, which read it from their command line."""
    assert ("round" in stage.body["params"]) == (stage.name == "check")


@pytest.mark.parametrize("name", ["priors", "proposals", *LEARNERS])
def test_scoring_and_learning_stages_never_depend_on_hidden_ground_truth(name):
    for stage in (stage for stage in STAGES if stage.name == name):
        assert not stage.depends_on("data/index/masks.parquet")
        assert not stage.depends_on("data/index/objects.parquet")
        assert not stage.depends_on("data/evaluation")


WITHOUT_EFFECT: dict[str, set[str]] = {
    "query": {"priors.engine", "cluster"},
    "proposals": {"priors.engine", "cluster"},
    "predict": {"train.engine", "cluster"},
    "predict-distilled": {"train.engine", "cluster"},
    # How training runs, and keys that only other rounds read.
    "crossfit-0": {
        *("retrain.labeled_share", "retrain.prior_swap", "retrain.evolve_proposals", "retrain.num_passes"),
        *("select.fold_update", "select.fold_update_steps"),
        *("proposals.rendering", "train.engine"),
    },
    "crossfit": {"select.uses_fold_teachers", "proposals.rendering", "train.engine"},
    "select": {"train.engine", "cluster"},
    # Part of the checkpoint names, but of no stage output.
    "warmup": {"select.folds", "select.cross_label", "proposals.rendering", "train.engine"},
    # Also those of the next round's fold teachers, which the stage crossfit writes.
    "retrain": {
        *("select.folds", "select.cross_label", "proposals.rendering", "train.engine"),
        *("select.uses_fold_teachers", "select.fold_steps", "select.fold_update", "select.fold_update_steps"),
    },
    "distill": {
        *("select.folds", "select.cross_label", "proposals.rendering", "train.engine"),
        "retrain.evolve_proposals",  # the network sees no proposals
    },
}
"""Parameters that a stage's functions read without an effect on its outputs."""


DERIVED = {
    # Where a key is `auto`, its value comes from the preset.
    **{
        f"{section}.{key}": {f"{section}.{key}", "model.preset"}
        for section, values in PRESETS["tiny"].items()
        for key in values
    },
    "train": {"train", "model.preset"},
    "select.candidate_names": {"select.method", "select.candidates"},
    "select.uses_fold_teachers": {"select.method", "select.cross_label"},
    "select.uses_sam": {"select.method", "select.candidates"},
}
"""Properties and keys of a section, and the parameters they derive from."""


# Parameters: the `params.section.key` reads of all functions that a stage reaches.


def is_params(node: ast.expr, names: set[str]) -> bool:
    match node:
        case ast.Name(id=name):
            return name in names
        case ast.Call(func=ast.Name(id="load_params")):
            return True
    return False


def reads_of(function: ast.FunctionDef) -> set[str]:
    """`section.key` (or `section`, if it is passed whole) that a function reads from Params."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    names = {arg.arg for arg in arguments if isinstance(arg.annotation, ast.Name) and arg.annotation.id == "Params"}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and is_params(node.value, names):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(function):  # a section assigned to a variable: ingest = params.ingest
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
            assert not is_params(node.value.value, names) or function.name == "main"
    attributes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
    inner = {node.value for node in attributes}
    return {f"{node.value.attr}.{node.attr}" for node in attributes if is_section(node.value, names)} | {
        node.attr
        for node in attributes
        if is_params(node.value, names)
        and node not in inner
        and node.attr not in ("model_dump", "model_copy")  # methods, not sections
    }


def is_section(node: ast.expr, names: set[str]) -> bool:
    return isinstance(node, ast.Attribute) and is_params(node.value, names)


@cache
def functions_of(module: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.walk(parse(module)) if isinstance(node, ast.FunctionDef)}


def reached(module: str) -> list[ast.FunctionDef]:
    """Project functions that `main` reaches, by name: slightly more than it calls, never fewer."""
    by_name: dict[str, list[ast.FunctionDef]] = {}
    for name in closure(module):
        for function in functions_of(name).values():
            by_name.setdefault(function.name, []).append(function)
    seen: set[str] = set()
    waiting, found = ["main"], []
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for function in by_name.get(name, []):
            found.append(function)
            waiting += [node.id for node in ast.walk(function) if isinstance(node, ast.Name)]
            waiting += [node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)]
    return found


@each_stage
def test_stage_tracks_the_parameters_it_reads(stage):
    tracked = set(stage.body["params"])
    sections = {path.split(".")[0] for path in tracked}
    reads = set().union(*(reads_of(function) for function in reached(stage.module)))
    assert reads >= WITHOUT_EFFECT.get(stage.name, set())
    reads -= WITHOUT_EFFECT.get(stage.name, set())
    reads = set().union(*(DERIVED.get(read, {read}) for read in reads))
    assert reads
    missing = [
        read for read in reads if not ({read, read.split(".")[0]} & tracked or ("." not in read and read in sections))
    ]
    assert not missing, "add to params: " + ", ".join(sorted(missing))
    idle = sections - {read.split(".")[0] for read in reads}
    assert not idle, "remove from params: " + ", ".join(sorted(idle))


def test_select_tracks_its_whole_section_except_crossfit_parameters():
    (select,) = (stage for stage in STAGES if stage.name == "select")
    tracked = {path.removeprefix("select.") for path in select.body["params"] if path.startswith("select.")}
    assert SelectParams.model_fields.keys() - tracked == {"fold_steps", "fold_update", "fold_update_steps"}


@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "select"])
def test_training_tracks_its_whole_section_except_the_engine(name):
    for stage in (stage for stage in STAGES if stage.name == name):
        tracked = {path.removeprefix("train.") for path in stage.body["params"] if path.startswith("train")}
        assert TrainParams.model_fields.keys() - tracked == {"engine"}


def test_finds_parameter_reads():
    """Checks `reads_of` on a hand-written function."""
    source = "def f(params: Params):\n    p = params\n    g(p.train)\n    return load_params().seed + params.model.dim"
    assert reads_of(ast.parse(source).body[0]) == {"train", "seed", "model.dim"}


def test_plots_are_outputs_of_evaluate():
    root = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    outs = root["stages"]["evaluate"]["outs"]
    assert all(any(Path(folder).is_relative_to(out) for out in outs) for entry in root["plots"] for folder in entry)
