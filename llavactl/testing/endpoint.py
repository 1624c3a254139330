"""A chat endpoint on this machine that misbehaves on demand and counts what really arrives."""

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
WORDS = (  # noqa: SIM905 - a word each
    "harbor bridge lantern meadow orchard tower river garden market engine blanket window ladder candle mirror basket "
    "saddle violin marble copper velvet canyon desert glacier island kettle magnet needle pepper ribbon shadow temple"
).split()
# fmt: on


@dataclass(frozen=True)
class Answers:
    """How one request is answered: HTTP ``status``, ``body`` and ``headers``, after ``wait_s`` seconds.

    ``promise`` more bytes are announced than are sent: the connection is cut. ``trickle_s`` is waited before every
    byte of the body.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    wait_s: float = 0.0
    promise: int = 0
    trickle_s: float = 0.0


Behaviour = Callable[[int, Mapping[str, Any]], "Answers | None"]
"""From the number of a request (from 0) and its body to what it is answered; None: well."""


@dataclass
class ToyEndpoint:
    """What arrived: the ``bodies`` of all requests, how often each was ``answered`` well, ``most`` at a time."""

    url: str = ""
    behave: Behaviour = lambda _number, _body: None
    bodies: list[Mapping[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    most: int = 0
    flying: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def completion(text: str | None, tokens_in: int = 100, tokens_out: int = 50, finish: str = "stop") -> bytes:
    """The body of a chat completion."""
    usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()


def good_reply(body: Mapping[str, Any]) -> str:
    """A reply of the form that llavactl's own prompts ask for, another for every picture."""
    asked = body["messages"][0]["content"]
    rng = Random(json.dumps(body["messages"]))
    told = " ".join(f"There is a {one} beside the {other}." for one, other in (rng.sample(WORDS, 2) for _ in range(8)))
    if "one question" not in asked and "conversation between" not in asked:
        return told
    things = " and the ".join(rng.sample(WORDS, 3))
    return f"Question:\nWhat is near the {things}?\n===\nAnswer:\n{told}"


@contextmanager
def toy_endpoint(behave: Behaviour | None = None) -> Iterator[ToyEndpoint]:
    """A server that answers until the block ends; ``behave`` decides how."""
    state = ToyEndpoint()
    if behave is not None:
        state.behave = behave

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                number = len(state.bodies)
                state.bodies.append(body)
                state.headers.append(dict(self.headers))
                state.times.append(time.monotonic())
                state.flying += 1
                state.most = max(state.most, state.flying)
            try:
                with suppress(OSError):  # whoever asked has gone
                    _answer(self, state, body, state.behave(number, body))
            finally:
                with state.lock:
                    state.flying -= 1

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: Any) -> None:
            """Clients that are killed or hang up are what this is for."""

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


def _answer(handler: BaseHTTPRequestHandler, state: ToyEndpoint, body: Mapping[str, Any], how: Answers | None) -> None:
    well = how is None or (how.status == 200 and not how.body and not how.promise)
    how = how or Answers()
    text = completion(good_reply(body)) if well else how.body
    time.sleep(how.wait_s)
    if well:
        with state.lock:
            state.answered[hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()] += 1
    handler.send_response(how.status)
    for name, value in how.headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(text) + how.promise))
    handler.end_headers()
    for start in range(0, len(text), 1 if how.trickle_s else 1 << 16):
        time.sleep(how.trickle_s)
        handler.wfile.write(text[start : start + (1 if how.trickle_s else 1 << 16)])
    if how.promise:
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)
