"""Untrusted text as HTML."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llavactl_web import rendering
from llavactl_web.previews import POLICY, preview, without_addresses
from llavactl_web.store import Wins


class Elements(HTMLParser):
    """The elements of a document, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def parse_marked_section(self, i: int, report: int = 1) -> int:
        return self.parse_bogus_comment(i)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


MARKUP = """< > </ /> " ' = & ; ` ``` ~~~ html <script> <img onerror=a src= <style> </style> <svg> <math> <textarea>
</title> <a href= [a]( ) ![ javascript: data: http://a.example/ <!-- --> <![CDATA[ &lt; &#106; on style= * _ | - #"""
PIECES = st.sampled_from([*MARKUP.split(), "\n", " "])
TEXT = st.lists(PIECES | st.text(max_size=3), max_size=25).map("".join)


@given(TEXT)
def test_an_answer_has_no_element_of_its_text(text: str) -> None:
    for tag, attributes in Elements(rendering.answer(text, "name", finished=False)).found:
        assert tag not in ("script", "img", "style", "svg", "math", "iframe", "textarea", "title")
        assert attributes.keys() <= {"class", "href", "title", "target", "rel", "style", "start"}
        assert (attributes.get("href") or "http://").lower().startswith(("http://", "https://", "mailto:"))
        assert re.fullmatch(r"text-align:\w+|", attributes.get("style") or "")


def test_a_broken_marked_section_is_shown() -> None:
    for text in ("<![<", "<![CDATA[x]]>", "<![if x]>a<![endif]>"):
        preview(text)


@given(TEXT)
def test_a_preview_has_no_address(text: str) -> None:
    for tag, attributes in Elements(without_addresses(text)).found:
        assert tag not in ("script", "link", "meta", "base", "iframe", "object", "embed")
        assert not any(name.startswith("on") or name in ("href", "action", "srcset") for name in attributes)
        assert (attributes.get("src") or "data:image/").lower().strip().startswith("data:image/")


@pytest.mark.parametrize(
    "document",
    [
        "<link rel=preconnect href=http://a.example>",
        "<svg><style><a href=http://a.example></style></svg>",
        "<style></style ><link rel=preconnect href=http://a.example>",
        "<title><link href=http://a.example rel=preconnect></title>",
        "<a/href=http://a.example>x",
        "<b style='background: url(&quot;http://a.example&quot;)'>x",
        "<A HREF='http://a.example'>x",
        "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=http://a.example&gt;'>",
    ],
)
def test_addresses_are_removed_whatever_the_syntax(document: str) -> None:
    written = without_addresses(document)
    assert '="http' not in written
    assert "url(" not in written
    assert not {"link", "a"} & {tag for tag, attributes in Elements(written).found if attributes}


def test_a_preview_keeps_styles_and_text() -> None:
    written = without_addresses(
        '<style>h1 > b { color: red }</style><h1 class="a" style="top: 0">1 &lt; 2 &amp; <b>3</b></h1>'
    )
    assert written == '<style>h1 > b { color: red }</style><h1 class="a" style="top: 0">1 &lt; 2 &amp; <b>3</b></h1>'


def test_fenced_html_is_previewed_when_the_answer_has_finished() -> None:
    text = "```html\n<h1>Hi</h1>\n```"
    assert "iframe" not in rendering.answer(text, "m", finished=False)
    assert "iframe" not in rendering.answer("```python\n1\n```", "m")
    (frame,) = [attributes for tag, attributes in Elements(rendering.answer(text, "m")).found if tag == "iframe"]
    assert frame["sandbox"] == ""
    assert frame["srcdoc"] is not None
    assert frame["srcdoc"].index(POLICY) < frame["srcdoc"].index("<h1>Hi</h1>")
    assert POLICY.startswith("default-src 'none'")


def test_a_preview_does_not_end_its_frame() -> None:
    found = Elements(preview("\"></iframe><script>alert(1)</script><b title='\"'>")).found
    assert [tag for tag, _ in found] == ["iframe"]


def test_wins_have_an_interval_of_the_decided_votes() -> None:
    table = rendering.wins_table([Wins("a<b", "b", 8, 2, 5, 1)])
    assert "a&lt;b" in table
    assert "80 % [49, 94]" in table  # Wilson's interval of 8 of 10
    assert "–" in rendering.wins_table([Wins("a", "b", 0, 0, 3, 0)])
