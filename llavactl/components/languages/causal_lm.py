"""Any causal language model of transformers with a fast tokenizer."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from llavactl.components.languages import quantized
from llavactl.components.languages.linear_head import logits_fault
from llavactl.components.languages.llava_checkpoint import in_hf_llava, load_arguments
from llavactl.core.errors import ModelError
from llavactl.core.library_errors import loading
from llavactl.core.model_check import LANGUAGE, check_model
from llavactl.core.model_files import TOKENIZER, has_vocabulary
from llavactl.core.options import ModelId
from llavactl.core.registry import Options
from llavactl.core.tokenizer_check import TOKENIZER_HINT, tokenizer_fault
from llavactl.files.json_parse import read_json_document

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class TransformersLanguageOptions(Options):
    """``attention``: eager is faster on a CPU for sequences of a few hundred tokens; its memory grows with T².

    Models without scaled-dot-product attention in transformers (Gemma 2) always use eager.
    """

    model: ModelId = Field(description="model id or folder")
    attention: Literal["sdpa", "eager"] = Field(
        "sdpa", description="attention implementation; eager is faster on CPUs for up to a few hundred tokens"
    )


class TransformersLanguage:
    """A causal language model (id or folder), or the language model of a LLaVA checkpoint in format hf or llava."""

    def __init__(self, options: TransformersLanguageOptions) -> None:
        self.options = options

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises ModelError if the tokenizer can't be used with the model.

        It must be a fast tokenizer, whose character offsets are needed to place labels.
        """
        from llavactl.components.languages.image_token import set_image_token
        from llavactl.components.languages.sentencepiece_spaces import repair_merges

        self._check_files()
        try:
            tokenizer = self._load_tokenizer()
        except ModelError as error:
            folder = Path(self.options.model)
            if not folder.is_absolute() or has_vocabulary(folder):
                raise
            raise self._error("no vocabulary in the folder, such as tokenizer.json", TOKENIZER_HINT) from error
        if not tokenizer.chat_template and (file := Path(self.options.model, "chat_template.json")).is_file():
            # Older versions of transformers save a processor's chat template here; tokenizers don't read it.
            tokenizer.chat_template = read_json_document(file)["chat_template"]
        if not tokenizer.is_fast:
            raise self._error("no fast tokenizer", "convert it with save_pretrained of transformers")
        if tokenizer.eos_token_id is None:
            raise self._error("the tokenizer has no end-of-sequence token", "set eos_token in tokenizer_config.json")
        set_image_token(tokenizer, self.options.model)
        return repair_merges(tokenizer)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        with loading("tokenizer of the language model", self.options.model, _HINT):
            tokenizer = AutoTokenizer.from_pretrained(self.options.model, trust_remote_code=False)
            embeddings = getattr(self._config(), "vocab_size", None)
        if fault := tokenizer_fault(tokenizer, embeddings):
            raise self._error(fault, TOKENIZER_HINT)
        return tokenizer

    def load(self, dtype: str) -> PreTrainedModel:
        """Raises ModelError if weights are missing or not finite."""
        return self._load(dtype, {})

    def load_quantized(self, dtype: str, device: str, bits: Literal[4, 8] = 4) -> PreTrainedModel:
        """Raises like ``load``."""
        import torch

        return self._load(dtype, quantized.loading_arguments(getattr(torch, dtype), device, bits))

    def _load(self, dtype: str, arguments: dict[str, Any]) -> PreTrainedModel:
        """The model, loaded with further ``arguments`` of ``from_pretrained``."""
        import torch
        from transformers import AutoModelForCausalLM

        self.check()
        with loading(LANGUAGE, self.options.model, _HINT, weights=True):
            model, info = AutoModelForCausalLM.from_pretrained(
                self.options.model,
                dtype=getattr(torch, dtype),
                attn_implementation=self._attention(),
                output_loading_info=True,
                trust_remote_code=False,
                **load_arguments(self.options.model),
                **arguments,
            )
        # Otherwise transformers would save the weights under the names of the LLaVA checkpoint.
        model.__dict__.pop("_weight_conversions", None)
        quantized.keep_training_layout(model)
        if missing := sorted(info["missing_keys"]):
            raise self._error(f"{len(missing)} weights are missing, such as {missing[0]}")
        for name, weight in model.named_parameters():
            if quantized.not_finite(weight):
                raise self._error(f"weight {name} is not finite in {dtype}", "use bfloat16 or float32")
        if in_hf_llava(self.options.model) and (reason := logits_fault(model)):
            raise self._error(
                f"{reason}, which LlavaForConditionalGeneration doesn't do", "llavactl doesn't support such checkpoints"
            )
        return model

    def skeleton(self) -> PreTrainedModel:
        """The model without weights: names and shapes, from its configuration.

        Raises:
            ModelError: the configuration can't be read, or transformers has no class for it.
        """
        import torch
        from transformers import AutoModelForCausalLM

        self._check_files()
        with loading(LANGUAGE, self.options.model, _HINT), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                self._config(), attn_implementation=self._attention(), trust_remote_code=False
            )
            return model

    def _config(self) -> Any:
        from transformers import AutoConfig

        config = load_arguments(self.options.model).get("config")
        return config or AutoConfig.from_pretrained(self.options.model, trust_remote_code=False)

    def _attention(self) -> str:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        config = self._config()
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if self.options.attention == "sdpa" and not getattr(model_class, "_supports_sdpa", True):
            _log_eager(self.options.model, config.model_type)
            return "eager"
        return self.options.attention

    def check(self) -> None:
        """Raises ModelError if the model can't be loaded, as far as its files show without reading weights."""
        self._check_files(weights=True)

    def _check_files(self, *, weights: bool = False) -> None:
        check_model(self.options.model, LANGUAGE, TOKENIZER, weights=weights, hint=_HINT)

    def _error(self, reason: str, hint: str = "") -> ModelError:
        return ModelError(f"language model {self.options.model}: {reason}", hint=hint or _HINT)


@cache
def _log_eager(model: str, family: str) -> None:
    """Cached, so that it is logged once: a model is built several times to predict its memory."""
    log.info("%s: %s has no sdpa attention in transformers; using eager", model, family)


_HINT = "`language.model` is a Hugging Face id or the folder of a transformers model"
