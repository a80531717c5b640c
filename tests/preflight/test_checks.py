"""`l2l check` prints the plan of a valid configuration and names every kind of bad input."""

import importlib.util
import json
import shutil
import socket
import subprocess
import threading
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from called import call
from tiny_detectors import save_tiny_owlv2
from tiny_sam import save_tiny_sam

from bench.params import merged
from l2l_core.config import load_params
from l2l_core.model import packaged
from l2l_core.preflight import checks
from l2l_core.preflight.estimate import Stage

ROOT = Path(__file__).parents[2]
SMALL = {
    "model": {"image_size_px": 32, "dim": 16, "heads": 2},
    "train": {"precision": "fp32", "batch_size": 4, "engine": {"device": "cpu"}},
}
REPLAY = {"backend": "replay", "replay_file": "responses.jsonl"}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with params.yaml, the example dataset and its recorded responses."""
    shutil.copytree(ROOT / "examples" / "tabletop", tmp_path / "mine")
    shutil.copy(ROOT / "examples" / "tabletop_responses.jsonl", tmp_path / "responses.jsonl")
    shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    change({**SMALL, "dataset": "mine", "split": {"labeled_fraction": 1.0}, "priors": REPLAY})
    return tmp_path


def change(sections: dict[str, Any]) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    Path("params.yaml").write_text(yaml.safe_dump(merged(params, sections)))


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def checked(monkeypatch, capsys, *words: str) -> str:
    """Output of a check that finds no problems."""
    before = contents()
    assert call(monkeypatch, "check", *words) == 0
    assert contents() == before
    return capsys.readouterr().out


def problems(monkeypatch, capsys, *words: str) -> list[str]:
    """Problems that a check reports, one per line."""
    before = contents()
    assert call(monkeypatch, "check", "--no-timing", *words) == 2
    assert contents() == before
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    if rest:
        assert first == f"error: {len(rest)} problems:"
    return [line.strip() for line in rest] or [first.removeprefix("error: ")]


# --- output for a valid configuration


def test_prints_the_plan_with_time_estimates(project, monkeypatch, capsys):
    """Warm-up trains two networks, so half the steps take as long. Stages of known cost have a time."""
    change({"round": 1, "warmup": {"steps": 10_000_000}, "retrain": {"steps": 20_000_000}})
    said = checked(monkeypatch, capsys)
    assert "mine: 12 images, 27 sentences (train 20, val 7), 16 masks" in said
    assert "160x120 px; the network sees 32x32" in said
    assert "labeled: 4 images, 9 sentences; unlabeled: 5 images, 11 sentences; eval: 3 images, 7 sentences" in said
    assert "responses.jsonl has responses for 26 of 27 sentences" in said
    assert "image_encoder: tiny, text_encoder: tiny" in said
    assert "cpu (" in said
    rows = dict(line.split(maxsplit=1) for line in said.splitlines()[said.splitlines().index("") + 2 :])
    hours = {name: float(rows[name].split()[0]) for name in ("warmup", "retrain@1") if rows[name].split()[1] == "h"}
    assert hours["retrain@1"] == pytest.approx(hours["warmup"], abs=0.2)
    assert all(rows[name].split()[1] in ("s", "min", "h") for name in ("crossfit-0", "select@1", "predict@1", "ingest"))
    assert rows["report"].split()[0] == "-"
    assert "select@2" not in rows
    assert " free here" in rows["disk"]
    # PyTorch alone takes more than 100 MB; a process without it takes less than one with it.
    size = {name: memory_of(rows[name]) for name in ("ingest", "warmup", "crossfit-0", "select@1", "predict")}
    assert 20e6 < size["ingest"] < size["warmup"]
    assert min(size["warmup"], size["select@1"], size["predict"]) > 100e6
    assert size["warmup"] < 2e9
    assert " are available here" in rows["memory"]
    assert "warning" not in rows


def test_counts_sentences_by_the_kind_of_their_recorded_priors(project, monkeypatch, capsys):
    """Sentence 0 has a mask beside its box, and 1 a mask as its second response only."""
    lines = [json.loads(line) for line in Path("responses.jsonl").read_text().splitlines()]
    mask = {"polygon": [10, 10, 50, 10, 50, 50]}
    lines[0] |= {"mask": mask}
    lines.append({"sent_id": 1, "sample_index": 1, "mask": mask})
    Path("responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = checked(monkeypatch, capsys, "--no-timing")
    assert (
        "replay: responses.jsonl has responses for 26 of 27 sentences: 1 mask, 24 box, 0 point, 2 none; "
        "1 with a sample_index from 1 on are not read (priors.samples)\n" in said
    )
    said = checked(monkeypatch, capsys, "--no-timing", "-S", "priors.samples=2")
    assert "for 26 of 27 sentences: 2 mask, 23 box, 0 point, 2 none\n" in said


def memory_of(row: str) -> float:
    """Bytes in the last column: `8 s  1.1 MB  420.0 MB`."""
    value, unit = row.split()[-2:]
    return float(value) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_warns_once_per_remedy_about_stages_that_exceed_memory(project, monkeypatch, capsys):
    monkeypatch.setattr(checks, "available_bytes", lambda: 250_000_000)
    said = checked(monkeypatch, capsys, "-S", "round=1", "-S", "select.method=topk")
    (memory,) = (line for line in said.splitlines() if line.startswith("memory "))
    assert "250.0 MB are available here" in memory
    warnings = [line.removeprefix("warning").strip() for line in said.splitlines() if line.startswith("warning")]
    training, *others = (line for line in warnings if "train.engine.micro_batch_size" in line)
    assert training.startswith("warmup, retrain@1, distill: about ")
    assert not others
    assert any(line.startswith("select@1: about ") and "evaluate.batch_size" in line for line in warnings)
    assert any(line.startswith("predict, predict@1, predict-distilled: about ") for line in warnings)


def test_compares_gpu_memory_needs_with_free_gpu_memory(capsys):
    stages = [
        Stage("warmup", None, None, 3e9, 20e9),
        Stage("select@1", None, None, 4e9, 5e9),
        Stage("report", None, None, None, None),
    ]
    checks._say_memory(stages, 10_000_000_000, 16_000_000_000, print)
    first, second, warning = capsys.readouterr().out.splitlines()
    assert first == "memory      about 4.0 GB (select@1), 10.0 GB are available here"
    assert second == "memory      about 20.0 GB (warmup), 16.0 GB are available on the GPU"
    assert warning.startswith(
        "warning     warmup: about 20.0 GB of GPU memory, 16.0 GB are available; lower train.engine"
    )


def test_prints_sizes_without_timing(project, monkeypatch, capsys):
    said = checked(monkeypatch, capsys, "--no-timing")
    row = next(line for line in said.splitlines() if line.startswith("warmup"))
    name, time, size, unit = row.split()
    assert (name, time, unit) == ("warmup", "-", "kB") or (name, time, unit) == ("warmup", "-", "MB")
    assert float(size) > 0
    assert "Estimated" not in said


def test_checks_a_sample_of_the_built_in_dataset_before_it_is_drawn(project, monkeypatch, capsys):
    change({"dataset": "data/refshapes", "split": {"labeled_fraction": 0.05}, "priors": {"backend": "simulated"}})
    change({"refshapes": {"image_size_px": 64, "train_images": 1500, "val_images": 250, "test_images": 250}})
    said = checked(monkeypatch, capsys, "--no-timing")
    assert "data/refshapes: not drawn yet" in said
    assert "2000 images, 4000 sentences; checked on 80 of its images" in said
    # floor(0.05 x 1500) images with two sentences each
    assert "labeled: 75 images, 150 sentences; unlabeled: 1425 images, 2850 sentences; eval: 500 images" in said
    assert "simulated: llava-1.5-7b" in said
    assert "\nrefshapes " in said


def test_accepts_dvc_style_parameter_overrides(project, monkeypatch, capsys):
    said = checked(monkeypatch, capsys, "--no-timing", "-S", "round=0", "-S", "train.lr=1e-5")
    assert "retrain@1" not in said
    assert load_params(overrides=["train.lr=1e-5", "select.candidates=[teacher]"]).train.lr == 1e-5
    assert load_params().round == 2


# --- refused input


def corrupt_image():
    Path("mine/images/02.jpg").write_bytes(b"no image")


def edit_pairs(old: str, new: str) -> None:
    path = Path("mine/pairs.jsonl")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


WRONG = {
    "unknown parameter": (lambda: change({"train": {"rate": 1}}), ["params.yaml: train.rate: unknown parameter"]),
    "no dataset": (lambda: change({"dataset": "nowhere"}), ["dataset: got 'nowhere', expected a folder"]),
    "image": (corrupt_image, ["mine/pairs.jsonl: line 3: image mine/images/02.jpg: corrupt"]),
    "rows": (lambda: edit_pairs('"the red cup"', '"?"'), ["line 1: sentence '?' has no words"]),
    "both sides": (lambda: edit_pairs("10.jpg", "01.jpg"), ["are in train and in an evaluation split"]),
    "budget": (
        lambda: change({"split": {"labeled_fraction": 0.2}}),
        ["split.labeled_fraction: got 0.2, which is no image out of 4"],
    ),
    "no list": (lambda: change({"split": {"list_file": "roles.json"}}), ["split.list_file roles.json: not found"]),
    "folds": (
        lambda: change({"select": {"folds": 5}}),
        ["select.folds: got 5, but only 4 images are labeled; lower it or label more"],
    ),
    "nothing evaluated": (
        lambda: change({"evaluate": {"splits": ["test"]}}),
        ["evaluate.splits: got test, expected some of val: these splits have held-out sentences"],
    ),
    "no responses": (lambda: Path("responses.jsonl").unlink(), ["responses.jsonl: not found; set priors.replay_file"]),
    "bad responses": (
        lambda: Path("responses.jsonl").write_text('{"sent_id": 0, "raw_text": 3}\n'),
        ["responses.jsonl: line 1: raw_text: got 3, expected a string"],
    ),
    "no boxes": (
        lambda: change({"priors": {"backend": "simulated"}}),
        ["refs: 11 of 27 sentences have no true box"],
    ),
    "no such folder": (
        lambda: change({"model": {"image_encoder": "./weights/swin"}}),
        ["params.yaml: model.image_encoder: got './weights/swin', which is no folder here and cannot be a hub id"],
    ),
    "no encoder": (
        lambda: change({"model": {"text_encoder": "mine"}}),
        ["params.yaml: model.text_encoder: got 'mine', expected a folder from which transformers loads"],
    ),
    "family": (
        lambda: change({"priors": {"backend": "openai", "model": "nobody-1"}}),
        ["priors.coord_space: got 'auto', but the family of model 'nobody-1' is unknown"],
    ),
    "no vLLM": (
        lambda: change({"priors": {"backend": "vllm", "model": "Qwen/Qwen3-VL-8B"}}),
        ["params.yaml: priors.backend: got 'vllm', which needs vllm: set priors.engine.python to the Python of"],
    ),
    "no detector": (
        lambda: spoiled_detector("config.json", '{"model_type": "llava"}'),
        ["params.yaml: priors.model: got 'my-owl', a model of type 'llava', expected a detector of type grounding-"],
    ),
    "no weights": (
        lambda: spoiled_detector("model.safetensors"),
        ["params.yaml: priors.model: got 'my-owl', a folder without *.safetensors or *.bin"],
    ),
    "no processor": (
        lambda: spoiled_detector("processor_config.json"),
        ["params.yaml: priors.model: got 'my-owl', expected a hub id (needs a network or a local copy) or a folder w"],
    ),
}


def spoiled_detector(name: str, content: str | None = None) -> None:
    """Name a detector of which one file is missing, or holds something else."""
    change({"priors": {"backend": "detector", "model": str(save_tiny_owlv2(Path("my-owl")))}})
    Path("my-owl", name).unlink()
    if content is not None:
        Path("my-owl", name).write_text(content)


@pytest.mark.parametrize("case", WRONG)
def test_refuses_invalid_projects(project, monkeypatch, capsys, case):
    make, words = WRONG[case]
    if case == "no vLLM":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    make()
    capsys.readouterr()  # saving a model shows progress
    (found,) = problems(monkeypatch, capsys)
    for word in words:
        assert word in found


def test_refuses_a_missing_device(project, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    change({"train": {"engine": {"device": "cuda"}}})
    (found,) = problems(monkeypatch, capsys)
    assert "train.engine.device: got 'cuda', but torch sees no CUDA device" in found


def test_refuses_rounds_without_unlabeled_sentences(project, monkeypatch, capsys):
    """Only the labeled lines remain."""
    path = Path("mine/pairs.jsonl")
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"mask"' in line))
    # Sentences are numbered by line, so the recorded responses now belong to other sentences.
    assert any(
        "the responses seem to belong to another dataset" in problem for problem in problems(monkeypatch, capsys)
    )
    change({"priors": {"backend": "none"}})
    (found,) = problems(monkeypatch, capsys)
    assert "round: got 2, but no sentence is unlabeled" in found
    assert "retrain@1" not in checked(monkeypatch, capsys, "--no-timing", "-S", "round=0")


def test_refuses_a_dataset_with_boxes_but_no_masks(project, tiny_refcoco, monkeypatch, capsys):
    for row in tiny_refcoco.instances["annotations"]:
        row["segmentation"] = []
    tiny_refcoco.save()
    change({"dataset": str(tiny_refcoco.folder), "priors": {"backend": "simulated"}})
    (found,) = problems(monkeypatch, capsys)
    assert "no annotation has a segmentation, but training needs masks" in found


def test_refuses_a_full_disk(project, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5000, 5000))
    (found,) = problems(monkeypatch, capsys)
    assert found.startswith("disk: a run needs about ")
    assert "5 kB are free here" in found


def test_reports_problems_of_all_parts_at_once(project, monkeypatch, capsys):
    corrupt_image()
    edit_pairs('"the red cup"', '"?"')
    change({"model": {"image_encoder": "./weights/swin"}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    change({"train": {"engine": {"device": "cuda"}}})
    found = problems(monkeypatch, capsys)
    for number, word in enumerate(("02.jpg", "no words", "train.engine.device", "model.image_encoder")):
        assert word in found[number]
    assert len(found) == 4


@pytest.mark.parametrize("word", ["rounds=1", "round", "round=7", "round=two"])
def test_refuses_invalid_overrides(project, monkeypatch, capsys, word):
    (found,) = problems(monkeypatch, capsys, "-S", word)
    assert word.partition("=")[0] in found
    assert str(project.parent) not in found
    assert load_params().round == 2


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("split.labeled_fracton", "split.labeled_fraction"), ("priors.engine.batch_sise", "priors.engine.batch_size")],
)
def test_suggests_the_right_name_for_a_misspelled_parameter(project, monkeypatch, capsys, wrong, right):
    (found,) = problems(monkeypatch, capsys, "-S", "++round=1", "-S", f"{wrong}=1")
    assert found == f"-S {wrong}=1: params.yaml has no {wrong}; did you mean {right}?"


# --- encoders and models outside the project


def test_advises_pretrained_encoders_for_photographs(project, monkeypatch, capsys):
    said = checked(monkeypatch, capsys, "--no-timing")
    (advice,) = (line for line in said.splitlines() if line.startswith("advice "))
    assert "model.preset=small" in advice
    change({"dataset": "data/refshapes", "split": {"labeled_fraction": 0.05}, "priors": {"backend": "none"}})
    change({"refshapes": {"image_size_px": 64, "train_images": 64, "val_images": 8, "test_images": 8}})
    assert "advice " not in checked(monkeypatch, capsys, "--no-timing")


@pytest.mark.parametrize("is_installed", [True, False])
def test_the_small_preset_needs_its_packages(project, monkeypatch, capsys, is_installed):
    if not is_installed:
        monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    elif any(importlib.util.find_spec(package) is None for _, package, _ in packaged.PACKAGED.values()):
        pytest.skip("the extra small is not installed: make small")
    change({"model": {"preset": "small"}})
    if is_installed:
        said = checked(monkeypatch, capsys, "--no-timing")
        assert "image_encoder: efficientnet-lite0, text_encoder: minilm\n" in said
        assert "advice " not in said
    else:
        (problem,) = problems(monkeypatch, capsys)
        assert problem.startswith("params.yaml: model.image_encoder: got 'efficientnet-lite0', which needs the package")
        assert problem.endswith("make small, or pip install -e '.[small]'")


def test_does_not_download_a_hub_model(project, monkeypatch, capsys):
    """Any network connection would raise."""
    monkeypatch.setattr(socket.socket, "connect", None)
    change({"model": {"image_encoder": "nobody/no-such-backbone"}})
    said = checked(monkeypatch, capsys)
    assert "nobody/no-such-backbone (hub id, not on this machine: fetched when it is first needed)" in said
    assert "not measured" in said
    assert next(line for line in said.splitlines() if line.startswith("warmup")).split() == ["warmup", "-", "-"]


def test_accepts_a_folder_or_a_hub_id_as_prior_model(project, monkeypatch, capsys):
    monkeypatch.setattr(socket.socket, "connect", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    change({"priors": {"backend": "transformers", "model": "Qwen/Qwen3-VL-8B-Instruct"}})
    said = checked(monkeypatch, capsys, "--no-timing")
    assert "transformers: Qwen/Qwen3-VL-8B-Instruct (hub id, not on this machine" in said
    Path("qwen3-vl").mkdir()
    change({"priors": {"model": "qwen3-vl"}})
    assert "transformers: qwen3-vl; cpu (" in checked(monkeypatch, capsys, "--no-timing")


def test_accepts_a_detector_and_ignores_the_settings_of_prompts(project, monkeypatch, capsys):
    model = save_tiny_owlv2(Path("my-owl"))
    monkeypatch.setattr(socket.socket, "connect", None)
    no_prompt = {"prompt": "point-1", "structured_output": True, "coord_space": "norm1000", "retries": 5}
    change({"priors": {"backend": "detector", "model": "google/owlv2-base-patch16-ensemble", **no_prompt}})
    said = checked(monkeypatch, capsys, "--no-timing")
    assert "detector: google/owlv2-base-patch16-ensemble (hub id, not on this machine" in said
    change({"priors": {"model": str(model)}})
    assert "detector: my-owl; cpu (" in checked(monkeypatch, capsys, "--no-timing")


# --- a server


@contextmanager
def server(status: int, body: bytes, keys: list[str | None]) -> Iterator[str]:
    """Serve `body` at GET /v1/models and yield the server's address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers["Authorization"])
            self.send_response(status if self.path == "/v1/models" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}/v1"
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


