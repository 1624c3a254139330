"""The model card of an export: usage, components, data, training, scores, licenses, limitations, versions."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llavactl.core.errors import StoreError
from llavactl.core.model_description import DESCRIPTION
from llavactl.core.registry import format_spec
from llavactl.features.fingerprint import Fingerprint
from llavactl.features.manifest import read_recomputed, store_dir
from llavactl.recipe.stages import STAGES
from llavactl.report.inputs import read_document, read_recipe

APPLIES = "see its source; its license also applies to this model"
"""The entry of a model whose license is not known here."""

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
    "llava": "This is the layout of the original LLaVA: load it with LLaVA's code or with `llavactl chat --model`.",
}


VERIFICATION_BEGIN, VERIFICATION_END = "<!-- verification -->", "<!-- end of verification -->"
"""Marks in the card around the result of the verification, which is written after the export."""


def with_verification(text: str, verification: str) -> str:
    """The model card ``text`` with another text about the verification; unchanged if its marks were removed."""
    before, begin, rest = text.partition(VERIFICATION_BEGIN)
    _, end, after = rest.partition(VERIFICATION_END)
    return f"{before}{begin}\n{verification}\n{end}{after}" if end else text


def card(
    model: Path,
    form: str,
    exported: str = "",
    options: Sequence[str] = (),
    stop_strings: Sequence[str] = (),
    limitations: Sequence[str] = (),
    usage: Sequence[str] = (),
) -> str:
    """The model card (Markdown) of the model folder ``model`` exported in the format ``form``.

    ``exported`` is the model as it was given to the command, ``options`` are the format's (``-t KEY=VALUE``).
    ``stop_strings`` must be passed to the program that loads the model. ``usage`` are lines of Markdown, which a format
    that llavactl doesn't know writes itself. Sections without information, such as the
    training of a model from elsewhere, read "Unknown."
    """
    description = read_document(model / DESCRIPTION)
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
        "A LLaVA-type vision-language model (frozen vision encoder, connector, language model), trained with llavactl.",
        _section("Usage", usage or [USE.get(form, f"Format `{form}`."), *_stopping(stop_strings)]),
        _section("Origin", _origin(model, form, exported, options, run_name=str(recipe.get("name", "")))),
        _section("Verification", [VERIFICATION_BEGIN, "Not verified.", VERIFICATION_END]),
        _section("Components", _components(description)),
        _section("Data", _data(recipe)),
        _section("Training", _training(recipe, description, run)),
        *([_section("Recomputed features", recomputed)] if (recomputed := _recomputed(description, recipe)) else []),
        _section("Scores", _scores(run)),
        _section("Licenses", [license_of(base, APPLIES) for base in bases if base]),
        _section("Limitations", [*_limitations(description), *(f"- {sentence}" for sentence in limitations)]),
        _section("Versions", _versions(description)),
    ]
    return "\n\n".join(parts) + "\n"


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *(lines or ["Unknown."])])


def _stopping(stop_strings: Sequence[str]) -> list[str]:
    if not stop_strings:
        return []
    arguments = f"stop_strings={list(stop_strings)!r}, tokenizer=processor.tokenizer"
    return ["", "Pass the stop string, which is not a single token, to `generate`:", "",
            f"```python\nmodel.generate(**inputs, {arguments})\n```"]  # fmt: skip


def _library(form: str) -> list[str]:
    return {"hf": ["library_name: transformers"], "peft": ["library_name: peft"]}.get(form, [])


def _base(spec: Any) -> str:
    return str(spec.get("model") or spec.get("name")) if isinstance(spec, Mapping) else ""


def _origin(model: Path, form: str, exported: str, options: Sequence[str], run_name: str) -> list[str]:
    """The model that the export was made from, and the command that makes it again.

    A model folder of a run is shown with the last folders of its path, ``runs/NAME/stage2/model``.
    """
    shown = "/".join(model.parts[-4:]) if run_name else _short(exported or model)
    stage = f" (run `{run_name}`, {model.parent.name})" if run_name else ""
    portable = ["=".join((key, *map(_short, value))) for key, *value in (option.split("=", 1) for option in options)]
    arguments = [*("export", "--model", shown, "--format", form, "--to", "DIR"), *portable]
    return [
        f"- exported from `{shown}`{stage}; the key `model` in `llavactl_export.json` is a hash of its contents",
        f"- to export it again: `llavactl {shlex.join(arguments)}`",
    ]


def _components(description: Mapping[str, Any]) -> list[str]:
    rows = []
    for key in ("vision", "connector", "language"):
        spec = description.get(key) or {}
        options = ", ".join(f"{option} {_short(value)}" for option, value in spec.items() if option != "name")
        rows.append(f"- {key}: `{spec.get('name', 'unknown')}`" + (f" ({options})" if options else ""))
    return [*rows, f"- conversation template: `{format_spec(description.get('template') or 'unknown')}`"]


def _data(recipe: Mapping[str, Any]) -> list[str]:
    rows = []
    for stage, sources in (recipe.get("data") or {}).items():
        for spec in sources or []:
            options = ", ".join(
                f"{k} {_short(v)}" for k, v in spec.items() if k not in ("name", "images") and v is not None
            )
            rows.append(f"- {stage}: `{spec.get('name')}` ({options})")
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
    for stage in STAGES.values():
        report = read_document(run / stage / "report.json")
        if not report:
            continue
        settings = recipe.get(stage) or {}
        options = ", ".join(f"{key} {settings[key]}" for key in keys if settings.get(key) is not None)
        loss = f"{report['steps']} steps on {report['samples']} samples, loss {report['loss']:.4f}"
        validation = f", validation loss {report['val_loss']:.4f}" if report.get("val_loss") is not None else ""
        rows.append(f"- {stage}: {loss}{validation}; {options}")
    return rows if rows or description.get("versions") else []


def _recomputed(description: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """The latest result of ``cache verify --recompute`` for the store that the model was trained from, if any."""
    fields = description.get("fingerprint")
    if not fields or (recipe.get("features") or {}).get("mode") != "cached":
        return []
    try:
        report = read_recomputed(store_dir(Fingerprint(fields)))
    except StoreError:  # a damaged store doesn't prevent an export
        return []
    if not {"compared", "equal", "rounding", "different", "last_places", "dtype", "seed"} <= report.keys():
        return []
    counts = f"{report['equal']} equal to the bit, {report['rounding']} equal up to rounding on another device or with "
    return [
        f"{report['compared']} images of the feature store, chosen with seed {report['seed']}, were encoded again and "
        f"compared with its features ({report['dtype']}): {counts}other versions, {report['different']} different. "
        f"Largest difference: {report['last_places']} units in the last place.",
    ]


def _scores(run: Path) -> list[str]:
    rows = []
    for file in sorted((run / "eval").glob("*.json")):
        report = read_document(file)
        scores = {key: value for key, value in (report.get("scores") or {}).items() if isinstance(value, int | float)}
        listed = ", ".join(
            f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in scores.items()
        )
        task, protocol, questions = report.get("task"), report.get("protocol"), report.get("n")
        rows.append(f"- `{task}`, protocol `{protocol}`, {questions} questions: {listed}")
    return rows or ["Not evaluated."]


def license_of(base: str, otherwise: str) -> str:
    """The license in the model card of ``base``, if ``base`` is a folder with one, as a list item in Markdown.

    ``otherwise`` is the text without one.
    """
    _, _, rest = _text(Path(base) / "README.md").partition("---\n")
    for line in rest.partition("\n---")[0].splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("license", "license_name") and value.strip():
            return f"- `{_short(base)}`: {value.strip()}"
    return f"- `{_short(base)}`: {otherwise}"


def _limitations(description: Mapping[str, Any]) -> list[str]:
    rows = ["- It may hallucinate objects that are not in the image; wrong answers are as fluent as right ones."]
    if description.get("stage") == 1:
        rows.append("- Stage 1 only: the connector is aligned, but the model is not instruction-tuned.")
    grid = (description.get("shape") or {}).get("grid")
    if grid:
        rows.append(f"- Images are encoded as {grid[0]}×{grid[1]} patches: small text and small objects are lost.")
    return rows


def _versions(description: Mapping[str, Any]) -> list[str]:
    return [f"- {name} {version}" for name, version in (description.get("versions") or {}).items()]


def _short(value: Any) -> str:
    """``value``, an absolute path reduced to its last part: the card is published, local folders are meaningless."""
    text = str(value)
    return Path(text).name if Path(text).is_absolute() else text


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
