"""The label-efficiency benchmark: what it runs and skips, what it reads from a run, and its claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from synthetic_run import write_evaluated_run

from bench import label_efficiency_page as page
from bench.label_efficiency import (
    BENCHMARK,
    EDITION,
    METHODS,
    Run,
    lost_points,
    missing,
    planned,
    read_curves,
    read_scores,
    store,
    stored,
    trained_steps,
)
from l2l_core.config import load_params

LLAVA, QWEN = "llava-1.5-7b", "qwen2.5-vl-7b"
DEFAULTS = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))


def row(
    method: str,
    number: int,
    seed: int,
    miou: float,
    rate: float = 0.05,
    prior: str = LLAVA,
    split: str = "val",
    **more: Any,
) -> dict[str, Any]:
    more = {"edition": EDITION} | more
    place = {"method": method, "round": number, "split": split, "labeled_fraction": rate, "prior": prior, "seed": seed}
    return place | {"miou": miou, "commit": "abc1234"} | more


# ---- planned runs ----


def test_plans_full_supervision_once_for_all_label_rates() -> None:
    runs = planned(["all", "fully_supervised"], [0.01, 0.05], [LLAVA], [0, 1], rounds=2)
    assert [(run.method, run.rate, run.seed, run.rounds) for run in runs] == [
        ("all", 0.01, 0, 2),
        ("all", 0.01, 1, 2),
        ("fully_supervised", 1.0, 0, 0),
        ("fully_supervised", 1.0, 1, 0),
        ("all", 0.05, 0, 2),
        ("all", 0.05, 1, 2),
    ]


def test_skips_a_run_only_if_all_its_rows_are_stored() -> None:
    one, two = Run("all", 0.05, LLAVA, 0, 1), Run("all", 0.05, LLAVA, 0, 2)
    labels = Run("labels_only", 0.05, LLAVA, 0, 0)
    rows = [row("all", 1, 0, 50.0), row("supervised", 0, 0, 30.0)]
    assert missing([one, two, labels], rows) == [two, labels]
    rows += [row("all", 2, 0, 51.0), row("supervised_priors", 0, 0, 40.0)]
    assert missing([one, two, labels], rows) == []
    others = [Run("all", 0.1, LLAVA, 0, 1), Run("all", 0.05, QWEN, 0, 1), Run("all", 0.05, LLAVA, 1, 1)]
    assert missing(others, rows) == others


@pytest.mark.parametrize("method", sorted(METHODS))
def test_parameters_of_every_method_are_valid(method: str, tmp_path: Path) -> None:
    (run,) = planned([method], [0.1], [QWEN], [3], rounds=2)
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(run.params(DEFAULTS)), encoding="utf-8")
    params = load_params(file)
    assert (params.seed, params.priors.backend, params.priors.preset) == (3, "simulated", QWEN)
    assert params.split.labeled_fraction == (1.0 if method == "fully_supervised" else 0.1)
    no_round = method in ("warmup", "labels_only", "fully_supervised")
    assert params.round == (0 if no_round else 2)
    as_long_as_one_round = no_round and method != "warmup"
    assert params.warmup.steps == (1300 if as_long_as_one_round else 300)
    assert params.distill.steps == (1 if no_round else 300)


def test_benchmark_overrides_the_training_settings_of_params_yaml() -> None:
    (run,) = planned(["reinforce"], [0.05], [LLAVA], [0], rounds=1)
    shorter = DEFAULTS | {
        "warmup": {"steps": 1},
        "retrain": DEFAULTS["retrain"] | {"steps": 2, "labeled_share": 0.9},
        "select": DEFAULTS["select"] | {"fold_steps": 3, "fold_update_steps": 4, "policy_steps": 5},
        "train": DEFAULTS["train"] | {"batch_size": 2, "lr": 0.5},
    }
    found = run.params(shorter)
    assert found == run.params(DEFAULTS)
    assert (found["warmup"]["steps"], found["retrain"]["steps"]) == (300, 1000)
    assert (found["select"]["fold_steps"], found["select"]["fold_update_steps"]) == (200, 100)


def test_benchmark_fixes_all_settings_except_how_training_runs() -> None:
    """Precision and device depend on the machine. Every other key of the sections that affect results is fixed."""
    free = {key for section in BENCHMARK for key in DEFAULTS[section].keys() - BENCHMARK[section].keys()}
    assert "precision" in free
    assert free <= {"precision", "engine", "log_every"}


def test_built_in_model_uses_the_default_prior_parameters() -> None:
    (run,) = planned(["reinforce"], [0.1], ["refshapes-vlm"], [3], rounds=2)
    assert run.params(DEFAULTS)["priors"] == DEFAULTS["priors"]


def test_reruns_and_drops_rows_of_earlier_editions(tmp_path: Path) -> None:
    """Rows of the first edition have no edition field."""
    file = tmp_path / "rows.jsonl"
    old = row("all", 1, 0, 40.0)
    del old["edition"]
    file.write_text(json.dumps(old) + "\n")
    assert missing([Run("all", 0.05, LLAVA, 0, 1)], stored(file)) == [Run("all", 0.05, LLAVA, 0, 1)]
    store(file, [row("none", 1, 0, 30.0)])
    assert [(r["method"], r["edition"]) for r in stored(file)] == [("none", EDITION)]


def test_replaces_stored_rows_by_key(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    store(file, [row("all", 1, 1, 50.0), row("all", 1, 0, 40.0)])
    store(file, [row("all", 1, 1, 60.0), row("all", 1, 1, 70.0, split="test")])
    found = {(r["seed"], r["split"]): r["miou"] for r in stored(file)}
    assert found == {(0, "val"): 40.0, (1, "val"): 60.0, (1, "test"): 70.0}
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


# ---- reading a run ----


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic run of two rounds, evaluated."""
    folder = tmp_path_factory.mktemp("run")
    write_evaluated_run(folder)
    metrics = folder / "metrics" / "evaluate.json"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"dataset_version": "7"}))
    return folder


