"""The text of a new recipe, with a comment for every value that a user may want to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavactl.curation.recognize import RecognizedData
from llavactl.verbs.init.models import LanguageChoice, VisionChoice
from llavactl.verbs.init.settings import StageFacts, stage1_entries, stage2_entries
from llavactl.verbs.init.yaml import Entry, lines, path_in_recipe, value_text, wrapped

SCHEMA_FILE = "recipe.schema.json"
_PATHS = ("path", "images", "captions", "instances", "questions", "meta", "model")
"""Options that name files and folders, which become relative to the recipe."""

_LLAVA_CAPTIONS = (
    "a connector that was trained on LLaVA-Pretrain's 558,000 captions first is better than one trained on few: see "
    "the recipe llava-v1.5-7b"
)


@dataclass(frozen=True)
class RecipeFacts:
    """Everything that the text of a recipe depends on.

    ``data`` are the sources of each stage, ``absolute`` the paths that the user wrote as absolute paths. ``method`` is
    that of stage 2, chosen for ``method_reason``. ``planning``: options of a dry run for the same
    devices. ``compute``: the dtype of the vision encoder.
    """

    name: str
    folder: Path
    absolute: bool
    vision: VisionChoice
    language: LanguageChoice
    data: Mapping[int, Sequence[RecognizedData]]
    stages: Mapping[int, StageFacts]
    device: str
    planning: str
    method: str
    method_reason: str
    compute: str
    schema: bool
    file: str

    @property
    def only_captions(self) -> bool:
        """Whether no data are conversations, so that both stages train captions."""
        return all(each.content == "captions" for each in self.data[2])


def recipe_text(facts: RecipeFacts) -> str:
    """The recipe."""
    return "\n".join(_text(facts)) + "\n"


def _text(facts: RecipeFacts) -> Iterator[str]:
    if facts.schema:
        yield f"# yaml-language-server: $schema={SCHEMA_FILE}"
    yield f"# llavactl run -r {facts.file}"
    yield "#"
    heading = (
        f"Written by `llavactl init` for {facts.device}. `llavactl recipes check` checks your changes; `llavactl train "
        f"--stage 2 --dry-run{facts.planning}` shows memory, steps and time. `llavactl recipes show --resolved` prints "
        "all keys with their defaults."
    )
    yield from (f"# {line}" for line in wrapped(heading))
    yield f"name: {value_text(facts.name)}"
    yield from ("", "vision:", *lines(_vision(facts)))
    yield from ("", "connector:")
    yield from lines(
        [("name", "mlp2x-gelu", "LLaVA v1.5's; `pixel_shuffle: 2` divides the tokens by 4, but excludes the format hf")]
    )
    yield from ("", "language:", *lines(_language(facts)))
    yield from ("", "features:")
    why = "dtype of the vision encoder" + (
        "; bfloat16 is faster on GPUs and new CPUs" if facts.compute == "float32" else ""
    )
    yield from lines([("compute", facts.compute, why)])
    yield from ("", *_data(facts))
    yield from ("", "stage1:", *lines(stage1_entries(facts.stages[1])))
    yield from (
        "",
        "stage2:",
        *lines(stage2_entries(facts.stages[2], facts.method, facts.language.width, facts.method_reason)),
    )
    if facts.only_captions:
        yield from ("", *_generate(facts))


def _vision(facts: RecipeFacts) -> list[Entry]:
    choice = facts.vision
    known = f"{choice.tokens} tokens per image"
    if choice.shape is None:
        known = f"an id, downloaded on first use; {known}" + ("" if "model" in choice.spec else ", not checked")
    comments = {
        "name": "any CLIP, SigLIP, DINOv2 or similar model of transformers" if "model" in choice.spec else known,
        "model": known,
        "layer": "the second-to-last one, as in LLaVA: the last one is specialized to the model's pretraining",
        "image": "pad images to squares; square: crop their center",
    }
    return [(key, value, comments.get(key, "")) for key, value in _relative(facts, choice.spec).items()]


def _language(facts: RecipeFacts) -> list[Entry]:
    choice = facts.language
    where = "" if choice.here else "an id, downloaded on first use"
    entries = [(key, value, where if key == "model" else "") for key, value in _relative(facts, choice.spec).items()]
    return [*entries, ("template", choice.template, choice.why)]


def _data(facts: RecipeFacts) -> Iterator[str]:
    yield "data:"
    reasons = {
        1: "Captions: the connector is trained, the language model is frozen."
        if facts.stages[1].template is None
        else f"The same data as in stage 2, as there are no captions; {_LLAVA_CAPTIONS}.",
        2: "Conversations: connector and language model are fine-tuned."
        if not facts.only_captions
        else "The same captions as answers to a request, as there are no conversations (see the end of this file).",
    }
    for stage, sources in facts.data.items():
        yield from (f"  # {line}" for line in wrapped(reasons[stage]))
        yield f"  stage{stage}:"
        for each in sources:
            count = f"{each.samples:,}" if each.exact else f"about {each.samples:,}"
            captions = f"; {each.captions_per_image:.1f} captions per image" if each.captions_per_image > 1 else ""
            yield f"    # {count} samples{captions}"
            yield f"    - {value_text(_relative(facts, each.spec))}"


def _generate(facts: RecipeFacts) -> Iterator[str]:
    """A commented section: conversations from the captions."""
    (first, *_) = facts.data[2]
    about = (
        "To make conversations from the captions: a language model reads the captions (not the images) and writes "
        "questions and answers. Uncomment these lines, run `llavactl data generate --dry-run`, and then add the source "
        "`{name: llava-json, path: instruct.jsonl, images: …}` to data.stage2."
    )
    yield from (f"# {line}" for line in wrapped(about))
    yield "# generate:"
    spec = {key: value for key, value in first.spec.items() if key != "every_caption"}  # a teacher receives all at once
    yield f"#   source: {value_text(_relative(facts, spec))}"
    yield "#   teacher: {name: openai, model: gpt-4o-mini}  # needs OPENAI_API_KEY; `base_url: …` for another server"
    yield "#   kinds: {conversation: 58, detail: 23, reasoning: 77}  # LLaVA's proportions"
    yield "#   out: instruct.jsonl"
    yield "#   max_cost: 5  # in dollars; the command stops before it costs more"


def _relative(facts: RecipeFacts, spec: Mapping[str, Any]) -> dict[str, Any]:
    """``spec`` with paths relative to the recipe."""
    return {
        key: path_in_recipe(value, facts.folder, absolute=facts.absolute)
        if key in _PATHS and isinstance(value, str) and Path(value).is_absolute()
        else value
        for key, value in spec.items()
    }
