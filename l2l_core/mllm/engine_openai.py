"""Models behind an OpenAI-compatible server: `vllm serve`, similar servers, or a hosted one."""

from __future__ import annotations

import base64
import io
import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import requests as http
from PIL import Image
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, NewConnectionError
from urllib3.util import Retry

from l2l_core.config import PriorsParams
from l2l_core.errors import ConfigError, InputError, redacted
from l2l_core.mllm.engine import Completion, Request

BACKOFF_S = 1.0
"""Waits between tries are 0, 2, 4, 8, ... times this: a server that restarts or is full needs seconds, not more."""
PASSING = (408, 429, 500, 502, 503, 504)
"""Statuses that a retry may resolve: timeout, too many requests, server errors."""
KEY_VARIABLE = "OPENAI_API_KEY"
RESPONSE_BYTES = 1 << 24
"""Largest response: far more than a model writes, and little memory."""
MAX_TOKENS = 10**8
"""More than any request has; the sum over all attempts fits into the table."""


class OpenAIEngine:
    """A model at `priors.engine.server_url`; the variable OPENAI_API_KEY holds the key, if the server needs one."""

    precision = None  # chosen by the server

    def __init__(self, params: PriorsParams) -> None:
        engine = params.engine
        self._model = params.model
        self._url = f"{engine.server_url.rstrip('/')}/chat/completions"
        self._timeout_s = engine.timeout_s
        self._concurrency = engine.concurrency
        retry = Retry(
            total=engine.server_retries,
            allowed_methods=None,  # all: a repeated query is harmless
            status_forcelist=PASSING,
            backoff_factor=BACKOFF_S,
            respect_retry_after_header=True,
            raise_on_status=False,
        )
        self._session = http.Session()
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=engine.concurrency, max_retries=retry)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)
        if key := api_key():
            self._session.headers["Authorization"] = f"Bearer {key}"

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Send `priors.engine.concurrency` requests at a time; mark those that the server rejects or never completes.

        Raises InputError if no server listens, and ConfigError if it rejects the model or the key.
        """
        urls = _DataUrls(keep=2 * self._concurrency)
        with ThreadPoolExecutor(self._concurrency) as pool:
            return list(pool.map(lambda request: self._query(request, urls.of(request.image)), requests))

    def _query(self, request: Request, image_url: str) -> Completion:
        try:
            query = self._body(request, image_url)
            with self._session.post(self._url, json=query, timeout=self._timeout_s, stream=True) as response:
                body = _receive(response, time.monotonic() + self._timeout_s)
        except http.ConnectionError as error:
            reason = getattr(error.args[0], "reason", None) if error.args else None
            if isinstance(reason, NewConnectionError):
                raise InputError(
                    f"{self._url}: no server listens there; start one or set priors.engine.server_url"
                ) from None
            return Completion("", failure=type(reason or error).__name__)
        except (http.RequestException, HTTPError) as error:
            return Completion("", failure=type(error).__name__)
        if response.status_code in (401, 403, 404):
            raise ConfigError(
                f"{self._url}: HTTP {response.status_code} for priors.model {self._model!r}: "
                f"{' '.join(body.decode(errors='replace').split())[:200]}; check model, server_url and {KEY_VARIABLE}"
            )
        if response.status_code != 200:
            return Completion("", failure=f"HTTP {response.status_code}")
        return _read(body)

    def _body(self, request: Request, image_url: str) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": image_url}},
            {"type": "text", "text": request.text},
        ]
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": request.temperature,
            "seed": request.seed,
            "max_tokens": request.max_tokens,
        }
        if request.schema is not None:
            schema = {"name": "response", "strict": True, "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body


def api_key() -> str:
    """The key in OPENAI_API_KEY; empty if there is none. Raises ConfigError if no HTTP header can hold it."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{KEY_VARIABLE}: it holds characters that no key has; copy it again")
    return key


def _receive(response: http.Response, deadline: float) -> bytes:
    """The whole body. A server may send it byte by byte or without end: raises Timeout and ContentDecodingError."""
    body = bytearray()
    while piece := response.raw.read1(RESPONSE_BYTES, decode_content=True):
        body += piece
        if len(body) > RESPONSE_BYTES:
            raise http.exceptions.ContentDecodingError
        if time.monotonic() > deadline:
            raise http.Timeout
    return bytes(body)


def _read(body: bytes) -> Completion:
    """Text and token counts of a chat completion; a body of another form is a failure."""
    try:
        response = json.loads(body)
        usage = response.get("usage") or {}
        return Completion(
            text=redacted(str(response["choices"][0]["message"]["content"] or "")),
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return Completion("", failure="not a chat completion")


def _count(tokens: object) -> int:
    """A number of tokens as a server states it; 0 if it cannot be one."""
    return tokens if type(tokens) is int and 0 <= tokens <= MAX_TOKENS else 0


class _DataUrls:
    """Data URLs of images; each image is encoded once for the consecutive requests about it.

    Images are identified by object identity, so they must outlive this cache. It holds the last `keep` URLs.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._urls: dict[int, Future[str]] = {}

    def of(self, image: Image.Image) -> str:
        """The data URL; the first thread that needs it encodes the image and others wait."""
        with self._lock:
            known = self._urls.get(id(image))
            url = known or self._urls.setdefault(id(image), Future())
            if len(self._urls) > self._keep:
                del self._urls[next(iter(self._urls))]
        if known is None:
            try:
                url.set_result(_data_url(image))
            except BaseException as error:
                url.set_exception(error)
        return url.result()


def _data_url(image: Image.Image) -> str:
    """PNG is lossless: the server sees the same pixels as an engine in this process."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)  # for a nearby server, speed matters more than size
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
