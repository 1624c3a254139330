"""Texts use one standard term for each thing: no term below appears in docs, help, messages, docstrings or comments."""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TERMS = {
    r"pictures?": "image",
    r"blind twins?": "shuffled-image baseline, blind baseline",
    r"(vision )?towers?": "vision encoder",
    r"mend(s|ed|ing)?": "repair, fix",
    r"strangers?": "plugin, third party",
    r"defects? of llavactl": "bug in llavactl",
    r"whole numbers?": "integer",
    r"said twice": "duplicate",
    r"there (is|are):": "available:",
    r"trained parameters": "trainable parameters",
    r"trained tokens?": "target tokens",
    r"likeliest": "greedy decoding",
    r"half a cosine": "cosine decay",
    r"(is|are|was|were) told": "passive voice of a message: name what is logged or passed",
    r"goes? on (with|from|behind|where)": "resume, continue",
    r"(an|per an) (image|second|token|hour) (takes|costs)": "per image, per second",
    r"colour(s|ed)?": "color (American spelling)",
    r"(un)?quantis(e|ed|es|ing|ation)": "quantize (American spelling)",
    r"tokenis(e|ed|es|ing|ation)": "tokenize (American spelling)",
}
PATTERN = re.compile("|".join(f"\\b(?:{term})\\b" for term in TERMS), re.IGNORECASE)

QUOTED = (
    r"mm_vision_tower|vision_tower|image_tower|vision tower_|get_vision_tower",  # names in LLaVA and transformers
)
"""Terms of other programs, which keep their names."""

EXEMPT: dict[str, str] = {}
"""Files that quote texts of others, with the reason."""


def python_texts(file: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of the string literals, docstrings and comments in ``file``."""
    source = file.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT) or tokenize.tok_name[token.type] == "FSTRING_MIDDLE":
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def texts(file: Path) -> Iterator[tuple[int, str]]:
    if file.suffix == ".py":
        yield from python_texts(file)
    else:
        yield from enumerate(file.read_text(encoding="utf-8").splitlines(), 1)


def sources() -> list[Path]:
    """Everything that a user or contributor reads, tests left out."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.splitlines() or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
    folders = ("llavactl/", "docs/", "recipes/", "benchmarks/", "plugins/")
    return [
        ROOT / name
        for name in names
        if (name.startswith(folders) or name in ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml"))
        and name.endswith((".py", ".md", ".yaml", ".toml", ".html", "Makefile"))
        and "/tests/" not in name
        and name not in EXEMPT
    ]


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_terms(file: Path) -> None:
    quoted = re.compile("|".join(QUOTED))
    found = [
        f"{file.relative_to(ROOT)}:{number}: {match[0]!r} in {line.strip()!r}"
        for number, line in texts(file)
        for match in PATTERN.finditer(quoted.sub("", line))
    ]
    assert not found, "\n".join(found)
