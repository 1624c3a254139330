"""The report of ``data generate``: correct statistics, and no active content."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llavactl.core.protocols import Request
from llavactl.core.schema import Sample, Turn
from llavactl.images.image_file import ImageFile
from llavactl.report.instructions import write_instructions
from llavactl.teaching.generate import GeneratedRecord
from llavactl.teaching.summary import GenerationSummary

EVIL = '<script src="http://evil.example/x.js"></script><img src=x onerror=alert(1)>'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def generated(
    folder: Path, number: int, kind: str = "detail", text: str = "A dog is here.", category: str = ""
) -> GeneratedRecord:
    sample = Sample(str(number), (Turn("user", (ImageFile(str(folder), f"{number}.png"),)),))
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": text}]
    record: Any = None if category else {"conversations": turns}
    return GeneratedRecord(Request(f"{number}-{kind}", kind, (), sample), record, category and "why", category)


def page(folder: Path, rows: list[GeneratedRecord]) -> str:
    summary = GenerationSummary(seed=1)
    for row in rows:
        summary.add(row)
    examples = [(each.request.kind, each.request.sample.images, each.record) for each in summary.examples]
    return write_instructions(folder / "page.html", "instruct", summary.document(), examples).read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(12):
        data = io.BytesIO()
        Image.new("RGB", (40, 30), (number * 20, 0, 0)).save(data, "PNG")
        (tmp_path / f"{number}.png").write_bytes(data.getvalue())
    return tmp_path


def test_statistics_and_samples(folder: Path) -> None:
    rows = [generated(folder, n, "detail" if n % 2 else "reasoning", "word " * (n + 1)) for n in range(30)]
    rows += [generated(folder, n, category="leak") for n in range(3)]
    summary = GenerationSummary(seed=1)
    for row in rows:
        summary.add(row)
    assert summary.document() == {
        "written": {"reasoning": 15, "detail": 15},
        "refused": {"leak": {"detail": 3}},
        "lengths": {
            "detail: answers": {"min": 2, "median": 16, "p90": 28, "max": 30},
            "detail: questions": {"min": 3, "median": 3, "p90": 3, "max": 3},
            "detail: turns": {"min": 1, "median": 1, "p90": 1, "max": 1},
            "reasoning: answers": {"min": 1, "median": 15, "p90": 27, "max": 29},
            "reasoning: questions": {"min": 3, "median": 3, "p90": 3, "max": 3},
            "reasoning: turns": {"min": 1, "median": 1, "p90": 1, "max": 1},
        },
        "openings": {"what is": 15},
    }
    assert json.loads(json.dumps(summary.document())) == summary.document()
    assert len({each.request.id for each in summary.examples}) == 10
    html = page(folder, rows)
    assert html.count("<article") == 10
    thumbnails = html.count("data:image/jpeg")
    assert thumbnails + html.count('class="blank"') == 10
    assert 0 < thumbnails < 10, "images above 11 are not on disk"


def test_samples_are_drawn_uniformly(folder: Path) -> None:
    counts = [0] * 30
    for seed in range(300):
        summary = GenerationSummary(seed)
        for n in range(30):
            summary.add(generated(folder, n))
        for each in summary.examples:
            counts[int(each.request.sample.id)] += 1
    assert min(counts) > 65
    assert max(counts) < 140


def test_the_page_has_no_active_content(folder: Path) -> None:
    html = page(folder, [generated(folder, 0, text=EVIL), generated(folder, 1, text="fine")])
    assert "<script" not in html
    assert "onerror=alert" not in re.sub(r"&lt;img.*?&gt;", "", html)
    assert "default-src 'none'" in html
    assert "{{" not in html
    assert "--accent" in html, "the style is included"


def test_without_records(folder: Path) -> None:
    html = page(folder, [generated(folder, 0, category="malformed")])
    assert "malformed" in html
    assert "<article" not in html
    assert page(folder, [])


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_in_a_browser(folder: Path) -> None:
    html = page(folder, [generated(folder, n, text=EVIL * 5) for n in range(12)])
    probe = (
        "<script>onload = () => { document.title = ['decoded', [...document.images].every(i => i.naturalWidth > 0),"
        " 'wide', document.documentElement.scrollWidth <= innerWidth].join(' ') }</script>"
    )
    # The page forbids scripts: they are allowed for this test only.
    path = folder / "probe.html"
    path.write_text(
        html.replace("default-src 'none'", "script-src 'unsafe-inline'").replace("</body>", probe + "</body>")
    )
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=390,800",
        "--dump-dom",
        str(path),
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=dict(os.environ))
    assert "<title>decoded true wide true" in found.stdout
