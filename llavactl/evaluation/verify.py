"""Verifies that an export equals its model: a process that can't import llavactl loads it and runs the same prompts.

Token ids, pixels, logits at every position and greedy answers are compared, with and without images, and so are the end
tokens and the dtype that the export states. Both sides compute in float32 on the CPU, one after the other, with
unrounded features: rounding them as a store does (float16) would exceed the tolerance.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.chat.assistant import Assistant
from llavactl.chat.detokenizer import Detokenizer
from llavactl.components.formats.chat_template import rendered
from llavactl.components.formats.native import NativeModel
from llavactl.components.formats.processor_text import add_image_token, separator
from llavactl.core.errors import ConversationError, ModelError
from llavactl.core.registry import registry
from llavactl.core.schema import IMAGE_TOKEN, FeatureShape, Turn
from llavactl.data.batches import collate
from llavactl.data.encode import Encoding
from llavactl.data.image_order import arrange
from llavactl.features.checked import load_encoder
from llavactl.images.decode import decode
from llavactl.images.image_file import ImageFile
from llavactl.model import folder as model_folder
from llavactl.model.generate import Sampling

if TYPE_CHECKING:
    import numpy as np
    import torch

    from llavactl.core.protocols import Encoder
    from llavactl.core.schema import ImageRef

TOLERANCE = 1e-4
"""Of the largest logit: what two ways to the same float32 result may differ by."""

PIXELS = 1e-3
"""Tolerance for normalised pixels: a tenth of one grey level."""

GARBAGE = 0.2
"""Of the largest logit: what rounding merged weights once more never does, and a wrong merge does."""

NEW_TOKENS = 32

ISOLATED = """\
import runpy, sys
sys.modules["llavactl"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script with ``import llavactl`` blocked, however it is installed: an export must not depend on it."""


ScriptRunner = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class VerificationResult:
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
class _UnroundedFeatures:
    """Features as the backbone makes them in float32, not rounded for a store; and the pixels they were made of."""

    encoder: Encoder

    def pixels(self, image: ImageRef) -> np.ndarray:
        return self.encoder.preprocess(decode(image.read()))

    def stored(self, image: ImageRef) -> tuple[np.ndarray]:
        import torch

        return (self.encoder.encode(torch.from_numpy(self.pixels(image))[None])[0].numpy(),)


def run_isolated(script: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Runs ``script`` in a separate Python process with the same packages except llavactl."""
    command = [sys.executable, "-P", "-c", ISOLATED, str(script), *map(str, arguments)]
    return subprocess.run(  # noqa: S603 - our own script
        command, capture_output=True, encoding="utf-8", errors="replace", check=False
    )


def verify(
    model: Path, export: Path, script: Path, photos: Sequence[ImageFile], *, run: ScriptRunner = run_isolated
) -> VerificationResult:
    """Compares the model folder ``model`` with its ``export``, which ``script`` loads, on prompts about ``photos``.

    ``run`` runs the script with the export, the prompts and the output file. The two models are never in memory at the
    same time.

    Raises:
        ModelError: the script can't load the export; the message has its last line.
    """
    description = model_folder.describe(model)
    encoding = _encoding(model, description)
    conversations = [turns for turns in _conversations(photos) if _has_prompt(encoding, turns)]
    processor_tokenizer = NativeModel(model).tokenizer()
    add_image_token(processor_tokenizer)
    with tempfile.TemporaryDirectory() as place:
        theirs, stated = _reloaded(
            partial(run, script, export), export, conversations, encoding, processor_tokenizer, Path(place)
        )
    assistant = _opened(model, description, encoding)
    rounding = 0.0
    if description["method"] == "lora" and not (export / "adapter_config.json").is_file():
        rounding = _merge(assistant, conversations, description["precision"])
    faults = _misstated(stated, assistant, description["precision"])
    return _compared(assistant, conversations, theirs, len(photos), rounding, faults)


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


def _encoding(model: Path, description: Mapping[str, Any]) -> Encoding:
    """The encoding of the model's conversations; no weights are read."""
    template: Any = registry().create("templates", description["template"])
    shape = FeatureShape(**{**description["shape"], "grid": tuple(description["shape"]["grid"])})
    tokens = registry().create("connectors", description["connector"]).tokens(shape)
    return Encoding(template, NativeModel(model).tokenizer(), tokens)


def _has_prompt(encoding: Encoding, turns: Sequence[Turn]) -> bool:
    """Whether the template renders ``turns``; False if it refuses a system turn or has no questions (stage 1's)."""
    try:
        return bool(encoding.encode(arrange(turns, "first", ""), generate=True).ids)
    except ConversationError:
        return False


def _opened(model: Path, description: Mapping[str, Any], encoding: Encoding) -> Assistant:
    """The model as it was trained, computing in float32; its connector is kept in that anyway."""
    loaded = model_folder.load(model)
    loaded.bundle.model.float()
    model_folder.load_connector(loaded.bundle.model.connector, model)
    vision = registry().create("vision", description["vision"])
    return Assistant(
        loaded.bundle.model, encoding, _UnroundedFeatures(load_encoder(vision, "cpu", "float32")), "first", str(model)
    )


def _conversations(photos: Sequence[ImageFile]) -> list[tuple[Turn, ...]]:
    """One turn, several, a system turn, several images, none, an image alone."""
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
        (Turn("user", (one,)),),
    ]


