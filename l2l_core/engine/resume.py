"""Checkpoints outside a stage's outputs, so that a killed stage goes on where it was.

DVC deletes the outputs of a stage before it runs, hence the scratch folder: .scratch/<stage>-<hash of what goes in>.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from l2l_core.errors import ArtifactError
from l2l_core.progress import is_first_process

CODE_ROOT = Path(__file__).resolve().parents[2]


def fingerprint(stage: str, settings: str, inputs: Iterable[Path]) -> str:
    """Hex digest of the settings, of the bytes of all input files and of the library's code.

    A checkpoint is only ever resumed by a run that would have written the same one.
    """
    digest = hashlib.sha256(f"{stage}\n{settings}\n".encode())
    files = [file for path in inputs for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    code = [*CODE_ROOT.glob("l2l_core/**/*.py"), *CODE_ROOT.glob("stages/*.py")]
    for name, file in sorted((str(file), file) for file in files) + sorted(
        (str(file.relative_to(CODE_ROOT)), file) for file in code
    ):
        digest.update(f"{name}\n{file_sha256(file)}\n".encode())
    return digest.hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Hex digest of a file, which is read in blocks: it may be larger than the memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def scratch_folder(stage: str, key: str) -> Iterator[Path]:
    """A locked folder that survives a kill and is removed when the block ends well.

    Processes that were launched beside the first one read there what it wrote. Raises ArtifactError where another run
    works on the same stage with the same inputs.
    """
    root = Path(os.environ.get("DVC_ROOT", ".")) / ".scratch"
    if not is_first_process():
        yield root / f"{stage}-{key}"
        return
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{stage}-{key}"
    with (root / f"{stage}-{key}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(f"{folder}: another process is running this stage; wait for it or end it") from None
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder)
        (root / f"{stage}-{key}.lock").unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write atomically: after a kill there is the old checkpoint or the whole new one."""
    import torch  # not at the top: `ask`, which has its own checkpoints, may need no torch

    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint, or None where there is none yet."""
    import torch

    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` when the block ends well, and leaves nothing when it does not.

    Of several processes that were launched together, only the first may call it.
    """
    building = target.with_name(f".{target.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        shutil.rmtree(target, ignore_errors=True)
        os.replace(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def copy_whole(source: Path | None, target: Path) -> None:
    """Copy a folder by `whole_folder`, once where several processes were launched together; None: an empty one."""
    if is_first_process():
        with whole_folder(target) as folder:
            if source:
                shutil.copytree(source, folder, dirs_exist_ok=True)
