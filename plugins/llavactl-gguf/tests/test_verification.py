"""Exports are verified in llama.cpp, by the script that the command runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from llavactl_gguf import language
from llavactl_gguf.format import Gguf

from llavactl.testing import run_cli, toy_clip, toy_photos

from .conftest import Toys, siglip


def export(model: Path, *more: str) -> Any:
    to = model.with_name(f"{model.name}-verified")
    return run_cli("export", "--model", str(model), "--format", "gguf", "--to", str(to), "--json", *more)


def test_siglip(toys: Toys) -> None:
    """Several images, turns, a system turn, no image."""
    exported = export(toys.model(), "-t", "type=f32")
    assert exported.exit_code == 0, exported.stderr
    verified = exported.json()["verified"]
    assert verified["verdict"] == "close"
    assert verified["program"].startswith("llama.cpp b")
    assert (verified["prompts"], verified["rounding"], verified["known_differences"]) == (8, "f16", [])
    figures = {name: row["value"] for name, row in verified["compared"].items()}
    assert figures["ids"] == figures["settings"] == 0
    assert figures["embedding_cosine"] > 1 - 2e-6
    assert figures["logits"] < 1e-2


def test_clip(toys: Toys, tmp_path: Path) -> None:
    """Embeddings are compared with the patches that they are."""
    exported = export(toys.model(vision=toy_clip(tmp_path / "clip", size=140)), "-t", "type=f32")
    assert exported.exit_code == 0, exported.stderr
    verified = exported.json()["verified"]
    assert (verified["verdict"], len(verified["known_differences"])) == ("close", 1)
    assert verified["compared"]["embedding_cosine"]["value"] > 1 - 2e-6


def test_positions_of_another_build_are_found(toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each patch then has the position of its neighbor; the stated class token must not excuse that."""
    monkeypatch.setattr(torch.Tensor, "roll", lambda tensor, *_, **__: tensor)
    exported = export(toys.model(vision=toy_clip(tmp_path / "clip", size=28)), "-t", "type=f32")
    assert exported.exit_code == 1
    assert "image embeddings" in exported.stderr


@pytest.mark.parametrize(
    ("options", "rounding"),
    [
        (["type=q8_0"], "q8_0"),
        pytest.param(["type=bf16", "mmproj_type=f32"], "f16", marks=pytest.mark.slow),
        pytest.param(["type=f32", "mmproj_type=bf16"], "bf16", marks=pytest.mark.slow),
    ],
)
def test_rounded_weights(toys: Toys, options: list[str], rounding: str) -> None:
    """The model's own type doesn't round; GELU does."""
    exported = export(toys.model(precision="bfloat16"), *(word for option in options for word in ("-t", option)))
    assert exported.exit_code == 0, exported.stderr
    assert exported.json()["verified"]["rounding"] == rounding


@pytest.mark.slow
@pytest.mark.parametrize("image", ["pad", "square"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_images_become_squares_as_in_training(toys: Toys, tmp_path: Path, vision: str, image: str) -> None:
    make = siglip if vision == "siglip" else toy_clip
    model = toys.model(vision=make(tmp_path / "encoder", size=140), image=image)
    photos = [word for photo in toy_photos(tmp_path / "photos", 2) for word in ("--image", str(photo))]
    exported = export(model, "-t", "type=f32", *photos)
    assert exported.exit_code == 0, exported.stderr
    assert exported.json()["verified"]["compared"]["embedding_cosine"]["value"] > 1 - 2e-6


def test_a_fault_is_found(toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "_interleaved", lambda weight, _: weight)
    exported = export(toys.model())
    assert exported.exit_code == 1
    assert "logits" in exported.stderr


def run_script(export: Path, prompts: Path, *missing: str) -> subprocess.CompletedProcess[str]:
    """The script without the packages ``missing``."""
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({[*missing, 'llavactl']}))\n"
        "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(Gguf.reload), str(export), str(prompts), str(prompts.with_name("out"))]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_llama_cpp_the_script_states_what_to_install(toys: Toys, tmp_path: Path) -> None:
    (prompts := tmp_path / "prompts.json").write_text(json.dumps({"prompts": [], "max_new_tokens": 1}))
    to = toys.export(toys.model())
    assert run_script(to, prompts).returncode == 0
    done = run_script(to, prompts, "llama_cpp_py_sync")
    assert done.returncode == 69
    assert "llavactl-gguf[verify]" in done.stderr.splitlines()[-1]
    done = run_script(to, prompts, "xllamacpp")
    assert done.returncode in (0, 69)  # whether the library in llama-cpp-py-sync can be loaded depends on glibc
    assert not done.returncode or "llavactl-gguf[verify]" in done.stderr.splitlines()[-1]


def test_a_damaged_file_is_an_error(toys: Toys, tmp_path: Path) -> None:
    (prompts := tmp_path / "prompts.json").write_text(json.dumps({"prompts": [], "max_new_tokens": 1}))
    to = toys.export(toys.model())
    file = to / "model-f32.gguf"
    file.write_bytes(file.read_bytes()[:2000])
    done = run_script(to, prompts)
    assert done.returncode not in (0, 69)
    assert "model-f32.gguf" in done.stderr.splitlines()[-1]
