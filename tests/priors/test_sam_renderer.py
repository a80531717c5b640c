"""`proposals.renderer: sam`: maps of all samples, predicted IoUs, one encoding per image, and resuming after a kill."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import yaml
from PIL import Image
from tiny_sam import save_tiny_sam
from toy_pairs import toy_params

from bench.params import merged
from l2l_core.artifacts import records
from l2l_core.config import ProposalsParams
from l2l_core.errors import ConfigError, InputError
from l2l_core.model import sam as sam_module
from l2l_core.model.sam import EncodedImage, Prompts, Sam
from l2l_core.priors import proposals
from l2l_core.priors.fit import fit_proposals
from l2l_core.priors.proposals import make_proposals, render_key
from l2l_core.training.runs import training_settings
from stages.proposals import main

ROOT = Path(__file__).parents[2]
SIZE = 16
HW = (40, 60)
BOX, OTHER_BOX, POINT = [5.0, 4.0, 30.0, 36.0], [20.0, 10.0, 55.0, 38.0], [12.0, 20.0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sam(tmp_path_factory.mktemp("models") / "sam", "sam")


def params_of(model: Path) -> ProposalsParams:
    return ProposalsParams(
        renderer="sam", model=str(model), ring="fit", core="fit", size_px=SIZE, falloff=0.15, inside_prob=0.9,
        flat_prob=0.1,
    )  # fmt: skip


def prior(sent_id: int, sample_index: int = 0, **found: Any) -> dict[str, Any]:
    return {"sent_id": sent_id, "sample_index": sample_index, **found}


def tables(folder: Path, priors: list[dict[str, Any]], images: int = 1) -> tuple[pa.Table, pd.DataFrame, pd.DataFrame]:
    """Sentence k is about image k % images; the images are noise of one size."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(images):
        pixels = np.random.default_rng(number).integers(0, 256, (*HW, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        name = str(folder / f"{number}.png")
        rows.append({"image_id": number, "file_name": name, "height": HW[0], "width": HW[1], "sha256": str(number)})
    sent_ids = sorted({row["sent_id"] for row in priors})
    refs = pd.DataFrame({"sent_id": sent_ids, "image_id": [sent_id % images for sent_id in sent_ids]})
    return pa.Table.from_pylist(priors, records.PRIORS), refs, pd.DataFrame(rows)


def maps_of(table: pa.Table) -> np.ndarray:
    """[N, SIZE, SIZE] in 0..1."""
    assert table.schema == records.PROPOSALS
    flat = np.frombuffer(b"".join(table["soft"].to_pylist()), np.uint8)
    return flat.reshape(-1, SIZE, SIZE) / 255


def direct(model: Path, image: Path, box: list[float] | None, point: list[float] | None) -> tuple[np.ndarray, float]:
    """Map [SIZE, SIZE] and predicted IoU of one prompt, from the model itself."""
    sam = Sam(str(model), torch.device("cpu"))
    (encoded,) = sam.encode([np.asarray(Image.open(image))])
    found = sam.segment(encoded, Prompts(np.array([box or [np.nan] * 4]), np.array([point or [np.nan] * 2])))
    return sam.probabilities(found.logits, encoded, SIZE)[0], float(found.predicted_iou[0])


def test_box_and_point_of_a_response_prompt_the_model(model: Path, tmp_path: Path) -> None:
    """Box, point, or both: each gives another mask, the model's own for that prompt."""
    found = [{"bbox": BOX}, {"point": POINT}, {"bbox": BOX, "point": POINT}]
    index = tables(tmp_path, [prior(number, **one) for number, one in enumerate(found)])
    table = make_proposals(*index, params_of(model))
    maps = maps_of(table)
    for number, one in enumerate(found):
        expected, predicted = direct(model, tmp_path / "0.png", one.get("bbox"), one.get("point"))
        np.testing.assert_allclose(maps[number], expected, atol=0.004)
        assert table["predicted_iou"][number].as_py() == pytest.approx(predicted, abs=1e-4)
    assert np.abs(maps[0] - maps[1]).max() > 0.05
    assert np.abs(maps[0] - maps[2]).max() > 0.05


def test_samples_are_averaged_with_flat_maps_for_those_without_a_place(model: Path, tmp_path: Path) -> None:
    """Sentence 1 has two boxes and an empty response, sentence 2 no place at all."""
    rows = [prior(1, 0, bbox=BOX), prior(1, 1), prior(1, 2, bbox=OTHER_BOX), *(prior(2, k) for k in range(3))]
    table = make_proposals(*tables(tmp_path, rows), params_of(model))
    first, second = (direct(model, tmp_path / "0.png", box, None) for box in (BOX, OTHER_BOX))
    maps = maps_of(table)
    np.testing.assert_allclose(maps[0], (first[0] + 0.1 + second[0]) / 3, atol=0.004)
    assert table["predicted_iou"][0].as_py() == pytest.approx((first[1] + second[1]) / 2, abs=1e-4)
    np.testing.assert_allclose(maps[1], 0.1, atol=0.002)
    assert table["predicted_iou"][1].as_py() is None
    assert table["score"].to_pylist()[1] == 0


def test_an_image_is_encoded_once_for_all_its_sentences(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten images with four sentences of two samples each, in chunks of three images."""
    monkeypatch.setattr(proposals, "_SAM_CHUNK", 3)
    encoded: list[bytes] = []
    encode = Sam.encode

    def count(self: Sam, images: list[np.ndarray]) -> list[EncodedImage]:
        encoded.extend(image.tobytes() for image in images)
        return encode(self, images)

    monkeypatch.setattr(Sam, "encode", count)
    rows = [prior(number, sample, bbox=BOX) for number in range(40) for sample in range(2)]
    table = make_proposals(*tables(tmp_path, rows, images=10), params_of(model))
    assert len(encoded) == len(set(encoded)) == 10
    assert table["sent_id"].to_pylist() == list(range(40))
    maps = maps_of(table)
    np.testing.assert_array_equal(maps[:10], maps[10:20])  # of one image each
    np.testing.assert_allclose(maps[7], direct(model, tmp_path / "7.png", BOX, None)[0], atol=0.004)


def test_nothing_is_fitted_to_the_labels(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty labeled sentences would be enough for GrabCut's ring and core."""
    monkeypatch.setattr("l2l_core.priors.fit.read_photo", lambda path, by: pytest.fail("reads an image"))
    index = tables(tmp_path, [prior(number, bbox=BOX) for number in range(20)])
    fit = fit_proposals(*index, dict.fromkeys(range(20), b""), params_of(model))
    assert (fit.params.renderer, fit.params.model, fit.sentences) == ("sam", str(model), 0)


def test_sentences_without_a_place_need_neither_image_nor_model(tmp_path: Path) -> None:
    index = tables(tmp_path, [prior(0)])
    (tmp_path / "0.png").unlink()
    np.testing.assert_allclose(maps_of(make_proposals(*index, params_of(tmp_path / "none"))), 0.1, atol=0.002)


def test_missing_image_and_missing_model_are_named(model: Path, tmp_path: Path) -> None:
    index = tables(tmp_path, [prior(0, bbox=BOX)])
    with pytest.raises(ConfigError, match=r"proposals\.model: got '.*none'"):
        make_proposals(*index, params_of(tmp_path / "none"))
    (tmp_path / "0.png").unlink()
    with pytest.raises(InputError, match=r"0\.png: image not found; SAM needs it, the box renderer does not"):
        make_proposals(*index, params_of(model))


KILLED = """
import os, signal
from stages import proposals
from l2l_core.model.sam import Sam
encode, calls = Sam.encode, []
def dies(self, images):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, images)
Sam.encode = dies
proposals.main()
"""


def test_a_killed_stage_resumes_to_the_same_bytes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """48 images are three chunks of four batches; SIGKILL comes in the second batch of the second chunk."""
    monkeypatch.chdir(tmp_path)
    rows = [prior(number, bbox=BOX if number % 3 else OTHER_BOX) for number in range(96)]
    priors, refs, images = tables(Path("images"), rows, images=48)
    refs = refs.assign(ann_id=0)
    for table, path, schema in (
        (refs.to_dict("records"), records.INDEX.refs, records.REFS),
        (images.to_dict("records"), records.INDEX.images, records.IMAGES),
        ([], records.SPLIT_PATH, records.SPLIT),
        ([], records.LABELED_MASKS_PATH, records.MASKS),
    ):
        records.write_table(records.make_table(table, schema), path, schema)
    records.write_table(priors, records.PRIORS_PATH, records.PRIORS)
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    Path("params.yaml").write_text(yaml.safe_dump(merged(raw, {"proposals": {"renderer": "sam", "model": str(model)}})))
    main()
    whole = records.PROPOSALS_PATH.read_bytes()
    assert not list(Path(".scratch").iterdir())

    records.PROPOSALS_PATH.unlink()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert subprocess.run([sys.executable, "-c", KILLED], check=False, capture_output=True).returncode == -9
    assert not records.PROPOSALS_PATH.exists()
    assert [path.name for path in Path(".scratch").rglob("*.parquet")] == ["0.parquet"]

    encoded: list[int] = []
    encode = Sam.encode

    def count(self: Sam, photos: list[np.ndarray]) -> list[EncodedImage]:
        encoded.append(len(photos))
        return encode(self, photos)

    monkeypatch.setattr(Sam, "encode", count)
    main()
    assert sum(encoded) == 32  # the first 16 images are stored
    assert records.PROPOSALS_PATH.read_bytes() == whole
    assert not list(Path(".scratch").iterdir())


def test_stored_chunks_belong_to_one_model_and_one_set_of_priors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights in the same folder, other parameters, other priors, or another precision never resume."""
    folder, table = tmp_path / "model", tmp_path / "priors.parquet"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"1")
    table.write_bytes(b"a")
    params = params_of(folder)
    monkeypatch.setattr(sam_module, "resolve_precision", lambda setting, device: "fp32")
    keys = [render_key(params, [table]), render_key(params.model_copy(update={"size_px": 8}), [table])]
    assert render_key(params, [table]) == keys[0]
    (folder / "model.safetensors").write_bytes(b"22")
    keys.append(render_key(params, [table]))
    table.write_bytes(b"b")
    keys.append(render_key(params, [table]))
    monkeypatch.setattr(sam_module, "resolve_precision", lambda setting, device: "bf16")
    keys.append(render_key(params, [table]))
    assert len(set(keys)) == 5


def test_a_model_for_the_selection_changes_no_rendering(tmp_path: Path) -> None:
    """Proposals of boxes and GrabCut, and all that is trained on them, stay as they are."""
    table = tmp_path / "priors.parquet"
    table.write_bytes(b"a")
    boxes = params_of(tmp_path).model_copy(update={"renderer": "box", "model": None})
    named = boxes.model_copy(update={"model": "facebook/sam2.1-hiera-tiny"})
    assert render_key(named, [table]) == render_key(boxes, [table])
    assert named.rendering == boxes
    settings = [training_settings(toy_params(proposals={"renderer": "box", "model": name})) for name in (None, "a/b")]
    assert settings[0] == settings[1]
