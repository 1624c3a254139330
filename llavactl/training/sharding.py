"""Sharded training with FSDP2 (``torch.distributed.fsdp.fully_shard``).

Each process keeps a share of the weights, gradients and optimizer state. A decoder layer is gathered when it is run and
released afterwards; the other modules (embeddings, final norm, head, connector) form the root group, which is gathered
during the whole forward and backward pass. Trainable parameters are kept in float32, as their own master weights, and
gathered in the precision of the stage; gradients are reduced in float32.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from llavactl.core.errors import RecipeError, StoreError
from llavactl.data.micro_batches import empty
from llavactl.model.decoder import decoder_layers
from llavactl.model.inputs import to_device
from llavactl.training.collective import on_main, process_count, process_index

if TYPE_CHECKING:
    from llavactl.model.llava import LlavaModel


def sharding_blocker(model: LlavaModel) -> str:
    """Why ``model`` can't be sharded; "" if it can."""
    if not decoder_layers(model.language):
        return f"transformers names no layers for {model.language.config.model_type}"
    if getattr(model.language, "is_loaded_in_4bit", False):
        return "weights in 4 bits can't be sharded"
    dtypes = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    if len(dtypes) > 1:
        return f"its weights have several dtypes ({', '.join(sorted(map(str, dtypes)))})"
    return ""


def shard(model: LlavaModel, device: torch.device, *, offload: bool) -> None:
    """Shards ``model``, on the CPU, over all processes and moves it to ``device``.

    With ``offload``, shares of weights, gradients and optimizer state are kept in host memory.

    Raises:
        RecipeError: the model can't be sharded.
    """
    if reason := sharding_blocker(model):
        raise RecipeError(f"sharding: full, but {reason}", hint="`-o sharding=none` trains with a replica per process")
    _include_connector_in_every_graph(model)
    precision = next(weight.dtype for weight in model.language.parameters() if weight.is_floating_point())
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (process_count(),)),
        "mp_policy": MixedPrecisionPolicy(precision, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if offload and device.type != "cpu" else OffloadPolicy(),
    }
    for layer in decoder_layers(model.language):
        _trainable_to_float32(layer)
        fully_shard(layer, **options)
    _trainable_to_float32(model)
    integers = {weight for weight in model.parameters() if not weight.is_floating_point()}
    fully_shard(model, ignored_params=integers, **options)
    for tensor in (*integers, *model.buffers()):
        tensor.data = tensor.data.to(device)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A sum over processes: the loss is already divided by the number of target tokens of the global batch.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _trainable_to_float32(module: nn.Module) -> None:
    for weight in module.parameters():
        if weight.requires_grad and not isinstance(weight, DTensor):
            weight.data = weight.data.float()


def _include_connector_in_every_graph(model: LlavaModel) -> None:
    """Gives the connector a gradient, zero, in batches without images too.

    Processes reduce the gradients of the same parameters, and run the same backward passes, in every micro-batch.
    Without this a batch of text has no gradient at all if the language model is frozen.
    """

    def add_zero(_module: nn.Module, _args: Any, embedded: torch.Tensor) -> torch.Tensor:
        trainable = [weight for weight in model.connector.parameters() if weight.requires_grad]
        if not torch.is_grad_enabled() or not trainable:
            return embedded
        zero = torch.stack([0 * weight.sum() for weight in trainable]).sum()
        return embedded + zero.to(embedded.dtype)

    model.language.get_input_embeddings().register_forward_hook(add_zero)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Releases the root group, which FSDP keeps gathered after a forward pass without a backward pass."""
    if isinstance(model, FSDPModule):
        model.reshard()


@contextmanager
def root_gathered(model: LlavaModel) -> Iterator[None]:
    """In this context ``model`` can be used without its ``forward``, for generating answers.

    All processes must do the same, as layers are gathered together. They get the logits of the main process: rounding
    could otherwise lead to different tokens, and to a different number of them. A model that isn't sharded isn't
    changed.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    with torch.no_grad():
        # FSDP initializes all layers in the first forward pass of the root.
        model(to_device(empty(packed=False), model.device))
    model.unshard()
    hook = model.language.get_output_embeddings().register_forward_hook(_of_main_process)
    try:
        yield
    finally:
        hook.remove()
        model.reshard()


def _of_main_process(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
    """``output`` of the main process."""
    received = output.float()
    distributed.broadcast(received, src=0)
    return received.to(output.dtype)


def distributed_like(tensor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``tensor``, the same in all processes, sharded like ``target``."""
    if not isinstance(target, DTensor):
        return tensor
    tensor = tensor.to(target.device, target.dtype)
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of ``tensor``; all processes must call this together if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def language_state(
    model: LlavaModel, precision: torch.dtype, folder: Path
) -> Iterator[Mapping[str, torch.Tensor] | None]:
    """The state dict of the sharded language model, or of its adapter, in ``precision``; None if it isn't sharded.

    Tensors are gathered one by one, in all processes together; the main process writes them to temporary files in
    ``folder``, from which the yielded tensors are mapped into memory. The others yield an empty mapping. So no process
    needs memory for the whole model.

    Raises:
        StoreError: a file can't be written.
    """
    if not is_sharded(model):
        yield None
        return
    state: dict[str, torch.Tensor] = model.language.state_dict(keep_vars=True)
    adapted = hasattr(model.language, "peft_config")
    # By identity: a tied weight has two names.
    weights = {id(weight): weight for weight in state.values() if weight.requires_grad or not adapted}
    temporary = folder / ".gathered"
    try:
        mapped = _gathered_in_files(weights, precision, temporary)
        yield {name: mapped[id(weight)] for name, weight in state.items() if id(weight) in mapped}
    finally:
        if process_index() == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def _gathered_in_files(
    weights: Mapping[int, torch.Tensor], precision: torch.dtype, folder: Path
) -> dict[int, torch.Tensor]:
    """The whole ``weights`` in ``precision``, mapped from files in ``folder``; {} except in the main process."""
    mapped: dict[int, torch.Tensor] = {}

    def create() -> None:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it saved
        folder.mkdir(parents=True)

    def keep(key: int, whole: torch.Tensor) -> None:
        whole = whole.to(precision) if whole.is_floating_point() else whole
        mapped[key] = in_file(whole, folder / str(len(mapped)))

    try:
        on_main(create)
        for key, weight in weights.items():
            on_main(partial(keep, key, gathered(weight.detach())))
    except OSError as error:
        raise StoreError(
            f"{folder}: can't be written: {' '.join(str(error).split())}",
            hint="free disk space, check permissions, or set another `run_dir`",
        ) from error
    return mapped


def in_file(tensor: torch.Tensor, file: Path) -> torch.Tensor:
    """A copy of ``tensor`` in ``file``, mapped into memory.

    Raises:
        OSError: it can't be written, for example because of a full disk.
    """
    # Not copied into a map of a new file: if the disk is full, that kills the process (SIGBUS).
    file.write_bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    mapped = torch.from_file(str(file), shared=True, size=max(1, tensor.numel()), dtype=tensor.dtype)
    return mapped[: tensor.numel()].view(tensor.shape)
