"""Choose a prior backend, ask it about every sentence, and put its parsed answers into the priors table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import pandas as pd
import pyarrow as pa

from l2l_core import records
from l2l_core.config import PriorsParams
from l2l_core.priors.backend import Answer, PriorBackend, Question
from l2l_core.priors.coords import resolve_coord_space
from l2l_core.priors.parse import ParsedPrior, clean_text, parse_answer
from l2l_core.priors.replay import ReplayBackend, load_recorded
from l2l_core.priors.simulated import SimulatedBackend, make_truth
from l2l_core.progress import progress

BATCH_QUESTIONS = 4096
"""Questions a backend is given at once: enough to keep an engine busy, few enough to show progress."""


def make_backend(params: PriorsParams, seed: int, index: records.IndexPaths) -> PriorBackend:
    """The backend that `priors.backend` names. Only `simulated` reads true boxes.

    Raises InputError or ConfigError where the data or the parameters do not suit it.
    """
    match params.backend:
        case "simulated":
            columns = ["sent_id", "image_id", "ann_id", "category", "bbox"]
            refs = records.to_frame(records.read_table(index.refs, records.REFS, columns))
            objects = records.to_frame(records.read_table(index.objects, records.OBJECTS))
            space = resolve_coord_space(params.preset, params.coord_space)
            return SimulatedBackend(params.preset, space, seed, make_truth(refs, objects))
        case "replay":
            refs = records.to_frame(records.read_table(index.refs, records.REFS, records.SENTENCE_COLUMNS))
            sizes = records.to_frame(records.read_table(index.images, records.IMAGES, ["image_id", "height", "width"]))
            return ReplayBackend(load_recorded(str(params.replay_file), refs, sizes, params.coord_space))
        case _:
            assert_never(params.backend)


def make_questions(index: records.IndexPaths, samples: int) -> list[Question]:
    """Every sentence, `samples` times, ordered by image so that a model may reuse what it computed of an image."""
    refs = records.to_frame(records.read_table(index.refs, records.REFS, ["sent_id", "image_id", "sentence"]))
    images = records.to_frame(records.read_table(index.images, records.IMAGES))
    known = refs.merge(images, on="image_id", validate="many_to_one").sort_values(["image_id", "sent_id"])
    columns = (known[name].tolist() for name in ("sent_id", "file_name", "height", "width", "sentence"))
    return [
        Question(sent_id, sample, file_name, (height, width), sentence)
        for sent_id, file_name, height, width, sentence in zip(*columns, strict=True)
        for sample in range(samples)
    ]


def collect_priors(backend: PriorBackend, questions: Sequence[Question]) -> pa.Table:
    """Ask every question -> table records.PRIORS, one row a (sent_id, sample_index), sorted by them."""
    tables = [records.PRIORS.empty_table()]
    starts = range(0, len(questions), BATCH_QUESTIONS)
    for start in progress(starts, f"priors ({backend.name})", "batch"):
        asked = questions[start : start + BATCH_QUESTIONS]
        tables.append(_to_table(backend.name, asked, backend.ask(asked)))
    order = [("sent_id", "ascending"), ("sample_index", "ascending")]
    return pa.concat_tables(tables).sort_by(order).combine_chunks()


def summarize(priors: pa.Table) -> str:
    """How many answers were usable, in one line: a wrong coordinate space shows here first."""
    counts = pd.Series(priors["status"].to_pandas()).value_counts()
    parts = [f"{int(counts.get(status, 0))} {status}" for status in records.PRIOR_STATUSES]
    return f"priors: {priors.num_rows} answers, {', '.join(parts)}"


def _to_table(backend: str, questions: Sequence[Question], answers: Sequence[Answer]) -> pa.Table:
    parsed = [
        ParsedPrior("invalid")
        if answer.unread
        else parse_answer(answer.raw_text, answer.coord_space, question.image_hw, answer.input_hw)
        for question, answer in zip(questions, answers, strict=True)
    ]
    columns: dict[str, list[object]] = {
        "sent_id": [question.sent_id for question in questions],
        "sample_index": [question.sample_index for question in questions],
        "backend": [backend] * len(questions),
        "model": [clean_text(answer.model) for answer in answers],
        "prompt_sha256": [answer.prompt_sha256 for answer in answers],
        "raw_text": [clean_text(answer.raw_text) for answer in answers],
        "status": [answer.unread or prior.status for answer, prior in zip(answers, parsed, strict=True)],
        "target": [prior.target for prior in parsed],
        "attributes": [prior.attributes for prior in parsed],
        "relation": [prior.relation for prior in parsed],
        "bbox": [prior.bbox for prior in parsed],
        "point": [prior.point for prior in parsed],
        "score": [prior.score for prior in parsed],
        "coord_space": [answer.coord_space for answer in answers],
        "input_height": [answer.input_hw[0] for answer in answers],
        "input_width": [answer.input_hw[1] for answer in answers],
        "prompt_tokens": [answer.prompt_tokens for answer in answers],
        "completion_tokens": [answer.completion_tokens for answer in answers],
        "latency_ms": [answer.latency_ms for answer in answers],
    }
    return pa.Table.from_pydict(columns, schema=records.PRIORS)
