"""The lengths of all samples of a data set in tokens, computed by all cores and cached by content.

Training packs one global batch at a time and needs no lengths in advance. They make predictions exact: the number of
tokens, the padding, and the largest micro-batch of a run are known before its first step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llavactl.components.languages.image_token import image_token
from llavactl.core import progress
from llavactl.core.errors import ConversationError, LlavactlError
from llavactl.core.hashes import hash_json
from llavactl.core.plugin_faults import plugin_error
from llavactl.core.schema import Sample, Text, Turn
from llavactl.data import array_cache
from llavactl.data.image_order import ImageOrder, arrangements
from llavactl.data.packing import prefix_length
from llavactl.data.sample_set import no_targets
from llavactl.data.tables import CHUNK
from llavactl.data.token_counts import TokenCounter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llavactl.data.encode import Encoding, Rendered, TokenSpan
    from llavactl.data.sample_table import SampleTable

log = logging.getLogger(__name__)

_KIND = "token-lengths"
_FORMAT = 1
"""The version of the cached arrays; part of the cache key."""

MIN_CACHED = 5_000
"""Samples; fewer are counted in less than a second."""

_SERIAL_CHUNKS = 2
"""Up to this many chunks are counted in less time than processes take to start."""

_CHECKED = 500
"""One in this many samples is tokenized completely, to verify the counts."""


@dataclass(frozen=True)
class TokenLengths:
    """The lengths of N samples, for each of A orders of their images (A = 2 for ``image_order: random``, else 1).

    ``tokens`` [A, N]: T after truncation to ``max_length``, as ``len(Encoding.encode(…))``. ``targets`` [A, N]: target
    tokens among them. ``images`` [A, N]: images that are not truncated. ``prefix_tokens`` [A, N]: tokens up to the end
    of the first image if samples with the same image can share them (none is a target), else 0. ``prefix_texts``
    [A, N]: equal for equal text before the first image. ``reasons``: why samples (by index) can't be trained on; their
    lengths may be 0.
    """

    tokens: np.ndarray
    targets: np.ndarray
    images: np.ndarray
    prefix_tokens: np.ndarray
    prefix_texts: np.ndarray
    reasons: Mapping[int, str]

    def __len__(self) -> int:
        return self.tokens.shape[1]

    def select(self, rows: np.ndarray) -> TokenLengths:
        """The lengths of the samples ``rows`` (indices), in that order."""
        reasons = {index: self.reasons[row] for index, row in enumerate(rows.tolist()) if row in self.reasons}
        return _of_arrays({name: array[:, rows] for name, array in _arrays(self).items()}, reasons)

    @classmethod
    def joined(cls, parts: Sequence[TokenLengths]) -> TokenLengths:
        """``parts`` one after another."""
        starts = np.cumsum([0, *map(len, parts)]).tolist()
        reasons = {
            start + row: reason
            for start, part in zip(starts, parts, strict=False)
            for row, reason in part.reasons.items()
        }
        arrays = [_arrays(part) for part in parts]
        return _of_arrays({name: np.concatenate([each[name] for each in arrays], 1) for name in arrays[0]}, reasons)


def lengths(
    table: SampleTable,
    encoding: Encoding,
    order: ImageOrder,
    template: Mapping[str, Any] | None = None,
    counting: Counting | None = None,
) -> TokenLengths:
    """The lengths of all samples of ``table``, encoded with ``encoding`` and ``order``.

    Cached for the content of the samples, the tokenizer, Q, ``max_length``, ``order`` and ``template``, the identity of
    the encoding's template (``component_identity``). Without it, they are computed every time. ``counting`` may be
    computing them already.

    Raises:
        ModelError: the template doesn't work with this tokenizer.
    """
    if template is None or len(table) < MIN_CACHED:
        return _computed(table, encoding, order, counting)
    key = hash_json(
        {
            "format": _FORMAT,
            "samples": table.digest,
            "template": template,
            "tokenizer": tokenizer_identity(encoding.tokenizer),
            "encoding": [encoding.image_tokens, encoding.max_length, order],
            "versions": [version("llavactl"), version("transformers"), version("tokenizers")],
        }
    )
    if (cached := _cached(key, len(table))) is not None:
        return cached
    with array_cache.computing(_KIND, key):
        if (cached := _cached(key, len(table))) is not None:
            return cached
        result = _computed(table, encoding, order, counting)
        reasons = np.frombuffer(json.dumps(list(result.reasons.items())).encode(), np.uint8)
        array_cache.save(_KIND, key, {**_arrays(result), "reasons": reasons})
    return result


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that determines the ids of a text, and of the chat template."""
    backend: Any = tokenizer
    return hash_json(
        [
            type(tokenizer).__name__,
            hashlib.sha256(backend.backend_tokenizer.to_str().encode()).hexdigest(),
            dict(tokenizer.special_tokens_map),
            tokenizer.chat_template,
            image_token(tokenizer),
            getattr(tokenizer, "legacy", None),
            getattr(tokenizer, "split_special_tokens", False),
        ]
    )


