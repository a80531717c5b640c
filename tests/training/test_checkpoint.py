import pytest
import torch

from l2l_core.training.checkpoint import load_checkpoint, save_checkpoint


class Killed(Exception):
    """Stands for anything that ends a stage early."""


def test_loads_a_saved_checkpoint_and_returns_none_without_one(tmp_path):
    path = tmp_path / "checkpoint.pt"
    assert load_checkpoint(path) is None
    state = {"step": 3, "student": {"w": torch.tensor([1.5, -2.0])}, "curve": [{"step": 1, "loss": 0.25}]}
    save_checkpoint(path, state)
    loaded = load_checkpoint(path)
    assert loaded is not None
    assert torch.equal(loaded["student"].pop("w"), state["student"].pop("w"))
    assert loaded == state
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_failed_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def half(state: object, file: object) -> None:
        with open(file, "wb") as out:  # type: ignore[call-overload]
            out.write(b"half")
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", half)
        with pytest.raises(Killed):
            save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 1}
    save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 2}
