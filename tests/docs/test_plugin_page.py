"""docs/how-to/plugin.md, followed; tests/hooks/test_new.py installs generated packages from wheels."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from llavactl.testing import run_cli

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "plugin.md"


def commands(program: str) -> list[list[str]]:
    """The arguments of the page's commands that run ``program``."""
    found = re.findall(rf"^{program} (.*)$", PAGE.read_text(encoding="utf-8"), re.M)
    return [shlex.split(line) for line in found]


def test_the_package_of_the_page_is_written_and_has_the_path_of_the_page(tmp_path: Path) -> None:
    (new,) = [words for words in commands("llavactl") if words[:2] == ["plugins", "new"]]
    assert run_cli(*new, cwd=tmp_path).exit_code == 0
    (folder,) = tmp_path.iterdir()
    assert [words[-1].removesuffix("[test]") for words in commands("pip")][:1] == [folder.name]
    assert commands("python -m pytest") == [[folder.name]]
    assert ["plugins", "check", new[2]] in commands("llavactl")


def test_the_single_file_of_the_page_works(toy: Path) -> None:
    (code,) = re.findall(r"^```python\n(# watch\.py\n.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    (toy / "watch.py").write_text(code, encoding="utf-8")
    (train,) = [words for words in commands("llavactl") if words[0] == "--plugin"]
    overrides = ("-o", "plugins.watch.every=2", "-o", "features.mode=live", "-o", "stage1.max_steps=3")
    trained = run_cli(*train, *overrides, cwd=toy)
    assert trained.exit_code == 0, trained.stderr
    assert "stage 1, step 2: loss" in trained.stderr
    assert "stage 1, step 3: loss" not in trained.stderr
    (check,) = [words for words in commands("llavactl") if words[-1] == "watch.py"]
    assert run_cli(*check, cwd=toy).exit_code == 0


def test_an_example_of_the_page_is_checked(tmp_path: Path) -> None:
    """The hook ``check_examples`` of the page belongs to the source that ``plugins new`` writes."""
    (code,) = re.findall(r"^```python\n([^`]*check_examples[^`]*)^```$", PAGE.read_text(encoding="utf-8"), re.M)
    namespace: dict[str, object] = {}
    exec(code, namespace)
    examples = namespace["check_examples"]
    assert callable(examples)
    assert Path(examples(tmp_path)["sources"]["birds"]["path"]).read_text(encoding="utf-8").startswith("image,")
