"""Models behind an OpenAI-compatible server: `vllm serve`, others of its kind, or a hosted one."""

from __future__ import annotations

import base64
import io
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import requests as http
from PIL import Image
from requests.adapters import HTTPAdapter
from urllib3.exceptions import NewConnectionError
from urllib3.util import Retry

from l2l_core.config import PriorsParams
from l2l_core.errors import ConfigError, InputError
from l2l_core.mllm.engine import Completion, Request

BACKOFF_S = 1.0
"""Waits between tries are 0, 2, 4, 8, ... of these: a server that starts anew or is full needs seconds, not more."""
PASSING = (408, 429, 500, 502, 503, 504)
"""Statuses that may be gone at the next try: timeout, too many requests, trouble of the server's own."""
KEY_VARIABLE = "OPENAI_API_KEY"


class OpenAIEngine:
    """A model at `priors.engine.server_url`; the key, where one is needed, comes from the variable OPENAI_API_KEY."""

    precision = None  # the server's own affair

    def __init__(self, params: PriorsParams) -> None:
        engine = params.engine
        self._model = params.model
        self._url = f"{engine.server_url.rstrip('/')}/chat/completions"
        self._timeout_s = engine.timeout_s
        self._concurrency = engine.concurrency
        retry = Retry(
            total=engine.server_retries,
            allowed_methods=None,  # all: asking twice does no harm
            status_forcelist=PASSING,
            backoff_factor=BACKOFF_S,
            respect_retry_after_header=True,
            raise_on_status=False,
        )
        self._session = http.Session()
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=engine.concurrency, max_retries=retry)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)
        if KEY_VARIABLE in os.environ:
            self._session.headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Ask `priors.engine.concurrency` at a time; what a server refuses or never answers is marked.

        Raises InputError where no server listens, and ConfigError where it knows no such model or key.
        """
        urls = _DataUrls(keep=2 * self._concurrency)
        with ThreadPoolExecutor(self._concurrency) as pool:
            return list(pool.map(lambda request: self._ask(request, urls.of(request.image)), requests))

    def _ask(self, request: Request, image_url: str) -> Completion:
        try:
            response = self._session.post(self._url, json=self._body(request, image_url), timeout=self._timeout_s)
        except http.ConnectionError as error:
            reason = getattr(error.args[0], "reason", None) if error.args else None
            if isinstance(reason, NewConnectionError):
                raise InputError(
                    f"{self._url}: no server listens there; start one or set priors.engine.server_url. What was "
                    "answered so far is kept: run again to go on"
                ) from None
            return Completion("", failure=type(reason or error).__name__)
        except http.RequestException as error:
            return Completion("", failure=type(error).__name__)
        if response.status_code in (401, 403, 404):
            raise ConfigError(
                f"{self._url}: HTTP {response.status_code} for priors.model {self._model!r}: "
                f"{' '.join(response.text.split())[:200]}; check model, server_url and {KEY_VARIABLE}"
            )
        if response.status_code != 200:
            return Completion("", failure=f"HTTP {response.status_code}")
        return _read(response)

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
            schema = {"name": "answer", "strict": True, "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body


def _read(response: http.Response) -> Completion:
    """A chat completion's text and tokens; a body of another form is a failure."""
    try:
        body = response.json()
        usage = body.get("usage") or {}
        return Completion(
            text=str(body["choices"][0]["message"]["content"] or ""),
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            completion_tokens=int(usage.get("completion_tokens", 0)),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Completion("", failure="not a chat completion")


class _DataUrls:
    """Data URLs of images, each encoded once for the requests about it, which follow each other.

    Images must live as long as this does: they are known by their identity. The last `keep` are held.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._urls: dict[int, Future[str]] = {}

    def of(self, image: Image.Image) -> str:
        """Encoded by the first thread that asks; others wait for it."""
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
    """PNG: the server sees the same pixels as an engine in this process."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)  # time counts more than size on the way to a near server
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
