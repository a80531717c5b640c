"""Raw responses -> the priors table, without any model: a better parser only re-parses the stored responses."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa

from l2l_core.artifacts import records
from l2l_core.config import PricesParams
from l2l_core.priors.parse import ParsedPrior, parse_response

Summary = dict[str, int | float | str]


def interpret(responses: pa.Table) -> pa.Table:
    """Table records.RESPONSES -> records.PRIORS, row by row in the same order."""
    columns = ("unread", "raw_text", "coord_space", "height", "width", "input_height", "input_width")
    parsed = [
        ParsedPrior("invalid") if unread else parse_response(text, space, (height, width), (input_height, input_width))
        for unread, text, space, height, width, input_height, input_width in zip(
            *(responses[name].to_pylist() for name in columns), strict=True
        )
    ]
    said = {
        "status": [
            unread or prior.status for unread, prior in zip(responses["unread"].to_pylist(), parsed, strict=True)
        ],
        "target": [prior.target for prior in parsed],
        "attributes": [prior.attributes for prior in parsed],
        "relation": [prior.relation for prior in parsed],
        "bbox": [prior.bbox for prior in parsed],
        "point": [prior.point for prior in parsed],
        "score": [prior.score for prior in parsed],
        "latency_ms": [0.0] * len(parsed),
    }
    values = {name: said[name] if name in said else responses[name].combine_chunks() for name in records.PRIORS.names}
    return pa.Table.from_pydict(values, schema=records.PRIORS)


def precision_of(responses: pa.Table) -> Summary:
    """`precision`: bf16 or fp32, the precision of the multimodal LLM; no key if no response reports it."""
    found = sorted(set(responses["precision"].to_pylist()) - {None})
    return {"precision": ", ".join(found)} if found else {}


def summarize(priors: pa.Table, prices: PricesParams) -> Summary:
    """Counts of usable responses, and their cost: a wrong coordinate space shows here first.

    Keys: responses, ok, empty, invalid, error, prompt_tokens, completion_tokens; with prices, cost_per_1000 responses.
    """
    counts = pd.Series(priors["status"].to_pandas()).value_counts()
    summary: Summary = {"responses": priors.num_rows}
    summary |= {status: int(counts.get(status, 0)) for status in records.PRIOR_STATUSES}
    tokens = {name: int(priors[name].to_pandas().sum()) for name in ("prompt_tokens", "completion_tokens")}
    summary |= tokens
    if prices.prompt is not None and prices.completion is not None and priors.num_rows:
        cost = tokens["prompt_tokens"] * prices.prompt + tokens["completion_tokens"] * prices.completion
        summary["cost_per_1000"] = round(1000 * cost / 1e6 / priors.num_rows, 6)
    return summary
