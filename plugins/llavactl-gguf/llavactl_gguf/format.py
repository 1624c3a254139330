"""Format ``gguf``: a language model and a multimodal projector for llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llavactl import ModelError, Options, SavedModel, open_model
from llavactl_gguf.file import TensorType
from llavactl_gguf.vision import Builds

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class GgufOptions(Options):
    """Options of an export."""

    type: TensorType = Field("f16", description="type of the language model's matrices")
    mmproj_type: TensorType | None = Field(
        None, description="type of the projector's matrices; default: f32 with `type: f32`, else f16"
    )
    for_build: Builds = Field(
        "cls-last", description="builds of llama.cpp by the position of CLIP's class token; see the plugin's README"
    )


class Gguf:
    """Writes GGUF files; it doesn't read them."""

    reload: Path | None = Path(__file__).with_name("outputs.py")

    def __init__(self, options: GgufOptions) -> None:
        self.options = options
        self.mmproj_type: TensorType = options.mmproj_type or ("f32" if options.type == "f32" else "f16")

    def recognise(self, folder: Path) -> bool:  # noqa: ARG002 - the format only writes
        """False: the format only writes."""
        return False

    def read(self, folder: Path, model: Path) -> None:  # noqa: ARG002 - never called
        """Not supported."""
        raise ModelError(
            f"{folder}: llavactl doesn't read GGUF files", hint="use the model folder it was exported from"
        )

    def check(
        self,
        vision: Mapping[str, Any],
        connector: Mapping[str, Any],
        language: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Raises ModelError if the format can't represent a model of these components; see ``CheckableFormat``."""
        from llavactl_gguf.language import refuse_language
        from llavactl_gguf.tokenizer import tokenizer_keys
        from llavactl_gguf.vision import refuse_connector, refuse_vision

        refuse_connector(connector)
        refuse_vision(vision)
        refuse_language(language)
        for _ in tokenizer_keys(tokenizer, len(tokenizer), []):
            pass

    def write(self, model: Path, to: Path) -> None:
        """Writes ``model-TYPE.gguf`` and ``mmproj-TYPE.gguf``.

        Raises:
            ModelError: llama.cpp can't represent the model; nothing is written then.
        """
        from llavactl_gguf.card import limitations, usage
        from llavactl_gguf.file import write_file
        from llavactl_gguf.vision import vision_keys, vision_tensors

        saved = open_model(model)
        tokenizer = saved.exported_tokenizer()
        stop_ids, stop_strings = saved.stop_criteria(tokenizer)
        kind, mmproj_kind, builds = self.options.type, self.mmproj_type, self.options.for_build
        model_file, mmproj_file = to / f"model-{kind}.gguf", to / f"mmproj-{mmproj_kind}.gguf"
        self._write_language(saved, tokenizer, sorted(stop_ids), model_file)
        keys, tensors = vision_keys(saved, mmproj_kind, builds), vision_tensors(saved, mmproj_kind, builds)
        write_file(mmproj_file, "clip", keys, tensors)
        record = {
            **saved.settings(),
            "stop_strings": list(stop_strings),
            "usage": usage(model_file.name, mmproj_file.name, stop_strings),
            "limitations": limitations(saved, builds),
        }
        (to / "llavactl_export.json").write_text(json.dumps(record, indent=1), encoding="utf-8")

    def _write_language(
        self, saved: SavedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], file: Path
    ) -> None:
        """Writes the language model, which is in memory only meanwhile.

        Raises:
            ModelError: llama.cpp can't represent the model; nothing is written then.
        """
        from llavactl_gguf.chat import chat_template
        from llavactl_gguf.file import write_file
        from llavactl_gguf.language import architecture_of, language_keys, language_tensors
        from llavactl_gguf.tokenizer import refuse_template, tokenizer_keys

        language = saved.language()
        self.check(saved.description["vision"], saved.description["connector"], language, tokenizer)
        refuse_template(saved, tokenizer)
        kind = self.options.type
        keys = [
            *language_keys(language, kind),
            *tokenizer_keys(tokenizer, len(language.get_input_embeddings().weight), stop_ids),
        ]
        if template := chat_template(saved, tokenizer):
            keys.append(("tokenizer.chat_template", template))
        write_file(file, architecture_of(language).name, keys, language_tensors(language, kind))
