"""A page to try a network in a browser: upload an image, type a sentence, see prior, proposal and mask.

The only file that uses gradio (the extra `serve`). It runs on one machine, for a few users: no accounts.
"""

from __future__ import annotations

import html
import ipaddress
import os
import signal
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from l2l_core.artifacts import records
from l2l_core.config import LIVE_BACKENDS, Params
from l2l_core.core.device import choose_device
from l2l_core.core.images import FORMATS, read_image
from l2l_core.core.masks import BoolMask, decode_rle
from l2l_core.datasets.index import MAX_SENTENCE, exif_rotation_note
from l2l_core.errors import ConfigError, InputError, L2LError
from l2l_core.inference.predict_files import (
    PairList,
    PredictedMasks,
    PriorTables,
    exif_rotated_images,
    live_priors,
    pairs_of_paths,
    predict_masks,
    recorded_priors,
    save_mask,
    with_trained_proposals,
)
from l2l_core.inference.predictor import Predictor
from l2l_core.mllm.backend import PriorBackend
from l2l_core.mllm.query import make_backend, query_table
from l2l_core.model.sam import load_sam
from l2l_core.viz import overlays

MAX_PIXELS = 40_000_000
"""Limit for an upload; photos have less. Decoded it takes 120 MB; a small file can hold thousands of times as many."""
PICTURE_PX = 640
"""Longer side of the pictures on the page; two fit side by side."""
KEEP_S = 600
"""Seconds until uploads and pictures are deleted: time to look and to download."""
GOODBYE_S = 2
"""Seconds for browsers to close their connections when the server ends; a page keeps one open."""
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
UPLOADS = 20
"""Largest uploads that fit into the folder of uploads and pictures at one time."""
QUEUE = 20
"""Requests that may wait; one is computed at a time."""
REQUEST_OVERHEAD = 1 << 16
"""Bytes of a request around an upload."""


@dataclass(frozen=True)
class DemoResult:
    """Result for one pair, as the page shows it."""

    words: str  # the multimodal LLM's response, or why there is no prior
    prior: overlays.Picture | None
    proposal: overlays.Picture | None
    overlay: overlays.Picture
    mask: BoolMask  # [H, W] at the image's original size


@dataclass(frozen=True)
class DemoSession:
    """A loaded network and, with priors, their source."""

    predictor: Predictor
    params: Params
    backend: PriorBackend | None  # None: the backend only covers the dataset, and its responses are recorded
    max_mb: int
    with_priors: bool = True

    @classmethod
    def of(cls, folder: Path, params: Params, max_mb: int, *, with_priors: bool) -> DemoSession:
        """Load the model in a folder, and with priors the backend. Raises L2LError if one of them cannot be loaded."""
        if not with_priors:
            predictor = Predictor.from_pretrained(folder, device=choose_device(params.train.engine.device))
            return cls(predictor, params, None, max_mb, with_priors=False)
        is_live = params.priors.backend in LIVE_BACKENDS
        backend = make_backend(params.priors, records.INDEX) if is_live else None
        predictor = Predictor.from_pretrained(folder, device=choose_device(params.train.engine.device))
        params = with_trained_proposals(params, predictor.network.known_proposals())
        if backend is not None and params.proposals.renderer == "sam":
            load_sam(str(params.proposals.model), params.priors.engine.device, "priors.engine.device")  # fail early
        return cls(predictor, params, backend, max_mb)

    def predict(self, image: Path | None, sentence: str) -> DemoResult:
        """Predict one pair. Raises InputError for an unusable image or sentence, and whatever the backend raises."""
        if image is None:
            raise InputError("image: none, expected an upload")
        _check_size(image, self.max_mb)
        requested = pairs_of_paths([image], sentence)
        prior_tables = self._get_priors(requested)
        predicted = predict_masks(self.predictor, requested, prior_tables)
        picture = overlays.fit(read_image(image), PICTURE_PX)
        responses = [] if prior_tables is None else _responses(prior_tables)
        mask = decode_rle(predicted.rle[0], requested.images[0].height, requested.images[0].width)
        has_prior = bool(predicted.with_prior[0])
        return DemoResult(
            words="\n".join([*self._words(responses, predicted), *_notes(requested)]),
            prior=_with_places(picture, responses, requested) if has_prior else None,
            proposal=overlays.with_soft_map(picture, predicted.pairs.proposal[0]) if has_prior else None,
            overlay=overlays.with_mask(picture, mask),
            mask=mask,
        )

    def _get_priors(self, requested: PairList) -> PriorTables | None:
        if not self.with_priors:
            return None
        if self.backend is not None:
            return live_priors(requested, self.params, partial(query_table, self.backend))
        # A model folder works without its training data.
        return recorded_priors(requested) if records.PROPOSALS_PATH.is_file() else None

    def _words(self, responses: list[dict[str, Any]], predicted: PredictedMasks) -> list[str]:
        if not self.with_priors:
            return ["no prior: started without --with-priors"]
        if not responses:
            return [f"no prior: the backend {self.params.priors.backend} has responses only for the dataset"]
        read = predicted.pairs.prior_text[0] if predicted.with_prior[0] else "no prior: no response names a place"
        return [read, *(f"{response['status']}: {response['raw_text']}" for response in responses)]


