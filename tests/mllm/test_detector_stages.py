"""The stages `query` and `priors` with a detector on RefShapes: their tables, a kill, and other batches."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from tiny_detectors import save_tiny_grounding_dino, save_tiny_owlv2

from bench.params import merged
from bench.priors_kills import OUTPUTS, PATIENCE_S, start
from l2l_core.artifacts import records
from l2l_core.config import load_params
from l2l_core.mllm.detector import DISTINCT_IOU
from stages import ingest, priors, query, refshapes

ROOT = Path(__file__).parents[2]
IMAGES = {"image_size_px": 64, "train_images": 5, "val_images": 2, "test_images": 2, "sentences_per_image": 2}
SENTENCES, SAMPLES, CHUNK = 18, 2, 4
CHUNKS = ".scratch/query-*/*.parquet"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    save = {"grounding-dino": save_tiny_grounding_dino, "owlv2": save_tiny_owlv2}
    return {name: make(folder / name) for name, make in save.items()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with RefShapes' tables, without priors."""
    folder = tmp_path_factory.mktemp("drawn")
    shipped = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    engine = {"chunk_size": CHUNK, "batch_size": 3, "device": "cpu", "data_parallel": 1}
    settings = {"backend": "none", "precision": "fp32", "samples": SAMPLES, "engine": engine}
    (folder / "params.yaml").write_text(yaml.safe_dump(merged(shipped, {"refshapes": IMAGES, "priors": settings})))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        refshapes.main()
        ingest.main()
    return folder


def project(drawn: Path, folder: Path, model: Path) -> Path:
    """A copy of the project that queries a detector."""
    shutil.copytree(drawn, folder)
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    changes = {"priors": {"backend": "detector", "model": str(model)}}
    (folder / "params.yaml").write_text(yaml.safe_dump(merged(params, changes)))
    return folder


def finish() -> dict[str, bytes]:
    """Run both stages in the current folder -> the bytes that they wrote."""
    query.main()
    priors.main()
    return {name: Path(name).read_bytes() for name in OUTPUTS}


@pytest.mark.parametrize("name", ["grounding-dino", "owlv2"])
def test_the_stages_write_a_prior_for_every_sentence(
    drawn: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(project(drawn, tmp_path / "project", models[name]))
    finish()
    table = records.to_frame(records.read_table(records.PRIORS_PATH, records.PRIORS))
    assert len(table) == SENTENCES * SAMPLES
    assert set(table["status"]) == {"ok"}
    assert set(table["backend"]) == {"detector"}
    assert set(table["prompt_sha256"]) == {""}
    assert set(table["coord_space"]) == {"pixel"}
    first, second = (table[table["sample_index"] == sample].set_index("sent_id") for sample in range(SAMPLES))
    assert (first["score"] >= second["score"]).all()
    boxes = np.stack([np.stack(frame["bbox"].tolist()) for frame in (first, second)])
    assert boxes.min() >= 0
    assert boxes.max() <= IMAGES["image_size_px"]
    low, high = boxes[..., :2].max(axis=0), boxes[..., 2:].min(axis=0)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(axis=2)
    both = np.clip(high - low, 0, None).prod(axis=1)
    assert (both / (area.sum(axis=0) - both) <= DISTINCT_IOU).all()
    assert len({tuple(box) for box in boxes[0].tolist()}) > SENTENCES / 3  # images and sentences matter


def test_a_killed_query_resumes_to_the_same_bytes(
    drawn: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project(drawn, tmp_path / "whole", models["grounding-dino"]))
    whole = finish()
    folder = project(drawn, tmp_path / "killed", models["grounding-dino"])
    process, deadline = start(folder, "query"), time.monotonic() + PATIENCE_S
    while not list(folder.glob(CHUNKS)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert 0 < len(list(folder.glob(CHUNKS))) < SENTENCES * SAMPLES / CHUNK
    assert not (folder / OUTPUTS[0]).exists()
    monkeypatch.chdir(folder)
    assert finish() == whole
    assert not list(folder.glob(".scratch/*"))


def test_other_chunks_and_batches_give_the_same_priors(
    drawn: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of three divide the samples of a sentence."""

    def answered(name: str, engine: dict[str, int]) -> pa.Table:
        folder = project(drawn, tmp_path / name, models["grounding-dino"])
        monkeypatch.chdir(folder)
        params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
        (folder / "params.yaml").write_text(yaml.safe_dump(merged(params, {"priors": {"engine": engine}})))
        assert load_params().priors.engine.chunk_size == engine["chunk_size"]
        finish()
        return records.read_table(records.PRIORS_PATH, records.PRIORS)

    first = answered("first", {"chunk_size": 3, "batch_size": 1})
    second = answered("second", {"chunk_size": 1000, "batch_size": 7})
    assert first.select(["sent_id", "sample_index", "status"]) == second.select(["sent_id", "sample_index", "status"])
    for column, tolerance in (("bbox", 0.05), ("score", 1e-4)):
        one, other = (np.array(table[column].to_pylist()) for table in (first, second))
        np.testing.assert_allclose(one, other, atol=tolerance)
