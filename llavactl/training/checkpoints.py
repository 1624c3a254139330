"""Checkpoints, written atomically. A run resumes from the newest intact one; the best one is kept as well.

All processes write and read a checkpoint together (``torch.distributed.checkpoint``, in safetensors files): each its
share of the tensors. A checkpoint can be read by another number of processes, sharded or not. The folder of the
checkpoints must be the same for all processes, on a shared file system if there are several machines.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from llavactl.core.errors import StoreError
from llavactl.core.paths import write_json
from llavactl.model.folder import replace_folder
from llavactl.training.collective import on_main, process_count, process_index, together

log = logging.getLogger(__name__)

STATE = "state.json"

MIN_FILE_BYTES = 16 * 2**20
MAX_FILES = 256
"""Per process. The writer holds a file and its serialization in memory: less than a hundredth of a large checkpoint."""


@dataclass(frozen=True)
class CheckpointState:
    """The number of completed steps, the digest of the run, and the validation loss and scores at this step, if any."""

    step: int
    digest: str
    val_loss: float | None = None
    scores: Mapping[str, float] | None = None

    def badness(self, restore_best: bool | str) -> float:
        """The best checkpoint has the lowest: its validation loss, or minus the score that ``restore_best`` names.

        Infinity if it is missing or not finite.
        """
        if isinstance(restore_best, str):
            score = (self.scores or {}).get(restore_best)
            value = None if score is None else -score
        else:
            value = self.val_loss
        return value if value is not None and math.isfinite(value) else math.inf


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint in ``folder``."""

    folder: Path
    state: CheckpointState

    def names(self) -> frozenset[str]:
        """The names of its tensors."""
        return frozenset(self._reader().read_metadata().state_dict_metadata)

    def read(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fills ``tensors`` in place; all processes must call this together.

        Raises:
            StoreError: a file can't be read.
        """
        try:
            with _no_single_process_warning():
                state_dict_loader.load(dict(tensors), storage_reader=self._reader(), no_dist=process_count() == 1)
        except (CheckpointException, OSError, SafetensorError) as error:
            raise _read_error(self.folder, error) from error

    def _reader(self) -> HuggingFaceStorageReader:
        return HuggingFaceStorageReader(str(self.folder))


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def save(
    folder: Path,
    state: CheckpointState,
    tensors: Mapping[str, torch.Tensor],
    keep_last: int,
    restore_best: bool | str = False,
) -> Path:
    """Writes ``folder/step-…``, then removes obsolete checkpoints; all processes must call this together.

    The newest ``keep_last`` checkpoints of the same run are kept, and the best one: by the score that ``restore_best``
    names, else by validation loss. Those of other runs, and those of this run beyond ``state.step`` (from before it was
    restarted), are removed.

    Raises:
        StoreError: it can't be written.
    """
    target = checkpoint_path(folder, state.step)
    temporary = target.with_name(f".{target.name}.partial")
    try:
        on_main(lambda: _create(temporary))
        _write(temporary, _writable(tensors))
        names = on_main(lambda: sorted(file.name for file in temporary.glob("*.safetensors")))
        files = together(lambda: _own_hashes(temporary, names))
        content = {**asdict(state), "files": {name: value for part in files for name, value in part.items()}}
        on_main(lambda: _finish(temporary, target, content))
    except (CheckpointException, OSError, SafetensorError) as error:
        if process_index() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise StoreError(
            f"{target}: can't be written: {_reason(error)}",
            hint="free disk space, check permissions, or set another `run_dir`",
        ) from error
    if process_index() == 0:
        _remove_obsolete(folder, state, keep_last, restore_best)
    return target


def _create(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _writable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``tensors`` as safetensors accepts them: contiguous, and without shared memory."""
    storages: set[int] = set()
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            result[name] = tensor
            continue
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone().contiguous() if address in storages else tensor.contiguous()
        storages.add(address)
    return result


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_file_indices(tensors), save_distributed=True)
    with _no_single_process_warning():
        state_dict_saver.save(tensors, storage_writer=writer, no_dist=process_count() == 1)


@contextmanager
def _no_single_process_warning() -> Iterator[None]:
    """torch warns about ``no_dist`` although it was requested."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
        yield


def file_bytes(total: int) -> int:
    """The size of the files in which a process writes ``total`` bytes; a larger tensor is a file by itself."""
    return max(MIN_FILE_BYTES, total // MAX_FILES)


def _file_indices(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The index, from 1, of the file of each tensor."""
    sizes = {name: (t.to_local() if isinstance(t, DTensor) else t).nbytes for name, t in tensors.items()}
    limit = file_bytes(sum(sizes.values()))
    indices, index, size = {}, 1, 0
    for name, part in sizes.items():
        if size and size + part > limit:
            index, size = index + 1, 0
        indices[name] = index
        size += part
    return indices


