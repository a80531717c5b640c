"""What the policy's reward should be: quality of its decisions on val by source and terms of the reward.

    python -m bench.rewards [--seeds 0 1 2]      (after bench.label_efficiency: they share a cache)
    python -m bench.rewards --table              (the table of the stored results again)

A policy is trained as in the pipeline, with simulated priors, but decides on the val sentences, whose truth it never
sees, as if they were unlabeled: nothing is tuned on the truth of the training set, and no student needs to be trained
for each variant. In round 2 that differs from the pipeline, whose unlabeled sentences were in the teacher's training.
Sources of the reward on labeled sentences:

    folds       round 1: teachers trained without the sentence's image
    in-sample   round 1: the teacher itself, on labels that it has learnt
    hold-out    round 1: a share of 1 / select.folds of the labeled images that no model trains on; teacher and policy
                make do with the rest (the teacher with select.fold_steps, a little fewer than warmup.steps, and it
                decides about labels of its own)
    continue    round 2: the folds' teachers, trained further with the pseudo-labels of round 1
    freeze      round 2: those of round 0
    retrain     round 2: new ones, trained with labels and pseudo-labels for select.fold_steps

`change` names what else differs from bench/benchmark.yaml: the cost of a wrong pixel, the weight of the agreement on
unlabeled sentences, the bonus for entropy, the policy's update.

Writes bench/results/rewards.jsonl, one JSON object a variant and seed: auroc, accepted (share), precision (of accepted
labels, IoU > 0.5), iou_accepted, iou_chosen (of all) and utility (mean over all sentences, 0 for rejected ones, at a
cost of 1), all in percent; steps (of training beyond the round's own model); and a table into docs/results.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from bench.docs import markdown, put
from bench.label_efficiency import ROOT
from bench.label_efficiency import WORK as SHARED
from bench.params import BENCHMARK, merged
from l2l_core.artifacts import records
from l2l_core.config import Params, load_params
from l2l_core.core.metrics import POSITIVE_IOU, auroc
from l2l_core.core.seeding import derive_seed
from l2l_core.data.folds import fold_of_images
from l2l_core.data.load import batches_of, pairs_of
from l2l_core.data.pairs import load_targets
from l2l_core.model.batch_predictor import BatchPredictor
from l2l_core.pseudo_labels.features import Candidates, CandidateTruth
from l2l_core.pseudo_labels.generate import score_labeled, score_out_of_fold
from l2l_core.pseudo_labels.reinforce import train_policy
from l2l_core.pseudo_labels.reward import utility
from l2l_core.pseudo_labels.select import select_labels
from l2l_core.training.runs import labeled_stream, part_of

WORK = ROOT / "bench" / "work" / "rewards"
RESULTS = ROOT / "bench" / "results" / "rewards.jsonl"
DOCUMENT = ROOT / "docs" / "results.md"
CHANGES: dict[str, list[dict[str, float | str]]] = {
    "folds": [
        {"wrong_cost": 0.5},
        {"wrong_cost": 2.0},
        {"unlabeled_weight": 0.0},
        {"unlabeled_weight": 1.0},
        {"entropy_bonus": 0.0},
        {"update": "grpo"},
    ],
    "continue": [{"wrong_cost": 2.0}, {"unlabeled_weight": 0.0}],
}
"""Changes of `select` that are tried with a source, besides none."""

Judged = tuple[Candidates, CandidateTruth]
Row = dict[str, Any]


def of_val(params: Params, teacher: BatchPredictor) -> Judged:
    """The val sentences, in the place of unlabeled ones."""
    refs = records.to_frame(records.read_table(records.INDEX.refs, records.REFS, ["sent_id", "split"]))
    evaluated = pairs_of(params, "eval")
    val = evaluated.with_sent_ids(refs.loc[refs["split"] == "val", "sent_id"].to_numpy(np.int64))
    targets = load_targets(records.INDEX.masks, records.INDEX, val)
    return score_labeled(params, teacher, batches_of(params, val), targets, "val")


def quality(params: Params, reward: Judged, faced: Judged, seed: int) -> Row:
    """Train a policy on `reward`, let it decide about `faced`, and look at the truth."""
    seen, truth = faced
    selection = select_labels(params.select, seen, train_policy(*reward, seen, params.select, seed).policy)
    everyone = np.arange(len(seen.sent_id))
    iou, accepted = truth.iou[everyone, selection.choice], selection.accepted
    keep = torch.from_numpy(selection.keep_cells.astype(np.float32))
    worth = utility(torch.from_numpy(truth.cells[everyone, selection.choice]), keep, 1.0)
    of_accepted = iou[accepted] if accepted.any() else np.full(1, np.nan)
    values = {
        "auroc": auroc(selection.accept_prob, iou > POSITIVE_IOU) or float("nan"),
        "accepted": 100 * accepted.mean(),
        "precision": 100 * np.mean(of_accepted > POSITIVE_IOU),
        "iou_accepted": 100 * of_accepted.mean(),
        "iou_chosen": 100 * iou.mean(),
        "utility": 100 * float(worth.mean()),
    }
    return {name: round(float(value), 2) for name, value in values.items()}


def variants(params: Params, repro: Callable[[dict[str, Any]], None]) -> Iterator[tuple[int, str, int, Judged, Judged]]:
    """(round, source, steps of training it costs, what rewards, what is decided about), in a project's folder."""
    select, count = params.select, params.select.folds
    folds = [records.round_folder(number) / "folds" for number in (0, 1)]
    first, second = (BatchPredictor.from_run(records.round_folder(number) / "model", params.train) for number in (0, 1))
    labeled, faced = labeled_stream(params, 1.0), of_val(params, first)
    out_of_fold = score_out_of_fold(params, folds[0])
    yield 1, "folds", count * select.fold_steps, out_of_fold, faced
    yield 1, "in-sample", 0, score_labeled(params, first, labeled.batches, labeled.targets, "in-sample"), faced
    held_out = part_of(
        labeled, np.flatnonzero(fold_of_images(labeled.batches.pairs.image_row, count, params.seed) == 0)
    )
    apart = BatchPredictor.from_run(folds[0] / "0", params.train)
    of_rest = score_labeled(params, apart, held_out.batches, held_out.targets, "hold-out")
    yield 1, "hold-out", 0, of_rest, of_val(params, apart)
    faced = of_val(params, second)
    yield 2, "continue", count * select.fold_update_steps, score_out_of_fold(params, folds[1]), faced
    yield 2, "freeze", 0, out_of_fold, faced
    repro({"fold_update": "retrain"})
    yield 2, "retrain", count * select.fold_steps, score_out_of_fold(params, folds[1]), faced