def test_reads_rows_for_every_round(evaluated: Path) -> None:
    metrics = json.loads((evaluated / "metrics/evaluate.json").read_text())
    rows = {(r["round"], r["split"]): r for r in read_scores(evaluated, Run("topk", 0.05, LLAVA, 4, 2), DEFAULTS)}
    assert set(rows) == {(number, split) for number in (1, 2) for split in ("val", "test")}
    for (number, split), found in rows.items():
        assert (found["method"], found["labeled_fraction"], found["prior"], found["seed"]) == ("topk", 0.05, LLAVA, 4)
        assert found["miou"] == metrics[f"{split}_round_{number}_miou"]
        assert found["label_miou_all"] == metrics[f"pseudo_round_{number}_miou_all"]
        assert found["label_miou_fused"] == metrics[f"pseudo_round_{number}_miou_fused"]
        assert found["foreground_error_kept"] == metrics[f"pseudo_round_{number}_foreground_error_kept"]
        # By default, a round continues from the last model, so all earlier steps count as well.
        assert found["steps"] == DEFAULTS["warmup"]["steps"] + number * DEFAULTS["retrain"]["steps"]
        assert found["dataset"] == "refshapes-7"
    assert rows[2, "val"]["no_prior_miou"] == metrics["val_no_prior_miou"]
    assert [rows[number, "val"]["distilled_miou"] for number in (1, 2)] == [None, metrics["val_distilled_miou"]]


def test_run_without_rounds_gives_the_reference_scores(evaluated: Path) -> None:
    metrics = json.loads((evaluated / "metrics/evaluate.json").read_text())

    def scores(method: str) -> dict[tuple[str, str], float]:
        rows = read_scores(evaluated, Run(method, 0.05, LLAVA, 0, 0), DEFAULTS)
        assert {r["round"] for r in rows} == {0}
        assert not any("auroc" in r for r in rows)
        return {(r["method"], r["split"]): r["miou"] for r in rows}

    at = {name: metrics[f"val_{name}_miou"] for name in ("prior", "supervised", "round_0")}
    warmup, labels_only = scores("warmup"), scores("labels_only")
    assert (warmup["prior", "val"], warmup["warmup", "val"]) == (at["prior"], at["round_0"])
    assert labels_only["supervised", "val"] == at["supervised"]
    assert labels_only["supervised_priors", "val"] == at["round_0"]


def test_reads_the_curves_of_each_round(evaluated: Path) -> None:
    curves = read_curves(evaluated, Run("topk", 0.05, LLAVA, 0, 2))
    assert [curve["round"] for curve in curves] == [1, 2]
    for curve in curves:
        expected = pd.read_csv(evaluated / f"plots/coverage/round_{curve['round']}.csv")
        assert curve["coverage"] == expected["coverage"].tolist()
        assert curve["precision"] == expected["precision"].tolist()
        assert len(curve["prob"]) == len(curve["share"]) == len(curve["count"]) > 0
    assert read_curves(evaluated, Run("warmup", 0.05, LLAVA, 0, 0)) == []


