"""Regenerates the generated blocks of docs/, and ``llavactl/__init__.pyi``, from the code: ``make docs``.

A block is delimited by ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``. ``tests/docs`` fails if a block is
outdated.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# The pages describe llavactl without the plugins that are installed here.
os.environ["LLAVACTL_PLUGINS"] = ""

import click
from pydantic import BaseModel

import llavactl
from llavactl.cli.help import Command
from llavactl.core import hookspecs, protocols
from llavactl.core.model_description import ModelDescription
from llavactl.core.registry import registry
from llavactl.core.validation import describe, schema_of

ROOT = Path(__file__).parents[1]
PAGES = (
    "docs/how-to/memory.md",
    *(f"docs/reference/{name}.md" for name in ("recipes", "plugins", "cli", "templates", "data", "export")),
)
BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)


def commands() -> Iterator[str]:
    """The commands with their summaries."""
    from llavactl.core.builtin_plugin import COMMANDS

    yield "| command | |\n|---|---|"
    for name, summary in COMMANDS.items():
        group = _command([name])
        names = list(group.commands) if isinstance(group, click.Group) else []
        yield f"| `llavactl {name}{' ' if names else ''}{'·'.join(names)}` | {summary} |"


def cli() -> Iterator[str]:
    """Every command with its usage, help and options."""
    from llavactl.core.builtin_plugin import COMMANDS

    for name in COMMANDS:
        yield from _describe([name])


def _command(path: list[str]) -> Command:
    """The command at ``path`` below ``llavactl``."""
    from llavactl.cli.root import root

    found: Command = root
    for name in path:
        assert isinstance(found, click.Group)
        below = found.get_command(click.Context(found), name)
        assert isinstance(below, Command), path
        found = below
    return found


def _describe(path: list[str]) -> Iterator[str]:
    command = _command(path)
    context = click.Context(command, info_name=" ".join(["llavactl", *path]))
    pieces = " ".join(command.collect_usage_pieces(context))
    yield f"{'#' * (len(path) + 1)} `llavactl {' '.join(path)}`\n"
    if command.help:
        yield f"{inspect.cleandoc(command.help)}\n"
    if isinstance(command, click.Group):
        for name in command.commands:
            yield from _describe([*path, name])
        return
    yield f"```\nllavactl {' '.join(path)} {pieces}\n```\n"
    options = (param for param in command.params if isinstance(param, click.Option))
    records = [option.get_help_record(context) for option in options if option.name not in ("quiet", "verbose")]
    lines = [
        f"- `{option}` – {_linked(' '.join(what.split()))}".removesuffix(" – ")
        for option, what in filter(None, records)
    ]
    if lines:
        yield "\n".join(lines) + "\n"
    yield "```sh\n" + "\n".join(command.examples) + "\n```\n"


def hook_table() -> Iterator[str]:
    """One line per hook."""
    yield "| hook | purpose |\n|---|---|"
    for name, function in vars(hookspecs).items():
        if hasattr(function, "llavactl_spec"):
            summary = (inspect.getdoc(function) or "").partition("\n")[0].replace("``", "`")
            yield f"| `{name}` | {summary} |"


def hooks() -> Iterator[str]:
    """Every hook with its signature and docstring, in the order of the module."""
    for name, function in vars(hookspecs).items():
        if hasattr(function, "llavactl_spec"):
            text = _linked((inspect.getdoc(function) or "").replace("``", "`"))
            yield f"### `{name}`\n\n```python\ndef {_signature(name, function)}: ...\n```\n\n{text}\n"


def _signature(name: str, function: Callable[..., Any]) -> str:
    parameters = [f"{p.name}: {p.annotation}" for p in inspect.signature(function).parameters.values()]
    return f"{name}({', '.join(parameters)}) -> {inspect.signature(function).return_annotation}"


def kinds() -> Iterator[str]:
    """The Protocol of every kind of component, with the other classes of the package that it mentions."""
    classes = [
        each
        for _, each in inspect.getmembers(protocols, inspect.isclass)
        if each.__module__.startswith(protocols.__name__)
    ]
    shown: dict[type, str] = {}
    for kind, protocol in protocols.KINDS.items():
        mentioned = [each for each in _mentioned(protocol, classes) if each is not protocol]
        new = [protocol, *(each for each in mentioned if each not in shown)]
        sources = "\n\n\n".join(map(_source, new))
        yield f"### `{kind}`\n\n```python\n{sources}\n```\n"
        if earlier := [each for each in mentioned if each in shown]:
            yield f"See also {', '.join(f'[`{each.__name__}`](#{shown[each]})' for each in earlier)}.\n"
        shown |= dict.fromkeys(new, kind)


def _mentioned(protocol: type, classes: Sequence[type]) -> list[type]:
    """``protocol`` and the other ``classes`` that it, or a class that it mentions, mentions."""
    found = [protocol]
    for each in found:  # grows
        source = _source(each)
        found += [other for other in classes if other not in found and re.search(rf"\b{other.__name__}\b", source)]
    return found


def _source(protocol: type) -> str:
    return inspect.getsource(protocol).removeprefix("@runtime_checkable\n").rstrip()


def _data_class(data_class: type, members: Sequence[str] = ()) -> str:
    """A class definition with the docstring of ``data_class``, its fields, including inherited ones, and ``members``.

    By default the members are its public properties.
    """
    doc = textwrap.indent(f'"""{inspect.getdoc(data_class)}', "    ")
    fields = "".join(
        f"    {field.name}: {field.type}{_field_default(field)}\n" for field in dataclasses.fields(data_class)
    )
    end = '\n    """\n' if "\n" in doc else '"""\n'
    attributes = vars(data_class)
    public = [name for name, each in attributes.items() if isinstance(each, property) and not name.startswith("_")]
    stubs = (f"\n{textwrap.indent(_stub(name, attributes[name]), '    ')}\n" for name in members or public)
    return f"class {data_class.__name__}:\n{doc}{end}\n{fields}{''.join(stubs)}".rstrip()


