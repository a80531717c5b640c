"""Selection and training never need the truth of an unlabelled sentence: they run the same without it on disk."""

from __future__ import annotations

import sys

import pytest
from tiny_project import Project

from l2l_core.artifacts import records

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("pipeline")]

STAGES = (("warmup",), ("crossfit", "--round", "0"), ("select", "--round", "1"), ("retrain", "--round", "1"))
"""Everything between the priors and the evaluation that teaches or decides."""


def made_by(project: Project) -> dict[str, bytes]:
    """What these stages leave, but for DVCLive's time stamps."""
    folder = project.folder / "data/rounds"
    kept = [*folder.glob("0/model/**/*"), *folder.glob("0/folds/**/*"), *folder.glob("1/model/**/*")]
    kept += [folder / "1/pseudo_labels.parquet", folder / "1/policy.csv"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept if path.is_file()}


def test_the_same_bytes_with_the_hidden_masks_deleted(first_run, tmp_path):
    """The masks of the index, and the data set's files but for its images, are gone; labelled masks are the split's."""
    project = first_run.project.copy(tmp_path / "project")
    expected = made_by(project)
    assert len(expected) > 10
    (project.folder / records.INDEX.masks).unlink()
    (project.folder / records.INDEX.objects).unlink()  # all true boxes, of which simulated priors were drawn
    for path in (project.folder / "data/refshapes").iterdir():
        if path.is_file():
            path.unlink()
    project.run("rm", "-rf", "data/rounds", "data/evaluation", ".dvc/cache", ".scratch")
    assert not [path for path in project.folder.rglob("*.json*") if b"segmentation" in path.read_bytes()]
    for stage, *arguments in STAGES:
        project.run(sys.executable, "-m", f"stages.{stage}", *arguments)
    assert made_by(project) == expected


def test_the_oracle_notices_that_they_are_gone(first_run, tmp_path):
    """So that the test above would notice a stage that wants them."""
    project = first_run.project.copy(tmp_path / "project")
    (project.folder / records.INDEX.masks).unlink()
    project.change_params({"select": {"policy": "oracle"}})
    output = project.run(sys.executable, "-m", "stages.select", "--round", "1", code=2)
    assert f"{records.INDEX.masks}: not found" in output
