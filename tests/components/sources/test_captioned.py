"""The sources coco and caps-boxes: real files, invalid files, and images in archives and at URLs."""

from __future__ import annotations

import json
import logging
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest

from llavactl.core.errors import DataError
from llavactl.core.registry import registry
from llavactl.core.schema import Sample
from llavactl.testing import check_source

FIXTURES = Path(__file__).parents[2] / "fixtures"
DATA = Path(__file__).parents[4] / "shared" / "data"
COCO = DATA / "coco-mini"
real = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")


def source(name: str, **options: Any) -> list[Sample]:
    return list(registry().create("sources", {"name": name, **options}))


@dataclass(frozen=True)
class CocoFiles:
    """COCO annotations: the number of annotated images, and of those that exist in ``images``."""

    captions: Path
    instances: Path
    images: Path
    annotated: int
    existing: int
    crowds: int

    def samples(self, **options: Any) -> list[Sample]:
        return source("coco", captions=self.captions, instances=self.instances, **options)


@pytest.fixture(params=["fixture", pytest.param("real", marks=real)])
def coco(request: pytest.FixtureRequest, toys: Path) -> CocoFiles:
    if request.param == "fixture":
        files = FIXTURES / "coco_captions.json", FIXTURES / "coco_instances.json"
        return CocoFiles(*files, toys / "images", annotated=16, existing=12, crowds=4)
    folder = COCO / "annotations"
    files = folder / "captions_train2017.json", folder / "instances_train2017.json"
    return CocoFiles(*files, COCO / "train2017", annotated=80, existing=26, crowds=8)


def test_coco_files(coco: CocoFiles, caplog: pytest.LogCaptureFixture) -> None:
    samples = coco.samples(images=coco.images)
    assert len(samples) == coco.existing
    assert f"{coco.annotated - coco.existing} of {coco.annotated} images" in caplog.text
    assert check_source(samples) == []
    assert all(len(sample.captions) >= 5 and sample.images[0].read()[:2] == b"\xff\xd8" for sample in samples)
    assert len(coco.samples()) == coco.annotated, "without an image folder, no image is missing"
    assert len(coco.samples(images=coco.images, missing=True)) == coco.annotated
    boxes = [box for sample in coco.samples() for box in sample.boxes]
    assert all(0 <= edge <= 1 for box in boxes for edge in box.xyxy)
    assert not any(box.crowd for box in boxes)
    crowds = [box for sample in coco.samples(crowds=True) for box in sample.boxes if box.crowd]
    assert len(crowds) == coco.crowds
    large = [box for sample in coco.samples(min_area=0.1) for box in sample.boxes]
    assert 0 < len(large) < len(boxes)


def test_coco_boxes_become_shares_of_the_image(coco: CocoFiles) -> None:
    document = json.loads(coco.instances.read_text())
    row = next(each for each in document["annotations"] if not each["iscrowd"])
    image = next(each for each in document["images"] if each["id"] == row["image_id"])
    left, top, width, height = row["bbox"]
    expected = (left / image["width"], top / image["height"])
    expected += ((left + width) / image["width"], (top + height) / image["height"])
    sample = next(each for each in coco.samples() if each.id == Path(image["file_name"]).stem)
    assert any(box.xyxy == pytest.approx(expected, abs=1e-6) for box in sample.boxes)


@pytest.mark.parametrize(
    ("file", "count"),
    [
        (FIXTURES / "caps_boxes.jsonl", 3),
        pytest.param(DATA / "llava" / "caps_boxes_coco2014_val_80.jsonl", 80, marks=real),
    ],
    ids=["fixture", "real"],
)
def test_caps_boxes_file(file: Path, count: int) -> None:
    samples = source("caps-boxes", path=file)
    assert len(samples) == count
    assert check_source(samples) == []
    first = json.loads(file.read_text().splitlines()[0])
    assert list(samples[0].captions) == first["captions"]
    assert samples[0].boxes[0].xyxy == tuple(first["instances"][0]["bbox"])


@pytest.mark.parametrize(
    ("pretrain", "instruct"),
    [
        (FIXTURES / "pretrain.json", FIXTURES / "instruct.json"),
        pytest.param(
            DATA / "llava" / "blip_laion_cc_sbu_2k.json", DATA / "llava" / "llava_instruct_100.json", marks=real
        ),
    ],
    ids=["fixture", "real"],
)
def test_only_single_answers_are_captions(pretrain: Path, instruct: Path) -> None:
    samples = source("llava-json", path=pretrain)
    assert all(sample.captions == (sample.turns[-1].text.strip(),) for sample in samples)
    conversations = source("llava-json", path=instruct)
    assert not any(sample.captions for sample in conversations if len(sample.turns) > 2)


def write(folder: Path, captions: Any = None, instances: Any = None) -> dict[str, Any]:
    images = [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 50}]
    captions = [{"image_id": 1, "caption": " A  dog. "}] if captions is None else captions
    (folder / "c.json").write_text(json.dumps({"images": images, "annotations": captions}))
    document = {"images": images, "annotations": instances or [], "categories": [{"id": 7, "name": "dog"}]}
    (folder / "i.json").write_text(json.dumps(document))
    return {"captions": folder / "c.json", "instances": folder / "i.json"}


