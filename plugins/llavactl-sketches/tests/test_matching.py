"""Scores of boxes, texts and sequences, compared with plain definitions."""

import time
from functools import cache
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llavactl_sketches.answers import MAX_ANSWER, MAX_ELEMENTS, Found, html_in
from llavactl_sketches.dom import compare_sequences, read_dom
from llavactl_sketches.matching import compare_boxes, edit_distance, intersection_over_union, similarity

_BOXES = st.tuples(*[st.integers(0, 9)] * 4).map(lambda b: (b[0], b[1], b[0] + b[2] + 1, b[1] + b[3] + 1))
_ELEMENTS = st.lists(
    st.builds(Found, st.sampled_from(["p", "button"]), st.sampled_from(["", "Go"]), _BOXES), max_size=5
)


def box(kind: str, left: float, top: float, text: str = "", width: float = 10) -> Found:
    return Found(kind, text, (left, top, left + width, top + 10))


@settings(deadline=None)  # imports scipy
@given(_ELEMENTS, _ELEMENTS)
def test_boxes_are_matched_for_the_largest_sum(reference, answer):
    best = 0.0
    for kind in ("p", "button"):
        one = [item.box for item in reference if item.kind == kind]
        other = [item.box for item in answer if item.kind == kind]
        short, long = sorted((one, other), key=len)
        best += max(
            sum(intersection_over_union(a, b) for a, b in zip(short, order, strict=False))
            for order in permutations(long)
        )
    total = len(reference) + len(answer)
    grade = compare_boxes(reference, answer, len(answer))
    assert grade.layout == pytest.approx(2 * best / total if total else 1)
    assert 0 <= grade.layout <= 1 + 1e-9
    assert compare_boxes(reference, reference, len(reference)).layout == pytest.approx(1)


def test_another_kind_an_extra_element_and_a_missing_one_lower_the_layout():
    page = [box("p", 0, 0), box("button", 0, 20, "Go")]
    assert compare_boxes(page, [box("p", 0, 0), box("p", 0, 20)], 2).layout == 0.5
    assert compare_boxes(page, [*page, box("p", 0, 40), box("p", 0, 60)], 4).layout == pytest.approx(2 / 3)
    assert compare_boxes(page, page[:1], 1).layout == pytest.approx(2 / 3)
    assert compare_boxes(page, page, 4000).layout < 0.001
    assert compare_boxes(page, [box("p", 5, 0), page[1]], 2).layout == pytest.approx((1 + 1 / 3) / 2)


def test_texts_count_in_matched_elements_only():
    page = [box("button", 0, 0, "Send"), box("p", 0, 20, "ignored")]
    assert compare_boxes(page, page, 2).text == 1
    assert compare_boxes(page, [box("button", 0, 0, "Sent"), page[1]], 2).text == 0.75
    assert compare_boxes(page, [box("button", 100, 0, "Send"), page[1]], 2).text == 0
    assert compare_boxes(page, [box("li", 0, 0, "Send"), page[1]], 2).text == 0
    assert compare_boxes([page[1]], [page[1]], 1).text is None


@settings(deadline=None)
@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_the_edit_distance_is_levenshteins(a, b):
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert edit_distance(a, b) == distance(len(a), len(b))
    assert 0 <= similarity(a, b) <= 1
    assert (similarity(a, b) == 1) == (a == b)


def test_whitespace_does_not_count():
    assert similarity("Home Shop", "Home\n  Shop ") == 1
    assert similarity("", " ") == 1


@pytest.mark.parametrize(
    ("answer", "html"),
    [
        ("", None),
        ("I can't see it. 1 < 2", None),
        ("```\nno tags\n```", None),
        ("<p></p>", "<p></p>"),
        ("Here: <p></p>", "<p></p>"),
        ("Sure!\n```html\n<p></p>\n```\nDone.", "<p></p>\n"),
        ("```html\n<p></p>", "<p></p>"),
        ("~~~~html\n<p>```</p>\n~~~~", "<p>```</p>\n"),
        ("```\nplan\n```\n```html\n<p></p>\n```", "<p></p>\n"),
        ("```html\n<p></p>\n```\n```css\np{}\n```", "<p></p>\n"),
        ("<p>" + "x" * MAX_ANSWER, None),
    ],
)
def test_the_html_of_an_answer_is_found(answer, html):
    assert html_in(answer) == html