# ---- claims ----

LABELS = [
    {"auroc": 91.0, "pixel_error_kept": 2.0, "pixel_error_all": 4.0, "foreground_error_kept": 10.0},
    {"auroc": 89.9, "pixel_error_kept": 1.0, "pixel_error_all": 4.0, "foreground_error_kept": 9.0},
]


TEACHER = {"pixel_error_all": 3.9, "foreground_error_all": 20.0}


def made_up() -> list[dict[str, Any]]:
    """Two seeds of the main setting, and some methods at 10 % of the labels."""
    by_method = {"all": (50, 52), "topk": (51, 49), **dict.fromkeys(("agreement", "ranksum", "semires"), (40, 40))}
    by_method |= {"threshold_0.7": (45, 40), "threshold_0.95": (40, 45), "oracle": (55, 56)}
    rows = [
        row(method, 1, seed, miou, **TEACHER) for method, both in by_method.items() for seed, miou in enumerate(both)
    ]
    for seed, (supervised, warmup, full, reinforce) in enumerate([(30, 44, 60, 53), (30, 46, 70, 55)]):
        rows += [row("supervised", 0, seed, supervised), row("warmup", 0, seed, warmup)]
        rows += [row("fully_supervised", 0, seed, full, rate=1.0)]
        rows += [row("reinforce", 1, seed, reinforce, **LABELS[seed], foreground_error_all=19.0)]
        rows += [row("reinforce", 1, seed, 60 + seed, rate=0.1), row("warmup", 0, seed, 50, rate=0.1)]
        rows += [row("all", 1, seed, 60 + 1.5 * seed, rate=0.1)]
    return rows


def verdicts(rows: list[dict[str, Any]]) -> dict[str, tuple[str, bool | None]]:
    """Results by the claim's letter and last word (usually the split); the first claim of each key counts."""
    found = page.claims(pd.DataFrame(rows))
    return {
        f"{claim.what[:3]} {claim.what.split()[-1]}": (claim.found, claim.met)
        for claim in reversed(found)
        if "(d)" not in claim.what
    }


def test_claims_match_hand_computed_values() -> None:
    found = verdicts(made_up())
    # Means: reinforce 54, best rule `all` 51. Best per seed: topk 51, all 52.
    assert found["(a) val"] == ("+3.00 to all; seeds +2.00, +3.00", True)
    assert found["(b) val"] == ("68.6 % (+24.00 of +35.00 points)", True)  # 54 - 30 of 65 - 30
    assert found["(c) val"] == ("85.7 % (+9.00 of +10.50 points)", False)  # 54 - 45 of 55.5 - 45
    assert found["(e) val"] == ("all: +0.00, -0.50; warmup: +10.00, +11.00", False)
    assert all(found[f"({letter}) test"][1] is None for letter in "abce")
    labels = [claim for claim in page.claims(pd.DataFrame(made_up())) if "(d)" in claim.what]
    assert [(claim.found, claim.met) for claim in labels] == [
        ("91.00, 89.90", False),
        ("2.00 / 4.00, 1.00 / 4.00", True),
        ("2.00 / 3.90, 1.00 / 3.90", False),
        ("10.00 / 19.00, 9.00 / 19.00", False),
        ("10.00 / 20.00, 9.00 / 20.00", True),
    ]


def test_per_seed_claims_stay_open_while_seeds_are_missing() -> None:
    rows = [one for one in made_up() if not (one["method"] == "reinforce" and one["seed"] == 1)]
    labels = [claim for claim in page.claims(pd.DataFrame(rows)) if "(d)" in claim.what]
    assert [(claim.found.split(", ")[0], claim.met) for claim in labels][:2] == [("91.00", None), ("2.00 / 4.00", None)]
    assert {claim.met for claim in labels} == {None}


def test_continued_training_counts_all_earlier_steps() -> None:
    """400 steps of warm-up and 800 steps per round."""
    params = {"warmup": {"steps": 400}, "retrain": {"steps": 800, "start": "scratch"}, "select": {"method": "all"}}
    assert [trained_steps(params, number) for number in (0, 1, 2)] == [400, 800, 800]
    online = params | {"select": {"method": "mean_teacher"}}
    warm = params | {"retrain": {"steps": 800, "start": "teacher"}}
    for goes_on in (online, warm):
        assert [trained_steps(goes_on, number) for number in (0, 1, 2)] == [400, 1200, 2000]


