"""Quality of hand-made pseudo-labels, against hand-computed scores."""

import pyarrow as pa
from hand_made_run import PREDICTIONS, PROPOSALS, ROUND_1, ROWS, TRUTH, columns, history, index, label, proposal, ref

from l2l_core.artifacts import records
from l2l_core.evaluation.evaluate import evaluate


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


def test_proposals_of_unlabeled_sentences_match_hand_computed_values(tmp_path, monkeypatch) -> None:
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
    path = tmp_path / "proposals.parquet"
    records.write_table(table, path, records.PROPOSALS)
    monkeypatch.setattr(records, "PART_ROWS", 2)  # sentences of a part, of several, and of none
    in_parts = records.TableParts(path, records.PROPOSALS)
    again = evaluate(found, *index(ROWS + unlabeled, truth), in_parts, ["val"], 2)
    assert again.metrics == result.metrics
    assert again.per_sentence.equals(result.per_sentence)
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
