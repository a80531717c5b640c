"""The demo page shows what `predict` computes and allows nothing but uploading an image."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import requests
import yaml
from called import call
from PIL import Image
from synthetic_run import write_run
from test_predict_files import PARAMS, lively_network

from l2l_core.artifacts import records
from l2l_core.core.masks import decode_rle, encode_rle
from l2l_core.errors import L2LError
from l2l_core.inference import predict_files, serve
from l2l_core.inference.predictor import Predictor
from l2l_core.mllm.backend import RawResponse
from l2l_core.mllm.query import query_table
from l2l_core.viz.overlays import BOX

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
KNOWN = "images/000.png"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project after round 0, as the current folder."""
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_run(root, rounds=0, images_per_split=2)
        (root / "params.yaml").write_text(yaml.safe_dump(PARAMS.model_dump()))
        records.RENDERING_PATH.write_text(json.dumps({"proposals": PARAMS.proposals.model_dump()}))
        lively_network(0).save(records.round_folder(0) / "model")
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), np.uint8)).save("own.png")
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (800, 800, 3), np.uint8)).save("large.png")  # 1.9 MB
        Image.new("1", (8000, 5001)).save("wide.png")  # a few kilobytes, 40.008 megapixels
        Path("text.png").write_text("not an image")
        yield root


@pytest.fixture(scope="module")
def sentence(run: Path) -> str:
    """A dataset sentence about the image KNOWN, whose prior has a box."""
    return str(records.read_table(records.INDEX.refs, records.REFS)["sentence"][0])


@pytest.fixture(scope="module")
def session(run: Path) -> serve.DemoSession:
    return serve.DemoSession.of(records.round_folder(0) / "model", PARAMS, 1, with_priors=True)


def expected_mask(image: str, sentence: str, *, with_priors: bool) -> np.ndarray:
    """The mask that `predict` writes."""
    requested = predict_files.pairs_of_paths([Path(image)], sentence)
    prior_tables = predict_files.get_priors(requested, PARAMS) if with_priors else None
    predictor = Predictor.from_pretrained(records.round_folder(0) / "model")
    (rle,) = predict_files.predict_masks(predictor, requested, prior_tables).rle
    mask = decode_rle(rle, requested.images[0].height, requested.images[0].width)
    assert 0 < mask.mean() < 1
    return mask