def _field_default(field: dataclasses.Field[Any]) -> str:
    """The default as in the class definition; empty if the field is required."""
    if field.default_factory is not dataclasses.MISSING:
        return f" = {field.default_factory()!r}"
    if field.default is dataclasses.MISSING:
        return ""
    return f" = {json.dumps(field.default)}" if isinstance(field.default, str) else f" = {field.default!r}"


def keys() -> Iterator[str]:
    """Every key that llavactl reads in a recipe, section by section."""
    from llavactl.recipe import frame, sections, specs, stages

    yield from _key_table("Top level", frame.Recipe, {"run_dir": "`runs/<name>`"})
    yield from _key_table("`language`", specs.LanguageSpec)
    yield from _key_table("`features`", sections.Features)
    yield from _key_table("`data`", sections.Data)
    yield from _key_table("A source in `data`", specs.SourceSpec)
    yield from _stage_table(
        {number: stages.StageSections.model_fields[name].annotation for number, name in stages.STAGES.items()}
    )
    yield from _key_table("`lora` of a stage", stages.Lora)
    yield from _key_table("`evaluate_every` of a stage", stages.EvaluateEvery)
    yield from _key_table("A task in `evaluate_every`", specs.PeriodicTask)
    yield from _key_table("`eval`", sections.Eval)
    yield from _key_table("`generate`", sections.Generate)
    yield from _key_table("`generate.kinds`", sections.SampleKinds)
    yield from _key_table("`generate.gates`", sections.Gates)
    yield from _key_table("An export in `export`", specs.Export)
    yield from _key_table("`sweep`", sections.Sweep)


def _key_table(title: str, model: type[BaseModel], defaults: Mapping[str, str] | None = None) -> Iterator[str]:
    """``defaults`` are defaults that depend on other keys."""
    yield f"### {title}\n"
    yield f"{inspect.cleandoc(model.__doc__ or '')}\n".replace("``", "`")
    yield "| key | value | default | description |\n|---|---|---|---|"
    for key, (value, default, description) in _fields(model).items():
        yield f"| `{key}` | {value} | {(defaults or {}).get(key, default)} | {description} |"
    yield ""


