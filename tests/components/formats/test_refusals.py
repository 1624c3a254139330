"""Checkpoints are identified by all their contents; anything beyond plain LLaVA is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llavactl.chat.transformers_model import model_digest
from llavactl.core.errors import ModelError
from llavactl.core.model_description import read_description
from llavactl.core.registry import registry
from llavactl.model import folder as model_folder
from llavactl.model.imported import resolve
from llavactl.testing import run_cli

from .conftest import Make, original

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 4096\n".format("0" * 64)

V15 = {
    "_name_or_path": "llava-v1.5-7b", "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False,
    "image_aspect_ratio": "pad", "max_length": 4096, "mm_resampler_type": None, "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False, "rope_scaling": None, "torch_dtype": "float32", "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False, "unfreeze_mm_vision_tower": False,
    "use_mm_proj": True, "model_type": "llava",
}  # fmt: skip
"""Keys in config.json of liuhaotian/llava-v1.5-13b, without sizes."""

V15_LORA = {
    **V15, "architectures": ["LlamaForCausalLM"], "model_type": "llava_llama", "mm_projector_lr": 2e-5,
    "mm_patch_merge_type": "flat", "tokenizer_padding_side": "right", "tokenizer_model_max_length": 2048,
    "attention_bias": False, "rope_theta": 10000.0, "image_grid_pinpoints": None,
}  # fmt: skip
V1 = {
    "max_sequence_length": 2048, "sep_image_conv_front": False, "use_mm_proj": True, "image_aspect_ratio": "square",
    "model_type": "llava", "mm_use_im_start_end": False, "tune_mm_mlp_adapter": False, "image_grid_pinpoints": None,
}  # fmt: skip
V16 = {
    "image_aspect_ratio": "anyres", "image_crop_resolution": 224, "image_split_resolution": 224,
    "image_grid_pinpoints": [[336, 672], [672, 336]], "mm_patch_merge_type": "spatial_unpad",
    "mm_vision_tower_lr": 2e-06, "unfreeze_mm_vision_tower": True,
}  # fmt: skip


def lora(toys: Path, folder: Path, seed: int = 1, *, beside: dict[str, Any] | None = None, **more: Any) -> Path:
    """A LoRA checkpoint on the toy language model, as saved by LLaVA's training."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    full = folder.with_name(f"{folder.name}-full")
    state = original(toys, full, **more)
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(toys / "language"), config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.save_pretrained(folder)
    rest = {f"base_model.model.{k}": v for k, v in state.items() if "mm_projector" in k} | (beside or {})
    torch.save(rest, folder / "non_lora_trainables.bin")
    shutil.copy(full / "config.json", folder)
    return folder


def rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Changes the tensors in ``file``."""
    import torch
    from safetensors.torch import load_file, save_file

    if file.suffix == ".safetensors":
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    else:
        torch.save(change(torch.load(file)), file)


def configure(folder: Path, **more: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **more}))


def vision_tensors(toys: Path, *, times: float = 1.0, dtype: str = "float32") -> dict[str, Any]:
    """The tensors of the toy CLIP under their names in a LLaVA checkpoint, one of them multiplied by ``times``."""
    import torch
    from safetensors.torch import load_file

    found = load_file(toys / "clip/model.safetensors")
    found[next(name for name in found if "layers.0.mlp.fc1.weight" in name)] *= times
    return {f"model.vision_tower.vision_tower.{name}": each.to(getattr(torch, dtype)) for name, each in found.items()}


def digest(folder: Path) -> str:
    return str(read_description(resolve(folder))["digest"])


class TestIdentity:
    def test_adapters_with_equal_config_and_connector_differ(self, toys: Path, tmp_path: Path) -> None:
        one, other = lora(toys, tmp_path / "one"), lora(toys, tmp_path / "other", seed=2)
        assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
        assert digest(one) != digest(other)

    def test_a_copied_model_has_the_same_digest(self, toys: Path, tmp_path: Path) -> None:
        """But each copy refers to its own weights, because the other may change or be deleted."""
        original(toys, tmp_path / "theirs")
        shutil.copytree(tmp_path / "theirs", tmp_path / "again")
        assert digest(tmp_path / "theirs") == digest(tmp_path / "again")
        (tmp_path / "theirs/pytorch_model.bin").unlink()
        assert model_folder.load(resolve(tmp_path / "again"))

    @pytest.mark.parametrize("kind", ["lora", "hf", "full", "bare", "peft", "hf:"])
    def test_a_replaced_file_of_equal_size_and_time_changes_the_digest(
        self, native: Make, foreign: Callable[[], tuple[Any, Path]], toys: Path, tmp_path: Path, kind: str
    ) -> None:
        folder, name = tmp_path / "theirs", "pytorch_model.bin"
        if kind == "lora":
            folder, name = lora(toys, tmp_path / "lora"), "adapter_model.safetensors"
        elif kind.startswith("hf"):
            folder, name = foreign()[1], "model.safetensors"
        elif kind == "peft":
            command = ("export", "--model", str(native("l", method="lora")), "--format", "peft")
            result = run_cli(*command, "--to", str(tmp_path / "p"), "--no-verify")
            assert result.exit_code == 0, result.stderr
            folder, name = tmp_path / "p", "adapter_model.safetensors"
        else:
            original(toys, folder)
        if kind == "bare":
            rewrite(folder / name, lambda tensors: {k: v for k, v in tensors.items() if "mm_projector" in k})
            (folder / name).rename(folder / "mm_projector.bin")
            configure(folder, _name_or_path=str(toys / "language"))
            name = "mm_projector.bin"
        rewrite(folder / name, lambda tensors: tensors)
        known = model_digest if kind == "hf:" else digest
        before, status = known(folder), (folder / name).stat()
        rewrite(folder / name, lambda tensors: {key: each.flip(0).contiguous() for key, each in tensors.items()})
        os.utime(folder / name, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert ((folder / name).stat().st_size, (folder / name).stat().st_mtime_ns) == (
            status.st_size,
            status.st_mtime_ns,
        )
        assert known(folder) != before

    @pytest.mark.parametrize("what", ["language", "clip"])
    def test_a_changed_base_or_vision_encoder_changes_the_digest(self, toy: Path, tmp_path: Path, what: str) -> None:
        folder = lora(toy, tmp_path / "lora")
        before = digest(folder)
        assert digest(folder) == before
        rewrite(toy / what / "model.safetensors", lambda tensors: {key: each * 1.5 for key, each in tensors.items()})
        assert digest(folder) != before

    def test_a_changed_language_model_of_the_recipe_changes_the_digest(self, toy: Path, tmp_path: Path) -> None:
        from llavactl.recipe.load import load_recipe

        state = original(toy, tmp_path / "full")
        (tmp_path / "bare").mkdir()
        import torch

        torch.save({k: v for k, v in state.items() if "mm_projector" in k}, tmp_path / "bare/mm_projector.bin")
        recipe = load_recipe(toy / "recipe.yaml")
        before = read_description(resolve(tmp_path / "bare", recipe))["digest"]
        rewrite(toy / "language/model.safetensors", lambda tensors: {key: each * 1.5 for key, each in tensors.items()})
        assert read_description(resolve(tmp_path / "bare", recipe))["digest"] != before

    def test_a_replaced_adapter_is_evaluated_again(self, toy: Path, tmp_path: Path) -> None:
        folder, other = lora(toy, tmp_path / "one"), lora(toy, tmp_path / "other", seed=5)
        command = ("eval", "scenes", "-t", "scenes=1", "--limit", "2", "--model", str(folder), "--json")
        settings = ("-o", "eval.max_new_tokens=2", "-o", "eval.blind_baseline=false")
        first = run_cli(*command, *settings, cwd=toy)
        assert first.exit_code == 0, first.stderr
        assert run_cli(*command, *settings, cwd=toy).json()["finished_before"] is True
        shutil.copy2(other / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        again = run_cli(*command, *settings, cwd=toy).json()
        assert again["finished_before"] is False
        assert again["answers"] != first.json()["answers"]


class TestConfig:
    @pytest.mark.parametrize("more", [V15, V1, {**V15, "image_aspect_ratio": None}], ids=["v1.5", "v1", "null"])
    def test_published_configs_are_accepted(self, toys: Path, tmp_path: Path, more: dict[str, Any]) -> None:
        original(toys, tmp_path / "theirs", linear=more is V1, **more)
        found = read_description(resolve(tmp_path / "theirs"))["vision"]
        assert found["image"] == ("pad" if more["image_aspect_ratio"] == "pad" else "square")

    def test_a_published_lora_config_is_accepted(self, toys: Path, tmp_path: Path) -> None:
        assert model_folder.load(resolve(lora(toys, tmp_path / "lora", **V15_LORA)))

    @pytest.mark.parametrize(
        ("more", "name"),
        [
            (V16, "image_aspect_ratio"),
            *(({"image_aspect_ratio": each}, each) for each in ("anyres_max_9", "crop_split", "highres")),
            ({"s2": True}, "s2"),
            ({"s2_scales": "336,672"}, "s2_scales"),
            ({"use_s2": True}, "use_s2"),
            ({"mm_resampler_type": "perceiver"}, "mm_resampler_type"),
            ({"mm_projector_type": "ldpnetv2"}, "ldpnetv2"),
            ({"mm_projector_type": "mlp3x_gelu"}, "mlp3x_gelu"),
            ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type"),
            ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
            ({"mm_use_im_patch_token": True}, "mm_use_im_patch_token"),
            ({"mm_vision_select_feature": "slicefour_patch"}, "slicefour_patch"),
            ({"mm_vision_select_layer": [-2, -5]}, "mm_vision_select_layer"),
            ({"mm_hidden_size": 96}, "mm_hidden_size"),
            ({"use_mm_proj": False}, "use_mm_proj"),
            ({"mm_spatial_pool_stride": 2}, "mm_spatial_pool_stride"),
            ({"mm_newline_position": "grid"}, "mm_newline_position"),
            ({"mm_audio_tower": "whisper"}, "mm_audio_tower"),
            ({"a_key_of_the_future": 1}, "a_key_of_the_future"),
            ({"quantization_config": {"bits": 4}}, "quantization_config"),
            ({"unfreeze_mm_vision_tower": True}, "unfreeze_mm_vision_tower"),
            ({"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"}, "mm_tunable_parts"),
            ({"architectures": ["LlavaFooForCausalLM"], "model_type": "llava_foo"}, "LlavaFooForCausalLM"),
            ({"architectures": ["BunnyPhiForCausalLM"], "model_type": "bunny-phi"}, "bunny-phi"),
            ({"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_llama"}, "llava_llama"),
        ],
        ids=str,
    )
    def test_unsupported_keys_and_values_are_refused(
        self, toys: Path, tmp_path: Path, more: dict[str, Any], name: str
    ) -> None:
        original(toys, tmp_path / "theirs", **more)
        with pytest.raises(ModelError, match=name):
            resolve(tmp_path / "theirs")
        assert not [each for each in tmp_path.glob("**/models/*") if each.is_dir()]

    @pytest.mark.parametrize(
        ("more", "name"),
        [
            ({"multimodal_projector_bias": False}, "multimodal_projector_bias"),
            ({"image_grid_pinpoints": [[336, 672]]}, "image_grid_pinpoints"),
            ({"use_image_newline_parameter": True}, "use_image_newline_parameter"),
            ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
            ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),
            ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
            ({"architectures": ["LlavaNextForConditionalGeneration"]}, "LlavaNext"),
        ],
        ids=str,
    )
    def test_unsupported_keys_and_values_of_hf_are_refused(
        self, foreign: Callable[[], tuple[Any, Path]], more: dict[str, Any], name: str
    ) -> None:
        _, folder = foreign()
        configure(folder, **more)
        with pytest.raises(ModelError, match=name):
            resolve(folder)

    def test_the_published_hf_config_is_accepted(self, foreign: Callable[[], tuple[Any, Path]]) -> None:
        """With keys of llava-hf/llava-1.5-7b-hf."""
        _, folder = foreign()
        config = json.loads((folder / "config.json").read_text())
        vision = {**config["vision_config"], "vocab_size": 32000, "projection_dim": 768}
        configure(folder, ignore_index=-100, vocab_size=448, pad_token_id=401, vision_config=vision)
        assert resolve(folder)

    def test_an_image_processor_that_makes_tiles_is_refused(self, foreign: Callable[[], tuple[Any, Path]]) -> None:
        _, folder = foreign()
        (folder / "preprocessor_config.json").write_text('{"image_processor_type": "LlavaNextImageProcessor"}')
        (folder / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
        with pytest.raises(ModelError, match="LlavaNextImageProcessor"):
            resolve(folder)

    @pytest.mark.parametrize(
        ("config", "name"),
        [
            ({"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"}, "llava_next"),
            ({"architectures": ["TinyLlavaForConditionalGeneration"], "model_type": "tinyllava"}, "tinyllava"),
            ({}, "architecture"),
        ],
        ids=str,
    )
    def test_the_error_for_an_unknown_format_names_the_architecture(
        self, tmp_path: Path, config: dict[str, Any], name: str
    ) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        result = run_cli("chat", "--model", str(tmp_path), "--prompt", "What?")
        assert result.exit_code == 1
        assert name in result.stderr

    def test_llava_nexts_qwen_is_qwen2(self) -> None:
        from llavactl.components.languages.llava_checkpoint import language_type

        for kind in ("llava_qwen", "qwen2", "llava"):
            assert language_type({"architectures": ["LlavaQwenForCausalLM"], "model_type": kind}, "x") == "qwen2"


class TestTensors:
    @pytest.mark.parametrize(
        "name",
        ["model.image_newline", "model.vision_resampler.query", "model.mm_projector.model.0.weight", "extra.weight"],
    )
    def test_unexpected_tensors_are_refused(self, toys: Path, tmp_path: Path, name: str) -> None:
        import torch

        original(toys, tmp_path / "theirs")
        rewrite(tmp_path / "theirs/pytorch_model.bin", lambda tensors: {**tensors, name: torch.ones(48)})
        with pytest.raises(ModelError, match=name.removeprefix("model.mm_projector.")):
            resolve(tmp_path / "theirs")

    def test_buffers_of_older_versions_are_ignored(self, toys: Path, tmp_path: Path) -> None:
        import torch

        original(toys, tmp_path / "theirs")
        old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
        rewrite(tmp_path / "theirs/pytorch_model.bin", lambda tensors: {**tensors, **old})
        assert resolve(tmp_path / "theirs")

    def test_missing_tensors_are_refused(self, toys: Path, tmp_path: Path) -> None:
        original(toys, tmp_path / "theirs")
        gone = "model.layers.1.mlp.up_proj.weight"
        rewrite(tmp_path / "theirs/pytorch_model.bin", lambda tensors: {k: v for k, v in tensors.items() if k != gone})
        with pytest.raises(ModelError, match=gone):
            resolve(tmp_path / "theirs")

    def test_unexpected_tensors_of_hf_are_refused(self, foreign: Callable[[], tuple[Any, Path]]) -> None:
        import torch

        _, folder = foreign()
        rewrite(folder / "model.safetensors", lambda tensors: {**tensors, "image_newline": torch.ones(48)})
        with pytest.raises(ModelError, match="image_newline"):
            resolve(folder)

    @pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.image_newline"])
    def test_unexpected_non_lora_tensors_are_refused(self, toys: Path, tmp_path: Path, name: str) -> None:
        import torch

        folder = lora(toys, tmp_path / "lora", beside={f"base_model.model.{name}": torch.ones(400, 48)})
        with pytest.raises(ModelError, match=name):
            resolve(folder)

    @pytest.mark.parametrize(
        "of", ["model.vision_tower.vision_tower.vision_model.encoder.layers.0", "model.mm_projector"]
    )
    def test_an_adapter_of_other_parts_is_refused(self, toys: Path, tmp_path: Path, of: str) -> None:
        import torch

        folder, name = lora(toys, tmp_path / "lora"), f"base_model.model.{of}.q_proj.lora_A.weight"
        rewrite(folder / "adapter_model.safetensors", lambda tensors: {**tensors, name: torch.ones(2, 32)})
        with pytest.raises(ModelError, match=of):
            resolve(folder)

    def test_an_incomplete_adapter_is_refused(self, toys: Path, tmp_path: Path) -> None:
        folder = lora(toys, tmp_path / "lora")
        rewrite(
            folder / "adapter_model.safetensors",
            lambda tensors: {k: v for k, v in tensors.items() if "layers.1" not in k},
        )
        with pytest.raises(ModelError, match=r"layers\.1"):
            resolve(folder)

    def test_adapters_other_than_lora_are_refused(self, toys: Path, tmp_path: Path) -> None:
        folder = lora(toys, tmp_path / "lora")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
        with pytest.raises(ModelError, match="IA3"):
            resolve(folder)

    def test_an_adapter_with_full_weights_is_refused(
        self, foreign: Callable[[], tuple[Any, Path]], toys: Path, tmp_path: Path
    ) -> None:
        """transformers would load the adapter's base instead of the weights."""
        folder = lora(toys, tmp_path / "lora")
        whole = foreign()[1]
        shutil.copy(folder / "adapter_config.json", whole)
        shutil.copy(tmp_path / "lora-full/pytorch_model.bin", folder)
        for each in (folder, whole):
            with pytest.raises(ModelError, match="adapter and full weights"):
                resolve(each)

    def test_an_adapter_on_an_adapter_is_refused(self, toys: Path, tmp_path: Path) -> None:
        folder, base = lora(toys, tmp_path / "lora"), lora(toys, tmp_path / "base")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
        with pytest.raises(ModelError, match="itself an adapter"):
            resolve(folder)

    def test_safetensors_are_preferred_to_pickles_as_in_transformers(self, toys: Path, tmp_path: Path) -> None:
        import torch
        from safetensors.torch import save_file

        state = original(toys, tmp_path / "theirs")
        state["model.mm_projector.0.bias"] = torch.full((48,), 7.0)
        save_file({name: each.contiguous() for name, each in state.items()}, tmp_path / "theirs/model.safetensors")
        index = {"weight_map": dict.fromkeys(state, "pytorch_model.bin")}
        (tmp_path / "theirs/pytorch_model.bin.index.json").write_text(json.dumps(index))
        connector = model_folder.load(resolve(tmp_path / "theirs")).bundle.model.connector
        assert torch.equal(connector.state_dict()["0.bias"], state["model.mm_projector.0.bias"])


