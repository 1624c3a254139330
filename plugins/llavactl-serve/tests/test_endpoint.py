"""Requests and responses of the endpoint, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from llavactl_serve.service import Service
from starlette.testclient import TestClient

from llavactl import Assistant, ImageFile, Sampling, Turn

from .conftest import Client, body, data_url, image_part, text_part, user

URL = "/v1/chat/completions"


def chunks(client: TestClient, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a streamed answer, up to ``[DONE]``."""
    response = client.post(URL, json={**request, "stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def error(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    (key,) = document = response.json()
    assert key == "error"
    assert document["error"].keys() == {"message", "type", "param", "code"}
    return document["error"]


def test_an_answer_equals_that_of_chat(client: Client, model: Assistant, photos: Sequence[Path]) -> None:
    image = ImageFile(str(photos[0].parent), photos[0].name)
    conversations: list[tuple[list[dict[str, Any]], list[Turn]]] = [
        ([user("What is it?")], [Turn("user", ("What is it?",))]),
        (
            [user(image_part(photos[0].read_bytes()), text_part("What is it?"))],
            [Turn("user", (image, "\n", "What is it?"))],
        ),
        (
            [
                {"role": "system", "content": "Be short."},
                user(text_part("What is it?"), image_part(photos[0].read_bytes())),
                {"role": "assistant", "content": "A photo."},
                user("Which color?"),
            ],
            [
                Turn("system", ("Be short.",)),
                Turn("user", (image, "\nWhat is it?")),
                Turn("assistant", ("A photo.",)),
                Turn("user", ("Which color?",)),
            ],
        ),
        (
            [{"role": "developer", "content": [text_part("Be short.")]}, user("Hi")],
            [Turn("system", ("Be short.",)), Turn("user", ("Hi",))],
        ),
    ]
    endpoint = client()
    for messages, turns in conversations:
        request = body(*messages, max_tokens=12, temperature=0)
        answer = endpoint.post(URL, json=request).json()
        (expected,) = model.answer([turns], Sampling(max_new_tokens=12))
        (choice,) = answer["choices"]
        assert choice["message"]["role"] == "assistant"
        assert choice["message"]["content"] == expected
        assert answer["usage"]["prompt_tokens"] == len(model.prompt(turns))
        streamed = chunks(endpoint, request)
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in streamed) == expected


def test_a_complete_answer_has_openais_fields(client: Client) -> None:
    answer = client().post(URL, json=body(max_tokens=3)).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "toy"
    assert answer["choices"][0]["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + 3


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_stream_has_one_id_a_role_a_reason_and_usage(client: Client, include_usage: bool) -> None:
    request = body(stream_options={"include_usage": include_usage})
    streamed = chunks(client(), request)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in streamed}) == 1
    assert streamed[0]["choices"][0]["delta"]["role"] == "assistant"
    if include_usage:
        last = streamed.pop()
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 6
        assert all(chunk["usage"] is None for chunk in streamed)
    assert all("usage" in chunk for chunk in streamed) is include_usage
    assert [chunk["choices"][0]["finish_reason"] for chunk in streamed] == [None] * (len(streamed) - 1) + ["length"]


def test_a_stop_string_ends_the_answer(client: Client) -> None:
    endpoint = client()
    whole = endpoint.post(URL, json=body(max_tokens=30)).json()["choices"][0]["message"]["content"]
    stop = whole[8:10]
    for value in (stop, ["unseen", stop]):
        request = body(max_tokens=30, stop=value)
        (choice,) = endpoint.post(URL, json=request).json()["choices"]
        assert choice["message"]["content"] == whole[: whole.index(stop)].strip()
        assert choice["finish_reason"] == "stop"
        streamed = chunks(endpoint, request)
        assert (
            "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in streamed)
            == choice["message"]["content"]
        )
        assert streamed[-1]["choices"][0]["finish_reason"] == "stop"


def test_sampling_is_reproducible_with_a_seed(client: Client) -> None:
    endpoint = client()

    def content(**sampling: Any) -> str:
        return endpoint.post(URL, json=body(max_tokens=20, **sampling)).json()["choices"][0]["message"]["content"]

    assert content(temperature=2, seed=5) == content(temperature=2, seed=5) != content(temperature=2, seed=6)
    assert len({content(temperature=2) for _ in range(3)}) > 1
    assert content() == content(temperature=0) == content(temperature=2, top_p=1e-9) == content(temperature=1e-40)


def test_max_completion_tokens_is_the_limit_if_both_are_given(client: Client) -> None:
    answer = client().post(URL, json=body(max_tokens=9, max_completion_tokens=2)).json()
    assert answer["usage"]["completion_tokens"] == 2


def test_without_a_limit_the_default_is_cut_to_the_context(client: Client, model: Assistant) -> None:
    endpoint = client(max_new_tokens=7)
    request = body()
    del request["max_tokens"]
    assert endpoint.post(URL, json=request).json()["usage"]["completion_tokens"] == 7


