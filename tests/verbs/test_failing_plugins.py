"""Failing sources and vision backbones of plugins: extract and train skip the same images, for any exception."""

from __future__ import annotations

import itertools
import json
import os
from asyncio import CancelledError
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llavactl.core.errors import PluginError
from llavactl.core.registry import Options, Registration, registry
from llavactl.core.schema import FeatureShape, Sample, Turn
from llavactl.features import ContentKeys
from llavactl.features.checked_encoder import CheckedPreprocess, load_encoder
from llavactl.features.prepare import Failure, prepare
from llavactl.testing import run_cli

HERE = __name__
RAISED = [
    KeyError("k"),
    RuntimeError("two\nlines"),
    MemoryError(),
    StopIteration(),
    SystemExit(3),
    RecursionError("deep"),
]
RAISED += [ValueError("half \udcff"), AssertionError(), EOFError(), ExceptionGroup("some", [ValueError("a")])]
RAISED += [
    GeneratorExit(),
    CancelledError(),
    ImportError("no library"),
    OSError("io"),
    UnicodeDecodeError("utf8", b"x", 0, 1, "bad"),
]
BAD = 4
"""Every fourth of twelve images fails, starting with the first."""


class Fault(Options):
    """``at``: where the component fails; ``number``: the index of the exception in RAISED or value in INVALID."""

    at: str = ""
    number: int = 0

    def raise_at(self, where: str) -> None:
        if self.at == where:
            raise RAISED[self.number].with_traceback(None)  # without the frames of earlier tests


CALLS = itertools.count()
INVALID: list[Any] = [None, "text", 5]
PIXELS = [None, "text", np.zeros((3, 2, 4)), np.zeros((1, 3, 4, 4)), np.array([None, 1])]
"""Returned instead of pixels [3, 4, 4]."""


@dataclass(frozen=True)
class FailingImage:
    """An image file that may fail to be read."""

    path: str
    fault: Fault

    @property
    def name(self) -> str:
        return Path(self.path).name

    def read(self) -> Any:
        self.fault.raise_at("read")
        data = Path(self.path).read_bytes()
        kinds = {
            "invalid": INVALID[self.fault.number % len(INVALID)],
            "array": bytearray(data),
            "view": memoryview(data),
        }
        return kinds.get(self.fault.at, data)

    def stamp(self) -> str:
        self.fault.raise_at("stamp")
        return f"{self.path} {os.stat(self.path).st_mtime_ns}"  # noqa: PTH116


class Source:
    def __init__(self, options: Fault) -> None:
        self.fault = options

    def __iter__(self) -> Iterator[Any]:
        for index in range(12):
            if index == BAD and self.fault.at == "sample":
                yield INVALID[self.fault.number]
            if index == BAD:
                self.fault.raise_at("iteration")
            path = f"{os.environ['PHOTOS']}/photo-{index:03d}.jpg"
            image = FailingImage(path, self.fault if index % BAD == 0 else Fault())
            turns = Turn("user", (image, "\nWhat?")), Turn("assistant", ("It is red.",))
            yield Sample(str(index), turns)


