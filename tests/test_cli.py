import json
import re

from called import call

from l2l_core import __version__
from l2l_core.cli import WORKFLOW, score_table
from l2l_core.errors import DOCTOR

METRICS = {
    "n_val": 500,
    "val_miou": 44.4,
    "val_oiou": 41.0,
    "val_pr50": 48.0,
    "val_pr60": 43.0,
    "val_pr70": 37.0,
    "val_pr80": 21.0,
    "val_pr90": 5.5,
    "val_no_prior_miou": 30.3,
    "val_no_prior_oiou": 29.0,
    "val_prior_miou": 33.1,
    "val_supervised_miou": 22.2,
    "val_round_0_miou": 40.0,
    "val_round_1_miou": 44.4,
}


def test_score_table_has_one_row_per_method_and_full_scores_for_the_final_model():
    table = score_table(METRICS)
    assert list(table["method"]) == ["prior", "supervised", "round 0 (warm-up)", "round 1", "round 1, no prior"]
    assert list(table["mIoU"]) == [33.1, 22.2, 40.0, 44.4, 30.3]
    final = table[table["method"] == "round 1"].iloc[0]
    assert (final["oIoU"], final["Pr@0.5"], final["Pr@0.7"], final["Pr@0.9"]) == (41.0, 48.0, 37.0, 5.5)
    assert table.loc[table["method"] != "round 1", ["oIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9"]].isna().all(axis=None)


def test_score_table_ends_with_the_distilled_model():
    """Metrics of earlier versions have none."""
    scores = {"miou": 35.5, "oiou": 34.0, "pr50": 30.0, "pr70": 20.0, "pr90": 2.0}
    table = score_table(METRICS | {f"val_distilled_{name}": value for name, value in scores.items()})
    assert list(table["method"][:-1]) == list(score_table(METRICS)["method"])
    row = table.iloc[-1].to_dict()
    shown = {"mIoU": 35.5, "oIoU": 34.0, "Pr@0.5": 30.0, "Pr@0.7": 20.0, "Pr@0.9": 2.0}
    assert row == {"split": "val", "method": "distilled, no prior"} | shown


def test_score_table_has_rows_for_every_split():
    both = METRICS | {key.replace("val_", "testA_"): value for key, value in METRICS.items()} | {"n_testA": 7}
    both["testA_supervised_miou"] = 1.5
    table = score_table(both)
    assert list(table["split"]) == ["val"] * 5 + ["testA"] * 5
    assert table.loc[(table["split"] == "testA") & (table["method"] == "supervised"), "mIoU"].item() == 1.5


def test_scores_prints_the_table_and_the_report_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics").mkdir()
    run = {"dataset": "mine", "evaluated_round": 1, "n_test": 1200}
    scores = {key.replace("val_", "test_"): value for key, value in METRICS.items() if key != "n_val"}
    (tmp_path / "metrics" / "evaluate.json").write_text(json.dumps(run | METRICS | scores))
    assert call(monkeypatch, "scores") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("mine, round 1; sentences: test 1,200, val 500\n")
    assert "report/index.html" in printed
    assert ["val", "supervised", "22.20"] in [line.split() for line in printed.splitlines()]


def test_scores_before_any_evaluation_names_the_command_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "scores") == 2
    assert re.fullmatch(r"error: metrics/evaluate\.json: not found, .*dvc repro\n", capsys.readouterr().err)


def test_torn_scores_are_named_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/evaluate.json").write_text('{"val_miou": 5')
    assert call(monkeypatch, "scores") == 2
    assert capsys.readouterr().err == f"error: metrics/evaluate.json: not a file of this project; {DOCTOR}\n"


def test_prints_the_version(monkeypatch, capsys):
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"l2l {__version__}\n"


def test_the_help_lists_every_command_in_the_order_of_the_workflow(monkeypatch, capsys):
    assert call(monkeypatch, "--help") == 0
    _, _, listed = capsys.readouterr().out.partition("Commands:\n")
    assert tuple(line.split()[0] for line in listed.splitlines()) == WORKFLOW
    assert "..." not in listed


def test_requires_a_command(monkeypatch, capsys):
    assert call(monkeypatch) == 2
    assert "COMMAND" in capsys.readouterr().err
