"""The page in a real Chromium, with a toy model whose answers are scripted."""

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

Script = dict[str, str]


@pytest.fixture
def trap() -> Iterator[tuple[str, list[str]]]:
    """The origin of another server on this machine, and the peers that connected to it."""
    peers: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            while True:
                try:
                    peers.append(str(listening.accept()[1]))
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", peers
        listening.shutdown(socket.SHUT_RDWR)


def test_conversation(open_tab: Any, serve: Any, setup: Any, script: Script, photos: Sequence[Path]) -> None:
    url, _ = serve(setup())
    script |= {"What is this?": "A **photo**.", "Again?": "Yes."}
    tab = open_tab(url)
    tab.ask("What is this?", [photos[0], photos[1]])
    assert tab.answers() == ["A photo."]
    assert tab.page.locator("#history0 .question img").count() == 2
    tab.ask("Again?")
    tab.press("Edit last question")
    tab.wait("document.querySelector('#message textarea').value == 'Again?'")
    tab.ask("Again? No")
    assert tab.questions() == ["What is this?", "Again? No"]
    tab.press("Undo")
    tab.wait_answers(1)
    tab.press("Edit last question")
    tab.wait("document.querySelectorAll('#message img').length == 2")
    assert all(tab.page.locator(f"#{name}").is_disabled() for name in ("retry", "edit", "undo")), "no question is left"
    tab.ask("Both?")
    assert tab.page.locator("#history0 .question img").count() == 2
    script["Both?"] = "Two."
    tab.press("Retry")
    tab.wait("document.querySelector('#history0 .answer')?.innerText.includes('Two.')")
    tab.ready()
    tab.page.reload()
    tab.ready()
    tab.wait_answers(1)
    assert tab.answers() == ["Two."], "a reload shows the conversation of the address"
    assert (tab.left, tab.errors) == ([], [])


def test_explain(open_tab: Any, serve: Any, setup: Any, script: Script, photos: Sequence[Path]) -> None:
    tab = open_tab(serve(setup("alpha", "beta"))[0])
    explain = tab.page.get_by_role("button", name="Explain", exact=True)
    assert explain.is_disabled()
    tab.ask("No image?")
    assert explain.is_disabled()
    script["Color?"] = "It is <b>red</b> & blue."
    tab.ask("Color?", [photos[0]])
    tab.press("Explain")
    for side in (0, 1):
        tab.wait(f"document.querySelectorAll('#maps{side} td img').length == 10")
        maps = tab.page.locator(f"#maps{side}")
        assert maps.locator("th").all_inner_texts() == [
            "",
            "It",
            "is",
            "<b>red</b>",
            "&",
            "blue.",
            "occlusion",
            "attention",
        ]
    tab.ready()
    assert tab.answers() == ["No image?", "It is <b>red</b> & blue."]
    tab.press("Undo")
    tab.wait_answers(1)
    assert tab.page.locator("#maps0 img").count() == 0
    assert (tab.left, tab.errors) == ([], [])


HOSTILE = """\
<script>alert(1)</script><img src=x onerror=alert(2)><svg onload=alert(3)></svg><iframe src=TRAP/frame></iframe>
<style>@import url(TRAP/style); body { background: url(TRAP/css) }</style><base href=TRAP/>
<link rel=preconnect href=TRAP>
<meta http-equiv=refresh content="0;url=TRAP/refresh"><form action=TRAP/form><button>send</button></form>
<div style="position:fixed;inset:0;background:red" onmouseover=alert(4)>overlay</div>

[a](javascript:alert(5)) [b](JaVaScRiPt:alert(5)) [c](data:text/html,<script>alert(6)</script>) [d](vbscript:x)
<javascript:alert(7)> ![tracking](TRAP/pixel.png) ![x](TRAP/"onerror="alert(8)) [e](TRAP/"onmouseover="alert(9))

[ref]: javascript:alert(10)
[ref] ${alert(11)} {{alert(12)}} {{{constructor.constructor('alert(13)')()}}} &lt;script&gt;alert(14)&lt;/script&gt;

$$\\href{javascript:alert(15)}{x} \\includegraphics{TRAP/katex.png} \\htmlData{a=b}{x} \\url{javascript:alert(16)}$$
\\(\\htmlStyle{background:url(TRAP/k)}{x}\\) ```mermaid
graph TD; A[<img src=x onerror=alert(17)>]; click A href "javascript:alert(18)"
```

```"><script>alert(19)</script>
</code></pre><script>alert(20)</script>
```
\x1b[31mred\x1b[0m \u202e\u0000 </div></div></div><script>alert(21)</script>"""


