"""Which stages DVC executes after a change, and how experiments are compared."""

from __future__ import annotations

import csv
import io
import json

import pytest

from bench.tiny_project import executed

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("pipeline")]

BEFORE_ROUNDS = [
    *("check", "refshapes", "ingest", "split", "query", "priors", "proposals"),
    *("warmup", "predict"),
]
LAST = ["distill", "predict-distilled", "evaluate", "report"]


@pytest.fixture
def project(first_run):
    """The project after its first run. Changes by an experiment are undone."""
    yield first_run.project
    first_run.project.back()


@pytest.fixture(scope="module")
def threshold(first_run):
    """Executed stages of an experiment with another policy, and its name."""
    project = first_run.project
    ran = project.stages_run("dvc", "exp", "run", "--name", "by-threshold", "-S", "select.method=threshold")
    project.back()
    return ran, "by-threshold"


def test_dvc_repro_runs_every_stage_once(first_run):
    ran = executed(first_run.output)
    assert sorted(ran) == sorted(
        [*BEFORE_ROUNDS, "crossfit-0", "select@1", "retrain@1", "predict@1", *LAST],
    )
    assert ran[-len(LAST) :] == LAST


def test_second_run_executes_nothing(project):
    assert project.stages_run("dvc", "repro") == []


def test_git_tracks_metrics_but_no_artifacts(project):
    tracked = project.out("git", "ls-files", "data", "metrics", "plots", "report").split()
    metrics = [f"metrics/{stage}.json" for stage in ("evaluate", "priors", "proposals")]
    assert sorted(tracked) == ["data/dvc.lock", "data/dvc.yaml", *metrics]


def test_adding_a_round_runs_only_that_round_and_removing_it_uses_the_cache(project):
    metrics = project.read("metrics/evaluate.json")
    ran = project.stages_run("dvc", "exp", "run", "--name", "two-rounds", "-S", "round=2")
    assert sorted(ran) == sorted(["check", "crossfit@1", "select@2", "retrain@2", "predict@2", *LAST])
    two = json.loads(project.read("metrics/evaluate.json"))
    assert two["evaluated_round"] == 2
    one = json.loads(metrics)
    assert {key: two[key] for key in one if "_round_" in key} == {key: one[key] for key in one if "_round_" in key}

    assert project.stages_run("dvc", "exp", "run", "-S", "round=1") == []
    assert project.read("metrics/evaluate.json") == metrics


def test_changing_to_a_fixed_rule_reruns_only_from_crossfit_onward(threshold):
    assert sorted(threshold[0]) == sorted(["crossfit-0", "select@1", "retrain@1", "predict@1", *LAST])


def test_empty_teacher_folder_of_a_fixed_rule_is_cached_and_later_filled(first_run, tmp_path):
    project = first_run.project.copy(tmp_path / "project")
    folds, target = project.folder / "data/rounds/0/folds", "stages/dvc.yaml:crossfit-0"
    trained = project.read("data/rounds/0/folds/0/model.safetensors")
    project.change_params({"select": {"method": "threshold", "fold_steps": 3}})  # not in the cache
    assert project.stages_run("dvc", "repro", target) == ["crossfit-0"]
    assert list(folds.iterdir()) == []

    folds.rmdir()
    project.run("dvc", "checkout", target)
    assert list(folds.iterdir()) == []
    folds.rmdir()
    assert project.stages_run("dvc", "repro", target) == []
    assert list(folds.iterdir()) == []

    project.change_params({"select": {"method": "reinforce"}})
    assert project.stages_run("dvc", "repro", target) == ["crossfit-0"]
    assert project.read("data/rounds/0/folds/0/model.safetensors") != trained
    project.change_params({"select": {"fold_steps": 4}})
    assert project.stages_run("dvc", "repro", target) == []  # from the cache
    assert project.read("data/rounds/0/folds/0/model.safetensors") == trained


def test_fixed_rules_train_no_fold_teachers(first_run, tmp_path):
    project = first_run.project.copy(tmp_path / "project")
    project.change_params({"select": {"method": "threshold"}})
    for stage in ("select", "crossfit"):
        project.run("python", "-m", f"stages.{stage}", "--round", "1")
    for fold in ("0", "1"):
        weights = f"folds/{fold}/model.safetensors"
        assert project.read(f"data/rounds/1/{weights}") == project.read(f"data/rounds/0/{weights}")


