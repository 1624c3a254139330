"""``LlavaForConditionalGeneration`` of transformers, with its processor: what most other programs load."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.components.formats.chat_template import chat_template
from llavactl.components.formats.native import CONNECTORS, Native, adopt, shape_of
from llavactl.components.formats.weights import stamps, tensors
from llavactl.core.errors import ModelError
from llavactl.core.paths import read_json, write_json
from llavactl.core.registry import registry

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

IMAGE, PAD = "<image>", "<pad>"
ORIGIN = "llavactl_export.json"
"""Beside the weights: what the layout itself has no place for, so that a model read back is the same one."""

KEPT = ("template", "image_order", "precision", "features", "stage")

PROJECTOR = ("model.multi_modal_projector.", "multi_modal_projector.")
MULTIPLE = 64
"""Rows of the embeddings come in multiples of this, as in the published checkpoints: faster products on a GPU."""

SHARD = "5GB"


class HfLlava:
    """The layout ``hf``."""

    reload = Path(__file__).with_name("reload_hf.py")

    def __init__(self, options: Any) -> None:
        pass

    def recognise(self, folder: Path) -> bool:
        return _config(folder).get("model_type") == "llava" and "vision_config" in _config(folder)

    def read(self, folder: Path, model: Path) -> None:
        """Writes the model folder ``model`` that stands for the checkpoint in ``folder``."""
        config, origin = _config(folder), read_json(folder / ORIGIN)
        origin = {key: origin[key] for key in KEPT if key in origin}
        if not _processor(folder):
            raise ModelError(
                f"{folder}: there is no processor: how pixels are made is not known",
                hint="processor_config.json or preprocessor_config.json belongs beside the weights",
            )
        if not stamps(folder):
            raise ModelError(f"{folder}: there are no weights", hint="is the download whole?")
        name, weights = _projection(tensors(folder, PROJECTOR), config)
        text = config["text_config"]
        vision = {
            "name": "clip",
            "model": str(folder.absolute()),
            "layer": config.get("vision_feature_layer", -2),
            "select": "cls-patch",
            "image": "pad" if _processor(folder).get("do_pad") else "square",
        }
        if config.get("vision_feature_select_strategy", "default") == "default":
            if (prefix := shape_of(vision)["prefix"]) != 1:
                raise ModelError(
                    f"{folder}: it leaves out the first of each image's tokens, of which {prefix} are no patches",
                    hint="llavactl leaves out all of those or none",
                )
            vision["select"] = "patch"
        description = {
            "vision": vision,
            "shape": shape_of(vision),
            "connector": {"name": name},
            "language": {"name": "hf", "model": str(folder.absolute())},
            "template": "tokenizer",
            "precision": str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32"),
        }
        adopt(model, weights, {**description, **origin}, seen={"config": config, "weights": stamps(folder)})

    def write(self, model: Path, to: Path) -> None:
        """Writes the model folder ``model`` to ``to``: sharded safetensors, processor, chat template."""
        native = Native(model)
        assemble(native, native.language(), to)


def assemble(native: Native, language: PreTrainedModel, to: Path) -> None:
    """Saves ``language`` behind the connector and the backbone of ``native`` as one checkpoint in ``to``."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    description = native.description
    projection = native.projection()
    backbone = registry().create("vision", description["vision"])
    if not hasattr(backbone, "whole"):
        raise ModelError(
            f"vision backbone {description['vision']['name']} can't be exported: it has no `whole`",
            hint="a backbone of transformers has one; see docs/plugins.md, vision",
        )
    vision = backbone.whole()
    strategy, extra = _tokens(description["vision"])
    tokenizer = native.tokenizer()
    image = _tokens_of_image(tokenizer)
    _grow(language, len(tokenizer))
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=image,
        image_seq_length=_image_tokens(description),
        projector_hidden_act="gelu" if CONNECTORS[description["connector"]["name"]] == 2 else "linear",
        vision_feature_layer=_layer(description["vision"]["layer"]),
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=bool(language.config.tie_word_embeddings),
        dtype=description["precision"],
    )
    with torch.device("meta"):
        whole = LlavaForConditionalGeneration(config)
    whole.model.vision_tower = vision
    whole.model.language_model = language.base_model
    whole.lm_head = language.get_output_embeddings()
    whole.model.multi_modal_projector.load_state_dict(_two_layers(projection), assign=True)
    whole.generation_config = language.generation_config
    _stop(whole, tokenizer, description)
    whole.save_pretrained(to, max_shard_size=SHARD)
    _save_processor(native, tokenizer, backbone, strategy, extra, to)
    write_json(to / ORIGIN, {key: description[key] for key in KEPT})


