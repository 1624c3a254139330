"""``LlavaForConditionalGeneration`` of transformers, with its processor: what most other programs load."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.components.formats.chat_template import chat_template
from llavactl.components.formats.generation import generation_config, stop_strings
from llavactl.components.formats.hf_read import read_hf
from llavactl.components.formats.hf_support import (
    HINT,
    refuse_other_weights,
    refuse_unless_linear,
    refuse_unless_linear_head,
)
from llavactl.components.formats.native import CONNECTORS, NativeModel, exportable_backbone, refuse_connector, shape_of
from llavactl.components.formats.processor_text import add_image_token, separator
from llavactl.components.formats.supported_keys import BASE_KEYS, foreign_keys
from llavactl.components.languages.image_token import ORIGIN
from llavactl.core.errors import ModelError
from llavactl.core.library_errors import reason
from llavactl.core.paths import read_json, write_json
from llavactl.core.registry import format_spec, registry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

STOP_STRINGS = "stop_strings"
"""Key of ``llavactl_export.json``: the stop strings that other programs must be given."""

MULTIPLE = 64
"""Rows of the embeddings come in multiples of this, as in the published checkpoints: faster products on a GPU."""

SHARD = "5GB"


class HfLlava:
    """The layout ``hf``."""

    reload = Path(__file__).with_name("hf_outputs.py")

    def __init__(self, options: Any) -> None:
        pass

    def recognise(self, folder: Path) -> bool:
        config = read_json(folder / "config.json")
        return config.get("model_type") == "llava" and "vision_config" in config

    def read(self, folder: Path, model: Path) -> None:
        """Writes the model folder ``model`` that stands for the checkpoint in ``folder``."""
        read_hf(folder, model)

    def check(
        self,
        vision: Mapping[str, Any],
        connector: Mapping[str, Any],
        language: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,  # noqa: ARG002 - any is supported
    ) -> None:
        """Raises ModelError if it can't hold a model of these components; see ``CheckableFormat``."""
        refuse_connector(connector)
        refuse_unless_linear_head(language)
        exportable_backbone(vision)
        _tokens(vision)

    def write(self, model: Path, to: Path) -> None:
        """Writes the model folder ``model`` to ``to``: sharded safetensors, processor, chat template."""
        native = NativeModel(model)
        assemble(native, native.language(), to)


def assemble(native: NativeModel, language: PreTrainedModel, to: Path) -> None:
    """Saves ``language`` with the connector and the backbone of ``native`` as one checkpoint in ``to``.

    Raises:
        ModelError: the layout can't represent a part of the model; nothing is written then.
    """
    description = native.description
    projection = native.projection()
    refuse_unless_linear(language)
    backbone = exportable_backbone(description["vision"])
    vision = backbone.whole()
    strategy, extra = _tokens(description["vision"])
    tokenizer = native.tokenizer()
    image = add_image_token(tokenizer)
    _grow(language, len(tokenizer))
    whole = _whole(
        language,
        vision,
        _two_layers(projection),
        image_token_index=int(tokenizer.convert_tokens_to_ids(image)),
        image_seq_length=_image_tokens(description),
        projector_hidden_act="gelu" if CONNECTORS[description["connector"]["name"]] == 2 else "linear",
        vision_feature_layer=_layer(description["vision"]["layer"]),
        vision_feature_select_strategy=strategy,
        dtype=description["precision"],
    )
    whole.generation_config = generation_config(language, tokenizer, description)
    whole.save_pretrained(to, max_shard_size=SHARD)
    # The dtype to load it in; transformers would write that of the first weight, which is the backbone's.
    write_json(to / "config.json", {**read_json(to / "config.json"), "dtype": description["precision"]})
    stops = {STOP_STRINGS: stop_strings(tokenizer, description)}
    _save_processor(native, tokenizer, backbone, strategy, extra, to)
    text = whole.config.text_config
    write_json(to / ORIGIN, {**native.kept(), **stops, BASE_KEYS: foreign_keys(text.to_dict(), text.model_type)})


