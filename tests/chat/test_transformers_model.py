"""Models of transformers: tiny LLaVA, BLIP-2 and IDEFICS2 of the real classes, built offline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llavactl.chat.transformers_model import load_transformers_model
from llavactl.core.errors import DataError, ModelError
from llavactl.core.schema import Turn
from llavactl.images.image_file import ImageFile
from llavactl.model.generate import Sampling
from llavactl.testing import run_cli, toy_clip, toy_language

CHAT = (
    "{% for m in messages %}{{ m.role | upper }}: {% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SHORT = Sampling(max_new_tokens=6)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy_language(folder / "language"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<pad>"]})
    tokenizer.pad_token, tokenizer.chat_template = "<pad>", None
    return tokenizer


def llava(folder: Path) -> None:
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = _tokenizer(folder)
    clip = toy_clip(folder / "clip")
    torch.manual_seed(1)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig.from_pretrained(clip),
        text_config=LlamaConfig.from_pretrained(folder / "language", vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    image_processor = CLIPImageProcessor.from_pretrained(clip)
    LlavaProcessor(
        image_processor, tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT,
    ).save_pretrained(folder)  # fmt: skip


def blip2(folder: Path) -> None:
    import torch
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        BlipImageProcessor,
        OPTConfig,
    )

    tokenizer = _tokenizer(folder)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(2)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**small, image_size=28, patch_size=14).to_dict(),
        qformer_config=Blip2QFormerConfig(**small, vocab_size=50, encoder_hidden_size=32).to_dict(),
        text_config=OPTConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4,
            word_embed_proj_dim=32, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config)
    model.query_tokens.data.normal_()
    model.save_pretrained(folder)
    image_processor = BlipImageProcessor(size={"height": 28, "width": 28})
    Blip2Processor(image_processor, tokenizer, num_query_tokens=4).save_pretrained(folder)


def idefics2(folder: Path) -> None:
    import torch
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration, Idefics2Processor, MistralConfig
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    tokenizer = _tokenizer(folder)
    image_processor = Idefics2ImageProcessorPil(
        do_image_splitting=False, size={"shortest_edge": 28, "longest_edge": 56}
    )
    processor = Idefics2Processor(image_processor, tokenizer, image_seq_len=4, chat_template=CHAT)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(3)
    config = Idefics2Config(
        vision_config={**small, "image_size": 56, "patch_size": 14},
        perceiver_config={
            "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
            "resampler_head_dim": 8, "num_key_value_heads": 2,
        },
        text_config=MistralConfig(
            **small, num_key_value_heads=2, vocab_size=len(processor.tokenizer),
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        ).to_dict(),
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    Idefics2ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


BUILDERS: dict[str, Callable[[Path], None]] = {"llava": llava, "blip2": blip2, "idefics2": idefics2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def model(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            BUILDERS[name](folders[name])
        return folders[name]

    return model


def questions(toys: Path) -> list[tuple[Turn, ...]]:
    names = sorted(file.name for file in (toys / "images").iterdir())[:3]
    words = (
        "What is it?",
        "How many colors does the image have, and which of them is the largest?",
        "Red or blue?",
    )
    images = [ImageFile(str(toys / "images"), name) for name in names]
    return [(Turn("user", (image, f"\n{text}")),) for image, text in zip(images, words, strict=True)]


@pytest.mark.parametrize("name", BUILDERS)
def test_a_batch_gives_the_same_answers_as_single_prompts(models: Any, toys: Path, name: str) -> None:
    model = load_transformers_model(models(name), "cpu")
    conversations = questions(toys)
    answers = model.answer(conversations, SHORT)
    assert answers == [model.answer([turns], SHORT)[0] for turns in conversations]
    assert len(set(answers)) > 1 or name == "blip2"
    assert all(answers)


@pytest.mark.parametrize("name", BUILDERS)
def test_answers_equal_those_of_transformers(models: Any, toys: Path, name: str) -> None:
    """Compared with a direct call of ``generate`` on the full prompt; only new tokens are decoded."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(models(name))
    model = AutoModelForImageTextToText.from_pretrained(models(name)).eval()
    (turn,) = questions(toys)[0]
    image = turn.images[0]
    prompt = "Question: What is it? Answer:" if name == "blip2" else "USER: <image>What is it? ASSISTANT:"
    with Image.open(image.file) as opened:  # type: ignore[attr-defined]
        inputs = processor(text=[prompt], images=[[opened.convert("RGB")]], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
    expected = processor.tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert load_transformers_model(models(name), "cpu").answer([(turn,)], SHORT) == [expected]


def test_the_pixels_are_those_of_the_image(models: Any, toys: Path) -> None:
    model = load_transformers_model(models("llava"), "cpu")
    (first,), (second,), _ = questions(toys)
    swapped = Turn("user", (*second.images, *first.content[1:]))
    one, other = (model._inputs([[turn]])["pixel_values"] for turn in (first, swapped))
    assert not (one == other).all()


def test_eval_with_a_shuffled_image_baseline(models: Any, toy: Path) -> None:
    words = ("eval", "scenes", "-t", "scenes=2", "--model", f"hf:{models('llava')}", "--json")
    settings = ("-o", "eval.max_new_tokens=4", "-o", "eval.blind_baseline=true")
    result = run_cli(*words, *settings, cwd=toy)
    assert result.exit_code == 0, result.stderr
    report = result.json()
    assert report["model"] == f"hf:{models('llava')}"
    assert report["prompt"] == "chat template"
    assert report["n"] == 12
    assert report["baselines"]["blind baseline"]["accuracy"] >= 0
    kept = list(Path(report["answers"]).parent.glob("*.jsonl"))
    assert len(kept) == 2
    assert len({file.read_text() for file in kept}) == 2
    assert not (toy / "runs/toy/eval/scenes.json").exists()
    assert run_cli(*words, *settings, cwd=toy).json()["finished_before"] is True


def test_eval_without_a_recipe(models: Any, tmp_path: Path) -> None:
    words = ("eval", "scenes", "-t", "scenes=2", "--limit", "2", "--model", f"hf:{models('blip2')}", "--json")
    result = run_cli(*words, cwd=tmp_path)
    assert result.exit_code == 0, result.stderr
    assert result.json()["prompt"] == "Question: … Answer:"
    assert (tmp_path / "runs" / Path(result.json()["file"]).relative_to(tmp_path / "runs")).is_file()
    assert "blind baseline" in result.json()["baselines"]


def test_settings_without_a_recipe(models: Any, tmp_path: Path) -> None:
    words = ("eval", "scenes", "-t", "scenes=1", "--limit", "1", "--model", f"hf:{models('blip2')}", "--json")
    short = run_cli(*words, "-o", "eval.max_new_tokens=1", "-o", "eval.blind_baseline=false", cwd=tmp_path).json()
    assert short["baselines"] == {}
    assert len(Path(short["answers"]).read_text().splitlines()) == 1
    for wrong, why in (
        ("eval.max_new_tokens=no", "-o eval.max_new_tokens=no: eval.max_new_tokens: "),
        ("eval.blind=true", "eval.blind: "),
        ("seed=1", "-o seed=1: seed: "),
        ("seed", "key.path=value"),
    ):
        refused = run_cli(*words, "-o", wrong, cwd=tmp_path)
        assert refused.exit_code == 1
        assert why in refused.stderr


class TestInvalidModels:
    def test_no_such_folder(self, tmp_path: Path) -> None:
        result = run_cli("eval", "scenes", "--model", "hf:./nowhere", cwd=tmp_path)
        assert result.exit_code == 1
        assert "hf:./nowhere" in result.stderr

    def test_no_processor(self, models: Any, tmp_path: Path) -> None:
        shutil.copytree(models("llava"), tmp_path / "m")
        for file in ("processor_config.json", "preprocessor_config.json"):
            (tmp_path / "m" / file).unlink(missing_ok=True)
        with pytest.raises(ModelError, match="processor"):
            load_transformers_model(tmp_path / "m", "cpu")

    def test_no_chat_template(self, models: Any, tmp_path: Path) -> None:
        shutil.copytree(models("llava"), tmp_path / "m")
        (tmp_path / "m/chat_template.jinja").unlink()
        with pytest.raises(ModelError, match=r"llava.* chat template") as caught:
            load_transformers_model(tmp_path / "m", "cpu")
        assert "chat_template.jinja" in caught.value.hint

    def test_a_text_only_model(self, toys: Path) -> None:
        with pytest.raises(ModelError, match="processor"):
            load_transformers_model(toys / "language", "cpu")

    def test_missing_weights(self, models: Any, tmp_path: Path) -> None:
        shutil.copytree(models("llava"), tmp_path / "m")
        (tmp_path / "m/model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"image-text-to-text model .*model\.safetensors"):
            load_transformers_model(tmp_path / "m", "cpu")

    def test_a_broken_image(self, models: Any, tmp_path: Path) -> None:
        (tmp_path / "x.png").write_bytes(b"no image")
        turn = Turn("user", (ImageFile(str(tmp_path), "x.png"), "What?"))
        with pytest.raises(DataError, match=r"image x\.png"):
            load_transformers_model(models("llava"), "cpu").answer([(turn,)])

    def test_code_in_a_checkpoint(self, models: Any, tmp_path: Path) -> None:
        """Code that a checkpoint contains is never run."""
        shutil.copytree(models("llava"), tmp_path / "m")
        config = json.loads((tmp_path / "m/config.json").read_text())
        config |= {
            "model_type": "strange",
            "auto_map": {"AutoConfig": "evil.C", "AutoModelForImageTextToText": "evil.M"},
        }
        (tmp_path / "m/config.json").write_text(json.dumps(config))
        (tmp_path / "m/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        with pytest.raises(ModelError):
            load_transformers_model(tmp_path / "m", "cpu")
        assert not (tmp_path / "ran").exists()
