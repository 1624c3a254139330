"""Format ``hf``: ``LlavaForConditionalGeneration`` of transformers with its processor."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.components.formats.connectors import LINEAR_LAYERS, refuse_connector
from llavactl.components.formats.generation import generation_config
from llavactl.components.formats.hf_read import hf_checkpoint
from llavactl.components.formats.hf_support import (
    HINT,
    refuse_nonlinear_head,
    refuse_nonlinear_logits,
    refuse_other_shapes,
)
from llavactl.components.formats.native import SavedModel, exportable_vision, open_model, save_model
from llavactl.components.formats.processor_text import add_image_token, separator
from llavactl.components.formats.supported_keys import BASE_KEYS, ignored_keys
from llavactl.components.formats.vllm import vllm_limits
from llavactl.components.languages.image_token import EXPORT_RECORD
from llavactl.core.errors import ModelError
from llavactl.core.library_errors import reason
from llavactl.core.paths import read_json, write_json
from llavactl.core.registry import format_spec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llavactl.core.protocols import ExportableVision

log = logging.getLogger(__name__)

STOP_STRINGS = "stop_strings"
"""Key of ``llavactl_export.json``: stop strings that other programs must be given."""

LIMITATIONS = "limitations"
"""Key of ``llavactl_export.json``: sentences for the section on limitations in the model card."""

EMBEDDING_MULTIPLE = 64
"""Embeddings are padded to a multiple of this number of rows, as in published checkpoints, for speed on a GPU."""

MAX_SHARD_SIZE = "5GB"


class HfLlava:
    """The format ``hf``."""

    reload = Path(__file__).with_name("hf_outputs.py")

    def __init__(self, options: Any) -> None:
        pass

    def recognise(self, folder: Path) -> bool:
        config = read_json(folder / "config.json")
        return config.get("model_type") == "llava" and "vision_config" in config

    def read(self, folder: Path, model: Path) -> None:
        """Converts the checkpoint in ``folder`` to the model folder ``model``."""
        save_model(model, **hf_checkpoint(folder))

    def check(
        self,
        vision: Mapping[str, Any],
        connector: Mapping[str, Any],
        language: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,  # noqa: ARG002 - any is supported
    ) -> None:
        """Raises ModelError if the format can't represent a model of these components; see ``CheckableFormat``."""
        refuse_connector(connector)
        refuse_nonlinear_head(language)
        exportable_vision(vision)
        _select_strategy(vision)

    def write(self, model: Path, to: Path) -> None:
        """Writes the model folder ``model`` to ``to``: sharded safetensors, processor and chat template."""
        saved = open_model(model)
        save_checkpoint(saved, saved.language(), to)


def save_checkpoint(saved: SavedModel, language: PreTrainedModel, to: Path) -> None:
    """Saves ``language`` with the connector and the backbone of ``saved`` as one checkpoint in ``to``.

    Raises:
        ModelError: the format can't represent a part of the model; nothing is written then.
    """
    description = saved.description
    refuse_connector(description["connector"])
    refuse_nonlinear_logits(language)
    backbone = saved.vision()
    vision = backbone.whole()
    strategy, prefix_tokens = _select_strategy(description["vision"])
    tokenizer = saved.tokenizer()
    image = add_image_token(tokenizer)
    _resize_embeddings(language, len(tokenizer))
    llava = _llava_model(
        language,
        vision,
        _projector_weights(saved.connector_weights()),
        image_token_index=int(tokenizer.convert_tokens_to_ids(image)),
        image_seq_length=saved.shape.patches,
        projector_hidden_act="gelu" if LINEAR_LAYERS[description["connector"]["name"]] == 2 else "linear",
        vision_feature_layer=_feature_layer(description["vision"]["layer"]),
        vision_feature_select_strategy=strategy,
        dtype=description["precision"],
    )
    stop_ids, stop_strings = saved.stop_criteria(tokenizer)
    llava.generation_config = generation_config(language, tokenizer, stop_ids, stop_strings)
    llava.save_pretrained(to, max_shard_size=MAX_SHARD_SIZE)
    # The dtype to load the model in; transformers writes the dtype of the first weight, which is the backbone's.
    write_json(to / "config.json", {**read_json(to / "config.json"), "dtype": description["precision"]})
    _save_processor(saved, tokenizer, backbone, strategy, prefix_tokens, to)
    text = llava.config.text_config
    base_keys = ignored_keys(text.to_dict(), text.model_type)
    card = {STOP_STRINGS: list(stop_strings), LIMITATIONS: _limitations(read_json(to / "config.json"))}
    write_json(to / EXPORT_RECORD, {**saved.settings(), **card, BASE_KEYS: base_keys})


def _limitations(config: Mapping[str, Any]) -> list[str]:
    """Sentences for the model card about programs that can't load the export; they are logged."""
    limits = vllm_limits(config)
    sentences = [f"vLLM can't serve this model: {'; '.join(limits)}."] if limits else []
    for sentence in sentences:
        log.warning("%s", sentence.removesuffix("."))
    return sentences


