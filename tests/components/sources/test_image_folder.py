"""The source image-folder: captions beside images and in tables, as people and programs write them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llavactl.core.errors import DataError
from llavactl.core.registry import registry
from llavactl.testing import check_source, run_cli


def source(folder: Path, **options: Any) -> Any:
    return registry().create("sources", {"name": "image-folder", "path": folder, **options})


def captions(folder: Path, **options: Any) -> dict[str, list[str]]:
    """The captions by image."""
    return {sample.images[0].name: list(sample.captions) for sample in source(folder, **options)}


@pytest.fixture
def photo(tmp_path: Path) -> Callable[..., Path]:
    """Writes a photo below ``photos/``; returns its path."""

    def write(name: str) -> Path:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (200, 30, 30)).save(path, "PNG" if path.suffix.lower() == ".png" else "JPEG")
        return path

    write("first.jpg")
    return write


@pytest.fixture
def photos(photo: Callable[..., Path], tmp_path: Path) -> Path:
    return tmp_path / "photos"


def test_text_files_beside_the_images(photo: Callable[..., Path], photos: Path) -> None:
    photo("a.JPG").with_suffix(".TXT").write_text("A dog.\n\nAn animal on grass.\n")
    photo("trip/Köln am Rhein.png").with_suffix(".caption").write_bytes(b"\xef\xbb\xbfThe cathedral.\r\n")
    photo("trip/b.jpeg").with_name("b.jpeg.txt").write_text("A bridge.")
    (photos / "first.txt").write_text("A red wall.")
    found = captions(photos)
    assert found == {
        "a.JPG": ["A dog.", "An animal on grass."],
        "first.jpg": ["A red wall."],
        "trip/Köln am Rhein.png": ["The cathedral."],
        "trip/b.jpeg": ["A bridge."],
    }
    assert check_source(source(photos)) == []
    samples = list(source(photos, every_caption=True))
    assert [sample.id for sample in samples][:2] == ["a.JPG#1", "a.JPG#2"]
    assert [sample.turns[1].text for sample in samples][:2] == ["A dog.", "An animal on grass."]
    assert samples[1].where == f"{photos / 'a.TXT'}:3"
    assert check_source(source(photos, every_caption=True)) == []


TABLES = {
    "metadata.csv": "file_name,text\nfirst.jpg,A wall.\n",
    "Metadata.CSV": '﻿file_name,text\r\nfirst.jpg,"A wall."\r\n',
    "metadata.jsonl": '{"file_name": "first.jpg", "text": "A wall."}\n',
    "captions.tsv": "image\tcaption\nfirst.jpg\tA wall.\n",
    "captions.txt": "image,caption\nfirst.jpg,A wall.\n",
    "captions.csv": "first.jpg;A wall.\n",
    "results.csv": "image_name| comment_number| comment\nfirst.jpg| 0| A wall.\n",
    "captions.json": '{"first.jpg": "A wall."}',
    "captions.jsonl": '{"image": "./first.jpg", "captions": ["A wall."]}',
    "labels.json": '[{"filename": "first.jpg", "description": " A  wall. ", "width": 8}]',
    "annotations.csv": "id,File Name,Caption,split\n1,first.jpg,A wall.,train\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str, photos: Path) -> None:
    (photos / name).write_text(TABLES[name], encoding="utf-8")
    assert captions(photos) == {"first.jpg": ["A wall."]}
    assert check_source(source(photos)) == []


def test_all_captions_of_an_image_are_combined(photo: Callable[..., Path], photos: Path) -> None:
    photo("second.jpg")
    (photos / "captions.csv").write_text(
        "image,caption\nfirst.jpg,A wall, which is red.\nfirst.jpg,Red.\nsecond.jpg,B.\n"
    )
    (photos / "first.txt").write_text("Red.\nBricks.\n")
    assert captions(photos) == {"first.jpg": ["A wall, which is red.", "Red.", "Bricks."], "second.jpg": ["B."]}


def test_names_are_relative_to_the_table_then_to_the_folder_then_unique(
    photo: Callable[..., Path], photos: Path
) -> None:
    for name in ("images/a.jpg", "images/b.jpg", "other/b.jpg", "other/c.jpg"):
        photo(name)
    rows = ["images/a.jpg,1", "b.jpg,2", "c.jpg,3", f"{photos}/first.jpg,4", "other\\b.jpg,5"]
    (photos / "images" / "metadata.csv").write_text("file_name,text\n" + "\n".join(rows) + "\n")
    assert captions(photos) == {
        "first.jpg": ["4"],
        "images/a.jpg": ["1"],
        "images/b.jpg": ["2"],
        "other/b.jpg": ["5"],
        "other/c.jpg": ["3"],
    }


def test_a_table_elsewhere_with_its_own_columns(photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "my table.csv"
    table.write_text("what,where,name\nA wall.,first.jpg,Ann\n")
    options = {"captions": table, "image_column": "where", "caption_column": "what"}
    assert captions(photos, **options) == {"first.jpg": ["A wall."]}
    with pytest.raises(DataError, match="what, where, name") as raised:
        captions(photos, captions=table, image_column="file")
    assert "image_column" in raised.value.hint


def test_composed_and_decomposed_names(photo: Callable[..., Path], photos: Path) -> None:
    photo("u\u0308ber.jpg")
    (photos / "metadata.csv").write_text("file_name,text\n\u00fcber.jpg,A wall.\n", encoding="utf-8")
    samples = list(source(photos))
    assert [sample.captions for sample in samples] == [("A wall.",)]
    assert samples[0].images[0].read()


def test_files_that_systems_add_are_ignored(photo: Callable[..., Path], photos: Path) -> None:
    for name in ("._first.jpg", ".hidden/a.jpg", "__MACOSX/first.jpg", "@eaDir/first.jpg"):
        photo(name)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "README.txt", "LICENSE"):
        (photos / name).write_text("no caption")
    (photos / "first.txt").write_text("A wall.")
    assert list(captions(photos)) == ["first.jpg"]
    assert run_check(photos)["problems"] == []


def run_check(photos: Path) -> dict[str, Any]:
    """The report of ``data check`` on a recipe with the folder as data of stage 1."""
    recipe = photos.parent / "check.yaml"
    recipe.write_text("name: check\ndata: {stage1: [{name: image-folder, path: photos}]}\n")
    result = run_cli("data", "check", "-r", str(recipe), "--json")
    assert result.stdout, result.stderr
    return result.json()


def test_check_lists_every_problem_with_its_line(
    photo: Callable[..., Path], photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b.jpg", "empty.jpg", "latin.jpg", "none.jpg"):
        photo(name)
    (photos / "broken.jpg").write_bytes(b"no image")
    (photos / "latin.txt").write_bytes("Ein grüner Hügel.".encode("latin-1"))
    (photos / "orphan.txt").write_text("Nothing here.")
    table = photos / "metadata.csv"
    table.write_text(
        "file_name,text\nfirst.jpg,A wall.\nb.jpg,B.\nb.jpg,B.\nempty.jpg,\nbroken.jpg,C.\nmissing.jpg,D.\n"
    )
    report = run_check(photos)
    locations = {problem["problem"]: problem["locations"] for problem in report["problems"]}
    assert {kind: len(where) for kind, where in locations.items()} == {
        "image-missing": 1,
        "image-broken": 1,
        "no-caption": 2,
        "no-image": 1,
        "duplicate-caption": 1,
        "encoding": 1,
    }
    assert locations["image-missing"][0].startswith(f"{table}:7: missing.jpg")
    assert locations["image-broken"][0].startswith(f"{table}:6: broken.jpg")
    assert locations["no-caption"][0].startswith(f"{table}:5: ")
    assert locations["no-caption"][1] == str(photos / "none.jpg")
    assert locations["no-image"] == [f"{photos / 'orphan.txt'}:1"]
    assert locations["duplicate-caption"][0].startswith(f"{table}:4: ")
    assert locations["encoding"] == [f"{photos / 'latin.txt'}:1"]
    assert report["records"] == 5
    assert not report["ok"]
    with caplog.at_level(logging.WARNING):
        found = captions(photos)
    assert found["latin.jpg"] == ["Ein grüner Hügel."]
    assert "2 images" in caplog.text
    assert "none.jpg" in caplog.text
    assert "orphan.txt:1" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("metadata.csv", "file_name,text\nfirst.jpg,A.\nfirst.jpg\n", 3),
        ("metadata.csv", 'file_name,text\nfirst.jpg,"A wall\nwith\nlines"\n../../secret.jpg,B.\n', 5),
        ("metadata.csv", "file_name,text\n,A.\n", 2),
        ("metadata.jsonl", '{"file_name": "first.jpg", "text": "A."}\n{"file_name": \n', 2),
        ("metadata.jsonl", '{"file_name": "first.jpg", "text": 3}\n', 1),
        ("captions.json", '{"first.jpg": "A.",\n"/etc/passwd.jpg": "B."}', 2),
    ],
    ids=["short row", "outside", "no name", "no JSON", "no string", "absolute"],
)
def test_rows_that_cannot_be_used_stop_the_run(name: str, text: str, line: int, photos: Path) -> None:
    (photos / name).write_text(text)
    with pytest.raises(DataError, match=f"{name}:{line}: "):
        list(source(photos))
    problems = [where for problem in run_check(photos)["problems"] for where in problem["locations"]]
    assert any(where.startswith(f"{photos / name}:{line}: ") for where in problems)
    assert check_source(source(photos)) == []


def test_a_likely_name_is_no_table_without_the_columns(photos: Path) -> None:
    (photos / "labels.csv").write_text("class,index\ndog,1\n")
    (photos / "first.txt").write_text("A wall.")
    assert captions(photos) == {"first.jpg": ["A wall."]}
    (photos / "captions.csv").write_text("class,index\ndog,1\n")
    with pytest.raises(DataError, match=r"captions.csv:1: .*class, index"):
        captions(photos)


def test_coco_annotations_belong_to_another_source(photos: Path) -> None:
    (photos / "captions.json").write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(DataError) as raised:
        captions(photos)
    assert "`coco`" in raised.value.hint


def test_a_folder_without_captions_images_or_existence(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 image, but no captions") as raised:
        captions(photos)
    assert "metadata.csv" in raised.value.hint
    assert "teacher" in raised.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        captions(tmp_path / "empty")
    with pytest.raises(DataError, match="no such folder"):
        captions(tmp_path / "missing")
    with pytest.raises(DataError, match="a file"):
        captions(photos / "first.jpg")


def test_links_lead_outside_only_if_allowed(photo: Callable[..., Path], photos: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    photo("first.jpg").rename(outside / "a.jpg")
    photo("inside.jpg").with_suffix(".txt").write_text("Inside.")
    (photos / "link.jpg").symlink_to(outside / "a.jpg")
    (photos / "folder").symlink_to(outside)
    (photos / "loop").symlink_to(photos)
    (photos / "link.txt").write_text("A wall.")
    (outside / "a.txt").write_text("Outside.")
    (sample,) = (each for each in source(photos) if each.id == "link.jpg")
    with pytest.raises(DataError, match="outside"):
        sample.images[0].read()
    assert "image-link" in {problem["problem"] for problem in run_check(photos)["problems"]}
    followed = captions(photos, follow_links=True)
    assert followed == {"folder/a.jpg": ["Outside."], "inside.jpg": ["Inside."], "link.jpg": ["A wall."]}
    assert all(each.images[0].read() for each in source(photos, follow_links=True))


def test_the_identity_changes_with_images_and_captions(photo: Callable[..., Path], photos: Path) -> None:
    (photos / "first.txt").write_text("A wall.")
    before = source(photos).identity()
    assert source(photos).identity() == before
    (photos / "first.txt").write_text("A red wall.")
    changed = source(photos).identity()
    photo("b.jpg").with_suffix(".txt").write_text("B.")
    assert len({json.dumps(each) for each in (before, changed, source(photos).identity())}) == 3


def test_captions_for_a_teacher_and_as_llava_records(photos: Path, tmp_path: Path) -> None:
    (photos / "first.txt").write_text("A wall.\nBricks.\n")
    recipe = tmp_path / "recipe.yaml"
    (tmp_path / "replies.jsonl").write_text(
        json.dumps({"id": "first.jpg-detail", "reply": "A red brick wall fills the whole photo."}) + "\n"
    )
    recipe.write_text(
        "name: captions\n"
        "data: {stage1: [{name: image-folder, path: photos}]}\n"
        "generate:\n"
        "  source: {name: image-folder, path: photos}\n"
        "  teacher: {name: replay, path: replies.jsonl}\n"
        "  kinds: {detail: 1}\n"
        "  out: instruct.jsonl\n"
    )
    out = tmp_path / "balanced.jsonl"
    result = run_cli("data", "filter", "-r", str(recipe), "--out", str(out), "--at-least", "1")
    assert result.exit_code == 0, result.stderr
    assert json.loads(out.read_text())["image"] == "first.jpg"
    stats = run_cli("data", "stats", "-r", str(recipe), "--json")
    assert stats.exit_code == 0, stats.stderr
    generated = run_cli("data", "generate", "-r", str(recipe), "--json")
    assert generated.exit_code == 0, generated.stderr
    (record,) = map(json.loads, (tmp_path / "instruct.jsonl").read_text().splitlines())
    assert record["image"] == "first.jpg"