def _save_processor(
    native: Native, tokenizer: PreTrainedTokenizerBase, backbone: Any, strategy: str, extra: int, to: Path
) -> None:
    from transformers import AutoImageProcessor, LlavaProcessor

    own = backbone.processor
    if native.description["vision"]["image"] == "pad":
        settings = own.to_dict() | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
        (to / "padding").mkdir()
        write_json(to / "padding" / "preprocessor_config.json", settings)
        own = AutoImageProcessor.from_pretrained(to / "padding", trust_remote_code=False)
        (to / "padding" / "preprocessor_config.json").unlink()
        (to / "padding").rmdir()
    processor = LlavaProcessor(
        image_processor=own,
        tokenizer=tokenizer,
        patch_size=int(backbone.config["patch_size"]),
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra,
        chat_template=_chat(native.description["template"], tokenizer),
    )
    tokenizer.chat_template = None  # the processor's is the one: it knows of images
    processor.save_pretrained(to)


def _chat(name: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template: None, and a line in the log, for a template that holds no conversation (``plain``)."""
    template = registry().create("templates", {"name": name})
    try:
        return chat_template(template, tokenizer, image=IMAGE, glue=_glue(tokenizer))
    except ModelError as error:
        log.warning("template %s: %s; the export has none", name, error.message)
        return None


def _glue(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to write between an image and what follows it, so that the text after it has the tokens it has alone.

    A text after an added token is tokenised as the middle of a text; ours, like LLaVA's, is tokenised by itself,
    and SentencePiece vocabularies then begin it with a space of their own (29871 before the newline in Llama's).
    """
    after = "\nWhat"
    alone = tokenizer(after, add_special_tokens=False)["input_ids"]
    for glue in ("", " "):
        joined = tokenizer(IMAGE + glue + after, add_special_tokens=False)["input_ids"]
        if joined[1:] == alone:
            return glue
    log.warning("this tokenizer has other tokens after an image than alone; --verify shows what that changes")
    return ""


def _tokens_of_image(tokenizer: PreTrainedTokenizerBase) -> int:
    """Adds the tokens for images and padding where they are missing; the image token's id."""
    tokenizer.add_tokens([_special(IMAGE)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.image_token = IMAGE
    return int(tokenizer.convert_tokens_to_ids(IMAGE))


def _special(text: str) -> Any:
    from transformers import AddedToken

    return AddedToken(text, normalized=False, special=True)


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


def _projection(found: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> tuple[str, dict[str, torch.Tensor]]:
    """The connector's name and its weights by LLaVA's names."""
    import torch

    weights = {name[next(len(p) for p in PROJECTOR if name.startswith(p)) :]: each for name, each in found.items()}
    wanted = {f"linear_{layer}.{what}" for layer in (1, 2) for what in ("weight", "bias")}
    if weights.keys() != wanted:
        raise ModelError(
            f"its projector has {', '.join(sorted(weights)) or 'no weights'}, not two linear layers with bias",
            hint="this is another architecture than LLaVA's",
        )
    act = config.get("projector_hidden_act", "gelu")
    second, bias = weights["linear_2.weight"], weights["linear_2.bias"]
    if act == "linear" and torch.equal(second, torch.eye(len(bias), dtype=second.dtype)) and not bias.any():
        return "linear", {"weight": weights["linear_1.weight"], "bias": weights["linear_1.bias"]}
    if act != "gelu":
        raise ModelError(f"its projector has activation {act}; llavactl has gelu")
    numbers = {"linear_1": "0", "linear_2": "2"}
    return "mlp2x-gelu", {f"{numbers[name[:8]]}{name[8:]}": weight for name, weight in weights.items()}


def _stop(
    whole: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, description: Mapping[str, Any]
) -> None:
    """Generation ends where an answer of the template ends, and doesn't sample unless it is asked to."""
    template = registry().create("templates", {"name": description["template"]})
    stops = {tokenizer.eos_token_id}
    stops |= {tokenizer.convert_tokens_to_ids(s) for s in template.stop(tokenizer) if s in tokenizer.all_special_tokens}
    settings = whole.generation_config
    settings.eos_token_id = sorted(stops)
    settings.pad_token_id = tokenizer.pad_token_id
    settings.do_sample, settings.temperature, settings.top_p, settings.top_k = False, None, None, None


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")


def _processor(folder: Path) -> dict[str, Any]:
    """The processor's and the image processor's settings; newer versions keep both in one file."""
    image = read_json(folder / "preprocessor_config.json")
    whole = read_json(folder / "processor_config.json")
    return {**image, **whole.get("image_processor", {}), **{k: v for k, v in whole.items() if k != "image_processor"}}
