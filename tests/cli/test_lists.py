"""The commands ``recipes``, ``components``, ``plugins`` and ``doctor``."""

from __future__ import annotations

import json
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from llavactl.cli import terminal
from llavactl.core.devices import available_devices
from llavactl.core.protocols import KINDS
from llavactl.core.registry import Registration, registry
from llavactl.recipe.frame import Recipe
from llavactl.recipe.load import load_recipe
from llavactl.testing import run_cli
from llavactl.training.prediction.published import fastest_fit
from llavactl.training.prediction.target import Target
from llavactl.verbs import doctor

GPU = ("float32", "float16", "bfloat16")
SMALL = """\
name: small
vision: {name: clip, model: a/b}
connector: {name: linear}
language: {name: hf, model: c/d}
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


class TestRecipes:
    def test_list(self) -> None:
        assert "llava-v1-7b" in run_cli("recipes", "list").stdout
        listed = run_cli("recipes", "list", "--json").json()
        assert [each["name"] for each in listed] == registry().names("recipes")
        assert all(each["summary"] and each["plugin"] for each in listed)

    @pytest.mark.parametrize("how", [["llava-v1-7b"], ["-r", "llava-v1-7b"]])
    def test_show_prints_the_file(self, how: list[str]) -> None:
        shown = run_cli("recipes", "show", *how).stdout
        assert shown == registry().get("recipes", "llava-v1-7b").path().read_text()

    def test_show_resolved_loads_to_the_same(self, here: Path) -> None:
        shown = run_cli("recipes", "show", "llava-v1-7b", "-o", "seed=3", cwd=here).stdout
        (here / "recipe.yaml").write_text(shown)
        assert load_recipe(here / "recipe.yaml").seed == 3
        assert run_cli("recipes", "show", "--resolved", cwd=here).stdout == shown

    def test_show_json(self, here: Path) -> None:
        (here / "recipe.yaml").write_text(SMALL)
        assert run_cli("recipes", "show", "--json", cwd=here).json()["vision"]["layer"] == -2

    def test_show_of_a_binary_file(self, here: Path) -> None:
        (here / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
        result = run_cli("recipes", "show", cwd=here)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("error: recipe.yaml: ")
        assert "UTF-8" in result.stderr

    def test_copy_then_check(self, here: Path) -> None:
        result = run_cli("recipes", "copy", "llava-v1.5-7b-lora", cwd=here)
        assert (result.exit_code, result.stdout) == (0, "recipe.yaml\n")
        assert run_cli("recipes", "check", cwd=here).stdout == "recipe.yaml: ok\n"
        again = run_cli("recipes", "copy", "llava-v1-7b", cwd=here)
        assert (again.exit_code, again.stdout) == (1, "")
        assert again.stderr.startswith("error: recipe.yaml")
        assert "--force" in again.stderr
        assert run_cli("recipes", "copy", "llava-v1-7b", "--force", cwd=here).exit_code == 0
        assert run_cli("recipes", "copy", "llava-v1-7b", "other.yaml", cwd=here).stdout == "other.yaml\n"

    def test_check_prints_every_problem_and_exits_1(self, here: Path) -> None:
        (here / "recipe.yaml").write_text(SMALL + "seed: x\nstage1: {epoch: 1}\n")
        result = run_cli("recipes", "check", "-o", "foo=1", cwd=here)
        assert result.exit_code == 1
        seed, epoch, foo = result.stdout.splitlines()
        assert seed.startswith("recipe.yaml:5: seed: ")
        assert epoch.startswith("recipe.yaml:6: stage1.epoch: ")
        assert "'epochs'" in epoch
        assert foo.startswith("-o foo=1: foo: ")
        assert ", ".join(sorted(Recipe.model_fields)) in foo

    def test_check_json(self, here: Path) -> None:
        (here / "recipe.yaml").write_text(SMALL + "seed: x\n")
        result = run_cli("recipes", "check", "--json", cwd=here)
        assert result.exit_code == 1
        report = result.json()
        (problem,) = report["problems"]
        assert report["ok"] is False
        assert set(problem) == {"where", "key", "why"}
        assert (problem["where"], problem["key"]) == ("recipe.yaml:5", "seed")
        assert run_cli("recipes", "check", "--json", "-o", "seed=1", cwd=here).json() == {"ok": True, "problems": []}

    def test_check_without_any_recipe(self, here: Path) -> None:
        result = run_cli("recipes", "check", cwd=here)
        assert result.exit_code == 1
        assert "recipe.yaml" in result.stdout

    def test_a_recipe_is_an_argument_or_an_option(self, here: Path) -> None:
        assert run_cli("recipes", "check", "llava-v1-7b", "-r", "llava-v1-7b", cwd=here).exit_code == 2

    def test_schema(self) -> None:
        assert run_cli("recipes", "schema").json()["title"] == "Recipe"


class TestComponents:
    def test_all(self) -> None:
        listed = run_cli("components", "--json").json()
        assert {each["kind"] for each in listed} <= set(KINDS)
        clip = next(each for each in listed if each["name"] == "clip")
        assert clip == {"kind": "vision", "name": "clip", "plugin": "llavactl", "summary": clip["summary"]}
        assert "clip" in run_cli("components").stdout

    @pytest.mark.parametrize("kind", KINDS)
    def test_each_kind_with_its_options(self, kind: str) -> None:
        listed = run_cli("components", kind, "--json").json()
        assert [each["name"] for each in listed] == registry().names(kind)
        text = run_cli("components", kind)
        assert text.exit_code == 0
        assert all(each["name"] in text.stdout for each in listed)

    def test_descriptions_of_options(self) -> None:
        (clip,) = [each for each in run_cli("components", "vision", "--json").json() if each["name"] == "clip"]
        assert clip["options"]["model"].startswith("a string; required")
        assert clip["options"]["image"].startswith("one of 'square', 'pad'; default \"pad\"")
        lines = [" ".join(line.split()) for line in run_cli("components", "connectors").stdout.splitlines()]
        assert any(line.startswith("pixel_shuffle an integer ≥ 1; default 1") for line in lines)

    def test_a_broken_component_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        entry = Registration("connectors", "broken", "x:y", "no.such:Options", "", "stranger")
        monkeypatch.setitem(registry().entries["connectors"], "broken", entry)
        result = run_cli("components", "connectors")
        assert result.exit_code == 0
        assert "linear" in result.stdout
        assert len(result.stderr.splitlines()) == 1
        assert "stranger" in result.stderr

    def test_an_unknown_kind_is_a_usage_error(self) -> None:
        assert run_cli("components", "connector").exit_code == 2


def test_plugins_list() -> None:
    first = run_cli("plugins", "list", "--json").json()[0]
    assert (first["name"], first["module"], first["error"]) == ("llavactl", "llavactl.core.builtin_plugin", "")
    assert run_cli("plugins", "list").stdout.startswith("llavactl ")


class TestDoctor:
    def test_json(self, home: Path) -> None:
        report = run_cli("doctor", "--json").json()
        assert set(report["packages"]) >= {"torch", "transformers", "click", "pydantic"}
        assert report["devices"][0]["name"].startswith("cpu")
        assert "float32" in report["devices"][0]["dtypes"]
        assert report["disks"][0]["folder"] == str(home / "cache")
        assert report["disks"][0]["free_gb"] > 0
        assert {"what", "works", "why"} == set(report["findings"][0])

    def test_text(self) -> None:
        result = run_cli("doctor")
        assert result.exit_code == 0
        assert result.stdout.startswith("llavactl ")
        assert not any(line.startswith(("yes ", "NO ")) for line in result.stdout.splitlines())
        everything = run_cli("doctor", "--all").stdout
        assert any(line.startswith(("yes ", "NO ")) for line in everything.splitlines())
        assert any(line.startswith("pydantic ") for line in everything.splitlines())

    @pytest.mark.parametrize(
        ("devices", "fitting"),
        [
            ([("cpu EPYC, 2 threads", 8, ("float32",))], {"SmolLM2 135M": set()}),
            (
                [("cpu EPYC, 2 threads", 64, ("float32",)), ("cuda:0 NVIDIA GeForce RTX 4090", 25.3, GPU)],
                {
                    "SmolLM2 135M": {"connector", "full", "lora", "qlora"},
                    "Vicuna 7B": {"connector", "lora", "qlora"},
                },
            ),
            (
                [("cpu EPYC, 2 threads", 64, ()), *((f"cuda:{n} NVIDIA H200", 150.0, GPU) for n in range(8))],
                {name: {"connector", "full", "lora", "qlora"} for name in ("Vicuna 7B", "Vicuna 13B")},
            ),
            ([("cpu x", 64, ()), *((f"cuda:{n} model {n}", 48.0, GPU) for n in range(6))], {"Vicuna 7B": {"full"}}),
        ],
        ids=["CPU", "1 GPU", "8 GPUs", "6 different GPUs"],
    )
    def test_one_screen_says_what_can_be_trained(
        self, monkeypatch: pytest.MonkeyPatch, devices: list[Any], fitting: dict[str, set[str]]
    ) -> None:
        monkeypatch.setattr(doctor, "_available_devices", lambda: (tuple(doctor.Device(*each) for each in devices), []))
        monkeypatch.setattr(doctor, "find_spec", lambda name: None)  # every optional package is missing
        monkeypatch.setattr(terminal, "console", lambda stream: Console(file=stream, width=80, color_system=None))
        lines = run_cli("doctor").stdout.splitlines()
        assert sum(1 + len(line) // 80 for line in lines) <= 24, lines
        assert all(len(line) < 80 or "`" in line for line in lines), lines  # the terminal wraps commands
        training = run_cli("doctor", "--json").json()["training"]
        for model, methods in fitting.items():
            assert methods <= {each["method"] for each in training if each["model"] == model and each["fits"]}
        usable = min(each[1] for each in devices if each[0].startswith("cuda") or len(devices) == 1) * 1e9
        assert all(each["peak_bytes"] < usable for each in training if each["fits"])
        assert all(
            each["peak_bytes"] is None or each["peak_bytes"] > 0.9 * usable for each in training if not each["fits"]
        )

    @pytest.mark.parametrize(("count", "shown"), [(1, ", 1 thread"), (2, ", 2 threads")])
    def test_threads_are_counted(self, monkeypatch: pytest.MonkeyPatch, count: int, shown: str) -> None:
        monkeypatch.setattr("torch.get_num_threads", lambda: count)
        assert available_devices()[0].name.endswith(shown)

    def test_a_7b_model_is_not_trained_completely_on_24_gb(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = doctor.Device("cuda:0 RTX 4090", 25.3, GPU)
        monkeypatch.setattr(doctor, "_available_devices", lambda: ((doctor.Device("cpu", 64, ()), device), []))
        fits = {(each.model, each.method): each.fits for each in doctor.doctor().training}
        assert not fits["Vicuna 7B", "full"]
        assert not fits["Vicuna 13B", "lora"]

    @pytest.mark.parametrize("count", [1, 8])
    def test_it_plans_for_one_gpu_as_training_does_and_for_all(
        self, monkeypatch: pytest.MonkeyPatch, count: int
    ) -> None:
        gpus = tuple(doctor.Device(f"cuda:{n} H200", 150.0, GPU) for n in range(count))
        monkeypatch.setattr(doctor, "_available_devices", lambda: ((doctor.Device("cpu", 64, ()), *gpus), []))
        training = doctor.doctor().training
        assert {each.devices for each in training} == {1, count}
        for each in training:
            predicted = fastest_fit(each.model, each.method, Target(True, 150 * 10**9, each.devices))
            assert predicted is not None
            assert (each.peak_bytes, each.assumes) == (predicted.bytes, predicted.assumes._asdict())
        text = run_cli("doctor").stdout
        assert ("full on 8" in text) == (count == 8)
        assert "2,048 tokens" in text, "the lengths that the peaks are predicted for"

    def test_a_device_that_is_too_small_for_7b_is_no_problem_wherever_it_is_listed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        devices = (doctor.Device("cpu", 64, ("float32",)), doctor.Device("cuda:0 T4", 15.0, GPU[:2]))
        monkeypatch.setattr(doctor, "_available_devices", lambda: (devices, []))
        monkeypatch.setattr(doctor, "_precision", lambda devices: iter(()))
        report = doctor.doctor()
        assert not {each.what: each for each in report.findings}["a 7B language model"].works
        assert not any("7B" in each.what for each in report.problems)

    def test_problems_are_those_that_need_attention(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        report = doctor.doctor()
        assert "downloads from the model hub" in {each.what for each in report.problems}
        assert not any("7B" in each.what for each in report.problems), "the table says what can be trained"
        assert any(line.startswith("PROBLEM") for line in run_cli("doctor").stdout.splitlines())

    def test_missing_packages_can_be_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "matplotlib" else name)
        (missing,) = (each for each in doctor.doctor().features if not each.installed)
        assert missing.install == "pip install 'llavactl[plots]'"

    def findings(self) -> dict[str, doctor.Diagnosis]:
        return {finding.what: finding for finding in doctor.doctor().findings}

    def test_it_writes_nothing(self, home: Path) -> None:
        doctor.doctor()
        assert not (home / "cache" / "features").exists()

    def test_a_full_disk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(10, 9, 1_000_000_000))
        found = self.findings()["feature stores"]
        assert not found.works
        assert "1 GB free" in found.why

    def test_a_folder_that_is_not_writable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
        found = self.findings()["run folders"]
        assert not found.works
        assert str(Path.cwd()) in found.why

    def test_an_old_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = doctor.metadata.version
        monkeypatch.setattr(doctor.metadata, "version", lambda name: "4.0" if name == "transformers" else real(name))
        found = self.findings()["package transformers"]
        assert not found.works
        assert "4.0" in found.why

    def test_a_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = doctor.metadata.version

        def version(name: str) -> str:
            if name == "peft":
                raise doctor.metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(doctor.metadata, "version", version)
        assert "pip install" in self.findings()["package peft"].why

    def test_offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.findings()["downloads from the model hub"].works
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        found = self.findings()["downloads from the model hub"]
        assert not found.works
        assert "HF_HUB_OFFLINE" in found.why
        monkeypatch.setenv("HF_HUB_OFFLINE", "no")
        assert self.findings()["downloads from the model hub"].works

    @pytest.mark.parametrize(
        ("devices", "bfloat16", "large"),
        [
            ([("cpu x", 25, ("float32", "bfloat16"))], True, False),
            ([("cpu x", 500, ("float32",))], False, False),
            ([("cpu x", 64, ("float32",)), ("cuda:0 T4", 15, ("float32", "float16"))], False, False),
            ([("cpu x", 64, ("float32",)), ("cuda:0 A100", 80, ("float32", "bfloat16"))], True, True),
        ],
    )
    def test_devices(self, monkeypatch: pytest.MonkeyPatch, devices: list[Any], bfloat16: bool, large: bool) -> None:
        monkeypatch.setattr(doctor, "_available_devices", lambda: (tuple(doctor.Device(*each) for each in devices), []))
        found = self.findings()
        assert next(found[what] for what in found if what.startswith("bfloat16")).works == bfloat16
        assert found["a 7B language model"].works == large

    def test_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        about = [
            SimpleNamespace(name="H200", major=9, total_memory=150e9),
            SimpleNamespace(name="T4", major=7, total_memory=15e9),
        ]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", about.__getitem__)
        _, first, second = doctor.doctor().devices
        assert first == doctor.Device("cuda:0 H200", 150.0, ("float32", "float16", "bfloat16"))
        assert second == doctor.Device("cuda:1 T4", 15.0, ("float32", "float16"))

    def test_torch_that_can_not_be_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        found = self.findings()["torch"]
        assert not found.works
        assert "torch" in found.why


def test_every_json_output_is_one_document() -> None:
    for command in (["recipes", "list"], ["recipes", "schema"], ["components"], ["plugins", "list"], ["doctor"]):
        result = run_cli(*command, *(["--json"] if command != ["recipes", "schema"] else []))
        json.loads(result.stdout)
