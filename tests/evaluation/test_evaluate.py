"""Evaluates hand-made masks with hand-computed scores, and a synthetic run against decoded masks."""

import json
from pathlib import Path

import numpy as np
import pytest
from hand_made_run import PREDICTIONS, PROPOSALS, ROWS, TRUTH, history, index, prediction, ref
from synthetic_run import shifted, write_run

from l2l_core.artifacts import records
from l2l_core.config import EvaluateParams
from l2l_core.core.masks import decode_rle, encode_rle
from l2l_core.errors import ArtifactError, ConfigError
from l2l_core.evaluation.evaluate import evaluate, evaluated_sentences
from l2l_core.evaluation.history import read_history
from stages.evaluate import dataset_version, main


def test_scores_match_hand_computed_values() -> None:
    result = evaluate(history(PREDICTIONS), *index(ROWS, TRUTH), PROPOSALS, ["val", "test", "testA"], 0, "7")
    expected = {
        "evaluated_round": 0,
        "dataset_version": "7",
        "n_val": 2,
        "val_miou": 75.0,  # (0.6 + 0.9) / 2
        "val_oiou": 80.0,  # (12 + 36) / (20 + 40)
        "val_pr50": 100.0,
        "val_pr60": 100.0,  # 12 / 20 reaches 0.6
        "val_pr70": 50.0,
        "val_pr80": 50.0,
        "val_pr90": 50.0,  # 36 / 40 reaches 0.9
        "val_no_prior_miou": 41.67,  # (1/3 + 1/2) / 2
        "val_no_prior_oiou": 43.75,  # (8 + 20) / (24 + 40)
        "val_distilled_miou": 80.0,
        "val_distilled_oiou": 80.0,  # (16 + 32) / (20 + 40)
        **{f"val_distilled_pr{x}": 100.0 for x in (50, 60, 70, 80)},
        "val_distilled_pr90": 0.0,
        "val_prior_miou": 75.0,  # (8 / 16 + 40 / 40) / 2
        "val_supervised_miou": 25.0,  # (0 + 1/2) / 2
        "val_round_0_miou": 75.0,
        "n_test": 1,
        **dict.fromkeys(["test_miou", "test_oiou", "test_round_0_miou"], 100.0),
        **{f"test_pr{x}": 100.0 for x in (50, 60, 70, 80, 90)},
        **dict.fromkeys(["test_no_prior_miou", "test_no_prior_oiou"], 83.33),
        **{f"test_distilled_{name}": 100.0 for name in ("miou", "oiou", "pr50", "pr60", "pr70", "pr80", "pr90")},
        "test_prior_miou": 0.0,
        "test_supervised_miou": 0.0,
    }
    assert result.metrics == expected
    table = records.to_frame(result.per_sentence).set_index(["method", "sent_id"])
    pixels = ["intersection_px", "union_px", "pred_area_px", "gt_area_px"]
    assert table.loc[("round_0", 1), pixels].tolist() == [12, 20, 16, 16]
    assert table.loc[("supervised", 3), pixels].tolist() == [0, 20, 0, 20]
    assert table.index.get_level_values("method").unique().tolist() == [
        "prior",
        "supervised",
        "round_0",
        "round_0_no_prior",
        "distilled",
    ]


def test_metrics_do_not_depend_on_the_order_of_rows() -> None:
    tables = index(ROWS, TRUTH)
    plain = evaluate(history(PREDICTIONS), *tables, PROPOSALS, ["val", "test"], 0)
    turned = [table.take(list(range(len(table)))[::-1]) for table in (*tables, PROPOSALS)]
    again = evaluate(history(PREDICTIONS[::-1]), *turned, ["val", "test"], 0)
    assert again.metrics == plain.metrics
    assert list(again.metrics) == list(plain.metrics)


def test_omits_splits_that_are_not_requested() -> None:
    result = evaluate(history(PREDICTIONS), *index(ROWS, TRUTH), PROPOSALS, ["test"], 0)
    assert "n_val" not in result.metrics
    assert result.metrics["n_test"] == 1


def test_refuses_missing_splits_and_names_the_available_ones() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.splits: got testA, expected some of test, val:"):
        evaluate(history(PREDICTIONS), *index(ROWS, TRUTH), PROPOSALS, ["testA"], 0)


def test_evaluates_held_out_images_of_a_dataset_with_only_a_train_split() -> None:
    """A list file can define them, and the configuration must allow them."""
    splits = EvaluateParams.model_validate({"splits": ["train"], "batch_size": 1}).splits
    rows = [ref(1, 11, "train", "eval"), ref(2, 12, "train", "labeled")]
    refs, masks, split = index(rows, TRUTH)
    assert evaluated_sentences(refs, masks, split, splits).index.tolist() == [1]


