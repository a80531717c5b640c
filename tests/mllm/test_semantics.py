"""The words in a model's response reach the network's guidance tokens, not only the table."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from prior_tables import ROOT, Index, image_row, ref_row

from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.data.pairs import BatchMaker, load_pairs
from l2l_core.mllm.backend import Question, RawResponse
from l2l_core.mllm.query import make_questions, query_table
from l2l_core.model.segmenter import Segmenter
from l2l_core.priors.fit import unfitted
from l2l_core.priors.proposals import make_proposals
from l2l_core.priors.table import interpret

PLAIN = {"found": True, "boxes": [[4, 4, 20, 20]], "confidence": 1}
WORDS = {"target": "cup", "attributes": ["red"], "relation": "left of", "anchor": "bus"}
SAID = [
    PLAIN | WORDS,
    PLAIN | WORDS,  # identical
    PLAIN | WORDS | {"target": "dog"},
    PLAIN | WORDS | {"attributes": ["blue"]},
    PLAIN | WORDS | {"relation": "behind"},
    PLAIN | WORDS | {"anchor": "tree"},
    PLAIN,
]
"""All responses give the same box for the same sentence and image; only the words differ."""


class Scripted:
    name = "scripted"

    def query(self, questions: Sequence[Question]) -> list[RawResponse]:
        return [
            RawResponse(json.dumps(SAID[question.sent_id]), "m", "pixel", question.image_hw) for question in questions
        ]


@pytest.fixture(scope="module")
def guidance(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """[7, T, D] guidance tokens of an untrained network, computed from stored responses through the full pipeline."""
    folder = tmp_path_factory.mktemp("semantics")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "x.png")
    images = pd.DataFrame([image_row(1, 32, 32) | {"file_name": str(folder / "x.png")}])
    refs = pd.DataFrame([ref_row(row, 1, "the thing there", None) for row in range(len(SAID))])
    index = Index(images, refs, pd.DataFrame([])).save(folder)
    params = load_params(ROOT / "params.yaml")
    model = params.model.model_copy(update={"image_size_px": 32, "dim": 16})
    priors = interpret(query_table(Scripted(), make_questions(index, 1)))
    records.write_table(priors, folder / "priors.parquet", records.PRIORS)
    proposals = make_proposals(priors, refs, images, unfitted(params.proposals))
    records.write_table(proposals, folder / "proposals.parquet", records.PROPOSALS)
    pairs = load_pairs(
        index, None, folder / "priors.parquet", folder / "proposals.parquet", params.proposals.size_px, 0.1
    )
    assert pairs.prior_text[0] == "cup red left of bus"
    network = Segmenter.create(model, [*pairs.sentence, *pairs.prior_text], seed=0).eval()
    batch = BatchMaker(pairs, 32, 0.1)(np.arange(len(SAID)))
    seen: list[torch.Tensor] = []
    network.guidance.register_forward_hook(lambda module, given, tokens: seen.append(tokens))
    with torch.inference_mode():
        network(batch, network.tokenize(batch))
    return seen[0]


def test_the_same_words_give_the_same_guidance(guidance: torch.Tensor) -> None:
    assert torch.allclose(guidance[0], guidance[1], atol=1e-6)


@pytest.mark.parametrize("row", range(2, len(SAID)))
def test_different_words_give_different_guidance(guidance: torch.Tensor, row: int) -> None:
    """Rows change the target, attribute, relation or anchor, or omit them all."""
    assert (guidance[0] - guidance[row]).abs().max() > 1e-3
