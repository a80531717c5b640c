"""Precision and device selection with mocked PyTorch capabilities."""

from __future__ import annotations

import json

import pytest
import torch
from toy_pairs import MODEL, TRAIN, toy_batches, toy_network, toy_pairs

from l2l_core.core import device as device_module
from l2l_core.core.device import choose_device, computes_bf16, describe_device, print_device, resolve_precision
from l2l_core.errors import ConfigError
from l2l_core.model.batch_predictor import BatchPredictor
from l2l_core.model.segmenter import Segmenter
from l2l_core.training.loop import train
from l2l_core.training.streams import Stream

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture(autouse=True)
def _nothing_said_before():
    print_device.cache_clear()
    device_module._warn_of_emulation.cache_clear()


def cpu_with(monkeypatch, *instructions: str, kernels: bool = True) -> None:
    known = {"avx2": True} | dict.fromkeys(instructions, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: kernels)


@pytest.mark.parametrize("instructions", [["avx512_bf16"], ["amx_tile", "amx_bf16"], ["neon", "bf16"]])
def test_auto_precision_is_bf16_on_a_cpu_with_bf16_instructions(monkeypatch, capsys, instructions):
    cpu_with(monkeypatch, *instructions)
    assert resolve_precision("auto", CPU) == "bf16"
    assert resolve_precision("bf16", CPU) == "bf16"
    assert resolve_precision("fp32", CPU) == "fp32"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("instructions", "kernels"),
    [([], True), (["avx512_f", "avx512_vl"], True), (["amx_tile", "amx_int8"], True), (["bf16"], False)],
)
def test_auto_precision_is_fp32_on_a_cpu_that_emulates_bf16(monkeypatch, capsys, instructions, kernels):
    cpu_with(monkeypatch, *instructions, kernels=kernels)
    assert resolve_precision("auto", CPU) == "fp32"
    assert capsys.readouterr().err == ""


def test_keeps_explicit_bf16_on_a_cpu_that_emulates_it_and_warns_once(monkeypatch, capsys):
    cpu_with(monkeypatch)
    assert [resolve_precision("bf16", CPU, "priors.precision") for _ in range(3)] == ["bf16"] * 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: params.yaml: priors.precision: got 'bf16', which this cpu emulates")


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_precision_follows_the_gpu_compute_capability(monkeypatch, capability, precision):
    class Properties:
        major, minor = capability

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert resolve_precision("auto", CUDA) == precision


@pytest.mark.parametrize("native", [False, True])
def test_native_bf16_follows_torch_on_an_apple_gpu(monkeypatch, native):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: native)
    assert computes_bf16(MPS) == native


def test_auto_device_prefers_cuda_and_named_devices_are_used_as_given(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for there, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto").type == kind
        assert choose_device("cpu").type == "cpu"
        assert choose_device("mps").type == "mps"


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_refuses_a_device_that_torch_does_not_see(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"priors\.engine\.device: got '{name}'"):
        choose_device(name, "params.yaml: priors.engine.device")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cpu:0", "", "xpu"])
def test_refuses_an_unknown_device(name):
    with pytest.raises(ConfigError, match=rf"^device: got '{name}', expected auto, cpu, cuda, cuda:N, or mps$"):
        choose_device(name, "device")


@pytest.mark.parametrize(
    ("name", "count", "is_there"),
    [
        ("cuda:1", 2, True),
        ("cuda:2", 2, False),
        ("cuda:128", 2, False),
        ("cuda:99999999", 2, False),
        ("cuda:0", 0, False),
    ],
)
def test_a_numbered_gpu_must_exist(monkeypatch, name, count, is_there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if is_there:
        assert choose_device(name) == torch.device(name)
    else:
        seen = r"2 CUDA device\(s\)" if count else "no CUDA device"
        with pytest.raises(ConfigError, match=f"got '{name}', but torch sees {seen}"):
            choose_device(name)


def test_prints_the_device_once(capsys):
    for _ in range(2):
        print_device(CPU, "fp32")
    assert capsys.readouterr().out == f"device: {describe_device(CPU, 'fp32')}\n"
    assert describe_device(CPU, "fp32") == f"cpu ({torch.get_num_threads()} threads), fp32"


@pytest.mark.parametrize("native", [False, True])
def test_trains_in_two_precisions_in_one_process_and_saves_each_with_its_model(tmp_path, monkeypatch, native):
    """`auto` gives the same bytes as the precision it resolves to."""
    cpu_with(monkeypatch, *(["avx512_bf16"] if native else []))
    pairs, targets = toy_pairs(tmp_path / "images")
    weights = {}
    for setting in ("bf16", "fp32", "auto"):
        params = TRAIN.model_copy(update={"precision": setting})
        stream = Stream(toy_batches(pairs), targets, 1.0)
        trained = train(toy_network(pairs), [stream], 2, params, seed=0, run_name="test").teacher
        trained.save(tmp_path / setting)
        config = json.loads((tmp_path / setting / "config.json").read_text())
        assert config["precision_setting"] == setting
        assert config["precision"] == (setting if setting != "auto" else "bf16" if native else "fp32")
        loaded = Segmenter.load(tmp_path / setting)
        assert (loaded.precision, loaded.precision_setting) == (config["precision"], setting)
        assert loaded.params == MODEL
        assert BatchPredictor.of(loaded, params).precision == config["precision"]
        weights[setting] = (tmp_path / setting / "model.safetensors").read_bytes()
    assert weights["auto"] == weights["bf16" if native else "fp32"]
    assert weights["bf16"] != weights["fp32"]
