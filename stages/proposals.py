"""Render the priors of each sentence into one soft map of the referred object."""

from __future__ import annotations

import json

from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.core.files import scratch_folder
from l2l_core.errors import run_stage
from l2l_core.priors.fit import fit_proposals
from l2l_core.priors.proposals import make_proposals, render_key
from l2l_core.priors.scores import describe, labels_of, score_proposals


def main() -> None:
    """data/priors -> data/proposals: proposals.parquet, one row per sentence, and the rendering parameters.

    Also metrics/proposals.json: the scores of the proposals on the labeled sentences.
    """
    params = load_params()
    columns = ["sent_id", "sample_index", "bbox", "point", "mask", "score"]
    priors = records.read_table(records.PRIORS_PATH, records.PRIORS, columns)
    refs = records.read_table(records.INDEX.refs, records.REFS, ["sent_id", "image_id", "ann_id"])
    sizes = ["image_id", "file_name", "height", "width"]
    images = records.to_frame(records.read_table(records.INDEX.images, records.IMAGES, sizes))
    split = records.read_table(records.SPLIT_PATH, records.SPLIT)
    labels = labels_of(split, refs, records.read_table(records.LABELED_MASKS_PATH, records.MASKS))
    truth = dict(zip(labels.sent_id.tolist(), labels.rle, strict=True))
    fit = fit_proposals(priors, records.to_frame(refs), images, truth, params.proposals)
    found = f"{fit.params.renderer}, ring {fit.params.ring}, core {fit.params.core}"
    if fit.sentences:
        compared = f"mIoU {fit.miou:.1f} of {fit.sentences} labeled, the box {fit.box_miou:.1f}"
        print(f"proposals: {found} fits best: {compared}")
    elif params.proposals.needs_fit:
        print(f"proposals: too few labeled boxes to fit; {found}")
    device = params.priors.engine.device
    tables = [records.PRIORS_PATH, records.INDEX.refs, records.INDEX.images]
    with scratch_folder("proposals", render_key(fit.params, tables, device, params.cluster)) as folder:
        proposals = make_proposals(priors, records.to_frame(refs), images, fit.params, folder, device, params.cluster)
        records.write_table(proposals, records.PROPOSALS_PATH, records.PROPOSALS)
    scores = score_proposals(proposals, labels)
    records.write_metrics(scores, records.PROPOSALS_METRICS_PATH)
    print(f"proposals: {describe(scores)}")
    summary = {"sentences": fit.sentences, "box_miou": round(fit.box_miou, 2), "miou": round(fit.miou, 2)}
    text = json.dumps({"proposals": fit.params.rendering.model_dump(), "fit": summary}, indent=2)
    records.RENDERING_PATH.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_stage(main)
