"""Which samples a step draws from its streams, and the labels that a teacher gives them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_pairs import toy_batches
from toy_streams import streams_of, with_

from l2l_core.core.images import IMAGE_CACHE_BYTES
from l2l_core.core.seeding import generator
from l2l_core.data.augment import strong_view
from l2l_core.data.pairs import SIDE_BY_SIDE_VARIABLE, Batch, Pairs, Targets
from l2l_core.training import streams
from l2l_core.training.streams import (
    OnlineStream,
    Stream,
    draw,
    epoch_rows,
    label_online,
    share_image_cache,
    stream_sizes,
)


@given(count=st.integers(1, 20), batch=st.integers(1, 30), seed=st.integers(0, 2**32), first=st.integers(0, 50))
def test_every_epoch_is_a_permutation_of_the_rows(count, batch, seed, first):
    """For any batch size, every row occurs once per epoch, and each step depends only on its number."""
    steps = range(-(-3 * count // batch) + 1)
    walk = np.concatenate([epoch_rows(count, batch, seed, step) for step in steps])
    for epoch in range(3):
        assert sorted(walk[epoch * count : (epoch + 1) * count]) == list(range(count))
    np.testing.assert_array_equal(epoch_rows(count, batch, seed, first), epoch_rows(count, batch, seed, first))


def test_shuffles_once_per_epoch(monkeypatch):
    """A step of an epoch of ten million rows may not cost as much as shuffling them."""
    shuffled = []
    monkeypatch.setattr(streams, "generator", lambda *names: shuffled.append(names) or generator(*names))
    for step in range(40):
        epoch_rows(100, 10, 4711, step)
    assert shuffled == [("epoch", 4711, epoch) for epoch in range(4)]


def test_epochs_and_seeds_shuffle_differently():
    epochs = [tuple(epoch_rows(30, 30, seed, step)) for seed in (0, 1) for step in (0, 1)]
    assert len(set(epochs)) == 4


@pytest.mark.parametrize(
    ("shares", "batch", "expected"),
    [
        ([1.0], 1, [1]),
        ([1.0], 32, [32]),
        ([0.25, 0.75], 32, [8, 24]),
        ([0.3, 0.7], 8, [2, 6]),
        ([0.01, 0.99], 8, [1, 7]),
        ([0.5, 0.25, 0.25], 8, [4, 2, 2]),
        ([0.99, 0.01], 8, [7, 1]),
        ([0.9, 0.1], 2, [1, 1]),
        ([0.8, 0.1, 0.1], 3, [1, 1, 1]),
    ],
)
def test_streams_split_a_batch_by_their_shares(toy, shares, batch, expected):
    assert stream_sizes(streams_of(toy, *shares), batch) == expected


class Recorder:
    """A batch maker that records its requests."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.batches = toy_batches(pairs)
        self.rows: list[np.ndarray] = []
        self.hidden: list[np.ndarray] = []
        self.prior_rows: list[np.ndarray] = []

    def __call__(
        self,
        rows: np.ndarray,
        targets: Targets | None = None,
        no_prior: np.ndarray | None = None,
        image: torch.Tensor | None = None,
        prior_rows: np.ndarray | None = None,
    ) -> Batch:
        self.rows.append(rows)
        self.prior_rows.append(rows if prior_rows is None else prior_rows)
        self.hidden.append(np.zeros(len(rows), dtype=bool) if no_prior is None else no_prior)
        return self.batches(rows, targets, no_prior)


def find_bright(batch: Batch) -> torch.Tensor:
    """A teacher that is confident about bright pixels, which are the squares of the toy images."""
    bright = batch.image.float().mean(1, keepdim=True) > 120
    return torch.where(bright, 0.9, 0.2)


def test_a_step_follows_stream_shares_and_prior_dropout(toy):
    first, second = Recorder(toy[0]), Recorder(toy[0].take(np.array([0, 2])))
    streams = [Stream(first, toy[1], 0.25), Stream(second, toy[1].take(np.array([0, 2])), 0.75)]
    params = with_(batch_size=16, prior_dropout=0.3)
    for step in range(60):
        batch = draw(streams, params, seed=1, step=step, teacher_prob=find_bright)
        assert len(batch.sentence) == 16
        assert batch.label.shape == (16, 1, 32, 32)
        assert batch.sentence[4:] == [second.pairs.sentence[row] for row in second.rows[-1]]
    assert {len(rows) for rows in first.rows} == {4}
    assert {len(rows) for rows in second.rows} == {12}
    hidden = np.concatenate([*first.hidden, *second.hidden])
    assert hidden.mean() == pytest.approx(0.3, abs=0.07)  # 4.7 standard deviations of 960 draws
    counts = np.bincount(np.concatenate(second.rows))
    assert abs(counts[0] - counts[1]) <= 1
    assert not all(np.array_equal(hidden, first.hidden[0]) for hidden in first.hidden)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_prior_dropout_of_zero_or_one_hides_no_prior_or_every_prior(toy, share):
    recorder = Recorder(toy[0])
    draw([Stream(recorder, toy[1], 1.0)], with_(prior_dropout=share), seed=0, step=0, teacher_prob=find_bright)
    assert recorder.hidden[0].mean() == share


