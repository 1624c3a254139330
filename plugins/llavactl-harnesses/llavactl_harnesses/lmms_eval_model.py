"""The model ``llavactl`` of lmms-eval, which finds it by the entry point ``lmms_eval.models``.

python -m lmms_eval --model llavactl --model_args model=runs/demo --tasks mme --batch_size 8
"""

from __future__ import annotations

from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from llavactl import ModelError
from llavactl_harnesses.prompts import Prompt, answers, batch_size_of, likelihoods, load_model, sampling_of


def manifest() -> ModelManifest:
    """The entry point's value."""
    return ModelManifest("llavactl", simple_class_path=f"{__name__}.LlavactlLmms")


class LlavactlLmms(lmms):
    """A llavactl model. Prompts are rendered by its conversation template; a prompt is one question."""

    is_simple = True

    def __init__(
        self,
        model: str,
        template: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_new_tokens: int = 1024,
        max_batch_size: int | None = None,  # noqa: ARG002 - lmms-eval passes it to every model
    ) -> None:
        super().__init__()
        self.batch_size = batch_size_of(batch_size)
        self.max_new_tokens = max_new_tokens
        self.model = load_model(model, template, device)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        prompts = [self._prompt(request.args[0], *request.args[2:]) for request in requests]
        options = [sampling_of(request.args[1], self.max_new_tokens) for request in requests]
        texts = answers(self.model, prompts, options, self.batch_size)
        return list(tqdm(texts, "generate_until", len(requests)))

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """The mean loss per token, as lmms-eval's own models return it: its metrics choose the lowest.

        lmms-eval 0.7 converts every result to a string, except what is inside a ``GenerationResult``.
        """
        prompts = [self._prompt(request.args[0], *request.args[2:]) for request in requests]
        continuations = [
            target if isinstance(target, str) else target(self._document(*place))
            for _, target, _, *place in (request.args for request in requests)
        ]
        found = likelihoods(self.model, prompts, continuations, self.batch_size)
        return [
            GenerationResult((-each.log_probability / max(each.tokens, 1), each.greedy))
            for each in tqdm(found, "loglikelihood", len(requests))
        ]

    def generate_until_multi_round(self, *_: Any) -> list[str]:
        raise ModelError("tasks of several rounds are not supported")

    def _prompt(self, context: str, visuals: Any, *place: Any) -> Prompt:
        return Prompt([("user", context)], lambda: visuals(self._document(*place)) or ())

    def _document(self, index: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][index]