def test_skips_sentences_of_other_roles() -> None:
    rows = [*ROWS, ref(4, 11, "val", "unlabeled")]
    refs, masks, split = index(rows, TRUTH)
    assert evaluated_sentences(refs, masks, split, ["val"]).index.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (PREDICTIONS[:-1], "distilled: none of sent_id 3"),
        (PREDICTIONS[1:], "supervised: none of sent_id 1"),
        (PREDICTIONS[:3], "none of model round_0 with priors"),
        (PREDICTIONS[:9], "none of model distilled without priors"),
        ([*PREDICTIONS, PREDICTIONS[0]], "supervised: more than one row of sent_id 1"),
        (
            [prediction("supervised", False, 1, encode_rle(np.ones((4, 9))), width=9), *PREDICTIONS[1:]],
            "size, at sent_id 1",
        ),
    ],
)
def test_refuses_missing_duplicate_or_wrongly_sized_predictions(
    predictions: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        evaluate(history(predictions), *index(ROWS, TRUTH), PROPOSALS, ["val", "test"], 0)


def test_refuses_a_missing_proposal_or_true_mask() -> None:
    with pytest.raises(ArtifactError, match="proposals: none of sent_id 1"):
        evaluate(history(PREDICTIONS), *index(ROWS, TRUTH), PROPOSALS.slice(1), ["val"], 0)
    with pytest.raises(ArtifactError, match="no true mask of sent_id 1, 2"):
        evaluate(history(PREDICTIONS), *index(ROWS, {13: TRUTH[13]}), PROPOSALS, ["val"], 0)


def test_stage_metrics_match_decoded_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, rounds=2)
    (tmp_path / "params.yaml").write_text(Path("params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["evaluate", "--round", "2"])
    main()
    metrics = json.loads(Path("metrics/evaluate.json").read_text())
    refs = records.to_frame(records.read_table(records.INDEX.refs, records.REFS)).set_index("sent_id")
    masks = records.to_frame(records.read_table(records.INDEX.masks, records.MASKS)).set_index("ann_id")
    predictions = records.to_frame(read_history(records.round_folder(2) / "history").predictions)
    chosen = predictions[(predictions["model"] == "round_2") & predictions["with_prior"]]
    ious, inside, outside = [], 0, 0
    for row in chosen[chosen["sent_id"].map(refs["split"]) == "test"].itertuples():
        truth = decode_rle(masks.loc[refs.loc[row.sent_id, "ann_id"], "rle_counts"], row.height, row.width)
        guess = decode_rle(row.rle_counts, row.height, row.width)
        ious.append((truth & guess).sum() / (truth | guess).sum())
        inside, outside = inside + (truth & guess).sum(), outside + (truth | guess).sum()
    assert metrics["n_test"] == len(ious) == 16
    assert metrics["test_miou"] == pytest.approx(100 * np.mean(ious), abs=0.006)
    assert metrics["test_oiou"] == pytest.approx(100 * inside / outside, abs=0.006)
    table = records.to_frame(records.read_table(records.PER_SENTENCE_PATH, records.PER_SENTENCE))
    assert table.groupby("method").size().to_dict() == dict.fromkeys(
        ["prior", "supervised", *(f"round_{k}{end}" for k in range(3) for end in ("", "_no_prior")), "distilled"], 32
    )
    curves = sorted(path.relative_to("plots").as_posix() for path in Path("plots").rglob("*.csv"))
    assert curves == sorted(
        ["rounds/val.csv", "rounds/test.csv", "labels/rounds.csv"]
        + ["training/supervised.csv", "training/distilled.csv"]
        + [f"training/round_{k}.csv" for k in range(3)]
        + [f"{kind}/round_{k}.csv" for kind in ("policy", "coverage", "reliability") for k in range(3)]
    )


@pytest.mark.parametrize(
    ("instances", "version"), [({"info": {"version": 3}}, "3"), ({"info": None}, None), ({}, None), (None, None)]
)
def test_reads_the_dataset_version(tmp_path: Path, instances: object, version: str | None) -> None:
    if instances is not None:
        (tmp_path / "instances.json").write_text(json.dumps(instances))
    assert dataset_version(tmp_path) == version


def test_synthetic_run_shifts_masks() -> None:
    mask = np.zeros((3, 4), bool)
    mask[1, 1] = True
    assert np.argwhere(shifted(mask, 2, -1)).tolist() == [[0, 3]]
    assert not shifted(mask, -2, 0).any()
