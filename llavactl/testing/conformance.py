"""Checks that components conform to their Protocols, for tests of plugins.

Each check returns a list of problems, one line each; an empty list means that the component conforms.
"""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import DataError
from llavactl.core.protocols import RecordSource, RepairingSource, ShapedVision
from llavactl.core.schema import Answer, FeatureShape, Sample
from llavactl.core.tokenizer_check import tokenizer_fault

if TYPE_CHECKING:
    from llavactl.core.protocols import Connector, Judged, Language, RawRecord, Source, Task, Vision


def check_source(source: Source, *, at_most: int = 50) -> list[str]:
    """Checks that items are samples with alternating turns and picklable images.

    For a RecordSource, also that its findings agree with its samples and that repaired records are usable. Its samples
    end at the first record that can't be used.
    """
    problems: list[str] = _record_problems(source, at_most) if isinstance(source, RecordSource) else []
    for index, sample in enumerate(_first_samples(source, at_most)):
        if not isinstance(sample, Sample):
            return [f"item {index}: expected a Sample, got {type(sample).__name__}"]
        roles = [turn.role for turn in sample.turns if turn.role != "system"]
        if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
            got = ", ".join(roles) or "none"
            problems.append(f"sample {sample.id!r}: expected turns user, assistant, …, got {got}")
        changed = [image for image in sample.images if pickle.loads(pickle.dumps(image)) != image]  # noqa: S301 - own data
        problems += [f"sample {sample.id!r}: image {image.name!r} differs after pickling" for image in changed]
    return problems


def _first_samples(source: Source, at_most: int) -> Iterator[Any]:
    """At most ``at_most`` samples; those of a RecordSource end at the first record that can't be used."""
    try:
        yield from itertools.islice(source, at_most)
    except DataError:
        if not isinstance(source, RecordSource) or all(_is_usable(source, record) for record in source.records()):
            raise


def _is_usable(source: RecordSource, record: RawRecord) -> bool:
    try:
        source.sample(record)
    except DataError:
        return False
    return True


def _record_problems(source: RecordSource, at_most: int) -> list[str]:
    from llavactl.curation.problems import KINDS

    problems: list[str] = []
    for record in itertools.islice(source.records(), at_most):
        if record.problem:
            continue
        original = copy.deepcopy(record.value)
        findings, images = source.examine(record)
        if unknown := [finding.kind for finding in findings if finding.kind not in KINDS]:
            return [*problems, f"{record.where}: examine() returns the unknown finding {unknown[0]!r}"]
        refused = any(KINDS[finding.kind].effect == "stops" for finding in findings)
        try:
            sample = source.sample(record)
        except DataError as error:
            if not refused:
                problems.append(f"{record.where}: sample() rejects the record, examine() accepts it: {error.message}")
        else:
            if refused:
                problems.append(f"{record.where}: examine() rejects the record, sample() accepts it")
            elif set(sample.images) != set(images):
                problems.append(f"{record.where}: the images of examine() differ from those of sample()")
        if isinstance(source, RepairingSource):
            problems += _repair_problems(source, record)
        if record.value != original:
            problems.append(f"{record.where}: the record was modified in place")
    return problems


def _repair_problems(source: RepairingSource, record: RawRecord) -> list[str]:
    value, changes = source.repair(record)
    if value is None:
        return [] if changes else [f"{record.where}: repair() drops the record without a reason"]
    if not changes and value is not record.value:
        return [f"{record.where}: repair() returns a new value but no changes"]
    try:
        source.sample(replace(record, value=value))
    except DataError as error:
        return [f"{record.where}: sample() rejects the repaired record: {error.message}"]
    return []