_ARRAYS = ("tokens", "targets", "images", "prefix_tokens", "prefix_texts")


def _arrays(lengths: TokenLengths) -> dict[str, np.ndarray]:
    return {name: getattr(lengths, name) for name in _ARRAYS}


def _of_arrays(arrays: Mapping[str, np.ndarray], reasons: Mapping[int, str]) -> TokenLengths:
    return TokenLengths(**{name: arrays[name] for name in _ARRAYS}, reasons=reasons)


def _cached(key: str, samples: int) -> TokenLengths | None:
    arrays = array_cache.load(_KIND, key)
    if arrays is None or arrays["tokens"].shape[1] != samples:
        return None
    return _of_arrays(arrays, dict(json.loads(arrays["reasons"].tobytes())))


class _Size(NamedTuple):
    """The lengths of one sample (see ``TokenLengths``); ``reason`` is "" if it can be trained on."""

    tokens: int
    targets: int
    images: int
    prefix_tokens: int
    prefix_text: int
    reason: str = ""


class _WrongCountError(Exception):
    """A count differs from the tokenized sample."""


@dataclass(frozen=True)
class _Job:
    """Counts the tokens of the samples of a table."""

    encoding: Encoding
    order: ImageOrder
    counter: TokenCounter

    def __call__(self, table: SampleTable) -> TokenLengths:
        """Raises _WrongCountError if the counts are wrong."""
        rows = [self._sizes(sample, checked=not row % _CHECKED) for row, sample in enumerate(table)]
        columns = np.array([[size[:5] for size in sizes] for sizes in rows], np.int64)  # [n, A, 5]
        *small, prefix_texts = columns.transpose(2, 1, 0)
        reasons = {row: reason for row, sizes in enumerate(rows) if (reason := sizes[0].reason)}
        tokens, targets, images, prefix_tokens = (array.astype(np.int32) for array in small)
        return TokenLengths(tokens, targets, images, prefix_tokens, np.ascontiguousarray(prefix_texts), reasons)

    def _sizes(self, sample: Sample, *, checked: bool) -> list[_Size]:
        """The lengths of ``sample`` in each arrangement; the first has the reason if any has one."""
        orders = arrangements(sample.turns, self.order)
        sizes = [_size(turns, self.encoding, self.counter) for turns in orders]
        reason = next((size.reason for size in sizes if size.reason), "")
        if checked and self.counter.by_words and not reason:
            for turns, size in zip(orders, sizes, strict=True):
                if size[:4] != (expected := _encoded_size(turns, self.encoding)):
                    raise _WrongCountError(f"sample {sample.id}: expected {expected}, got {size[:4]}")
        return [sizes[0]._replace(reason=reason), *sizes[1:]]


