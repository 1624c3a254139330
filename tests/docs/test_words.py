"""Texts use one standard term for each thing: no term below appears in docs, help, messages, docstrings or comments."""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

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

QUOTED = re.compile(r"mm_vision_tower|vision_tower|image_tower|</?picture")
"""Names in LLaVA, transformers and HTML."""

DATA = {
    "docs/reference/evaluation.md": "pictures?",  # scienceqa's option `pictures`
    "docs/reference/export.md": "quantised",  # a key in llavactl.json
    "docs/generate.py": "colour",  # an example conversation, which docs/reference/templates.md shows
    "docs/reference/recipes.md": "pictures?",  # scienceqa's option `pictures`
    "docs/reference/templates.md": "colour",
    "llavactl/components/sources/image_folder/tables.py": "picture",  # a column name of tables
    "llavactl/components/sources/llava_record.py": "picture",  # keys and placeholders of other programs
    "llavactl/components/sources/scenes/__init__.py": "picture",  # generated conversations
    "llavactl/components/sources/scenes/captions.py": "picture",
    "llavactl/components/tasks/coco_synonyms.py": "tower",
    "llavactl/components/tasks/judging.py": "picture",  # a prompt: stored verdicts are found by it
    "llavactl/components/tasks/scienceqa.py": "pictures?",
    "llavactl/components/teachers/rules.py": "picture",
    "llavactl/curation/captions.py": "picture",
    "llavactl/evaluation/identity.py": "blind twin",  # part of stored digests
    "llavactl/evaluation/verification/prompts.py": "picture",
    "llavactl/files/eval_result.py": "blind twin",  # results of earlier versions
    "llavactl/teaching/cleanup.py": "picture",
    "llavactl/teaching/prompts/conversation.yaml": ".*",
    "llavactl/teaching/prompts/detail.yaml": ".*",
    "llavactl/teaching/prompts/reasoning.yaml": ".*",
    "llavactl/testing/endpoint.py": "tower",
    "llavactl/testing/toys.py": "colour|picture",
    "llavactl/training/saving.py": "quantised",  # a key in llavactl.json
    "llavactl/verbs/generate.py": "pictures",  # a folder name
}
"""Terms in training data, prompts and file formats, which must not change with the wording."""


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
    ]


def test_terms() -> None:
    files = {file.relative_to(ROOT).as_posix(): file for file in sources()}
    data = {name: re.compile(DATA.get(name, r"(?!)"), re.IGNORECASE) for name in files}
    found = [
        f"{name}:{number}: {match[0]!r} in {line.strip()!r}"
        for name, file in files.items()
        for number, line in texts(file)
        for match in PATTERN.finditer(QUOTED.sub("", line))
        if not data[name].fullmatch(match[0])
    ]
    assert not found, "\n".join(found)
    assert len(files) > 500