def test_stricter_claims_use_separate_rules_and_bounds() -> None:
    """Supervised priors score 40, so 14 of 25 points are closed. The best candidates score 60: 9 of 15 points."""
    rows = made_up() + [row("supervised_priors", 0, seed, 40) for seed in (0, 1)]
    rows += [row("oracle_constructed", 1, seed, 60) for seed in (0, 1)]
    rows += [row(rule, 1, seed, 53 + seed) for rule in page.CONSTRUCTED_RULES for seed in (0, 1)]
    found = {claim.what: (claim.found, claim.met) for claim in page.claims(pd.DataFrame(rows)) if "val" in claim.what}
    texts = {what: text for what, (text, _) in found.items() if "round 1, val" in what}
    strict = [texts[what] for what in texts if "constructed labels, round" in what or "supervised priors" in what]
    assert strict == ["+0.50 to ranksum sharpened; seeds +0.00, +1.00", "56.0 % (+14.00 of +25.00 points)"]
    assert [texts[what] for what in texts if "all candidates" in what] == ["60.0 % (+9.00 of +15.00 points)"]


def test_commands_above_a_table_run_exactly_its_rows() -> None:
    rows = [row("warmup", 0, seed, 40) for seed in (0, 1)] + [row("prior", 0, 0, 30), row("supervised", 0, 0, 30)]
    rows += [row(method, 1, seed, 50) for method in ("all", "reinforce") for seed in (0, 1)]
    rows += [row("reinforce", 2, 0, 52), row("fully_supervised", 0, 0, 70, rate=1.0)]
    start = f"    python -m bench.label_efficiency --rates 0.05 --presets {LLAVA} --seeds "
    assert page._commands(pd.DataFrame(rows), page.MAIN).split("\n") == [
        start + "0 --rounds 1 --methods labels_only fully_supervised",
        start + "0 1 --rounds 1 --methods warmup all",
        start + "1 --rounds 1 --methods reinforce",
        start + "0 --rounds 2 --methods reinforce",
    ]


def test_compares_lost_points_on_common_seeds() -> None:
    rows = [row("warmup", 0, seed, 40 + seed, lost_objects=30 + seed, lost_borders=30 - 2 * seed) for seed in (0, 1)]
    rows += [row("fully_supervised", 0, 1, 70, rate=1.0, lost_objects=10, lost_borders=20)]
    lines = page.limits(pd.DataFrame(rows)).split("\n")[2:]
    assert lines == ["| warmup | 0 | 1 | 41.0 | 31.0 | 28.0 |", "| fully supervised | 0 | 1 | 70.0 | 10.0 | 20.0 |"]
    assert page.limits(pd.DataFrame([rows[1], rows[2] | {"seed": 5}])) == ""
    assert page.limits(pd.DataFrame([row("supervised", 0, 0, 30, lost_objects=1, lost_borders=1)])) == ""


def test_the_distilled_model_is_compared_without_priors_after_the_last_round() -> None:
    """It scores 45 and 49 after round 2: 17 of 24 points from 30 to 54."""
    rows = made_up() + [row("reinforce", 2, seed, 60, distilled_miou=45.0 + 4 * seed) for seed in (0, 1)]
    rows += [row("fully_supervised_no_priors", 0, seed, 54, rate=1.0) for seed in (0, 1)]
    (claim,) = (one for one in page.claims(pd.DataFrame(rows)) if one.what.startswith("(f)") and "val" in one.what)
    assert "round 2" in claim.what
    assert (claim.found, claim.met) == ("70.8 % (+17.00 of +24.00 points)", True)
    line = page.summary_table(pd.DataFrame(rows)).splitlines()[-1]
    assert line == "| L2L, distilled, without priors (reinforce) | 2 | 47.0 (45.0 to 49.0) |  |"
    (claim,) = (one for one in page.claims(pd.DataFrame(made_up())) if one.what.startswith("(f)") and "val" in one.what)
    assert claim.met is None


def test_lead_below_two_points_on_one_seed_fails_the_claim() -> None:
    rows = made_up()
    for one in rows:
        if one["method"] == "reinforce" and one["seed"] == 0 and one["labeled_fraction"] == 0.05:
            one["miou"] = 52.98
    assert verdicts(rows)["(a) val"] == ("+2.99 to all; seeds +1.98, +3.00", False)


