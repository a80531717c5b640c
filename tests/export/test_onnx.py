"""Compares the ONNX file in onnxruntime with the network in torch."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from called import call
from toy_pairs import MODEL, PARAMS_FILE, SIZE_PX, rows_of, toy_batches, toy_network, toy_pairs, toy_params
from transformers import SwinBackbone, SwinConfig

from l2l_core.export import onnx
from l2l_core.model.packaged import LITE0, PACKAGED
from l2l_core.model.segmenter import Segmenter

PROPOSALS = toy_params(proposals={"size_px": 16, "flat_prob": 0.1}).proposals


def save_swin(folder: Path) -> str:
    """Save a small Swin, the usual backbone of the field, to disk."""
    sizes = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
    SwinBackbone(
        SwinConfig(image_size=SIZE_PX, out_features=[f"stage{k}" for k in range(1, 5)], **sizes)
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("encoder", ["tiny", "swin", LITE0])
def test_onnx_logits_match_torch(tmp_path: Path, encoder: str) -> None:
    if encoder == LITE0 and not find_spec(PACKAGED[LITE0][1]):
        pytest.skip("efficientnet-lite0 is not installed: make small")
    for name in (*onnx.NEEDED, "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[export]'")
    import onnxruntime

    pairs, _ = toy_pairs(tmp_path / "images", 3)
    name = save_swin(tmp_path / "swin") if encoder == "swin" else encoder
    network = Segmenter.create(MODEL.model_copy(update={"image_encoder": name}), pairs.sentence, 0).eval()
    torch.manual_seed(3)
    for parameter in network.parameters():  # an untrained network returns its proposal, whatever its other inputs
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    batches = toy_batches(pairs)
    network.proposals = PROPOSALS
    onnx.write_onnx(network, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == {
        "image_size_px": "32",
        "max_text_tokens": "12",
        "proposal_size_px": "16",
        "flat_prob": "0.1",
    }
    said = []
    for row in range(3):
        for hidden in (False, True):
            batch = batches(rows_of(row), None, np.array([hidden]))
            tokens = network.tokenize(batch)
            with torch.inference_mode():
                expected = network(batch, tokens).mask_logits.numpy()
            inputs = {name: tensor.numpy() for name, tensor in onnx.onnx_inputs(batch, tokens).items()}
            (logits,) = session.run(["mask_logits"], inputs)
            np.testing.assert_allclose(logits, expected, atol=1e-4)
            said.append(logits)
    # All inputs matter: the logits of all pairs, with and without prior, differ by far more than the tolerance.
    for first in range(len(said)):
        assert all(np.abs(said[first] - other).max() > 1e-2 for other in said[:first])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with parameters and a model."""
    pairs, _ = toy_pairs(tmp_path / "images", 2)
    network = toy_network(pairs)
    network.proposals, network.precision = PROPOSALS, "fp32"
    network.save(tmp_path / "model")
    (tmp_path / "params.yaml").write_bytes(PARAMS_FILE.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_reports_a_failed_torch_export_in_one_message(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise torch.onnx.OnnxExporterError("Failed.\n<class 'ValueError'>: no such view\n(See above.)")

    monkeypatch.setattr(onnx, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.onnx, "export", refuse)
    assert call(monkeypatch, "export", "onnx", "--run", "model") == 2
    assert capsys.readouterr().err.endswith("write these encoders as ONNX: <class 'ValueError'>: no such view\n")
    assert not (project / "export").exists()


def test_names_missing_packages(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    assert call(monkeypatch, "export", "onnx", "--run", "model") == 2
    assert "needs onnx and onnxscript: pip install -e '.[export]'" in capsys.readouterr().err
    assert not (project / "export").exists()
