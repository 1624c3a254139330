"""Code blocks of an answer: which are found, and that saving stays in the folder and replaces nothing."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl.chat import code_blocks as module
from llavactl.chat.code_blocks import CodeBlock, code_blocks, save_code


@pytest.mark.parametrize(
    ("answer", "codes"),
    [
        ("no code", []),
        ("```\na\n```", ["a\n"]),
        ("a\n```py\nb\n```\nc\n~~~\nd\n~~~~\n", ["b\n", "d\n"]),
        ("````md\n```py\nx\n```\n````", ["```py\nx\n```\n"]),
        ("```py\n~~~\n```", ["~~~\n"]),
        ("  ```py\n    x\n  ```", ["  x\n"]),
        ("    ```py\n    x\n    ```", []),
        ("1. Save:\n\n   ```py\n   x\n   ```\n2. Run", ["x\n"]),
        ("> ```py\n> x\n> ```", ["x\n"]),
        ("```html\n<p>cut", ["<p>cut"]),
        ("```html\n<p>``\n", ["<p>``\n"]),
        ("```py\n\n```", []),
        ("```py```", []),
        ("```py\r\nx\r\n```\r\n", ["x\n"]),
        ("<think>why</think>\n```py\nx\n```", ["x\n"]),
        ("<!-- open\n```py\nx\n```", ["x\n"]),
    ],
)
def test_fences_follow_commonmark(answer: str, codes: list[str]) -> None:
    assert [block.code for block in code_blocks(answer)] == codes


@pytest.mark.parametrize(
    ("info", "language", "name"),
    [
        ("", "", ""),
        ("html", "html", ""),
        ("Python", "python", ""),
        ('html title="index.html"', "html", "index.html"),
        ("html title='a b.html' numbers", "html", "a b.html"),
        ("python app.py", "python", "app.py"),
        ("python src/app.py", "python", "src/app.py"),
        ("python 3.11", "python", ""),
        ("js showLineNumbers", "js", ""),
        ("html:pages/index.html", "html", "pages/index.html"),
        ("index.html", "", "index.html"),
        ("{.python filename=app.py}", "python", "app.py"),
        ("{.python}", "python", ""),
        ("c++", "c++", ""),
        ('title="a.txt"', "", "a.txt"),
        ("html title=", "html", ""),
    ],
)
def test_language_and_name_are_read_from_the_info_string(info: str, language: str, name: str) -> None:
    fence = "~~~"
    assert code_blocks(f"{fence}{info}\nx\n{fence}") == [CodeBlock(language, name, "x\n")]


@pytest.mark.parametrize(
    ("language", "name", "file"),
    [
        ("html", "", "index.html"),
        ("css", "", "style.css"),
        ("javascript", "", "script.js"),
        ("js", "", "script.js"),
        ("python", "", "answer.py"),
        ("c++", "", "answer.cpp"),
        ("r", "", "answer.R"),
        ("svg", "", "answer.svg"),
        ("", "", "answer.txt"),
        ("no/such language", "", "answer.txt"),
        ("html", "pages/home.html", "home.html"),
        ("html", "C:\\pages\\home.html", "home.html"),
        ("html", "../../home.html", "home.html"),
        ("html", "/etc/passwd", "passwd"),
        ("html", "..", "index.html"),
        ("html", "C:home.html", "index.html"),
        ("html", ".bashrc", "index.html"),
        ("html", "NUL", "index.html"),
        ("html", "com1.tar.html", "index.html"),
        ("html", "home.html.", "index.html"),
        ("html", "home.html:stream", "index.html"),
        ("html", "a\x00b.html", "index.html"),
        ("html", "home\n.html", "index.html"),
        ("html", "ho\u202eme.html", "index.html"),
        ("html", "\u2025/home.html", "home.html"),
        ("html", "..\uff0fhome.html", "index.html"),
        ("html", "a" * 101, "index.html"),
    ],
)
def test_files_are_named_by_their_block_or_language(tmp_path: Path, language: str, name: str, file: str) -> None:
    assert save_code([CodeBlock(language, name, "x")], tmp_path / "new") == [tmp_path / "new" / file]


def test_each_block_gets_its_own_file(tmp_path: Path) -> None:
    answer = "```html\na\n```\n```html\nb\n```\n```html Index.html\nc\n```\n```css\nd\n```"
    names = ["index.html", "index-2.html", "Index-3.html", "style.css"]
    for overwrite in (True, True):
        saved = save_code(code_blocks(answer), tmp_path, overwrite=overwrite)
        assert [(path.name, path.read_bytes()) for path in saved] == list(
            zip(names, (b"a\n", b"b\n", b"c\n", b"d\n"), strict=True)
        )
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("overwrite", [False, True])
def test_links_and_folders_of_the_name_are_left_alone(tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "target.txt"
    target.write_text("kept", encoding="utf-8")
    folder = tmp_path / "code"
    (folder / "style.css").mkdir(parents=True)
    (folder / "index.html").symlink_to(target)
    (folder / "answer.py").symlink_to(tmp_path / "dangling")
    blocks = [CodeBlock(language, "", "new") for language in ("html", "css", "python")]
    html, css, python = save_code(blocks, folder, overwrite=overwrite)
    assert (html.name, python.name) == (("index.html", "answer.py") if overwrite else ("index-2.html", "answer-2.py"))
    assert css.name == "style-2.css"
    assert all(path.read_text(encoding="utf-8") == "new" and not path.is_symlink() for path in (html, css, python))
    assert target.read_text(encoding="utf-8") == "kept"
    assert not (tmp_path / "dangling").exists()


def test_concurrent_calls_replace_nothing(tmp_path: Path) -> None:
    def save(number: int) -> None:
        start.wait()
        save_code([CodeBlock("html", "", f"{number} {turn}") for turn in range(20)], tmp_path)

    start = threading.Barrier(4)
    threads = [threading.Thread(target=save, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written = {path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert written == {f"{number} {turn}" for number in range(4) for turn in range(20)}


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_atomic", full)
    with pytest.raises(OSError, match="No space"):
        save_code([CodeBlock("html", "", "x")], tmp_path)
    assert list(tmp_path.iterdir()) == []


_PARTS = st.sampled_from(
    ["..", ".", "/", "\\", "C:", "~", "con", "NUL", ".html", "a", "kept.html", "index.html", "\u202e", "\x00", "é", " "]
)
_NAMES = st.lists(_PARTS | st.text(max_size=3), max_size=6).map("".join) | st.text(max_size=300)
_BLOCKS = st.lists(st.builds(CodeBlock, st.sampled_from(["html", "", "py"]) | st.text(max_size=9), _NAMES, st.text()))


@given(blocks=_BLOCKS, overwrite=st.booleans())
def test_files_are_never_outside_the_folder_and_never_over_another(blocks: list[CodeBlock], overwrite: bool) -> None:
    with TemporaryDirectory() as root:
        folder = Path(root) / "code"
        folder.mkdir()
        kept = {Path(root) / "kept.html", folder / "kept.html", folder / "index.html", folder / "answer.txt"}
        for file in kept:
            file.write_text("kept", encoding="utf-8")
        saved = save_code(blocks, folder, overwrite=overwrite)
        contents = [path.read_bytes() for path in saved]
        assert contents == [block.code.encode("utf-8", "replace") for block in blocks]
        assert {path.parent for path in saved} <= {folder}
        assert len({path.name.casefold() for path in saved}) == len(saved)
        files = {Path(parent) / name for parent, _, names in os.walk(root) for name in names}
        assert files == kept | set(saved)
        untouched = kept - set(saved) if overwrite else kept
        assert all(file.read_text(encoding="utf-8") == "kept" for file in untouched)
        assert overwrite or not kept & set(saved)


@given(st.text(alphabet=st.sampled_from("`~ \n\tab>-1.<!{}=\"'/\\.:"), max_size=80) | st.text())
def test_any_answer_is_read(answer: str) -> None:
    for block in code_blocks(answer):
        assert block.code.strip()
        assert block.language == block.language.lower()
