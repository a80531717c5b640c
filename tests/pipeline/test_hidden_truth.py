"""Selection and training never read the truth of unlabeled sentences: they give the same results without it."""

from __future__ import annotations

import sys

import pytest

from bench.tiny_project import Project
from l2l_core.artifacts import records

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("pipeline")]

STAGES = (
    *(("priors",), ("proposals",), ("warmup",)),
    *(
        ("crossfit", "--round", "0"),
        ("predict", "--round", "0"),
        ("select", "--round", "1"),
        ("retrain", "--round", "1"),
    ),
    *(("predict", "--round", "1"), ("distill", "--round", "1")),
)
"""All stages between the queries and the evaluation that score, train or select, and what they need."""


def made_by(project: Project) -> dict[str, bytes]:
    """Outputs of these stages, without DVCLive's timestamps."""
    folder = project.folder / "data/rounds"
    kept = [*folder.glob("0/model/**/*"), *folder.glob("0/folds/**/*"), *folder.glob("1/model/**/*")]
    kept += (project.folder / "data/distilled/model").rglob("*")
    kept += [folder / "1/pseudo_labels.parquet", folder / "1/policy.csv"]
    scored = [records.PRIORS_PATH, records.PROPOSALS_PATH, records.PRIORS_METRICS_PATH, records.PROPOSALS_METRICS_PATH]
    kept += [project.folder / path for path in scored]
    return {str(path.relative_to(project.folder)): path.read_bytes() for path in kept if path.is_file()}


def test_outputs_are_identical_without_the_hidden_masks(first_run, tmp_path):
    """Delete the index masks and all dataset files except images. The split stage stores the labeled masks."""
    project = first_run.project.copy(tmp_path / "project")
    expected = made_by(project)
    assert len(expected) > 10
    (project.folder / records.INDEX.masks).unlink()
    (project.folder / records.INDEX.objects).unlink()  # all true boxes, from which simulated priors were drawn
    for path in (project.folder / "data/refshapes").iterdir():
        if path.is_file():
            path.unlink()
    project.run("rm", "-rf", "metrics", str(records.PRIORS_PATH), "data/proposals")
    project.run("rm", "-rf", "data/rounds", "data/distilled", "data/evaluation", ".dvc/cache", ".scratch")
    assert not [path for path in project.folder.rglob("*.json*") if b"segmentation" in path.read_bytes()]
    for stage, *arguments in STAGES:
        project.run(sys.executable, "-m", f"stages.{stage}", *arguments)
    assert made_by(project) == expected


def test_oracle_policy_fails_without_the_hidden_masks(first_run, tmp_path):
    """This shows that the test above would detect a stage that reads them."""
    project = first_run.project.copy(tmp_path / "project")
    (project.folder / records.INDEX.masks).unlink()
    project.change_params({"select": {"method": "oracle"}})
    output = project.run(sys.executable, "-m", "stages.select", "--round", "1", code=2)
    assert f"{records.INDEX.masks}: not found" in output
