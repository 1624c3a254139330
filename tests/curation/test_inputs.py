"""Progress bars over the files that the data commands read."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavactl.core.progress import Progress, reporting_to
from llavactl.curation.inputs import reading


@pytest.mark.parametrize("text", ["A brown dog. ", "一只棕色的狗。"])
def test_progress_in_a_file_reaches_its_size(tmp_path: Path, text: str) -> None:
    file = tmp_path / "records.txt"
    content = text * 50_000
    file.write_text(content, encoding="utf-8")
    seen: list[Progress] = []
    with reporting_to(seen.append), reading(file, "check") as show:
        show(len(content) // 2, 1)
        show(len(content), 2)
    size = file.stat().st_size
    assert [each.total for each in seen] == [size, size]
    assert [each.done for each in seen] == pytest.approx([size / 2, size], rel=1e-3)
