"""Parse the responses of the multimodal LLM into priors: the referred object of each sentence and its location."""

from __future__ import annotations

import json

from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.errors import exit_code
from l2l_core.priors.table import interpret, precision_of, summarize


def main() -> None:
    """data/priors/responses.parquet -> data/priors/priors.parquet and metrics/priors.json. No model is queried."""
    params = load_params()
    responses = records.read_table(records.RESPONSES_PATH, records.RESPONSES)
    priors = interpret(responses)
    records.write_table(priors, records.PRIORS_PATH, records.PRIORS)
    summary = summarize(priors, params.priors.prices) | precision_of(responses)
    records.PRIORS_METRICS_PATH.parent.mkdir(parents=True, exist_ok=True)
    records.PRIORS_METRICS_PATH.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print("priors: " + ", ".join(f"{count} {name}" for name, count in summary.items()))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
