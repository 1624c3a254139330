"""Where llavactl keeps things on this machine."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from llavactl.core.errors import LlavactlError

_SURROGATE = re.compile("[\ud800-\udfff]")


def cache_dir() -> Path:
    """What can be made again: features, hashes, converted weights. ``LLAVACTL_HOME`` overrides it."""
    return _home("cache")


def data_dir() -> Path:
    """What can't be made again. ``LLAVACTL_HOME`` overrides it."""
    return _home("data")


def _home(kind: str) -> Path:
    if home := os.environ.get("LLAVACTL_HOME"):
        return expand_user(home).absolute() / kind
    import platformdirs

    try:
        found = platformdirs.user_cache_dir("llavactl") if kind == "cache" else platformdirs.user_data_dir("llavactl")
    except (RuntimeError, KeyError) as error:
        raise LlavactlError(
            "this user has no home folder for features and other caches",
            hint="set LLAVACTL_HOME to a writable folder",
        ) from error
    return Path(found).absolute()


def expand_user(path: str | Path) -> Path:
    """``path`` with a leading ``~`` or ``~user`` resolved.

    Raises:
        LlavactlError: there is no such user, or this one has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise LlavactlError(f"{path}: {error}", hint="write the path in full") from error


_LIBRARIES = {"HF_HOME": "huggingface", "MPLCONFIGDIR": "matplotlib", "TORCHINDUCTOR_CACHE_DIR": "torchinductor"}


def redirect_library_caches() -> None:
    """Points the caches of libraries below LLAVACTL_HOME if the user has no writable home folder."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - leaves ~ where there is none, and doesn't raise
    if os.environ.get("LLAVACTL_HOME") and not (home.is_absolute() and os.access(home, os.W_OK)):
        for name, folder in _LIBRARIES.items():
            if not (home / ".cache" / folder).is_dir():
                os.environ.setdefault(name, str(cache_dir() / folder))


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes ``path`` whole or not at all: a temporary sibling, flushed to disk, then renamed over it."""
    with open_atomic(path) as file:
        file.write(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that becomes ``path`` at the end of the block; interrupted, it leaves ``path`` as it was."""
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
            error.filename = str(path)  # a full disk doesn't say where it is
        raise


@contextlib.contextmanager
def exclusive_lock(lock_file: Path, busy: Exception, timeout_s: float = 0) -> Iterator[None]:
    """Holds an exclusive lock on ``lock_file``; the system releases it if the process dies.

    On a file system without locks, a file ``*.owner`` beside it names the process that holds the lock. If that process
    was killed, the next one on the same machine takes over. Whether a process on another machine is still running
    can't be determined, so the error then says which file to remove.

    Raises:
        Exception: ``busy``, if another process holds the lock for longer than ``timeout_s`` seconds.
        OSError: the lock can't be created.
    """
    import filelock

    lock_file.parent.mkdir(parents=True, exist_ok=True)
    mode = 0o666 & ~_UMASK  # whoever may write to a shared store may lock it
    lock: filelock.BaseFileLock
    if has_locks(lock_file.parent):
        lock = filelock.FileLock(lock_file, timeout_s, mode)
    else:
        owner = lock_file.with_name(f"{lock_file.name}.owner")
        lock = filelock.SoftFileLock(owner, timeout_s, mode)
        if isinstance(busy, LlavactlError):
            busy.hint += f"; this file system has no locks: if that process died on another machine, remove {owner}"
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

    Some NFS, Lustre and FUSE mounts refuse every lock, with various errors. So any error counts: no other process can
    hold a lock on a file that was just created.
    """
    try:
        import fcntl
    except ImportError:
        return True  # Windows
    with contextlib.ExitStack() as opened:
        try:
            probe = opened.enter_context(tempfile.TemporaryFile(dir=folder))
        except OSError:
            return True  # taking the lock will report what is wrong with the folder
        try:
            (fcntl.lockf if posix else fcntl.flock)(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; {} where there is none, or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def file_stamp(status: os.stat_result) -> str:
    """Changes whenever a file's content may have changed, also if a copy preserved the modification time."""
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def apply_umask(path: Path) -> None:
    """Gives a file that some library made private the permissions of any other file that the user writes."""
    path.chmod(0o666 & ~_UMASK)


def sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """``document`` as indented JSON, atomically."""
    write_atomic(path, json_text(document, indent=2) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON that every parser reads: in UTF-8, undecodable bytes of a file name escaped, NaN as null."""
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), indent=indent, ensure_ascii=False)
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _finite(value: Any) -> Any:
    """``value`` with null for each number that JSON doesn't have: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# mkstemp makes private files; what we write is as readable as anything else the user writes.
_UMASK = _umask()