def test_hostile_text_is_text(
    open_tab: Any, serve: Any, setup: Any, script: Script, trap: tuple[str, list[str]], tmp_path: Path
) -> None:
    origin, peers = trap
    hostile = HOSTILE.replace("TRAP", origin)
    url, _ = serve(setup())
    script |= {"?": hostile, "other host": HOSTILE.replace("TRAP", "http://evil.example")}
    tab = open_tab(url)
    for question in ("?", "other host", hostile):  # the last one as a question and an answer
        tab.ask(question)
    tab.page.fill("#title textarea, #title input", "<img src=x onerror=alert(22)>")
    tab.press("Rename")
    tab.wait("document.querySelector('#conversations').innerText.includes('onerror')")
    tab.page.mouse.move(300, 300)
    tab.page.reload()
    tab.ready()
    tab.wait_answers(3)
    content = tab.page.locator("#history0 .answer, #history0 .question")
    for selector in ("script", "img", "svg", "iframe", "style", "form", "meta", "link", ".katex"):
        assert content.locator(selector).count() == 0, selector
    assert "alert(1)" in tab.answers()[-1], "it is shown"
    links = tab.page.eval_on_selector_all("#history0 a", "links => links.map(link => link.getAttribute('href'))")
    assert links
    assert all(link.startswith(("http://127.0.0.1", "http://evil.example")) for link in links)
    attributes = content.locator("*").evaluate_all("all => all.flatMap(one => one.getAttributeNames())")
    assert set(attributes) <= {"class", "href", "target", "rel"}
    assert (peers, tab.left, tab.errors) == ([], [], [])
    tab.page.context.close()
    assert "evil.example" not in (tmp_path / "net.json").read_text()


DOCUMENT = """\
<!doctype html><html><head><meta http-equiv="refresh" content="0;url=TRAP/refresh"><base href="TRAP/">
<link rel=stylesheet href="TRAP/a.css"><link rel=preconnect href="TRAP"><link rel=prefetch href="TRAP/prefetch">
<style>@import url(TRAP/b.css); h1 { color: rgb(1, 2, 3); background: url(TRAP/c.png) }</style></head>
<body onload="parent.document.title='owned'"><h1>Title</h1><script>top.location='TRAP/top'; alert(1)</script>
<img src="TRAP/d.png" onerror="alert(2)"><iframe src="TRAP/e"></iframe><object data="TRAP/f"></object>
<form action="TRAP/form" target="_top"><input name=a autofocus onfocus="alert(3)"><button>Send</button></form>
<a id=top href="TRAP/link" target="_top">top</a> <a id=self href="TRAP/self">self</a>
<a id=popup href="TRAP/popup" target="_blank">popup</a></body></html>
"""


def test_html_is_previewed_in_a_sandbox(
    open_tab: Any, serve: Any, setup: Any, script: Script, trap: tuple[str, list[str]]
) -> None:
    origin, peers = trap
    url, _ = serve(setup())
    script["Page?"] = f"Here:\n\n```html\n{DOCUMENT.replace('TRAP', origin)}```\n"
    tab = open_tab(url)
    tab.ask("Page?")
    bottom = "one.getBoundingClientRect().left + 20, one.getBoundingClientRect().bottom - 5"
    last = tab.page.locator("#history0 .answer").last
    assert last.evaluate(f"one => one.contains(document.elementFromPoint({bottom}))"), (
        "the end of the answer is in sight"
    )
    frame = tab.page.locator("#history0 iframe")
    assert frame.get_attribute("sandbox") == ""
    assert "<h1>Title</h1>" in tab.page.locator("#history0 .preview code").inner_text(), "the code is beside it"
    inside = tab.page.frame_locator("#history0 iframe")
    assert inside.locator("h1").inner_text() == "Title"
    assert inside.locator("h1").evaluate("h => getComputedStyle(h).color") == "rgb(1, 2, 3)"
    title = tab.page.title()
    for selector in ("button", "#top", "#popup", "#self"):
        inside.locator(selector).click(no_wait_after=True, force=True)
        tab.page.wait_for_timeout(300)
    assert tab.page.url.startswith(url)
    assert (tab.page.title(), len(tab.page.context.pages)) == (title, 2)
    assert (peers, tab.left, [line for line in tab.errors if "dialog" in line]) == ([], [], [])


