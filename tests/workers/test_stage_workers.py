"""Labeling, prediction and proposals with real networks: two workers write the bytes of one process."""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from synthetic_run import write_run
from tiny_sam import save_tiny_sam
from toy_pairs import MODEL, toy_params
from toy_work import cluster_of

from l2l_core.artifacts import records
from l2l_core.config import ClusterParams, Params
from l2l_core.data.load import sentences_of
from l2l_core.evaluation.predict import predict
from l2l_core.model import batch_predictor
from l2l_core.model.batch_predictor import BatchPredictor
from l2l_core.model.segmenter import Segmenter
from l2l_core.priors import proposals
from l2l_core.priors.proposals import make_proposals
from l2l_core.pseudo_labels.features import Candidates
from l2l_core.pseudo_labels.generate import label_unlabeled

TEACHER = Path("model")
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")


def params_of(cluster: ClusterParams, candidates: list[str], sam: str | None = None) -> Params:
    params = toy_params(
        proposals={"size_px": 24, "model": sam},
        select={"grid": 4, "candidates": candidates},
        evaluate={"batch_size": 3},
    )
    return params.model_copy(update={"cluster": cluster})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A synthetic run in the current folder, with an untrained teacher; a few pairs fill a chunk."""
    write_run(tmp_path, images_per_split=5)
    monkeypatch.chdir(tmp_path)
    Segmenter.create(MODEL, ["left dark dot"], seed=0).save(TEACHER)
    monkeypatch.setattr(batch_predictor, "CHUNK_PAIRS", 3)
    return tmp_path


def test_labeling(run: Path) -> None:
    model, candidates = str(save_tiny_sam(run / "sam", "sam")), ["teacher", "sharpened", "prior", "sam"]
    found = [
        label_unlabeled(params_of(cluster_of(workers), candidates, model), partial(BatchPredictor.from_run, TEACHER))
        for workers in (1, 2)
    ]
    (labels, features), (others, other_features) = found
    assert len(labels.candidates) == 8
    assert all(labels.candidates)
    assert labels.candidates == others.candidates
    for field in fields(Candidates):
        one, two = (getattr(some, field.name) for some in (features, other_features))
        np.testing.assert_array_equal(one, two, err_msg=field.name)


def predicted(cluster: ClusterParams) -> list[pa.Table]:
    with ExitStack() as until_written:
        return predict(params_of(cluster, ["teacher"]), TEACHER, "round_0", [True, False], until_written)


def test_prediction(run: Path) -> None:
    one, two = predicted(cluster_of(1)), predicted(cluster_of(2))
    assert one[0]["sent_id"].to_pylist() == sentences_of("eval").tolist()
    assert len(set(one[0]["rle_counts"].to_pylist())) > 3
    assert one == two
    assert list(Path(".scratch").iterdir()) == []


@needs_ray
@pytest.mark.xdist_group("ray")
@pytest.mark.filterwarnings("ignore")
def test_prediction_on_an_own_ray_cluster(run: Path) -> None:
    assert predicted(cluster_of(2, executor="ray")) == predicted(cluster_of(1))


@pytest.mark.parametrize("renderer", ["box", "grabcut", "sam"])
def test_proposals(run: Path, monkeypatch: pytest.MonkeyPatch, renderer: str) -> None:
    monkeypatch.setattr(proposals, "_GRABCUT_CHUNK", 7)
    monkeypatch.setattr(proposals, "_SAM_CHUNK", 4)
    monkeypatch.setattr(proposals, "CHUNK_CELLS", 7 * 24**2)
    model = str(save_tiny_sam(run / "sam", "sam")) if renderer == "sam" else None
    params = toy_params(proposals={"size_px": 24, "renderer": renderer, "model": model, "ring": 0.1, "core": 0.0})
    tables = (
        records.read_table(records.PRIORS_PATH, records.PRIORS),
        records.to_frame(records.read_table(records.INDEX.refs, records.REFS)),
        records.to_frame(records.read_table(records.INDEX.images, records.IMAGES)),
    )
    one, two = (make_proposals(*tables, params.proposals, None, "cpu", cluster_of(workers)) for workers in (1, 2))
    assert len(set(one["soft"].to_pylist())) > 10
    assert one.equals(two)
