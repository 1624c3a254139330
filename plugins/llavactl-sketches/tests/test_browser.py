"""Pages in a real Chromium: positions are those of ``layout``, and hostile pages do nothing."""

import http.server
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from llavactl_sketches.browser import Browser, find_browser
from llavactl_sketches.pages import draw_page
from llavactl_sketches.task import SketchToHtml, SketchToHtmlOptions, _reference

from llavactl import Answer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium: apt install chromium"),
]


@pytest.fixture
def browser() -> Browser:
    program = find_browser()
    assert program is not None
    return Browser(program, 60)


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """The URL of a local server, and the paths that were requested."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", requests
        listening.shutdown()


def test_chromium_places_elements_like_layout(browser: Browser):
    pages = [draw_page(split, 0, index, "en") for split in ("train", "test") for index in range(30)]
    for page, measured in zip(pages, browser.measure([page.html for page in pages]), strict=True):
        expected = _reference(page)
        assert measured is not None
        assert [item.kind for item in measured.found] == [item.kind for item in expected]
        assert [item.text for item in measured.found] == [item.text for item in expected]
        for one, other in zip(measured.found, expected, strict=True):
            assert one.box == pytest.approx(other.box, abs=0.1), page.html


def test_references_score_100_and_others_less():
    task = SketchToHtml(SketchToHtmlOptions(count=10))
    questions = list(task.questions())
    references = [question.reference for question in questions]
    right = task.score({q.id: Answer(q.id, q.reference) for q in questions}, "rendered")
    assert right.scores["layout"] == pytest.approx(100, abs=0.5)
    assert (right.scores["text"], right.scores["exact"], right.scores["valid"]) == (100, 100, 100)
    others = {q.id: Answer(q.id, references[index - 1]) for index, q in enumerate(questions)}
    assert task.score(others, "rendered").scores["layout"] < 50


def test_scripts_and_refreshes_do_nothing(browser: Browser, server: tuple[str, list[str]]):
    url, _ = server
    pages = [
        "<h1>T</h1><script>while (1);</script>",
        "<h1>T</h1><img style='display:none' src=x onerror='while (1);'>",
        f"<h1>T</h1><meta http-equiv=refresh content='0;url={url}/refresh'>",
        "<h1>T</h1><iframe hidden srcdoc='<script>while (1);</script>'></iframe>",
        "<h1>T</h1><iframe hidden src='javascript:while (1);'></iframe>",
        "<h1 contenteditable autofocus onfocus='while (1);'>T</h1><details open ontoggle='while (1);'></details>",
        '<pre id="result">[]</pre>'.replace("pre", "i") + "<h1>T</h1>",
        "<h1>T</h1></style></body></html><!-- <p>",
    ]
    found = browser.measure(pages)
    assert [[(item.kind, item.text) for item in each.found] for each in found] == [[("heading", "T")]] * len(pages)


def test_nothing_is_requested(browser: Browser, server: tuple[str, list[str]], tmp_path: Path):
    url, requests = server
    (tmp_path / "secret.html").write_text("<h1>secret</h1>", encoding="utf-8")
    page = f"""<base href="{url}/"><img src=a><link rel=stylesheet href=b><link rel=prefetch href=c>
    <link rel=preconnect href=d><link rel=preload as=image href=e>
    <style>@import "f"; h1 {{ background: url(g); font-family: x }}
    @font-face {{ font-family: x; src: url(h) }}</style><h1>T</h1><iframe src=i></iframe><object data=j></object>
    <embed src=k><video src=l autoplay poster=m></video><input type=image src=n><svg><image href=o /></svg>
    <form action=p><button autofocus>Go</button></form><iframe src="{(tmp_path / "secret.html").as_uri()}"></iframe>"""
    (measured,) = browser.measure([page])
    assert measured is not None
    assert "T" in [item.text for item in measured.found]
    assert "secret" not in [item.text for item in measured.found]
    assert requests == []


def test_only_visible_elements_inside_the_page_count(browser: Browser):
    hidden = ["left:-9999px", "display:none", "visibility:hidden", "opacity:0", "top:500px", "width:0", "height:.5px"]
    page = "".join(f"<h1 style='position:absolute;{style}'>hidden</h1>" for style in hidden)
    page += "<h1 style='position:absolute;left:300px;top:0;width:1e9px;height:1e9px;margin:0'>T</h1>"
    (measured,) = browser.measure([page])
    assert measured is not None
    assert [(item.text, item.box) for item in measured.found] == [("T", (300, 0, 400, 400))]


def test_names_of_elements_replace_no_method(browser: Browser):
    page = "<form name=querySelectorAll><input name=getBoundingClientRect><input name=checkVisibility></form><h1>T</h1>"
    (measured,) = browser.measure([page])
    assert measured is not None
    assert [item.kind for item in measured.found] == ["input", "input", "heading"]


def test_huge_pages_are_measured(browser: Browser):
    pages = [
        "<div>" * 19_000 + "<h1>T</h1>",
        "<p></p>" * 14_000,
        "<ul><li>" * 9000,
        "<h1 style='font-size:1e9px'>T</h1>",
    ]
    measured = browser.measure(pages)
    assert all(each is not None and each.count >= 1 for each in measured)


def test_a_page_that_takes_too_long_is_none_and_its_browser_is_killed(browser: Browser):
    bomb = (
        "<svg>"
        + "".join(f"<g id=g{i}>" + f"<use href=#g{i - 1} />" * 10 + "</g>" for i in range(9))
        + "</svg><h1>T</h1>"
    )
    start = time.monotonic()
    assert Browser(browser.program, 10).measure([bomb]) == [None]
    assert time.monotonic() - start < 60
    children = psutil.Process(os.getpid()).children(recursive=True)
    assert [child for child in children if "chrom" in child.name()] == []
