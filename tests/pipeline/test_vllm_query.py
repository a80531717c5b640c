"""The stage `query` with real vLLM in .venv-vllm, from a pipeline in .venv: with DVC, a kill, and two engines."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bench.tiny_project import ROOT, TINY, Project, environment, make_project
from bench.tiny_qwen import save_tiny_qwen

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

OWN, VLLM = (ROOT / name / "bin" / "python" for name in (".venv", ".venv-vllm"))
RESPONSES = "data/priors/responses.parquet"
CHUNKS = ".scratch/query-*/*.parquet"
QUERY = ("python", "-m", "stages.query")
CHUNK, SENTENCES = 4, 20
PATIENCE_S = 1200.0
IMAGES = {"image_size_px": 64, "train_images": 6, "val_images": 2, "test_images": 2, "sentences_per_image": 2}


def start(project: Project, *command: str, **more: str) -> subprocess.Popen[str]:
    """Start a command in the pipeline's environment and a new process session, with its output in a pipe."""
    env = environment() | {"PATH": f"{OWN.parent}{os.pathsep}{os.environ['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=project.folder, env=env | more, text=True, stdout=pipe, stderr=pipe, start_new_session=True
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """Return stdout and stderr. A process that does not end is killed with all its children."""
    try:
        output, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, output[-3000:] + errors[-3000:]
    return output, errors


@pytest.fixture(scope="module")
def queried(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project after `dvc repro query`."""
    folder = tmp_path_factory.mktemp("vllm")
    model = save_tiny_qwen(folder / "tiny-Qwen2.5-VL")
    priors = {"backend": "vllm", "model": str(model), "precision": "fp32", "retries": 1, "max_tokens": 300}
    engine = {"python": str(VLLM), "chunk_size": CHUNK}
    changes = TINY | {"refshapes": IMAGES, "priors": {**priors, "engine": engine}}
    project = make_project(folder / "project", changes)
    finish(start(project, "dvc", "repro", "query", VLLM_ENABLE_V1_MULTIPROCESSING="0"))
    return project


@pytest.fixture
def again(queried: Project, tmp_path: Path) -> Project:
    """The same project without responses."""
    project = queried.copy(tmp_path / "project")
    (project.folder / RESPONSES).unlink()
    return project


def test_pipeline_queries_vllm_in_the_configured_environment(queried: Project) -> None:
    """The pipeline's environment has no vLLM."""
    assert subprocess.run([OWN, "-c", "import vllm"], capture_output=True, check=False).returncode == 1
    table = pq.read_table(queried.folder / RESPONSES).to_pydict()
    assert (set(table["backend"]), len(table["sent_id"]), set(table["failure"])) == ({"vllm"}, SENTENCES, {None})
    assert len(set(table["raw_text"])) > SENTENCES / 2
    assert "up to date" in finish(start(queried, "dvc", "status", "query"))[0]


def test_resumes_after_a_kill_and_writes_the_same_bytes(queried: Project, again: Project) -> None:
    """By default, vLLM's engine runs in a separate process, which must not outlive the stage."""
    process, deadline = start(again, *QUERY), time.monotonic() + PATIENCE_S
    while not list(again.folder.glob(CHUNKS)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()  # only the stage
    process.communicate(timeout=PATIENCE_S)  # the engine holds the pipe open: this returns when it ends
    stored = len(list(again.folder.glob(CHUNKS)))
    assert 0 < stored < SENTENCES / CHUNK
    assert not (again.folder / RESPONSES).exists()
    said, _ = finish(start(again, *QUERY, VLLM_ENABLE_V1_MULTIPROCESSING="0"))
    assert f"{SENTENCES} responses, {stored * CHUNK} of them stored before" in said
    assert again.read(RESPONSES) == queried.read(RESPONSES)
    assert not list(again.folder.glob(".scratch/*"))


def test_two_engines_write_the_same_bytes(queried: Project, again: Project) -> None:
    again.change_params({"priors": {"engine": {"data_parallel": 2}}})
    finish(start(again, *QUERY, VLLM_ENABLE_V1_MULTIPROCESSING="0"))
    assert again.read(RESPONSES) == queried.read(RESPONSES)


def test_names_an_environment_without_vllm(again: Project) -> None:
    again.change_params({"priors": {"engine": {"python": None}}})
    (line,) = finish(start(again, *QUERY), code=2)[1].splitlines()
    assert "priors.backend: got 'vllm', but vLLM is not installed in" in line
    assert "priors.engine.python" in line
