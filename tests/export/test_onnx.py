"""The ONNX file in onnxruntime against the network in torch."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from called import call
from toy_pairs import rows_of, toy_batches, toy_network, toy_pairs, toy_params

from l2l_core.export import onnx

PROPOSALS = toy_params(proposals={"size_px": 16, "flat_prob": 0.1}).proposals


def test_it_says_the_same_as_torch(tmp_path: Path) -> None:
    for name in (*onnx.NEEDED, "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -r requirements-export.txt")
    import onnxruntime

    pairs, _ = toy_pairs(tmp_path / "images", 3)
    network, batches = toy_network(pairs).eval(), toy_batches(pairs)
    onnx.write_onnx(network, tmp_path / "model.onnx", PROPOSALS)
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
    # All inputs count: each pair, with and without its prior, has logits of its own, by far more than the tolerance.
    for first in range(len(said)):
        assert all(np.abs(said[first] - other).max() > 1e-2 for other in said[:first])


def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, _ = toy_pairs(tmp_path / "images", 2)
    toy_network(pairs).save(tmp_path / "model")
    (tmp_path / "params.yaml").write_bytes((Path(__file__).parents[2] / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    assert call(monkeypatch, "export-model", "--run", "model") == 2
    assert "needs onnx and onnxscript: pip install -r requirements-export.txt" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()