class Encoder:
    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.shape: Any = None if fault.at == "shape" else FeatureShape((2, 2), 12)

    def preprocess(self, image: Any) -> Any:
        pixels = np.asarray(image.resize((4, 4)), np.float32).transpose(2, 0, 1) / 255
        if not pixels.any():
            self.fault.raise_at("blank")
        if pixels[0].mean() > 0.7:  # red and yellow
            self.fault.raise_at("preprocess")
            if self.fault.at == "pixels":
                return PIXELS[self.fault.number]
        return pixels

    def encode(self, pixels: torch.Tensor) -> Any:
        self.fault.raise_at("encode")
        features = pixels.reshape(len(pixels), 3, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(len(pixels), 4, 12)
        others = [features - features.mean(0), features * (-1) ** next(CALLS)]
        invalid = [features.numpy(), (features,), features[:, None], features[..., 1:], features.to("meta"), *others]
        return invalid[self.fault.number] if self.fault.at == "features" else features


class Vision:
    count = 0

    def __init__(self, options: Fault) -> None:
        self.fault = options

    def identity(self) -> Any:
        Vision.count += 1
        invalid = [{"path": Path("/")}, {"number": float("nan")}, None, {"count": Vision.count}, [1]]
        return invalid[self.fault.number] if self.fault.at == "identity" else {}

    def load(self, device: str, dtype: str) -> Any:
        return Encoder(self.fault)


class Measured(Vision):
    def shape(self) -> Any:
        return FeatureShape((3, 3), 12)


@pytest.fixture(autouse=True)
def registered(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHOTOS", str(toy / "images"))
    monkeypatch.setattr(registry(), "used", set())  # as in a new process
    for kind, name in (("sources", "Source"), ("vision", "Vision"), ("vision", "Measured")):
        entry = Registration(kind, name.lower(), f"{HERE}:{name}", f"{HERE}:Fault", "", "otherplugin")
        monkeypatch.setitem(registry().entries[kind], name.lower(), entry)


def run(toy: Path, verb: str, *options: str, source: str = "", number: int = 0, vision: str = "") -> Any:
    """Runs ``verb`` with a source and a backbone that fail at ``source`` and ``vision``."""
    kind, _, fault = vision.rpartition("/")
    settings = [
        f"data.stage1=[{{name: source, at: {source!r}, number: {number}}}]",
        "data.stage2=[]",
        f"vision={{name: {kind or 'vision'}, at: {fault!r}, number: {number}}}",
        "stage1.max_steps=1",
    ]
    overrides = [word for each in settings for word in ("-o", each)]
    return run_cli(*verb.split(), "-r", str(toy / "recipe.yaml"), *overrides, *options)


def listed_images(toy: Path, file: str) -> set[str]:
    lines = [json.loads(line) for line in (toy / "runs/toy" / file).read_text().splitlines()]
    return {f"photo-{int(line['id']):03d}.jpg" if "id" in line else line["image"] for line in lines}


def check_agreement(toy: Path, bad: int, **fault: Any) -> None:
    """``bad`` images are skipped by extract and train, cached and live, and counted by --max-skipped."""
    done = run(toy, "extract", **fault)
    assert done.exit_code == 0, done.stderr
    skipped = listed_images(toy, "skipped.jsonl")
    assert len(skipped) == bad
    assert run(toy, "extract", **fault).exit_code == 0
    for mode in ("cached", "live"):
        for max_skipped, code in ((bad, 0), (bad - 1, 1)):
            if max_skipped >= 0:
                options = ("-o", f"features.mode={mode}", "--max-skipped", str(max_skipped))
                done = run(toy, "train --stage 1 --resume never", *options, **fault)
                assert done.exit_code == code, done.stderr
        assert listed_images(toy, "stage1/left_out.jsonl") == skipped


def name_of(number: int) -> str:
    return type(RAISED[number]).__name__


@pytest.mark.parametrize("number", range(len(RAISED)), ids=name_of)
def test_any_exception_becomes_a_reason(toy: Path, number: int) -> None:
    path = str(toy / "images/photo-000.jpg")
    for at in ("read", "stamp"):
        image = FailingImage(path, Fault(at=at, number=number))
        assert isinstance(ContentKeys().keys_of([image])[0], OSError)
    assert isinstance(prepare(Encoder(Fault()), FailingImage(path, Fault(at="read", number=number))), Failure)
    failed = prepare(Encoder(Fault(at="preprocess", number=number)), FailingImage(path, Fault()))
    assert isinstance(failed, Failure)
    assert failed.permanent
    assert failed.reason.encode().decode().isprintable()


@pytest.mark.parametrize(
    "number", [2, *(pytest.param(number, marks=pytest.mark.slow) for number in (4, 6))], ids=name_of
)
@pytest.mark.parametrize(("source", "vision"), [("read", ""), ("stamp", ""), ("", "preprocess")])
def test_failing_images_are_skipped_by_every_command(toy: Path, source: str, vision: str, number: int) -> None:
    check_agreement(toy, 3 if source else 6, source=source, vision=vision, number=number)


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_images_that_are_not_bytes_are_skipped(toy: Path, number: int) -> None:
    check_agreement(toy, 3, source="invalid", number=number)


@pytest.mark.parametrize("number", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 3))])
def test_invalid_pixels_are_skipped(toy: Path, number: int) -> None:
    check_agreement(toy, 6, vision="pixels", number=number)


