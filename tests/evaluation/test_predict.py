from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from synthetic_run import write_run
from toy_pairs import MODEL, toy_params

from l2l_core.artifacts import records
from l2l_core.artifacts.curves import live_curve, read_rows, write_rows
from l2l_core.core.masks import decode_rle
from l2l_core.data.load import sentences_of
from l2l_core.evaluation.history import POLICY_COLUMNS, TRAINING_COLUMNS, read_history
from l2l_core.evaluation.predict import add_distilled, extend_history
from l2l_core.model.segmenter import Segmenter

PARAMS = toy_params(proposals={"size_px": 24}, evaluate={"batch_size": 5})


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Outputs of the stages before `predict` for rounds 0 and 1, with untrained networks and without true masks."""
    write_run(tmp_path, rounds=1, images_per_split=3)
    monkeypatch.chdir(tmp_path)
    given = records.round_folder(1) / "history"
    (given / "pseudo_labels.parquet").rename(records.round_folder(1) / "pseudo_labels.parquet")
    for left in given.iterdir():
        left.unlink()
    records.INDEX.masks.unlink()
    policy = [{name: str(row) for name in POLICY_COLUMNS[1:]} for row in (10, 20)]
    write_rows(records.round_folder(1) / "policy.csv", POLICY_COLUMNS[1:], policy)
    folders = (records.SUPERVISED_FOLDER, records.round_folder(0), records.round_folder(1), records.DISTILLED_FOLDER)
    for number, folder in enumerate(folders):
        network = Segmenter.create(MODEL, ["left dark dot"], seed=number)
        network.save(folder / "model")
        with live_curve(folder / "curves") as log:
            for step in (20, 40):
                log({"step": step, "loss": number + 1 / step, "bce": 0.5, "dice": 0.25, "lr": 1e-3})
    return tmp_path


def predictions_of(number: int) -> list[dict[str, object]]:
    path = records.round_folder(number) / "history/predictions.parquet"
    return records.read_table(path, records.PREDICTIONS).to_pylist()


def test_history_grows_with_each_round(run):
    wanted = sentences_of("eval").tolist()
    extend_history(PARAMS, 0)
    first = predictions_of(0)
    asked = [("supervised", False), ("round_0", True), ("round_0", False)]
    assert [(row["model"], row["with_prior"], row["sent_id"]) for row in first] == [
        (model, with_prior, sent_id) for model, with_prior in asked for sent_id in wanted
    ]
    for row in first:
        assert (row["height"], row["width"]) == (48, 64)
        assert decode_rle(row["rle_counts"], 48, 64).shape == (48, 64)
    assert pq.read_table(records.round_folder(0) / "history/pseudo_labels.parquet").num_rows == 0

    extend_history(PARAMS, 1)
    second = predictions_of(1)
    assert second[: len(first)] == first  # predictions of earlier rounds are copied, not computed again
    assert {(row["model"], row["with_prior"]) for row in second[len(first) :]} == {
        ("round_1", True),
        ("round_1", False),
    }
    labels = records.read_table(records.round_folder(1) / "history/pseudo_labels.parquet", records.PSEUDO_LABELS)
    assert labels.equals(records.read_table(records.round_folder(1) / "pseudo_labels.parquet", records.PSEUDO_LABELS))


def test_a_killed_round_computes_no_finished_prediction_again(run, monkeypatch):
    """The history of round 0 has two models: what the first one predicted is kept until both are stored."""

    def fail(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("l2l_core.evaluation.predict._write_history", fail)
        with pytest.raises(OSError, match="No space"):
            extend_history(PARAMS, 0)
    with monkeypatch.context() as computed:
        computed.setattr("l2l_core.evaluation.predict._start_predicting", fail)
        extend_history(PARAMS, 0)
    assert len(predictions_of(0)) == 3 * len(sentences_of("eval"))
    assert not list(Path(".scratch").glob("*/*"))


def test_distilled_history_is_that_of_the_round_and_its_own_predictions_without_priors(run):
    extend_history(PARAMS, 0)
    extend_history(PARAMS, 1)
    add_distilled(PARAMS, 1)
    before, after = (read_history(folder / "history") for folder in (records.round_folder(1), records.DISTILLED_FOLDER))
    count = before.predictions.num_rows
    assert after.predictions.slice(0, count).equals(before.predictions)
    own = after.predictions.slice(count)
    assert own["sent_id"].to_pylist() == sentences_of("eval").tolist()
    assert {(row["model"], row["with_prior"]) for row in own.to_pylist()} == {("distilled", False)}
    assert after.pseudo_labels.equals(before.pseudo_labels)
    assert after.policy.equals(before.policy)
    assert after.training["model"].tolist() == [*before.training["model"], "distilled", "distilled"]


def test_history_contains_the_curves_of_all_models_and_policies(run):
    extend_history(PARAMS, 0)
    extend_history(PARAMS, 1)
    folder = records.round_folder(1) / "history"
    training = read_rows(folder / "training.csv")
    assert list(training[0]) == list(TRAINING_COLUMNS)
    said = [(row["model"], int(row["step"]), round(float(row["loss"]), 6)) for row in training]
    models = ("supervised", "round_0", "round_1")
    expected = [(model, step, round(n + 1 / step, 6)) for n, model in enumerate(models) for step in (20, 40)]
    assert said == expected
    policy = read_rows(folder / "policy.csv")
    assert [(row["round"], row["step"], row["reward"]) for row in policy] == [("1", "10", "10"), ("1", "20", "20")]
    assert read_rows(records.round_folder(0) / "history/policy.csv") == []
    history = read_history(folder)  # as evaluation reads it
    assert len(history.training) == 6
    assert len(history.policy) == 2


def test_supervised_model_never_receives_a_prior(run):
    """Its rows do not change with the priors. The rows of the warm-up model with priors can change."""
    extend_history(PARAMS, 0)
    before = predictions_of(0)
    proposals = records.read_table(records.PROPOSALS_PATH, records.PROPOSALS).to_pylist()
    for row in proposals:
        soft = np.frombuffer(row["soft"], np.uint8)
        row |= {"soft": (255 - soft).tobytes(), "score": 1 - row["score"]}
    table = records.make_table(proposals, records.PROPOSALS)
    records.write_table(table, records.PROPOSALS_PATH, records.PROPOSALS)
    extend_history(PARAMS, 0)
    for first, second in zip(before, predictions_of(0), strict=True):
        if not first["with_prior"]:
            assert first == second


def test_history_bytes_are_reproducible(run):
    extend_history(PARAMS, 0)
    folder = records.round_folder(0) / "history"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    extend_history(PARAMS, 0)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(before) == ["policy.csv", "predictions.parquet", "pseudo_labels.parquet", "training.csv"]
