"""The report of a run in a browser: layout, decoded images, and no network requests."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llavactl.testing import run_cli, toy_recipe

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")]

TASK = "\neval: {tasks: [{name: scenes, scenes: 4}], blind_baseline: true, stage1_baseline: true, max_new_tokens: 2}\n"
NEXT = 'try_next: ["llavactl run -o connector.name=linear"]\n'

# Collects facts that only a browser has, and writes them into the title of the dumped page.
PROBE = """
<script>
  addEventListener("load", () => {
    const images = [...document.images];
    document.title = ["images", images.length, "decoded", images.filter(i => i.naturalWidth > 0).length,
      "wide", document.documentElement.scrollWidth <= innerWidth, "tall", document.body.scrollHeight > 1000,
      "requests", performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length].join(" ");
  });
</script>
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    recipe = toy_recipe(folder)
    recipe.write_text(recipe.read_text() + TASK + NEXT)
    assert run_cli("run", cwd=folder).exit_code == 0
    return folder / "runs" / "toy" / "report.html"


def browse(page: Path, tmp_path: Path, *arguments: str) -> str:
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [BROWSER, *flags, *arguments, "--virtual-time-budget=5000", page.as_uri()]
    environment = {**os.environ, "HOME": str(tmp_path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment).stdout


def test_the_page_has_all_sections(report: Path, tmp_path: Path) -> None:
    shown = browse(report, tmp_path, "--window-size=1200,900", "--dump-dom")
    for words in ("Stage 1", "Stage 2", "blind baseline", "chance", "95 %", "Try next", "total"):
        assert words in shown, words
    assert "shuffled image" in shown


@pytest.mark.parametrize("width", [1200, 500])
def test_images_decode_and_nothing_is_fetched(report: Path, tmp_path: Path, width: int) -> None:
    html = report.read_text()
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', html)
    assert policy, "the page must forbid the browser to load anything"
    probed = tmp_path / "probed.html"
    # The policy would also block the probe: it is checked above and removed from this copy only.
    probed.write_text(html.replace(policy[0], "").replace("</body>", PROBE + "</body>"))
    shown = browse(probed, tmp_path, f"--window-size={width},900", "--dump-dom")
    title = re.search(r"<title>images (\d+) decoded (\d+) wide (\w+) tall (\w+) requests (\d+)</title>", shown)
    assert title, shown[:500]
    assert int(title[1]) >= 14, "two curves and twelve scenes"
    assert title[1] == title[2]
    assert title.groups()[2:] == ("true", "true", "0")
