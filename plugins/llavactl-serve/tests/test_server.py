"""The command as a process: real connections, OpenAI's client, curl, slow and broken clients, signals."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import llavactl
from llavactl import Assistant, ImageFile, Sampling, Turn

from .conftest import body, image_part, text_part, user

pytestmark = pytest.mark.slow

LONG = user("What is it?")
"""The toy model's answer ends at the token limit."""


class Server:
    """A running ``llavactl serve``."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "llavactl.cli", "serve", "--model", str(folder), "--name", "toy"]
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--json", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        assert first, self.process.communicate()[1]
        self.ready = json.loads(first)
        self.url: str = self.ready["url"]
        self.port = int(self.url.split(":")[2].partition("/")[0])

    def get(self, path: str, **headers: str) -> Any:
        with urllib.request.urlopen(urllib.request.Request(f"{self.url[:-3]}{path}", headers=headers)) as response:
            return json.load(response)

    def post(self, request: Any, **headers: str) -> Any:
        data = json.dumps(request).encode()
        with urllib.request.urlopen(
            urllib.request.Request(f"{self.url}/chat/completions", data, headers), timeout=60
        ) as response:
            return json.load(response)

    def raw(self, request: Any, *, receive_buffer: int = 0, times: int = 1) -> socket.socket:
        """A connection on which ``request`` was sent, several ``times`` without waiting for answers."""
        connection = socket.socket()
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", self.port))
        data = json.dumps(request).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall((head.encode() + data) * times)
        return connection

    def wait_for(self, condition: Callable[[dict[str, Any]], bool], seconds: float = 60) -> None:
        """Waits until the state of ``/health`` satisfies ``condition``."""
        end = time.monotonic() + seconds
        while not condition(state := self.get("/health")):
            assert time.monotonic() < end, state
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """The exit code and the logs after the signal ``number``."""
        self.process.send_signal(number)
        _, logs = self.process.communicate(timeout=60)
        return self.process.returncode, logs


Start = Callable[..., Server]


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    servers: list[Server] = []

    def make(*arguments: str, **environment: str) -> Server:
        servers.append(Server(folder, *arguments, **environment))
        return servers[-1]

    yield make
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


def idle(state: dict[str, Any]) -> bool:
    return state["queue_length"] == state["running"] == 0


def remainder(connection: socket.socket) -> bytes:
    """What is left to read, until the server ends the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            received += piece
    return received


def status_of(call: Callable[[], Any]) -> int:
    try:
        call()
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def test_openais_client_gets_eight_answers_at_once(start: Start, model: Assistant, photos: Sequence[Path]) -> None:
    openai = pytest.importorskip("openai")
    server = start()
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    assert [each.id for each in client.models.list()] == ["toy"]
    questions = [(photos[i % 4], f"{'What is it? ' * (i + 1)}", 8 + 5 * i) for i in range(8)]

    def ask(index: int) -> tuple[str, Any]:
        photo, text, limit = questions[index]
        options: dict[str, Any] = {
            "model": "toy",
            "messages": [user(image_part(photo.read_bytes()), text_part(text))],
            "max_tokens": limit,
            "temperature": 0,
        }
        if index % 2:
            reply = client.chat.completions.create(**options)
            return reply.choices[0].message.content, reply.usage
        usage, content = None, ""
        for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            content += chunk.choices[0].delta.content or "" if chunk.choices else ""
        return content, usage

    with ThreadPoolExecutor(8) as pool:
        replies = [*pool.map(ask, range(8))]
    for (photo, text, limit), (content, usage) in zip(questions, replies, strict=True):
        turns = [Turn("user", (ImageFile(str(photo.parent), photo.name), "\n", text))]
        assert [content] == model.answer([turns], Sampling(max_new_tokens=limit))
        assert usage.prompt_tokens == len(model.prompt(turns))
        assert usage.completion_tokens <= limit


