"""An OpenAI-compatible server on 127.0.0.1 whose responses depend on the request alone, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, bytes]
Respond = Callable[[dict[str, Any], int], Reply]


def text_of(body: dict[str, Any]) -> str:
    """The question of a request."""
    return str(body["messages"][0]["content"][1]["text"])


def sentence_of(body: dict[str, Any]) -> str:
    return text_of(body).split('"')[-2]


def completion(text: str, prompt_tokens: int = 100, completion_tokens: int = 10) -> Reply:
    """A body as `vllm serve` writes it."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": text,
        "refusal": None,
        "tool_calls": [],
        "reasoning": None,
    }
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    usage = {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": None,
    }
    body = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return 200, json.dumps(body | {"usage": usage}).encode()


def some_box(body: dict[str, Any], _: int = 0) -> Reply:
    """A usable response whose box and tokens are a function of the question and the seed."""
    digest = hashlib.sha256(f"{text_of(body)} {body['seed']}".encode()).digest()
    x, y = digest[0] % 40, digest[1] % 40
    said = {"found": True, "target": "cup", "attributes": ["red"], "relation": "left of", "anchor": "the box"}
    said |= {"boxes": [[x, y, x + 20, y + 20]], "point": [x + 9, y + 9], "confidence": digest[2] / 255}
    return completion(json.dumps(said), 100 + digest[3], digest[4])


@dataclass
class Stub:
    """The requests that the server got, and how it responds: `respond` gets a request and how often it came before."""

    respond: Respond = some_box
    delay_s: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""
    _seen: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, body: dict[str, Any], key: str | None) -> Reply:
        with self._lock:
            name = json.dumps(body)
            before = self._seen[name]
            self._seen[name] += 1
            self.bodies.append(body)
            self.keys.append(key)
        time.sleep(self.delay_s)
        return self.respond(body, before)


@contextmanager
def serve(stub: Stub) -> Iterator[Stub]:
    """Runs the server; `stub.url` is what priors.engine.server_url is to be."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, content = stub.take(body, self.headers["Authorization"])
            try:
                self.send_response(status if self.path == "/v1/chat/completions" else 404)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                self.close_connection = True  # the client was killed or has given up

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_: object) -> None:
            pass  # a client that is killed while it writes

    server = Server(("127.0.0.1", 0), Handler)
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
