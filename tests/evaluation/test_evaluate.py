"""Evaluates hand-made masks with hand-computed scores, and a synthetic run against decoded masks."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from synthetic_run import shifted, write_run

from l2l_core.artifacts import records
from l2l_core.config import EvaluateParams
from l2l_core.core.masks import decode_rle, encode_rle
from l2l_core.errors import ArtifactError, ConfigError
from l2l_core.evaluation.evaluate import History, evaluate, evaluated_sentences, read_history
from stages.evaluate import dataset_version, main

HEIGHT, WIDTH = 4, 10
NO_LABELS = records.PSEUDO_LABELS.empty_table()


def columns(first: int, last: int) -> bytes:
    """Return a mask of the columns first..last-1 of a 4 x 10 image, with 4 pixels per column."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, first:last] = True
    return encode_rle(mask)


def ref(sent_id: int, ann_id: int, split: str, role: str) -> dict[str, object]:
    row = {"sent_id": sent_id, "ref_id": ann_id, "ann_id": ann_id, "image_id": ann_id, "style": "", "split": split}
    return row | {"role": role, "sentence": "it", "category": "thing"}


def index(rows: list[dict[str, object]], truth: dict[int, bytes]) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Return refs, masks, and split from rows of `ref` and masks by ann_id."""
    size = {"height": HEIGHT, "width": WIDTH}
    masks = [
        {"ann_id": ann_id, "rle_counts": rle, "area_px": int(decode_rle(rle, HEIGHT, WIDTH).sum())} | size
        for ann_id, rle in truth.items()
    ]
    refs = [{name: value for name, value in row.items() if name != "role"} for row in rows]
    split = [{"sent_id": row["sent_id"], "role": row["role"]} for row in rows]
    return (
        records.make_table(refs, records.REFS),
        records.make_table(masks, records.MASKS),
        records.make_table(split, records.SPLIT),
    )


def prediction(model: str, with_prior: bool, sent_id: int, rle: bytes, width: int = WIDTH) -> dict[str, object]:
    key = {"model": model, "with_prior": with_prior, "sent_id": sent_id}
    return key | {"height": HEIGHT, "width": width, "rle_counts": rle}


def label(sent_id: int, rle: bytes, keep: bytes, accept_prob: float, number: int = 1) -> dict[str, object]:
    row = {"round": number, "sent_id": sent_id, "height": HEIGHT, "width": WIDTH, "rle_counts": rle, "keep_rle": keep}
    return row | {"accept_prob": accept_prob, "accepted": accept_prob > 0.5, "method": "threshold"}


def proposal(sent_id: int, first: int, last: int) -> dict[str, object]:
    soft = np.zeros((HEIGHT, WIDTH), np.uint8)
    soft[:, first:last] = 255
    return {"sent_id": sent_id, "height": HEIGHT, "width": WIDTH, "soft": soft.tobytes(), "score": 1.0}


def history(predictions: list[dict[str, object]], labels: list[dict[str, object]] | None = None) -> History:
    return History(
        records.make_table(predictions, records.PREDICTIONS),
        records.make_table(labels, records.PSEUDO_LABELS) if labels else NO_LABELS,
        pd.DataFrame({"model": ["supervised", "round_0"], "step": [0, 0], "loss": [1.0, 0.5]}),
        pd.DataFrame({"round": [], "step": [], "reward": []}),
    )


# Sentence 1 (val): truth is columns 0-3 (16 px). Sentence 2 (val): columns 0-9 (40 px). Sentence 3 (test): columns 5-9.
ROWS = [ref(1, 11, "val", "eval"), ref(2, 12, "val", "eval"), ref(3, 13, "test", "eval")]
TRUTH = {11: columns(0, 4), 12: columns(0, 10), 13: columns(5, 10)}
GUESSES = {
    ("supervised", False): {1: columns(6, 8), 2: columns(0, 5), 3: columns(0, 0)},  # IoU 0, 1/2, 0 (nothing predicted)
    ("round_0", True): {1: columns(1, 5), 2: columns(0, 9), 3: columns(5, 10)},  # IoU 3/5, 9/10, 1
    ("round_0", False): {1: columns(2, 6), 2: columns(0, 5), 3: columns(4, 10)},  # IoU 2/6, 1/2, 5/6
    ("distilled", False): {1: columns(0, 5), 2: columns(0, 8), 3: columns(5, 10)},  # IoU 4/5, 8/10, 1
}
PREDICTIONS = [prediction(*key, sent_id, rle) for key, rows in GUESSES.items() for sent_id, rle in rows.items()]
ROUND_1 = [prediction("round_1", *key[1:], i, rle) for key, rows in GUESSES.items() for i, rle in rows.items()][3:9]
PROPOSALS = records.make_table([proposal(1, 0, 2), proposal(2, 0, 10), proposal(3, 0, 5)], records.PROPOSALS)


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


def test_pseudo_label_quality_matches_hand_computed_values() -> None:
    unlabeled = [ref(sent_id, 20 + sent_id, "train", "unlabeled") for sent_id in (5, 6, 7, 8)]
    truth = TRUTH | {25: columns(0, 4), 26: columns(0, 4), 27: columns(0, 4)}  # 28 is unknown
    labels = [
        label(5, columns(0, 5), columns(0, 6), 0.95),  # IoU 4/5; 24 kept pixels, the 4 of column 4 are wrong
        label(6, columns(2, 6), columns(4, 10), 0.8),  # IoU 2/6; 24 kept pixels, the 8 of columns 4-5 are wrong
        label(7, columns(0, 2), columns(0, 0), 0.1),  # IoU 2/4, so not above one half; rejected
        label(8, columns(0, 1), columns(0, 0), 0.2),
    ]
    result = evaluate(history(PREDICTIONS + ROUND_1, labels), *index(ROWS + unlabeled, truth), PROPOSALS, ["val"], 1)
    quality = {name: value for name, value in result.metrics.items() if name.startswith("pseudo")}
    assert quality == {
        "pseudo_round_1_coverage": 50.0,  # 2 of 4
        "pseudo_round_1_precision": 50.0,  # of the accepted 5 and 6, only 5 is above one half
        "pseudo_round_1_miou_all": 54.44,  # (4/5 + 1/3 + 1/2) / 3
        "pseudo_round_1_miou_accepted": 56.67,
        "pseudo_round_1_miou_rejected": 50.0,
        "pseudo_round_1_pixel_error_all": 23.33,  # (4 + 16 + 8) / 120
        "pseudo_round_1_pixel_error_kept": 25.0,  # (4 + 8) / 48
        "pseudo_round_1_foreground_error_all": 27.27,  # (4 + 8 + 0) / (20 + 16 + 8)
        "pseudo_round_1_foreground_error_kept": 42.86,  # (4 of columns 0-4, 8 of columns 4-5) / (20 + 8)
        "pseudo_round_1_auroc": 100.0,  # the only good label has the highest probability
    }
    coverage = result.curves["coverage/round_1"]
    assert coverage["precision"].tolist() == [100.0, 50.0, 33.33]
    assert result.curves["reliability/round_1"]["share"].tolist() == [0.0, 0.0, 100.0]


def test_proposals_of_unlabeled_sentences_match_hand_computed_values() -> None:
    """The grid of the proposals is the image's, so that a cell is a pixel. Truth: columns 0-3."""
    unlabeled = [ref(sent_id, 20 + sent_id, "train", "unlabeled") for sent_id in (5, 6, 7)]
    truth = TRUTH | dict.fromkeys((25, 26, 27), columns(0, 4))
    proposals = [proposal(5, 2, 6), proposal(6, 2, 4)]  # IoU 2/6, 2/4; none for 7
    labels = [
        label(5, columns(0, 4), columns(0, 4), 0.75),  # replaces the proposal: columns 0-3 get at least 0.75, 4-5 0.25
        label(6, columns(0, 10), columns(0, 0), 0.25),  # does not: columns 2-3 get 1, the others 0.25
        label(7, columns(0, 4), columns(0, 0), 0.25),
        label(5, columns(0, 4), columns(0, 4), 0.75, number=2),
    ]
    table = pa.concat_tables([PROPOSALS, records.make_table(proposals, records.PROPOSALS)])
    round_2 = [row | {"model": "round_2"} for row in ROUND_1]
    found = history(PREDICTIONS + ROUND_1 + round_2, labels)
    result = evaluate(found, *index(ROWS + unlabeled, truth), table, ["val"], 2)
    assert result.metrics["pseudo_round_1_miou_prior"] == 41.67  # (2/6 + 2/4) / 2
    assert result.metrics["pseudo_round_1_miou_fused"] == 75.0  # (1 + 2/4) / 2
    assert result.curves["labels/rounds"].to_dict("list") == {
        "round": [1, 2],
        "prior_miou": [41.67, 33.33],
        "fused_miou": [75.0, 100.0],
        "label_miou": [80.0, 100.0],  # (1 + 4/10 + 1) / 3
        "kept_accuracy": [100.0, 100.0],
    }


def test_reports_only_coverage_for_pseudo_labels_without_truth() -> None:
    rows = [*ROWS, ref(5, -1, "train", "unlabeled")]
    result = evaluate(
        history(PREDICTIONS + ROUND_1, [label(5, columns(0, 5), columns(0, 6), 0.9)]),
        *index(rows, TRUTH),
        PROPOSALS,
        ["val"],
        1,
    )
    assert {name for name in result.metrics if name.startswith("pseudo")} == {"pseudo_round_1_coverage"}
    assert result.curves["labels/rounds"].empty
    assert result.curves["coverage/round_1"].empty
    assert result.curves["reliability/round_1"].empty


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


@pytest.mark.parametrize("name", ["training.csv", "policy.csv", "predictions.parquet", "pseudo_labels.parquet"])
def test_refuses_a_history_with_a_missing_file(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, rounds=1, images_per_split=2)
    folder = tmp_path / records.round_folder(1) / "history"
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: not found"):
        read_history(folder)
