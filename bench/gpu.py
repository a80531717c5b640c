"""The GPU path, checked and timed on one GPU in at most ten minutes.

    python -m bench.gpu [--parts networks pipeline] [--networks tiny swin-b]

`networks`: the tiny network and one of the size of Swin-B and BERT-base, with random weights (nothing is downloaded),
at 480 px. Each runs the stages from the warm-up to the evaluation on synthetic scenes, of which 2,000 sentences are
labeled by `select` and 2,000 evaluated; trains some hundred steps in bf16; trains a shorter run in bf16 and in fp32;
and is killed by SIGKILL in the middle of that run and resumed. `pipeline`: `dvc repro` of params.yaml as it is, in a
clone of HEAD. Without a CUDA device the script says so in one line and exits with 0.

Adds one JSON object a measurement to bench/results/gpu.jsonl, with what the machine offers:

    measure            stages | training | precision | resume | pipeline
    seconds            of each stage, its imports not counted, or of the whole pipeline
    labeled, evaluated sentences of `select` and of `predict`, which runs the network three times
    images_per_s       of training, images in memory, after the first tenth of the steps
    peak_gpu_mib       largest memory of PyTorch's tensors on the GPU
    difference         relative, of the mean loss over the last third of the steps; at most TOLERANCE
    same_bytes         whether the resumed run ends in the undisturbed run's weights. Always on a CPU; on a GPU sums are
                       not taken in a fixed order, and only `difference` is checked

Exit code 1 where a check is not met.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoBackbone, BertConfig, BertModel, BertTokenizerFast, SwinConfig

from bench import default_run
from bench.capabilities import capabilities
from bench.params import merged
from l2l_core.config import load_params
from l2l_core.training.loop import train
from l2l_core.training.runs import labeled_stream, new_network

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "bench" / "work" / "gpu"
RESULTS = ROOT / "bench" / "results" / "gpu.jsonl"
TOLERANCE = 0.05
"""bf16 has 8 bits of precision (0.4 %); along some tens of steps the losses of two precisions drift apart."""
PATIENCE_S = 300

NETWORKS = ("tiny", "swin-b")
DATA_STAGES = ("refshapes", "ingest", "split", "query", "priors", "proposals")
NETWORK_STAGES = (
    "warmup",
    "predict --round 0",
    "crossfit --round 0",
    "select --round 1",
    "distill --round 0",
    "predict --round 0 --distilled",
    "evaluate --round 0",
)
"""Commands of stages in the order in which they run."""
WORDS = [
    "the",
    "left",
    "right",
    "top",
    "bottom",
    "big",
    "small",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "of",
    "to",
]

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is run. The full size is for one GPU; the smoke size shows on a CPU that the script works."""

    device: str
    precision: str  # compared with fp32
    train_images: int
    eval_images: int  # of val, and again of test; two sentences each, as in training
    labeled_fraction: float
    image_size_px: int
    batch_size: int
    steps: int  # of the timed training
    short_steps: int  # of those that are compared
    stage_steps: int  # of every training in a stage
    swin: dict[str, Any]
    bert: dict[str, Any]