def test_prior_swap_gives_only_the_student_other_priors(toy):
    stored, online, none = Recorder(toy[0]), Recorder(toy[0]), Recorder(toy[0])
    streams = [Stream(none, toy[1], 0.25), Stream(stored, toy[1], 0.25, 0.5), OnlineStream(online, 0.7, 0.5, 0.5)]
    for step in range(50):
        draw(streams, with_(batch_size=16), seed=1, step=step, teacher_prob=find_bright)
    own = {
        "no swap": np.equal(none.rows, none.prior_rows),
        "stored": np.equal(stored.rows, stored.prior_rows),
        "teacher": np.equal(online.rows[::2], online.prior_rows[::2]),
        "student": np.equal(online.rows[1::2], online.prior_rows[1::2]),
    }
    assert own["no swap"].all()
    assert own["teacher"].all()
    # Each toy image has one sentence, so a swap draws one of the four pairs, and a quarter of the swaps change nothing.
    assert own["stored"].mean() == pytest.approx(1 - 0.5 * 0.75, abs=0.11)  # 3 standard deviations of 200 draws
    assert own["student"].mean() == pytest.approx(1 - 0.5 * 0.75, abs=0.08)


def test_drawn_rows_do_not_depend_on_the_label_source(toy):
    stored, online = Recorder(toy[0]), Recorder(toy[0])
    first = Stream(toy_batches(toy[0]), toy[1], 0.25)
    params = with_(prior_dropout=0.5)
    for step in range(10):
        draw([first, Stream(stored, toy[1], 0.75)], params, seed=1, step=step, teacher_prob=find_bright)
        draw([first, OnlineStream(online, 0.7, 0.75)], params, seed=1, step=step, teacher_prob=find_bright)
    teacher, student = slice(0, None, 2), slice(1, None, 2)
    for of in (teacher, student):
        np.testing.assert_array_equal(online.rows[of], stored.rows)
    np.testing.assert_array_equal(online.hidden[student], stored.hidden)
    assert np.any(stored.hidden)
    assert not np.any(online.hidden[teacher])


def test_a_student_without_priors_learns_from_a_teacher_that_sees_them(toy):
    online = Recorder(toy[0])
    draw([OnlineStream(online, 0.7, 1.0, hides_priors=True)], with_(), seed=1, step=0, teacher_prob=find_bright)
    teacher, student = online.hidden
    assert not np.any(teacher)
    assert np.all(student)


def test_online_labels_match_hand_computed_values(toy):
    batch = toy_batches(toy[0])(np.array([0]))
    prob = torch.tensor([0.1, 0.25, 0.26, 0.5, 0.51, 0.74, 0.75, 1.0]).view(1, 1, 2, 4)
    labeled = label_online(batch, prob, 0.75)
    assert labeled.label.flatten().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert labeled.keep.flatten().tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
    assert torch.equal(labeled.image, batch.image)


def test_strong_view_transforms_online_labels_with_the_image(toy):
    """The teacher marks bright pixels. In the student's view, the label must lie on the bright pixels of that view."""
    stream = OnlineStream(toy_batches(toy[0]), 0.85, 1.0)  # only bright pixels reach it: 0.9, against 1 - 0.2
    weak = draw([stream], with_(batch_size=20), seed=0, step=0, teacher_prob=find_bright)
    assert torch.equal(weak.keep, weak.label)
    view = strong_view(weak, range(20))
    mirrored = 0
    for row in range(20):
        grey, label = view.image[row].float().mean(0), view.label[row, 0] > 0
        bright = grey > (grey.min() + grey.max()) / 2
        assert (bright & label).sum() / (bright | label).sum() > 0.75
        assert torch.equal(view.keep[row, 0] > 0, label)
        mirrored += view.sentence[row] != weak.sentence[row]
    assert 0 < mirrored < 20


@pytest.mark.parametrize(
    ("launched", "beside", "parts"), [(None, None, 2), ("3", None, 6), (None, "2", 4), ("3", "2", 12)]
)
def test_streams_processes_and_trainings_of_a_machine_share_one_image_cache(toy, monkeypatch, launched, beside, parts):
    for name, value in (("LOCAL_WORLD_SIZE", launched), (SIDE_BY_SIDE_VARIABLE, beside)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    shared = share_image_cache(streams_of(toy, 0.5, 0.5))
    assert [stream.batches.cache_bytes for stream in shared] == 2 * [IMAGE_CACHE_BYTES // parts]