def _stage_table(models: Mapping[int, Any]) -> Iterator[str]:
    """One table for all stages: most keys are the same."""
    yield "### " + " and ".join(f"`stage{number}`" for number in models) + "\n"
    yield " ".join(inspect.cleandoc(model.__doc__ or "") for model in models.values()) + "\n"
    numbers = "".join(f" stage {number} |" for number in models)
    yield f"| key | value |{numbers} description |\n|---|---|{'---|' * len(models)}---|"
    of_stages = [_fields(model) for model in models.values()]
    for key in dict.fromkeys(key for fields in of_stages for key in fields):
        value, _, description = next(fields[key] for fields in of_stages if key in fields)
        defaults = "".join(f" {fields[key][1] if key in fields else '–'} |" for fields in of_stages)
        yield f"| `{key}` | {value} |{defaults} {description} |"
    yield ""


def _fields(model: type[BaseModel]) -> dict[str, tuple[str, str, str]]:
    """The keys of ``model`` with expected value, default and description, in Markdown."""
    schema = schema_of(model)
    fields = {}
    for key, field in schema.get("properties", {}).items():
        default = "required" if key in schema.get("required", ()) else _default(field.get("default"))
        value = "a string" if "pattern" in field else describe(field, schema) or "any value"
        fields[key] = (value.replace("'", "`"), default, _description(key, field, model))
    return fields


def _default(value: Any) -> str:
    """A default in Markdown; defaults of sections are in the section's own table."""
    return "" if isinstance(value, dict) else f"`{json.dumps(value, ensure_ascii=False)}`"


def _description(key: str, field: Mapping[str, Any], model: type[BaseModel]) -> str:
    """The description of a key, which a subclass that redeclares the key inherits."""
    inherited = (parent.model_fields.get(key) for parent in model.__mro__ if hasattr(parent, "model_fields"))
    text = field.get("description") or next((each.description for each in inherited if each and each.description), "")
    return _linked(str(text).replace("|", "\\|"))


def _linked(text: str) -> str:
    """``text`` on a page in docs/reference/, with links to the pages that it names."""

    def link(match: re.Match[str]) -> str:
        title = (ROOT / match[1]).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        return f"[{title}]({os.path.relpath(match[1], 'docs/reference')}{match[2] or ''})"

    return re.sub(r"\b(docs/[\w/-]+\.md)(#[\w-]+)?", link, text)


def components() -> Iterator[str]:
    """Every built-in component with its options."""
    for kind in protocols.KINDS:
        names = registry().names(kind)
        if names:
            yield f"### `{kind}`\n"
        for name in names:
            entry = registry().get(kind, name)
            yield f"**`{name}`** – {entry.summary.replace('<|', chr(92) + '<|')}\n"
            fields = _fields(entry.options_model())
            if fields:
                yield "| option | value | default | description |\n|---|---|---|---|"
                for key, (value, default, description) in fields.items():
                    yield f"| `{key}` | {value} | {default} | {description} |"
                yield ""


def problems() -> Iterator[str]:
    """The problems that ``data check`` reports, with their effect on a run."""
    from llavactl.curation.problems import KINDS

    yield "| problem | effect | |\n|---|---|---|"
    for name, kind in KINDS.items():
        yield f"| `{name}` | {kind.effect} | {kind.description.replace('<image>', '`<image>`')} |"


def recipes() -> Iterator[str]:
    """The built-in recipes."""
    yield "| recipe | |\n|---|---|"
    for name in registry().names("recipes"):
        yield f"| `{name}` | {registry().get('recipes', name).summary} |"


def memory() -> Iterator[str]:
    """The predicted memory of the recipes, which docs/memory.py computes."""
    rows = json.loads((ROOT / "recipes" / "memory.json").read_text(encoding="utf-8"))
    columns = list(dict.fromkeys((row["devices"], row["gigabytes"]) for row in rows))
    yield f"| recipe | stage | {' | '.join(f'{devices} × {memory} GB' for devices, memory in columns)} |"
    yield f"|---|---|{'---|' * len(columns)}"
    for (name, stage), group in itertools.groupby(rows, lambda row: (row["recipe"], row["stage"])):
        yield f"| `{name}` | {stage} | {' | '.join(map(_memory_cell, group))} |"


