"""Decoding with a compiled step, as CUDA graphs on a GPU, gives the same text as without compilation."""

from __future__ import annotations

from pathlib import Path

import torch

import llavactl
from llavactl.chat.conversation import Conversation
from llavactl.core.schema import Content
from llavactl.images.image_file import ImageFile
from llavactl.model.compiled import CompiledDecoder
from llavactl.model.generate import Sampling
from llavactl.testing import toy_model, toy_photos


def test_answers_of_several_turns_equal_those_without_compilation(tmp_path: Path, device: torch.device) -> None:
    assistant = llavactl.load_model(toy_model(tmp_path), device=str(device), dtype="float32")
    (photo,) = toy_photos(tmp_path / "photos", 1)
    questions: list[tuple[Content, ...]] = [(ImageFile(str(photo.parent), photo.name), "\nWhat?"), ("Why?",), ("And?",)]
    answers = []
    for compiled in (False, True):
        assistant.decoder = CompiledDecoder(assistant.model.language, _compiler(device)) if compiled else None
        conversation = Conversation(assistant)
        answers.append([conversation.ask(*content, sampling=Sampling(20)).text for content in questions])
        conversation.undo()
        answers[-1].append(conversation.ask("Who?", sampling=Sampling(20)).text)
    assert answers[0] == answers[1]


def _compiler(device: torch.device):  # type: ignore[no-untyped-def]
    """None: the default, with CUDA graphs."""
    return None if device.type == "cuda" else lambda step: step
