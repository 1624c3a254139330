"""Exports are verified in llama.cpp, by the script that the command runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from llavactl_gguf import language
from llavactl_gguf.format import Gguf
from PIL import Image

from llavactl import registry
from llavactl.testing import run_cli, toy_clip, toy_photos

from .conftest import Toys, siglip

COCO = Path(__file__).parents[3].parent / "shared/data/coco-mini"


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
    assert (verified["prompts"], verified["rounding"]) == (8, "f16-gelu")
    assert (
        verified["known_differences"]
        == json.loads((Path(exported.json()["to"]) / "llavactl_export.json").read_text())["limitations"]
    )
    figures = {name: row["value"] for name, row in verified["compared"].items()}
    assert figures["ids"] == figures["settings"] == 0
    assert figures["embedding_cosine"] > 1 - 2e-6
    assert figures["logits"] < 1e-2


def test_clip(toys: Toys, tmp_path: Path) -> None:
    """Embeddings are compared with the patches that they are."""
    exported = export(toys.model(vision=toy_clip(tmp_path / "clip", size=140)), "-t", "type=f32")
    assert exported.exit_code == 0, exported.stderr
    verified = exported.json()["verified"]
    assert verified["verdict"] == "close"
    assert verified["compared"]["logits"]["at_most"] > 0.01
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
        pytest.param(["type=bf16", "mmproj_type=f32"], "f16-gelu", marks=pytest.mark.slow),
        pytest.param(["type=f32", "mmproj_type=bf16"], "bf16", marks=pytest.mark.slow),
    ],
)
def test_rounded_weights(toys: Toys, options: list[str], rounding: str) -> None:
    """The model's own type doesn't round; GELU does."""
    exported = export(toys.model(precision="bfloat16"), *(word for option in options for word in ("-t", option)))
    assert exported.exit_code == 0, exported.stderr
    assert exported.json()["verified"]["rounding"] == rounding


def photos(*files: Path) -> list[str]:
    return [word for file in files for word in ("--image", str(file))]


def stripes(file: Path, width: int, height: int) -> Path:
    """An image whose left and right half differ."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = pixels[:, width // 2 :: 4, 2] = 255
    Image.fromarray(pixels).save(file)
    return file


@pytest.mark.slow
@pytest.mark.parametrize(("image", "resample"), [("pad", 3), ("square", 3), ("pad", 2), ("square", 2)])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_images_become_squares_as_in_training(
    toys: Toys, tmp_path: Path, vision: str, image: str, resample: int
) -> None:
    """The weights are compared on such squares; what llama.cpp does to other images is a row of its own."""
    make = siglip if vision == "siglip" else toy_clip
    folder = make(tmp_path / "encoder", size=140)
    processor = registry().create("vision", {"name": "clip", "model": str(folder)}).processor
    processor.resample = resample
    processor.save_pretrained(folder)
    model = toys.model(vision=folder, image=image)
    exported = export(model, "-t", "type=f32", "--allow-different", *photos(*toy_photos(tmp_path / "photos", 2)))
    assert exported.exit_code == 0, exported.stderr
    verified = exported.json()["verified"]
    assert verified["compared"]["embedding_cosine"]["value"] > 1 - 2e-6
    assert verified["compared"]["unprepared_cosine"]["value"] < 1 - 1e-5
    assert any("bilinear" in sentence for sentence in verified["known_differences"]) == (resample == 2)


def test_cropped_images_are_different(toys: Toys, tmp_path: Path) -> None:
    model = toys.model(image="square")
    exported = export(model, "-t", "type=f32", *photos(stripes(tmp_path / "wide.png", 300, 60)))
    assert exported.exit_code == 1
    assert "unchanged images" in exported.stderr
    exported = export(model, "-t", "type=f32", *photos(stripes(tmp_path / "square.png", 56, 56)))
    assert exported.exit_code == 0, exported.stderr
    row = exported.json()["verified"]["compared"]["unprepared_cosine"]
    assert row["value"] > 1 - 1e-5
    assert row["passed"]


