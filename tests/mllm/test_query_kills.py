"""The stage is killed while it queries a server; it resumes and produces the same bytes."""

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
    with serve(Stub(respond=trouble, delay_s=0.02)) as running:
        yield running


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Output of the stages when they run without interruption."""
    with serve(Stub(respond=trouble)) as undisturbed:
        written = finish(make_folder(tmp_path_factory.mktemp("whole") / "project", undisturbed.url))
        assert len(undisturbed.bodies) == SENTENCES + DRAWN_AGAIN
        return written


def test_stub_server_causes_one_failed_request(whole: dict[str, bytes]) -> None:
    summary = json.loads(whole["metrics/priors.json"])
    assert (summary["responses"], summary["ok"], summary["error"]) == (SENTENCES, SENTENCES - 1, 1)


def test_resuming_after_random_kills_gives_the_same_bytes(tmp_path: Path, stub: Stub, whole: dict[str, bytes]) -> None:
    folder = make_folder(tmp_path / "project", stub.url)
    draw = random.Random(0)
    for _ in range(KILLS):
        kill_after(folder, stub, requests=draw.randint(1, 2 * CHUNK), more_s=draw.uniform(0, 0.03))
        assert not (folder / OUTPUTS[0]).exists()
    assert finish(folder) == whole
    assert list((folder / ".scratch").iterdir()) == []

    times = Counter(sentence_of(body) for body in stub.bodies)
    assert len(times) == SENTENCES
    # Queried twice: at most the chunk in flight at each kill, and the response that is resampled.
    assert 0 < len(stub.bodies) - SENTENCES <= KILLS * (CHUNK + DRAWN_AGAIN) + DRAWN_AGAIN


def test_two_workers_die_with_their_parent_and_resume_to_the_same_bytes(
    tmp_path: Path, stub: Stub, whole: dict[str, bytes]
) -> None:
    folder = make_folder(tmp_path / "project", stub.url, data_parallel=2)
    process, deadline = start(folder, "query"), time.monotonic() + PATIENCE_S
    while len(stub.bodies) < CHUNK:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()  # only the parent
    process.communicate(timeout=PATIENCE_S)  # the workers hold the other end: this returns when they exit
    assert len(stub.bodies) < SENTENCES
    assert finish(folder) == whole
