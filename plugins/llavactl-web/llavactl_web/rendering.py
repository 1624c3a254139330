"""Conversations as HTML. All text in it is untrusted: an answer may repeat what is written in an image.

Answers are rendered as Markdown without HTML and images; links are restricted to http(s) and mailto. Thus nothing in an
answer becomes an element, an attribute or a URL of the page, except links, which only a click follows.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from markdown_it import MarkdownIt

from llavactl import Turn, wilson

from .images import data_url, thumbnail
from .previews import preview
from .store import Wins

if TYPE_CHECKING:
    from llavactl import Explanation

WORDS = 6
"""Words of an answer whose maps are shown."""

_LINKS = ("http://", "https://", "mailto:")


def conversation(turns: Sequence[Turn], name: str) -> str:
    """``turns`` as HTML, the answers headed by ``name``; the system prompt is left out."""
    return "".join(_turn(turn, name) for turn in turns if turn.role != "system")


def _turn(turn: Turn, name: str) -> str:
    if turn.role == "assistant":
        return answer(turn.text, name)
    return question("".join(part for part in turn.content if isinstance(part, str)), map(thumbnail, turn.images))


def question(text: str, thumbnails: Any) -> str:
    """A question with its images, which are data: URLs."""
    images = "".join(f'<img src="{url}" alt="image">' if url else "<i>image</i>" for url in thumbnails)
    return f'<div class="question">{images}<div class="text">{html.escape(text.strip())}</div></div>'


def answer(text: str, name: str, *, finished: bool = True) -> str:
    """An answer; fenced HTML is previewed once it is ``finished``."""
    body = _parser(finished).render(text)
    return f'<div class="answer"><div class="name">{html.escape(name)}</div>{body}</div>'


def maps(explanation: Explanation) -> str:
    """The maps of the WORDS words that depend most on the last image, over this image."""
    words = explanation.most_visual(WORDS)
    rows = [f"<tr><th></th>{''.join(f'<th>{html.escape(word.text)}</th>' for word in words)}</tr>"]
    kinds: tuple[Literal["occlusion", "attention"], ...] = ("occlusion", "attention")
    for kind in kinds:
        overlays = [explanation.overlay(word, kind) for word in words]
        cells = (f'<td><img src="{data_url(image)}" alt="{kind}"></td>' for image in overlays if image is not None)
        if any(overlays):
            rows.append(f"<tr><th>{kind}</th>{''.join(cells)}</tr>")
    count = len(explanation.images)
    which = f"<p>The last of {count} images:</p>" if count > 1 else ""
    return f'<div class="maps">{which}<table>{"".join(rows)}</table><p>{html.escape(explanation.limits)}</p></div>'


@functools.cache
def _parser(previews: bool) -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    parser.disable("image")
    parser.validateLink = lambda url: url.strip().lower().startswith(_LINKS)  # type: ignore[method-assign]
    parser.add_render_rule("fence", _fence_with_preview if previews else _fence)
    parser.add_render_rule("link_open", _link)
    return parser


def _fence(_renderer: Any, tokens: Sequence[Any], index: int, _options: Any, _env: Any) -> str:
    return f"<pre><code>{html.escape(tokens[index].content)}</code></pre>"


def _fence_with_preview(renderer: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
    code = _fence(renderer, tokens, index, options, env)
    if [word.lower() for word in tokens[index].info.split()[:1]] != ["html"]:
        return code
    return f'<div class="preview">{code}{preview(tokens[index].content)}</div>'


def _link(renderer: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
    tokens[index].attrs |= {"target": "_blank", "rel": "noopener noreferrer nofollow"}
    return str(renderer.renderToken(tokens, index, options, env))


def wins_table(pairs: Sequence[Wins]) -> str:
    """Votes per pair of models, with the first model's share of wins and its 95 % interval (Wilson)."""
    if not pairs:
        return "<p>No votes yet.</p>"
    head = ("A", "B", "A wins", "B wins", "ties", "both bad", "A's share of wins, 95 % interval")
    rows = [(pair.a, pair.b, pair.a_wins, pair.b_wins, pair.ties, pair.both_bad, _share(pair)) for pair in pairs]
    return f'<table class="wins">{_row(head, "th")}{"".join(_row(row, "td") for row in rows)}</table>'


def _share(pair: Wins) -> str:
    decided = pair.a_wins + pair.b_wins
    if not decided:
        return "–"
    low, high = wilson(pair.a_wins, decided)
    return f"{100 * pair.a_wins / decided:.0f} % [{low:.0f}, {high:.0f}]"


def _row(cells: Sequence[object], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"


def cases(rows: Sequence[Mapping[str, Any]]) -> str:
    """Evaluated questions with image, answer, reference and whether it is right (None: unknown)."""
    return f'<div class="cases">{"".join(map(_case, rows))}</div>'


def _case(row: Mapping[str, Any]) -> str:
    kind = {True: "right", False: "wrong", None: "unknown"}[row["right"]]
    images = "".join(f'<img src="{url}" alt="image">' for url in map(thumbnail, row["images"]) if url)
    parts = [(label, row[label]) for label in ("question", "answer", "expected") if row[label]]
    texts = "".join(f"<dt>{label}</dt><dd>{html.escape(text.strip())}</dd>" for label, text in parts)
    return f'<div class="case {kind}">{images}<dl><dt>{html.escape(row["id"])}: {kind}</dt>{texts}</dl></div>'
