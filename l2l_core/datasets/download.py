"""Downloads and unpacks a published archive: the result is a complete, checked folder, or none."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import requests

from l2l_core.core.files import atomic_dir, exclusive_lock
from l2l_core.core.progress import progress
from l2l_core.datasets.published import Archive
from l2l_core.errors import InputError, redacted

RECORD = "archive.json"
"""File next to the unpacked ones that records their source archive."""

TIMEOUT_S = 60.0
"""Timeout for a silent server; the Internet Archive takes up to half a minute to begin."""

CHUNK_BYTES = 1 << 20
"""Size of one write, unit of the progress bar, and most data lost to a broken connection."""


class _UnusableError(Exception):
    """A source does not provide the archive. The message says why, and the next source is tried."""


def fetch(archive: Archive, target: Path, scratch: Path, mirror: str | None, sha256: str | None) -> str:
    """Create the folder `target` and return a one-line summary.

    scratch: folder for partial downloads, which are resumed. mirror: folder or address with <name>.zip, tried first.
    sha256: of the zip file, lower-case hex; None: only the counts of the content are checked.
    A non-empty target is checked and never changed.
    Raises InputError if it differs from the published files, no source provides the archive, or the disk is full.
    """
    if target.is_dir() and any(target.iterdir()):
        return _keep(archive, target, sha256)
    reasons = []
    target.parent.mkdir(parents=True, exist_ok=True)
    for source in _sources(archive, mirror):
        try:
            digest = _fetch_from(source, archive, target, scratch, sha256)
        except _UnusableError as error:
            reasons.append(f"  {source}: {error}")
        except OSError as error:
            raise InputError(
                f"{error.filename or target}: cannot be read or written: {error.strerror or error}"
            ) from None
        else:
            return f"{target}: from {redacted(source)}, sha256 {digest}"
    raise InputError(
        f"{target}: no source gives {archive.name}.zip; get it by other means and name its folder by fetch.mirror\n"
        + "\n".join(reasons)
    )


def track(target: Path) -> None:
    """Track a folder with DVC, so that experiments in copies of the project find it.

    Raises InputError if the project is not a DVC repository.
    """
    # Imported here: DVC takes a second.
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import SCMError

    try:
        with Repo() as repo:
            repo.add(str(target))
    except (DvcException, SCMError) as error:
        raise InputError(f"{target}: is there, but DVC cannot track it: {error}") from None


def _sources(archive: Archive, mirror: str | None) -> list[str]:
    return [*([f"{mirror.rstrip('/')}/{archive.name}.zip"] if mirror else []), *archive.urls]


def _keep(archive: Archive, target: Path, sha256: str | None) -> str:
    problems = archive.problems(target)
    record = target / RECORD
    if sha256 is not None:
        have = json.loads(record.read_text(encoding="utf-8"))["sha256"] if record.is_file() else "not recorded"
        problems += [] if have == sha256 else [f"its archive's sha256 is {have}, fetch.sha256 says {sha256}"]
    if problems and not record.is_file() and sha256 is None:
        # The user's own subset or edition in the folder of that name: ingest reports its problems.
        return f"{target}: there already, not fetched by this command, nothing was changed; note: {'; '.join(problems)}"
    if problems:
        raise InputError(
            f"{target}: it exists and is not what was published, nothing was changed; give it another name to keep it, "
            f"or remove it to fetch {archive.name} again: {'; '.join(problems)}"
        )
    return f"{target}: there already and as published, nothing was changed"


def _fetch_from(source: str, archive: Archive, target: Path, scratch: Path, sha256: str | None) -> str:
    """Create `target` from one source; return the archive's sha256."""
    if "://" not in source:
        return _make(archive, Path(source), target, sha256)
    scratch.mkdir(parents=True, exist_ok=True)
    # Named after the address, so that a download from one mirror is not resumed from another.
    part = scratch / f"{archive.name}-{hashlib.sha256(source.encode()).hexdigest()[:8]}.part"
    busy = InputError(f"{part}: another process is downloading it; wait for it or end it")
    with exclusive_lock(part.with_suffix(".lock"), busy), part.open("ab") as file:
        _download(source, part, file)
        try:
            digest = _make(archive, part, target, sha256)
        except _UnusableError:
            part.unlink()  # unusable; if only the disk is full, the file stays for the next attempt
            raise
        part.unlink()
        return digest


def _download(url: str, part: Path, file: BinaryIO) -> None:
    """Download an address to a file; resumes an earlier, broken download."""
    longest, reason = -1, ""
    while part.stat().st_size > longest:  # as long as every attempt makes progress
        longest = part.stat().st_size
        try:
            return _receive(url, part, file)
        except requests.RequestException as error:
            reason = _short(error)
        finally:
            file.flush()
    if not longest:
        part.unlink()
    raise _UnusableError(reason)


def _receive(url: str, part: Path, file: BinaryIO) -> None:
    """Append the missing bytes. Raises RequestException if the connection or the server fails."""
    have = part.stat().st_size
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        if have and response.status_code == requests.codes.requested_range_not_satisfiable:
            if response.headers.get("Content-Range") not in (None, f"bytes */{have}"):
                file.truncate(0)  # longer than the current file at the address
                _receive(url, part, file)
            return  # complete: an earlier process ended before unpacking
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            file.truncate(0)  # the server cannot resume: it sends everything again
            have = 0
        stated = response.headers.get("Content-Length", "")
        missing = int(stated) if stated.isdecimal() and len(stated) < 19 else 0
        _need_space(part.parent, missing)
        total = (have + missing) // CHUNK_BYTES if missing else None
        chunks = response.iter_content(CHUNK_BYTES)
        for chunk in progress(chunks, part.stem, "MiB", total=total, initial=have // CHUNK_BYTES):
            file.write(chunk)


def _make(archive: Archive, path: Path, target: Path, sha256: str | None) -> str:
    """Unpack next to `target`, check, then rename to `target`; return the sha256 of the zip file."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise _UnusableError("not found") from None
    if sha256 not in (None, digest):
        raise _UnusableError(f"its sha256 is {digest}, fetch.sha256 says {sha256}")
    with atomic_dir(target) as building:
        _unpack(archive, path, building)
        if problems := archive.problems(building):
            raise _UnusableError("; ".join(problems))
        record = {"archive": f"{archive.name}.zip", "bytes": path.stat().st_size, "sha256": digest}
        (building / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return digest


def _unpack(archive: Archive, path: Path, folder: Path) -> None:
    """Unpack one folder of the zip file. Only file names are used, so no file can land elsewhere."""
    files = folder / archive.into
    files.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(path) as bundle:
            members = {
                inner.name: member
                for member in bundle.infolist()
                if (inner := PurePosixPath(member.filename)).parent.name == archive.inside
                and not member.is_dir()
                and not inner.name.startswith(".")  # left by file managers
            }
            _need_space(folder, sum(member.file_size for member in members.values()))
            for name, member in progress(members.items(), f"unpack {archive.name}", "file"):
                with bundle.open(member) as source, (files / name).open("wb") as out:
                    shutil.copyfileobj(source, out)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted
        raise _UnusableError(f"not a usable zip file: {error}") from None


def _need_space(folder: Path, size_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if size_bytes > free_bytes:
        raise InputError(
            f"{folder}: {size_bytes / 1e9:.1f} GB are needed and {free_bytes / 1e9:.1f} GB free, make room there"
        )


def _short(error: requests.RequestException) -> str:
    if error.response is not None:
        return f"{error.response.status_code} {error.response.reason}"
    text = str(error)
    return f"{type(error).__name__}: {text if len(text) <= 160 else text[:157] + '...'}"
