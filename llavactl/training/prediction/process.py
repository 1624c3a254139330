"""The memory of a process besides models and batches.

The interpreter, libraries and records; on a CPU also free memory of the allocator, and compiled kernels.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from functools import cache

import torch
from torch.nn import functional

from llavactl.training.memory import release_memory

ALLOCATOR_SHARE = 0.5
"""Free memory that glibc's allocator holds on a CPU, relative to activations without checkpointing.

Measured in float32 with four Llamas, 256 to 1,024 wide, after 6 steps: 0.5 to 0.85; with stage 2 of the demo: 0.2 after
4 steps, 0.6 after 22. Large blocks, such as logits, are returned to the system. With
``GLIBC_TUNABLES=glibc.malloc.mmap_threshold=1048576`` it is 0, and a step takes a quarter longer.
"""

_KERNELS_PER_MICRO_BATCH = 12
_KERNEL_BYTES = 400_000
_CACHED_KERNELS = 1024
"""In bfloat16 oneDNN compiles kernels for each new shape: the products of a decoder layer and of their gradients.

It keeps the last 1,024 (``ONEDNN_PRIMITIVE_CACHE_CAPACITY``). The numbers were measured with a Llama.
"""

_IMPORTED_BY_TRAINING = ("accelerate", "h5py", "matplotlib.pyplot", "safetensors.torch")


def kernel_bytes(micro_batches: int | None) -> int:
    """The memory of oneDNN's kernels after ``micro_batches``, nearly all of different lengths; None: after many."""
    compiled = _CACHED_KERNELS if micro_batches is None else _KERNELS_PER_MICRO_BATCH * micro_batches
    return _KERNEL_BYTES * min(_CACHED_KERNELS, compiled)


@cache
def process_bytes() -> int:
    """The resident memory of this process before records are read, after the libraries' kernels were used once.

    A process that trains has the same, besides what is predicted. Measured once, so call it before all else: then it is
    the same for every command.
    """
    for name in _IMPORTED_BY_TRAINING:
        with suppress(ImportError):
            importlib.import_module(name)
    _use_kernels()
    return resident_bytes()


def resident_bytes() -> int:
    """The resident memory of this process, without what was used once only, such as for reading files."""
    import psutil

    release_memory()
    return int(psutil.Process().memory_info().rss)


def _use_kernels() -> None:
    """Runs the operations of training on small tensors, because libraries load kernels when they are first used."""
    for dtype in (torch.bfloat16, torch.float32):
        query = torch.ones(1, 4, 64, 64, dtype=dtype, requires_grad=True)
        weight = torch.ones(64, 64, dtype=dtype, requires_grad=True)
        hidden = functional.scaled_dot_product_attention(query, query, query, is_causal=True) @ weight
        loss = functional.cross_entropy(
            functional.silu(hidden).flatten(0, 2).float(), torch.zeros(256, dtype=torch.long)
        )
        loss.backward()
    master = torch.nn.Parameter(torch.ones(64, 64))
    master.grad = torch.ones_like(master)
    torch.optim.AdamW([master], fused=True).step()
