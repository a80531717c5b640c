import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from l2l_core.artifacts.rounds import model_folder, newest_round
from l2l_core.core.files import added_to
from l2l_core.errors import ArtifactError, InputError


def test_adds_files_to_an_existing_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    (out / "a.txt").write_text("old")
    with added_to(out) as folder:
        (folder / "a.txt").write_text("new")
        (folder / "b.txt").write_text("b")
        assert (out / "a.txt").read_text() == "old"
    assert {path.name: path.read_text() for path in out.iterdir()} == {"mine.txt": "mine", "a.txt": "new", "b.txt": "b"}
    assert list(tmp_path.iterdir()) == [out]


def test_leaves_no_files_after_an_error(tmp_path):
    def fail() -> None:
        with added_to(tmp_path / "deep" / "out") as folder:
            (folder / "half").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.rglob("*half*"))
    assert not (tmp_path / "deep" / "out").exists()


def test_leaves_no_files_after_sigterm(tmp_path):
    script = """if True:
        import time
        from pathlib import Path
        from l2l_core.core.files import added_to, end_on_sigterm
        end_on_sigterm()
        with added_to(Path("out")) as folder:
            (folder / "half").write_text("half")
            print("writing", flush=True)
            time.sleep(60)
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_refuses_an_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match=r"--out: .*out is a file"), added_to(tmp_path / "out"):
        pass
    with pytest.raises(InputError, match=r"--out: .*inside cannot be written: "), added_to(tmp_path / "out" / "inside"):
        pass
    assert (tmp_path / "out").read_text() == "mine"


def test_latest_round_is_the_highest_round_with_the_requested_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=r"data/rounds: no round has model; .*dvc repro"):
        newest_round("model")
    for number in ("2", "10", "9", "backup"):
        (tmp_path / "data/rounds" / number / "model").mkdir(parents=True)
    (tmp_path / "data/rounds/11/folds").mkdir(parents=True)
    assert newest_round("model") == 10


def test_ignores_later_rounds_left_by_an_earlier_run(tmp_path, monkeypatch):
    """A run of three rounds, then a run of one round on another dataset: the folders of rounds 2 and 3 remain."""
    monkeypatch.chdir(tmp_path)
    for number in (0, 1, 2, 3):
        (tmp_path / f"data/rounds/{number}/model").mkdir(parents=True)
    (tmp_path / "data/rounds/3/pseudo_labels.parquet").touch()
    (tmp_path / "data/round.txt").write_text("1\n")
    assert newest_round("model") == 1
    with pytest.raises(ArtifactError, match=r"no round up to 1 .*has pseudo_labels\.parquet; .*of a run before"):
        newest_round("pseudo_labels.parquet")


def test_finds_a_model_by_its_folder_or_its_round(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "data/rounds/3/model"
    model.mkdir(parents=True)
    (model / "config.json").touch()
    assert model_folder(None).resolve() == model_folder(model) == model_folder(model.parent) == model
    with pytest.raises(InputError, match=r"--run: got data, expected a folder with a model"):
        model_folder(model.parents[2].relative_to(tmp_path))