@dataclass(frozen=True)
class Guard:
    """An ASGI application that refuses requests before another one reads them.

    Refused are the names of other hosts, which a page of another site can point at this machine (DNS rebinding); bodies
    above `max_bytes` or of unstated length; and new requests while `folder` holds UPLOADS * max_bytes.
    """

    app: Any
    host: str  # that the server listens at
    folder: Path
    max_bytes: int

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one connection, as ASGI defines it."""
        if scope["type"] not in ("http", "websocket") or not (refused := self._refuses(scope)):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        status, reason = refused
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": reason.encode()})

    def _refuses(self, scope: Any) -> tuple[int, str] | None:
        """Status and reason if the request is refused."""
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if not self.knows(headers.get(b"host", "")):
            return 403, "unknown host: open the page by the address that l2l serve printed"
        if scope.get("method", "GET") in ("GET", "HEAD", "OPTIONS"):
            return None
        length = headers.get(b"content-length", "")
        if not length.isdecimal():
            return 411, "a request without Content-Length"
        if int(length) > self.max_bytes + REQUEST_OVERHEAD:
            return 413, f"more than {self.max_bytes // 2**20} MB (--max-mb)"
        if self._stored_bytes() > UPLOADS * self.max_bytes:
            return 503, f"too many uploads; they are deleted after {2 * KEEP_S // 60} minutes"
        return None

    def _stored_bytes(self) -> int:
        """Size of the folder, without what gradio has left there too long."""
        stored, oldest = 0, time.time() - 2 * KEEP_S
        for path in self.folder.rglob("*"):
            with suppress(FileNotFoundError):  # deleted by gradio at the same time
                found = path.stat()
                if stat.S_ISREG(found.st_mode) and found.st_mtime < oldest:
                    path.unlink()
                elif stat.S_ISREG(found.st_mode):
                    stored += found.st_size
        return stored

    def knows(self, host: str) -> bool:
        """Whether a Host header names this machine: by an IP address, its own name, or that of --host."""
        with suppress(ValueError):  # neither a host with a port, nor an IP address
            name = urlsplit(f"//{host}").hostname or ""
            if name in ("localhost", self.host.lower(), socket.gethostname().lower()):
                return True
            ipaddress.ip_address(name)
            return True
        return False


def require_gradio() -> None:
    """Raise ConfigError if gradio is not installed."""
    if not find_spec("gradio"):
        raise ConfigError("serve: needs gradio: pip install -e '.[serve]'")


def open_page(open_session: Callable[[], DemoSession], host: str, port: int) -> None:
    """Serve the page until SIGINT or SIGTERM, then delete uploads and pictures. Port 0: any free port.

    Raises InputError if the address is unavailable, and whatever `open_session` raises.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(f"serve: cannot listen at {host}:{port}: {error.strerror}; try another --port") from None
    with listener, tempfile.TemporaryDirectory(prefix="l2l-serve-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # gradio reads it on import
        session = open_session()
        app = Guard(_make_app(session, Path(folder)), host, Path(folder), session.max_mb * 2**20)
        if host not in LOCAL_HOSTS:
            print(f"warning: --host {host}: whoever reaches this machine can use the page", file=sys.stderr)
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that the folder is removed
        with suppress(KeyboardInterrupt):
            _run(app, listener)


def _check_size(image: Path, max_mb: int) -> None:
    """Raise InputError if a file has too many bytes, or its header too many pixels. It is not decoded."""
    if image.stat().st_size > max_mb * 2**20:
        raise InputError(f"image: {image.stat().st_size / 2**20:.1f} MB, expected at most {max_mb} MB (--max-mb)")
    pixels = 0
    with suppress(Exception):  # a file that is no image is reported when it is read
        try:
            with Image.open(image, formats=FORMATS) as header:
                pixels = header.width * header.height
        except Image.DecompressionBombError:  # far beyond the limit
            pixels = MAX_PIXELS + 1
    if pixels > MAX_PIXELS:
        raise InputError(f"image: more than {MAX_PIXELS // 10**6} megapixels; make it smaller")


def _responses(prior_tables: PriorTables) -> list[dict[str, Any]]:
    """The rows of records.PRIORS about the first pair."""
    priors = prior_tables.priors
    return list(priors.filter(np.equal(priors["sent_id"].to_numpy(), prior_tables.sent_id[0])).to_pylist())


def _notes(requested: PairList) -> list[str]:
    return [f"note: {exif_rotation_note(['this photo'])}"] if exif_rotated_images(requested) else []


def _with_places(picture: overlays.Picture, responses: list[dict[str, Any]], requested: PairList) -> overlays.Picture:
    height, width = requested.images[0].height, requested.images[0].width
    size_wh = np.array([width, height], dtype=np.float64)
    placed = [response for response in responses if response["mask"] is None]  # a mask shows more than its box
    boxes = [np.array(response["bbox"]) / np.tile(size_wh, 2) for response in placed if response["bbox"] is not None]
    points = [np.array(response["point"]) / size_wh for response in placed if response["point"] is not None]
    masks = [decode_rle(response["mask"], height, width) for response in responses if response["mask"] is not None]
    return overlays.with_outlines(overlays.with_boxes(picture, boxes, points), masks)


def _make_app(session: DemoSession, folder: Path) -> Any:
    """The page as an ASGI application. It loads nothing from other servers and reports nothing."""
    import fastapi  # type: ignore[import-not-found,unused-ignore]
    import gradio as gr  # type: ignore[import-not-found,unused-ignore]

    def respond(image: str | None, sentence: str) -> tuple[object, ...]:
        try:
            seen = session.predict(None if image is None else Path(image), sentence)
        except L2LError as error:
            message = str(error) if image is None else str(error).replace(f"{Path(image).parent}/", "")
            # Rendered as HTML, and it may contain user input.
            raise gr.Error(html.escape(message, quote=False), duration=None, print_exception=False) from None
        file = Path(tempfile.mkdtemp(dir=folder)) / "mask.png"
        save_mask(seen.mask, file)
        return seen.words, seen.prior, seen.proposal, seen.overlay, str(file)

    with gr.Blocks(title="Learning to Label", analytics_enabled=False, delete_cache=(KEEP_S, KEEP_S)) as page:
        gr.Markdown("# Learning to Label\nUpload an image and describe one object. The network segments it.")
        with gr.Row():
            # image_mode None: the file itself, not a copy in another format.
            image = gr.Image(
                label="Image", type="filepath", image_mode=None, sources=["upload", "clipboard"], buttons=[], height=360
            )
            overlay = _picture(gr, "Mask")
        with gr.Row(equal_height=True):
            sentence = gr.Textbox(
                label="Sentence", placeholder="the dog on the left", max_lines=1, max_length=MAX_SENTENCE, scale=4
            )
            button = gr.Button("Find it", variant="primary")
            download = gr.DownloadButton("Download the mask (PNG)")
        with gr.Row(visible=session.with_priors):
            prior = _picture(gr, "Prior: what the multimodal LLM points at")
            proposal = _picture(gr, "Proposal: where the object probably is")
        said = "What the multimodal LLM said" if session.with_priors else "Notes"
        words = gr.Textbox(label=said, lines=3, interactive=False)
        outputs = [words, prior, proposal, overlay, download]
        asking = [button.click, sentence.submit]
        gr.on(asking, respond, [image, sentence], outputs, api_name="segment", concurrency_limit=1)
    page.queue(max_size=QUEUE)
    # gradio's own handler would open the file and raise its own error if it is no image.
    image.preprocess = lambda upload: upload and upload.path
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        page,
        path="/",
        max_file_size=session.max_mb * 2**20,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    page.has_launched = True  # else gradio serves any local path that a request presents as an upload
    return app


def _picture(gr: Any, label: str) -> Any:
    return gr.Image(label=label, format="png", interactive=False, buttons=["fullscreen"], height=360)


def _run(app: Any, listener: socket.socket) -> None:
    import uvicorn  # type: ignore[import-not-found,unused-ignore]

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GOODBYE_S)
    uvicorn.Server(config).run(sockets=[listener])
