"""Downloads of published archives (broken, wrong and good) from a local server; checks the files byte by byte."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import threading
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from called import call

from l2l_core.datasets import download, published
from l2l_core.datasets.download import fetch
from l2l_core.datasets.published import Archive, Rows
from l2l_core.errors import InputError

REFS = [
    {"ref_id": 0, "split": "train", "sentences": [{"sent": "left cup"}, {"sent": "a cup"}]},
    {"ref_id": 1, "split": "train", "sentences": [{"sent": "dog"}]},
    {"ref_id": 2, "split": "testA", "sentences": [{"sent": "man"}]},
]
FILES = {
    "refs(unc).p": pickle.dumps(REFS, 2),
    "instances.json": json.dumps({"images": [], "annotations": [], "filler": "x" * 5000}).encode(),
}
SPLITS = {"unc": {"train": Rows(2, 3), "testA": Rows(1, 1)}}


def zipped(files: dict[str, bytes]) -> bytes:
    """Builds an uncompressed zip, so that a test can find and corrupt the bytes of a file."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as bundle:
        for name, text in files.items():
            bundle.writestr(name, text)
    return content.getvalue()


GOOD = zipped({f"refcoco/{name}": content for name, content in FILES.items()})


@dataclass
class Server:
    """Serves files by path; `cut` truncates the next responses for a path, `ranges` enables range requests."""

    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    ranges: bool = True
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.asked.append((self.path, wanted))
            content = state.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and state.ranges else 0
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            cuts = state.cut.get(self.path)
            self.wfile.write(content[start : cuts.pop(0) if cuts else None])

        def log_message(self, *args: object) -> None:
            """Writes nothing to stderr."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Server(f"http://127.0.0.1:{http.server_port}")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Target and scratch folders; downloads are written in chunks of 100 bytes."""
    monkeypatch.setattr(download, "CHUNK_BYTES", 100)
    return tmp_path / "data" / "refcoco", tmp_path / "scratch"


def archive(server: Server, *paths: str) -> Archive:
    return Archive("refcoco", tuple(server.address + path for path in paths), "refcoco", "", SPLITS)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_as_published(target: Path, scratch: Path) -> None:
    found = contents(target)
    record = json.loads(found.pop("archive.json"))
    assert found == FILES
    assert record == {"archive": "refcoco.zip", "bytes": len(GOOD), "sha256": hashlib.sha256(GOOD).hexdigest()}
    assert os.listdir(target.parent) == ["refcoco"]
    assert not scratch.exists() or os.listdir(scratch) == []


def leaves_nothing(target: Path) -> None:
    assert not target.exists()
    assert not target.parent.exists() or os.listdir(target.parent) == []


def test_falls_back_to_the_next_source_when_one_is_missing(server, places):
    server.files["/good.zip"] = GOOD
    line = fetch(archive(server, "/gone.zip", "/good.zip"), *places, None, None)
    assert f"{server.address}/good.zip" in line
    assert hashlib.sha256(GOOD).hexdigest() in line
    assert [path for path, _ in server.asked] == ["/gone.zip", "/good.zip"]
    is_as_published(*places)


def test_resumes_an_interrupted_download(server, places):
    server.files["/good.zip"] = GOOD
    server.cut["/good.zip"] = [2000, 4000]
    fetch(archive(server, "/good.zip"), *places, None, None)
    assert [wanted for _, wanted in server.asked] == [None, "bytes=2000-", "bytes=4000-"]
    is_as_published(*places)


def test_resumes_a_download_in_a_new_process(server, places):
    server.files["/good.zip"] = GOOD
    server.cut["/good.zip"] = [2000, 2000]  # the second response sends no new bytes
    with pytest.raises(InputError, match=r"no source gives refcoco\.zip"):
        fetch(archive(server, "/good.zip"), *places, None, None)
    leaves_nothing(places[0])
    fetch(archive(server, "/good.zip"), *places, None, None)
    assert server.asked[-1] == ("/good.zip", "bytes=2000-")
    is_as_published(*places)


def test_does_not_repeat_a_complete_download(server, places):
    server.files["/good.zip"] = GOOD
    server.cut["/good.zip"] = [2000, 2000]
    with pytest.raises(InputError):
        fetch(archive(server, "/good.zip"), *places, None, None)
    (part,) = places[1].iterdir()
    part.write_bytes(GOOD)  # as if the process had exited before unpacking
    fetch(archive(server, "/good.zip"), *places, None, None)
    assert server.asked[-1] == ("/good.zip", f"bytes={len(GOOD)}-")
    is_as_published(*places)


