"""The stage itself, killed while it asks a server: it goes on where it was, and ends in the same bytes."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.priors_kills import (
    CHUNK,
    DRAWN_AGAIN,
    OUTPUTS,
    PATIENCE_S,
    SENTENCES,
    finish,
    kill_after,
    make_folder,
    start,
    trouble,
)
from bench.stub_server import Stub, sentence_of, serve

KILLS = 5


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serve(Stub(answer=trouble, delay_s=0.02)) as running:
        yield running


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the stages write where nothing disturbs them."""
    with serve(Stub(answer=trouble)) as undisturbed:
        written = finish(make_folder(tmp_path_factory.mktemp("whole") / "project", undisturbed.url))
        assert len(undisturbed.bodies) == SENTENCES + DRAWN_AGAIN
        return written


def test_the_server_was_no_friend(whole: dict[str, bytes]) -> None:
    summary = json.loads(whole["metrics/priors.json"])
    assert (summary["answers"], summary["ok"], summary["error"]) == (SENTENCES, SENTENCES - 1, 1)


def test_killed_at_random_moments_it_ends_in_the_same_bytes(
    tmp_path: Path, stub: Stub, whole: dict[str, bytes]
) -> None:
    folder = make_folder(tmp_path / "project", stub.url)
    draw = random.Random(0)
    for _ in range(KILLS):
        kill_after(folder, stub, requests=draw.randint(1, 2 * CHUNK), more_s=draw.uniform(0, 0.03))
        assert not (folder / OUTPUTS[0]).exists()
    assert finish(folder) == whole
    assert list((folder / ".scratch").iterdir()) == []

    times = Counter(sentence_of(body) for body in stub.bodies)
    assert len(times) == SENTENCES
    # Asked twice: at most the chunk in flight at each kill, and the answer that is drawn again.
    assert 0 < len(stub.bodies) - SENTENCES <= KILLS * (CHUNK + DRAWN_AGAIN) + DRAWN_AGAIN


def test_two_processes_end_in_the_same_bytes_and_die_with_their_parent(
    tmp_path: Path, stub: Stub, whole: dict[str, bytes]
) -> None:
    folder = make_folder(tmp_path / "project", stub.url, data_parallel=2)
    process, deadline = start(folder, "ask"), time.monotonic() + PATIENCE_S
    while len(stub.bodies) < CHUNK:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()  # the parent alone
    process.communicate(timeout=PATIENCE_S)  # its workers hold the other end: this returns when they have ended
    assert len(stub.bodies) < SENTENCES
    assert finish(folder) == whole
