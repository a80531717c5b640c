"""OpenAIEngine against a stub server on 127.0.0.1: request format, response parsing and error handling."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from prior_tables import prior_params

from bench.stub_server import Reply, Stub, completion, sentence_of, serve
from l2l_core.errors import ConfigError, InputError
from l2l_core.mllm import engine_openai
from l2l_core.mllm.engine import Completion, Request
from l2l_core.mllm.engine_openai import OpenAIEngine
from l2l_core.mllm.prompt import prompt_text, response_schema

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
SCHEMA = response_schema("box-2", "norm1000")


@pytest.fixture(autouse=True)
def _near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(engine_openai, "BACKOFF_S", 0.01)


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serve(Stub()) as running:
        yield running


def engine(url: str, **changes: object) -> OpenAIEngine:
    settings = {"server_url": url, "concurrency": 4, "timeout_s": 5.0, "server_retries": 3} | changes
    return OpenAIEngine(prior_params(backend="openai", model="qwen3-vl", engine=settings))


def request(sentence: str, schema: dict[str, object] | None = SCHEMA) -> Request:
    return Request(Image.fromarray(PIXELS), prompt_text("box-2", sentence, "norm1000"), schema, 0.7, 11, 64)


def test_sends_the_key_settings_schema_image_and_prompt(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    engine(stub.url + "/").generate([request("red cup")])
    (body,) = stub.bodies
    assert stub.keys == ["Bearer secret"]
    assert {key: body[key] for key in ("model", "temperature", "seed", "max_tokens")} == {
        "model": "qwen3-vl",
        "temperature": 0.7,
        "seed": 11,
        "max_tokens": 64,
    }
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA
    image, text = body["messages"][0]["content"]  # in this order
    assert text == {"type": "text", "text": prompt_text("box-2", "red cup", "norm1000")}
    kind, _, data = image["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) == PIXELS).all()


def test_an_image_is_encoded_once_for_all_its_sentences(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    encode = engine_openai._data_url
    monkeypatch.setattr(
        engine_openai, "_data_url", lambda image: encoded.append(image.getpixel((0, 0))) or encode(image)
    )
    images = [Image.new("RGB", (6, 4), (number, 0, 0)) for number in range(6)]
    plain = request("red cup")
    engine(stub.url).generate([replace(plain, image=image) for image in images for _ in range(7)])
    assert sorted(encoded) == [(number, 0, 0) for number in range(6)]
    sent = sorted(body["messages"][0]["content"][0]["image_url"]["url"] for body in stub.bodies)
    assert sent == sorted(encode(image) for image in images for _ in range(7))


def test_omits_the_schema_and_key_when_unset(stub: Stub) -> None:
    engine(stub.url).generate([request("red cup", schema=None)])
    assert "response_format" not in stub.bodies[0]
    assert stub.keys == [None]


def test_returns_completions_in_request_order(stub: Stub) -> None:
    stub.respond = lambda body, _: completion(sentence_of(body), len(sentence_of(body)), 2)
    sentences = [f"thing {number}" * (1 + number % 3) for number in range(20)]
    done = engine(stub.url).generate([request(sentence) for sentence in sentences])
    assert done == [Completion(sentence, len(sentence), 2) for sentence in sentences]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_retries_transient_http_errors(stub: Stub, status: int) -> None:
    stub.respond = lambda _, before: (status, b"busy") if before < 2 else completion("here")
    assert [done.text for done in engine(stub.url).generate([request("cup")])] == ["here"]
    assert len(stub.bodies) == 3


@pytest.mark.parametrize(
    ("status", "times"),
    [(429, 4), (500, 4), (400, 1), (413, 1)],  # client errors are not retried
)
def test_marks_persistent_http_errors_and_keeps_the_other_completions(stub: Stub, status: int, times: int) -> None:
    def respond(body: dict[str, object], _: int) -> Reply:
        return (status, b"no") if sentence_of(body) == "bad" else completion("here")

    stub.respond = respond
    done = engine(stub.url).generate([request(sentence) for sentence in ("good", "bad", "fine")])
    assert [(entry.text, entry.failure) for entry in done] == [("here", ""), ("", f"HTTP {status}"), ("here", "")]
    assert len(stub.bodies) == 2 + times


def test_marks_a_read_timeout(stub: Stub) -> None:
    stub.delay_s = 1.0
    (done,) = engine(stub.url, timeout_s=0.1, server_retries=1).generate([request("cup")])
    assert done == Completion("", failure="ReadTimeoutError")
    assert len(stub.bodies) == 2


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": 1}]}'])
def test_marks_a_body_that_is_not_a_chat_completion(stub: Stub, body: bytes) -> None:
    stub.respond = lambda *_: (200, body)
    assert engine(stub.url).generate([request("cup")]) == [Completion("", failure="not a chat completion")]


def test_a_refusal_becomes_an_empty_completion(stub: Stub) -> None:
    body = json.loads(completion("")[1])
    body["choices"][0]["message"]["content"] = None
    del body["usage"]
    stub.respond = lambda *_: (200, json.dumps(body).encode())
    assert engine(stub.url).generate([request("cup")]) == [Completion("")]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_authorization_or_unknown_model_error_stops_the_run(stub: Stub, status: int) -> None:
    stub.respond = lambda *_: (status, b'{"message": "no model\\n qwen3-vl"}')
    with pytest.raises(ConfigError, match=rf"HTTP {status} for priors\.model 'qwen3-vl': .*no model.* check model"):
        engine(stub.url).generate([request(f"thing {number}") for number in range(9)])


def test_an_unreachable_server_stops_the_run() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(InputError, match=r"no server listens there; .*priors\.engine\.server_url$"):
        engine(f"http://127.0.0.1:{port}/v1").generate([request("cup")])


# --- servers that misbehave


def test_a_server_that_repeats_the_key_does_not_get_it_printed(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1234567890")
    stub.respond = lambda *_: (401, b"bad key Bearer sk-1234567890")
    with pytest.raises(ConfigError, match=r"bad key Bearer \*\*\*; check model") as caught:
        engine(stub.url.replace("http://", "http://me:hunter22@")).generate([request("cup")])
    assert not {"sk-1234567890", "hunter22"} & set(re.findall(r"[\w-]+", str(caught.value)))
    stub.respond = lambda *_: completion("your key is sk-1234567890")
    assert [done.text for done in engine(stub.url).generate([request("cup")])] == ["your key is ***"]


@pytest.mark.parametrize("key", ["sk-\u00e9", "sk-\u20ac", "sk-1\nX: 2"])
def test_refuses_a_key_that_no_header_can_hold(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY: it holds characters that no key has") as caught:
        engine("http://127.0.0.1:1/v1")
    assert key not in str(caught.value)


def test_strips_the_line_end_after_a_key(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    engine(stub.url).generate([request("red cup")])
    assert stub.keys == ["Bearer secret"]


@pytest.mark.parametrize("tokens", ["1e999", "1000000000000", "-1", '"many"', "true", "null", "[1]", "NaN"])
def test_impossible_token_counts_count_as_none(stub: Stub, tokens: str) -> None:
    body = completion("here", 7, 8)[1].replace(b'"prompt_tokens": 7', f'"prompt_tokens": {tokens}'.encode())
    stub.respond = lambda *_: (200, body)
    assert engine(stub.url).generate([request("cup")]) == [Completion("here", 0, 8)]


def test_deeply_nested_json_is_not_a_chat_completion(stub: Stub) -> None:
    stub.respond = lambda *_: (200, b"[" * 1_000_000)
    assert engine(stub.url).generate([request("cup")]) == [Completion("", failure="not a chat completion")]


def test_gives_up_on_an_endless_body(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_openai, "RESPONSE_BYTES", 1000)
    stub.respond = lambda *_: (200, b" " * 1001 + completion("here")[1])
    assert engine(stub.url).generate([request("cup")]) == [Completion("", failure="ContentDecodingError")]


def test_gives_up_on_a_body_that_drips_past_the_timeout() -> None:
    """Each byte comes long before a read times out, so without a deadline the request would take an hour."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 20)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                while not ended.wait(0.02):
                    with suppress(OSError):
                        connection.sendall(b" ")

        thread = threading.Thread(target=drip)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        done = engine(url, timeout_s=0.3, server_retries=0).generate([request("cup")])
        ended.set()
        thread.join()
    assert done == [Completion("", failure="Timeout")]
