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
    r"(un)?(character|final|general|initial|local|material|maxim|memor|minim|normal|optim|organ|quant|random|recogn|regular|"
    r"serial|special|standard|summar|synchron|token|util|visual)is(e|ed|er|es|ing|ation)": "-ize (American spelling)",
    r"behaviours?|cent(re|red)|favou?rite|grey|labell(ed|ing)|licences?|modell(ed|ing)|neighbours?|travell(ed|ing)": (
        "behavior, center, … (American spelling)"
    ),
}
PATTERN = re.compile("|".join(f"\\b(?:{term})\\b" for term in TERMS), re.IGNORECASE)

QUOTED = re.compile(r"mm_vision_tower|vision_tower|image_tower|</?picture|\brecognise\(")
"""Names in LLaVA, transformers, HTML and the Protocol of formats."""

CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
SIZE = re.compile(r"\b[\dn]+ ?x ?[\dn]+\b")

DATA = {
    "docs/how-to/plugin-examples.md": "picture",  # records of llavactl.testing
    "docs/reference/evaluation.md": "pictures?",  # scienceqa's option `pictures`
    "docs/reference/export.md": "quantised",  # a key in llavactl.json
    "docs/generate.py": "colour",  # an example conversation, which docs/reference/templates.md shows
    "docs/reference/recipes.md": "pictures?",  # scienceqa's option `pictures`
    "docs/reference/templates.md": "colour",
    "llavactl/components/sources/image_folder/captions.py": "licence",  # file names that are no captions
    "llavactl/components/sources/image_folder/tables.py": "picture",  # a column name of tables
    "llavactl/components/sources/llava_record.py": "picture",  # keys and placeholders of other programs
    "llavactl/components/sources/scenes/__init__.py": "picture",  # generated conversations
    "llavactl/components/sources/scenes/captions.py": "picture",
    "llavactl/components/tasks/coco_synonyms.py": "tower",
    "llavactl/components/tasks/judging.py": "picture",  # a prompt: stored verdicts are found by it
    "llavactl/components/tasks/scienceqa.py": "pictures?",
    "llavactl/components/teachers/rules.py": "picture|grey",
    "llavactl/curation/captions.py": "picture",
    "llavactl/evaluation/identity.py": "blind twin",  # part of stored digests
    "llavactl/evaluation/verification/prompts.py": "picture",
    "llavactl/files/eval_result.py": "blind twin",  # results of earlier versions
    "llavactl/model/imported.py": "recognise",  # a method of formats
    "llavactl/teaching/cleanup.py": "picture",
    "llavactl/teaching/prompts/conversation.yaml": ".*",
    "llavactl/teaching/prompts/detail.yaml": ".*",
    "llavactl/teaching/prompts/reasoning.yaml": ".*",
    "llavactl/testing/conformance/formats.py": "recognised",
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


@pytest.mark.parametrize(
    "page", [page for page in sources() if page.suffix == ".md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_sizes_have_a_multiplication_sign(page: Path) -> None:
    """24×24 outside of code, as in the papers."""
    assert SIZE.findall(CODE.sub("", page.read_text(encoding="utf-8"))) == []
