"""The stages `query` and `priors` against a server with faults, killed by SIGKILL at random moments and resumed.

    python -m bench.priors_kills        (30 kills; about eight minutes)

Every time in a fresh folder: run, kill, run again, compare with what an undisturbed run wrote. `repeated` are requests
that the server got more than once beyond those that a response outside the prompt makes necessary; at most the chunk in
flight (with the second draw of its response outside the prompt) may be sent again. Writes
bench/results/priors_kills.jsonl, one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from bench.params import merged
from bench.stub_server import Reply, Stub, completion, sentence_of, serve, some_box
from l2l_core.artifacts import records

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "bench" / "work" / "priors_kills"
RESULTS = ROOT / "bench" / "results" / "priors_kills.jsonl"

KILLS, CHUNK, SENTENCES = 30, 4, 60
DRAWN_AGAIN = 1  # of the sentences, by `trouble`
PATIENCE_S = 120
OUTPUTS = ("data/priors/responses.parquet", "data/priors/priors.parquet", "metrics/priors.json")


def trouble(body: dict[str, Any], _: int) -> Reply:
    """Usable responses, but for one request that the server refuses and one whose second draw is usable."""
    if sentence_of(body) == "thing 13":
        return 400, b"{}"
    if sentence_of(body) == "thing 29" and body["temperature"] == 0:
        return completion("I cannot tell.")
    return some_box(body)


def make_folder(folder: Path, url: str, **engine: object) -> Path:
    """A project's parameters and index, with images of three sentences each."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    images, refs = [], []
    for image_id in range(SENTENCES // 3):
        file_name = f"images/{image_id}.png"
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / file_name)
        images.append({"image_id": image_id, "file_name": file_name, "height": 64, "width": 64, "sha256": ""})
        refs += [
            {"sent_id": row, "ref_id": row, "ann_id": -1, "image_id": image_id, "sentence": f"thing {row}"}
            for row in range(3 * image_id, 3 * image_id + 3)
        ]
    for rows, path, schema in (
        (images, records.INDEX.images, records.IMAGES),
        (refs, records.INDEX.refs, records.REFS),
        ([], records.INDEX.objects, records.OBJECTS),
        ([{"sent_id": ref["sent_id"], "role": "unlabeled"} for ref in refs], records.SPLIT_PATH, records.SPLIT),
        ([], records.LABELED_MASKS_PATH, records.MASKS),
    ):
        records.write_table(records.make_table(rows, schema), folder / path, schema)
    engine = {"server_url": url, "chunk_size": CHUNK, "concurrency": 2} | engine
    changes = {"priors": {"backend": "openai", "model": "qwen3-vl", "engine": engine}}
    params = merged(yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")), changes)
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    return folder


def start(folder: Path, stage: str) -> subprocess.Popen[str]:
    """Start a stage in a new process session, with its output in a pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", f"stages.{stage}"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1",
        },
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(folder: Path) -> dict[str, bytes]:
    """Run both stages to their end -> the bytes that they wrote."""
    for stage in ("query", "priors"):
        process = start(folder, stage)
        output, _ = process.communicate(timeout=PATIENCE_S)
        if process.returncode:
            raise RuntimeError(output)
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def kill_after(folder: Path, stub: Stub, requests: int, more_s: float) -> None:
    """Run `query`, and kill it a moment after the server has got so many more requests."""
    before, process, deadline = len(stub.bodies), start(folder, "query"), time.monotonic() + PATIENCE_S
    try:
        while len(stub.bodies) < before + requests:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"ended before it was killed: {process.communicate(timeout=1)[0]}")
            time.sleep(0.002)
        time.sleep(more_s)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def main() -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    draw = random.Random(0)
    identical = repeated = most_repeated = 0
    with serve(Stub(respond=trouble, delay_s=0.02)) as stub:
        whole = finish(make_folder(WORK / "whole", stub.url))
        for number in range(KILLS):
            folder, before = make_folder(WORK / str(number), stub.url), len(stub.bodies)
            # Up to a chunk before the end, so that the kill comes while it queries; 0: while it starts.
            kill_after(folder, stub, draw.randint(0, SENTENCES - CHUNK - 1), draw.uniform(0, 0.05))
            identical += finish(folder) == whole
            more = len(stub.bodies) - before - SENTENCES - DRAWN_AGAIN
            repeated, most_repeated = repeated + more, max(most_repeated, more)
            print(f"{number + 1} kills: {identical} identical, at most {most_repeated} requests repeated", flush=True)
    row = {
        "kills": KILLS,
        "identical": identical,
        "requests": SENTENCES,
        "chunk_size": CHUNK,
        "repeated": repeated,
        "most_repeated": most_repeated,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True, capture_output=True, check=True
        ).stdout.strip(),
    }
    RESULTS.write_text(json.dumps(row) + "\n", encoding="utf-8")
    shutil.rmtree(WORK)


if __name__ == "__main__":
    main()