def test_tabs_do_not_mix(open_tab: Any, serve: Any, setup: Any, script: Script) -> None:
    """Two tabs ask at once: one answers after the other, each in its own conversation."""
    url, _ = serve(setup())
    script |= {"slow one": "first " * 20, "two": "second"}
    one, two = open_tab(url), open_tab(url)
    one.ask("slow one", wait=False)
    one.wait("document.querySelector('#live0').innerText.includes('first')")
    two.ask("two", wait=False)
    two.page.wait_for_timeout(500)
    assert two.answers() == [], "it waits for the model"
    two.wait_answers(1)
    one.wait_answers(1)
    assert (one.answers(), two.answers()) == ([" ".join(["first"] * 20)], ["second"])
    assert (one.questions(), two.questions()) == (["slow one"], ["two"])
    assert one.page.url != two.page.url


def test_a_question_that_waits_for_another_tab_can_be_stopped(
    open_tab: Any, serve: Any, setup: Any, script: Script
) -> None:
    url, _ = serve(setup())
    script["slow"] = "word " * 2000
    one, two = open_tab(url), open_tab(url)
    one.ask("slow", wait=False)
    one.wait("document.querySelector('#live0').innerText.includes('word')")
    two.ask("waiting", wait=False)
    two.page.get_by_text("Waiting for the answer of another tab").wait_for()
    two.press("Stop")
    two.wait("document.querySelector('#message textarea').value == 'waiting'")
    two.ready()
    assert two.questions() == []
    two.page.press("#message textarea", "Enter")
    two.page.get_by_text("Waiting for the answer of another tab").wait_for()
    one.press("Stop")
    two.wait_answers(1)
    assert (two.answers(), two.errors) == (["waiting"], [])


def test_stop_and_a_closed_tab_end_the_answer(
    open_tab: Any, serve: Any, setup: Any, script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    url, _ = serve(setup())
    script |= {"slow": "word " * 2000, "fast": "done"}
    tab = open_tab(url)
    tab.ask("slow", wait=False)
    tab.wait("document.querySelector('#live0').innerText.includes('word')")
    tab.press("Stop")
    tab.wait_answers(1)
    kept = tab.answers()[0]
    assert 0 < len(kept) < 1000, "the partial answer is kept"
    tab.ready()
    tab.ask("slow", wait=False)
    tab.wait("document.querySelector('#live0').innerText.includes('word')")
    tab.page.reload()
    tab.wait("document.querySelectorAll('#history0 .answer').length >= 1")
    tab.ready()
    tab.ask("slow", wait=False)
    tab.wait("document.querySelector('#live0').innerText.includes('word')")
    tab.page.close()
    other = open_tab(url)
    other.ask("fast")  # 2000 words take 100 seconds and more
    assert other.answers() == ["done"]
    assert "Traceback" not in capfd.readouterr().err


def test_a_damaged_image_is_named(open_tab: Any, serve: Any, setup: Any, script: Script, tmp_path: Path) -> None:
    Image.effect_noise((200, 200), 50).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:9000])
    tab = open_tab(serve(setup())[0])
    tab.page.set_input_files("#message input[type=file]", str(tmp_path / "half.png"))
    tab.wait("document.querySelectorAll('#message img').length == 1")
    tab.page.fill("#message textarea", "What?")
    tab.page.press("#message textarea", "Enter")
    tab.page.get_by_text("half.png: the image is damaged").first.wait_for()
    tab.ready()
    assert tab.questions() == []
    assert tab.page.input_value("#message textarea") == "What?"


def test_conversations_are_stored_listed_renamed_exported_loaded_and_deleted(
    open_tab: Any, serve: Any, setup: Any, script: Script, photos: Sequence[Path], tmp_path: Path
) -> None:
    script |= {"First?": "One.", "Second?": "Two."}
    tab = open_tab(serve(setup())[0])
    tab.ask("First?", [photos[0]])
    tab.press("New conversation")
    tab.wait_answers(0)
    tab.ask("Second?")
    tab.page.close()
    tab = open_tab(serve(setup())[0])  # another server: a restart
    tab.wait("document.querySelectorAll('#conversations label').length == 2")
    listed = tab.page.locator("#conversations label")
    assert listed.all_inner_texts() == ["Second?", "First?"]
    listed.nth(1).click()
    tab.wait_answers(1)
    assert tab.answers() == ["One."]
    tab.page.fill("#title textarea, #title input", "Photo")
    tab.press("Rename")
    tab.wait("document.querySelector('#conversations').innerText.includes('Photo')")
    with tab.page.expect_download() as download:
        tab.page.get_by_role("link", name="Export").click()
    file = tmp_path / "export.json"
    download.value.save_as(file)
    assert [message["role"] for message in json.loads(file.read_text())["messages"]] == ["user", "assistant"]
    tab.press("Delete")
    tab.press("Delete this conversation")
    tab.wait("!document.querySelector('#conversations').innerText.includes('Photo')")
    tab.wait_answers(0)
    tab.page.set_input_files("input[type=file][accept*=json]", file)
    tab.wait_answers(1)
    assert tab.answers() == ["One."]
    assert tab.page.locator("#history0 .question img").count() == 1
    assert tab.errors == []


