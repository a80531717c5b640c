"""Query the multimodal LLM (or its substitute) for every sentence and store its raw responses."""

from __future__ import annotations

from functools import partial

from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.core.files import scratch_folder
from l2l_core.errors import exit_code
from l2l_core.mllm.interpreter import go_on_in
from l2l_core.mllm.query import ask_all, asking_key, make_backend, make_questions


def main() -> None:
    """data/index -> data/priors/answers.parquet: one row per sentence and sample, for all splits."""
    params = load_params()
    go_on_in(params.priors.engine.python, "stages.ask")
    questions = make_questions(records.INDEX, params.priors.samples)
    make = partial(make_backend, params.priors, records.INDEX)
    with scratch_folder("ask", asking_key(params.priors, records.INDEX)) as folder:
        answers = ask_all(make, questions, folder, params.priors)
        records.write_table(answers, records.ANSWERS_PATH, records.ANSWERS)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