class TestVisionEncoder:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_an_unmodified_encoder_is_the_one_in_config_json(self, toys: Path, tmp_path: Path, dtype: str) -> None:
        import torch

        original(toys, tmp_path / "theirs", unfreeze_mm_vision_tower=True)
        more = vision_tensors(toys, dtype=dtype) | {
            "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(5)[None]
        }
        rewrite(tmp_path / "theirs/pytorch_model.bin", lambda tensors: tensors | more)
        assert read_description(resolve(tmp_path / "theirs"))["vision"]["model"] == str(toys / "clip")

    @pytest.mark.parametrize("place", ["full", "lora", "base of a lora"])
    @pytest.mark.parametrize("stated", [True, False])
    def test_a_fine_tuned_encoder_is_used(self, toys: Path, tmp_path: Path, place: str, stated: bool) -> None:
        import torch

        more = {"unfreeze_mm_vision_tower": True} if stated else {}
        own = vision_tensors(toys, times=3.0)
        if place == "full":
            folder = tmp_path / "theirs"
            original(toys, folder, **more)
            rewrite(folder / "pytorch_model.bin", lambda tensors: tensors | own)
        elif place == "lora":
            beside = {f"base_model.model.{name}": each for name, each in own.items()}
            folder = lora(toys, tmp_path / "theirs", beside=beside, **more)
        else:
            folder = lora(toys, tmp_path / "theirs", **more)
            base = folder.with_name("theirs-full")
            rewrite(base / "pytorch_model.bin", lambda tensors: tensors | own)
            config = json.loads((folder / "adapter_config.json").read_text())
            config["base_model_name_or_path"] = str(base)
            (folder / "adapter_config.json").write_text(json.dumps(config))
        model = resolve(folder)
        vision = read_description(model)["vision"]
        assert Path(vision["model"]).parent == model
        pixels = torch.randn(1, 3, 28, 28)
        encoded = registry().create("vision", vision).load("cpu", "float32").encode(pixels)
        plain = registry().create("vision", {**vision, "model": str(toys / "clip")})
        assert not torch.allclose(encoded, plain.load("cpu", "float32").encode(pixels), atol=1e-3)
        other = plain.whole()
        name = next(name for name in other.state_dict() if name.endswith("layers.0.mlp.fc1.weight"))
        other.state_dict()[name].mul_(3.0)
        other.save_pretrained(tmp_path / "clip")
        shutil.copy(toys / "clip/preprocessor_config.json", tmp_path / "clip")
        wanted = registry().create("vision", {**vision, "model": str(tmp_path / "clip")}).load("cpu", "float32")
        assert torch.equal(encoded, wanted.encode(pixels))

    def test_a_fine_tuned_encoder_is_exported_and_read_again(self, toys: Path, tmp_path: Path) -> None:
        """The export contains the encoder, instead of a path into the cache."""
        import torch

        original(toys, tmp_path / "theirs")
        rewrite(tmp_path / "theirs/pytorch_model.bin", lambda tensors: tensors | vision_tensors(toys, times=3.0))
        command = ("export", "--model", str(tmp_path / "theirs"), "--format", "llava")
        result = run_cli(*command, "--to", str(tmp_path / "out"), "--no-verify")
        assert result.exit_code == 0, result.stderr
        assert json.loads((tmp_path / "out/config.json").read_text())["mm_vision_tower"] == str(
            tmp_path / "out/vision_tower"
        )
        clips = [
            registry().create("vision", read_description(resolve(folder))["vision"]).whole().state_dict()
            for folder in (tmp_path / "theirs", tmp_path / "out")
        ]
        plain = registry().create("vision", {"name": "clip", "model": str(toys / "clip")}).whole().state_dict()
        assert all(torch.equal(each, clips[1][name]) for name, each in clips[0].items())
        assert not all(torch.equal(each, plain[name]) for name, each in clips[0].items())

    def test_stage_2_requires_the_fine_tuned_encoder(self, toy: Path, tmp_path: Path) -> None:
        folder = lora(toy, tmp_path / "theirs", beside=vision_tensors(toy, times=3.0))
        command = ("train", "--stage", "2", "-r", str(toy / "recipe.yaml"), "-o", f"stage2.init={folder}")
        command += ("-o", "features.mode=live", "-o", "stage2.max_steps=1")
        refused = run_cli(*command)
        assert refused.exit_code == 1
        assert "vision encoder" in refused.stderr
        own = read_description(resolve(folder))["vision"]["model"]
        result = run_cli(*command, "-o", f"vision.model={own}")
        assert result.exit_code == 0, result.stderr

    def test_an_incomplete_encoder_is_refused(self, toys: Path, tmp_path: Path) -> None:
        original(toys, tmp_path / "theirs")
        own = {name: each for name, each in vision_tensors(toys).items() if "layers.0.mlp" not in name}
        rewrite(tmp_path / "theirs/pytorch_model.bin", lambda tensors: tensors | own)
        with pytest.raises(ModelError, match=r"vision_tower tensors.*layers\.0\.mlp"):
            resolve(tmp_path / "theirs")


