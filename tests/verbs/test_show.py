"""``data show`` says what training sees, from tokenizer and configurations alone."""

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
    """The toy without a weight."""
    for weights in toy.rglob("*.safetensors"):
        weights.unlink()
    return toy


def test_it_prints_what_is_trained_between_marks(bare: Path) -> None:
    result = run_cli("data", "show", cwd=bare)
    assert result.exit_code == 0, result.stderr
    assert "\x1b" not in result.stdout, "no colours where there is no terminal"
    head, _, text = result.stdout.partition("\n\n")
    assert "sample 0 of 12, id r0, " in head
    assert "stage 2, template vicuna-v1, image order first, epoch 1: 80 tokens, 12 trained" in head
    said = text.replace("·", "").replace("\\n", "").replace("\n", "")
    assert "USER: <image x 4>What colour is the picture? ASSISTANT:« The picture is red.</s>»USER: " in said
    assert said.count("«") == said.count("»") == 2


def test_every_piece_is_a_token_that_training_sees(toy: Path) -> None:
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
            kept = [piece for piece in each.pieces if not piece.cut]
            assert [piece.id for piece in kept for _ in range(piece.tokens)] == list(encoded.ids)
            marks = [piece.trained for piece in kept for _ in range(piece.tokens)]
            assert marks == [label != IGNORE for label in encoded.labels]
            assert (each.tokens, each.trained) == (len(encoded), encoded.target_tokens)


def test_ids_are_a_line_each_and_the_image_is_one(bare: Path) -> None:
    lines = run_cli("data", "show", "--sample", "r3", "--ids", *LONG, cwd=bare).stdout.splitlines()
    rows = lines[lines.index("") + 1 :]
    (image,) = [row for row in rows if "<image x 4> photo-003.jpg" in row]
    at = int(image.split()[0])
    assert rows[rows.index(image) + 1].split()[0] == str(at + 4)
    assert re.fullmatch(r" +\d+ +1  \*  \"</s>\"", rows[-1])
    cut = rows.index("--- cut ---")
    assert rows[cut + 1].split()[0] == "80"
    assert any(line.startswith("max_length 80 cuts ") for line in lines)


def test_json_is_the_whole_report(bare: Path) -> None:
    report = run_cli("data", "show", "--stage", "1", "--sample", "2", "--count", "20", "--json", cwd=bare).json()
    assert (report["stage"], report["template"], report["image_tokens"], report["samples"]) == (1, "plain", 4, 12)
    assert [each["number"] for each in report["shown"]] == list(range(2, 12))
    first = report["shown"][0]
    assert "".join(piece["text"] for piece in first["pieces"] if piece["trained"]) == "The picture is blue.\n" * 2
    assert first["tokens"] == sum(piece["tokens"] for piece in first["pieces"])


def test_a_random_order_changes_with_the_epoch(bare: Path) -> None:
    def sides(epoch: int) -> list[bool]:
        arguments = ["--count", "12", "--epoch", str(epoch), "-o", "stage2.image_order=random", "--json"]
        shown = run_cli("data", "show", *arguments, cwd=bare).json()["shown"]
        return [[bool(p["image"]) for p in each["pieces"]].index(True) > 45 for each in shown]

    assert sides(1) == sides(1)
    assert len({tuple(sides(epoch)) for epoch in (1, 2, 3)}) > 1


def test_missing_and_broken_images_and_lost_targets_are_told(bare: Path) -> None:
    (bare / "images/photo-000.jpg").unlink()
    (bare / "images/photo-001.jpg").write_bytes(b"no picture")
    result = run_cli("data", "show", "--count", "3", "-o", "stage2.max_length=40", cwd=bare)
    assert result.exit_code == 0, result.stderr
    assert "image photo-000.jpg can't be read: No such file or directory" in result.stdout
    assert "left out of training: photo-000.jpg: No such file or directory" in result.stdout
    assert "image photo-001.jpg can't be read: " in result.stdout
    assert "max_length 40" in result.stdout


def test_what_a_terminal_would_obey_is_spelled(bare: Path) -> None:
    records = json.loads((bare / "records.json").read_text())
    records[0]["id"] = "a\x1b[31m"
    records[0]["conversations"][1]["value"] = "red \x1b]0;owned\x07 \x9b31m"
    (bare / "records.json").write_text(json.dumps(records))
    for more in ([], ["--ids"]):
        shown = run_cli("data", "show", *more, cwd=bare).stdout
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
        assert "id a\\x1b[31m" in shown


def test_html_is_a_page_of_its_own(bare: Path) -> None:
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
    assert denied.stderr.startswith("error: recipe.yaml/show.html can't be written: ")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ["--sample", "nobody"],
            1,
            "error: data.stage2 has no sample 'nobody'\nhint: say a number from 0 to 11",
        ),
        (["--sample", "12"], 1, "error: data.stage2 has no sample '12'"),
        (["-o", "data.stage2=[]", "--stage", "2"], 1, "error: data.stage2 names no source"),
        (["--stage", "3"], 2, "Usage: llavactl data show"),
        (["--count", "0"], 2, "Usage: llavactl data show"),
        (["--epoch", "0"], 2, "Usage: llavactl data show"),
    ],
)
def test_what_cannot_be_shown(bare: Path, arguments: list[str], code: int, said: str) -> None:
    result = run_cli("data", "show", *arguments, cwd=bare)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(said)


def test_without_a_stage_it_is_the_last_with_data(bare: Path) -> None:
    assert run_cli("data", "show", "-o", "data.stage2=[]", "--json", cwd=bare).json()["stage"] == 1


def test_samples_without_an_image_ask_nothing_of_the_backbone(bare: Path) -> None:
    (bare / "clip/config.json").unlink()
    asked = {"id": "t", "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}
    (bare / "records.json").write_text(json.dumps([asked]))
    report = run_cli("data", "show", "--json", cwd=bare).json()
    assert report["image_tokens"] is None
    assert report["shown"][0]["trained"] == 3


@pytest.mark.parametrize("more", [{}, {"select": "cls-patch"}, {"layer": [0, -1]}], ids=str)
def test_a_backbone_is_measured_as_it_is_loaded(tmp_path: Path, more: dict[str, Any]) -> None:
    spec = {"name": "clip", "model": str(toy_clip(tmp_path / "clip", size=42)), **more}
    vision = registry().create("vision", spec)
    assert isinstance(vision, ShapedVision)
    assert vision.shape() == vision.load("cpu", "float32").shape  # type: ignore[attr-defined]


def test_a_backbone_that_cannot_be_measured_is_loaded(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llavactl.core.schema import FeatureShape

    class Loaded:
        def identity(self) -> dict[str, Any]:
            return {}

        def load(self, device: str, dtype: str) -> Any:
            return SimpleNamespace(shape=FeatureShape((3, 5), 8), preprocess=len, encode=len)

    monkeypatch.setattr("llavactl.curation.lengths.stage_vision", lambda recipe, stage: Loaded())
    assert run_cli("data", "show", "--json", cwd=bare).json()["image_tokens"] == 15