def test_changing_the_label_budget_keeps_data_and_responses(project):
    """`priors` runs again, to score the stored responses on the new labels."""
    before = json.loads(project.read("metrics/priors.json"))
    ran = project.stages_run("dvc", "exp", "run", "-S", "split.labeled_fraction=0.4", "-S", "round=0")
    assert sorted(ran) == sorted(["check", "split", "priors", "proposals", "warmup", "predict", *LAST])
    difference = json.loads(project.out("dvc", "metrics", "diff", "--json", "HEAD"))
    scores = difference["metrics/priors.json"]
    assert scores["labeled"]["old"] == before["labeled"] < scores["labeled"]["new"]
    assert scores["box_miou"]["old"] == before["box_miou"]
    assert "miou" in difference["metrics/proposals.json"]


def test_allowing_any_coordinates_does_not_query_again(project):
    assert project.stages_run("dvc", "exp", "run", "-S", "priors.check_coords=false") == ["priors"]


def test_parser_change_reparses_cached_responses_without_new_queries(project):
    parser = project.folder / "l2l_core/priors/parse.py"
    parser.write_text(parser.read_text(encoding="utf-8") + "\n# reads more\n", encoding="utf-8")
    assert project.stages_run("dvc", "repro") == ["priors"]  # the output is the same, so no later stage runs


def test_model_change_queries_again_but_chunk_size_change_does_not(project):
    assert project.stages_run("dvc", "exp", "run", "-S", "priors.model=another") == ["query", "report"]
    assert project.stages_run("dvc", "exp", "run", "-S", "priors.engine.chunk_size=7") == []
    assert project.stages_run("dvc", "exp", "run", "-S", "cluster.workers=2") == []


def test_experiment_in_a_temporary_copy_keeps_the_workspace_unchanged(project):
    ran = project.stages_run("dvc", "exp", "run", "--temp", "--name", "without-labels", "-S", "select.method=none")
    assert sorted(ran) == sorted(["crossfit-0", "select@1", "retrain@1", "predict@1", *LAST])
    assert project.out("git", "status", "--porcelain") == ""
    assert project.stages_run("dvc", "repro") == []
    shown = csv.DictReader(io.StringIO(project.out("dvc", "exp", "show", "--csv")))
    policies = {row["Experiment"]: row["select.method"] for row in shown}
    assert policies["without-labels"] == "none"


def test_compares_metrics_and_parameters_of_experiments(project, threshold):
    name = threshold[1]
    now = json.loads(project.read("metrics/evaluate.json"))

    metrics = json.loads(project.out("dvc", "metrics", "diff", "--all", "--json", "HEAD", name))
    scores = metrics["metrics/evaluate.json"]
    # Both sides have the same keys; pseudo-label metrics exist only if they are defined.
    assert {key for key in now if "pseudo" not in key} == {key for key in scores if "pseudo" not in key}
    assert scores["val_miou"]["old"] == now["val_miou"]
    assert isinstance(scores["val_miou"]["new"], float)
    assert scores["val_round_0_miou"]["old"] == scores["val_round_0_miou"]["new"]

    difference = json.loads(project.out("dvc", "exp", "diff", "--all", "--json", "HEAD", name))
    assert difference["params"]["params.yaml"]["select.method"] == {"old": "reinforce", "new": "threshold"}
    assert difference["metrics"]["metrics/evaluate.json"]["val_miou"] == scores["val_miou"]

    listed = csv.DictReader(io.StringIO(project.out("dvc", "exp", "show", "--csv")))
    rows = {row["Experiment"] or row["rev"]: row for row in listed}  # a branch has no experiment name
    assert float(rows["main"]["val_miou"]) == now["val_miou"]
    assert float(rows[name]["val_miou"]) == scores["val_miou"]["new"]
    table = project.out("dvc", "exp", "show", "--md", "--only-changed")
    assert name in table
    assert "select.method" in table


def test_compares_curves_of_experiments(project, threshold):
    shown = json.loads(project.out("dvc", "plots", "diff", "--json", "HEAD", threshold[1]))
    assert not shown.get("errors")
    curves = {"rounds/val": "miou", "training/round_1": "loss", "coverage/round_1": "precision"}
    for curve, field in curves.items():
        (plot,) = shown["data"][f"plots/{curve}.csv"]  # both in one plot
        assert sorted(plot["revisions"]) == sorted(["HEAD", threshold[1]])
        assert field in str(plot["content"])


@pytest.mark.parametrize(
    ("value", "shown"), [("9", "got 9, expected less"), ("two", "got 'two', expected a valid int")]
)
def test_refuses_an_invalid_round_before_removing_outputs(project, value, shown):
    output = project.run("dvc", "exp", "run", "-S", f"round={value}", code=None)
    assert executed(output) == ["check"]
    assert [line for line in output.splitlines() if line.startswith(f"error: params.yaml: round: {shown}")]
    assert json.loads(project.read("metrics/evaluate.json"))["evaluated_round"] == 1