MODELS = json.dumps({"object": "list", "data": [{"id": "qwen2.5-vl"}, {"id": "other"}]}).encode()


def use_server(model: str, url: str) -> None:
    change({"priors": {"backend": "openai", "model": model, "engine": ENGINE | {"server_url": url}}})


ENGINE = yaml.safe_load((ROOT / "params.yaml").read_text())["priors"]["engine"]


def test_accepts_a_server_that_has_the_model(project, monkeypatch, capsys):
    keys: list[str | None] = []
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with server(200, MODELS, keys) as url:
        use_server("qwen2.5-vl", f"{url}/")
        said = checked(monkeypatch, capsys, "--no-timing")
    assert f"openai: {url}/models has qwen2.5-vl" in said
    assert "secret" not in said
    assert keys == ["Bearer secret"]


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, MODELS, "priors.model: got 'qwen3-vl', but the models at URL/models are: qwen2.5-vl, other"),
        (200, b"<html>", "URL/models: no list of models, expected an OpenAI-compatible server"),
        (200, b"[]", "URL/models: no list of models"),
        (401, b"", "URL/models: HTTP 401; check priors.engine.server_url and OPENAI_API_KEY"),
    ],
)
def test_refuses_an_unsuitable_server(project, monkeypatch, capsys, status, body, words):
    with server(status, body, []) as url:
        use_server("qwen3-vl", url)
        (found,) = problems(monkeypatch, capsys)
    assert words.replace("URL", url) in found


