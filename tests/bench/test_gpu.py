"""The GPU benchmark at CPU sizes: every measurement writes its row and passes its checks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu

ROOT = Path(__file__).parents[2]


def test_skips_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    gpu.main()
    assert capsys.readouterr().out == "bench.gpu: skipped, PyTorch sees no CUDA device\n"


def test_compares_curves_by_the_mean_of_their_last_third() -> None:
    assert gpu.relative_difference([9, 9, 9, 9, 2, 4], [1, 1, 1, 1, 3, 3.3]) == pytest.approx(0.05)
    assert gpu.relative_difference([2.0], [2.0]) == 0


@pytest.mark.pipeline
def test_every_measurement_of_a_network_writes_a_row_and_passes(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bench.gpu",
        "--smoke",
        str(tmp_path),
        "--parts",
        "networks",
        "--networks",
        "swin-b",
    ]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [row["measure"] for row in rows] == ["stages", "training", "precision", "resume"]
    assert {row["network"] for row in rows} == {"swin-b"}
    stages, training, precision, resume = rows
    assert (stages["labeled"], stages["evaluated"]) == (12, 12)
    assert list(stages["seconds"]) == [*gpu.DATA_STAGES, *gpu.NETWORK_STAGES]
    assert training["images_per_s"] > 0
    assert precision["difference"] <= gpu.TOLERANCE
    assert resume["same_bytes"]
    assert all(row["met"] for row in rows[1:])
    assert all(row["torch"] == torch.__version__ for row in rows)