@pytest.mark.parametrize("number", [0, 4], ids=name_of)
def test_a_backbone_that_fails_for_a_blank_image_is_tested_with_others(number: int) -> None:
    vision: Any = Vision(Fault(at="blank", number=number))
    pixels = load_encoder(vision, "cpu", "float32").preprocess(Image.new("RGB", (9, 9), "blue"))
    assert pixels.shape == (3, 4, 4)


def test_pixels_have_three_channels_first() -> None:
    with pytest.raises(ValueError, match=r"\[3, H, W\]"):
        CheckedPreprocess(lambda image: np.zeros((4, 4, 3)), (4, 4, 3))(Image.new("RGB", (9, 9)))


@pytest.mark.parametrize("kind", ["array", "view"])
def test_bytes_like_objects_are_accepted(toy: Path, kind: str) -> None:
    check_agreement(toy, 0, source=kind)


@pytest.mark.parametrize("number", range(len(RAISED)), ids=name_of)
def test_data_check_lists_failing_images(toy: Path, number: int) -> None:
    report = run(toy, "data check", "--json", source="read", number=number).json()
    assert [(each["problem"], each["count"]) for each in report["problems"]] == [("image-missing", 3)]


@pytest.mark.parametrize(
    ("vision", "number"), [*(("features", n) for n in range(7)), *(("identity", n) for n in range(5))]
)
def test_invalid_results_are_refused_with_the_plugins_name(toy: Path, vision: str, number: int) -> None:
    done = run(toy, "extract", vision=vision, number=number)
    assert done.exit_code == 1
    assert "otherplugin" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("vision", ["shape", "measured/"])
def test_invalid_shapes_are_refused_with_the_plugins_name(toy: Path, vision: str) -> None:
    done = run(toy, "extract", vision=vision)
    assert done.exit_code == 1
    assert "otherplugin" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("missing", ["preprocess", "encode"])
def test_an_encoder_without_a_method_is_refused(missing: str) -> None:
    encoder = Encoder(Fault())
    setattr(encoder, missing, None)
    vision: Any = SimpleNamespace(load=lambda device, dtype: encoder)
    with pytest.raises(PluginError, match=missing):
        load_encoder(vision, "cpu", "float32")


@pytest.mark.parametrize("number", range(len(INVALID)))
def test_non_samples_are_refused_with_the_plugins_name(toy: Path, number: int) -> None:
    done = run(toy, "extract", source="sample", number=number)
    assert done.exit_code == 1
    assert "otherplugin" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("at", [{"source": "iteration"}, {"vision": "encode"}])
@pytest.mark.parametrize("number", [0, 3, 4], ids=name_of)
def test_other_errors_are_reported_with_their_line(toy: Path, at: dict[str, str], number: int) -> None:
    done = run(toy, "extract", number=number, **at)  # type: ignore[arg-type]
    assert done.exit_code == 1
    error, _hint = done.stderr.splitlines()[-2:]
    kind = "source source" if "source" in at else "vision backbone vision"
    assert error.startswith(f"error: {kind} of plugin otherplugin: raise_at (")
    assert f"{Path(__file__).name}:" in error
    assert "Traceback" not in done.stderr