def test_claim_with_a_missing_rule_stays_open() -> None:
    rows = [one for one in made_up() if one["method"] not in ("semires", "oracle")]
    found = verdicts(rows)
    assert found["(a) val"] == ("no rows of semires", None)
    assert found["(c) val"] == ("no rows of oracle", None)
    assert found["(b) val"][1] is True


def test_compares_only_common_seeds_and_leaves_the_claim_open() -> None:
    rows = [one for one in made_up() if (one["method"], one["seed"]) != ("topk", 1)]
    assert verdicts(rows)["(a) val"] == ("+2.00 to topk; seeds +2.00 (seeds 0 only)", None)  # 53 against 51 on seed 0


# ---- page ----


def full_rows() -> pd.DataFrame:
    """The synthetic rows with all columns and both splits; test is 1 point lower."""
    columns = ["no_prior_miou", "coverage", "precision"]
    rows = [dict.fromkeys(columns, 20.0) | one for one in made_up()]
    return pd.DataFrame(rows + [one | {"split": "test", "miou": one["miou"] - 1} for one in rows])


def test_tables_show_means_and_ranges_of_each_setting() -> None:
    rows = full_rows()
    assert page.settings(rows) == [(0.05, LLAVA), (0.1, LLAVA)]
    lines = page.table(page.rows_of(rows, (0.05, LLAVA))).splitlines()
    (line,) = (line for line in lines if line.startswith("| reinforce "))
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *("reinforce", "1", "2", "54.0 (53.0 to 55.0)", "20.0", "", "90.5", "20.0", "20.0"),
        *("1.50 / 4.00", "9.50 / 19.00", "53.0 (52.0 to 54.0)"),
    ]
    methods = [line.split("|")[1].strip() for line in lines[2:]]
    assert methods[:3] == ["supervised", "warmup", "all"]
    assert methods[-3:] == ["reinforce", "oracle", "fully supervised"]


def test_page_with_only_round_0_has_no_pseudo_labels() -> None:
    rows = full_rows()[
        ["method", "round", "split", "labeled_fraction", "prior", "seed", "miou", "no_prior_miou", "commit"]
    ]
    rows = rows[rows["round"] == 0]
    assert "| labels with priors (warmup) | 0 | 45.0 (44.0 to 46.0) |" in page.summary_table(rows)
    assert "pseudo_labels" not in page.page(rows)


def test_summary_compares_settings_round_by_round() -> None:
    rows = [row(method, 1, seed, 50 + seed) for method in ("all", "reinforce") for seed in (0, 1)]
    rows += [row("reinforce", 2, 0, 90), row("warmup", 0, 0, 26, rate=0.01), row("reinforce", 1, 0, 51, rate=0.01)]
    rows += [row("reinforce", 1, 0, 99, split="test")]
    rows += [row("fully_supervised", 0, 0, 70, rate=1.0)]
    lines = page.summary_table(pd.DataFrame(rows)).split("\n")
    assert lines[0] == f"| val mIoU | round | 5 %, {LLAVA} | 1 %, {LLAVA} |"
    assert lines[2:] == [
        "| labels with priors (warmup) | 0 |  | 26.0 (26.0 to 26.0) |",
        "| **L2L** (reinforce) | 1 | 50.5 (50.0 to 51.0) | 51.0 (51.0 to 51.0) |",
        "| **L2L** (reinforce) | 2 | 90.0 (90.0 to 90.0) |  |",
        "| fully supervised, with priors (fully supervised) | 0 | 70.0 (70.0 to 70.0) | 70.0 (70.0 to 70.0) |",
    ]


def test_auroc_on_teacher_masks_is_a_separate_claim() -> None:
    rows = made_up() + [row("reinforce_teacher_only", 1, seed, 60, auroc=91 - 2 * seed) for seed in (0, 1)]
    found = {claim.what: (claim.found, claim.met) for claim in page.claims(pd.DataFrame(rows))}
    assert found["(d) AUROC of accept_prob on the teacher's own masks, round 1"] == ("91.00, 89.00", False)


def test_compares_later_rounds_only_with_methods_run_there() -> None:
    rows = made_up() + [row("reinforce", 2, seed, 60) for seed in (0, 1)]
    rows += [row("agreement_overlap", 2, seed, 57 + seed) for seed in (0, 1)]
    found = {claim.what: claim for claim in page.claims(pd.DataFrame(rows)) if "round 2, val" in claim.what}
    lead = found["(a) reinforce against the agreement overlap on constructed labels, round 2, val"]
    assert (lead.found, lead.met) == ("+2.50 to agreement overlap; seeds +3.00, +2.00", True)
    assert not [what for what in found if "teacher's masks" in what or "all candidates" in what]
    half = [one for one in rows if one["round"] < 2 or one["seed"] == 0]
    (lead,) = (claim for claim in page.claims(pd.DataFrame(half)) if "constructed labels, round 2, val" in claim.what)
    assert (lead.found, lead.met) == ("+3.00 to agreement overlap; seeds +3.00 (seeds 0 only)", None)