def box(*bbox: float, **more: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": 7, "bbox": list(bbox), "segmentation": [[1.0] * 9], **more}


def test_boxes_are_clipped_and_empty_ones_removed(tmp_path: Path) -> None:
    instances = [
        box(50, 25, 80, 50),
        box(10, 10, 0, 5),
        box(200, 10, 5, 5),
        box(0, 0, 1, 1),
        box(0, 0, 9, 9, iscrowd=1),
    ]
    options = write(tmp_path, instances=instances)
    (sample,) = source("coco", **options)
    assert sample.captions == ("A dog.",)
    assert [each.xyxy for each in sample.boxes] == [(0.5, 0.5, 1.0, 1.0), (0.0, 0.0, 0.01, 0.02)]
    (sample,) = source("coco", **options, min_area=0.01)
    assert len(sample.boxes) == 1


def test_every_invalid_coco_entry_is_reported(tmp_path: Path) -> None:
    invalid = [box(0, 0, 1), box(0, 0, "x", 1), box(0, 0, 1, float("nan")), box(0, 0, 1, 1, category_id=8),  # type: ignore[arg-type]
             box(0, 0, 1, 1, image_id=2), {"image_id": 1}, 7]  # fmt: skip
    options = write(tmp_path, captions=[{"image_id": 1}, {"image_id": 1, "caption": 7}], instances=invalid)
    with pytest.raises(DataError) as caught:
        source("coco", **options)
    for number in range(7):
        assert f"i.json annotation {number}: " in caught.value.message
    for number in range(2):
        assert f"c.json annotation {number}: " in caught.value.message


@pytest.mark.parametrize("text", ["", "{", "[]", '{"images": 7}', "\xff", "[" * 100_000])
def test_files_of_other_formats_are_refused(tmp_path: Path, text: str) -> None:
    options = write(tmp_path)
    (tmp_path / "i.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"i\.json"):
        source("coco", **options)
    with pytest.raises(DataError, match=r"none\.json"):
        source("coco", captions=tmp_path / "none.json")
    with pytest.raises(DataError, match=str(tmp_path / "none")):
        source("coco", **write(tmp_path), images=tmp_path / "none")


def test_an_image_path_outside_the_root_is_refused(tmp_path: Path) -> None:
    options = write(tmp_path)
    text = (tmp_path / "c.json").read_text().replace("a.jpg", "../../etc/passwd")
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DataError, match=r"c\.json image 0: .*etc/passwd"):
        source("coco", **options)


def test_every_invalid_caps_boxes_record_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = {
        "id": "a",
        "image": "a.jpg",
        "captions": ["A dog."],
        "instances": [{"category": "dog", "bbox": [0, 0, 1, 1]}],
    }
    rows = [
        good, {}, 7, {**good, "captions": "A dog."}, {**good, "captions": [], "instances": []},
        {**good, "instances": [{"category": "dog", "bbox": [0, 0, 640, 480]}]}, {**good, "image": "/etc/passwd"},
        {**good, "instances": [{"bbox": [0, 0, 1, 1]}]}, {**good, "instances": 7},
        {**good, "instances": [{"category": "dog", "bbox": [0.5, 0.5, 0.2, 0.9]}]},
    ]  # fmt: skip
    path = tmp_path / "caps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        source("caps-boxes", path=path)
    assert [f"caps.jsonl:{n}: " in caught.value.message for n in range(1, 11)] == [False] + [True] * 9
    path.write_text(f"{json.dumps(good)}\n{{broken\n7\n")
    with pytest.raises(DataError, match=r"caps.jsonl:2: (.|\n)*caps.jsonl:3: "):
        source("caps-boxes", path=path)
    path.write_text(json.dumps([good]))
    assert len(source("caps-boxes", path=path)) == 1
    caplog.set_level(logging.WARNING)
    assert source("caps-boxes", path=path, images=tmp_path) == []
    assert "1 of 1 images" in caplog.text


@pytest.mark.parametrize("kind", ["coco", "caps-boxes"])
@pytest.mark.parametrize("place", ["images.zip", "i*.zip", "memory://captioned"])
def test_images_in_archives_and_at_urls(tmp_path: Path, place: str, kind: str) -> None:
    memory = fsspec.filesystem("memory")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        file.writestr("a.jpg", b"an image")
    memory.pipe("/captioned/a.jpg", b"an image")
    names = ["a.jpg", "not there.jpg"]
    if kind == "coco":
        document = {
            "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
            "annotations": [{"image_id": number, "caption": "A dog."} for number in range(2)],
        }
        (tmp_path / "c.json").write_text(json.dumps(document))
        options = {"captions": tmp_path / "c.json"}
    else:
        (tmp_path / "b.json").write_text(json.dumps([{"image": name, "captions": ["A dog."]} for name in names]))
        options = {"path": tmp_path / "b.json"}
    images = place if "://" in place else str(tmp_path / place)
    (sample,) = source(kind, **options, images=images)
    assert [(image.name, image.read()) for image in sample.images] == [("a.jpg", b"an image")]
    assert len(source(kind, **options, images=images, missing=True)) == 2
    memory.rm("/captioned", recursive=True)
