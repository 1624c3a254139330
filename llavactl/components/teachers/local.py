"""A language model in this process as a teacher: no server, no price, one request at a time."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from pydantic import Field

from llavactl.components.languages.causal_lm import TransformersLanguage, TransformersLanguageOptions
from llavactl.core.errors import TeacherError
from llavactl.core.identity import content_of
from llavactl.core.options import ModelId
from llavactl.core.protocols import Json, Limits, Reply, Request
from llavactl.core.registry import Options


class TransformersOptions(Options):
    """Options of the teacher ``transformers``."""

    model: ModelId = Field(description="an id or a folder, with a chat template")
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    device: str | None = Field(None, description="null: a GPU where there is one")
    temperature: float = Field(0.7, ge=0, le=2, description="0: always the likeliest token")
    max_tokens: int = Field(1024, ge=1, description="of one reply")


class Transformers:
    """The teacher ``transformers``; what it draws is a function of the request's content."""

    def __init__(self, options: TransformersOptions) -> None:
        self.options = options
        self.limits = Limits(concurrency=1, retries=0, max_tokens=options.max_tokens)
        self._one = threading.Lock()
        self._loaded: tuple[Any, Any] | None = None

    def content(self, request: Request) -> Mapping[str, Json]:
        """Model, messages and how is drawn; the device is no part of it."""
        own = self.options.model_dump(mode="json", exclude={"device"})
        return {
            **own,
            "model": self._model,
            "messages": [dict(each) for each in request.messages],
            "seed": request.seed,
        }

    @cached_property
    def _model(self) -> Json:
        """The model's identity by content: replies of a model that was replaced are not reused."""
        return content_of(self.options.model)

    def reply(self, request: Request) -> Reply:
        """One reply.

        Raises:
            TeacherError: the request is too long for the model, or has no form in its chat template.
            ModelError: the model can't be loaded.
        """
        import torch

        with self._one:
            tokenizer, model = self._load()
            messages = [dict(each) for each in request.messages]
            try:
                inputs = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                ).to(model.device)
            except Exception as error:  # the template is the model's own program, and raises what it likes
                raise TeacherError(f"its chat template refuses the messages: {error}", then="stop") from error
            read = inputs["input_ids"].shape[1]
            room = getattr(model.config, "max_position_embeddings", None)
            if room and read + self.options.max_tokens > room:
                raise TeacherError(f"too long for the model: {read} + {self.options.max_tokens} tokens, it has {room}")
            content = json.dumps(self.content(request), sort_keys=True)
            torch.manual_seed(int.from_bytes(hashlib.sha256(content.encode()).digest()[:7], "big"))
            draw = {"do_sample": True, "temperature": self.options.temperature} if self.options.temperature else {}
            with torch.inference_mode():
                out = model.generate(
                    **inputs, **({"do_sample": False} | draw), max_new_tokens=self.options.max_tokens,
                    pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                )  # fmt: skip
        written = out[0, read:]
        ended = int(written[-1]) in _ends(model, tokenizer) if len(written) else True
        text = tokenizer.decode(written, skip_special_tokens=True)
        return Reply(text, read, len(written), "stop" if ended else "length")

    def _load(self) -> tuple[Any, Any]:
        import torch

        if self._loaded is None:
            language = TransformersLanguage(TransformersLanguageOptions(model=self.options.model))
            device = self.options.device or ("cuda" if torch.cuda.is_available() else "cpu")
            self._loaded = language.tokenizer(), language.load(self.options.dtype).to(device).eval()
        return self._loaded


def _ends(model: Any, tokenizer: Any) -> set[int]:
    known = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
