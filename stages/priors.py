"""Parse the responses of the multimodal LLM into priors: the referred object of each sentence and its location."""

from __future__ import annotations

from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.errors import run_stage
from l2l_core.priors.coord_check import check_coords, fit_coords, scores_by_space
from l2l_core.priors.scores import describe, labels_of, score_priors
from l2l_core.priors.table import interpret, precision_of, summarize


def main() -> None:
    """data/priors/responses.parquet -> data/priors/priors.parquet and metrics/priors.json. No model is queried.

    The priors are scored against the labeled masks here, so that a wrong coordinate space stops the run before anything
    is rendered or trained. The stage `proposals` scores what it renders: DVC allows one stage per metrics file.
    """
    params = load_params()
    responses = records.read_table(records.RESPONSES_PATH, records.RESPONSES)
    labels = labels_of(
        records.read_table(records.SPLIT_PATH, records.SPLIT),
        records.read_table(records.INDEX.refs, records.REFS, ["sent_id", "ann_id"]),
        records.read_table(records.LABELED_MASKS_PATH, records.MASKS),
    )
    fits = fit_coords(responses, labels)
    if params.priors.check_coords:
        check_coords(fits)
    priors = interpret(responses)
    records.write_table(priors, records.PRIORS_PATH, records.PRIORS)
    summary = summarize(priors, params.priors.prices) | precision_of(responses)
    scores = score_priors(priors, labels)
    metrics = {**summary, **scores, "coords": scores_by_space(fits)}
    records.write_metrics(metrics, records.PRIORS_METRICS_PATH)
    print("priors: " + ", ".join(f"{count} {name}" for name, count in summary.items()))
    for line in (describe(scores), *(fit.describe() for fit in fits)):
        print(f"priors: {line}")


if __name__ == "__main__":
    run_stage(main)
