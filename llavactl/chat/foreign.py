"""Any image-and-text model of transformers (LLaVA, BLIP-2, IDEFICS, Qwen-VL, …) with its own processor.

It is asked through ``answer``, as an assistant of ours is; pictures, prompt and tokens are its processor's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.chat.assistant import text_of
from llavactl.core import faults, progress
from llavactl.core.errors import DataError, ModelError
from llavactl.core.hashes import hash_folder, hash_json
from llavactl.core.identity import content_of
from llavactl.core.paths import expanded, read_json
from llavactl.core.schema import ImageRef, Turn
from llavactl.features.prepare import default_device
from llavactl.images.decode import ImageError, decode
from llavactl.model.generate import GREEDY, Sampling
from llavactl.model.imported import HUB_ID

if TYPE_CHECKING:
    from PIL import Image

PREFIX = "hf:"
"""What stands before the id or folder of such a model."""

CHAT, QUESTION = "chat template", "Question: … Answer:"
UNTEMPLATED = frozenset({"blip-2", "instructblip"})
"""Types of models that have no chat template by nature; BLIP-2's paper asks ``Question: … Answer:``."""


@dataclass(frozen=True)
class ForeignModel:
    """A model, its processor, and how it is asked (``prompt``: CHAT or QUESTION)."""

    model: Any
    processor: Any
    prompt: str

    def answer(self, conversations: Sequence[Sequence[Turn]], sampling: Sampling = GREEDY) -> list[str]:
        """One greedy answer a conversation; those with as many pictures each are one left-padded batch.

        Raises:
            DataError: a picture that can't be read.
            ModelError: the model's processor refuses what it is given, or ``sampling`` isn't greedy.
        """
        if sampling.temperature > 0:
            raise ModelError(f"{PREFIX} models answer greedily alone", hint="leave the temperature at 0")
        groups: dict[int, list[int]] = {}
        for at, turns in enumerate(conversations):
            groups.setdefault(sum(len(turn.images) for turn in turns), []).append(at)
        answers = [""] * len(conversations)
        for places in groups.values():
            said = self._together([conversations[at] for at in places], sampling.max_new_tokens)
            for at, text in zip(places, said, strict=True):
                answers[at] = text
        return answers

    def _together(self, conversations: Sequence[Sequence[Turn]], max_new_tokens: int) -> list[str]:
        import torch

        inputs = self._inputs(conversations).to(self.model.device)
        with torch.inference_mode():
            out = self.model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )  # fmt: skip
        asked = inputs["input_ids"]
        # Some models give back what they were asked, others what they wrote alone.
        if out.shape[1] >= asked.shape[1] and torch.equal(out[:, : asked.shape[1]], asked):
            out = out[:, asked.shape[1] :]
        return [text_of(self.processor.tokenizer, ids).strip() for ids in out.tolist()]

    def _inputs(self, conversations: Sequence[Sequence[Turn]]) -> Any:
        pictures = [[_picture(image) for turn in turns for image in turn.images] for turns in conversations]
        texts = [self._text(turns) for turns in conversations]
        try:
            inputs = self.processor(
                text=texts, images=pictures if any(pictures) else None, padding=True, return_tensors="pt"
            )
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise ModelError(f"its processor refuses {len(pictures[0])} pictures a question: {error}") from error
        return inputs.to(dtype=self.model.dtype)  # pixels in the weights' precision; ids stay whole numbers

    def _text(self, turns: Sequence[Turn]) -> str:
        if self.prompt == QUESTION:
            said = [f"Question: {t.text.strip()} Answer:" if t.role == "user" else t.text.strip() for t in turns]
            return " ".join(said)
        messages = [{"role": turn.role, "content": [*_parts(turn)]} for turn in turns]
        try:
            return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # the template is the model's own program, and raises what it likes
            raise ModelError(f"its chat template refuses the question: {error}") from error


def _parts(turn: Turn) -> list[dict[str, str]]:
    """Pictures and texts in their order; the newline that sets them apart is the template's affair."""
    parts = [
        {"type": "text", "text": part.strip()} if isinstance(part, str) else {"type": "image"} for part in turn.content
    ]
    return [part for part in parts if part.get("text", " ")]


def _picture(image: ImageRef) -> Image.Image:
    try:
        return decode(image.read())
    except OSError as error:
        raise DataError(f"image {image.name}: {error.strerror or error}") from error
    except ImageError as error:
        raise DataError(f"image {image.name}: {error.reason}") from error


def find(model: str) -> Path:
    """The folder that ``hf:ID|DIR`` names; an id of the hub is downloaded.

    Raises:
        ModelError: no such folder, or it can't be had.
    """
    name = model.removeprefix(PREFIX)
    folder = expanded(name).absolute()
    if folder.is_dir():
        return folder
    if folder.exists() or not HUB_ID.fullmatch(name):
        raise ModelError(f"{model}: no such folder", hint=f"{PREFIX} takes a folder or a Hugging Face id")
    return faults.downloaded(name, f"{PREFIX} takes a folder or a Hugging Face id")


def digest(folder: Path) -> str:
    """A hash of all files of the model in ``folder`` and, for an adapter, of its base model.

    Raises:
        ModelError: a file can't be read.
    """
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if isinstance(base, str) and Path(base).is_dir():
        base = str(Path(base).absolute())
    try:
        return hash_json([hash_folder(folder), content_of(base)])
    except OSError as error:
        raise ModelError(f"{error.filename or folder}: {error.strerror or error}") from error


def open_foreign(folder: Path, device: str | None = None) -> ForeignModel:
    """The model in ``folder``, on ``device`` (default: the best there is); float32 on a CPU, else as it was saved.

    Raises:
        ModelError: no model for images and text, no processor, or no way to ask it.
    """
    from transformers import AutoModelForImageTextToText

    device = device or default_device()
    processor = _processor(folder)
    faults.check_files(faults.weight_files(folder))
    progress.calm_transformers()
    with faults.loading(_WHAT, folder, "omit hf: for models that llavactl trained or can read", weights=True):
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype="float32" if device == "cpu" else "auto", trust_remote_code=False
        )
    prompt = _prompt(folder, processor, model.config.model_type)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return ForeignModel(model.to(device).eval(), processor, prompt)


def prompt_of(folder: Path) -> str:
    """How the model in ``folder`` is asked; no weights are read."""
    from transformers import AutoConfig

    processor = _processor(folder)
    with faults.loading(_WHAT, folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return _prompt(folder, processor, config.model_type)


def _prompt(folder: Path, processor: Any, model_type: str) -> str:
    if getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None):
        return CHAT
    if model_type in UNTEMPLATED:
        return QUESTION
    raise ModelError(
        f"{folder}: a {model_type} without a chat template: there is no telling how to ask it",
        hint="put its chat_template.jinja beside its processor's files",
    )


def _processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    with faults.loading("processor", folder, _PROCESSOR):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ModelError(f"{folder}: there is no processor of pictures and text", hint=_PROCESSOR)
    return processor


_WHAT = "model for images and text"
_PROCESSOR = "a checkpoint needs processor_config.json or preprocessor_config.json, and its tokenizer"
