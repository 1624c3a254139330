"""What the model card of an export says: how to run it, and what differs in llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence

from llavactl import SavedModel
from llavactl_gguf.vision import BICUBIC, Builds, has_class_token, squares


def usage(model: str, mmproj: str, stop_strings: Sequence[str]) -> list[str]:
    """Lines of Markdown: the command of llama.cpp's server for the files ``model`` and ``mmproj``."""
    lines = ["```sh", f"llama-server -m {model} --mmproj {mmproj}", "```"]
    if stop_strings:
        texts = ", ".join(f"`{text!r}`" for text in stop_strings)
        lines += [
            "",
            f"Pass these texts, which end an answer and aren't single tokens, as `stop` in a request: {texts}.",
        ]
    return [*lines, "", "llavactl doesn't read GGUF files; the model folder in Origin can be trained further."]


def limitations(saved: SavedModel, builds: Builds) -> list[str]:
    """Sentences about what llama.cpp computes differently."""
    how, vision = squares(saved), saved.vision()
    found = [
        "llama.cpp computes GELU approximately, in float16.",
        "Images that aren't square are resized before they are padded: pad photos before sending them."
        if how == "pad"
        else f"llama.cpp pads images that aren't square; in training they were {_PAST[how]}: {how} photos before "
        "sending them.",
    ]
    if (resample := vision.processor.to_dict()["resample"]) != BICUBIC:
        found.append(
            f"llama.cpp resizes images with a bicubic filter; in training it was {_filter_name(resample)}: resize "
            "photos before sending them."
        )
    if has_class_token(vision.config):
        found.append(
            "The projector is for builds of llama.cpp that read the class token after the patches, as b11739 does; "
            "they leave out the first patch of an image (for_build: cls-last)."
            if builds == "cls-last"
            else "The projector is for builds of llama.cpp that read the class token before the patches (for_build: "
            "cls-first); in others, such as b11739, patches have wrong positions."
        )
    return found


_PAST = {"crop": "cropped", "stretch": "stretched"}


def _filter_name(resample: int) -> str:
    from PIL.Image import Resampling

    return Resampling(resample).name.lower()
