"""Runs Python programs in processes that need not import torch and transformers first, which takes seconds.

``Interpreters`` starts one process, with this file as its program. It imports ``LIBRARIES`` and forks itself for every
program that it is sent. llavactl is not among them: each program imports it anew, with its own environment.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping
from pathlib import Path

LIBRARIES = (
    "click", "h5py", "PIL.Image", "pluggy", "pydantic", "yaml", "torch._dynamo", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "transformers.models.auto.modeling_auto", "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip


class Interpreters:
    """Runs programs; ``close`` ends the process that they are forked from."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(self, program: str, *arguments: str, cwd: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Does what ``python -c PROGRAM ARGUMENTS`` does, without input.

        The variables that Python and libraries read when they start are those of this process, but for PYTHONPATH.
        """
        command = [sys.executable, "-c", program, *arguments]
        if not hasattr(os, "fork"):
            return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        with tempfile.TemporaryDirectory() as folder:
            stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
            code = self._send(
                program=program,
                arguments=arguments,
                cwd=str(cwd),
                env=dict(env),
                stdout=str(stdout),
                stderr=str(stderr),
            )
            return subprocess.CompletedProcess(command, code, stdout.read_text(), stderr.read_text())

    def _send(self, **request: object) -> int:
        if self._server is None:
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            self._server = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C interrupts the tests, which then close it
            )
        assert self._server.stdin
        assert self._server.stdout
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate()


def serve() -> None:
    """Forks for each request on stdin, and writes the exit code to stdout."""
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            exit_quickly(execute(**json.loads(line)))
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def execute(program: str, arguments: list[str], cwd: str, env: dict[str, str], stdout: str, stderr: str) -> int:
    """Executes ``program`` as the main module of this process; its exit code."""
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, stdout, os.O_WRONLY | os.O_CREAT),
        (2, stderr, os.O_WRONLY | os.O_CREAT),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = ["", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *sys.path[1:]]
    sys.argv = ["-c", *arguments]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        exec(compile(program, "<string>", "exec"), main.__dict__)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001 - as an interpreter does
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def exit_quickly(code: int) -> None:
    """Exits as an interpreter does, but for freeing the memory of each object, which takes half a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()
    serve()