FULL = Sizes(
    device="cuda",
    precision="bf16",
    train_images=1100,
    eval_images=500,
    labeled_fraction=1 / 11,
    image_size_px=480,
    batch_size=16,
    steps=200,
    short_steps=30,
    stage_steps=20,
    swin={"image_size": 384, "window_size": 12, "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
    bert={},  # transformers' defaults are BERT-base
)
SMOKE = Sizes(
    device="cpu",
    precision="fp32",  # bf16 takes minutes on a CPU that emulates it
    train_images=12,
    eval_images=3,
    labeled_fraction=0.5,
    image_size_px=64,
    batch_size=4,
    steps=10,
    short_steps=6,
    stage_steps=2,
    swin={"image_size": 64, "window_size": 4, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    bert={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
)


def save_encoders(folder: Path, sizes: Sizes) -> dict[str, str]:
    """A Swin and a BERT of random weights on disk, as `model.image_encoder` and `model.text_encoder` name them."""
    torch.manual_seed(0)
    image, text = folder / "swin", folder / "bert"
    config = SwinConfig(**sizes.swin, out_features=["stage1", "stage2", "stage3", "stage4"])
    AutoBackbone.from_config(config).save_pretrained(image)
    text.mkdir(parents=True)
    (text / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    BertTokenizerFast(vocab_file=str(text / "vocab.txt")).save_pretrained(text)
    BertModel(BertConfig(**sizes.bert)).save_pretrained(text)
    return {"image_encoder": str(image), "text_encoder": str(text)}


def parameters(sizes: Sizes, encoders: dict[str, str]) -> dict[str, Any]:
    """params.yaml for one of the networks."""
    pretrained = bool(encoders)
    changes: dict[str, Any] = {
        "round": 0,
        "refshapes": {
            "train_images": sizes.train_images,
            "val_images": sizes.eval_images,
            "test_images": sizes.eval_images,
        },
        "split": {"labeled_fraction": sizes.labeled_fraction},
        "priors": {"backend": "simulated"},
        "model": {"image_size_px": sizes.image_size_px, **encoders, **({"dim": 256, "heads": 8} if pretrained else {})},
        "train": {
            "batch_size": sizes.batch_size,
            "precision": sizes.precision,
            "engine": {"device": sizes.device, "checkpoint_every": max(2, sizes.short_steps // 3)},
            **({"lr": 5e-5, "encoder_lr_scale": 1.0} if pretrained else {}),
        },
        "warmup": {"steps": sizes.stage_steps},
        "distill": {"steps": sizes.stage_steps},
        # GrabCut, which fits the other candidates to the image, runs on the CPU and would take most of the ten minutes.
        "select": {"fold_steps": sizes.stage_steps, "policy_steps": sizes.stage_steps, "candidates": ["teacher"]},
        "evaluate": {"batch_size": sizes.batch_size},
    }
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    return merged(params, changes)


# --- what runs in a separate process, in the project's folder


def run_stages(stages: Sequence[str]) -> Row:
    """Run stages one after the other in this process: seconds and peak memory of each."""
    seconds, peaks = {}, {}
    for stage in stages:
        sys.argv = stage.split()
        module = import_module(f"stages.{sys.argv[0]}")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        module.main()
        seconds[stage] = round(time.monotonic() - started, 2)
        peaks[stage] = _peak_mib()
    return {"seconds": seconds, "peak_gpu_mib": peaks}


def run_training(precision: str, steps: int, out: str) -> Row:
    """Train the project's network on its labeled pairs and save it into `out`, resuming from a checkpoint there."""
    params = load_params()
    settings = params.train.model_copy(update={"precision": precision, "log_every": max(1, steps // 10)})
    stamps: list[tuple[int, float]] = []
    curve: list[float] = []

    def log(row: dict[str, float]) -> None:
        stamps.append((int(row["step"]), time.monotonic()))
        curve.append(row["loss"])

    Path(out).mkdir(parents=True, exist_ok=True)
    network, streams = new_network(params, "gpu"), [labeled_stream(params, 1.0)]
    trained = train(
        network,
        streams,
        steps,
        settings,
        seed=params.seed,
        run_name="gpu",
        checkpoint=Path(out) / "checkpoint.pt",
        log=log,
    )
    trained.teacher.save(Path(out) / "model")
    (first, started), (last, ended) = stamps[0], stamps[-1]
    return {
        "images_per_s": round(params.train.batch_size * (last - first) / max(ended - started, 1e-9), 1),
        "peak_gpu_mib": _peak_mib(),
        "parameters_million": round(sum(value.numel() for value in network.parameters()) / 1e6, 1),
        "loss": curve,
    }


def _peak_mib() -> int | None:
    return round(torch.cuda.max_memory_allocated() / 2**20) if torch.cuda.is_available() else None


CHILDREN: dict[str, Callable[..., Row]] = {"stages": run_stages, "training": run_training}


# --- the measurements


class Project:
    """A folder with params.yaml, in which stages run with this repository's code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "vlm").symlink_to(ROOT / "vlm")

    def start(self, what: str, *arguments: object) -> subprocess.Popen[bytes]:
        """Run one of CHILDREN in a separate process, which writes what it returns into result.json."""
        (self.folder / "result.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "bench.gpu", "--child", json.dumps([what, *arguments])]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(command, cwd=self.folder, env=environment)

    def run(self, what: str, *arguments: object) -> Row:
        """The same, to its end."""
        code = self.start(what, *arguments).wait()
        if code:
            raise SystemExit(f"{what} {arguments} in {self.folder} ended with {code}")
        return json.loads((self.folder / "result.json").read_text(encoding="utf-8"))

    def run_killed(self, what: str, *arguments: object, checkpoint: Path) -> None:
        """The same, ended by SIGKILL as soon as there is a checkpoint."""
        process = self.start(what, *arguments)
        deadline = time.monotonic() + PATIENCE_S
        while not checkpoint.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise SystemExit(f"{what} {arguments} in {self.folder} came to no checkpoint")
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()


def measure_network(
    project: Project, name: str, sizes: Sizes, encoders: dict[str, str], store: Callable[[Row], None]
) -> None:
    """All rows of one network."""
    text = yaml.safe_dump(parameters(sizes, encoders), sort_keys=False)
    (project.folder / "params.yaml").write_text(text, encoding="utf-8")
    common = {"network": name, "image_size_px": sizes.image_size_px, "batch_size": sizes.batch_size}

    data_stages = () if (project.folder / "data").exists() else DATA_STAGES
    labeled = 2 * round(sizes.train_images * sizes.labeled_fraction)
    counts = {"labeled": 2 * sizes.train_images - labeled, "evaluated": 4 * sizes.eval_images}
    store({**common, "measure": "stages", **counts, **project.run("stages", [*data_stages, *NETWORK_STAGES])})

    def training(precision: str, steps: int, out: str) -> Row:
        return project.run("training", precision, steps, f"{name}/{out}")

    long = training(sizes.precision, sizes.steps, "long")
    finite = bool(np.isfinite(long["loss"]).all())
    store({**common, "measure": "training", "precision": sizes.precision, "steps": sizes.steps, **long, "met": finite})

    single, half = training("fp32", sizes.short_steps, "fp32"), training(sizes.precision, sizes.short_steps, "half")
    difference = relative_difference(single["loss"], half["loss"])
    compared = {"steps": sizes.short_steps, "fp32_images_per_s": single["images_per_s"], "difference": difference}
    store({**common, "measure": "precision", **compared, "met": difference <= TOLERANCE})

    again = f"{name}/killed"
    checkpoint = project.folder / again / "checkpoint.pt"
    project.run_killed("training", sizes.precision, sizes.short_steps, again, checkpoint=checkpoint)
    resumed = project.run("training", sizes.precision, sizes.short_steps, again)
    weights = [project.folder / name / out / "model" / "model.safetensors" for out in ("half", "killed")]
    same = weights[0].read_bytes() == weights[1].read_bytes()
    difference = relative_difference(half["loss"], resumed["loss"])
    met = same or (sizes.device != "cpu" and difference <= TOLERANCE)
    compared = {"steps": sizes.short_steps, "same_bytes": same, "difference": difference}
    store({**common, "measure": "resume", **compared, "met": met})


def relative_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Of the means of two curves over their last third."""
    a, b = (float(np.mean(curve[-max(1, len(curve) // 3) :])) for curve in (one, other))
    return round(abs(a - b) / max(abs(a), 1e-9), 5)


def measure_pipeline(store: Callable[[Row], None]) -> None:
    """`dvc repro` of params.yaml as it is."""
    default_run.prepare("HEAD", [])
    run = default_run.repro(default_run.CLONE)
    metrics = json.loads((default_run.CLONE / "metrics" / "evaluate.json").read_text(encoding="utf-8"))
    stages = {"stage_seconds": run.stage_seconds, "cpu_seconds": round(run.cpu_seconds, 1)}
    store({"measure": "pipeline", "seconds": round(run.seconds, 1), **default_run.read_scores(metrics), **stages})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("networks", "pipeline"), default=["networks", "pipeline"])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--smoke", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)  # tiny sizes, on a CPU
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, *values = arguments.child
        Path("result.json").write_text(json.dumps(CHILDREN[what](*values)), encoding="utf-8")
        return
    if not (arguments.smoke or torch.cuda.is_available()):
        print("bench.gpu: skipped, PyTorch sees no CUDA device")
        return
    sizes, work, results = FULL, WORK, RESULTS
    if arguments.smoke:
        sizes, work, results = SMOKE, arguments.smoke / "work", arguments.smoke / "gpu.jsonl"
    shutil.rmtree(work, ignore_errors=True)
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    common = {"bench": "gpu", "commit": commit, **capabilities()}
    failed: list[str] = []

    def store(row: Row) -> None:
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(common | row) + "\n")
        print(json.dumps(row), flush=True)
        if not row.get("met", True):
            failed.append(f"{row['measure']} of {row['network']}")

    if "networks" in arguments.parts:
        project = Project(work / "project")
        for name in arguments.networks:
            encoders = {} if name == "tiny" else save_encoders(work / "encoders", sizes)
            measure_network(project, name, sizes, encoders, store)
    if "pipeline" in arguments.parts:
        measure_pipeline(store)
    if failed:
        raise SystemExit(f"not met: {', '.join(failed)}")


if __name__ == "__main__":
    main()
