"""Measured costs, against a network with a known minimum run time and memory."""

import time

import numpy as np
import pytest
import torch
from tiny_sam import save_tiny_sam
from toy_pairs import toy_network, toy_pairs, toy_params

from l2l_core.data import pairs
from l2l_core.errors import ConfigError
from l2l_core.model.sam import Sam
from l2l_core.preflight import measure as measuring
from l2l_core.preflight.measure import TRAINING_STEPS, Sample, measure

PAIRS = 4
MIB = 1 << 20


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """Four pairs; the start-up of Python is mocked."""
    monkeypatch.setattr(
        measuring, "_start", {measuring.LIGHT_MODULE: (1.5, 10), measuring.NETWORK_MODULE: (7.0, 20)}.get
    )
    pairs, targets = toy_pairs(tmp_path, PAIRS)
    box = pairs.box * np.tile(pairs.hw[:, ::-1], 2)
    return Sample(pairs, targets, box.astype(np.float64))


def slow_network(sample: Sample, seconds: float) -> tuple[object, list[bool]]:
    """A network with a slow decoder, and a list that records its training mode at each call."""
    network, passes = toy_network(sample.pairs), []
    decode = network.decode

    def wait(*args):
        passes.append(network.training)
        time.sleep(seconds)
        return decode(*args)

    network.decode = wait
    return network, passes


@pytest.mark.parametrize("number", [0, 1])
def test_measures_each_part_separately(sample, monkeypatch, number):
    build = measuring.build_candidates
    monkeypatch.setattr(measuring, "build_candidates", lambda *args: (time.sleep(0.4), build(*args))[1])
    network, passes = slow_network(sample, 0.2)
    params = toy_params(proposals={"size_px": 16}, select={"method": "topk"}, evaluate={"batch_size": PAIRS})
    costs, needs = measure(params.model_copy(update={"round": number}), network, sample, 3.25, 30)
    assert passes.count(True) == 1 + TRAINING_STEPS
    assert passes.count(False) == 3 + 1  # the three views, and masks
    assert 0.2 <= costs.step_s < 2
    assert 0.2 / PAIRS <= costs.predict_s < 2 / PAIRS
    assert 0.4 / PAIRS <= costs.label_s < 4 / PAIRS
    assert 0 <= costs.mask_s < 2 / PAIRS
    assert (costs.start_s, costs.network_start_s, costs.read_s) == (1.5, 7.0, 3.25)
    assert costs.policy_step_s == costs.proposal_s == 0
    assert (needs.start, needs.network_start, needs.read) == (10, 20, 30)
    assert needs.train_gpu is needs.predict_gpu is None


@pytest.mark.parametrize("number", [0, 1])
def test_measures_image_decoding_separately_from_training_and_inference(sample, monkeypatch, number):
    """Reading an image takes 0.1 s, so four images in a training step or in inference would take 0.4 s."""
    read, calls = pairs.read_image, []
    monkeypatch.setattr(pairs, "read_image", lambda path: (time.sleep(0.1), calls.append(path), read(path))[2])
    params = toy_params(proposals={"size_px": 16}, select={"method": "topk"}, evaluate={"batch_size": PAIRS})
    costs, _ = measure(params.model_copy(update={"round": number}), toy_network(sample.pairs), sample, 0, 0)
    assert 0.1 <= costs.decode_s < 0.4
    trained = PAIRS if number == 0 else 1 + 3  # from two streams, each with its share of the batch
    assert len(calls) == trained + PAIRS  # decoded by the first step and by the decoding measurement


def test_measures_memory_of_training_and_inference_separately(sample):
    """Each decoder call fills 200 MiB in training and 100 MiB in inference, at half of a stage's batch size."""
    network = toy_network(sample.pairs)
    decode = network.decode

    def fill(*args):
        held = torch.ones((200 if network.training else 100) * MIB, dtype=torch.uint8)
        time.sleep(0.1)
        assert held[-1] == 1
        return decode(*args)

    network.decode = fill
    params = toy_params(proposals={"size_px": 16}, select={"method": "topk"}, evaluate={"batch_size": 2 * PAIRS})
    _, needs = measure(params.model_copy(update={"round": 0}), network, sample, 0, 0)
    assert 190 * MIB <= needs.train < 400 * MIB
    assert 2 * 90 * MIB <= needs.predict < 2 * 200 * MIB
    grid, cell_bytes = params.select.grid, 2  # half precision
    assert needs.state > grid * grid * cell_bytes


def test_names_the_parameter_to_lower_if_the_gpu_memory_is_too_small(sample):
    network = toy_network(sample.pairs)

    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    network.decode = fail
    with pytest.raises(ConfigError, match=r"train\.engine\.micro_batch_size: the GPU's memory is not enough"):
        measure(toy_params(proposals={"size_px": 16}).model_copy(update={"round": 0}), network, sample, 0, 0)


def test_measures_the_policy_and_grabcut_if_they_are_used(sample):
    params = toy_params(proposals={"size_px": 16, "renderer": "grabcut"}, select={"method": "reinforce"})
    costs, _ = measure(params, toy_network(sample.pairs), sample, 0, 0)
    assert 0 < costs.policy_step_s < 2
    assert 0 < costs.proposal_s < 2


def test_measures_sam_on_one_image(sample, tmp_path, monkeypatch):
    """An encoder that takes 0.3 s for an image, and eight prompts that take 0.4 s together."""
    encode, segment = Sam.encode, Sam.segment
    monkeypatch.setattr(Sam, "encode", lambda *args: (time.sleep(0.3), encode(*args))[1])
    monkeypatch.setattr(Sam, "segment", lambda *args: (time.sleep(0.4), segment(*args))[1])
    folder = str(save_tiny_sam(tmp_path / "sam", "sam"))
    params = toy_params(
        proposals={"size_px": 16, "renderer": "sam", "model": folder},
        select={"method": "reinforce", "candidates": ["teacher", "sam"]},
    )
    costs, needs = measure(params, toy_network(sample.pairs), sample, 0, 0, folder)
    assert 0.3 <= costs.sam_image_s < 3
    assert 0.05 <= costs.sam_prompt_s < 0.5
    assert costs.proposal_s == 0
    assert needs.sam > 0
    assert needs.sam_gpu is None
    costs, needs = measure(toy_params(proposals={"size_px": 16}), toy_network(sample.pairs), sample, 0, 0)
    assert costs.sam_image_s is costs.sam_prompt_s is None


def test_stops_early_on_a_slow_network(sample, monkeypatch):
    """Two steps of half a second exhaust the budget; it leaves room for inference on two pairs at most."""
    monkeypatch.setattr(measuring, "BUDGET_S", 0.7)
    network, passes = slow_network(sample, 0.5)
    params = toy_params(select={"method": "topk"}, proposals={"size_px": 16}, train={"batch_size": 2})
    costs, _ = measure(params.model_copy(update={"round": 0}), network, sample, 0, 0)
    assert passes.count(True) <= 2
    assert costs.step_s >= 0.5
    assert costs.predict_s >= 0.5 / 2
