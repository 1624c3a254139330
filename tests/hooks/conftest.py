"""Small plugin packages as pip installs them: a module and a dist-info folder."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ..preloaded import Interpreters


@dataclass
class Site:
    """A folder of installed packages, with which ``llavactl`` is run."""

    folder: Path
    home: Path
    interpreters: Interpreters
    names: list[str] = field(default_factory=list)

    def install(self, name: str, code: str, **files: str) -> None:
        """Installs a plugin ``name`` with ``code`` in its module ``<name>_plugin``."""
        module = f"{name}_plugin"
        self.add_entry_point(f"{module}-1.2", name, module)
        package = self.folder / module
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(code)
        for file, content in files.items():
            path = package / file.replace("__", ".")
            path.write_text(content)

    def add_entry_point(self, distribution: str, name: str, module: str) -> None:
        info = self.folder / f"{distribution}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        package, _, version = distribution.rpartition("-")
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(f"[llavactl]\n{name} = {module}\n")
        self.names.append(name)

    def run(self, *arguments: str, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs ``llavactl ARGUMENTS`` in a new process; by default only the installed test plugins are selected."""
        return self.python("from llavactl.cli import main; main()", *arguments, code=code, **environment)

    def python(
        self, program: str, *arguments: str, code: int | None = 0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = self.interpreters.run(program, *arguments, **self.settings(**environment))
        assert code is None or done.returncode == code, done.stderr
        return done

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts ``llavactl ARGUMENTS``."""
        command = [sys.executable, "-c", "from llavactl.cli import main; main()", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **self.settings())

    def settings(self, **environment: str) -> dict[str, Any]:
        """Folder and environment of a process in which the test plugins are installed and selected."""
        return {
            "cwd": self.folder,
            "env": {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, (str(self.folder), os.environ.get("PYTHONPATH")))),
                "LLAVACTL_HOME": str(self.home),
                "LLAVACTL_PLUGINS": ",".join(dict.fromkeys(self.names)),
                **environment,
            },
        }


@pytest.fixture
def site(tmp_path: Path, interpreters: Interpreters) -> Site:
    folder = tmp_path / "site"
    folder.mkdir()
    return Site(folder, tmp_path / "user", interpreters)
