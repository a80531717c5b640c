"""The wheel: it holds what the package needs, and predicts far from the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

import l2l_core
from l2l_core.config import load_params
from l2l_core.model.segmenter import Segmenter

ROOT = Path(__file__).parents[1]
OF_THE_PACKAGE = ("pyproject.toml", "README.md", "LICENSE", "l2l_core", "stages")
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the tracked files alone, as in a clean checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    try:
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a Git checkout")
    for name in names.decode().split("\0"):
        if (ROOT / name).is_file() and name.split("/")[0] in OF_THE_PACKAGE:
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    (built,) = folder.glob("l2l-*.whl")
    return built


def pip(*words: object) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    listed = subprocess.check_output(["git", "ls-files", "l2l_core"], cwd=ROOT, text=True)
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {name for name in listed.split() if (ROOT / name).is_file()}
    assert "l2l_core/py.typed" in held


def test_the_version_is_written_once(wheel: Path) -> None:
    assert wheel.name.split("-")[1] == l2l_core.__version__


def test_an_installed_wheel_predicts_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip("install", "--no-deps", "--target", site, wheel)
    params = load_params(ROOT / "params.yaml")
    Segmenter.create(params.model, ["the red circle"], 0).save(
        elsewhere / "model", params.proposals.model_copy(update={"ring": 0.1, "core": 0.2})
    )
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(elsewhere / "photo.png")
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*command: object) -> str:
        done = subprocess.run(
            list(map(str, command)), cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = """
import l2l_core
mask = l2l_core.Predictor.from_pretrained("model", device="cpu")("photo.png", "the red circle").mask
print(l2l_core.__file__, mask.shape, mask.dtype)
"""
    assert run(sys.executable, "-c", code).split(maxsplit=1) == [str(site / "l2l_core/__init__.py"), "(30, 40) bool\n"]
    script = run(sys.executable, site / "bin" / "l2l", "predict", "photo.png", "the red circle", "--run", "model")
    assert "1 pair by model" in script
    assert (elsewhere / "predictions" / "predictions.jsonl").is_file()


def test_the_pinned_set_lies_within_the_ranges() -> None:
    pins = {name.lower(): pinned for name, pinned in PINS.items()}
    needed = [Requirement(text) for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]]
    for requirement in needed:
        assert pins[requirement.name.lower()] in requirement.specifier, requirement
    assert {requirement.name.lower() for requirement in needed} == set(pins)


def test_every_pinned_package_is_the_one_installed() -> None:
    """What the tests prove, they prove of the pinned set."""
    assert {name: version(name).partition("+")[0] for name in PINS} == PINS
