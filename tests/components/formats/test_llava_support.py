"""Format llava for LLaVA's code: configuration, tokenizer files and vision encoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llavactl.components.formats.llava import OriginalLlava, OriginalLlavaOptions
from llavactl.components.formats.llava_support import CONFIG_KEYS
from llavactl.components.formats.llava_tokenizer import loads_tokenizer, save_tokenizer
from llavactl.core.errors import ModelError
from llavactl.core.model_description import read_description
from llavactl.model import folder as model_folder
from llavactl.model.imported import resolve
from llavactl.testing import run_cli
from llavactl.testing.toys import toy_language

from ..conftest import (
    MODEL,
    language,
    llama_folder,
    llama_tokenizer,
    sentencepiece_reference,
    with_prepend_normalizer,
)
from .conftest import Make
from .families import language_of
from .test_export import written

TEXTS = (
    "Hello world", "\nWhat is in this picture?", "a  b   c\n\n  d", "USER: hi</s>ASSISTANT: x</s>", "naïve café",
    "这是什么", "🐕‍🦺", "</s><s>x", "", "\n", "tab\tx", "def f(x):\n    return x", "1234567 89.10", "«ça»", "Ω≈ç√∫",
)  # fmt: skip
real = pytest.mark.skipif(not MODEL.is_file(), reason="no SentencePiece model installed: see tests/vocabularies.txt")


def reads(config: dict[str, Any], kind: str = "llama") -> dict[str, Any]:
    """The keys of ``config`` that transformers 4.37 reads."""
    return {key: value for key, value in config.items() if key in CONFIG_KEYS[kind]}


class TestTokenizer:
    @real
    @pytest.mark.parametrize("legacy", [True, False])
    def test_a_sentencepiece_vocabulary_is_rebuilt(self, tmp_path: Path, legacy: bool) -> None:
        """tokenizer.model encodes like the original one, and transformers 5 reads the same tokenizer."""
        from sentencepiece import SentencePieceProcessor

        tokenizer = llama_tokenizer(tmp_path / "llama", legacy=legacy)
        save_tokenizer(tokenizer, tmp_path / "out", fast=False)
        config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
        assert (config["tokenizer_class"], config["legacy"]) == ("LlamaTokenizer", legacy)
        assert config["add_bos_token"]
        assert not config["add_eos_token"]
        made, given = (
            SentencePieceProcessor(model_file=str(file)) for file in (tmp_path / "out/tokenizer.model", MODEL)
        )
        pieces = range(given.get_piece_size())
        assert [made.id_to_piece(token) for token in pieces] == [given.id_to_piece(token) for token in pieces]
        assert all(made.is_control(token) == given.is_control(token) for token in pieces)
        again, reference = AutoTokenizer.from_pretrained(tmp_path / "out"), sentencepiece_reference(legacy)
        for text in TEXTS:
            assert made.encode(text) == given.encode(text)
            assert tokenizer(text)["input_ids"] == again(text)["input_ids"] == reference(text)

    @real
    def test_added_tokens_are_kept(self, tmp_path: Path) -> None:
        tokenizer = llama_tokenizer(tmp_path / "llama", legacy=True)
        tokenizer.add_tokens(["<box>"], special_tokens=True)
        tokenizer.add_tokens(["blorp"])
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        save_tokenizer(tokenizer, tmp_path / "out", fast=False)
        config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
        added = {each["content"]: int(token) for token, each in config["added_tokens_decoder"].items()}
        assert added == {str(each): token for token, each in tokenizer.added_tokens_decoder.items()}
        again = AutoTokenizer.from_pretrained(tmp_path / "out")
        text = "a <box> blorp<pad></s>b"
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert (again.pad_token, len(again)) == ("<pad>", len(tokenizer))

    @real
    def test_add_eos_token_is_off(self, tmp_path: Path) -> None:
        """LLaVA's code tokenizes each piece of a prompt with all special tokens that the tokenizer adds."""
        folder = llama_folder(tmp_path / "llama", legacy=True)
        stated = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(stated | {"add_eos_token": True}))
        tokenizer = language(folder)
        assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
        save_tokenizer(tokenizer, tmp_path / "out", fast=False)
        assert not json.loads((tmp_path / "out/tokenizer_config.json").read_text())["add_eos_token"]
        again = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
        assert again.encode("a").ids == [1, *tokenizer("a", add_special_tokens=False)["input_ids"]]

    @pytest.mark.parametrize("begin", ["<s> ", ""])
    def test_the_post_processor_adds_only_bos(self, tmp_path: Path, begin: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(toy_language(tmp_path / "toy"))
        specials = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{begin}$A </s>", None, specials)
        save_tokenizer(tokenizer, tmp_path / "out", fast=False)
        again = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
        bare = tokenizer("USER: hi", add_special_tokens=False)["input_ids"]
        assert again.encode("USER: hi").ids == ([tokenizer.bos_token_id] if begin else []) + bare

    @pytest.mark.parametrize("clean", [True, False])
    def test_clean_up_tokenization_spaces_is_saved(self, tmp_path: Path, clean: bool) -> None:
        tokenizer = AutoTokenizer.from_pretrained(toy_language(tmp_path / "toy"))
        tokenizer.clean_up_tokenization_spaces = clean
        save_tokenizer(tokenizer, tmp_path / "out", fast=False)
        stated = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
        assert stated["clean_up_tokenization_spaces"] is clean

    @real
    def test_a_special_token_may_be_part_of_merges(self, tmp_path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        tokenizer = llama_tokenizer(tmp_path / "llama", legacy=True)
        tokenizer.add_special_tokens({"additional_special_tokens": ["▁the"]})
        save_tokenizer(tokenizer, tmp_path / "out", fast=False)
        made = SentencePieceProcessor(model_file=str(tmp_path / "out/tokenizer.model"))
        for text in ("the end of the line", "these"):
            assert made.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]

    @real
    def test_byte_tokens_may_be_special(self, tmp_path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        tokenizer = llama_tokenizer(tmp_path / "llama", legacy=True)
        tokenizer.add_special_tokens({"additional_special_tokens": [f"<0x{byte:02X}>" for byte in range(256)]})
        save_tokenizer(tokenizer, tmp_path / "out", fast=False)
        made = SentencePieceProcessor(model_file=str(tmp_path / "out/tokenizer.model"))
        assert made.encode("\n🐕") == tokenizer("\n🐕", add_special_tokens=False)["input_ids"]

    @real
    def test_single_word_tokens_are_refused(self, tmp_path: Path) -> None:
        tokenizer = llama_tokenizer(tmp_path / "llama", legacy=True)
        tokenizer.add_tokens([AddedToken("blorp", single_word=True)])
        with pytest.raises(ModelError, match="blorp"):
            save_tokenizer(tokenizer, tmp_path / "out", fast=False)

    @real
    @pytest.mark.parametrize("legacy", [True, False])
    def test_loads_tokenizer_with_a_sentencepiece_vocabulary(self, tmp_path: Path, legacy: bool) -> None:
        given = llama_folder(tmp_path / "llama", legacy=legacy)
        tokenizer = language(given)
        tokenizer.save_pretrained(tmp_path / "new")
        save_tokenizer(tokenizer, tmp_path / "old", fast=False)
        found = {name: loads_tokenizer(tmp_path / name) for name in ("llama", "new", "old", "nowhere")}
        assert found == {"llama": True, "new": False, "old": True, "nowhere": True}

    def test_loads_tokenizer_with_other_vocabularies(self, tmp_path: Path) -> None:
        folder = toy_language(tmp_path / "new")
        save_tokenizer(AutoTokenizer.from_pretrained(folder), tmp_path / "old", fast=False)
        assert not loads_tokenizer(folder)
        assert loads_tokenizer(tmp_path / "old")

    @real
    def test_tokenizers_of_older_transformers(self, tmp_path: Path) -> None:
        tokenizer = with_prepend_normalizer(llama_tokenizer(tmp_path / "llama", legacy=True))
        save_tokenizer(tokenizer, tmp_path / "out", fast=False)
        again = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert all(again(text)["input_ids"] == tokenizer(text)["input_ids"] for text in TEXTS)

    def test_other_vocabularies_are_written_for_tokenizers_0_15(self, toys: Path, tmp_path: Path) -> None:
        tokenizer = language(toys / "language")
        save_tokenizer(tokenizer, tmp_path / "out", fast=False)
        config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        backend = json.loads((tmp_path / "out/tokenizer.json").read_text())
        assert all(isinstance(merge, str) for merge in backend["model"]["merges"])
        assert "ignore_merges" not in backend["model"]
        again = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert all(again(text)["input_ids"] == tokenizer(text)["input_ids"] for text in TEXTS)

    def test_metaspace_is_written_for_tokenizers_0_15(self, tmp_path: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "?": 2}, unk_token="?"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
        save_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="?"), tmp_path / "out", fast=False)
        written_json = json.loads((tmp_path / "out/tokenizer.json").read_text())
        spaces = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True, "prepend_scheme": "first"}
        assert written_json["pre_tokenizer"] == written_json["decoder"] == spaces

    @pytest.mark.parametrize("newer", ["ignore_merges", "normalizer", "pre_tokenizer"])
    def test_newer_parts_are_refused(self, toys: Path, tmp_path: Path, newer: str) -> None:
        from tokenizers import Tokenizer, normalizers, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        backend = json.loads((toys / "language/tokenizer.json").read_text())
        if newer == "ignore_merges":
            backend["model"]["ignore_merges"] = True
        made = Tokenizer.from_str(json.dumps(backend))
        if newer == "normalizer":
            made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.ByteLevel()])
        if newer == "pre_tokenizer":
            made.pre_tokenizer = pre_tokenizers.FixedLength(length=3)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
        with pytest.raises(ModelError, match=r"newer"):
            save_tokenizer(tokenizer, tmp_path / "out", fast=False)
        assert not (tmp_path / "out").exists()

    @real
    def test_fast_llama_tokenizers_must_be_legacy(self, tmp_path: Path) -> None:
        tokenizer = llama_tokenizer(tmp_path / "llama", legacy=False)
        with pytest.raises(ModelError, match="legacy"):
            save_tokenizer(tokenizer, tmp_path / "out", fast=True)


