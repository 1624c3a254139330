"""Runs Python programs in processes that need not import torch and transformers first, which takes seconds.

``Interpreters`` starts one process, with this file as its program. It imports libraries and forks itself for every
program that it is sent. llavactl is not among them: each program imports it anew, with its own environment.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

WITHOUT_HUB = (
    *("click", "h5py", "PIL.Image", "pluggy", "pydantic", "yaml"),
    *("torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"),
)
"""Libraries that don't import huggingface_hub, which reads its variables when it is imported."""

LIBRARIES = (
    *WITHOUT_HUB,
    *(f"transformers.models.{each}" for each in ("auto.modeling_auto", "clip.modeling_clip", "llama.modeling_llama")),
)


class Interpreters:
    """Starts and runs programs; ``close`` ends the process that they are forked from.

    A program has the variables that Python and libraries read when they start from this process, but for PYTHONPATH.
    """

    def __init__(self, libraries: Sequence[str] = LIBRARIES) -> None:
        self._libraries = libraries
        self._server: subprocess.Popen[str] | None = None

    def run(self, program: str, *arguments: str, cwd: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Does what ``python -c PROGRAM ARGUMENTS`` does, without input."""
        command = [sys.executable, "-c", program, *arguments]
        if not hasattr(os, "fork"):
            return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        with (
            Path(os.devnull).open() as stdin,
            tempfile.TemporaryFile("w+") as stdout,
            tempfile.TemporaryFile("w+") as stderr,
        ):
            files = stdin.fileno(), stdout.fileno(), stderr.fileno()
            code = self.start_on(files, program, *arguments, cwd=cwd, env=env).wait()
            output = [file.read() for file in (stdout, stderr) if file.seek(0) == 0]
        return subprocess.CompletedProcess(command, code, *output)

    def start(
        self,
        program: str,
        *arguments: str,
        cwd: Path,
        env: Mapping[str, str],
        output: Path,
        errors: Path | None = None,
    ) -> Process:
        """Starts what ``run`` runs; stdout is appended to ``output``, stderr to ``errors`` or to the same file."""
        with Path(os.devnull).open() as stdin, output.open("a") as stdout, (errors or output).open("a") as stderr:
            files = stdin.fileno(), stdout.fileno(), stderr.fileno()
            return self.start_on(files, program, *arguments, cwd=cwd, env=env)

    def start_on(
        self, files: Sequence[int], program: str, *arguments: str, cwd: Path, env: Mapping[str, str]
    ) -> Process:
        """Starts a program in a session of its own; needs ``os.fork``.

        ``files`` are the descriptors of stdin, stdout and stderr. If stdin is a terminal, it becomes the session's.
        """
        if self._server is None:
            self._server, self._files = self._started()
        socket.send_fds(self._files, [b"3"], files)
        pid = self._request({"program": program, "arguments": arguments, "cwd": str(cwd), "env": dict(env)})
        assert pid
        return Process(pid, self._request)

    def _started(self) -> tuple[subprocess.Popen[str], socket.socket]:
        """The process, and a socket that sends it descriptors."""
        sending, receiving = socket.socketpair()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with receiving:
            server = subprocess.Popen(
                [sys.executable, __file__, str(receiving.fileno()), *self._libraries],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                pass_fds=[receiving.fileno()],
                start_new_session=True,  # Ctrl-C interrupts the tests, which then close it
            )
        return server, sending

    def _request(self, request: object) -> int | None:
        assert self._server
        assert self._server.stdin
        assert self._server.stdout
        print(json.dumps(request), file=self._server.stdin, flush=True)
        answer: int | None = json.loads(self._server.stdout.readline())
        return answer

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate()
            self._files.close()


@dataclass(frozen=True)
class Process:
    """A started program, with the methods of ``subprocess.Popen``."""

    pid: int
    request: Callable[[object], int | None]

    def poll(self) -> int | None:
        return self.request({"pid": self.pid, "options": os.WNOHANG})

    def wait(self) -> int:
        code = self.request({"pid": self.pid, "options": 0})
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def serve(descriptors: socket.socket) -> None:
    """Answers each request on stdin with the id, or with the exit code, of a process."""
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: int | None
        if "program" in request:
            _, files, *_ = socket.recv_fds(descriptors, 1, 3)
            if not (answer := os.fork()):
                exit_quickly(execute(files=files, **request))
            for file in files:
                os.close(file)
        else:
            answer = exit_code(codes, **request)
        print(json.dumps(answer), flush=True)


def exit_code(codes: dict[int, int], pid: int, options: int) -> int | None:
    """The exit code of the process ``pid``, or minus the signal that killed it; None while it runs."""
    if pid not in codes:
        ended, status = os.waitpid(pid, options)
        if not ended:
            return None
        codes[pid] = os.waitstatus_to_exitcode(status)
    return codes[pid]


def execute(program: str, arguments: list[str], cwd: str, env: dict[str, str], files: list[int]) -> int:
    """Executes ``program`` as the main module of this process; its exit code."""
    os.setsid()
    for descriptor, file in enumerate(files):
        os.dup2(file, descriptor)
        os.close(file)
    if os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
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
    import fcntl
    import termios

    for library in sys.argv[2:]:
        importlib.import_module(library)
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))