def has_color(picture: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((picture == color).all(axis=2).any())


# --- displayed results


def test_shows_a_dataset_pair_with_its_recorded_prior(session: serve.DemoSession, sentence: str) -> None:
    seen = session.predict(Path(KNOWN), sentence)
    prior = records.read_table(records.PRIORS_PATH, records.PRIORS).to_pylist()[0]
    assert seen.words.splitlines() == ["dot", f"ok: {prior['raw_text']}"]
    assert seen.prior is not None
    assert seen.proposal is not None
    assert has_color(seen.prior, BOX)
    x1, y1, x2, y2 = (round(edge * 10) for edge in prior["bbox"])  # 64 x 48 px are shown as 640 x 480
    edges = np.argwhere((seen.prior == BOX).all(axis=2))
    np.testing.assert_allclose([*edges.min(axis=0)[::-1], *edges.max(axis=0)[::-1]], [x1, y1, x2, y2], atol=3)
    np.testing.assert_array_equal(seen.mask, expected_mask(KNOWN, sentence, with_priors=True))


def left_half(height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[:, : width // 2] = True
    return mask


def edges_of(picture: np.ndarray) -> list[int]:
    """Left, top, right and bottom of what is drawn in the color of a prior."""
    rows, columns = np.nonzero((picture == BOX).all(axis=2))
    return [columns.min(), rows.min(), columns.max(), rows.max()]


def test_shows_a_recorded_mask_in_place_of_its_box(
    session: serve.DemoSession, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = records.read_table(records.PRIORS_PATH, records.PRIORS).to_pylist()
    rows[0]["mask"] = encode_rle(left_half(48, 64))
    records.write_table(records.make_table(rows, records.PRIORS), tmp_path / "priors.parquet", records.PRIORS)
    monkeypatch.setattr(records, "PRIORS_PATH", tmp_path / "priors.parquet")
    seen = session.predict(Path(KNOWN), sentence)
    assert seen.prior is not None
    np.testing.assert_allclose(edges_of(seen.prior), [0, 0, 320, 479], atol=3)  # shown as 640 x 480


def test_renders_the_mask_of_a_live_backend(session: serve.DemoSession) -> None:
    """The proposal is the left half of the image, with the probabilities that the model was trained with."""

    class Segmenting:
        name = "segmenting"

        def query(self, questions):  # type: ignore[no-untyped-def]
            return [RawResponse("", "m", "pixel", (50, 80), mask=encode_rle(left_half(50, 80))) for _ in questions]

    requested = predict_files.pairs_of_paths([Path("own.png")], "the dot")
    found = predict_files.live_priors(requested, PARAMS, partial(query_table, Segmenting()))
    predicted = predict_files.predict_masks(session.predictor, requested, found)
    assert predicted.pairs.has_box.all()
    assert predicted.pairs.box.tolist() == [[0, 0, 0.5, 1]]
    assert predicted.with_prior.all()
    size, inside = PARAMS.proposals.size_px, PARAMS.proposals.inside_prob
    halves = np.repeat([[inside, 1 - inside]], size // 2, axis=1).repeat(size, axis=0)
    np.testing.assert_allclose(predicted.pairs.proposal[0] / 255, halves, atol=1 / 255)
    seen = serve.DemoSession(session.predictor, PARAMS, Segmenting(), 1).predict(Path("own.png"), "the dot")
    assert seen.prior is not None
    np.testing.assert_allclose(edges_of(seen.prior), [0, 0, 320, 399], atol=3)  # shown as 640 x 400


def test_shows_another_pair_without_prior_and_explains_why(session: serve.DemoSession) -> None:
    seen = session.predict(Path("own.png"), "the dot")
    assert seen.words == "no prior: the backend simulated has responses only for the dataset"
    assert seen.prior is None
    assert seen.proposal is None
    assert seen.overlay.shape == (400, 640, 3)
    np.testing.assert_array_equal(seen.mask, expected_mask("own.png", "the dot", with_priors=False))


def test_uses_no_prior_unless_asked_to(run: Path, sentence: str) -> None:
    """Also for a dataset pair whose prior is recorded, and without loading the backend."""
    params = PARAMS.model_copy(update={"priors": PARAMS.priors.model_copy(update={"backend": "openai", "model": "m"})})
    bare = serve.DemoSession.of(records.round_folder(0) / "model", params, 1, with_priors=False)
    assert bare.backend is None
    seen = bare.predict(Path(KNOWN), sentence)
    assert seen.words == "no prior: started without --with-priors"
    assert seen.prior is None
    assert seen.proposal is None
    np.testing.assert_array_equal(seen.mask, expected_mask(KNOWN, sentence, with_priors=False))


def test_queries_a_live_backend(session: serve.DemoSession) -> None:
    class Scripted:
        name = "scripted"

        def query(self, questions):  # type: ignore[no-untyped-def]
            assert [(question.image_hw, question.sentence) for question in questions] == [((50, 80), "the dot")]
            said = {"target": "cup", "bbox": [8, 10, 40, 30]} if self.found else {"found": False}
            return [RawResponse(json.dumps(said), "m", "pixel", (50, 80))]

    backend = Scripted()
    live = serve.DemoSession(session.predictor, PARAMS, backend, 1)
    backend.found = True
    seen = live.predict(Path("own.png"), "the dot")
    assert seen.words.splitlines() == ["cup", 'ok: {"target": "cup", "bbox": [8, 10, 40, 30]}']
    assert seen.prior is not None
    assert has_color(seen.prior, BOX)
    backend.found = False
    seen = live.predict(Path("own.png"), "the dot")
    assert seen.words.splitlines() == ["no prior: no response names a place", 'empty: {"found": false}']
    assert seen.prior is None


REFUSED = {
    "no image": (None, "dot", "image: none, expected an upload"),
    "no word": ("own.png", " ?", r"sentence: got ' \?', expected at least one word"),
    "bytes": ("large.png", "dot", r"image: 1\.\d MB, expected at most 1 MB \(--max-mb\)"),
    "a long sentence": ("own.png", "a" * 2001, "sentence: 2001 characters, expected at most 2000"),
    "pixels": ("wide.png", "dot", "image: more than 40 megapixels; make it smaller"),
    "text": ("text.png", "dot", "text.png: corrupt, or not one of JPEG"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_unusable_input_in_one_line(session: serve.DemoSession, name: str) -> None:
    image, words, message = REFUSED[name]
    with pytest.raises(L2LError, match=message) as caught:
        session.predict(None if image is None else Path(image), words)
    assert len(str(caught.value).splitlines()) == 1


# --- the command


def test_serve_without_gradio_names_the_package_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert call(monkeypatch, "serve") == 2
    assert capsys.readouterr().err == "error: serve: needs gradio: pip install -e '.[serve]'\n"


def test_refuses_a_port_in_use_in_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: True)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert call(monkeypatch, "serve", "--port", port) == 2
    assert re.fullmatch(rf"error: serve: cannot listen at 127\.0\.0\.1:{port}: .*--port\n", capsys.readouterr().err)


# --- what is refused before the page sees it


def status_of(guard: serve.Guard, method: str = "POST", **headers: str) -> int:
    """The status with which a guard refuses a request; 200 if it passes it on."""
    sent: list[dict[str, object]] = []

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    named = {"host": "127.0.0.1:7860", "content-length": "10"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    scope = {"type": "http", "method": method, "headers": [(k.encode(), v.encode("latin-1")) for k, v in named.items()]}
    asyncio.run(guard(scope, None, send))
    return int(str(sent[0]["status"]))


@pytest.fixture
def guard(tmp_path: Path) -> serve.Guard:
    async def passed(scope: object, receive: object, send: Callable[[object], Awaitable[None]]) -> None:
        await send({"status": 200})

    return serve.Guard(passed, "127.0.0.1", tmp_path, 2**20)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:7860", 200),
        ("[::1]:7860", 200),
        ("192.0.2.7", 200),
        ("LOCALHOST", 200),
        (socket.gethostname(), 200),
        ("evil.example", 403),
        ("evil.example:7860", 403),
        ("127.0.0.1.evil.example", 403),
        ("127.0.0.1@evil.example", 403),
        ("[evil", 403),
        ("", 403),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_answers_only_to_the_names_of_this_machine(guard: serve.Guard, host: str, status: int, method: str) -> None:
    """A page of another site can point its own name at this machine (DNS rebinding)."""
    assert status_of(guard, method, host=host) == status


@pytest.mark.parametrize(
    ("length", "status"), [("1048576", 200), ("1200000", 413), ("", 411), ("-1", 411), ("1e3", 411)]
)
def test_refuses_large_requests_and_those_of_unstated_size(guard: serve.Guard, length: str, status: int) -> None:
    assert status_of(guard, content_length=length) == status
    assert status_of(guard, "GET", content_length=length) == 200


def test_refuses_requests_while_the_upload_folder_is_full(guard: serve.Guard) -> None:
    for number in range(serve.UPLOADS + 1):
        (guard.folder / f"{number}.png").write_bytes(b"0" * 2**20)
    assert status_of(guard) == 503
    assert status_of(guard, "GET") == 200
    long_ago = time.time() - 3 * serve.KEEP_S
    os.utime(guard.folder / "0.png", (long_ago, long_ago))
    assert status_of(guard) == 200
    assert not (guard.folder / "0.png").exists()


# --- the page


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[str]
    temporary: Path  # its folder for temporary files


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[serve]'")
    temporary = tmp_path_factory.mktemp("temporary")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "l2l_core", "serve", "--with-priors", "--port", "0", "--max-mb", "1"]
    with subprocess.Popen(command, cwd=run, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[0]
        yield Server(url, process, temporary)
        process.kill()


@pytest.mark.parametrize("known", [True, False])
def test_downloaded_mask_matches_predict(server: Server, sentence: str, known: bool, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    image = KNOWN if known else "own.png"
    client = Client(server.url, download_files=tmp_path, verbose=False, analytics_enabled=False)
    words, prior, proposal, overlay, mask = client.predict(handle_file(image), sentence, api_name="/segment")
    assert words.startswith("dot\nok: " if known else "no prior: the backend simulated has responses only for")
    assert (prior is not None) == (proposal is not None) == known
    with Image.open(overlay) as picture:
        assert max(picture.size) == serve.PICTURE_PX
    with Image.open(mask) as picture:
        assert (picture.format, picture.mode) == ("PNG", "L")
        expected = expected_mask(image, sentence, with_priors=known)
        np.testing.assert_array_equal(np.asarray(picture), 255 * expected.astype(np.uint8))


@pytest.mark.parametrize("name", ["no image", "no word", "pixels", "text"])
def test_page_shows_errors_in_one_line(server: Server, name: str) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    image, words, message = REFUSED[name]
    client = Client(server.url, verbose=False, analytics_enabled=False)
    with pytest.raises(AppError, match=message) as caught:
        client.predict(image and handle_file(image), words, api_name="/segment")
    assert str(server.temporary) not in str(caught.value)


def test_refuses_a_large_upload(server: Server, run: Path) -> None:
    address = f"{server.url}/gradio_api/upload"
    for name, status in (("own.png", 200), ("large.png", 413)):
        with (run / name).open("rb") as file:
            assert requests.post(address, files={"files": file}, timeout=60).status_code == status


def test_page_answers_only_to_the_names_of_this_machine(server: Server) -> None:
    for host, status in (("127.0.0.1", 200), ("evil.example", 403)):
        assert requests.get(server.url, headers={"Host": host}, timeout=60).status_code == status


def test_refuses_to_read_server_files(server: Server, run: Path) -> None:
    """A request may name any path, but only uploaded files are read."""
    upload = {"path": str(run / "own.png"), "meta": {"_type": "gradio.FileData"}}
    address = f"{server.url}/gradio_api/call/segment"
    event = requests.post(address, json={"data": [upload, "the dot"]}, timeout=60).json()["event_id"]
    assert requests.get(f"{address}/{event}", timeout=60).text.startswith("event: error")
    for path in (run / "own.png", run / "params.yaml"):
        assert requests.get(f"{server.url}/gradio_api/file={path}", timeout=60).status_code in (403, 404)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_browser_shows_the_page_without_errors_or_network_access(server: Server, tmp_path: Path) -> None:
    found = subprocess.run(
        [
            str(CHROMIUM),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}",
            "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            "--virtual-time-budget=30000",
            "--dump-dom",
            server.url,
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Find it" in found.stdout
    assert not [line for line in found.stderr.splitlines() if "CONSOLE" in line]


def test_shutdown_removes_temporary_files(server: Server) -> None:
    """Must be the last test in this file, because it stops the server."""
    assert list(server.temporary.glob("l2l-serve-*"))
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=300) == 0
    assert not list(server.temporary.glob("l2l-serve-*"))
