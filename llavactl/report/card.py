"""A model card: what an export is, what it was trained on and how, what it scored, and what it can't do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llavactl.core.registry import format_spec
from llavactl.report.inputs import read_document, read_recipe

USE = {
    "hf": """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(".", dtype="auto")
processor = AutoProcessor.from_pretrained(".")
```""",
    "peft": """\
```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("base", dtype="auto"), ".")
processor = AutoProcessor.from_pretrained("base")
```""",
    "llava": "This is the original LLaVA's layout: its own programs, and `llavactl chat --model`, load it.",
}


def card(model: Path, form: str, stop_strings: Sequence[str] = ()) -> str:
    """The card (Markdown) of the model folder ``model`` exported in format ``form``.

    ``stop_strings`` must be given to the program that loads it.
    What is not known, as of a model that another program trained, is said to be unknown.
    """
    description = read_document(model / "llavactl.json")
    run = model.parent.parent
    _, recipe = read_recipe(run)
    name = str(recipe.get("name", model.name))
    bases = [_base(description.get(key)) for key in ("vision", "language")]
    head = [
        "---",
        "pipeline_tag: image-text-to-text",
        "tags: [llava, llavactl]",
        *_library(form),
        "---",
        "",
        f"# {name}",
    ]
    parts = [
        "\n".join(head),
        "A LLaVA-type vision-language model: a frozen vision backbone, a connector and a language model, trained with "
        "llavactl.",
        _section("Use", [USE.get(form, f"Format `{form}`."), *_stopping(stop_strings)]),
        _section("What it is made of", _made_of(description)),
        _section("Data", _data(recipe)),
        _section("Training", _training(recipe, description, run)),
        _section("Scores", _scores(run)),
        _section("Licences", [_licence(base) for base in bases if base]),
        _section("Limits", _limits(description)),
        _section("Versions", _versions(description)),
    ]
    return "\n\n".join(parts) + "\n"


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *(lines or ["Unknown."])])


def _stopping(texts: Sequence[str]) -> list[str]:
    if not texts:
        return []
    given = f"stop_strings={list(texts)!r}, tokenizer=processor.tokenizer"
    return ["", "Pass the stop string, which is not a single token, to `generate`:", "",
            f"```python\nmodel.generate(**inputs, {given})\n```"]  # fmt: skip


def _library(form: str) -> list[str]:
    return {"hf": ["library_name: transformers"], "peft": ["library_name: peft"]}.get(form, [])


def _base(spec: Any) -> str:
    return str(spec.get("model") or spec.get("name")) if isinstance(spec, Mapping) else ""


def _made_of(description: Mapping[str, Any]) -> list[str]:
    shown = []
    for key in ("vision", "connector", "language"):
        spec = description.get(key) or {}
        options = ", ".join(f"{option} {_short(value)}" for option, value in spec.items() if option != "name")
        shown.append(f"- {key}: `{spec.get('name', 'unknown')}`" + (f" ({options})" if options else ""))
    return [*shown, f"- conversation template: `{format_spec(description.get('template') or 'unknown')}`"]


def _data(recipe: Mapping[str, Any]) -> list[str]:
    rows = []
    for stage, sources in (recipe.get("data") or {}).items():
        for spec in sources or []:
            what = ", ".join(
                f"{k} {_short(v)}" for k, v in spec.items() if k not in ("name", "images") and v is not None
            )
            rows.append(f"- {stage}: `{spec.get('name')}` ({what})")
    return rows


def _training(recipe: Mapping[str, Any], description: Mapping[str, Any], run: Path) -> list[str]:
    rows = []
    keys = (
        "method",
        "epochs",
        "batch_size",
        "learning_rate",
        "connector_learning_rate",
        "warmup",
        "cooldown",
        "precision",
    )
    for stage in ("stage1", "stage2"):
        report = read_document(run / stage / "report.json")
        if not report:
            continue
        settings = recipe.get(stage) or {}
        said = ", ".join(f"{key} {settings[key]}" for key in keys if settings.get(key) is not None)
        loss = f"{report['steps']} steps on {report['samples']} samples, loss {report['loss']:.4f}"
        held = f", validation {report['val_loss']:.4f}" if report.get("val_loss") is not None else ""
        rows.append(f"- {stage}: {loss}{held}; {said}")
    return rows if rows or description.get("versions") else []


def _scores(run: Path) -> list[str]:
    rows = []
    for file in sorted((run / "eval").glob("*.json")):
        found = read_document(file)
        scores = {key: each for key, each in (found.get("scores") or {}).items() if isinstance(each, int | float)}
        said = ", ".join(
            f"{key} {each:.1f}" if isinstance(each, float) else f"{key} {each}" for key, each in scores.items()
        )
        rows.append(f"- `{found.get('task')}`, protocol `{found.get('protocol')}`, {found.get('n')} questions: {said}")
    return rows or ["None was measured."]


def _licence(base: str) -> str:
    """What the base says of its licence in its own card, where that lies beside it."""
    _, _, rest = _text(Path(base) / "README.md").partition("---\n")
    for line in rest.partition("\n---")[0].splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("license", "license_name") and value.strip():
            return f"- `{_short(base)}`: {value.strip()}"
    return f"- `{_short(base)}`: see where it came from; its terms hold for this model too"


def _limits(description: Mapping[str, Any]) -> list[str]:
    said = ["- It may describe what is not in an image, and says wrong things as fluently as right ones."]
    if description.get("stage") == 1:
        said.append("- Stage 1 alone: the connector is aligned, the model has not learned to follow instructions.")
    grid = (description.get("shape") or {}).get("grid")
    if grid:
        said.append(f"- It sees an image as {grid[0]}×{grid[1]} patches: small print and small things are lost.")
    return said


def _versions(description: Mapping[str, Any]) -> list[str]:
    return [f"- {name} {version}" for name, version in (description.get("versions") or {}).items()]


def _short(value: Any) -> str:
    """A path's last part: a card goes to others, who have no use for this machine's folders."""
    text = str(value)
    return Path(text).name if Path(text).is_absolute() else text


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
