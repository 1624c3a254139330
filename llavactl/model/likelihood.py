"""The log-likelihoods of given answers, for tasks that compare answers instead of generating one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from llavactl.core.schema import IGNORE
from llavactl.model.generate import mask_and_state
from llavactl.model.inputs import image_features
from llavactl.model.llava import positions

if TYPE_CHECKING:
    from llavactl.core.schema import Batch
    from llavactl.model.llava import LlavaModel


class Likelihood(NamedTuple):
    """The sum of the natural log-probabilities of an answer's ``tokens``; ``greedy``: each is the most probable one."""

    log_probability: float
    greedy: bool
    tokens: int


@torch.inference_mode()
def likelihoods(model: LlavaModel, batch: Batch, cache: Any = None) -> list[Likelihood]:
    """The likelihood of the targets of each conversation in ``batch`` (left-padded [B, T]).

    The targets are the last tokens of a conversation, and a token precedes them. ``cache`` holds the tokens before
    ``batch``, as in ``generate``.
    """
    counts = (batch.labels != IGNORE).sum(dim=1).tolist()
    longest = max(counts)
    if not longest:
        return [Likelihood(0.0, True, 0)] * len(counts)
    mask, state = mask_and_state(batch, cache)
    logits = model.language(
        inputs_embeds=model.embed(batch.ids, image_features(batch)),
        attention_mask=mask.long(),
        position_ids=positions(mask)[:, -batch.ids.shape[1] :],
        logits_to_keep=longest + 1,
        **state,
    ).logits[:, -longest - 1 : -1]
    targets = batch.labels[:, -longest:]
    is_target = targets != IGNORE
    log_probabilities = logits.float().log_softmax(dim=-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    sums = log_probabilities.masked_fill(~is_target, 0.0).sum(dim=1)
    greedy = ((logits.argmax(dim=-1) == targets) | ~is_target).all(dim=1)
    return [Likelihood(*each) for each in zip(sums.tolist(), greedy.tolist(), counts, strict=True)]
