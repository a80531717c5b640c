"""A short part of the campaign, and proof that it would see each kind of failure."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench import fuzz
from l2l_core.errors import InputError


def test_inputs_of_every_entrance_are_read_or_refused() -> None:
    said: list[str] = []
    rows = list(fuzz.campaign(inputs=4 * len(fuzz.ENTRANCES), seed=1, say=said.append))
    assert {row["entrance"]: row["count"] for row in rows} == dict.fromkeys(fuzz.ENTRANCES, 4)
    assert sum(row["failures"] for row in rows) == 0, said


def test_a_row_replaces_the_one_of_its_entrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "RESULTS", tmp_path / "fuzz.jsonl")
    for name, count in (("labelme", 1), ("coco", 2), ("labelme", 3)):
        fuzz.store({"entrance": name, "count": count})
    rows = [json.loads(line) for line in fuzz.RESULTS.read_text().splitlines()]
    assert rows == [{"entrance": "coco", "count": 2}, {"entrance": "labelme", "count": 3}]


def refuse() -> None:
    raise InputError("pairs.jsonl: not JSON")


def leave_half(code: int) -> Callable[[], None]:
    def fail() -> None:
        Path("out").mkdir()
        sys.exit(code)

    return fail


FAILURES: dict[str, tuple[Callable[[], object], str]] = {
    "nothing": (lambda: None, ""),
    "a one-line error": (refuse, ""),
    "an output": (leave_half(0), ""),
    "an exception": (lambda: 1 // 0, "traceback"),
    "another exit code": (lambda: sys.exit(3), "traceback"),
    "a signal": (lambda: os.kill(os.getpid(), signal.SIGKILL), "crash"),
    "waiting for ever": (lambda: time.sleep(60), "hang"),
    "an endless loop": (lambda: [_ for _ in iter(int, 1) if _], "hang"),
    "much memory": (lambda: np.ones(2 * fuzz.MEMORY_BYTES, np.uint8), "memory"),
    "too much memory": (lambda: np.ones(fuzz.LIMIT_BYTES, np.uint8), "memory"),
    "an output of a failed command": (lambda: (print("error"), leave_half(2)()), "partial"),
    "a temporary file": (lambda: Path(".x.tmp").touch(), "partial"),
    "executed code": (lambda: Path(fuzz.EXECUTED).touch(), "executed"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_recognizes(tmp_path: Path, name: str) -> None:
    act, kind = FAILURES[name]
    (tmp_path / "work").mkdir()
    limits = {"hang_s": 1, "wait_s": 3} if kind == "hang" else {}
    outcome = fuzz.run_one(lambda _: (act(), None)[1], random.Random(0), tmp_path / "work", **limits)
    assert outcome.kind == kind, outcome.output


def test_valid_inputs_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the campaign would only see the first check of each reader."""
    monkeypatch.setattr(fuzz, "spoiled", lambda document, rng: document)
    monkeypatch.setattr(fuzz, "spoiled_bytes", lambda content, rng: content)
    for name in (
        "pairs",
        "refcoco",
        "coco",
        "coco_generated",
        "label_studio",
        "labelme",
        "split_list",
        "mask",
        "image",
        "replay",
        "table",
    ):
        (work := tmp_path / name / "work").mkdir(parents=True)
        outcome = fuzz.run_one(fuzz.ENTRANCES[name], random.Random(1), work)
        assert outcome.kind == "", (name, outcome.output)
        assert "error" not in outcome.output, (name, outcome.output)


def test_the_same_seed_gives_the_same_input() -> None:
    first, second = (fuzz.written(fuzz.PAIRS, fuzz.input_of("pairs", 0, 7)) for _ in range(2))
    assert first == second
    others = {fuzz.written(fuzz.PAIRS, fuzz.input_of("pairs", 0, number)) for number in range(40)}
    assert len(others) > 30
    assert json.dumps(fuzz.PAIRS).encode() not in others