def measure(seed: int) -> list[Row]:
    """All variants of one seed, in a clone of this repository's HEAD."""
    clone = WORK / f"seed_{seed}"
    if not clone.exists():
        subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def call(*command: str) -> None:
        subprocess.run(command, cwd=clone, env=environment, check=True)

    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    call("git", "fetch", "-q")
    call("git", "reset", "-q", "--hard", commit)
    call("dvc", "config", "--local", "cache.dir", str(SHARED / "cache"))
    raw = yaml.safe_load((clone / "params.yaml").read_text(encoding="utf-8"))
    raw = merged(raw, BENCHMARK | {"seed": seed, "priors": {"backend": "simulated", "seed": seed}})

    def repro(select: dict[str, Any]) -> None:
        text = yaml.safe_dump(merged(raw, {"select": select}), sort_keys=False)
        (clone / "params.yaml").write_text(text, encoding="utf-8")
        call("dvc", "repro", "-q", "stages/dvc.yaml:retrain@1", "stages/dvc.yaml:crossfit@1")

    found = []
    repro({})
    with contextlib.chdir(clone):
        params = load_params()
        for number, source, steps, reward, faced in variants(params, repro):
            for change in ({}, *CHANGES.get(source, ())):
                varied = params.model_copy(update={"select": params.select.model_copy(update=change)})
                named = ", ".join(
                    f"{key} {value if isinstance(value, str) else format(value, 'g')}" for key, value in change.items()
                )
                row = {"round": number, "source": source, "change": named, "seed": seed, "steps": steps}
                row |= quality(varied, reward, faced, derive_seed(seed, f"select-{number}"))
                found.append(row | {"labeled": len(reward[0].sent_id), "commit": commit})
                print(found[-1], flush=True)
    return found


def table(rows: pd.DataFrame) -> str:
    """Markdown: means over the seeds."""
    columns = ("auroc", "accepted", "precision", "iou_accepted", "iou_chosen", "utility")
    body: list[list[object]] = []
    for (number, source, change), group in rows.groupby(["round", "source", "change"], sort=False):
        means = [f"{group[name].mean():.1f}" for name in columns]
        body.append([number, source, change, len(group), *means, int(group["steps"].mean())])
    head = ["round", "reward from", "change", "seeds", "AUROC", "accepted", f"of these IoU > {POSITIVE_IOU}"]
    return markdown([*head, "mIoU of accepted", "mIoU of chosen", "utility", "steps"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only make the table of the stored results")
    arguments = parser.parse_args()
    if not arguments.table:
        WORK.mkdir(parents=True, exist_ok=True)
        for seed in arguments.seeds:
            old = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
            rows = [row for row in old if row["seed"] != seed] + measure(seed)
            RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    put(DOCUMENT, "rewards", table(pd.read_json(RESULTS, lines=True)))


if __name__ == "__main__":
    main()
