"""What the model card of an export says: how to run it, and what differs in llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence

from llavactl import SavedModel
from llavactl_gguf.vision import Builds, has_class_token


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
    pad = saved.description["vision"]["image"] == "pad"
    found = [
        "llama.cpp computes GELU approximately, in float16.",
        "Images that aren't square are resized before they are padded, with another color for SigLIP."
        if pad
        else "llama.cpp pads images that aren't square; in training they were cropped or stretched.",
    ]
    if has_class_token(saved.vision().config):
        found.append(
            "The positions in the projector are for builds of llama.cpp that read the class token after the patches; "
            "they leave out the first patch of an image (for_build: cls-last)."
            if builds == "cls-last"
            else "The projector is for builds of llama.cpp that read the class token before the patches (for_build: "
            "cls-first); in others, patches have wrong positions."
        )
    return found