def test_page_lists_an_ablation_but_the_summary_does_not() -> None:
    rows = full_rows()
    ablation = rows[rows["method"] == "reinforce"].assign(method="reinforce_blind")
    rows = pd.concat([rows, ablation])
    assert "| reinforce blind |" in page.page(rows)
    assert "blind" not in page.summary_table(rows)


def test_draws_exactly_the_figures_that_the_page_shows() -> None:
    """One figure for all settings, and one for the pseudo-labels of each setting."""
    rows = full_rows()
    curve = {"coverage": [50.0, 100.0], "precision": [90.0, 60.0], "prob": [20.0, 80.0], "share": [10.0, 90.0]}
    place = {"method": "reinforce", "round": 1, "prior": LLAVA}
    curves = pd.DataFrame([place | curve | {"labeled_fraction": rate, "seed": 0} for rate in (0.05, 0.1)])
    drawn = page.figures(rows, curves)
    assert set(drawn) == {"label_efficiency.png"} | {f"pseudo_labels_{rate}_percent_{LLAVA}.png" for rate in (5, 10)}
    assert all(f"](images/{name})" in page.page(rows) for name in drawn)


def test_chart_by_round_shows_means_over_the_seeds() -> None:
    """Two seeds of one method in two rounds; rows of `all` and of test do not count."""
    scores = {"label_miou_all": 80.0, "label_miou_fused": 70.0, "label_miou_prior": 40.0, "pixel_error_kept": 3.0}
    rows = [row("reinforce_evolved", number, seed, 60, **scores) for number in (1, 2) for seed in (0, 1)]
    rows[0]["label_miou_fused"] = 60.0
    rows += [row("all", 1, 0, 60, **scores), row("reinforce_evolved", 1, 0, 60, split="test", label_miou_fused=5.0)]
    rows = pd.DataFrame(rows).assign(no_prior_miou=1.0, coverage=1.0, precision=1.0)
    name = f"proposals_5_percent_{LLAVA}.png"
    curve = {"coverage": [50.0, 100.0], "precision": [90.0, 60.0], "prob": [20.0], "share": [10.0], "seed": 0}
    place = {"method": "reinforce", "round": 1, "prior": LLAVA, "labeled_fraction": 0.05}
    (panel,) = page.figures(rows, pd.DataFrame([place | curve]))[name].axes
    drawn = {line.get_label(): line.get_ydata().tolist() for line in panel.lines}
    assert drawn == {
        "pseudo-label": [80.0, 80.0],
        "fused proposal": [65.0, 70.0],
        "prior's proposal": [40.0, 40.0],
        "accuracy of kept pixels": [97.0, 97.0],
    }
    assert name in page.page(rows)
    assert name not in page.page(full_rows())


def test_summary_figure_shows_the_mean_of_each_method_in_each_setting() -> None:
    curve = {"coverage": [50.0, 100.0], "precision": [90.0, 60.0], "prob": [20.0, 80.0], "share": [10.0, 90.0]}
    place = {"method": "reinforce", "round": 1, "prior": LLAVA, "seed": 0}
    curves = pd.DataFrame([place | curve | {"labeled_fraction": rate} for rate in (0.05, 0.1)])
    drawn = page.figures(full_rows(), curves)
    panels = drawn["label_efficiency.png"].axes
    assert len(panels) == 2
    dots = {line.get_ydata()[0]: line.get_xdata()[0] for line in panels[0].lines if line.get_marker() == "o"}
    assert dots[list(page.COMPARED).index("reinforce")] == 54.0
    assert dots[list(page.COMPARED).index("warmup")] == 45.0


def test_lost_points_match_hand_computed_values():
    """IoUs 1, 0.8 and 0.5 lose 0, 20 and 50 at borders; 0.2 and 0 lose 80 and 100 in objects; mean of five."""
    lost = lost_points(pd.Series([1.0, 0.8, 0.5, 0.2, 0.0]))
    assert lost == {"lost_objects": 36.0, "lost_borders": 14.0}
    assert sum(lost.values()) == 100 - 50  # the mean IoU is 0.5