def test_openais_client_gets_typed_errors(start: Start) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=start("--token", "secret").url, api_key="secret", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()
    request: dict[str, Any] = {"model": "toy", "messages": [LONG]}
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**request, "model": "other"})
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**request, n=3)
    assert caught.value.param == "n"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**request, max_tokens=100_000)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_streams_an_answer_and_reads_the_refusal_of_a_large_body(start: Start, tmp_path: Path) -> None:
    server = start("--max-body", "1")
    post = ["curl", "-sS", "--max-time", "60", f"{server.url}/chat/completions", "-H", "Content-Type: application/json"]
    request = json.dumps(body(LONG, stream=True))
    done = subprocess.run([*post, "-N", "-d", request], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("data: [DONE]")
    (tmp_path / "large.json").write_text("x" * (64 << 20))
    for more in ((), ("-H", "Transfer-Encoding: chunked"), ("-H", "Expect:")):
        command = [*post, *more, "--data-binary", f"@{tmp_path / 'large.json'}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["error"]["code"] == "body_too_large"
    assert server.post(body())["usage"]["completion_tokens"] == 6


def test_a_full_queue_is_a_429_and_the_others_are_answered(start: Start) -> None:
    server = start("--max-batch", "2", "--max-queue", "1")
    with ThreadPoolExecutor(8) as pool:
        codes = [*pool.map(lambda _: status_of(lambda: server.post(body(LONG, max_tokens=400))), range(8))]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 3
    server.wait_for(idle)
    running = [server.raw(body(LONG, max_tokens=1900, stream=True)) for _ in range(3)]
    server.wait_for(lambda state: state["running"] == 2 and state["queue_length"] == 1)
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post(body())
    assert caught.value.code == 429
    assert int(caught.value.headers["Retry-After"]) >= 1
    for connection in running:
        connection.close()
    server.wait_for(idle)
    assert server.post(body())["usage"]["completion_tokens"] == 6


def test_answers_are_cancelled_when_their_clients_disconnect(start: Start) -> None:
    server = start("--max-batch", "2")
    running = [server.raw(body(LONG, max_tokens=1900, stream=stream)) for stream in (True, False)]
    server.wait_for(lambda state: state["running"] == 2)
    waiting = [server.raw(body(LONG, max_tokens=1900, stream=stream)) for stream in (True, False)]
    server.wait_for(lambda state: state["queue_length"] == 2)
    for connection in waiting:
        connection.close()
    server.wait_for(lambda state: state["queue_length"] == 0)
    for connection in running:
        connection.close()
    server.wait_for(idle)
    assert "tokens" not in server.stop()[1]  # none is complete


def test_a_slow_reader_delays_nobody(start: Start) -> None:
    server = start("--max-batch", "2")
    reader = server.raw(body(LONG, max_tokens=1900, stream=True), receive_buffer=2048)
    server.post(body(LONG, max_tokens=50))
    assert server.get("/health")["running"] == 1  # answered before the reader's
    server.wait_for(idle)  # its answer is complete, although nothing was read
    received = b""
    while piece := reader.recv(65536):
        received += piece
        if received.endswith(b"0\r\n\r\n"):
            break
    assert received.count(b'"finish_reason": "length"') == 1
    assert b"data: [DONE]" in received


def test_a_client_that_stops_reading_or_sending_is_disconnected(folder: Path) -> None:
    code = (
        "import sys, llavactl_serve.server as server; server.STALL_TIMEOUT_S = 1.0;"
        "from llavactl.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "serve", "--model", str(folder), "--name", "toy", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        server = Server.__new__(Server)
        server.url = process.stdout.readline().strip()
        server.port = int(server.url.split(":")[2].partition("/")[0])
        try:
            request, times = body(max_tokens=100, stream=True), 100  # more than all buffers hold
            reader = server.raw(request, receive_buffer=2048, times=times)
            silent = socket.create_connection(("127.0.0.1", server.port))
            silent.sendall(b"POST /v1/chat")
            time.sleep(2)
            assert remainder(silent) == b""
            quiet = 0
            while quiet < 50:  # the server is waiting for the reader, or has disconnected it
                quiet = quiet + 1 if idle(server.get("/health")) else 0
                time.sleep(0.1)
            received = remainder(reader)
            assert received.startswith(b"HTTP/1.1 200")
            assert received.count(b"[DONE]") < times
            assert server.post(body())["usage"]["completion_tokens"] == 6
        finally:
            process.kill()


def test_a_request_that_takes_too_long_is_cancelled(start: Start) -> None:
    server = start("--max-batch", "1", "--timeout", "3")
    assert status_of(lambda: server.post(body(LONG, max_tokens=1900))) == 504
    server.wait_for(idle)
    connection = server.raw(body(LONG, max_tokens=1900, stream=True))
    received = b""
    while b"0\r\n\r\n" not in received:
        received += connection.recv(65536)
    events = [json.loads(line[6:]) for line in received.split(b"\r\n") if line.startswith(b'data: {"error')]
    assert [event["error"]["code"] for event in events] == ["timeout"]
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    assert connection.recv(100).startswith(b"HTTP/1.1 408")
    assert server.post(body())["usage"]["completion_tokens"] == 6


def test_another_host_needs_a_token(start: Start) -> None:
    server = start("--host", "0.0.0.0")
    token = server.ready["token"]
    assert len(token) >= 32
    server.url = server.url.replace("0.0.0.0", "127.0.0.1")
    assert status_of(lambda: server.get("/v1/models")) == 401
    assert server.get("/v1/models", Authorization=f"Bearer {token}")["data"][0]["id"] == "toy"
    own = start("--host", "0.0.0.0", LLAVACTL_SERVE_TOKEN="from-the-environment")
    assert own.ready["token"] is None
    own.url = own.url.replace("0.0.0.0", "127.0.0.1")
    assert status_of(lambda: own.get("/v1/models")) == 401
    assert own.get("/v1/models", Authorization="Bearer from-the-environment")["data"]
    for each in (server, own):
        assert "environment" not in each.stop()[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_running_answers_with_an_error(start: Start, number: int, code: int) -> None:
    server = start("--max-batch", "2")
    stream = server.raw(body(LONG, max_tokens=1900, stream=True))
    assert stream.recv(1) == b"H"
    other, waiting = (server.raw(body(LONG, max_tokens=1900)) for _ in range(2))
    server.wait_for(lambda state: state["running"] == 2 and state["queue_length"] == 1)
    with ThreadPoolExecutor(3) as pool:
        received = {each: pool.submit(remainder, each) for each in (stream, other, waiting)}
        returned, logs = server.stop(number)
    assert returned == code
    assert "Traceback" not in logs
    assert "tokens" not in logs  # no answer is complete
    assert logs.rstrip().endswith("interrupted")
    assert received[stream].result().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert b'"code": "shutting_down"' in received[stream].result()
    for each in (other, waiting):
        assert received[each].result().startswith(b"HTTP/1.1 503")
        assert b'"code": "shutting_down"' in received[each].result()


def test_quiet_logs_nothing(start: Start) -> None:
    server = start("-q")
    server.post(body())
    _, logs = server.stop()
    assert logs.split() == ["interrupted"]


def test_the_newest_model_of_a_recipe_is_served(tmp_path: Path) -> None:
    from llavactl.testing import toy_recipe

    recipe = toy_recipe(tmp_path, photos=4)
    loaded = llavactl.load_recipe(recipe, {"run_dir": str(tmp_path / "run"), "stage1.epochs": 1})
    llavactl.extract(loaded)
    llavactl.train(loaded, 1)
    command = [sys.executable, "-m", "llavactl.cli", "serve", "-r", str(recipe), "-o", f"run_dir={tmp_path / 'run'}"]
    with subprocess.Popen(
        [*command, "--port", "0", "--json"], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        process.terminate()
    assert ready["model"] == "run/stage1/model"
