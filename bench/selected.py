"""What selection adds at test time: the policy picks a candidate mask in place of the model's own one.

    python -m bench.selected FOLDER ...     (projects whose last run is finished and of `reinforce`, such as
                                             bench/work/label_efficiency/worker_0)
    python -m bench.selected --table        (the table of the stored results again)

The last round's model makes the candidates of the held-out sentences. The policy is trained as in the last round: on
candidates of the fold teachers for labeled sentences of images they never saw. The held-out sentences take the place of
the unlabeled ones; their truth only scores the result. Masks are compared at the network's size, so that the model's
own score differs a little from the one in metrics/.

Writes bench/results/selected.jsonl, an object for each run and split: miou, in percent, of every candidate, of the
policy's choice (`selected`) and of the best candidate (`oracle`); auroc, how well accept_prob ranks choices with an IoU
above 0.5; and a table into docs/results.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from bench import docs
from bench.label_efficiency import ROOT, Row, stored
from bench.params import merged
from l2l_core.artifacts import records
from l2l_core.config import Params, parse_params
from l2l_core.core.metrics import POSITIVE_IOU, auroc
from l2l_core.core.seeding import derive_seed
from l2l_core.data.load import batches_of, pairs_of
from l2l_core.data.pairs import load_targets
from l2l_core.model.batch_predictor import BatchPredictor
from l2l_core.pseudo_labels.features import Candidates, CandidateTruth
from l2l_core.pseudo_labels.generate import images_of, score_labeled, score_out_of_fold
from l2l_core.pseudo_labels.policy import Policy
from l2l_core.pseudo_labels.reinforce import train_policy

RESULTS = ROOT / "bench" / "results" / "selected.jsonl"
DOCUMENT, MARK = ROOT / "docs" / "results.md", "selected"
SHOWN = {
    "prior": "proposal",
    "teacher": "model",
    "sharpened": "sharpened",
    "overlap": "overlap",
    "selected": "policy's choice",
    "oracle": "best candidate",
}
"""Columns of the table, and their heads."""
KEY = ("dataset", "prior", "renderer", "labeled_fraction", "seed", "split")


def params_of(folder: Path) -> Params:
    """The parameters of a run; those that are newer than it have today's defaults."""
    today, own = (yaml.safe_load((at / "params.yaml").read_text(encoding="utf-8")) for at in (ROOT, folder))
    return parse_params(merged(today, own), str(folder / "params.yaml"))


def scores(policy: Policy, candidates: Candidates, truth: CandidateTruth, names: list[str]) -> Row:
    """mIoU in percent of each candidate, of the policy's choice and of the best; AUROC of accept_prob."""
    action = policy.act(candidates)
    chosen = truth.iou[np.arange(len(truth.iou)), action.choice]
    miou = dict(zip(names, truth.iou.mean(0), strict=True)) | {"selected": chosen.mean()}
    miou |= {"oracle": truth.iou.max(1).mean()}
    ranked = auroc(action.accept_prob, chosen > POSITIVE_IOU)
    found = {name: round(100 * float(value), 2) for name, value in miou.items()}
    return {"miou": found, "auroc": None if ranked is None else round(ranked, 2)}


def measure() -> Iterator[Row]:
    """A row for each split of the project in the current folder."""
    params = params_of(Path())
    last = params.round
    model = BatchPredictor.from_run(records.round_folder(last) / "model", params.train)
    labeled, labeled_truth = score_out_of_fold(params, records.round_folder(last - 1) / "folds")
    image = images_of(params, labeled.sent_id)
    refs = records.to_frame(records.read_table(records.INDEX.refs, records.REFS, ["sent_id", "split"]))
    held_out = pairs_of(params, "eval")
    priors = params.priors
    for split in params.evaluate.splits:
        of_split = refs.loc[(refs["split"] == split) & refs["sent_id"].isin(held_out.sent_id), "sent_id"]
        if of_split.empty:  # the dataset has no such split
            continue
        pairs = held_out.with_sent_ids(of_split.to_numpy(np.int64))
        targets = load_targets(records.INDEX.masks, records.INDEX, pairs)
        candidates, truth = score_labeled(params, model, batches_of(params, pairs), targets, split)
        seed = derive_seed(params.seed, f"select-{last}")
        policy = train_policy(labeled, labeled_truth, candidates, params.select, seed, image).policy
        row: Row = {
            "dataset": Path(params.dataset).name,
            "prior": priors.preset if priors.backend == "simulated" else priors.backend,
            "renderer": params.proposals.renderer,
            "labeled_fraction": params.split.labeled_fraction,
            "seed": params.seed,
            "split": split,
            "sentences": len(pairs),
            "rounds": last,
        }
        yield row | scores(policy, candidates, truth, params.select.candidate_names)


def table(rows: list[Row]) -> str:
    """Markdown: a row for each run and split."""
    head = ["dataset", "labels", "prior", "seed", "split", *SHOWN.values(), "AUROC"]
    body: list[list[object]] = []
    for row in rows:
        known = [f"{row['miou'][name]:.1f}" for name in SHOWN]
        setting = [f"{100 * row['labeled_fraction']:g} %", f"{row['prior']}, {row['renderer']}", row["seed"]]
        body.append([row["dataset"], *setting, row["split"], *known, f"{row['auroc']:.1f}"])
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return f"{docs.markdown(head, body)}\n\nmIoU in percent; commits {commits}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--table", action="store_true", help="only make the table of the stored results")
    arguments = parser.parse_args()
    rows = {tuple(row[name] for name in KEY): row for row in stored(RESULTS)}
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    for folder in [] if arguments.table else arguments.folders:
        with contextlib.chdir(folder):
            for row in measure():
                rows[tuple(row[name] for name in KEY)] = row | {"commit": commit}
                print(row, flush=True)
        RESULTS.write_text("".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)), encoding="utf-8")
    docs.put(DOCUMENT, MARK, table([rows[key] for key in sorted(rows)]))


if __name__ == "__main__":
    main()
