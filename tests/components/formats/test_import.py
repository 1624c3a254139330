"""Checkpoints of other programs are read with the same outputs; incomplete ones are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llavactl.chat.loading import load_assistant
from llavactl.core.errors import ModelError
from llavactl.core.model_description import read_description
from llavactl.core.schema import IMAGE_TOKEN, Turn
from llavactl.data.batches import collate
from llavactl.images.image_file import ImageFile
from llavactl.model import folder as model_folder
from llavactl.model.imported import resolve
from llavactl.testing import run_cli

from .conftest import Make, original


def transformers_outputs(model: Any, folder: Path, image: Path, question: str) -> tuple[Any, list[int]]:
    """Logits [T, V] and ids of transformers."""
    import torch
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.open(image).convert("RGB")], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0], inputs["input_ids"][0].tolist()


def llavactl_outputs(folder: Path, image: Path, question: str) -> tuple[Any, list[int]]:
    import torch

    assistant = load_assistant(resolve(folder), "cpu")
    encoded = assistant.encode((Turn("user", (ImageFile(str(image.parent), image.name), "\n", question)),))
    with torch.no_grad():
        return assistant.model.logits(collate([encoded], assistant.features))[0], list(encoded.ids)


@pytest.mark.parametrize("layout", ["before 4.52", "since 4.52", "sharded"])
def test_hf_logits_and_ids_equal_those_of_transformers(
    foreign: Callable[[], tuple[Any, Path]], toys: Path, layout: str
) -> None:
    from safetensors.torch import load_file, save_file

    model, folder = foreign()
    file = folder / "model.safetensors"
    tensors = load_file(file)
    assert "language_model.lm_head.weight" in tensors
    if layout != "before 4.52":
        for pattern, new in (
            (r"^language_model\.model\.", "model.language_model."),
            (r"^language_model\.lm_head", "lm_head"),
            (r"^(vision_tower|multi_modal)", r"model.\1"),
        ):
            tensors = {re.sub(pattern, new, name): tensor for name, tensor in tensors.items()}
    if layout == "sharded":
        file.unlink()
        names = sorted(tensors)
        shards = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
        for shard, some in shards.items():
            save_file({name: tensors[name] for name in some}, folder / shard, metadata={"format": "pt"})
        weight_map = {name: shard for shard, some in shards.items() for name in some}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        save_file(tensors, file, metadata={"format": "pt"})
    image = toys / "images" / "photo-001.jpg"
    expected, their_ids = transformers_outputs(model, folder, image, "What is it?")
    logits, ids = llavactl_outputs(folder, image, "What is it?")
    image_token = model.config.image_token_index
    assert [image_token if token == IMAGE_TOKEN else token for token in ids] == their_ids
    # Live features are rounded to float16 as well, so the tolerance is larger than 1e-4.
    assert (logits - expected).abs().max() < 2e-3 * expected.abs().max()
    assert read_description(resolve(folder))["template"] == "tokenizer"


def test_hf_reads_chat_template_json(foreign: Callable[[], tuple[Any, Path]], toys: Path) -> None:
    _, folder = foreign()
    (folder / "chat_template.jinja").rename(folder / "kept")
    text = (folder / "kept").read_text()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    image = str(toys / "images" / "photo-001.jpg")
    command = ("chat", "--model", str(folder), "--image", image, "--prompt", "Where is a literal <image>?", "--json")
    result = run_cli(*command, "--max-new-tokens", "4")
    assert result.exit_code == 0, result.stderr


def test_hf_without_a_processor_is_refused(foreign: Callable[[], tuple[Any, Path]]) -> None:
    _, folder = foreign()
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    with pytest.raises(ModelError, match="processor"):
        resolve(folder)


@pytest.mark.parametrize("linear", [True, False])
def test_llava_full(toys: Path, tmp_path: Path, linear: bool) -> None:
    import torch

    state = original(toys, tmp_path / "theirs", linear=linear)
    loaded = model_folder.load(resolve(tmp_path / "theirs"))
    connector = loaded.bundle.model.connector.state_dict()
    assert loaded.description["connector"]["name"] == ("linear" if linear else "mlp2x-gelu")
    assert loaded.description["vision"]["image"] == "pad"
    assert all(torch.equal(weight, state[f"model.mm_projector.{name}"]) for name, weight in connector.items())
    language = loaded.bundle.model.language.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in language.items())


def test_llava_lora(toys: Path, tmp_path: Path) -> None:
    """Adapter, non_lora_trainables.bin and config.json, as LLaVA's training saves them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    state = original(toys, tmp_path / "full")
    folder = tmp_path / "lora"
    torch.manual_seed(1)
    base = LlamaForCausalLM.from_pretrained(toys / "language")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(folder, safe_serialization=False)
    projector = {f"base_model.model.{k}": v for k, v in state.items() if "mm_projector" in k}
    torch.save(projector, folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text((tmp_path / "full" / "config.json").read_text())
    loaded = model_folder.load(resolve(folder))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(loaded.bundle.model.language(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits)
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(ModelError, match=r"non_lora_trainables\.bin"):
        resolve(folder)


def test_a_bare_projector_needs_its_base_or_a_recipe(toys: Path, tmp_path: Path) -> None:
    import torch

    state = original(toys, tmp_path / "full")
    folder = tmp_path / "pretrain"
    folder.mkdir()
    projector = {k: v for k, v in state.items() if "mm_projector" in k}
    torch.save(projector, folder / "mm_projector.bin")
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": str(toys / "language")}))
    assert model_folder.load(resolve(folder)).bundle.model.connector
    (folder / "config.json").write_text(json.dumps(config))
    image = str(toys / "images" / "photo-000.jpg")
    command = ("chat", "--model", str(folder), "--image", image, "--prompt", "What?", "--max-new-tokens", "3")
    result = run_cli(*command)
    assert result.exit_code == 1
    assert "language" in result.stderr.splitlines()[0]
    assert run_cli(*command, "-r", str(toys / "recipe.yaml")).exit_code == 0
    assert run_cli(*command, "-r", str(toys / "recipe.yaml"), "--template", "llava-v1").exit_code == 0


@pytest.mark.parametrize("base", [False, True])
def test_a_projector_without_config_needs_a_recipe(toy: Path, toys: Path, tmp_path: Path, base: bool) -> None:
    """As with LLaVA's --pretrain_mm_mlp_adapter; with ``base`` the language model is in the same folder."""
    import shutil

    import torch

    state = original(toys, tmp_path / "full")
    folder = tmp_path / "bare"
    if base:
        shutil.copytree(toys / "language", folder)
    else:
        folder.mkdir()
    torch.save({k: v for k, v in state.items() if "mm_projector" in k}, folder / "mm_projector.bin")
    image = str(toys / "images" / "photo-000.jpg")
    recipe = str(toy / "recipe.yaml")
    for model in (folder, folder / "mm_projector.bin"):
        command = ("chat", "--model", str(model), "--image", image, "--prompt", "What?", "--max-new-tokens", "3")
        without_recipe = run_cli(*command)
        assert without_recipe.exit_code == 1
        message = without_recipe.stderr.splitlines()[0]
        assert "vision" in message
        assert ("language" in message) == (not base)
        assert run_cli(*command, "-r", recipe).exit_code == 0
    quick = ("-o", f"stage2.init={folder / 'mm_projector.bin'}", "-o", "features.mode=live", "-o", "stage2.max_steps=1")
    frozen = ("-o", "stage2.learning_rate=1e-30", "-o", "name=next")
    result = run_cli("train", "--stage", "2", "-r", recipe, *quick, *frozen)
    assert result.exit_code == 0, result.stderr
    connector = model_folder.load(toy / "runs/next/stage2/model").bundle.model.connector.state_dict()
    assert all(torch.allclose(state[f"model.mm_projector.{name}"], each) for name, each in connector.items())


def test_missing_files_are_named(foreign: Callable[[], tuple[Any, Path]], native: Make, tmp_path: Path) -> None:
    _, folder = foreign()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        resolve(folder)
    result = run_cli(
        *("export", "--model", str(native("l", method="lora")), "--format", "peft"),
        *("--to", str(tmp_path / "p"), "--no-verify"),
    )
    assert result.exit_code == 0, result.stderr
    (tmp_path / "p/base/config.json").unlink()
    with pytest.raises(ModelError, match="base/ is missing"):
        resolve(tmp_path / "p")
    with pytest.raises(ModelError, match="nope"):
        resolve("../nope")


def test_pickles_run_no_code(toys: Path, tmp_path: Path) -> None:
    import pickle

    original(toys, tmp_path / "theirs")

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "owned",))

    (tmp_path / "theirs" / "pytorch_model.bin").unlink()
    (tmp_path / "theirs" / "mm_projector.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError, match=r"mm_projector\.bin"):
        resolve(tmp_path / "theirs")
    assert not (tmp_path / "owned").exists()


def test_a_run_folder_stands_for_its_last_finished_stage(native: Make, tmp_path: Path) -> None:
    first, second = native("first"), native("second")
    for stage, model in (("stage1", first), ("stage2", second)):
        (tmp_path / "run" / stage).mkdir(parents=True)
        model.rename(tmp_path / "run" / stage / "model")
    assert resolve(tmp_path / "run") == tmp_path / "run/stage2/model"
    assert resolve(tmp_path / "run" / "stage1") == tmp_path / "run/stage1/model"


def test_a_changed_checkpoint_is_read_again(toys: Path, tmp_path: Path) -> None:
    import torch

    state = original(toys, tmp_path / "theirs")
    first = resolve(tmp_path / "theirs")
    assert resolve(tmp_path / "theirs") == first
    state["model.mm_projector.0.bias"] += 1
    torch.save(state, tmp_path / "theirs" / "pytorch_model.bin")
    second = resolve(tmp_path / "theirs")
    assert second != first
    assert read_description(second)["digest"] != read_description(first)["digest"]


@pytest.mark.parametrize("kind", ["hf", "original", "run"])
def test_stage_2_starts_from_any_format(
    foreign: Callable[[], tuple[Any, Path]], toy: Path, toys: Path, tmp_path: Path, kind: str
) -> None:
    """With a negligible learning rate, the weights stay the same."""
    import torch

    if kind == "original":
        original(toys, tmp_path / "theirs")
    elif kind == "hf":
        foreign()
    else:
        result = run_cli("train", "--stage", "2", "-r", str(toy / "recipe.yaml"), "-o", "stage2.init=scratch",
                       "-o", "features.mode=live", "-o", "stage2.max_steps=1")  # fmt: skip
        assert result.exit_code == 0, result.stderr
        (tmp_path / "theirs").symlink_to(toy / "runs/toy/stage2/model")
    start = model_folder.load(resolve(tmp_path / "theirs"))
    overrides = ("-o", "name=next", "-o", f"stage2.init={tmp_path / 'theirs'}", "-o", "features.mode=live")
    overrides += ("-o", "stage2.max_steps=1", "-o", "stage2.learning_rate=1e-30")
    result = run_cli("train", "--stage", "2", "-r", str(toy / "recipe.yaml"), *overrides)
    assert result.exit_code == 0, result.stderr
    end = model_folder.load(toy / "runs/next/stage2/model")
    for one, other in zip(
        start.bundle.model.state_dict().values(), end.bundle.model.state_dict().values(), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-7)
    other = run_cli("train", "--stage", "2", "-r", str(toy / "recipe.yaml"), *overrides, "-o", "connector.name=linear")
    assert other.exit_code == 1
    assert "connector" in other.stderr
