"""Atomically written folders, scratch folders that survive a kill, and fingerprints of files."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from l2l_core.core.progress import is_first_process
from l2l_core.errors import ArtifactError, InputError, L2LError, writing

CODE_ROOT = Path(__file__).resolve().parents[2]


def end_on_sigterm() -> None:
    """On SIGTERM, exit by an exception with the shell's exit code, so that no half-written file remains."""

    def end(signal_number: int, _frame: object) -> None:
        signal.signal(signal_number, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
        sys.exit(128 + signal_number)

    signal.signal(signal.SIGTERM, end)


@contextmanager
def staged_output(folder: Path, finish: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield a temporary folder; when the block succeeds, its files move into `folder` in the order of their names.

    They replace files of the same name, and `finish` runs. If the block fails, `folder` is unchanged. Raises InputError
    if `folder` is a file or cannot be written, or if another process writes into it.
    """
    folder = folder.resolve()
    if os.path.exists(folder) and not folder.is_dir():  # Path.exists raises for a name that is too long
        raise InputError(f"--out: {folder} is a file, expected a folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(".building", f".{folder.name}.", folder.parent))
    except OSError as error:
        raise InputError(f"--out: {folder} cannot be written: {error.strerror}; name another folder") from None
    busy = InputError(f"--out: another process writes into {folder}; wait for it, or name another folder")
    try:
        with exclusive_lock(folder.with_name(f".{folder.name}.lock"), busy), writing(folder):
            yield building
            folder.mkdir(exist_ok=True)
            for file in sorted(building.iterdir()):
                os.replace(file, folder / file.name)
            finish()
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def atomic_dir(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `target` when the block succeeds.

    If the block or the replacement fails, `target` stays as it was.

    In a distributed run, only rank 0 may call it.
    """
    building, retired = (target.with_name(f".{target.name}.{kind}") for kind in ("building", "retired"))

    def clean_up() -> None:
        if retired.exists() and not target.exists():
            os.replace(retired, target)
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)

    clean_up()  # after a killed process
    building.mkdir(parents=True)
    try:
        with writing(target):
            yield building
        if target.exists():
            os.replace(target, retired)
        os.replace(building, target)
    finally:
        clean_up()


@contextmanager
def exclusive_lock(lock: Path, busy: L2LError) -> Iterator[None]:
    """Hold a lock file during the block and remove it afterwards. Raises `busy` if another process holds it."""
    holder = FileLock(lock)
    try:
        holder.acquire(blocking=False)
    except Timeout:
        raise busy from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        holder.release()


def is_locked(lock: Path) -> bool:
    """Whether a process holds the lock file. A killed process leaves the file, but does not hold it."""
    holder = FileLock(lock)
    try:
        holder.acquire(blocking=False)
    except Timeout:
        return True
    holder.release()
    return False


def copy_atomically(source: Path | None, target: Path) -> None:
    """Copy a folder by `atomic_dir`, on rank 0 only; source None: create an empty folder."""
    if is_first_process():
        with atomic_dir(target) as folder:
            if source:
                shutil.copytree(source, folder, dirs_exist_ok=True)


def fingerprint(stage: str, settings: str, inputs: Iterable[Path]) -> str:
    """Hex digest of the settings, the bytes of all input files and the library's code.

    A run resumes a checkpoint only if it would have written the same one.
    """
    digest = hashlib.sha256(f"{stage}\n{settings}\n".encode())
    files = [file for path in inputs for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    code = [*CODE_ROOT.glob("l2l_core/**/*.py"), *CODE_ROOT.glob("stages/*.py")]
    for name, file in sorted((str(file), file) for file in files) + sorted(
        (str(file.relative_to(CODE_ROOT)), file) for file in code
    ):
        digest.update(f"{name}\n{file_sha256(file)}\n".encode())
    return digest.hexdigest()[:16]


def files_state(files: Iterable[Path]) -> str:
    """Names, sizes and times of files that are too large to hash: shows whether one of them changed."""
    return "".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n" for file in files)


def folder_state(folder: str | Path) -> str:
    """`files_state` of a folder's files, in the order of their names; empty if it is not a folder, such as a hub id."""
    return files_state(sorted(Path(folder).iterdir())) if Path(folder).is_dir() else ""


def read_file(path: Path) -> bytes:
    """The bytes of a regular file. Pipes and devices are refused, because reading them may never end.

    Raises FileNotFoundError, and InputError if it is not a regular file or cannot be read.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: {'a folder' if path.is_dir() else 'not a regular file'}, expected a file")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None


def move_aside(path: Path) -> Path:
    """Rename a torn file to NAME.torn (NAME.torn2, ... if that exists) and return its new path."""
    numbers = ("", *range(2, 1000))
    target = next(place for number in numbers if not (place := path.with_name(f"{path.name}.torn{number}")).exists())
    os.replace(path, target)
    return target


def file_sha256(path: Path) -> str:
    """SHA-256 hex digest of a file. The file is read in blocks, so it may be larger than memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def scratch_folder(stage: str, key: str, *, keep: bool = False) -> Iterator[Path]:
    """Yield a locked folder that survives a kill and is removed when the block succeeds.

    DVC deletes the outputs of a stage before it runs, hence a folder outside them: .scratch/<stage>-<key>. Ranks other
    than 0 read what rank 0 wrote there. keep: leave the folder for a later stage, which opens it by the same names.
    Raises ArtifactError if another run works on the same stage with the same inputs.
    """
    root = Path(os.environ.get("DVC_ROOT", ".")) / ".scratch"
    if not is_first_process():
        yield root / f"{stage}-{key}"
        return
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{stage}-{key}"
    busy = ArtifactError(f"{folder}: another process is running this stage; wait for it or end it")
    with exclusive_lock(root / f"{stage}-{key}.lock", busy):
        folder.mkdir(exist_ok=True)
        yield folder
        if not keep:
            shutil.rmtree(folder)
