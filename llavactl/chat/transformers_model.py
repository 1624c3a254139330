"""Image-text-to-text models of transformers (LLaVA, BLIP-2, IDEFICS, Qwen-VL, …) with their processors.

``TransformersModel.answer`` is called like ``Assistant.answer``, without ``until``; the processor does the
preprocessing, prompt formatting and tokenization.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.chat.detokenizer import decode_tokens
from llavactl.core import hub
from llavactl.core.errors import DataError, ModelError
from llavactl.core.hashes import hash_folder, hash_json
from llavactl.core.identity import content_of
from llavactl.core.library_errors import loading
from llavactl.core.model_files import check_files, weight_files
from llavactl.core.paths import expand_user, read_json
from llavactl.core.schema import ImageRef, Turn
from llavactl.features.device import default_device
from llavactl.images.decode import ImageError, decode
from llavactl.model.generate import GREEDY, Sampling
from llavactl.model.imported import HUB_ID

if TYPE_CHECKING:
    from PIL import Image

PREFIX = "hf:"
"""Prefix of the id or folder of such a model in ``--model``."""

CHAT_TEMPLATE, QUESTION_ANSWER = "chat template", "Question: … Answer:"
"""Prompt formats, as reports name them."""
WITHOUT_CHAT_TEMPLATE = frozenset({"blip-2", "instructblip"})
"""Model types without a chat template by design; BLIP-2's paper prompts with ``Question: … Answer:``."""

_MODEL_KIND = "image-text-to-text model"
_PROCESSOR_HINT = "a checkpoint needs processor_config.json or preprocessor_config.json, and its tokenizer"


@dataclass(frozen=True)
class TransformersModel:
    """A model, its processor, and its prompt format (CHAT_TEMPLATE or QUESTION_ANSWER)."""

    model: Any
    processor: Any
    prompt_format: str

    def answer(self, conversations: Sequence[Sequence[Turn]], sampling: Sampling = GREEDY) -> list[str]:
        """One greedy answer per conversation; conversations with equally many images form one left-padded batch.

        Raises:
            DataError: an image can't be read.
            ModelError: the processor rejects the input, or ``sampling`` isn't greedy.
        """
        if sampling.temperature > 0:
            raise ModelError(f"{PREFIX} models support greedy decoding only", hint="leave the temperature at 0")
        indices_by_image_count: dict[int, list[int]] = defaultdict(list)
        for index, turns in enumerate(conversations):
            indices_by_image_count[sum(len(turn.images) for turn in turns)].append(index)
        answers = [""] * len(conversations)
        for indices in indices_by_image_count.values():
            texts = self._answer_batch([conversations[index] for index in indices], sampling.max_new_tokens)
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text
        return answers

    def _answer_batch(self, conversations: Sequence[Sequence[Turn]], max_new_tokens: int) -> list[str]:
        import torch

        inputs = self._inputs(conversations).to(self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )  # fmt: skip
        prompt = inputs["input_ids"]
        # Some models return the prompt and the new tokens, others the new tokens only.
        if output.shape[1] >= prompt.shape[1] and torch.equal(output[:, : prompt.shape[1]], prompt):
            output = output[:, prompt.shape[1] :]
        return [decode_tokens(self.processor.tokenizer, ids).strip() for ids in output.tolist()]

    def _inputs(self, conversations: Sequence[Sequence[Turn]]) -> Any:
        images = [[_decoded(image) for turn in turns for image in turn.images] for turns in conversations]
        prompts = [self._prompt(turns) for turns in conversations]
        try:
            inputs = self.processor(
                text=prompts, images=images if any(images) else None, padding=True, return_tensors="pt"
            )
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise ModelError(
                f"the model's processor rejects a question with {len(images[0])} images: {error}"
            ) from error
        return inputs.to(dtype=self.model.dtype)  # pixels in the weights' dtype; ids stay integers

    def _prompt(self, turns: Sequence[Turn]) -> str:
        if self.prompt_format == QUESTION_ANSWER:
            texts = [f"Question: {t.text.strip()} Answer:" if t.role == "user" else t.text.strip() for t in turns]
            return " ".join(texts)
        messages = [{"role": turn.role, "content": [*_message_parts(turn)]} for turn in turns]
        try:
            return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # a template is a program of the checkpoint and may raise anything
            raise ModelError(f"the model's chat template rejects the question: {error}") from error


def _message_parts(turn: Turn) -> list[dict[str, str]]:
    """Images and texts in order, without surrounding whitespace: the chat template adds its own."""
    parts = [
        {"type": "text", "text": part.strip()} if isinstance(part, str) else {"type": "image"} for part in turn.content
    ]
    return [part for part in parts if part.get("text", " ")]


def _decoded(image: ImageRef) -> Image.Image:
    try:
        return decode(image.read())
    except OSError as error:
        raise DataError(f"image {image.name}: {error.strerror or error}") from error
    except ImageError as error:
        raise DataError(f"image {image.name}: {error.reason}") from error


def resolve_folder(model: str) -> Path:
    """The local folder of ``hf:ID|DIR``; a model of the Hugging Face hub is downloaded.

    Raises:
        ModelError: the folder doesn't exist, or the download failed.
    """
    name = model.removeprefix(PREFIX)
    folder = expand_user(name).absolute()
    if folder.is_dir():
        return folder
    if folder.exists() or not HUB_ID.fullmatch(name):
        raise ModelError(f"{model}: no such folder", hint=f"{PREFIX} takes a folder or a Hugging Face id")
    return hub.download(name, f"{PREFIX} takes a folder or a Hugging Face id")


def model_digest(folder: Path) -> str:
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


def load_transformers_model(folder: Path, device: str | None = None) -> TransformersModel:
    """Loads the model in ``folder`` on ``device`` (default: the best available).

    The dtype is float32 on a CPU, otherwise the checkpoint's.

    Raises:
        ModelError: not an image-text-to-text model, or no processor or chat template.
    """
    from transformers import AutoModelForImageTextToText

    device = device or default_device()
    processor = _load_processor(folder)
    check_files(weight_files(folder))
    with loading(_MODEL_KIND, folder, "omit hf: for models that llavactl trained or can read", weights=True):
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype="float32" if device == "cpu" else "auto", trust_remote_code=False
        )
    prompt_format = _prompt_format(folder, processor, model.config.model_type)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return TransformersModel(model.to(device).eval(), processor, prompt_format)


def prompt_format_of(folder: Path) -> str:
    """The prompt format of the model in ``folder``, from its configuration; no weights are read."""
    from transformers import AutoConfig

    processor = _load_processor(folder)
    with loading(_MODEL_KIND, folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return _prompt_format(folder, processor, config.model_type)


def _prompt_format(folder: Path, processor: Any, model_type: str) -> str:
    if getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None):
        return CHAT_TEMPLATE
    if model_type in WITHOUT_CHAT_TEMPLATE:
        return QUESTION_ANSWER
    raise ModelError(
        f"{folder}: this {model_type} model has no chat template",
        hint="add its chat_template.jinja to the folder",
    )


def _load_processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    with loading("processor", folder, _PROCESSOR_HINT):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ModelError(f"{folder}: no processor for images and text", hint=_PROCESSOR_HINT)
    return processor
