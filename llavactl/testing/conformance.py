"""Checks that a component does what its Protocol says; a plugin's tests call them, and so do ours.

Each returns what is wrong, one line a fault; an empty list is a component that llavactl can use.
"""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llavactl.core import plugins
from llavactl.core.errors import DataError, PluginError
from llavactl.core.protocols import RecordSource, RepairingSource, ShapedVision
from llavactl.core.registry import registry
from llavactl.core.schema import Answer, FeatureShape, Sample

if TYPE_CHECKING:
    from llavactl.core.protocols import Connector, Judged, Language, RawRecord, Source, Task, Vision


def check_source(source: Source, *, at_most: int = 50) -> list[str]:
    """Samples with ids, turns that alternate, images that are ImageRefs and survive pickling.

    Of a RecordSource also: its records and findings are consistent with its samples, and repaired records are usable.
    """
    faults: list[str] = _record_faults(source, at_most) if isinstance(source, RecordSource) else []
    for index, sample in zip(range(at_most), source, strict=False):
        if not isinstance(sample, Sample):
            return [f"item {index} is a {type(sample).__name__}, not a Sample"]
        roles = [turn.role for turn in sample.turns if turn.role != "system"]
        if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
            faults.append(f"sample {sample.id!r}: turns go {', '.join(roles) or 'nowhere'}, not user, assistant, …")
        changed = [image for image in sample.images if pickle.loads(pickle.dumps(image)) != image]  # noqa: S301 - ours
        faults += [f"sample {sample.id!r}: image {image.name!r} is another after pickling" for image in changed]
    return faults


def _record_faults(source: RecordSource, at_most: int) -> list[str]:
    from llavactl.curation.problems import KINDS

    faults: list[str] = []
    for record in itertools.islice(source.records(), at_most):
        if record.problem:
            continue
        before = copy.deepcopy(record.value)
        findings, images = source.examine(record)
        if unknown := [finding.kind for finding in findings if finding.kind not in KINDS]:
            return [*faults, f"{record.where}: examine() gives an unknown finding {unknown[0]!r}"]
        refused = any(KINDS[finding.kind].effect == "stops" for finding in findings)
        try:
            sample = source.sample(record)
        except DataError as error:
            if not refused:
                faults.append(f"{record.where}: sample() refuses what examine() accepts: {error.message}")
        else:
            if refused:
                faults.append(f"{record.where}: examine() refuses what sample() accepts")
            elif set(sample.images) != set(images):
                faults.append(f"{record.where}: the images of examine() differ from those of sample()")
        if isinstance(source, RepairingSource):
            faults += _repair_faults(source, record)
        if record.value != before:
            faults.append(f"{record.where}: the record's value was changed in place")
    return faults


def _repair_faults(source: RepairingSource, record: RawRecord) -> list[str]:
    value, changes = source.repair(record)
    if value is None:
        return [] if changes else [f"{record.where}: repair() drops the record without a reason"]
    if not changes and value is not record.value:
        return [f"{record.where}: repair() returns another value without a change"]
    try:
        source.sample(replace(record, value=value))
    except DataError as error:
        return [f"{record.where}: sample() refuses the repaired record: {error.message}"]
    return []


def check_vision(vision: Vision) -> list[str]:
    """An identity that is JSON and stays the same; finite features of the promised shape, alike in any batch."""
    import torch
    from PIL import Image

    faults: list[str] = []
    if json.dumps(dict(vision.identity()), sort_keys=True) != json.dumps(dict(vision.identity()), sort_keys=True):
        faults.append("identity() changes from call to call")
    encoder = vision.load("cpu", "float32")
    images = [Image.new("RGB", size, colour) for size, colour in (((40, 30), "red"), ((30, 50), "blue"))]
    pixels = torch.stack([torch.from_numpy(encoder.preprocess(image)) for image in images])
    features = encoder.encode(pixels)
    wanted = (2, encoder.shape.patches, encoder.shape.width)
    if tuple(features.shape) != wanted:
        faults.append(f"encode() gives {tuple(features.shape)}, its shape promises {wanted}")
    elif isinstance(vision, ShapedVision) and vision.shape() != encoder.shape:
        faults.append(f"shape() says {vision.shape()}, load() gives {encoder.shape}")
    elif not torch.isfinite(features).all():
        faults.append("encode() gives numbers that are not finite")
    elif not torch.allclose(encoder.encode(pixels[1:]), features[1:], rtol=1e-4, atol=1e-4):
        faults.append("an image's features change with the other images of its batch")
    return faults