def test_refuses_a_server_that_does_not_respond(project, monkeypatch, capsys):
    with server(200, MODELS, []) as url:
        pass  # the port is free again
    use_server("qwen2.5-vl", url)
    (found,) = problems(monkeypatch, capsys)
    assert f"{url}/models: no response (ConnectionError); start a server" in found


def test_reports_a_project_outside_a_git_repository_first(project, monkeypatch, capsys):
    """Like an unpacked archive of the project, it has DVC's folder but not Git's."""
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    Path(".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", ".dvc/config")
    expected = f"error: {project}: DVC cannot run here: "
    assert call(monkeypatch, "check", "--no-timing") == 2
    assert capsys.readouterr().err.startswith(expected)
    Path("mine/pairs.jsonl").unlink()
    assert call(monkeypatch, "check", "--no-timing") == 2
    assert capsys.readouterr().err.splitlines()[1].strip().startswith(expected.removeprefix("error: "))


@pytest.mark.parametrize("place", [".", "deep/below"])
def test_accepts_a_project_in_a_repository_or_its_subfolder(project, monkeypatch, capsys, place):
    subprocess.run(["git", "init", "--quiet", "."], check=True)
    below = project / place
    below.mkdir(parents=True, exist_ok=True)
    for name in ("mine", "responses.jsonl", "params.yaml"):
        (project / name).rename(below / name)
    shutil.copy(ROOT / "dvc.yaml", below / "dvc.yaml")
    shutil.copytree(ROOT / ".dvc", below / ".dvc", ignore=lambda *_: ["cache", "tmp"])
    monkeypatch.chdir(below)
    assert call(monkeypatch, "check", "--no-timing") == 0