def test_a_request_beyond_the_context_is_refused_with_numbers(client: Client, service: Callable[..., Service]) -> None:
    context = service().batcher.context_length
    endpoint = client()
    prompt = endpoint.post(URL, json=body()).json()["usage"]["prompt_tokens"]
    assert endpoint.post(URL, json=body(max_tokens=1, stop=["a"])).status_code == 200
    for request in (
        body(max_tokens=context - prompt + 1),
        body(user("word " * 3 * context)),
        body(user(*[image_part(b"not decoded")] * context)),
    ):
        problem = error(endpoint.post(URL, json=request), 400)
        assert problem["code"] == "context_length_exceeded"
        assert str(context) in problem["message"]


PHOTO_URL = data_url(b"x")

INVALID: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": ["Hi"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].role"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    ({"messages": [user("a"), {"role": "system", "content": "x"}, user("b")]}, "messages[1].role"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}, user("a")]}, "messages[0].tool_calls"),
    (
        {"messages": [{"role": "assistant", "content": [image_part(PHOTO_URL)]}, user("a")]},
        "messages[0].content[0].type",
    ),
    ({"messages": [user(["a"])]}, "messages[0].content[0]"),
    ({"messages": [user({"type": "input_audio"})]}, "messages[0].content[0].type"),
    ({"messages": [user({"type": "text"})]}, "messages[0].content[0].text"),
    ({"messages": [user({"type": "image_url"})]}, "messages[0].content[0].image_url"),
    ({"messages": [user({"type": "image_url", "image_url": PHOTO_URL})]}, "messages[0].content[0].image_url"),
    ({"messages": [user("\ud800")]}, "messages[0].content"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "6"}, "max_tokens"),
    ({"max_tokens": 6.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 1e400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": 3}, "stop"),
    ({"stop": [3]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x"] * 100}, "stop"),
    ({"stop": "x" * 100_000}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
    ({"n": 2}, "n"),
    ({"n": True}, "n"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"logit_bias": {"1": 5}}, "logit_bias"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"unheard_of": 1}, "unheard_of"),
    ({"model": 3}, "model"),
]


@pytest.mark.parametrize(("changes", "param"), INVALID, ids=[f"{param}-{i}" for i, (_, param) in enumerate(INVALID)])
def test_an_invalid_or_unsupported_parameter_is_named(client: Client, changes: dict[str, Any], param: str) -> None:
    content = json.dumps({**body(), **changes}).replace("Infinity", "1e400")
    problem = error(client().post(URL, content=content), 400)
    assert problem["param"] == param
    assert problem["type"] == "invalid_request_error"
    assert param.removesuffix(".role").removesuffix(".content") in problem["message"]


def test_neutral_and_harmless_parameters_are_accepted(client: Client) -> None:
    ignored = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True}
    neutral = {"n": 1, "tools": [], "tool_choice": "none", "logprobs": False, "top_logprobs": 0, "logit_bias": {}}
    neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0, "response_format": {"type": "text"}}
    null = dict.fromkeys(("seed", "stop", "stream_options", "reasoning_effort", "unheard_of"))
    messages = [
        {"role": "assistant", "content": "Hello", "refusal": None, "tool_calls": None, "audio": None},
        {"role": "user", "content": "Hi", "name": "me"},
    ]
    assert client().post(URL, json=body(*messages, **ignored, **neutral, **null)).status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"\xff\xfe{",
        b'{"messages": NaN}',
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"messages": [' + b"[]," * 1_000_000 + b"[]]}",
    ],
    ids=["empty", "cut", "list", "number", "encoding", "nan", "digits", "lists", "objects", "many"],
)
def test_a_body_that_is_not_a_json_object_is_refused(client: Client, content: bytes) -> None:
    assert error(client().post(URL, content=content), 400)["code"] == "invalid_json"


def test_a_large_body_is_refused(client: Client) -> None:
    endpoint = client(max_body_bytes=1 << 20)
    assert endpoint.post(URL, json=body(user(image_part("data:" + "x" * (1 << 19))))).status_code == 400
    for content in (b"x" * (2 << 20), iter([b"x" * (1 << 18)] * 8)):
        assert error(endpoint.post(URL, content=content), 413)["code"] == "body_too_large"


def test_an_unknown_model_is_not_found(client: Client) -> None:
    endpoint = client()
    assert error(endpoint.post(URL, json=body(model="other")), 404)["code"] == "model_not_found"
    request = body()
    del request["model"]
    assert endpoint.post(URL, json=request).json()["model"] == "toy"