def _llava_model(
    language: PreTrainedModel, vision: PreTrainedModel, projector: Mapping[str, torch.Tensor], **settings: Any
) -> Any:
    """``LlavaForConditionalGeneration`` created from its configuration, as other programs do, with our weights."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    base, head, embeddings = language.base_model, language.get_output_embeddings(), language.get_input_embeddings()
    text = copy.deepcopy(language.config)
    # transformers can tie the head only to weights of this name; a head tied to others is saved separately.
    tied = head.weight is embeddings.weight
    text.tie_word_embeddings = tied and getattr(base, "embed_tokens", None) is embeddings
    config = LlavaConfig(
        vision_config=vision.config, text_config=text, tie_word_embeddings=text.tie_word_embeddings, **settings
    )
    try:
        with torch.device("meta"):
            llava = LlavaForConditionalGeneration(LlavaConfig.from_dict(config.to_dict()))
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        message = f"format hf can't represent a language model of type {text.model_type}: {reason(error)}"
        raise ModelError(message, hint=HINT) from error
    refuse_other_shapes("vision backbone", vision.state_dict(), llava.model.vision_tower.state_dict())
    refuse_other_shapes("language model", base.state_dict(), llava.model.language_model.state_dict())
    refuse_other_shapes("language model's head", head.state_dict(), llava.lm_head.state_dict())
    refuse_other_shapes("connector", projector, llava.model.multi_modal_projector.state_dict())
    llava.model.vision_tower, llava.model.language_model = vision, base
    copied = tied and not text.tie_word_embeddings
    llava.lm_head.weight = torch.nn.Parameter(head.weight.detach().clone()) if copied else head.weight
    llava.model.multi_modal_projector.load_state_dict(projector, assign=True)
    return llava


def padding_processor(processor: Any) -> Any:
    """LLaVA's image processor, which pads images to squares first, with the settings of ``processor``."""
    from transformers import LlavaImageProcessorPil

    from llavactl.components.vision.encoder import channel_means

    settings = {key: value for key, value in processor.to_dict().items() if key != "image_processor_type"}
    # LLaVA's processor has defaults for settings that other processors don't have: SigLIP's doesn't crop.
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    settings |= {step: bool(settings.get(step)) for step in steps}
    settings["image_mean"] = list(channel_means(processor))  # padding needs one value per channel
    return LlavaImageProcessorPil(**settings | {"do_pad": True})


def _save_processor(
    saved: SavedModel,
    tokenizer: PreTrainedTokenizerBase,
    backbone: ExportableVision,
    strategy: str,
    prefix_tokens: int,
    to: Path,
) -> None:
    from transformers import LlavaProcessor

    image_processor = backbone.processor
    if saved.description["vision"]["image"] == "pad":
        image_processor = padding_processor(image_processor)
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=int(backbone.config["patch_size"]),
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=prefix_tokens,
        chat_template=_chat_template_or_none(saved, tokenizer),
    )
    # Batched generation needs left padding; setting the attribute alone would not be saved.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    tokenizer.chat_template = None  # only the processor's chat template supports images
    processor.save_pretrained(to)


def _chat_template_or_none(saved: SavedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template; None and a log message for a template that renders no conversations (``plain``)."""
    try:
        return saved.chat_template(tokenizer, image=tokenizer.image_token, separator=partial(separator, tokenizer))
    except ModelError as error:
        template = format_spec(saved.description["template"])
        log.warning("template %s: %s; the export has no chat template", template, error.message)
        return None


def _resize_embeddings(language: PreTrainedModel, tokens: int) -> None:
    """Resizes the embeddings for ``tokens`` tokens, padded to a multiple of EMBEDDING_MULTIPLE.

    New rows are the mean of the others, so their logits are the mean of all logits and never the largest.
    """
    import torch

    old_rows = len(language.get_input_embeddings().weight)
    if tokens <= old_rows:
        return
    language.resize_token_embeddings(tokens, pad_to_multiple_of=EMBEDDING_MULTIPLE, mean_resizing=False)
    with torch.no_grad():
        for module in (language.get_input_embeddings(), language.get_output_embeddings()):
            weight = module.weight
            weight[old_rows:] = weight[:old_rows].float().mean(0).to(weight.dtype)
            if getattr(module, "bias", None) is not None:
                module.bias[old_rows:] = module.bias[:old_rows].float().mean().to(module.bias.dtype)


def _select_strategy(vision: Mapping[str, Any]) -> tuple[str, int]:
    """``vision_feature_select_strategy`` and the number of tokens that the backbone has before its patches."""
    prefix_tokens = exportable_vision({**vision, "select": "cls-patch"}).shape().prefix
    if vision["select"] == "cls-patch" or not prefix_tokens:
        return "full", prefix_tokens
    if prefix_tokens > 1:
        raise ModelError(
            f"the vision backbone has {prefix_tokens} tokens before its patches; format hf can remove only one",
            hint="train with vision.select: cls-patch to export the model",
        )
    return "default", prefix_tokens


def _feature_layer(layer: Any) -> Any:
    return layer if isinstance(layer, int) else list(layer)


def _projector_weights(projection: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of ``linear_1`` and ``linear_2``; after a single layer, ``linear_2`` is the identity."""
    import torch

    if "weight" not in projection:
        names = {"0": "linear_1", "2": "linear_2"}
        return {f"{names[name[0]]}{name[1:]}": weight for name, weight in projection.items()}
    weight, bias = projection["weight"], projection["bias"]
    identity = torch.eye(len(bias), dtype=weight.dtype)
    return {
        "linear_1.weight": weight,
        "linear_1.bias": bias,
        "linear_2.weight": identity,
        "linear_2.bias": torch.zeros_like(bias),
    }
