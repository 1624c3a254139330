"""A local OpenAI-compatible endpoint that fails on demand and counts requests."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

# fmt: off
WORDS = (  # noqa: SIM905 - shorter than a list
    "harbor bridge lantern meadow orchard tower river garden market engine blanket window ladder candle mirror basket "
    "saddle violin marble copper velvet canyon desert glacier island kettle magnet needle pepper ribbon shadow temple"
).split()
# fmt: on


@dataclass(frozen=True)
class Answers:
    """The response to a request: HTTP ``status``, ``body`` and ``headers``, sent after ``wait_s`` seconds.

    The Content-Length is ``promise`` bytes too large, so a positive value simulates a lost connection. ``trickle_s`` is
    the delay in seconds before each byte of the body.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    wait_s: float = 0.0
    promise: int = 0
    trickle_s: float = 0.0


Behaviour = Callable[[int, Mapping[str, Any]], "Answers | None"]
"""Maps the index and body of a request to its response; None: a successful completion."""


@dataclass
class ToyEndpoint:
    """Statistics of the endpoint: request ``bodies``, ``headers`` and ``times``, successful responses (``answered``, by
    request hash), and the maximum number of concurrent requests (``most``).
    """

    url: str = ""
    behave: Behaviour = lambda _index, _body: None
    bodies: list[Mapping[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    most: int = 0
    in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def completion(text: str | None, tokens_in: int = 100, tokens_out: int = 50, finish: str = "stop") -> bytes:
    """The body of a chat completion."""
    usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()


def good_reply(body: Mapping[str, Any]) -> str:
    """A reply in the format that llavactl's prompts request; it depends on the messages, so it differs per image."""
    prompt = body["messages"][0]["content"]
    rng = Random(json.dumps(body["messages"]))
    text = " ".join(f"There is a {one} beside the {other}." for one, other in (rng.sample(WORDS, 2) for _ in range(8)))
    if "one question" not in prompt and "conversation between" not in prompt:
        return text
    objects = " and the ".join(rng.sample(WORDS, 3))
    return f"Question:\nWhat is near the {objects}?\n===\nAnswer:\n{text}"


@contextmanager
def toy_endpoint(behave: Behaviour | None = None) -> Iterator[ToyEndpoint]:
    """A local endpoint with OpenAI's ``/chat/completions`` at ``url`` of the context's ``ToyEndpoint``.

    ``behave`` is called with the index and body of a request and returns its response, or None for a completion.
    """
    state = ToyEndpoint()
    if behave is not None:
        state.behave = behave

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                index = len(state.bodies)
                state.bodies.append(body)
                state.headers.append(dict(self.headers))
                state.times.append(time.monotonic())
                state.in_flight += 1
                state.most = max(state.most, state.in_flight)
            try:
                with suppress(OSError):  # the client is gone
                    _answer(self, state, body, state.behave(index, body))
            finally:
                with state.lock:
                    state.in_flight -= 1

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: Any) -> None:
            """Ignores errors of clients that were killed or disconnected."""

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(
    handler: BaseHTTPRequestHandler, state: ToyEndpoint, body: Mapping[str, Any], response: Answers | None
) -> None:
    success = response is None or (response.status == 200 and not response.body and not response.promise)
    response = response or Answers()
    text = completion(good_reply(body)) if success else response.body
    time.sleep(response.wait_s)
    if success:
        with state.lock:
            state.answered[hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()] += 1
    handler.send_response(response.status)
    for name, value in response.headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(text) + response.promise))
    handler.end_headers()
    for start in range(0, len(text), 1 if response.trickle_s else 1 << 16):
        time.sleep(response.trickle_s)
        handler.wfile.write(text[start : start + (1 if response.trickle_s else 1 << 16)])
    if response.promise:
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)