def check_vision(vision: Vision) -> list[str]:
    """Checks that the identity is constant JSON and that features are finite.

    Features must also have the declared shape and not depend on the batch.
    """
    import torch
    from PIL import Image

    problems: list[str] = []
    if json.dumps(dict(vision.identity()), sort_keys=True) != json.dumps(dict(vision.identity()), sort_keys=True):
        problems.append("identity() differs between calls")
    encoder = vision.load("cpu", "float32")
    images = [Image.new("RGB", size, color) for size, color in (((40, 30), "red"), ((30, 50), "blue"))]
    pixels = torch.stack([torch.from_numpy(encoder.preprocess(image)) for image in images])
    features = encoder.encode(pixels)
    expected = (2, encoder.shape.patches, encoder.shape.width)
    if tuple(features.shape) != expected:
        problems.append(f"encode() returns shape {tuple(features.shape)}, expected {expected}")
    elif isinstance(vision, ShapedVision) and vision.shape() != encoder.shape:
        problems.append(f"shape() returns {vision.shape()}, load() {encoder.shape}")
    elif not torch.isfinite(features).all():
        problems.append("encode() returns non-finite values")
    elif not torch.allclose(encoder.encode(pixels[1:]), features[1:], rtol=1e-4, atol=1e-4):
        problems.append("the features of an image depend on the other images of the batch")
    return problems


def check_connector(connector: Connector, *, grid: tuple[int, int] = (4, 4), width: int = 16) -> list[str]:
    """Checks the rules of ``Connector``, and that every trainable parameter has a gradient."""
    import torch

    from llavactl.model.connector_check import connector_fault

    shape, language_width = FeatureShape(grid, width), 24
    if problem := connector_fault(connector, shape, language_width, ("bfloat16",)):
        return [problem]
    module = connector.build(shape, language_width)
    module(torch.randn(2, shape.patches, width)).sum().backward()
    trainable = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    return [f"parameter {name} has no gradient" for name, parameter in trainable if parameter.grad is None]


def check_language(language: Language) -> list[str]:
    """Checks for a fast tokenizer with an end-of-sequence token and a model that accepts embeddings."""
    import torch

    problems: list[str] = []
    tokenizer = language.tokenizer()
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        problems.append("tokenizer(): expected a fast tokenizer with an end-of-sequence token")
    model = language.load("float32")
    if fault := tokenizer_fault(tokenizer, len(model.get_input_embeddings().weight)):
        return [*problems, f"tokenizer(): {fault}"]
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    with torch.no_grad():
        by_ids = model(input_ids=ids).logits
        by_embeddings = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    if not torch.allclose(by_ids, by_embeddings, rtol=1e-4, atol=1e-4):
        problems.append("the logits for input_ids and for their inputs_embeds differ")
    return problems


def check_task(task: Task | Judged) -> list[str]:
    """Checks that questions are constant, have unique ids and end with a user turn.

    ``score`` must accept answers to all questions and to the first few.
    """
    questions = list(task.questions())
    ids = [question.id for question in questions]
    problems = [f"duplicate question id {name!r}" for name, count in Counter(ids).items() if count > 1]
    if ids != [question.id for question in task.questions()]:
        problems.append("questions() differs between calls")
    unasked = [question.id for question in questions if question.turns[-1].role != "user"]
    problems += [f"question {name!r} does not end with a user turn" for name in unasked]
    if not task.protocols:
        problems.append("protocols is empty")
    if not hasattr(task, "score"):
        return problems
    for protocol in task.protocols:
        for subset in (questions, questions[: len(questions) // 2 + 1]):
            answers = {question.id: Answer(question.id, question.reference) for question in subset}
            try:
                scored = task.score(answers, protocol)
                json.dumps(dict(scored.scores))
            except (KeyError, TypeError, ZeroDivisionError) as error:
                problems.append(f"{protocol}: score() failed for {len(subset)} of {len(questions)} answers: {error!r}")
                continue
            if unknown := [name for name in (*scored.right, *scored.grades) if name not in ids]:
                problems.append(f"{protocol}: a grade for the unknown question {unknown[0]!r}")
    return problems