def kinds(html: str) -> list[str]:
    return [item.kind for item in read_dom(html)]


def test_the_sequence_has_elements_and_containers():
    html = "<nav>Home</nav><section><div><img><p></p></div></section><input><input type=submit value=Go>"
    expected = ["nav", "<section>", "<div>", "img", "p", "</div>", "</section>", "input", "button"]
    assert kinds(html) == expected
    assert read_dom(html)[-1].text == "Go"
    assert kinds(html.upper()) == expected
    assert [item.text for item in read_dom("<ul><li>Tea<li>Milk <b>and</b> rice</ul>later")] == ["Tea", "Milk and rice"]
    assert [item.text for item in read_dom("<h1>a<script>if (a < b) {}</script><style>p{}</style></h1>")] == ["a"]


@pytest.mark.parametrize(
    "html",
    ["<", "<p", "</p></div>", "<!--", "<h1", "<![CDATA[", "<p a='", "&#x110000;", "<script>", "\x00", "<div>" * 9000],
)
def test_malformed_html_is_read(html):
    grade = compare_sequences(read_dom("<h1>Tea</h1>"), read_dom(html))
    assert 0 <= grade.layout <= 1


@pytest.mark.parametrize("part", ["<p ", "<p a='", "<!--", "<!", "</", "<p>", "<script>", "<p a=", "```\n", "&", "<"])
def test_the_time_is_linear(part):
    """Two hundred times the text, which a quadratic parser reads in hours."""
    text = "<p>" + part * (MAX_ANSWER // len(part) - 3)
    start = time.process_time()
    read_dom(html_in(text) or "")
    assert time.process_time() - start < 5


@settings(deadline=None)
@given(st.text(st.sampled_from("<>/!-=\"' \n&;#xphdiv1[]?"), max_size=60) | st.text())
def test_any_text_is_read(text):
    assert all(item.kind for item in read_dom(text))


def test_sequences_are_aligned():
    page = read_dom("<h1>Tea</h1><p></p><button>Buy</button>")
    assert compare_sequences(page, page).layout == compare_sequences(page, page).text == 1
    assert compare_sequences(page, read_dom("<p></p><h1>Tea</h1><button>Buy</button>")).layout == pytest.approx(2 / 3)
    assert compare_sequences(page, page[:1]).layout == 0.5
    assert compare_sequences(page, []).layout == 0
    twice = read_dom("<button>No</button><button>Buy</button>")
    assert compare_sequences(read_dom("<button>Buy</button>"), twice).text == pytest.approx(2 / 3)
    assert compare_sequences(page, page * 2000).layout < 0.01


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_the_alignment_is_a_longest_common_subsequence(one, other):
    @cache
    def longest(i: int, j: int) -> int:
        if not i or not j:
            return 0
        same = longest(i - 1, j - 1) + 1 if one[i - 1] == other[j - 1] else 0
        return max(longest(i - 1, j), longest(i, j - 1), same)

    a, b = ([Found(kind, "", (0, 0, 0, 0)) for kind in sequence] for sequence in (one, other))
    total = len(one) + len(other)
    expected = 2 * longest(len(one), len(other)) / total if total else 1
    assert compare_sequences(a, b).layout == pytest.approx(expected)


def test_elements_beyond_the_limit_are_counted_only():
    page = [Found("p", "", (0, 0, 0, 0))]
    late = [*[Found("img", "", (0, 0, 0, 0))] * MAX_ELEMENTS, *page]
    assert compare_sequences(page, late).layout == 0
