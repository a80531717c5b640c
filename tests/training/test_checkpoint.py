import errno
import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch

from l2l_core.training.checkpoint import digests_path, load_checkpoint, save_checkpoint


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
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "checkpoint.pt.sha256"]


def test_a_failed_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def half(state: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", half)
        with pytest.raises(Killed):
            save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 1}
    save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 2}


def test_the_digest_is_that_of_sha256sum(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    assert digests_path(path).read_text().split() == [hashlib.sha256(path.read_bytes()).hexdigest()]


def flipped(content: bytes) -> bytes:
    """One bit of the weights is another one; PyTorch alone loads this."""
    place = content.index(np.float32(1.5).tobytes())
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "spoil", [flipped, lambda content: content[: len(content) // 2], lambda _: b"", lambda _: b"x"]
)
def test_a_torn_checkpoint_is_moved_aside_and_training_starts_anew(tmp_path, capsys, spoil):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"w": torch.full((100,), 1.5)})
    torn = spoil(path.read_bytes())
    path.write_bytes(torn)
    assert load_checkpoint(path) is None
    assert capsys.readouterr().err == f"note: {path}: torn or changed, moved to checkpoint.pt.torn; training anew\n"
    assert (tmp_path / "checkpoint.pt.torn").read_bytes() == torn
    assert load_checkpoint(path) is None
    save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 2}


def test_a_checkpoint_without_a_digest_is_not_trusted(tmp_path):
    """It may be of any origin; its fingerprint is only the name of its folder."""
    torch.save({"step": 1}, tmp_path / "checkpoint.pt")
    assert load_checkpoint(tmp_path / "checkpoint.pt") is None


def test_spoiled_digests_are_replaced(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    digests_path(path).write_bytes(b"\xff\xfe torn")
    assert load_checkpoint(path) is None
    save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 2}


@pytest.mark.parametrize("kills", [1, 2, 5])
@pytest.mark.parametrize("completed", [0, 1])
def test_kills_while_saving_leave_a_usable_checkpoint(tmp_path, monkeypatch, completed, kills):
    """Killed before the first or before the second of the two files is replaced: the old checkpoint is resumed."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    replace, left = os.replace, 0

    def killed_after(source: Path, target: Path) -> None:
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        replace(source, target)

    for kill in range(kills):
        left = completed
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", killed_after)
            with pytest.raises(Killed):
                save_checkpoint(path, {"step": 2, "kill": kill})
        assert load_checkpoint(path) == {"step": 1}
    save_checkpoint(path, {"step": 3})
    assert load_checkpoint(path) == {"step": 3}


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no device that is always full")
@pytest.mark.parametrize("numbers", [10, 1_000_000])
def test_a_full_disk_keeps_the_previous_checkpoint_and_names_it(tmp_path, numbers):
    """Linux's /dev/full refuses every write."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    (tmp_path / "checkpoint.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_checkpoint(path, {"w": torch.zeros(numbers)})
    assert caught.value.filename == str(path)
    assert load_checkpoint(path) == {"step": 1}


def test_a_disk_that_fills_up_within_a_checkpoint_is_named(tmp_path, monkeypatch):
    """PyTorch then reports a wrong position in its file, and the disk only as what it was handling."""

    def save(state, file):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 346432 vs 346328")

    monkeypatch.setattr(torch, "save", save)
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_checkpoint(path, {"step": 1})
    assert caught.value.filename == str(path)
