"""``data show`` prints the tokens of training, from the tokenizer and configurations only."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llavactl.core.protocols import ShapedVision
from llavactl.core.registry import registry
from llavactl.core.schema import IGNORE, ImageContents
from llavactl.data.encode import Encoding
from llavactl.data.split import load_split
from llavactl.recipe.load import load_recipe
from llavactl.testing import run_cli, toy_clip
from llavactl.verbs.show import show

LONG = ["-o", "stage2.max_length=80"]


@pytest.fixture
def bare(toy: Path) -> Path:
    """The toy recipe without weights."""
    for weights in toy.rglob("*.safetensors"):
        weights.unlink()
    return toy


def test_target_tokens_are_marked(bare: Path) -> None:
    result = run_cli("data", "show", cwd=bare)
    assert result.exit_code == 0, result.stderr
    assert "\x1b" not in result.stdout, "no colors without a terminal"
    head, _, text = result.stdout.partition("\n\n")
    assert "sample 0 of 12, id r0, " in head
    assert "stage 2, template vicuna-v1, image order first, epoch 1: 80 tokens, 12 target tokens" in head
    plain = text.replace("·", "").replace("\\n", "").replace("\n", "")
    assert "USER: <image x 4>What colour is the picture? ASSISTANT:« The picture is red.</s>»USER: " in plain
    assert plain.count("«") == plain.count("»") == 2


def test_tokens_equal_those_of_training(toy: Path) -> None:
    recipe = load_recipe(toy / "recipe.yaml", ["stage2.image_order=random", "stage2.max_length=80"])
    parts: Any = registry().create("languages", recipe.language.spec())
    encoding = Encoding(registry().create("templates", {"name": "vicuna-v1"}), parts.tokenizer(), 4, 80)
    features: Any = None
    settings = recipe.stage2.model_copy(update={"validation": 0.0})
    data = load_split(
        recipe.data.stage2, settings, encoding, features, lambda images: ImageContents({}), recipe.seed
    ).train
    for epoch in (1, 2, 3):
        report = show(recipe, 2, count=12, epoch=epoch)
        assert [each.id for each in report.shown] == [each.id for each in data.samples]
        for index, each in enumerate(report.shown):
            encoded = data.encoded(epoch - 1, index)
            kept = [piece for piece in each.pieces if not piece.truncated]
            assert [piece.id for piece in kept for _ in range(piece.tokens)] == list(encoded.ids)
            marks = [piece.target for piece in kept for _ in range(piece.tokens)]
            assert marks == [label != IGNORE for label in encoded.labels]
            assert (each.tokens, each.target_tokens) == (len(encoded), encoded.target_tokens)


def test_ids_prints_one_line_per_token_and_image(bare: Path) -> None:
    lines = run_cli("data", "show", "--sample", "r3", "--ids", *LONG, cwd=bare).stdout.splitlines()
    rows = lines[lines.index("") + 1 :]
    (image,) = [row for row in rows if "<image x 4> photo-003.jpg" in row]
    at = int(image.split()[0])
    assert rows[rows.index(image) + 1].split()[0] == str(at + 4)
    assert re.fullmatch(r" +\d+ +1  \*  \"</s>\"", rows[-1])
    truncated = rows.index("--- truncated ---")
    assert rows[truncated + 1].split()[0] == "80"
    assert any(line.startswith("max_length 80 ") for line in lines)


def test_json_report(bare: Path) -> None:
    report = run_cli("data", "show", "--stage", "1", "--sample", "2", "--count", "20", "--json", cwd=bare).json()
    assert (report["stage"], report["template"], report["image_tokens"], report["samples"]) == (1, "plain", 4, 12)
    assert [each["index"] for each in report["shown"]] == list(range(2, 12))
    first = report["shown"][0]
    assert "".join(piece["text"] for piece in first["pieces"] if piece["target"]) == "The picture is blue.\n" * 2
    assert first["tokens"] == sum(piece["tokens"] for piece in first["pieces"])


def test_a_random_image_order_depends_on_the_epoch(bare: Path) -> None:
    def sides(epoch: int) -> list[bool]:
        arguments = ["--count", "12", "--epoch", str(epoch), "-o", "stage2.image_order=random", "--json"]
        shown = run_cli("data", "show", *arguments, cwd=bare).json()["shown"]
        return [[bool(p["image"]) for p in each["pieces"]].index(True) > 45 for each in shown]

    assert sides(1) == sides(1)
    assert len({tuple(sides(epoch)) for epoch in (1, 2, 3)}) > 1


def test_missing_and_broken_images_and_truncated_targets_are_reported(bare: Path) -> None:
    (bare / "images/photo-000.jpg").unlink()
    (bare / "images/photo-001.jpg").write_bytes(b"no picture")
    result = run_cli("data", "show", "--count", "3", "-o", "stage2.max_length=40", cwd=bare)
    assert result.exit_code == 0, result.stderr
    assert "image photo-000.jpg can't be read: No such file or directory" in result.stdout
    report = run_cli("data", "show", "--count", "3", "-o", "stage2.max_length=40", "--json", cwd=bare).json()
    missing, broken, truncated = report["shown"]
    assert missing["images"] == [{"name": "photo-000.jpg", "problem": "No such file or directory"}]
    assert missing["left_out"] == "photo-000.jpg: No such file or directory"
    assert broken["images"][0]["problem"] in broken["left_out"]
    assert "max_length 40" in truncated["left_out"]
    assert (truncated["target_tokens"], truncated["tokens"]) == (0, 40)
    assert truncated["truncated_target_tokens"] > 0


def test_control_characters_are_escaped(bare: Path) -> None:
    records = json.loads((bare / "records.json").read_text())
    records[0]["id"] = "a\x1b[31m"
    records[0]["conversations"][1]["value"] = "red \x1b]0;owned\x07 \x9b31m"
    (bare / "records.json").write_text(json.dumps(records))
    for more in ([], ["--ids"]):
        shown = run_cli("data", "show", *more, cwd=bare).stdout
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
        assert "id a\\x1b[31m" in shown


def test_html_writes_a_self_contained_page(bare: Path) -> None:
    records = json.loads((bare / "records.json").read_text())
    records[0]["conversations"][1]["value"] = "<script>alert(1)</script>"
    (bare / "records.json").write_text(json.dumps(records))
    result = run_cli("data", "show", "--count", "2", "--html", "page/show.html", *LONG, cwd=bare)
    assert result.stdout == "page: page/show.html\n"
    page = (bare / "page/show.html").read_text()
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert page.count("<img ") == page.count("data:image/jpeg;base64,") == 2
    assert page.count("&lt;image × 4&gt;") == 2
    assert '<span class="target ' in page
    assert '<span class="target cut ' in page
    document = run_cli("data", "show", "--html", "show.html", "--json", cwd=bare).json()
    assert document["html"] == "show.html"
    denied = run_cli("data", "show", "--html", "recipe.yaml/show.html", cwd=bare)
    assert denied.exit_code == 1
    assert "recipe.yaml/show.html" in denied.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--sample", "nobody"], 1, "data.stage2 has no sample 'nobody'"),
        (["--sample", "12"], 1, "0 to 11"),
        (["-o", "data.stage2=[]", "--stage", "2"], 1, "data.stage2 has no source"),
        (["--stage", "3"], 2, "--stage"),
        (["--count", "0"], 2, "--count"),
        (["--epoch", "0"], 2, "--epoch"),
    ],
)
def test_invalid_arguments(bare: Path, arguments: list[str], code: int, message: str) -> None:
    result = run_cli("data", "show", *arguments, cwd=bare)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr


def test_the_default_stage_is_the_last_with_data(bare: Path) -> None:
    assert run_cli("data", "show", "-o", "data.stage2=[]", "--json", cwd=bare).json()["stage"] == 1


def test_samples_without_images_need_no_backbone(bare: Path) -> None:
    (bare / "clip/config.json").unlink()
    record = {"id": "t", "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}
    (bare / "records.json").write_text(json.dumps([record]))
    report = run_cli("data", "show", "--json", cwd=bare).json()
    assert report["image_tokens"] is None
    assert report["shown"][0]["target_tokens"] == 3


@pytest.mark.parametrize("more", [{}, {"select": "cls-patch"}, {"layer": [0, -1]}], ids=str)
def test_the_shape_from_the_configuration_equals_the_loaded_one(tmp_path: Path, more: dict[str, Any]) -> None:
    spec = {"name": "clip", "model": str(toy_clip(tmp_path / "clip", size=42)), **more}
    vision = registry().create("vision", spec)
    assert isinstance(vision, ShapedVision)
    assert vision.shape() == vision.load("cpu", "float32").shape  # type: ignore[attr-defined]


def test_a_backbone_without_a_shape_is_loaded(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llavactl.core.schema import FeatureShape

    class Loaded:
        def identity(self) -> dict[str, Any]:
            return {}

        def load(self, device: str, dtype: str) -> Any:
            return SimpleNamespace(shape=FeatureShape((3, 5), 8), preprocess=len, encode=len)

    monkeypatch.setattr("llavactl.curation.lengths.stage_vision", lambda recipe, stage: Loaded())
    assert run_cli("data", "show", "--json", cwd=bare).json()["image_tokens"] == 15