class Counting:
    """A context in which other processes count the tokens of chunks of samples, while the caller reads the next ones.

    Processes are started for the third chunk; a few samples are counted by ``result``.
    """

    def __init__(self, encoding: Encoding, order: ImageOrder, *, by_words: bool = True) -> None:
        self.samples = 0
        self._encoding, self._order, self._by_words = encoding, order, by_words
        self._waiting: list[SampleTable] = []
        self._futures: list[Future[TokenLengths]] = []
        self._pool: ProcessPoolExecutor | None = None

    @cached_property
    def _job(self) -> _Job:  # copying a tokenizer takes up to a second, which a cached start saves
        return _Job(self._encoding, self._order, TokenCounter(self._encoding.tokenizer, by_words=self._by_words))

    def __enter__(self) -> Counting:
        return self

    def submit(self, chunk: SampleTable) -> None:
        """Adds the samples of ``chunk``.

        Raises:
            LlavactlError: a process was killed.
        """
        self.samples += len(chunk)
        self._waiting.append(chunk)
        if self._pool is None and len(self._waiting) > _SERIAL_CHUNKS and sys.platform == "linux" and _cores() > 1:
            self._pool = self._forked_pool()
        if self._pool is not None:
            with _killed_process_reported():
                self._futures += [self._pool.submit(_run_inherited, waiting) for waiting in self._waiting]
            self._waiting.clear()

    def end(self) -> None:
        """Ends the processes once they have counted what was submitted; ``submit`` must not be called again."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def result(self) -> TokenLengths:
        """The lengths of all samples submitted so far, in their order.

        Raises:
            LlavactlError: a process was killed.
            _WrongCountError: the counts are wrong.
        """
        parts = [_empty(self._order)]
        with progress.bar(self.samples, "counting tokens", "sample") as bar, _killed_process_reported():
            for part in chain((future.result() for future in self._futures), map(self._job, self._waiting)):
                parts.append(part)
                bar.advance(len(part))
        return TokenLengths.joined(parts)

    def __exit__(self, *_error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _forked_pool(self) -> ProcessPoolExecutor:
        """Forked processes inherit the template and the tokenizer; spawned ones would import the caller's script.

        They run no kernels of torch, whose threads don't survive a fork.
        """
        context = multiprocessing.get_context("fork")
        return ProcessPoolExecutor(_cores(), context, initializer=_inherit, initargs=(self._job,))


@contextmanager
def _killed_process_reported() -> Iterator[None]:
    """Raises LlavactlError if a process of a pool that is used in this context was killed."""
    try:
        yield
    except BrokenProcessPool as error:
        raise LlavactlError(
            f"a process that counts tokens was killed: {error}", hint="free memory, then run the command again"
        ) from error


_inherited: _Job | None = None
"""The job of a forked process."""


def _inherit(job: _Job) -> None:
    global _inherited
    _inherited = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is left to the parent, which ends the pool


def _run_inherited(chunk: SampleTable) -> TokenLengths:
    assert _inherited is not None
    try:
        return _inherited(chunk)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # its traceback stays in this process
        if fault := plugin_error(error):
            raise fault from error
        raise


def _computed(table: SampleTable, encoding: Encoding, order: ImageOrder, counting: Counting | None) -> TokenLengths:
    """The lengths of ``table``, whose chunks may have been submitted to ``counting``."""
    if counting is not None and counting.samples == len(table):
        with suppress(_WrongCountError):
            return counting.result()
    for by_words in (True, False):
        try:
            with Counting(encoding, order, by_words=by_words) as own:
                for start in range(0, len(table), CHUNK):
                    own.submit(table.part(start, start + CHUNK))
                return own.result()
        except _WrongCountError as error:
            log.info("tokens can't be counted by words (%s); every sample is tokenized", error)
    raise AssertionError("tokenized samples are not checked")


def _empty(order: ImageOrder) -> TokenLengths:
    empty = np.zeros((len(arrangements((), order)), 0), np.int32)
    return TokenLengths(empty, empty, empty, empty, empty.astype(np.int64), {})


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _size(turns: Sequence[Turn], encoding: Encoding, counter: TokenCounter) -> _Size:
    """The lengths of a conversation."""
    try:
        rendered = encoding.render(turns)
    except ConversationError as error:
        return _Size(0, 0, 0, 0, 0, error.message)
    spans = None if rendered.separator else list(encoding.token_spans(rendered, counter))
    tokens = 0 if spans is None else sum(span.tokens for span in spans)
    if spans is None or (encoding.max_length is not None and tokens > encoding.max_length):
        # Names of special tokens, and truncation, are rare.
        tokens, targets, images, prefix = _encoded_size(turns, encoding)
    else:
        targets = sum(span.tokens for span in spans if span.target)
        images, prefix = sum(span.image for span in spans), _prefix_tokens(spans)
    reason = "" if targets or encoding.has_targets(turns) else no_targets(turns, encoding)
    return _Size(tokens, targets, images, prefix, _prefix_text(rendered) if prefix else 0, reason)


def _encoded_size(turns: Sequence[Turn], encoding: Encoding) -> tuple[int, int, int, int]:
    """The first four fields of ``_Size``, by encoding ``turns``."""
    item = encoding.encode(turns)
    return len(item), item.target_tokens, len(item.images), prefix_length(item, encoding.image_tokens)


def _prefix_tokens(spans: Sequence[TokenSpan]) -> int:
    """The tokens up to the end of the first image; 0 without an image, or if some of them are targets."""
    tokens = 0
    for span in spans:
        tokens += span.tokens
        if span.target:
            break
        if span.image:
            return tokens
    return 0


def _prefix_text(rendered: Rendered) -> int:
    """A hash of the text before the first image."""
    texts = takewhile(lambda segment: isinstance(segment, Text), rendered.segments)
    return _hash("\0".join(segment.text for segment in texts if isinstance(segment, Text)))


@lru_cache(maxsize=4096)
def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
