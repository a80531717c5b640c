"""The stage itself, killed while it asks a server: it goes on where it was, and ends in the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from prior_tables import ROOT, Index, image_row, prior_params, ref_row
from stub_server import Reply, Stub, completion, sentence_of, serve, some_box

KILLS, CHUNK, SENTENCES = 5, 4, 60
PATIENCE_S = 120
STAGES = ("ask", "priors")
OUTPUTS = ("data/priors/answers.parquet", "data/priors/priors.parquet", "metrics/priors.json")


def trouble(body: dict[str, object], _: int) -> Reply:
    """Usable answers, but for one request that the server refuses and one that is answered well when drawn again."""
    if sentence_of(body) == "thing 13":
        return 400, b"{}"
    if sentence_of(body) == "thing 29" and body["temperature"] == 0:
        return completion("I cannot tell.")
    return some_box(body)


@pytest.fixture(autouse=True, scope="module")
def _near() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("NO_PROXY", "127.0.0.1")
        yield


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serve(Stub(answer=trouble, delay_s=0.02)) as running:
        yield running


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the stages write where nothing disturbs them."""
    with serve(Stub(answer=trouble)) as undisturbed:
        written = finish(make_folder(tmp_path_factory.mktemp("whole") / "whole", undisturbed.url))
        assert len(undisturbed.bodies) == SENTENCES + 1  # one was drawn again
        return written


def make_folder(folder: Path, url: str, **engine: object) -> Path:
    """A project's parameters and index, with 20 images of three sentences each."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    images, refs = [], []
    for number in range(SENTENCES // 3):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"images/{number}.png")
        images.append(image_row(number, 64, 64))
        refs += [ref_row(3 * number + place, number, f"thing {3 * number + place}", None) for place in range(3)]
    Index(pd.DataFrame(images), pd.DataFrame(refs), pd.DataFrame([])).save(folder / "data/index")
    settings = {"server_url": url, "chunk_size": CHUNK, "concurrency": 2, "timeout_s": 20.0, "server_retries": 1}
    priors = prior_params(backend="openai", model="qwen3-vl", engine=settings | engine)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    (folder / "params.yaml").write_text(yaml.safe_dump(params | {"priors": priors.model_dump()}), encoding="utf-8")
    return folder


def start(folder: Path, stage: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"stages.{stage}"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(folder: Path) -> dict[str, bytes]:
    for stage in STAGES:
        process = start(folder, stage)
        output, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, output
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def kill_after(folder: Path, stub: Stub, requests: int, more_s: float) -> None:
    """Run the stage, and kill it a moment after the server has got so many more requests."""
    before, process, deadline = len(stub.bodies), start(folder, "ask"), time.monotonic() + PATIENCE_S
    try:
        while len(stub.bodies) < before + requests:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(more_s)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


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
    assert 0 < len(stub.bodies) - SENTENCES <= KILLS * (CHUNK + 1) + 1


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
    process.communicate(timeout=20)  # its workers hold the other end: they have ended when this returns
    assert len(stub.bodies) < SENTENCES
    assert finish(folder) == whole
