import pytest
import torch
from torch import nn

from l2l_core.training.ema import MovingAverage


def single(weight: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, weight)
    return layer


def test_moving_average_matches_hand_computed_weights():
    """Steps 1 and 2 ramp up to the plain mean of 0, 1, and 4. At step 1000 the decay of 0.9 applies."""
    teacher = single(0)
    MovingAverage(teacher, single(1)).update(1, 0.9)
    assert teacher.weight.item() == pytest.approx(1 / 2)
    MovingAverage(teacher, single(4)).update(2, 0.9)
    assert teacher.weight.item() == pytest.approx((0 + 1 + 4) / 3)
    MovingAverage(teacher, single(10)).update(1000, 0.9)
    assert teacher.weight.item() == pytest.approx(0.9 * 5 / 3 + 0.1 * 10)


def test_teacher_equals_student_without_decay():
    teacher, student = single(3), single(7)
    MovingAverage(teacher, student).update(5, 0.0)
    assert teacher.weight.item() == 7
    assert student.weight.item() == 7


def test_averages_statistics_and_copies_counters():
    teacher, student = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    student.running_mean.fill_(8.0)
    student.num_batches_tracked.fill_(5)
    MovingAverage(teacher, student).update(1, 0.99)
    assert teacher.running_mean.tolist() == [4, 4]
    assert teacher.num_batches_tracked.item() == 5
    assert student.running_mean.tolist() == [8, 8]


def test_averages_weights_loaded_after_construction():
    teacher, student = single(0), single(0)
    average = MovingAverage(teacher, student)
    teacher.load_state_dict(single(2).state_dict())
    student.load_state_dict(single(4).state_dict())
    average.update(1, 0.9)
    assert teacher.weight.item() == 3


def test_teacher_requires_no_gradient():
    teacher = single(0).requires_grad_(False)
    student = single(1)
    MovingAverage(teacher, student).update(1, 0.9)
    assert not teacher.weight.requires_grad
    assert student.weight.requires_grad
    assert torch.equal(student.weight, torch.ones(1, 1))