def test_warns_about_contradictory_masks(project, monkeypatch, capsys):
    with Path("mine/pairs.jsonl").open("a") as file:
        for polygon in ([1, 1, 50, 1, 50, 50], [60, 60, 99, 60, 99, 99]):
            row = {"image": "images/01.jpg", "sentence": "an odd thing", "mask": {"polygon": polygon}}
            file.write(json.dumps(row) + "\n")
    change({"priors": {"backend": "none"}})
    assert call(monkeypatch, "check", "--no-timing") == 0
    assert (
        "warning     mine/pairs.jsonl: 1 sentence(s) have two different masks in one image" in capsys.readouterr().out
    )


def test_make_demo_reports_a_missing_repository_before_installing(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path / "Makefile")
    for name in ("requirements.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    done = subprocess.run(["make", "repository"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"error: {tmp_path} is in no Git repository, which DVC needs: run git init here" in done.stdout
    dry = subprocess.run(["make", "-n", "demo"], cwd=tmp_path, capture_output=True, text=True).stdout
    assert dry.index("rev-parse") < dry.index("-m venv")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n")
    subprocess.run(["make", "repository"], cwd=tmp_path, check=True)
    subprocess.run(["git", "init", "--quiet", "."], cwd=tmp_path, check=True)
    (tmp_path / ".dvc" / "config.local").unlink()
    (tmp_path / "below").mkdir()
    subprocess.run(["make", "-f", "../Makefile", "repository"], cwd=tmp_path / "below", check=True)


# --- SAM


def use_sam(model: str) -> None:
    change({"proposals": {"renderer": "sam", "model": model}})


def test_names_the_sam_model_and_estimates_its_stages(project, monkeypatch, capsys):
    save_tiny_sam(Path("models/sam"), "sam")
    use_sam("models/sam")
    said = checked(monkeypatch, capsys)
    line, row = (line for line in said.splitlines() if line.startswith("proposals "))
    assert line.startswith("proposals   sam; SAM: models/sam, SamModel; cpu")
    assert row.split()[1] != "-"


@pytest.mark.parametrize(
    ("model", "reason"),
    [("models/empty", "config.json"), ("models/no-weights", "safetensors"), ("models/bert", "model_type is bert")],
)
def test_a_sam_model_that_cannot_be_used_is_reported(project, monkeypatch, capsys, model, reason):
    Path("models/empty").mkdir(parents=True)
    (save_tiny_sam(Path("models/no-weights"), "sam") / "model.safetensors").unlink()
    Path("models/bert").mkdir()
    Path("models/bert/config.json").write_text('{"model_type": "bert"}')
    use_sam(model)
    capsys.readouterr()  # the progress bar of saving
    (problem,) = problems(monkeypatch, capsys)
    assert problem.startswith(f"params.yaml: proposals.model: got '{model}', expected a hub id")
    assert reason in problem


def test_a_sam_model_on_the_hub_is_not_fetched(project, monkeypatch, capsys):
    """Its times are unknown; the other stages' are not."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    use_sam("facebook/sam-vit-base")
    said = checked(monkeypatch, capsys, "--no-timing")
    assert "sam; SAM: facebook/sam-vit-base (hub id, not on this machine: fetched when it is first needed)" in said


def test_sam_needs_a_model(project, monkeypatch, capsys):
    change({"proposals": {"renderer": "sam"}})
    (problem,) = problems(monkeypatch, capsys)
    assert problem.startswith(
        "params.yaml: proposals.model: got None, expected a hub id or folder of a model of the SAM"
    )
    assert problem.endswith("because renderer is sam")
