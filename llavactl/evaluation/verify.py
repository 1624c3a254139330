"""Is an export the model it was made of? Another process, which can't import llavactl, loads it and is asked the same.

Token ids, pixels, logits at every position and greedy answers are compared, about photos and without one.
Both sides compute in float32 on the CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.chat.assistant import Assistant, Stops, Writer
from llavactl.core.errors import ModelError
from llavactl.core.registry import registry
from llavactl.core.schema import IMAGE_TOKEN, ImageFile, ImageSlot, Text, Turn
from llavactl.data.batches import collate
from llavactl.data.encode import Encoding
from llavactl.data.images import decode
from llavactl.model import folder as model_folder
from llavactl.model.generate import Sampling

if TYPE_CHECKING:
    import numpy as np
    import torch

    from llavactl.core.protocols import Encoder
    from llavactl.core.schema import ImageRef

TOLERANCE = 1e-4
"""Of the largest logit: what two ways to the same float32 result may differ by."""

GARBAGE = 0.2
"""Of the largest logit: what rounding merged weights once more never does, and a wrong merge does."""

NEW_TOKENS = 32


@dataclass(frozen=True)
class Verified:
    """What the other program made of ``prompts`` prompts about ``photos`` photos.

    ``ids_equal`` and ``text_equal`` count prompts; ``pixels`` and ``logits`` are the largest differences,
    ``largest_logit`` is what to hold the latter against. An adapter that was merged into weights of lower
    precision than float32 was rounded with them: the rest is held against the model so rounded, and ``rounding`` is
    how far its logits are from those with the adapter apart.
    """

    prompts: int
    photos: int
    ids_equal: int
    text_equal: int
    pixels: float
    logits: float
    largest_logit: float
    rounding: float
    tolerance: float
    faults: tuple[str, ...]

    @property
    def sound(self) -> bool:
        return not self.faults


@dataclass(frozen=True)
class _Exact:
    """Features as the backbone makes them in float32, not rounded for a store; and the pixels they were made of."""

    encoder: Encoder

    def pixels(self, image: ImageRef) -> np.ndarray:
        return self.encoder.preprocess(decode(image.read()))

    def stored(self, image: ImageRef) -> tuple[np.ndarray]:
        import torch

        return (self.encoder.encode(torch.from_numpy(self.pixels(image))[None])[0].numpy(),)


def verify(model: Path, export: Path, script: Path, photos: Sequence[ImageFile]) -> Verified:
    """Compares the model folder ``model`` with its ``export``, as ``script`` loads it, asking about ``photos``.

    Raises:
        ModelError: the other program can't load the export; the message has its last line.
    """
    assistant = _opened(model)
    # A template without questions (stage 1's) has nothing to say where there is no picture.
    conversations = [turns for turns in _conversations(photos) if assistant.encode(turns).ids]
    with tempfile.TemporaryDirectory() as place:
        theirs = _reloaded(export, script, conversations, assistant, Path(place))
    rounding = 0.0
    if model_folder.describe(model)["method"] == "lora" and not (export / "adapter_config.json").is_file():
        rounding = _merge(assistant, conversations, model_folder.describe(model)["precision"])
    return _compared(assistant, conversations, theirs, len(photos), rounding)


def _merge(assistant: Assistant, conversations: Sequence[tuple[Turn, ...]], precision: str) -> float:
    """Merges the adapter and rounds the weights to ``precision``, as the export did; how far logits went, at most."""
    import torch

    apart = [_logits(assistant, turns) for turns in conversations]
    language: Any = assistant.model.language
    assistant.model.language = language.merge_and_unload()
    with torch.no_grad():
        for weight in assistant.model.language.parameters():
            weight.copy_(weight.to(getattr(torch, precision)).float())
    together = [_logits(assistant, turns) for turns in conversations]
    return max((one - other).abs().max().item() for one, other in zip(apart, together, strict=True))


def _logits(assistant: Assistant, turns: Sequence[Turn]) -> torch.Tensor:
    import torch

    with torch.inference_mode():
        return assistant.model.logits(collate([assistant.encode(turns)], assistant.features))[0]


def _opened(model: Path) -> Assistant:
    """The model as it was trained, computing in float32; its connector is kept in that anyway."""
    loaded = model_folder.load(model)
    loaded.parts.model.float()
    model_folder.load_connector(loaded.parts.model.connector, model)
    description = loaded.description
    vision = registry().create("vision", description["vision"])
    template: Any = registry().create("templates", {"name": description["template"]})
    encoding = Encoding(template, loaded.parts.tokenizer, loaded.parts.image_tokens)
    return Assistant(loaded.parts.model, encoding, _Exact(vision.load("cpu", "float32")), "first", str(model))


def _conversations(photos: Sequence[ImageFile]) -> list[tuple[Turn, ...]]:
    """One turn, several, a system turn, several photos, none."""
    first = [(Turn("user", (photo, "\n", "What is in this picture?")),) for photo in photos]
    one, other = photos[0], photos[-1]
    return [
        *first,
        (
            Turn("user", (one, "\n", "What is this?")),
            Turn("assistant", ("A picture.",)),
            Turn("user", ("Describe it in detail.",)),
        ),
        (Turn("user", (one, "\n", other, "\n", "What is the difference?")),),
        (Turn("system", ("Answer in one word.",)), Turn("user", (other, "\n", "Which color is most of it?"))),
        (Turn("user", ("How are you?",)),),
    ]


def _reloaded(
    export: Path, script: Path, conversations: Sequence[tuple[Turn, ...]], assistant: Assistant, place: Path
) -> Mapping[str, torch.Tensor]:
    from safetensors.torch import load_file

    saved: dict[ImageRef, str] = {}
    for image in {image for turns in conversations for turn in turns for image in turn.images}:
        # As we decode it: how programs turn photos by their EXIF is not what is compared.
        saved[image] = str(place / f"{len(saved)}.png")
        decode(image.read()).save(saved[image])
    prompts = [_prompt(turns, assistant, saved) for turns in conversations]
    (place / "prompts.json").write_text(
        json.dumps({"prompts": prompts, "max_new_tokens": NEW_TOKENS}), encoding="utf-8"
    )
    out = place / "out.safetensors"
    command = [sys.executable, "-I", str(script), str(export), str(place / "prompts.json"), str(out)]
    done = subprocess.run(  # noqa: S603 - our own script
        command, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode or not out.is_file():
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise ModelError(f"{export}: another program can't load it: {last}")
    return load_file(out)


def _prompt(turns: Sequence[Turn], assistant: Assistant, saved: Mapping[ImageRef, str]) -> dict[str, Any]:
    encoding = assistant.encoding
    segments = encoding.template.render(turns, encoding.tokenizer, generate=True)
    return {
        "messages": [{"role": turn.role, "content": _items(turn)} for turn in turns],
        "images": [saved[image] for turn in turns for image in turn.images],
        "text": "".join(
            "<image>" if isinstance(s, ImageSlot) else s.text for s in segments if isinstance(s, Text | ImageSlot)
        ),
    }


def _items(turn: Turn) -> list[dict[str, str]]:
    return [*({"type": "image"} for _ in turn.images), {"type": "text", "text": turn.text.strip()}]


def _compared(
    assistant: Assistant,
    conversations: Sequence[tuple[Turn, ...]],
    theirs: Mapping[str, torch.Tensor],
    photos: int,
    rounding: float,
) -> Verified:
    import torch

    exact: Any = assistant.features
    ids_equal = text_equal = 0
    pixels = logits = largest = 0.0
    faults: list[str] = []
    for index, turns in enumerate(conversations):
        encoded = assistant.encode(turns)
        name = f"prompt {index + 1}"
        found = theirs[f"{index}.ids"].tolist()
        if not _same(found, encoded.ids):
            faults.append(f"{name}: other token ids ({_difference(found, encoded.ids)})")
            continue
        ids_equal += 1
        for at, image in enumerate(encoded.images):
            off = (theirs[f"{index}.pixels"][at] - torch.from_numpy(exact.pixels(image))).abs().max().item()
            pixels = max(pixels, off)
        ours = _logits(assistant, turns)
        shared = min(ours.shape[-1], theirs[f"{index}.logits"].shape[-1])
        off = (ours[:, :shared] - theirs[f"{index}.logits"][:, :shared]).abs().max().item()
        logits, largest = max(logits, off), max(largest, ours.abs().max().item())
        if not off <= TOLERANCE * max(1.0, ours.abs().max().item()):
            faults.append(f"{name}: logits differ by {off:.3g}")
        (said,) = assistant.answer([turns], Sampling(max_new_tokens=NEW_TOKENS))
        same = _text(assistant, theirs[f"{index}.said"].tolist()) == said
        text_equal += same
        if not same:
            faults.append(f"{name}: another greedy answer")
    if rounding > GARBAGE * max(1.0, largest):
        faults.append(f"merging the adapter changed logits by {rounding:.3g}")
    return Verified(
        prompts=len(conversations),
        photos=photos,
        ids_equal=ids_equal,
        text_equal=text_equal,
        pixels=pixels,
        logits=logits,
        largest_logit=largest,
        rounding=rounding,
        tolerance=TOLERANCE,
        faults=tuple(faults),
    )


def _same(theirs: Sequence[int], ours: Sequence[int]) -> bool:
    """Equal ids; an image's are any one number that no text has."""
    places = {them for them, us in zip(theirs, ours, strict=False) if us == IMAGE_TOKEN}
    if len(theirs) != len(ours) or len(places) > 1:
        return False
    image = next(iter(places), IMAGE_TOKEN)
    return [IMAGE_TOKEN if token == image else token for token in theirs] == list(ours)


def _difference(theirs: Sequence[int], ours: Sequence[int]) -> str:
    plain = [token for token in ours if token != IMAGE_TOKEN]
    where = next((at for at, (a, b) in enumerate(zip(theirs, ours, strict=False)) if b != IMAGE_TOKEN and a != b), None)
    if where is None:
        return f"{len(theirs)} tokens, not {len(ours)} of which {len(ours) - len(plain)} are of images"
    return f"at {where}: {list(theirs[where : where + 4])}, not {list(ours[where : where + 4])}"


def _text(assistant: Assistant, tokens: Sequence[int]) -> str:
    """What ``tokens`` say up to where an answer ends."""
    writer = Writer(assistant.encoding.tokenizer, Stops.of(assistant.encoding))
    for token in tokens:
        writer.take(None if token in assistant.stops.ids else token)
        if writer.done:
            break
    return writer.text.strip()
