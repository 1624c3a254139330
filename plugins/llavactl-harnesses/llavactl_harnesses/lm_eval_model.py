"""The model type ``llavactl`` of lm-evaluation-harness; importing this module registers it.

llavactl lm-eval --model_args model=runs/demo --tasks mmmu_val --batch_size 8
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from llavactl import ModelError
from llavactl_harnesses.prompts import (
    ChatHistory,
    Prompt,
    answers,
    batch_size_of,
    likelihoods,
    load_model,
    sampling_of,
)


@register_model("llavactl")
class LlavactlLM(LM):
    """A llavactl model. Prompts are always rendered by the model's conversation template.

    Without ``--apply_chat_template`` a prompt, with its examples, is one question.
    """

    MULTIMODAL: ClassVar[bool] = True

    def __init__(
        self,
        model: str,
        template: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_gen_toks: int = 256,
        max_batch_size: int | None = None,  # noqa: ARG002 - lm-eval passes it to every model
    ) -> None:
        super().__init__()
        self.batch_size = batch_size_of(batch_size)
        self.max_gen_toks = max_gen_toks
        self.model = load_model(model, template, device)

    @property
    def tokenizer_name(self) -> str:
        """A part of the file names of lm-eval's prompt cache: messages don't depend on the model."""
        return "llavactl"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:  # noqa: ARG002
        """The messages as JSON: images are inserted later, and the template is applied then."""
        return ChatHistory(json.dumps(chat_history))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        options = [sampling_of(request.args[1], self.max_gen_toks) for request in requests]
        texts = answers(self.model, [_prompt(request) for request in requests], options, self.batch_size)
        return self._collected("generate_until", requests, texts, disable_tqdm)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        continuations = [request.args[1] for request in requests]
        prompts = [_prompt(request) for request in requests]
        pairs = (
            (each.log_probability, each.greedy)
            for each in likelihoods(self.model, prompts, continuations, self.batch_size)
        )
        return self._collected("loglikelihood", requests, pairs, disable_tqdm)

    def loglikelihood_rolling(self, *_: Any, **__: Any) -> list[float]:
        raise ModelError(
            "loglikelihood_rolling (perplexity of a text) is not supported: a conversation template has no place for it"
        )

    def _collected(self, kind: str, requests: Sequence[Instance], results: Any, disable_tqdm: bool) -> list[Any]:
        """``results``, each passed to lm-eval's cache (``--use_cache``) as soon as it is known."""
        collected = []
        for request, result in zip(requests, tqdm(results, kind, len(requests), disable=disable_tqdm), strict=True):
            self.cache_hook.add_partial(kind, request.args, result)
            collected.append(result)
        return collected


def _prompt(request: Instance) -> Prompt:
    """The prompt of a request whose arguments are (context, other, and the images of a multimodal task)."""
    context: str = request.args[0]
    media: Mapping[str, Any] = request.args[2] if len(request.args) > 2 else {}
    if media.get("audio"):
        raise ModelError("audio is not supported")
    if isinstance(context, ChatHistory):
        messages = [(message["role"], message["content"]) for message in json.loads(context)]
    else:
        messages = [("user", context)]
    return Prompt(messages, lambda: media.get("visual") or ())