@pytest.mark.slow
@pytest.mark.skipif(not COCO.is_dir(), reason=f"{COCO} is missing")
@pytest.mark.parametrize(("image", "verdict"), [("pad", "close"), ("square", "different")])
def test_photos_as_llama_cpp_processes_them(toys: Toys, tmp_path: Path, image: str, verdict: str) -> None:
    """Embeddings are nearly those of the patches, as those of a pretrained encoder are; see docs/notes/export.md."""
    model = toys.model(vision=siglip(tmp_path / "encoder", size=224, num_hidden_layers=1), layer=1, image=image)
    files = [file for file in sorted(COCO.glob("*2017/*.jpg")) if len({*Image.open(file).size}) == 2][:3]
    exported = export(model, "-t", "type=f32", "--allow-different", *photos(*files))
    verified = exported.json()["verified"]
    assert verified["verdict"] == verdict, verified
    assert verified["compared"]["embedding_cosine"]["passed"]


@pytest.mark.parametrize("file", ["model-f32.gguf", "mmproj-f32.gguf"])
def test_one_damaged_tensor_is_found(toys: Toys, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    written = Gguf.write

    def damaged(self: Gguf, model: Path, to: Path) -> None:
        written(self, model, to)
        reader = GGUFReader(to / file, "r+")
        matrices = [tensor for tensor in reader.tensors if "ffn_up.weight" in tensor.name]
        matrices[0].data[:] = matrices[0].data[::-1].copy()
        reader.data.flush()

    monkeypatch.setattr(Gguf, "write", damaged)
    exported = export(toys.model(), "-t", "type=f32", "--allow-different")
    verified = exported.json()["verified"]
    assert verified["verdict"] == "different"
    row = "logits" if file.startswith("model") else "embedding_cosine"
    assert not verified["compared"][row]["passed"]


def test_builds_that_an_export_was_not_made_for_do_not_verify_it(toys: Toys) -> None:
    model = toys.model(vision="clip")
    exported = export(model, "-t", "type=f32", "-t", "for_build=cls-first")
    assert exported.exit_code == 0, exported.stderr
    assert exported.json()["verified"] is None
    assert "cls-first" in exported.json()["not_verified"]
    assert "llama.cpp b" in exported.json()["not_verified"]
    assert export(model, "-t", "type=f32", "-t", "for_build=cls-first", "--verify").exit_code == 1


def test_a_fault_is_found(toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "_interleaved", lambda weight, heads: weight)
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


@pytest.mark.parametrize("package", ["llama-cpp-py-sync", "xllamacpp"])
def test_other_versions_of_the_packages_are_not_mixed(toys: Toys, tmp_path: Path, package: str) -> None:
    """Where the library in llama-cpp-py-sync can't be loaded, its declarations are used with that in xllamacpp."""
    code = (
        "import importlib.metadata as metadata, runpy, sys\n"
        "from llama_cpp_py_sync import _cffi_bindings as bindings\n"
        "def unloadable(): raise RuntimeError\n"
        "bindings.get_lib = unloadable\n"
        "real = metadata.version\n"
        f"metadata.version = lambda name: real(name) + ('1' if name == '{package}' else '')\n"
        "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    (prompts := tmp_path / "prompts.json").write_text(json.dumps({"prompts": [], "max_new_tokens": 1}))
    files = (Gguf.reload, toys.export(toys.model()), prompts, tmp_path / "out")
    for used, status in ((code, 69), (code.replace("'1'", "''"), 0)):
        command = [sys.executable, "-c", used, *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
    assert (tmp_path / "out").is_file()


def test_a_damaged_file_is_an_error(toys: Toys, tmp_path: Path) -> None:
    (prompts := tmp_path / "prompts.json").write_text(json.dumps({"prompts": [], "max_new_tokens": 1}))
    to = toys.export(toys.model())
    file = to / "model-f32.gguf"
    file.write_bytes(file.read_bytes()[:2000])
    done = run_script(to, prompts)
    assert done.returncode not in (0, 69)
    assert "model-f32.gguf" in done.stderr.splitlines()[-1]
