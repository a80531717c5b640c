"""Raw responses -> the priors table, without any model: a better parser only re-parses the stored responses."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa

from l2l_core.artifacts import records
from l2l_core.config import PricesParams
from l2l_core.core.masks import rle_box_xyxy
from l2l_core.priors.parse import ParsedPrior, parse_response

Summary = dict[str, int | float | str]


def interpret(responses: pa.Table) -> pa.Table:
    """Table records.RESPONSES -> records.PRIORS, row by row in the same order.

    A response with a mask is usable whatever its text says. The text adds words and a confidence. The box is always the
    mask's bounding box, and there is no point: a place in the text could be in another coordinate space than the mask.
    """
    columns = ("failure", "raw_text", "mask", "coord_space", "height", "width", "input_height", "input_width")
    parsed = [
        ParsedPrior("invalid")
        if failure
        else _with_mask(
            parse_response(text, space, (height, width), (input_height, input_width)), mask, (height, width)
        )
        for failure, text, mask, space, height, width, input_height, input_width in zip(
            *(responses[name].to_pylist() for name in columns), strict=True
        )
    ]
    said = {
        "status": [
            failure or prior.status for failure, prior in zip(responses["failure"].to_pylist(), parsed, strict=True)
        ],
        "target": [prior.target for prior in parsed],
        "attributes": [prior.attributes for prior in parsed],
        "relation": [prior.relation for prior in parsed],
        "bbox": [prior.bbox for prior in parsed],
        "point": [prior.point for prior in parsed],
        "score": [prior.score for prior in parsed],
    }
    values = {name: said[name] if name in said else responses[name].combine_chunks() for name in records.PRIORS.names}
    return pa.Table.from_pydict(values, schema=records.PRIORS)


def _with_mask(prior: ParsedPrior, mask: bytes | None, image_hw: tuple[int, int]) -> ParsedPrior:
    return prior if mask is None else replace(prior, status="ok", bbox=rle_box_xyxy(mask, *image_hw), point=None)


def kinds(priors: pa.Table) -> pd.Series[str]:
    """What each row of records.PRIORS is rendered from: an ordered categorical of records.PRIOR_KINDS."""
    is_there = [priors[name].is_valid().to_numpy() for name in ("mask", "bbox", "point")]
    *placed, nothing = records.PRIOR_KINDS
    return pd.Series(pd.Categorical(np.select(is_there, placed, nothing), records.PRIOR_KINDS, ordered=True))


def kinds_of_sentences(priors: pa.Table) -> dict[str, int]:
    """Number of sentences by kind; of a sentence's responses, the kind that comes first in PRIOR_KINDS counts."""
    counts = kinds(priors).groupby(priors["sent_id"].to_numpy()).min().value_counts()
    return {kind: int(counts[kind]) for kind in records.PRIOR_KINDS}


def precision_of(responses: pa.Table) -> Summary:
    """`precision`: bf16 or fp32, the precision of the multimodal LLM; no key if no response reports it."""
    found = sorted(set(responses["precision"].to_pylist()) - {None})
    return {"precision": ", ".join(found)} if found else {}


def summarize(priors: pa.Table, prices: PricesParams) -> Summary:
    """Counts of usable responses by status and kind, and their cost: a wrong coordinate space shows here first.

    Keys: responses, ok, empty, invalid, error, mask, box, point, none, prompt_tokens, completion_tokens; with prices,
    cost_per_1000 responses.
    """
    counts = Counter([*priors["status"].to_pylist(), *kinds(priors)])
    summary: Summary = {"responses": priors.num_rows}
    summary |= {name: counts[name] for name in (*records.PRIOR_STATUSES, *records.PRIOR_KINDS)}
    tokens = {name: int(priors[name].to_pandas().sum()) for name in ("prompt_tokens", "completion_tokens")}
    summary |= tokens
    if prices.prompt is not None and prices.completion is not None and priors.num_rows:
        cost = tokens["prompt_tokens"] * prices.prompt + tokens["completion_tokens"] * prices.completion
        summary["cost_per_1000"] = round(1000 * cost / 1e6 / priors.num_rows, 6)
    return summary