def _reloaded(
    run: ScriptRunner,
    export: Path,
    conversations: Sequence[tuple[Turn, ...]],
    encoding: Encoding,
    processor_tokenizer: Any,
    place: Path,
) -> tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]:
    """The outputs of ``run`` for the conversations, and what the export states.

    ``processor_tokenizer``: the tokenizer of ``encoding`` with an image token.
    """
    from safetensors import safe_open

    saved: dict[ImageRef, str] = {}
    for image in {image for turns in conversations for turn in turns for image in turn.images}:
        # As we decode it: how programs turn photos by their EXIF is not what is compared.
        saved[image] = str(place / f"{len(saved)}.png")
        decode(image.read()).save(saved[image])
    prompts, out = place / "prompts.json", place / "out.safetensors"
    asked = [_prompt(turns, encoding, processor_tokenizer, saved) for turns in conversations]
    prompts.write_text(json.dumps({"prompts": asked, "max_new_tokens": NEW_TOKENS}), encoding="utf-8")
    done = run(prompts, out)
    if done.returncode or not out.is_file():
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise ModelError(f"{export}: another program can't load it: {last}")
    with safe_open(out, "pt") as opened:
        stated = json.loads((opened.metadata() or {}).get("stated", "{}"))
        return {name: opened.get_tensor(name) for name in opened.keys()}, stated  # noqa: SIM118


def _prompt(
    turns: Sequence[Turn], encoding: Encoding, processor_tokenizer: Any, saved: Mapping[ImageRef, str]
) -> dict[str, Any]:
    """``text`` is for a program that splits it at ``<image>``, ``processor_text`` for one that tokenises it whole."""
    write = partial(rendered, encoding.template, encoding.tokenizer, turns, True)
    return {
        "messages": [{"role": turn.role, "content": _items(turn)} for turn in turns],
        "images": [saved[image] for turn in turns for image in turn.images],
        "text": write("<image>"),
        "processor_text": write(processor_tokenizer.image_token, partial(separator, processor_tokenizer)),
    }


def _items(turn: Turn) -> list[dict[str, str]]:
    return [*({"type": "image"} for _ in turn.images), {"type": "text", "text": turn.text.strip()}]


