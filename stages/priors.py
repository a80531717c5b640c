"""Ask the multimodal LLM (or what stands in for it) what each sentence means and where that is."""

from __future__ import annotations

from l2l_core import records
from l2l_core.config import load_params
from l2l_core.errors import exit_code
from l2l_core.priors.ask import collect_priors, make_backend, make_questions, summarize


def main() -> None:
    """data/index -> data/priors/priors.parquet, one row a sentence and sample, of every split."""
    params = load_params()
    backend = make_backend(params.priors, params.seed, records.INDEX)
    priors = collect_priors(backend, make_questions(records.INDEX, params.priors.samples))
    records.write_table(priors, records.PRIORS_PATH, records.PRIORS)
    print(summarize(priors))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