def check_connector(connector: Connector, *, grid: tuple[int, int] = (4, 4), width: int = 16) -> list[str]:
    """The rules of ``Connector``, and a gradient for every trainable weight."""
    import torch

    from llavactl.model.connector_check import connector_fault

    shape, language_width = FeatureShape(grid, width), 24
    if fault := connector_fault(connector, shape, language_width, ("bfloat16",)):
        return [fault]
    module = connector.build(shape, language_width)
    module(torch.randn(2, shape.patches, width)).sum().backward()
    trainable = [(name, each) for name, each in module.named_parameters() if each.requires_grad]
    return [f"weight {name} gets no gradient" for name, each in trainable if each.grad is None]


def check_language(language: Language) -> list[str]:
    """A fast tokenizer with an end-of-sequence token, and a model that takes embeddings."""
    import torch

    faults: list[str] = []
    tokenizer = language.tokenizer()
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        faults.append("tokenizer() must be fast and have an end-of-sequence token")
    model = language.load("float32")
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    with torch.no_grad():
        by_ids = model(input_ids=ids).logits
        by_embeddings = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    if not torch.allclose(by_ids, by_embeddings, rtol=1e-4, atol=1e-4):
        faults.append("the model gives other logits for embeddings than for the ids they come from")
    return faults


def check_task(task: Task | Judged) -> list[str]:
    """Questions of one id each, the same every time, that end with the user; scores of all answers and of some."""
    questions = list(task.questions())
    ids = [question.id for question in questions]
    faults = [f"question {name!r} is there twice" for name, count in Counter(ids).items() if count > 1]
    if ids != [question.id for question in task.questions()]:
        faults.append("questions() changes from call to call")
    silent = [each.id for each in questions if each.turns[-1].role != "user"]
    faults += [f"question {name!r} does not end with the user" for name in silent]
    if not task.protocols:
        faults.append("it has no protocol")
    if not hasattr(task, "score"):
        return faults
    for protocol in task.protocols:
        for asked in (questions, questions[: len(questions) // 2 + 1]):
            answers = {each.id: Answer(each.id, each.reference) for each in asked}
            try:
                scored = task.score(answers, protocol)
                json.dumps(dict(scored.scores))
            except (KeyError, TypeError, ZeroDivisionError) as error:
                faults.append(f"{protocol}: {len(asked)} of {len(questions)} answers give no scores: {error!r}")
                continue
            if beyond := [name for name in (*scored.right, *scored.grades) if name not in ids]:
                faults.append(f"{protocol}: a grade for {beyond[0]!r}, which is no question")
    return faults


def check_plugin(name: str, options: Mapping[str, Mapping[str, Any]] | None = None) -> list[str]:
    """Everything that plugin ``name`` registers can be imported; components given ``options`` (by component
    name) are made and checked too.
    """
    failed = {plugin.name: plugin.error for plugin in plugins.installed()}
    if name not in failed:
        return [f"plugin {name!r} is not installed, or LLAVACTL_PLUGINS leaves it out"]
    faults = [failed[name]] if failed[name] else []
    checks: dict[str, Any] = {
        "sources": check_source,
        "vision": check_vision,
        "connectors": check_connector,
        "languages": check_language,
        "tasks": check_task,
    }
    for entry in registry():
        if entry.plugin != name:
            continue
        try:
            if entry.kind == "recipes":
                entry.path()
                continue
            entry.load(), entry.options_model()
        except PluginError as error:
            faults.append(error.message)
            continue
        if options is not None and entry.name in options and entry.kind in checks:
            made = registry().create(entry.kind, {"name": entry.name, **options[entry.name]})
            faults += [f"{entry.kind} {entry.name}: {fault}" for fault in checks[entry.kind](made)]
    return faults