def _whole(language: PreTrainedModel, vision: Any, projector: Mapping[str, torch.Tensor], **settings: Any) -> Any:
    """``LlavaForConditionalGeneration`` created from the configuration, as other programs do, with our weights."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    base, head, embeddings = language.base_model, language.get_output_embeddings(), language.get_input_embeddings()
    text = copy.deepcopy(language.config)
    # The layout can tie its head only to weights of this name; a head tied to others is saved separately.
    tied = head.weight is embeddings.weight
    text.tie_word_embeddings = tied and getattr(base, "embed_tokens", None) is embeddings
    config = LlavaConfig(
        vision_config=vision.config, text_config=text, tie_word_embeddings=text.tie_word_embeddings, **settings
    )
    try:
        with torch.device("meta"):
            whole = LlavaForConditionalGeneration(LlavaConfig.from_dict(config.to_dict()))
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        kind, why = text.model_type, reason(error)
        raise ModelError(f"layout hf can't represent a model of type {kind}: {why}", hint=HINT) from error
    refuse_other_weights("vision backbone", vision.state_dict(), whole.model.vision_tower.state_dict())
    refuse_other_weights("language model", base.state_dict(), whole.model.language_model.state_dict())
    refuse_other_weights("language model's head", head.state_dict(), whole.lm_head.state_dict())
    refuse_other_weights("connector", projector, whole.model.multi_modal_projector.state_dict())
    whole.model.vision_tower, whole.model.language_model = vision, base
    copied = tied and not text.tie_word_embeddings
    whole.lm_head.weight = torch.nn.Parameter(head.weight.detach().clone()) if copied else head.weight
    whole.model.multi_modal_projector.load_state_dict(projector, assign=True)
    return whole


def padding_processor(own: Any) -> Any:
    """LLaVA's image processor with the settings of ``own``, which pads images to squares first."""
    from transformers import LlavaImageProcessorPil

    from llavactl.components.vision.encoder import channel_means

    known = {key: value for key, value in own.to_dict().items() if key != "image_processor_type"}
    # LLaVA's processor has defaults for settings that others leave out: SigLIP's, for example, doesn't crop.
    known |= {step: bool(known.get(step)) for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")}
    known["image_mean"] = list(channel_means(own))  # padding needs a number per channel
    return LlavaImageProcessorPil(**known | {"do_pad": True})


def _save_processor(
    native: NativeModel, tokenizer: PreTrainedTokenizerBase, backbone: Any, strategy: str, extra: int, to: Path
) -> None:
    from transformers import LlavaProcessor

    own = backbone.processor
    if native.description["vision"]["image"] == "pad":
        own = padding_processor(own)
    processor = LlavaProcessor(
        image_processor=own,
        tokenizer=tokenizer,
        patch_size=int(backbone.config["patch_size"]),
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra,
        chat_template=_chat(native.description["template"], tokenizer),
    )
    # Batched generation needs left padding; setting the attribute alone would not be saved.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    tokenizer.chat_template = None  # the processor's is the one: it knows of images
    processor.save_pretrained(to)


def _chat(spec: str | Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template: None, and a line in the log, for a template that holds no conversation (``plain``)."""
    template = registry().create("templates", spec)
    try:
        return chat_template(template, tokenizer, image=tokenizer.image_token, separator=partial(separator, tokenizer))
    except ModelError as error:
        log.warning("template %s: %s; the export has no chat template", format_spec(spec), error.message)
        return None


def _grow(language: PreTrainedModel, tokens: int) -> None:
    """Embeddings for ``tokens`` tokens and up to a multiple of MULTIPLE.

    New rows are the mean of all others: their logit is the mean of all logits, so none is ever the likeliest.
    """
    import torch

    had = len(language.get_input_embeddings().weight)
    if tokens <= had:
        return
    language.resize_token_embeddings(tokens, pad_to_multiple_of=MULTIPLE, mean_resizing=False)
    with torch.no_grad():
        for module in (language.get_input_embeddings(), language.get_output_embeddings()):
            weight = module.weight
            weight[had:] = weight[:had].float().mean(0).to(weight.dtype)
            if getattr(module, "bias", None) is not None:
                module.bias[had:] = module.bias[:had].float().mean().to(module.bias.dtype)


def _tokens(vision: Mapping[str, Any]) -> tuple[str, int]:
    """``vision_feature_select_strategy`` and how many tokens the backbone has beside its patches."""
    extra = int(shape_of({**vision, "select": "cls-patch"})["prefix"])
    if vision["select"] == "cls-patch" or not extra:
        return "full", extra
    if extra > 1:
        raise ModelError(
            f"the backbone has {extra} tokens before its patches; this layout can leave out one",
            hint="train with vision.select: cls-patch to export it",
        )
    return "default", extra


def _image_tokens(description: Mapping[str, Any]) -> int:
    height, width = description["shape"]["grid"]
    return int(height * width + description["shape"]["prefix"])


def _layer(layer: Any) -> Any:
    return layer if isinstance(layer, int) else list(layer)


def _two_layers(projection: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights for ``linear_1`` and ``linear_2``; one layer is followed by the identity, which changes nothing."""
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
