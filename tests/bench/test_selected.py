"""bench.selected scores the policy's choice among candidates whose quality is known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from bench import selected


class Second:
    """A policy that takes the second candidate, and trusts the later sentences more."""

    def act(self, candidates):
        count = len(candidates.sent_id)
        return SimpleNamespace(choice=np.ones(count, int), accept_prob=np.linspace(0.1, 0.9, count))


IOU = np.array([[0.2, 0.4], [0.9, 0.6], [0.5, 0.8]])


def test_scores_of_every_candidate_the_choice_and_the_best():
    candidates, truth = SimpleNamespace(sent_id=np.arange(3)), SimpleNamespace(iou=IOU)
    found = selected.scores(Second(), candidates, truth, ["teacher", "prior"])
    assert found["miou"] == {"teacher": 53.33, "prior": 60.0, "selected": 60.0, "oracle": 70.0}
    assert found["auroc"] == 100.0  # the wrong choice, 0.4, has the lowest accept_prob
