"""``plugins list`` and plugins whose import hangs."""

from __future__ import annotations

import json
import signal
import time
from typing import Any

import pytest

HEAD = "from llavactl import hookimpl\n\n\n@hookimpl\n"
OBSERVER = HEAD + "def train_logged(line):\n    pass\n"


@pytest.fixture
def plugins(site: Any) -> Any:
    """A correct plugin, and one whose import hangs."""
    site.install("fine", OBSERVER)
    site.install("stuck", "import time\ntime.sleep(600)\n")
    return site


def test_a_hanging_import_is_listed(plugins: Any) -> None:
    started = time.monotonic()
    done = plugins.run("plugins", "list", "--json", "--timeout", "10")
    assert time.monotonic() - started < 300
    builtin, fine, stuck = json.loads(done.stdout)
    assert (builtin["name"], builtin["status"]) == ("llavactl", "ok")
    assert (fine["status"], fine["hooks"], fine["package"], fine["version"]) == (
        "ok",
        ["train_logged"],
        "fine-plugin",
        "1.2",
    )
    assert 0 < fine["import_s"] < 10
    assert (stuck["status"], stuck["import_s"], stuck["hooks"]) == ("hangs", None, [])
    assert "stuck" in stuck["error"]


def test_the_table_has_hooks_import_time_and_status(site: Any) -> None:
    site.install("fine", OBSERVER)
    builtin, fine = (line.split() for line in site.run("plugins", "list").stdout.splitlines())
    assert (builtin[0], builtin[-1]) == ("llavactl", "ok")
    assert (fine[:4], fine[-2:]) == (["fine", "fine-plugin", "1.2", "train_logged"], ["s", "ok"])


def test_a_command_names_the_plugin_whose_import_hangs(plugins: Any) -> None:
    process = plugins.start("recipes", "list")
    line = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert "plugin stuck" in line
    assert line.rstrip().endswith("LLAVACTL_PLUGINS=fine")
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert "llava-v1-7b" in plugins.run("recipes", "list", LLAVACTL_PLUGINS="fine").stdout


def test_the_check_reports_a_hanging_import(plugins: Any) -> None:
    done = plugins.run("plugins", "check", "stuck", "--timeout", "2", "--json", code=1)
    (check,) = json.loads(done.stdout)["checks"]
    assert (check["check"], check["ok"]) == ("import", False)


def test_a_file_whose_import_hangs_is_listed_once(plugins: Any) -> None:
    (plugins.folder / "own.py").write_text("import time\ntime.sleep(600)\n")
    arguments = ("--plugin", "own.py", "plugins", "list", "--json", "--timeout", "2")
    done = plugins.run(*arguments, LLAVACTL_PLUGINS="fine,own")
    listed = {each["name"]: each for each in json.loads(done.stdout)}
    assert (listed["fine"]["status"], listed["own"]["status"]) == ("ok", "hangs")
    assert listed["own"]["error"].endswith("--plugin own.py")
    assert done.stderr == ""


def test_import_times_are_measured_apart(site: Any) -> None:
    """The first plugin that imports a package would otherwise be the only slow one."""
    for name in ("aaa", "bbb"):
        site.install(name, "import time\nimport shared\n" + OBSERVER)
    (site.folder / "shared.py").write_text("import time\ntime.sleep(0.5)\n")
    listed = json.loads(site.run("plugins", "list", "--json").stdout)
    assert [each["import_s"] > 0.5 for each in listed[1:]] == [True, True]


def test_a_plugin_that_ends_the_process_is_listed(site: Any) -> None:
    site.install("fine", OBSERVER)
    site.install("worse", "import os\nos._exit(5)\n")
    listed = {each["name"]: each for each in json.loads(site.run("plugins", "list", "--json").stdout)}
    assert listed["fine"]["status"] == "ok"
    assert listed["worse"]["status"] == "broken"
    assert "5" in listed["worse"]["error"]