def test_comparison_is_blind_until_the_vote(open_tab: Any, serve: Any, setup: Any, script: Script) -> None:
    made = setup("alpha", "beta", blind=True)
    tab = open_tab(serve(made)[0])
    tab.ask("Question?")
    assert "alpha" not in tab.page.content()
    assert "beta" not in tab.page.content()
    assert tab.answers(0) == tab.answers(1) == ["Question?"]
    tab.press("A is better")
    tab.wait("!document.querySelector('#votes') || document.querySelector('#votes').offsetParent === null")
    names = tab.page.locator(".answer .name").all_inner_texts()
    assert sorted(names) == ["alpha", "beta"]
    tab.page.get_by_role("button", name="Votes").click()
    assert "100 %" in tab.page.locator("#wins").inner_text() or "0 %" in tab.page.locator("#wins").inner_text()
    with tab.page.expect_download() as download:
        tab.page.get_by_role("link", name="Export the votes").click()
    vote = json.loads(Path(download.value.path()).read_text())
    assert (vote["outcome"], vote["blind"], {vote["a"], vote["b"]}) == ("a", True, {"alpha", "beta"})
    assert tab.errors == []


def test_images_by_paste_drop_and_camera(
    open_tab: Any, serve: Any, setup: Any, script: Script, photos: Sequence[Path]
) -> None:
    tab = open_tab(serve(setup())[0])
    encoded = list(photos[0].read_bytes())
    transfer = f"""
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array({encoded})], 'a.jpg', {{type: 'image/jpeg'}}));"""
    tab.page.evaluate(f"""() => {{ {transfer}
        document.querySelector('#message textarea').dispatchEvent(
            new ClipboardEvent('paste', {{clipboardData: data, bubbles: true, cancelable: true}})) }}""")
    tab.wait("document.querySelectorAll('#message img').length == 1")
    tab.page.evaluate(f"""() => {{ {transfer}
        document.querySelector('#message textarea').dispatchEvent(
            new DragEvent('drop', {{dataTransfer: data, bubbles: true, cancelable: true}})) }}""")
    tab.wait("document.querySelectorAll('#message img').length == 2")
    tab.page.get_by_role("button", name="Camera").click()
    tab.page.get_by_text("Click to Access Webcam").click()
    tab.wait("document.querySelector('video')?.videoWidth > 0")
    tab.page.get_by_role("button", name="capture photo").click()
    tab.wait("document.querySelectorAll('#message img').length == 3")
    tab.ask("Three?")
    assert tab.page.locator("#history0 .question img").count() == 3
    assert (tab.left, tab.errors) == ([], [])


def test_an_answer_that_fails_leaves_the_page_usable(open_tab: Any, serve: Any, setup: Any, script: Script) -> None:
    tab = open_tab(serve(setup())[0])
    script["broken?"] = None  # type: ignore[assignment]
    tab.ask("broken?", wait=False)
    tab.page.get_by_text("AttributeError", exact=False).first.wait_for()
    tab.ready()
    assert tab.page.input_value("#message textarea") == "broken?"
    tab.ask("works?")
    assert (tab.answers(), tab.questions()) == (["works?"], ["works?"])


def test_evaluations(open_tab: Any, serve: Any, setup: Any, gallery: Any) -> None:
    tab = open_tab(serve(setup(), gallery)[0])
    tab.page.get_by_role("tab", name="Evaluation").click()
    tab.wait("document.querySelectorAll('#cases .case').length == 2")
    tab.page.locator("#show").get_by_text("wrong").click()
    tab.wait("document.querySelectorAll('#cases .case').length == 1")
    assert "Yes <b>!</b>" in tab.page.locator("#cases .wrong").inner_text()
    assert tab.page.locator("#cases img").count() == 1
    assert (tab.left, tab.errors) == ([], [])
