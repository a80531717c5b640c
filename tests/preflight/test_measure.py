"""What is measured, against a network and a labelling that last a known time at least."""

import time

import numpy as np
import pytest
from toy_pairs import toy_network, toy_pairs, toy_params

from l2l_core.preflight import measure as measuring
from l2l_core.preflight.measure import TRAINING_STEPS, Sample, measure

PAIRS = 4


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """Four pairs; starting a Python is left out."""
    monkeypatch.setattr(measuring, "_start_s", lambda module: 1.5 if module == measuring.LIGHT_MODULE else 7.0)
    pairs, targets = toy_pairs(tmp_path, PAIRS)
    box = pairs.box * np.tile(pairs.hw[:, ::-1], 2)
    return Sample(pairs, targets, box.astype(np.float64))


def slow_network(sample: Sample, seconds: float) -> tuple[object, list[bool]]:
    """A network whose every decoding lasts, and for each of them whether it was in training."""
    network, passes = toy_network(sample.pairs), []
    decode = network.decode

    def wait(*args):
        passes.append(network.training)
        time.sleep(seconds)
        return decode(*args)

    network.decode = wait
    return network, passes


@pytest.mark.parametrize("number", [0, 1])
def test_each_part_is_measured_by_itself(sample, monkeypatch, number):
    construct = measuring.construct
    monkeypatch.setattr(measuring, "construct", lambda *args: (time.sleep(0.4), construct(*args))[1])
    network, passes = slow_network(sample, 0.2)
    params = toy_params(proposals={"size_px": 16}, select={"policy": "topk"}, evaluate={"batch_size": PAIRS})
    costs = measure(params.model_copy(update={"round": number}), network, sample, read_s=3.25)
    assert passes.count(True) == 1 + TRAINING_STEPS
    assert passes.count(False) == 3 + 1  # the three views, and masks
    assert 0.2 <= costs.step_s < 2
    assert 0.2 / PAIRS <= costs.ask_s < 2 / PAIRS
    assert 0.4 / PAIRS <= costs.label_s < 4 / PAIRS
    assert 0 <= costs.mask_s < 2 / PAIRS
    assert (costs.start_s, costs.network_start_s, costs.read_s) == (1.5, 7.0, 3.25)
    assert costs.policy_step_s == costs.proposal_s == 0


def test_the_policy_and_grabcut_are_measured_where_they_run(sample):
    params = toy_params(proposals={"size_px": 16, "renderer": "grabcut"}, select={"policy": "reinforce"})
    costs = measure(params, toy_network(sample.pairs), sample, read_s=0)
    assert 0 < costs.policy_step_s < 2
    assert 0 < costs.proposal_s < 2


def test_a_slow_network_is_cut_short(sample, monkeypatch):
    """Two steps of half a second exhaust the budget, which has room for asking about two pairs at most."""
    monkeypatch.setattr(measuring, "BUDGET_S", 0.7)
    network, passes = slow_network(sample, 0.5)
    params = toy_params(select={"policy": "topk"}, proposals={"size_px": 16}, train={"batch_size": 2})
    costs = measure(params.model_copy(update={"round": 0}), network, sample, read_s=0)
    assert passes.count(True) <= 2
    assert costs.step_s >= 0.5
    assert costs.ask_s >= 0.5 / 2