def _memory_cell(row: Mapping[str, Any]) -> str:
    """The peak in GB, and what was chosen."""
    if not row["fits"]:
        return "–"
    marks = {
        "S": row["sharded"],
        "H": row["optimizer_state"] == "host",
        "C": row["gradient_checkpointing"],
        f"{row['micro_batch_tokens']:,}" if row["micro_batch_tokens"] else "": row["micro_batch_tokens"],
    }
    return " ".join([f"{row['device_bytes'] / 1e9:.0f}", *(mark for mark, applies in marks.items() if applies)])


def model_description() -> Iterator[str]:
    """The keys of ``llavactl.json``."""
    yield "| key | value | meaning |\n|---|---|---|"
    hints = get_type_hints(ModelDescription, include_extras=True)
    required = ModelDescription.__required_keys__
    for key in [*(key for key in hints if key in required), *(key for key in hints if key not in required)]:
        value, meaning = get_args(hints[key])
        yield f"| `{key}` | {_json_type(value)}{'' if key in required else ', optional'} | {meaning} |"


def _json_type(hint: Any) -> str:
    """The JSON values of the type ``hint``."""
    names = {int: "integer", str: "string", bool: "boolean", dict: "object", list: "list", type(None): "null"}
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_json_type, get_args(hint)))
    return names[get_origin(hint) or hint]


def templates() -> Iterator[str]:
    """One conversation in the format of every template."""
    from llavactl.components.templates.styles import STYLES
    from llavactl.core.schema import Text, Turn
    from llavactl.images.image_file import ImageFile

    question = Turn("user", (ImageFile("photos", "a.jpg"), "\nWhat is it?"))
    follow_up = (Turn("user", ("Which colour?",)), Turn("assistant", ("Red.",)))
    conversation = (question, Turn("assistant", ("A dog.",)), *follow_up)
    tokenizer = SimpleNamespace(bos_token="<s>", eos_token="</s>", unk_token_id=0, convert_tokens_to_ids=len)
    for name in ("plain", *STYLES):
        template = registry().create("templates", {"name": name})
        segments = template.render(conversation[:2] if name == "plain" else conversation, tokenizer)
        text = ""
        for is_target, run in itertools.groupby(segments, lambda each: isinstance(each, Text) and each.trained):
            piece = "".join(each.text if isinstance(each, Text) else "<image>" for each in run)
            text += f"«{piece}»" if is_target else piece
        yield f"### `{name}`\n\n```text\n{text}\n```\n"


def saved_model() -> Iterator[str]:
    """The functions that read and write a model folder, and the members of the object that reading returns."""
    parts = [
        _stub("open_model", llavactl.open_model),
        _data_class(llavactl.SavedModel, [name for name in vars(llavactl.SavedModel) if not name.startswith("_")]),
        _stub("save_model", llavactl.save_model),
    ]
    yield "```python\n" + "\n\n\n".join(parts) + "\n```"


def _stub(name: str, member: Any) -> str:
    """The definition of a function or property without its body, in which a signature may take several lines."""
    function = member.fget if isinstance(member, property) else getattr(member, "func", member)
    head, _, _ = textwrap.dedent(inspect.getsource(function)).partition('"""')
    head = head[head.index(f"def {name}") :].rstrip()
    doc = f'"""{inspect.getdoc(function)}'
    end = '\n"""' if "\n" in doc else '"""'
    decorator = "" if function is member else "@property\n"
    return f"{decorator}{head}\n{textwrap.indent(doc + end, '    ')}"


def checks() -> Iterator[str]:
    """The check of each kind of component."""
    from llavactl.testing import CHECKS

    yield "| kind | check | |\n|---|---|---|"
    for kind, check in CHECKS.items():
        text = " ".join((inspect.getdoc(check) or "").split()).replace("``", "`")
        yield f"| `{kind}` | `{check.__name__}` | {text} |"


