"""Query the multimodal LLM (or its substitute) for every sentence and store its raw responses."""

from __future__ import annotations

import sys
from functools import partial

from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.core.files import scratch_folder
from l2l_core.errors import exit_code
from l2l_core.mllm.interpreter import reexec_with_python
from l2l_core.mllm.query import make_backend, make_questions, query_all, query_key


def main() -> None:
    """data/index -> data/priors/responses.parquet: one row per sentence and sample, for all splits."""
    params = load_params()
    reexec_with_python(params.priors.engine.python, "stages.query")
    questions = make_questions(records.INDEX, params.priors.samples)
    make = partial(make_backend, params.priors, records.INDEX)
    with scratch_folder("query", query_key(params.priors, records.INDEX)) as folder:
        responses = query_all(make, questions, folder, params.priors, params.cluster)
        records.write_table(responses, records.RESPONSES_PATH, records.RESPONSES)


if __name__ == "__main__":
    sys.exit(exit_code(main))  # not `run_stage`: vLLM ends its processes as Python exits
