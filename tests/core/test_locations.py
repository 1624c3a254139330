"""Paths in messages are short, and name the right file even with symbolic links."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavactl.core.locations import shown_path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory ``run``, beside the folder ``other``; ``run/link`` leads to ``other/inner``."""
    root = tmp_path.resolve()
    for folder in ("run/data", "other/inner"):
        (root / folder).mkdir(parents=True)
    for file in ("run/a.yaml", "run/data/b.json", "other/c.yaml", "other/inner/d.json"):
        (root / file).touch()
    (root / "run/link").symlink_to(root / "other/inner")
    monkeypatch.chdir(root / "run")
    return root / "run"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("a.yaml", "a.yaml"),
        ("./data/b.json", "data/b.json"),
        ("{here}/data/b.json", "data/b.json"),
        ("../run/a.yaml", "a.yaml"),
        ("data/../a.yaml", "a.yaml"),
        ("{here}/../run/data/b.json", "data/b.json"),
        ("{here}/../run/data/../a.yaml", "a.yaml"),
        ("link/d.json", "link/d.json"),
        ("../other/c.yaml", "../other/c.yaml"),
        ("link/../c.yaml", "link/../c.yaml"),
        ("{here}/../other/c.yaml", "{root}/other/c.yaml"),
        ("{here}/link/../c.yaml", "{root}/other/c.yaml"),
        ("{here}/link/../../run/link/d.json", "link/d.json"),
        ("../other/missing/../c.yaml", "../other/missing/../c.yaml"),
    ],
)
def test_a_shown_path_is_relative_where_it_can_be(here: Path, written: str, shown: str) -> None:
    written, shown = (text.format(here=here, root=here.parent) for text in (written, shown))
    assert shown_path(Path(written)) == shown
    if Path(written).exists():
        assert Path(shown).samefile(written)