@pytest.mark.parametrize(
    "changed",
    [
        {"mlp_bias": True},
        pytest.param({"head_dim": 32}, marks=pytest.mark.slow),
        pytest.param(
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, marks=pytest.mark.slow
        ),
        pytest.param(
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "original_max_position_embeddings": 512,
                }
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_unsupported_configurations_are_refused(
    native: Make, toys: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    """Before anything is written; ``strict=false`` exports them."""
    model = native("ours", language=language_of("llama", toys / "language", tmp_path / "language", **changed))
    command = ("export", "--model", str(model), "--format", "llava", "--to", str(tmp_path / "out"), "--json")
    refused = run_cli(*command)
    assert refused.exit_code == 1
    assert "strict=false" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert run_cli(*command, "-t", "strict=false").json()["verified"]["verdict"] == "exact"


@pytest.mark.parametrize(
    ("window", "loads"),
    [(8, False), pytest.param(4096, True, marks=pytest.mark.slow), pytest.param(None, True, marks=pytest.mark.slow)],
)
def test_sliding_windows(native: Make, toys: Path, tmp_path: Path, window: int | None, loads: bool) -> None:
    folder = language_of("mistral", toys / "language", tmp_path / "language", sliding_window=window)
    result = run_cli(
        "export", "--model", str(native("ours", language=folder)), "--format", "llava", "--to", str(tmp_path / "out")
    )
    assert (result.exit_code == 0) == loads


def test_a_stage_1_export_has_the_sizes_of_its_language_model(native: Make, toys: Path, tmp_path: Path) -> None:
    """LLaVA's code creates the language model with these sizes before it reads the weights of the base."""
    rope = {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0}
    folder = language_of("llama", toys / "language", tmp_path / "language", rms_norm_eps=1e-3, rope_parameters=rope)
    model = native("ours", method="connector", template="plain", language=folder)
    written(model, "llava", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    # With only these keys, the weights of the base give the same model.
    theirs = LlamaForCausalLM.from_pretrained(folder, config=LlamaConfig(**reads(config)))
    ours = model_folder.load(model).bundle.model.language
    assert theirs.config.rms_norm_eps == 1e-3
    for key in ("hidden_size", "num_key_value_heads", "intermediate_size"):
        assert getattr(theirs.config, key) == getattr(ours.config, key)
    assert theirs.config.rope_parameters.items() >= ours.config.rope_parameters.items()
    assert config["_name_or_path"] == str(folder)


class TestVisionEncoder:
    def test_tensors_have_older_names(self, native: Make, toys: Path, tmp_path: Path) -> None:
        """With the names of transformers 5, transformers 4.37 would read no tensor and keep random weights."""
        from safetensors import safe_open

        written(native("ours"), "llava", tmp_path / "out")
        named = json.loads((tmp_path / "out/config.json").read_text())["mm_vision_tower"]
        assert named == str(tmp_path / "out/vision_tower")
        with safe_open(Path(named, "model.safetensors"), "pt") as opened:
            assert all(name.startswith("vision_model.") for name in opened.keys())  # noqa: SIM118

    def test_a_folder_with_older_names_is_referenced(self, native: Make, toys: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        shutil.copytree(toys / "clip", tmp_path / "clip")
        file = tmp_path / "clip/model.safetensors"
        save_file({f"vision_model.{name}": each for name, each in load_file(file).items()}, file, {"format": "pt"})
        model = native("ours")
        description = json.loads((model / "llavactl.json").read_text())
        description["vision"]["model"] = str(tmp_path / "clip")
        (model / "llavactl.json").write_text(json.dumps(description))
        written(model, "llava", tmp_path / "out")
        assert json.loads((tmp_path / "out/config.json").read_text())["mm_vision_tower"] == str(tmp_path / "clip")
        assert not (tmp_path / "out/vision_tower").exists()

    def test_a_moved_export_is_read(self, native: Make, tmp_path: Path) -> None:
        """It is then exported again, because it refers to its vision encoder by an absolute path."""
        model = native("ours")
        written(model, "llava", tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / "moved")
        vision = read_description(resolve(tmp_path / "moved"))["vision"]
        assert vision["model"] == str(tmp_path / "moved/vision_tower")
        assert not written(model, "llava", tmp_path / "moved")["finished_before"]
        assert written(model, "llava", tmp_path / "moved")["finished_before"]
        named = json.loads((tmp_path / "moved/config.json").read_text())["mm_vision_tower"]
        assert named == str(tmp_path / "moved/vision_tower")


class TestOptions:
    def test_an_export_with_other_options_is_written_again(self, native: Make, tmp_path: Path) -> None:
        command = (
            "export",
            "--model",
            str(native("ours")),
            "--format",
            "llava",
            "--to",
            str(tmp_path / "out"),
            "--json",
        )
        assert not run_cli(*command, "--no-verify").json()["finished_before"]
        assert not run_cli(*command, "--no-verify", "-t", "strict=false").json()["finished_before"]
        assert run_cli(*command, "--no-verify", "-t", "strict=false").json()["finished_before"]

    def test_an_unknown_option_is_refused(self, native: Make, tmp_path: Path) -> None:
        command = ("export", "--model", str(native("ours")), "--format", "hf", "--to", str(tmp_path / "out"))
        refused = run_cli(*command, "-t", "strict=false")
        assert refused.exit_code == 1
        assert "-t strict" in refused.stderr

    @pytest.mark.parametrize(("form", "ok"), [("llava", True), ("hf", False)])
    def test_format_options_in_a_recipe(self, toy: Path, form: str, ok: bool) -> None:
        recipe = toy / "recipe.yaml"
        recipe.write_text(recipe.read_text() + f"export: [{{format: {form}, to: out, strict: false}}]\n")
        checked = run_cli("recipes", "check", "-r", str(recipe), "--json")
        assert (checked.exit_code == 0) == ok
        if not ok:
            assert "export.0.strict" in checked.stdout


def test_reading_uses_default_options(tmp_path: Path) -> None:
    assert not OriginalLlava(OriginalLlavaOptions()).recognise(tmp_path)