def test_restarts_the_download_when_the_server_does_not_support_ranges(server, places):
    server.files["/good.zip"] = GOOD
    server.ranges = False
    server.cut["/good.zip"] = [2000]
    fetch(archive(server, "/good.zip"), *places, None, None)
    is_as_published(*places)


def test_gives_up_on_a_source_that_always_breaks_at_the_same_byte(server, places):
    server.files |= {"/bad.zip": GOOD, "/good.zip": GOOD}
    server.ranges = False
    server.cut["/bad.zip"] = [2000] * 100
    fetch(archive(server, "/bad.zip", "/good.zip"), *places, None, None)
    assert len(server.cut["/bad.zip"]) == 98
    assert contents(places[0]).keys() == {*FILES, "archive.json"}


def test_restarts_the_download_when_the_file_size_changed(server, places):
    server.files["/good.zip"] = GOOD + b"longer" * 100
    server.cut["/good.zip"] = [len(GOOD) + 200] * 2
    with pytest.raises(InputError):
        fetch(archive(server, "/good.zip"), *places, None, None)
    server.files["/good.zip"] = GOOD
    fetch(archive(server, "/good.zip"), *places, None, None)
    is_as_published(*places)


SPOILT = GOOD.replace(b"x" * 5000, b"x" * 4999 + b"y")  # the checksum of that file no longer matches
WRONG = {
    "a page instead of a file": (b"<html>moved</html>", "not a usable zip file"),
    "cut short": (GOOD[:-100], "not a usable zip file"),
    "damaged": (SPOILT, "Bad CRC-32 for file 'refcoco/instances.json'"),
    "another folder": (zipped({f"other/{name}": text for name, text in FILES.items()}), "instances.json is missing"),
    "no instances": (zipped({"refcoco/refs(unc).p": FILES["refs(unc).p"]}), "instances.json is missing"),
    "a refs file that is none": (
        zipped({"refcoco/instances.json": b"{}", "refcoco/refs(unc).p": b"none"}),
        r"refs\(unc\)\.p: .*not a pickle of plain data",
    ),
    "one ref less": (
        zipped({"refcoco/instances.json": b"{}", "refcoco/refs(unc).p": pickle.dumps(REFS[:2])}),
        r"refs\(unc\)\.p: testA has 0 refs with 0 sentences, published are 1 with 1",
    ),
    "rows of another form": (
        zipped({"refcoco/instances.json": b"{}", "refcoco/refs(unc).p": pickle.dumps([["train"]])}),
        r"refs\(unc\)\.p: its rows are not refs",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses_a_wrong_archive(server, places, case):
    content, reason = WRONG[case]
    server.files["/wrong.zip"] = content
    with pytest.raises(InputError, match=reason):
        fetch(archive(server, "/wrong.zip"), *places, None, None)
    leaves_nothing(places[0])
    assert os.listdir(places[1]) == []  # nothing that the next attempt would resume

    server.files["/good.zip"] = GOOD
    fetch(archive(server, "/wrong.zip", "/good.zip"), *places, None, None)
    is_as_published(*places)


def test_does_not_execute_a_malicious_pickle(server, places, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    refs = pickle.dumps([Malicious()])
    server.files["/bad.zip"] = zipped({"refcoco/instances.json": b"{}", "refcoco/refs(unc).p": refs})
    with pytest.raises(InputError, match="mkdir"):
        fetch(archive(server, "/bad.zip"), *places, None, None)
    assert not (tmp_path / "run").exists()


def test_writes_no_file_outside_the_target_folder(server, places):
    outside = {"../../evil.txt": b"", "/evil.txt": b"", "refcoco/../../evil.txt": b"", "refcoco/..": b""}
    left = {"refcoco/.DS_Store": b"", "__MACOSX/refcoco/._instances.json": b"", "readme.txt": b""}
    server.files["/good.zip"] = zipped({f"refcoco/{name}": text for name, text in FILES.items()} | outside | left)
    fetch(archive(server, "/good.zip"), *places, None, None)
    assert contents(places[0]).keys() == {*FILES, "archive.json"}
    assert sorted(os.listdir(places[0].parents[1])) == ["data", "scratch"]


def test_verifies_the_checksum(server, places):
    server.files["/good.zip"] = GOOD
    with pytest.raises(InputError, match=f"its sha256 is {hashlib.sha256(GOOD).hexdigest()}, fetch.sha256 says 0000"):
        fetch(archive(server, "/good.zip"), *places, None, "0" * 64)
    leaves_nothing(places[0])
    fetch(archive(server, "/good.zip"), *places, None, hashlib.sha256(GOOD).hexdigest())
    is_as_published(*places)


def test_tries_the_mirror_first(server, places):
    server.files |= {"/mine/refcoco.zip": GOOD, "/good.zip": GOOD}
    fetch(archive(server, "/good.zip"), *places, f"{server.address}/mine/", None)
    assert [path for path, _ in server.asked] == ["/mine/refcoco.zip"]
    is_as_published(*places)


def test_accepts_a_local_folder_as_mirror_and_keeps_its_file(server, places, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "refcoco.zip").write_bytes(GOOD)
    fetch(archive(server, "/good.zip"), *places, str(mine), None)
    assert server.asked == []
    assert (mine / "refcoco.zip").read_bytes() == GOOD
    is_as_published(*places)


def test_error_names_every_failed_source(server, places, tmp_path):
    server.files["/page.zip"] = b"<html>"
    with pytest.raises(InputError) as caught:
        fetch(archive(server, "/gone.zip", "/page.zip"), *places, str(tmp_path / "mine"), None)
    first, *reasons = str(caught.value).splitlines()
    assert "fetch.mirror" in first
    assert reasons == [
        f"  {tmp_path}/mine/refcoco.zip: not found",
        f"  {server.address}/gone.zip: 404 Not Found",
        f"  {server.address}/page.zip: not a usable zip file: File is not a zip file",
    ]


def test_reports_an_unreachable_server(places):
    gone = Archive("refcoco", ("http://127.0.0.1:9/refcoco.zip",), "refcoco", "", SPLITS)  # port 9 discards
    with pytest.raises(InputError, match="ConnectionError"):
        fetch(gone, *places, None, None)
    leaves_nothing(places[0])


def test_checks_free_space_before_download_and_before_unpacking(server, places, monkeypatch):
    server.files["/good.zip"] = GOOD
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 0, len(GOOD) - 1))
    with pytest.raises(InputError, match=r"scratch: .* GB are needed and .* GB free"):
        fetch(archive(server, "/good.zip"), *places, None, None)
    leaves_nothing(places[0])

    # Enough space for the archive, too little for its unpacked files.
    unpacked = sum(map(len, FILES.values()))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 0, unpacked - ("building" in str(folder))))
    with zipfile.ZipFile(small := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in FILES.items():
            bundle.writestr(f"refcoco/{name}", content)
    server.files["/good.zip"] = small.getvalue()
    with pytest.raises(InputError, match=r"\.refcoco\.building: .* GB are needed"):
        fetch(archive(server, "/good.zip"), *places, None, None)
    leaves_nothing(places[0])

    monkeypatch.undo()  # space was freed: nothing is sent again
    fetch(archive(server, "/good.zip"), *places, None, None)
    assert server.asked[-1] == ("/good.zip", f"bytes={len(small.getvalue())}-")
    assert contents(places[0]).keys() == {*FILES, "archive.json"}


def test_a_full_disk_during_unpacking_leaves_nothing(server, places, monkeypatch):
    server.files["/good.zip"] = GOOD

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(InputError, match="No space left on device"):
        fetch(archive(server, "/good.zip"), *places, None, None)
    leaves_nothing(places[0])


def test_verifies_and_keeps_an_existing_folder(server, places):
    server.files["/good.zip"] = GOOD
    published_there = archive(server, "/good.zip")
    fetch(published_there, *places, None, None)
    before, asked = contents(places[0]), len(server.asked)
    digest = hashlib.sha256(GOOD).hexdigest()
    for sha256 in (None, digest):
        assert "nothing was changed" in fetch(published_there, *places, None, sha256)
    with pytest.raises(InputError, match=f"sha256 is {digest}, fetch.sha256 says 1111"):
        fetch(published_there, *places, None, "1" * 64)

    (places[0] / "instances.json").unlink()
    with pytest.raises(InputError, match=r"instances\.json is missing"):
        fetch(published_there, *places, None, None)
    (places[0] / "archive.json").unlink()  # a user's own folder with that name: ingest reports its problems
    assert "nothing was changed; note: instances.json is missing" in fetch(published_there, *places, None, None)
    with pytest.raises(InputError, match="sha256 is not recorded"):
        fetch(published_there, *places, None, digest)
    assert contents(places[0]) == {"refs(unc).p": before["refs(unc).p"]}
    assert len(server.asked) == asked


def test_removes_leftovers_of_a_killed_process(server, places):
    server.files["/good.zip"] = GOOD
    building = places[0].with_name(".refcoco.building")
    building.mkdir(parents=True)
    (building / "instances.json").write_bytes(b"half")
    fetch(archive(server, "/good.zip"), *places, None, None)
    is_as_published(*places)


def test_unpacks_photos_into_their_own_folder_and_checks_their_count(server, tmp_path):
    names = [f"COCO_train2014_{number:012}.jpg" for number in (9, 25, 30)]
    server.files["/photos.zip"] = zipped({f"train2014/{name}": name.encode() for name in names})
    target = tmp_path / "images"
    urls = (server.address + "/photos.zip",)
    with pytest.raises(InputError, match="train2014 has 3 photos, published are 4"):
        fetch(Archive("images", urls, "train2014", "train2014", {}, 4), target, tmp_path / "scratch", None, None)
    assert not target.exists()
    fetch(Archive("images", urls, "train2014", "train2014", {}, 3), target, tmp_path / "scratch", None, None)
    found = contents(target)
    assert found.keys() == {"archive.json", *(f"train2014/{name}" for name in names)}
    assert found[f"train2014/{names[0]}"] == names[0].encode()


def test_fetch_command_writes_below_data(server, tmp_path, monkeypatch, capsys):
    root = Path(__file__).parents[2]
    params = (root / "params.yaml").read_text(encoding="utf-8").replace("mirror: null", f"mirror: {server.address}")
    (tmp_path / "params.yaml").write_text(params, encoding="utf-8")
    monkeypatch.setattr(published, "ARCHIVES", {"refcoco+": Archive("refcoco+", (), "refcoco", "", SPLITS)})
    monkeypatch.chdir(tmp_path)
    server.files["/refcoco+.zip"] = GOOD
    assert call(monkeypatch, "fetch", "refcoco+") == 2  # the folder exists but is in no Git repository
    said = capsys.readouterr()
    assert said.out.startswith(f"fetch: data/refcoco+: from {server.address}/refcoco+.zip, sha256 ")
    assert "error: data/refcoco+: is there, but DVC cannot track it: " in said.err
    assert contents(tmp_path / "data" / "refcoco+").keys() == {*FILES, "archive.json"}


def odd_server(response: bytes) -> socket.socket:
    """A server that answers every connection with these bytes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(response)

    threading.Thread(target=answer, daemon=True).start()
    return listener


RANGE_ERROR = b"HTTP/1.1 416 Range Not Satisfiable\r\nContent-Range: bytes */7\r\nContent-Length: 0\r\n\r\n"
ODD = {
    "416 for everything": RANGE_ERROR,
    "416 without a range": b"HTTP/1.1 416 Range Not Satisfiable\r\nContent-Length: 0\r\n\r\n",
    "a length that is no number": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nx",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nx",
    "a length of thousands of digits": b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nx",
    "no HTTP": b"SSH-2.0\r\n",
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("stored", [b"", b"partial"])
def test_gives_up_on_odd_replies_in_one_message(tmp_path, monkeypatch, case, stored):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    listener = odd_server(ODD[case])
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/good.zip"
    target, scratch = tmp_path / "refcoco", tmp_path / "scratch"
    scratch.mkdir()
    name = f"refcoco-{hashlib.sha256(address.encode()).hexdigest()[:8]}.part"
    (scratch / name).write_bytes(stored)
    with listener, pytest.raises(InputError, match=r"no source gives refcoco\.zip|GB are needed"):
        fetch(Archive("refcoco", (address,), "refcoco", "", SPLITS), target, scratch, None, None)
    assert not target.exists()


def test_messages_hide_the_password_of_a_mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    listener = odd_server(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
    mirror = f"http://me:hunter22@127.0.0.1:{listener.getsockname()[1]}"
    with listener, pytest.raises(InputError, match=r"http://\*\*\*@127") as caught:
        fetch(Archive("refcoco", (), "refcoco", "", SPLITS), tmp_path / "refcoco", tmp_path / "scratch", mirror, None)
    assert "hunter22" not in str(caught.value)
