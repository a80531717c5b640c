"""Labeling, prediction and proposals with real networks: two workers write the bytes of one process."""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
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
from l2l_core.pseudo_labels import generate
from l2l_core.pseudo_labels.features import Candidates
from l2l_core.pseudo_labels.generate import label_unlabeled
from l2l_core.workers.chunks import map_chunks

TEACHER = Path("model")
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")


def params_of(cluster: ClusterParams, candidates: list[str], sam: str | None = None, **select: object) -> Params:
    params = toy_params(
        proposals={"size_px": 24, "model": sam},
        select={"grid": 4, "candidates": candidates, **select},
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
    found = [labeled(params_of(cluster_of(workers), candidates, model), [TEACHER]) for workers in (1, 2)]
    assert len(found[0]["candidates"]) == 8
    assert all(found[0]["candidates"])
    np.testing.assert_equal(*found)


def labeled(params: Params, folders: list[Path]) -> dict[str, Any]:
    """Candidates and features of all unlabeled sentences by the networks in the folders."""
    labeled = label_unlabeled(params, [partial(BatchPredictor.from_run, folder) for folder in folders])
    labels, features = labeled.take(np.arange(len(labeled.pairs)))
    return {"candidates": labels.candidates} | {
        field.name: getattr(features, field.name) for field in fields(Candidates)
    }


def test_cross_labeling(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two different teachers labels some images, with the bytes that it gives all images; two workers write the
    bytes of one. Chunks hold one teacher's images, whole."""
    split = records.read_table(records.SPLIT_PATH, records.SPLIT).to_pylist()
    for row in split:
        row["role"] = "labeled" if row["sent_id"] < 4 else row["role"]
    records.write_table(records.make_table(split, records.SPLIT), records.SPLIT_PATH, records.SPLIT)
    folders, candidates = [TEACHER, Path("other")], ["teacher", "sharpened", "neighbor"]
    other = Segmenter.create(MODEL, ["left dark dot"], seed=0)
    torch.manual_seed(0)
    for parameter in other.decoder.parameters():  # an untrained network returns its proposal
        torch.nn.init.normal_(parameter, std=0.3)
    other.save(folders[1])
    chunks: list[list[list[int]]] = []

    def noted(work, *rest):
        chunks.append([ids.tolist() for ids in work.ids])
        return map_chunks(work, *rest)

    monkeypatch.setattr(generate, "map_chunks", noted)
    one, two = (labeled(params_of(cluster_of(workers), candidates, cross_label=True), folders) for workers in (1, 2))
    np.testing.assert_equal(one, two)
    assert chunks[0] == chunks[1]
    alone = [labeled(params_of(cluster_of(), candidates), [folder]) for folder in folders]
    by_teacher: list[set[int]] = [set(), set()]
    for row, sent_id in enumerate(one["sent_id"].tolist()):
        (teacher,) = (k for k in (0, 1) if np.array_equal(one["cells"][row], alone[k]["cells"][row]))
        assert one["candidates"][row] == alone[teacher]["candidates"][row]
        by_teacher[teacher].add(sent_id)
    assert all(by_teacher)
    for ids in chunks[0]:
        assert set(ids) <= by_teacher[0] or set(ids) <= by_teacher[1]
        assert {sent_id // 2 for sent_id in ids} == {sent_id // 2 for sent_id in ids if sent_id ^ 1 in ids}


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