def testing() -> Iterator[str]:
    """The other functions and classes of ``llavactl.testing``, with their parameters."""
    from llavactl import testing

    yield "| name | |\n|---|---|"
    for name in testing.__all__:
        member = getattr(testing, name)
        if member not in testing.CHECKS.values() and callable(member):
            arguments = "" if inspect.isclass(member) else _arguments(member)
            text = " ".join((inspect.getdoc(member) or "").split("\n\n")[0].split()).replace("``", "`")
            yield f"| `{name}{arguments}` | {text} |"


def _arguments(function: Callable[..., Any]) -> str:
    """The parameters of ``function`` with their defaults, without types."""
    signature = inspect.signature(function)
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def sample_classes() -> Iterator[str]:
    """The data classes of samples and the Protocol of images."""
    classes = (llavactl.Sample, llavactl.Question, llavactl.Turn, llavactl.Box)
    yield "```python\n" + "\n\n\n".join([*map(_data_class, classes), _source(llavactl.ImageRef)]) + "\n```"


def reports() -> Iterator[str]:
    """The fields of the reports that observers get."""
    from llavactl.evaluation.results import EvalReport
    from llavactl.training.report import TrainReport
    from llavactl.verbs.extract import ExtractReport, StoreReport

    classes = (ExtractReport, StoreReport, TrainReport, EvalReport)
    yield "```python\n" + "\n\n\n".join(map(_data_class, classes)) + "\n```"


def data_classes() -> Iterator[str]:
    """The fields of every public data class that other blocks don't show."""
    shown = "\n".join([*kinds(), *saved_model(), *sample_classes()])
    classes = [getattr(llavactl, name) for name in llavactl.__all__]
    hidden = [
        each
        for each in classes
        if dataclasses.is_dataclass(each) and not re.search(rf"^class {each.__name__}\b", shown, re.MULTILINE)
    ]
    yield "```python\n" + "\n\n\n".join(map(_data_class, hidden)) + "\n```"


def names() -> Iterator[str]:
    """The public names with the first paragraph of their docstrings."""
    yield "| name | description |\n|---|---|"
    for name in llavactl.__all__:
        yield f"| `{name}` | {_linked(_first_line(name))} |"


def _first_line(name: str) -> str:
    """The first paragraph of the docstring of a public name, or of the string below its assignment."""
    value = getattr(llavactl, name)
    own = inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value))
    text = (inspect.getdoc(value) if own else _below_assignment(name)) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`")


def _below_assignment(name: str) -> str | None:
    """The string literal below ``name = …`` in the module that defines ``name``."""
    module = importlib.import_module(llavactl._MODULES[name])
    for node, after in itertools.pairwise(ast.parse(inspect.getsource(module)).body):
        assigned = isinstance(node, ast.Assign) and any(ast.unparse(target) == name for target in node.targets)
        if assigned and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            return str(after.value.value)
    return None


BLOCKS: dict[str, Callable[[], Iterator[str]]] = {
    each.__name__: each
    for each in (
        commands,
        cli,
        hook_table,
        hooks,
        kinds,
        keys,
        components,
        problems,
        recipes,
        memory,
        model_description,
        saved_model,
        checks,
        testing,
        sample_classes,
        reports,
        templates,
        data_classes,
        names,
    )
}


def filled(text: str) -> str:
    """The page ``text`` with its generated blocks regenerated."""

    def fill(match: re.Match[str]) -> str:
        block = "\n".join(BLOCKS[match[2]]()).rstrip("\n")
        return f"{match[1]}{block}\n{match[3]}"

    return BLOCK.sub(fill, text)


def stub() -> str:
    """The types of the public names, which are imported lazily: without it, type checkers don't know them."""
    names = sorted(llavactl._MODULES.items(), key=lambda item: (item[1], item[0]))
    imports = "\n".join(f"from {module} import {name} as {name}" for name, module in names)
    others = "__all__: list[str]\n__version__: str\n_MODULES: dict[str, str]\n"
    return f'"""The public names; ``python docs/generate.py`` writes this file."""\n\n{imports}\n\n{others}'


def main() -> None:
    """Regenerates every page, and the stub of the public names."""
    (ROOT / "llavactl" / "__init__.pyi").write_text(stub(), encoding="utf-8")
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
