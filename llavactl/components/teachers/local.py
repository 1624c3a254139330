"""The teacher ``transformers``: a language model in this process, one request at a time."""

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

    model: ModelId = Field(description="model id or folder; needs a chat template")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="of the weights")
    device: str | None = Field(None, description="null: the GPU if available")
    temperature: float = Field(0.7, ge=0, le=2, description="0: greedy decoding")
    max_tokens: int = Field(1024, ge=1, description="maximum length of a reply")


class Transformers:
    """The teacher ``transformers``; sampling is seeded by the content of the request."""

    def __init__(self, options: TransformersOptions) -> None:
        self.options = options
        self.limits = Limits(concurrency=1, retries=0, max_tokens=options.max_tokens)
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Any] | None = None

    def content(self, request: Request) -> Mapping[str, Json]:
        """Model, messages and sampling options; without the device, which must not change the key."""
        options = self.options.model_dump(mode="json", exclude={"device"})
        return {
            **options,
            "model": self._model,
            "messages": [dict(message) for message in request.messages],
            "seed": request.seed,
        }

    @cached_property
    def _model(self) -> Json:
        """The hash of the model's content: replies of another model at the same path are not reused."""
        return content_of(self.options.model)

    def reply(self, request: Request) -> Reply:
        """Generates a reply.

        Raises:
            TeacherError: the request is too long, or the chat template can't render it.
            ModelError: the model can't be loaded.
        """
        import torch

        with self._lock:
            tokenizer, model = self._load()
            messages = [dict(message) for message in request.messages]
            try:
                inputs = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                ).to(model.device)
            except Exception as error:  # a chat template is code of the model and may raise anything
                raise TeacherError(f"the chat template can't render the messages: {error}", then="stop") from error
            tokens_in = inputs["input_ids"].shape[1]
            context = getattr(model.config, "max_position_embeddings", None)
            if context and tokens_in + self.options.max_tokens > context:
                raise TeacherError(
                    f"too long for the model: {tokens_in} + {self.options.max_tokens} tokens, its context is {context}"
                )
            content = json.dumps(self.content(request), sort_keys=True)
            torch.manual_seed(int.from_bytes(hashlib.sha256(content.encode()).digest()[:7], "big"))
            sampling = {"do_sample": True, "temperature": self.options.temperature} if self.options.temperature else {}
            with torch.inference_mode():
                out = model.generate(
                    **inputs, **({"do_sample": False} | sampling), max_new_tokens=self.options.max_tokens,
                    pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                )  # fmt: skip
        reply = out[0, tokens_in:]
        finished = int(reply[-1]) in _eos_ids(model, tokenizer) if len(reply) else True
        text = tokenizer.decode(reply, skip_special_tokens=True)
        return Reply(text, tokens_in, len(reply), "stop" if finished else "length")

    def _load(self) -> tuple[Any, Any]:
        import torch

        if self._loaded is None:
            language = TransformersLanguage(TransformersLanguageOptions(model=self.options.model))
            device = self.options.device or ("cuda" if torch.cuda.is_available() else "cpu")
            self._loaded = language.tokenizer(), language.load(self.options.dtype).to(device).eval()
        return self._loaded


def _eos_ids(model: Any, tokenizer: Any) -> set[int]:
    ids = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])}