def test_models_and_health(client: Client) -> None:
    endpoint = client()
    listed = endpoint.get("/v1/models").json()
    assert [each["id"] for each in listed["data"]] == ["toy"]
    assert endpoint.get("/v1/models/toy").json() == listed["data"][0]
    assert error(endpoint.get("/v1/models/other"), 404)["code"] == "model_not_found"
    assert endpoint.get("/health").json() == {"status": "ok", "model": "toy", "queue_length": 0, "running": 0}


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/models/", "/v1/completions", "/v1/chat/completions/", "/%1b%5b2J"])
def test_an_unknown_path_is_a_404(client: Client, path: str) -> None:
    error(client().get(path), 404)
    error(client().post(path), 405 if path == "/v1/models/" else 404)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", URL), ("DELETE", URL), ("POST", "/v1/models"), ("PUT", "/health"), ("OPTIONS", URL)]
)
def test_a_wrong_method_is_a_405(client: Client, method: str, path: str) -> None:
    response = client().request(method, path)
    error(response, 405)
    assert response.headers["allow"]
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_token_is_required_everywhere(client: Client) -> None:
    endpoint = client(token="secret")
    for headers in (
        {},
        {"Authorization": "Bearer other"},
        {"Authorization": "secret"},
        {"Authorization": "Basic secret"},
    ):
        for path in ("/v1/models", "/health", "/unknown"):
            response = endpoint.get(path, headers=headers)
            assert error(response, 401)["type"] == "authentication_error"
            assert response.headers["www-authenticate"] == "Bearer"
        error(endpoint.post(URL, json=body(), headers=headers), 401)
    for scheme in ("Bearer", "bearer"):
        assert endpoint.post(URL, json=body(), headers={"Authorization": f"{scheme} secret"}).status_code == 200


@pytest.mark.parametrize("token", [None, "secret"])
def test_without_a_token_names_of_other_hosts_are_refused(client: Client, token: str | None) -> None:
    endpoint = client(local=True, token=token)
    bearer = {"Authorization": "Bearer secret"}
    for host in ("127.0.0.1", "127.0.0.1:8000", "localhost:80", "LOCALHOST", "[::1]:8000", "192.0.2.1"):
        assert endpoint.get("/health", headers={"Host": host, **bearer}).status_code == 200
    for host in ("page.example", "page.example:8000", "127.0.0.1.page.example", "localhost.page.example"):
        response = endpoint.get("/health", headers={"Host": host, **bearer})
        assert response.status_code == (403 if token is None else 200)


def test_without_a_token_other_web_pages_can_not_start_answers(client: Client) -> None:
    """A page can send plain text to any address without asking first."""

    def status(origin: str, **settings: Any) -> int:
        headers = {"Host": "127.0.0.1:8000", "Origin": origin, "Content-Type": "text/plain"}
        return client(local=True, **settings).post(URL, content=json.dumps(body()), headers=headers).status_code

    for origin in ("http://page.example", "null", "http://127.0.0.1:8000"):
        assert status(origin) == 403
    for allowed in ("http://page.example", "*"):
        assert status("http://page.example", cors=(allowed,)) == 200


def test_web_pages_of_given_origins_are_allowed(client: Client) -> None:
    page, other = {"Origin": "http://page.example"}, {"Origin": "http://other.example"}
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    endpoint = client(cors=("http://page.example",), token="secret")
    allowed = endpoint.options(URL, headers={**page, **preflight})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "http://page.example"
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    answered = endpoint.post(URL, json=body(), headers={**page, "Authorization": "Bearer secret"})
    assert answered.headers["access-control-allow-origin"] == "http://page.example"
    assert "access-control-allow-origin" not in endpoint.get("/health", headers=other).headers
    assert "access-control-allow-origin" not in client().get("/health", headers=page).headers


def test_one_line_per_request_is_logged(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "llavactl")
    endpoint = client()
    endpoint.post(URL, json=body(user("a secret"), max_tokens=3))
    endpoint.get("/a%0Ab")
    endpoint.get("/health")
    first, second = caplog.messages
    assert " 200 " in first
    assert "+ 3 tokens" in first
    assert "secret" not in first
    assert " 404 " in second
    assert "\n" not in second


def test_an_unexpected_exception_is_logged_and_a_500(
    client: Client, model: Assistant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = client()
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "prompt", lambda *_: 1 / 0)
        assert error(endpoint.post(URL, json=body()), 500)["code"] == "internal_error"
    with monkeypatch.context() as patch:
        patch.setattr(model.model, "embed", lambda *_: 1 / 0)
        for stream in (False, True):
            assert error(endpoint.post(URL, json=body(stream=stream)), 500)["code"] == "internal_error"
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError] * 3
    assert endpoint.post(URL, json=body()).status_code == 200


def test_simultaneous_requests_are_answered_as_alone(client: Client, photos: Sequence[Path]) -> None:
    requests = [
        body(user(image_part(photos[i % 4].read_bytes()), text_part("What is it?" * (i + 1))), max_tokens=5 + 3 * i)
        for i in range(8)
    ]
    with client() as endpoint, ThreadPoolExecutor(8) as pool:
        alone = [endpoint.post(URL, json=request).json() for request in requests]
        together = [*pool.map(lambda request: endpoint.post(URL, json=request).json(), requests)]
    for one, other in zip(alone, together, strict=True):
        assert one["choices"] == other["choices"]
        assert one["usage"] == other["usage"]
    assert len({answer["id"] for answer in together}) == 8