def _misstated(stated: Mapping[str, Any], assistant: Assistant, precision: str) -> list[str]:
    """The false statements of the export; a script need not report all of them."""
    faults = []
    wanted = sorted(assistant.stops.ids)
    if "eos" in stated and sorted(stated["eos"]) != wanted:
        faults.append(f"end tokens are {sorted(stated['eos'])}, expected {wanted}")
    if stated.get("padding", "left") != "left":
        faults.append(f"the tokenizer pads on the {stated['padding']}, which breaks batched generation")
    faults += [
        f"{what} {found}, but the model was trained in {precision}"
        for what, key in (("it loads in", "dtype"), ("weights are saved in", "saved"))
        for found in stated.get(key, ())
        if found != precision
    ]
    return faults


def _compared(
    assistant: Assistant,
    conversations: Sequence[tuple[Turn, ...]],
    theirs: Mapping[str, torch.Tensor],
    photos: int,
    rounding: float,
    faults: list[str],
) -> VerificationResult:
    exact: Any = assistant.features
    ids_equal = text_equal = 0
    pixels = logits = largest = 0.0
    for index, turns in enumerate(conversations):
        encoded = assistant.encode(turns)
        name = f"prompt {index + 1}"
        found = theirs[f"{index}.ids"].tolist()
        if not _same(found, encoded.ids):
            faults.append(f"{name}: other token ids ({_difference(found, encoded.ids)})")
            continue
        ids_equal += 1
        if encoded.images:
            off, why = _pixels_off([exact.pixels(image) for image in encoded.images], theirs[f"{index}.pixels"])
            pixels = max(pixels, off)
            faults += [f"{name}: {each}" for each in why]
        ours = _logits(assistant, turns)
        off, why = _logits_off(ours, theirs[f"{index}.logits"])
        logits, largest = max(logits, off), max(largest, ours.abs().max().item())
        faults += [f"{name}: {each}" for each in why]
        (said,) = assistant.answer([turns], Sampling(max_new_tokens=NEW_TOKENS))
        found_said = _text(assistant, theirs[f"{index}.said"].tolist())
        text_equal += found_said == said
        if found_said != said:
            faults.append(f"{name}: another greedy answer")
        together = theirs.get(f"{index}.together")
        if together is not None and _text(assistant, together.tolist()) != found_said:
            faults.append(f"{name}: the answer in a padded batch differs from that alone")
    if rounding > GARBAGE * largest:
        faults.append(f"merging the adapter changed logits by {rounding:.3g}")
    return VerificationResult(
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


def _pixels_off(ours: Sequence[np.ndarray], theirs: torch.Tensor) -> tuple[float, list[str]]:
    """The largest difference of pixels [I, 3, H, W], and the faults."""
    import torch

    wanted = torch.stack([torch.from_numpy(pixels) for pixels in ours])
    if wanted.shape != theirs.shape:
        return 0.0, [f"pixels have shape {list(theirs.shape)}, expected {list(wanted.shape)}"]
    off = (wanted - theirs).abs().max().item()
    return off, [] if off <= PIXELS else [f"pixels differ by {off:.3g}"]


def _logits_off(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, list[str]]:
    """The largest difference of logits [T, V], and the faults; ``theirs`` may have more tokens if they never win."""
    tokens = ours.shape[-1]
    if len(theirs) != len(ours) or theirs.shape[-1] < tokens:
        return 0.0, [f"logits have shape {list(theirs.shape)}, expected {list(ours.shape)}"]
    off, largest = (ours - theirs[:, :tokens]).abs().max().item(), ours.abs().max().item()
    faults = [] if off <= TOLERANCE * largest else [f"logits differ by {off:.3g}"]
    if int(theirs.argmax(-1).max()) >= tokens:
        faults.append("a token that only the export has is the most likely one")
    return off, faults


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
    output = Detokenizer(assistant.encoding.tokenizer, assistant.stops)
    for token in tokens:
        output.add(None if token in assistant.stops.ids else token)
        if output.done:
            break
    output.add(None)
    return output.text.strip()
