"""Who may ask for what, with the complete application and no browser."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")

from llavactl_web import server
from llavactl_web.guard import Access, Guard, policy
from llavactl_web.sessions import Model, Sessions, Setup
from llavactl_web.store import Conversations, Votes
from starlette.testclient import TestClient

from llavactl import Assistant, RecipeError

LOCAL = "http://127.0.0.1:7860"


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("web") / "conversations"


@pytest.fixture(scope="module")
def client(model: Assistant, conversations: Path) -> Iterator[Any]:
    """Makes clients of the application; ``token`` None needs none on loopback."""
    votes = Votes(conversations.with_name("votes.jsonl"))
    setup = Setup([Model("toy", model)], Conversations(conversations), votes)
    with server.gradio_settings():
        guard = server.application(Sessions(setup), None, server.access_for("127.0.0.1", None, ()))

        def make(host: str = "127.0.0.1", token: str | None = None) -> TestClient:
            app = Guard(guard.app, server.access_for(host, token, ()), guard.max_upload)
            return TestClient(app, base_url=LOCAL, follow_redirects=False)

        yield make


def test_the_page_may_load_nothing_from_other_hosts(client: Any) -> None:
    response = client().get("/")
    assert response.status_code == 200
    rules = dict(rule.strip().split(" ", 1) for rule in response.headers["content-security-policy"].split(";"))
    assert rules["default-src"] == rules["frame-src"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert "'unsafe-inline'" not in rules["script-src"]
    assert not any("http" in rule or "*" in rule for rule in rules.values())
    assert response.headers["x-content-type-options"] == "nosniff"
    assert '"analytics_enabled":false' in response.text.replace(" ", "")
    assert "fonts.googleapis" not in response.text


def test_only_scripts_of_the_page_run() -> None:
    assert "sha256-" in policy("<html><script>one()</script></html>")
    assert policy("<script>one()</script>") != policy("<script>two()</script>")
    assert "sha256-" not in policy('<script type="module" src="./a.js"></script>')


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:9"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1.evil.example"}, 421),
        ({"host": "[::1"}, 421),
        ({"host": "10.0.0.1"}, 421),
        ({"origin": LOCAL}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
    ],
)
def test_other_hosts_and_sites_are_refused(client: Any, headers: dict[str, str], status: int) -> None:
    assert client().get("/", headers=headers).status_code == status


def test_other_hosts_need_the_token(client: Any) -> None:
    browser = client("0.0.0.0", "a secret token".replace(" ", "-"))
    paths = ("/", "/config", "/theme.css", "/votes.jsonl", "/gradio_api/heartbeat/x", "/gradio_api/file=a", "/?token=x")
    assert {browser.get(path).status_code for path in paths} == {401}
    assert browser.post("/gradio_api/queue/join", json={}).status_code == 401
    signed_in = browser.get("/?token=a-secret-token")
    assert (signed_in.status_code, signed_in.headers["location"]) == (303, "/")
    assert "a-secret-token" not in signed_in.headers["set-cookie"]
    assert "HttpOnly" in signed_in.headers["set-cookie"]
    assert browser.get("/").status_code == 200
    assert browser.get("/", headers={"host": "evil.example"}).status_code == 421
    assert browser.get("/", headers={"host": "10.0.0.1"}).status_code == 200
    browser.cookies.clear()
    assert browser.get("/", headers={"cookie": "llavactl-web-7860=x"}).status_code == 401


def test_hosts_and_tokens() -> None:
    assert server.access_for("127.0.0.1", None, ()).token == ""
    assert server.access_for("localhost", "12345678", ()).token == "12345678"
    assert len(server.access_for("0.0.0.0", None, ()).token) > 30
    assert server.access_for("0.0.0.0", None, ()).token != server.access_for("0.0.0.0", None, ()).token
    assert server.access_for("127.0.0.1", None, ("chat.example",)).is_own("chat.example")
    for token in ("", "short", "with space", "ü" * 9, "line\nbreak"):
        with pytest.raises(RecipeError):
            server.access_for("0.0.0.0", token, ())


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=%2Fetc%2Fpasswd",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/file=file:///etc/passwd",
        "/gradio_api/file=http://127.0.0.1/x",
        "/gradio_api/proxy=http://127.0.0.1/",
        "/static/../../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/%2e%2e/config.py",
        "/conversations/../votes.jsonl",
        "/conversations/..%2f..%2fx/a.json",
        "/conversations/0123456789abcdef/a.json",
        "/gradio_api/info",
        "/gradio_api/runs",
        "/gradio_api/deep_link",
        "/gradio_api/vibe-code",
        "/monitoring/summary",
        "/docs",
        "/openapi.json",
    ],
)
def test_nothing_but_uploads_and_own_files_is_served(client: Any, path: str) -> None:
    response = client().get(path)
    assert response.status_code in (400, 403, 404), response.text[:200]
    assert "root:" not in response.text


def test_stored_conversations_are_not_files_of_gradio(client: Any, conversations: Path) -> None:
    browser, file = client(), conversations / "0123456789abcdee" / "a.json"
    file.parent.mkdir()
    file.write_text('{"messages": []}')
    assert browser.get(f"/gradio_api/file={file}").status_code == 403
    response = browser.get("/conversations/0123456789abcdee/a.json")
    assert (response.status_code, response.headers["content-disposition"][:10]) == (200, "attachment")


@pytest.mark.parametrize("key", ["path", "name"])
def test_gradio_downloads_nothing(client: Any, key: str) -> None:
    file = {key: "http://169.254.169.254/latest", "meta": {"_type": "gradio.FileData"}}
    body = {"data": [{"text": "a", "files": [file]}], "fn_index": 0, "session_hash": "a"}
    assert client().post("/gradio_api/queue/join", content=json.dumps(body)).status_code == 400


def test_uploads_are_limited_and_inert(client: Any) -> None:
    browser = client()
    large = {"content-length": str(10**12)}
    assert browser.post("/gradio_api/upload", content=b"a", headers=large).status_code == 413
    assert browser.post("/gradio_api/queue/join", content=b"[" + b"1," * 2_000_000).status_code == 413
    page = b"<script>alert(1)</script>"
    (path,) = browser.post("/gradio_api/upload", files={"files": ("a.html", page, "text/html")}).json()
    response = browser.get(f"/gradio_api/file={path}")
    assert response.headers["content-disposition"].startswith("attachment")
    assert "script-src 'self'" in response.headers["content-security-policy"]


def test_tokens_are_compared_completely() -> None:
    access = Access({"localhost"}, "token-token")
    assert access.admits("token-token")
    assert not any(map(access.admits, ("", "token", "token-token ", "ü", "Token-token")))
