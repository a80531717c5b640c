"""Which round and which model of the last run are used."""

import json
from pathlib import Path

import pytest

from l2l_core.artifacts import records
from l2l_core.artifacts.rounds import latest_round, model_folder
from l2l_core.errors import ArtifactError, InputError


def test_latest_round_is_the_highest_round_with_the_requested_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=r"data/rounds: no round has model; .*dvc repro"):
        latest_round("model")
    for number in ("2", "10", "9", "backup"):
        (tmp_path / "data/rounds" / number / "model").mkdir(parents=True)
    (tmp_path / "data/rounds/11/folds").mkdir(parents=True)
    assert latest_round("model") == 10


def test_ignores_later_rounds_left_by_an_earlier_run(tmp_path, monkeypatch):
    """A run of three rounds, then a run of one round on another dataset: the folders of rounds 2 and 3 remain."""
    monkeypatch.chdir(tmp_path)
    for number in (0, 1, 2, 3):
        (tmp_path / f"data/rounds/{number}/model").mkdir(parents=True)
    (tmp_path / "data/rounds/3/pseudo_labels.parquet").touch()
    (tmp_path / "data/round.txt").write_text("1\n")
    assert latest_round("model") == 1
    with pytest.raises(ArtifactError, match=r"no round up to 1 .*has pseudo_labels\.parquet; .*from an earlier run"):
        latest_round("pseudo_labels.parquet")


def test_finds_a_model_by_its_folder_or_its_round(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "data/rounds/3/model"
    model.mkdir(parents=True)
    (model / "config.json").touch()
    assert model_folder(None).resolve() == model_folder(model) == model_folder(model.parent) == model
    with pytest.raises(InputError, match=r"--run: got data, expected a folder with a model"):
        model_folder(model.parents[2].relative_to(tmp_path))


def test_takes_the_distilled_model_unless_priors_are_wanted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of_round, distilled = Path("data/rounds/3/model"), Path("data/distilled/model")
    for model, stated in ((of_round, {"sha256": "a"}), (distilled, {"distilled_from": "a", "takes_priors": False})):
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(stated))
    assert model_folder(None) == distilled
    assert model_folder(None, with_priors=True) == of_round
    assert model_folder(of_round) == model_folder(of_round, with_priors=True) == of_round
    for run in (distilled, distilled.parent, distilled.resolve()):
        assert model_folder(run).resolve() == distilled.resolve()
        with pytest.raises(InputError, match=r"distilled.* takes no priors; leave out --run or --with-priors"):
            model_folder(run, with_priors=True)


def test_passes_over_a_model_that_was_distilled_in_an_earlier_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    of_round, distilled = Path("data/rounds/3/model"), Path("data/distilled/model")
    for model, stated in ((of_round, {"sha256": "b"}), (distilled, {"distilled_from": "a", "takes_priors": False})):
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(stated))
    assert model_folder(None) == of_round
    assert f"note: {distilled} was not distilled from {of_round}" in capsys.readouterr().err
    assert model_folder(distilled) == distilled


def test_takes_a_distilled_model_that_was_fetched_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    distilled = Path("data/distilled/model")
    distilled.mkdir(parents=True)
    assert model_folder(None) == distilled
    with pytest.raises(ArtifactError, match="no round has model"):
        model_folder(None, with_priors=True)


def test_names_a_torn_record_of_the_last_round(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/rounds/3/model").mkdir(parents=True)
    records.ROUND_PATH.write_text("3\x00")
    with pytest.raises(ArtifactError, match=r"data/round\.txt: not a number; dvc repro restores it"):
        model_folder(None)
