"""Cache and data folders, atomic writes, file locks and JSON files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from llavactl.core.control_characters import IN_JSON
from llavactl.core.errors import LlavactlError


def cache_dir() -> Path:
    """The folder for reproducible files: features, hashes, converted weights. ``LLAVACTL_HOME`` overrides it."""
    return _home("cache")


def data_dir() -> Path:
    """The folder for files that can't be reproduced. ``LLAVACTL_HOME`` overrides it."""
    return _home("data")


def _home(kind: str) -> Path:
    if home := os.environ.get("LLAVACTL_HOME"):
        return expand_user(home).absolute() / kind
    import platformdirs

    try:
        folder = platformdirs.user_cache_dir("llavactl") if kind == "cache" else platformdirs.user_data_dir("llavactl")
    except (RuntimeError, KeyError) as error:
        raise LlavactlError(
            "no home folder for features and other caches",
            hint="set LLAVACTL_HOME to a writable folder",
        ) from error
    return Path(folder).absolute()


def expand_user(path: str | Path) -> Path:
    """``path`` with a leading ``~`` or ``~user`` resolved; ``./~`` is a file, though ``Path`` removes the ``./``.

    Raises:
        LlavactlError: unknown user, or no home folder.
    """
    try:
        return Path(path).expanduser() if str(path).startswith("~") else Path(path)
    except RuntimeError as error:
        why = "there is no such user, or no home folder"
        raise LlavactlError(f"{path}: {why}", hint=f"give an absolute path, or ./{path} for a file here") from error


_LIBRARIES = {"HF_HOME": "huggingface", "MPLCONFIGDIR": "matplotlib", "TORCHINDUCTOR_CACHE_DIR": "torchinductor"}


def redirect_library_caches() -> None:
    """Moves the caches of libraries to LLAVACTL_HOME if the home folder is missing or not writable."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - doesn't raise without a home folder
    if os.environ.get("LLAVACTL_HOME") and not (home.is_absolute() and os.access(home, os.W_OK)):
        for name, folder in _LIBRARIES.items():
            if not (home / ".cache" / folder).is_dir():
                os.environ.setdefault(name, str(cache_dir() / folder))


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes ``path`` atomically: to a temporary file beside it, which is synced and then renamed."""
    with open_atomic(path) as file:
        file.write(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[IO[bytes]]:
    """A writable file that replaces ``path`` at the end of the context; after an exception, ``path`` is unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        apply_umask(temporary)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # ENOSPC has no file name
        raise


@contextlib.contextmanager
def exclusive_lock(lock_file: Path, busy: Exception, timeout_s: float = 0) -> Iterator[None]:
    """Holds an exclusive lock on ``lock_file``; the system releases it if the process dies.

    On a file system without locks, a file ``*.owner`` beside it records the owner instead. If the owner was killed, the
    next process on the same machine takes over. The state of an owner on another machine is unknown, so the hint of
    ``busy`` then tells the user which file to remove.

    Raises:
        Exception: ``busy``, if another process holds the lock for more than ``timeout_s`` seconds.
        OSError: the lock can't be created.
    """
    import filelock

    lock_file.parent.mkdir(parents=True, exist_ok=True)
    mode = 0o666 & ~_UMASK  # any user who can write to a shared store can lock it
    lock: filelock.BaseFileLock
    if has_locks(lock_file.parent):
        lock = filelock.FileLock(lock_file, timeout_s, mode)
    else:
        owner = lock_file.with_name(f"{lock_file.name}.owner")
        lock = filelock.SoftFileLock(owner, timeout_s, mode)
        if isinstance(busy, LlavactlError):
            busy.hint += f"; this file system has no locks: if the process died on another machine, remove {owner}"
    try:
        lock.acquire()
    except filelock.Timeout:
        raise busy from None
    try:
        yield
    finally:
        lock.release()


def has_locks(folder: Path, *, posix: bool = False) -> bool:
    """Whether files in ``folder`` can be locked, by flock or, with ``posix``, by fcntl (as SQLite does).

    Some NFS, Lustre and FUSE mounts reject all locks, with various errors. Any error means no support, since no other
    process can hold a lock on a new file.
    """
    try:
        import fcntl
    except ImportError:
        return True  # Windows
    with contextlib.ExitStack() as opened:
        try:
            probe = opened.enter_context(tempfile.TemporaryFile(dir=folder))
        except OSError:
            return True  # acquiring the lock will raise the error of the folder
        try:
            (fcntl.lockf if posix else fcntl.flock)(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; {} if the file is missing, invalid or not an object."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # the last one: nested too deeply
        return {}
    return document if isinstance(document, dict) else {}


def file_stamp(status: os.stat_result) -> str:
    """A string that changes whenever a file may have changed, even if its modification time was preserved."""
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def apply_umask(path: Path) -> None:
    """Gives a file that was created as private the default permissions of the user."""
    path.chmod(0o666 & ~_UMASK)


def sync_folder(folder: Path) -> None:
    """Syncs ``folder``, so that a rename in it survives a power failure, if the file system supports it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes ``document`` as indented JSON, atomically."""
    write_atomic(path, json_text(document, indent=2) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """``value`` as standard JSON: NaN and infinities as null, control characters escaped."""
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), indent=indent, ensure_ascii=False)
    return IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _finite(value: Any) -> Any:
    """``value`` with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# mkstemp creates private files; ours get the default permissions of the user.
_UMASK = _umask()