class TestFiles:
    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "non_lora_trainables.bin"])
    @pytest.mark.parametrize("fault", ["pointer", "cut off"])
    def test_damaged_files_of_a_lora_checkpoint(self, toys: Path, tmp_path: Path, name: str, fault: str) -> None:
        self._refused(lora(toys, tmp_path / "lora"), name, fault)

    @pytest.mark.parametrize("fault", ["pointer", "cut off"])
    def test_damaged_files_of_a_full_checkpoint(self, toys: Path, tmp_path: Path, fault: str) -> None:
        original(toys, tmp_path / "theirs")
        self._refused(tmp_path / "theirs", "pytorch_model.bin", fault)

    @pytest.mark.parametrize("fault", ["pointer", "cut off"])
    def test_damaged_files_of_hf(self, foreign: Callable[[], tuple[Any, Path]], fault: str) -> None:
        self._refused(foreign()[1], "model.safetensors", fault)

    @pytest.mark.parametrize("text", [POINTER, "{", '{"weight_map": 3}'])
    def test_a_damaged_index(self, toys: Path, tmp_path: Path, text: str) -> None:
        original(toys, tmp_path / "theirs")
        (tmp_path / "theirs/pytorch_model.bin").rename(tmp_path / "theirs/pytorch_model-00001-of-00001.bin")
        (tmp_path / "theirs/pytorch_model.bin.index.json").write_text(text)
        with pytest.raises(ModelError, match=r"pytorch_model\.bin\.index\.json"):
            resolve(tmp_path / "theirs")

    def _refused(self, folder: Path, name: str, fault: str) -> None:
        file = folder / name
        tensors = file.read_bytes()
        file.write_bytes(POINTER.encode() if fault == "pointer" else tensors[: len(tensors) // 2])
        result = run_cli("chat", "--model", str(folder), "--prompt", "What?")
        assert result.exit_code == 1
        assert name in result.stderr.splitlines()[0]
        assert ("git lfs pull" in result.stderr) == (fault == "pointer")
