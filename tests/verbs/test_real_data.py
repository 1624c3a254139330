"""The complete pipeline on COCO captions, some of whose images are missing, synthetic and real."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.registry import registry
from llavactl.core.schema import IMAGE_TOKEN
from llavactl.data.encode import Encoding
from llavactl.data.image_order import arrange
from llavactl.testing import run_cli, toy_clip, toy_language

DATA = Path(__file__).parents[3] / "shared" / "data"
FIXTURES = Path(__file__).parents[1] / "fixtures"
real = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")


@dataclass(frozen=True)
class Project:
    """A folder with a recipe over COCO captions, and its annotated images, some of which are missing."""

    folder: Path
    images: Path
    annotated: int


@pytest.fixture(params=["fixture", pytest.param("real", marks=real)])
def project(request: pytest.FixtureRequest, toys: Path, tmp_path: Path) -> Project:
    """The real files are COCO-MINI: 80 annotated images, of which 26 exist."""
    toy_clip(tmp_path / "clip", size=56)
    toy_language(tmp_path / "language")
    if request.param == "real":
        file, images = DATA / "coco-mini/annotations/captions_train2017.json", DATA / "coco-mini/train2017"
    else:
        file, images = FIXTURES / "coco_captions.json", toys / "images"
    captions = json.loads(file.read_text())
    names = {image["id"]: image["file_name"] for image in captions["images"]}
    records = [
        {
            "id": note["id"],
            "image": names[note["image_id"]],
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe it."},
                {"from": "gpt", "value": note["caption"]},
            ],
        }
        for note in captions["annotations"]
    ]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = f"{{name: llava-json, path: captions.jsonl, images: {images}}}"
    (tmp_path / "recipe.yaml").write_text(f"""\
name: coco
vision: {{name: clip, model: clip, image: pad}}
connector: {{name: linear}}
language: {{name: hf, model: language, template: tokenizer}}
data: {{stage1: [{source}], stage2: [{source}]}}
stage1: {{image: square, batch_size: 16, micro_batch_size: 8, max_steps: 3, checkpoint_every: 2}}
stage2: {{batch_size: 16, micro_batch_size: 8, max_steps: 3, checkpoint_every: 2, image_order: random}}
""")
    return Project(tmp_path, images, len(names))


def test_run_with_missing_images(project: Project) -> None:
    folder = project.folder
    result = run_cli("run", "--json", cwd=folder)
    assert result.exit_code == 0, result.stderr
    report = result.json()
    existing = {path.name for path in project.images.iterdir()}
    missing = project.annotated - len(existing)
    assert missing > 0
    assert (report["extract"]["images"], report["extract"]["skipped"]) == (project.annotated, missing)
    assert len(report["extract"]["stores"]) == 2, "stage 1 crops and stage 2 pads: two fingerprints"
    skipped = [json.loads(line) for line in (folder / "runs/coco/skipped.jsonl").read_text().splitlines()]
    assert len(skipped) == missing
    assert not existing & {each["image"] for each in skipped}
    for stage in ("stage1", "stage2"):
        assert report[stage]["skipped_samples"] == missing * 5
        left_out = [
            json.loads(line) for line in (folder / f"runs/coco/{stage}/left_out.jsonl").read_text().splitlines()
        ]
        assert len(left_out) == missing * 5
        assert left_out[0].keys() == {"id", "where", "reason"}
        assert not existing & {each["reason"].partition(":")[0] for each in left_out}
        assert report[stage]["samples"] + report[stage]["validation_samples"] == len(existing) * 5
        assert report[stage]["steps"] == 3
    photo = min(project.images.iterdir())
    answer = run_cli(
        "chat", "--image", str(photo), "--prompt", "What is it?", "--json", "--max-new-tokens", "5", cwd=folder
    )
    assert answer.exit_code == 0, answer.stderr
    assert isinstance(answer.json()["answer"], str)
    again = run_cli("run", "--json", cwd=folder).json()
    assert again["extract"]["encoded"] == 0
    assert again["stage1"]["finished_before"] is again["stage2"]["finished_before"] is True


@pytest.mark.parametrize(
    "file",
    [
        FIXTURES / "instruct.json",
        FIXTURES / "pretrain.json",
        pytest.param(DATA / "llava/llava_instruct_100.json", marks=real),
        pytest.param(DATA / "llava/blip_laion_cc_sbu_2k.json", marks=real),
    ],
    ids=lambda file: file.name,
)
@pytest.mark.parametrize("template", ["plain", "vicuna-v1", "tokenizer"])
def test_records_are_encoded_completely(toys: Path, file: Path, template: str) -> None:
    source = registry().create("sources", {"name": "llava-json", "path": str(file)})
    tokenizer: Any = registry().create("languages", {"name": "hf", "model": str(toys / "language")}).tokenizer()
    encoding = Encoding(registry().create("templates", {"name": template}), tokenizer, 4)
    records = json.loads(file.read_text(encoding="utf-8"))
    samples = list(source)[:300]
    assert [sample.id for sample in samples] == [record["id"] for record in records][:300]
    for sample, record in zip(samples, records, strict=False):
        encoded = encoding.encode(arrange(sample.turns, "first", ""))
        assert sum(token == IMAGE_TOKEN for token in encoded.ids) == 4
        answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
        target_text = tokenizer.decode([label for label in encoded.labels if label >= 0])
        at = 0
        for answer in answers:
            at = target_text.index(answer, at) + len(answer)