def _own_hashes(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The hashes of this process's part of the files ``names``, by name."""
    return {name: _sha256(folder / name) for name in names[process_index() :: process_count()]}


def _finish(temporary: Path, target: Path, content: Mapping[str, object]) -> None:
    write_json(temporary / STATE, content)
    replace_folder(temporary, target)


def _remove_obsolete(folder: Path, state: CheckpointState, keep_last: int, restore_best: bool | str) -> None:
    try:
        existing = _newest_first(folder)
    except StoreError as error:
        log.warning("%s; older checkpoints are kept", error)
        return
    own = [each for each in existing if each.state.digest == state.digest and each.state.step <= state.step]
    kept = {each.folder for each in own[:keep_last]} | {_best(own, restore_best).folder}
    for path in [*folder.glob("step-*"), *folder.glob(".step-*")]:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def load_newest(folder: Path, digest: str) -> Checkpoint | None:
    """The newest intact checkpoint of the run ``digest``; damaged ones are skipped. The same in all processes.

    Raises:
        StoreError: a checkpoint can't be read. It may be intact, and skipping it would lose its steps.
    """
    own = []
    for checkpoint in on_main(lambda: _newest_first(folder)):
        if checkpoint.state.digest == digest:
            own.append(checkpoint)
        elif process_index() == 0:
            log.info("%s belongs to other settings or data and is not resumed", checkpoint.folder)
    return _first_intact(own)


def load_best(folder: Path, digest: str, restore_best: bool | str = True) -> Checkpoint | None:
    """The best intact checkpoint of the run ``digest``, see ``save``; raises like ``load_newest``."""
    own = [each for each in on_main(lambda: _newest_first(folder)) if each.state.digest == digest]
    return _first_intact(sorted(own, key=lambda each: each.state.badness(restore_best)))


def remove(folder: Path) -> None:
    """Removes ``folder`` and all checkpoints in it."""
    shutil.rmtree(folder, ignore_errors=True)


def _best(checkpoints: Sequence[Checkpoint], restore_best: bool | str) -> Checkpoint:
    """The best of ``checkpoints``, sorted newest first; the newest among equals."""
    return min(checkpoints, key=lambda each: each.state.badness(restore_best))


def _newest_first(folder: Path) -> list[Checkpoint]:
    checkpoints = []
    for path in sorted(_checkpoint_folders(folder), reverse=True):
        with _skip_if_damaged(path):
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            fields = state["step"], state["digest"], state["val_loss"], state.get("scores")
            checkpoints.append(Checkpoint(path, CheckpointState(*fields)))
    return checkpoints


def _checkpoint_folders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.name.startswith("step-")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _read_error(folder, error) from error


def _first_intact(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """The first of ``checkpoints`` whose files have the right hashes; each process verifies a part of the files."""
    for checkpoint in checkpoints:
        if all(together(partial(_is_intact, checkpoint.folder))):
            return checkpoint
    return None


def _is_intact(folder: Path) -> bool:
    """Whether the files that this process verifies are intact."""
    with _skip_if_damaged(folder):
        expected = _file_hashes(json.loads((folder / STATE).read_text(encoding="utf-8")))
        for name in sorted(expected)[process_index() :: process_count()]:
            if _sha256(folder / name) != expected[name]:
                raise ValueError(f"checksum mismatch of {name}")
        return True
    return False


def _file_hashes(state: Mapping[str, object]) -> Mapping[str, str]:
    """The hashes of the files; up to version 0.4 there was one file, and no names."""
    files = state["files"] if "files" in state else {"optimizer.safetensors": state["sha256"]}
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{STATE} lists no files")
    return files


@contextmanager
def _skip_if_damaged(checkpoint: Path) -> Iterator[None]:
    """Logs damage as a warning and ends the block; a checkpoint that can't be read raises StoreError."""
    try:
        yield
    except (FileNotFoundError, ValueError, KeyError, TypeError, SafetensorError) as error:
        log.warning("skipping damaged checkpoint %s (%s)", checkpoint, error)
    except OSError as error:
        raise _read_error(checkpoint, error) from error


def _read_error(path: Path, error: BaseException) -> StoreError:
    """The error for ``path``, a checkpoint or the checkpoints' folder."""
    file, reason = (error.filename, error.strerror) if isinstance(error, OSError) else (None, None)
    return StoreError(
        f"{file or path} can't be read: {reason or _reason(error)}",
        hint="check permissions, disk and mount, then run the same command to resume; "
        f"if you remove {path.name}, its steps are trained again",
    )


def _reason(error: BaseException) -> str:
    """``error`` on one line; of an error in several processes, the first."""
    if isinstance(error, CheckpointException) and error.failures:
        failure, _ = next(iter(error.failures.values()))
        return _reason(failure)
    return " ".join(str(error).split())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
