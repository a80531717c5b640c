"""The update of fold teachers after a round."""

from __future__ import annotations

import sys

import pytest
from safetensors.numpy import load

from bench.tiny_project import Project

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("pipeline")]


def teachers(project: Project, number: int) -> list[bytes]:
    return [project.read(f"data/rounds/{number}/folds/{fold}/model.safetensors") for fold in (0, 1)]


def after_round_1(project: Project, fold_update: str) -> list[bytes]:
    project.change_params({"select": {"fold_update": fold_update}})
    project.run("rm", "-rf", "data/rounds/1/folds")
    project.run(sys.executable, "-m", "stages.crossfit", "--round", "1")
    return teachers(project, 1)


def distance(first: bytes, second: bytes) -> float:
    """Mean squared difference over all weights."""
    one, other = load(first), load(second)
    total = sum(((one[name].astype(float) - other[name]) ** 2).sum() for name in one)
    return float(total / sum(value.size for value in one.values()))


def test_fold_update_keeps_continues_or_restarts_the_teachers(first_run, tmp_path):
    """Four more training steps stay closer to the old teachers than new random weights do."""
    project = first_run.project.copy(tmp_path / "project")
    before = teachers(project, 0)
    assert after_round_1(project, "freeze") == before
    continued, retrained = after_round_1(project, "continue"), after_round_1(project, "retrain")
    for old, near, far in zip(before, continued, retrained, strict=True):
        assert 0 < distance(old, near) < 0.1 * distance(old, far)
    assert continued[0] != continued[1]


def test_a_round_trains_the_next_rounds_teachers_with_its_model(first_run, tmp_path):
    """The stage crossfit then finds them done. All bytes are those of separate trainings."""
    project = first_run.project.copy(tmp_path / "project")
    found = []
    for rounds, done_before in ((1, 0), (2, 2)):
        project.change_params({"round": rounds})
        project.run("rm", "-rf", "data/rounds/1/model", "data/rounds/1/folds")
        project.run(sys.executable, "-m", "stages.retrain", "--round", "1")
        shown = project.run(sys.executable, "-m", "stages.crossfit", "--round", "1")
        assert shown.count("done before") == done_before
        found.append([project.read("data/rounds/1/model/model.safetensors"), *teachers(project, 1)])
    assert found[0] == found[1]
    assert len(set(found[0])) == 3
    assert not any((project.folder / ".scratch").iterdir())


def test_cross_labeling_reads_the_fold_teachers_of_each_round(first_run, tmp_path):
    """Also under a fixed rule: other fold teachers after round 1 change the labels of round 2, and nothing before."""
    project = first_run.project.copy(tmp_path / "project")
    project.change_params({"round": 2, "select": {"method": "agreement", "cross_label": True}})
    ran = project.stages_run("dvc", "repro")
    assert {"crossfit-0", "select@1", "retrain@1", "crossfit@1", "select@2"} <= set(ran)
    assert len({*teachers(project, 0), *teachers(project, 1)}) == 4
    labels = [project.read(f"data/rounds/{number}/pseudo_labels.parquet") for number in (1, 2)]
    project.change_params({"select": {"fold_update_steps": 3}})
    ran = project.stages_run("dvc", "repro")
    assert {"crossfit@1", "select@2", "retrain@2"} <= set(ran)
    assert not {"warmup", "crossfit-0", "select@1", "retrain@1"} & set(ran)
    after = [project.read(f"data/rounds/{number}/pseudo_labels.parquet") for number in (1, 2)]
    assert after[0] == labels[0]
    assert after[1] != labels[1]
