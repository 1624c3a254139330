"""Tar shards: members of a key, cached indexes, damaged and malicious archives."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from llavactl_sources import tars

from llavactl import DataError
from llavactl.testing import check_source, run_cli

DIALOG = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]


def write(path: Path, members: Mapping[str, bytes | str | dict[str, Any]] | Sequence[Any]) -> Path:
    """A tar file of ``members``; TarInfo values are added as they are."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            text = json.dumps(content) if isinstance(content, dict) else content
            data = text.encode() if isinstance(text, str) else text
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def source_of(create: Any, tmp_path: Path) -> Callable[..., Any]:
    """A function that writes a shard, and returns its source."""

    def source(members: Any, **options: Any) -> Any:
        return create("webdataset", path=write(tmp_path / "shard.tar", members), **options)

    return source


@pytest.fixture
def jpeg(photos: Sequence[Path]) -> bytes:
    return photos[0].read_bytes()


@pytest.mark.parametrize(
    ("members", "caption"),
    [
        ({"txt": " A dog. \n"}, "A dog."),
        ({"caption": "A dog."}, "A dog."),
        ({"json": {"caption": "A dog.", "url": "https://example.org/x.jpg", "key": "0", "prompt_id": 1}}, "A dog."),
        ({"txt": "A dog.", "json": {"caption": "A cat.", "prompt": "x"}}, "A dog."),
        ({"json": {"conversations": DIALOG, "image": "elsewhere/x.jpg"}}, "A dog."),
        (
            {"json": {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]}},
            "A dog.",
        ),
    ],
)
@pytest.mark.parametrize("key", ["000000007", "./a/b/7", "7"])
def test_captions_and_conversations(
    source_of: Any, kinds: Any, jpeg: bytes, members: Any, caption: str, key: str
) -> None:
    source = source_of({f"{key}.JPG": jpeg, **{f"{key}.{extension}": each for extension, each in members.items()}})
    assert check_source(source) == []
    (sample,) = source
    assert (sample.id, sample.captions) == (key.removeprefix("./"), (caption,))
    assert sample.turns[1].text == caption
    (image,) = sample.images
    assert image.read() == jpeg
    assert pickle.loads(pickle.dumps(image)) == image
    assert sample.where.endswith(f"shard.tar {sample.id}")


def test_the_caption_key(source_of: Any, jpeg: bytes) -> None:
    source = source_of({"0.jpg": jpeg, "0.json": {"alt": "A dog.", "caption": "A cat."}}, caption_key="alt")
    assert [sample.captions for sample in source] == [("A dog.",)]


def test_members_of_a_key_may_be_apart_and_hidden_files_are_ignored(source_of: Any, photos: Sequence[Path]) -> None:
    data = [photo.read_bytes() for photo in photos]
    members = {"a/0.jpg": data[0], "b/0.jpg": data[1], "b/0.txt": "B.", "a/0.txt": "A."}
    source = source_of({"README": "x", **members, "a/._0.jpg": b"x", "__MACOSX/a/0.jpg": b"x", ".DS_Store": b"x"})
    assert [(sample.id, sample.captions, sample.images[0].read()) for sample in source] == [
        ("a/0", ("A.",), data[0]),
        ("b/0", ("B.",), data[1]),
    ]


def test_several_images_and_text_only(source_of: Any, photos: Sequence[Path]) -> None:
    two = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "The first."}]
    one, other = photos[0].read_bytes(), photos[1].read_bytes()
    source = source_of(
        {
            "0.left.jpg": one,
            "0.right.png": other,
            "0.json": {"conversations": two},
            "1.json": {"conversations": [{"from": "human", "value": "Hi"}, DIALOG[1]]},
        }
    )
    assert check_source(source) == []
    assert [[image.read() for image in sample.images] for sample in source] == [[one, other], []]


@pytest.mark.parametrize(
    ("kind", "members"),
    [
        ("json", {"0.jpg": b"x", "0.json": "{"}),
        ("json", {"0.jpg": b"x", "0.json": "[1]"}),
        ("json", {"0.jpg": b"x", "0.txt": b"\xff\xfe"}),
        ("json", {"0.json": {"conversations": DIALOG, "image": "a.jpg"}}),
        ("json", [("0.jpg", b"x"), ("0.jpg", b"y"), ("0.txt", "A dog.")]),
        ("record", {"0.jpg": b"x"}),
        ("record", {"0.txt": "A dog without an image."}),
        ("record", {"0.jpg": b"x", "0.cls": "3"}),
        ("no-answer", {"0.jpg": b"x", "0.txt": " "}),
        ("tags", {"0.a.jpg": b"x", "0.b.jpg": b"y", "0.json": {"conversations": DIALOG}}),
        ("message", {"0.jpg": b"x", "0.json": {"caption": 3, "question": "What?"}}),
    ],
)
def test_keys_that_can_not_be_used_are_located(
    source_of: Any, kinds: Any, jpeg: bytes, kind: str, members: Any
) -> None:
    listed = list(members.items()) if isinstance(members, Mapping) else members
    source = source_of([*listed, ("1.jpg", jpeg), ("1.txt", "A cat.")])
    assert kind in kinds(source)[0]
    assert kinds(source)[1] == []
    assert check_source(source) == []
    with pytest.raises(DataError, match=r"shard\.tar 0: "):
        list(source)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("name", ["0.jpg", "0.txt"])
def test_links_are_not_followed(
    source_of: Any, kinds: Any, jpeg: bytes, kind: bytes, name: str, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes(jpeg)
    link = tarfile.TarInfo(name)
    link.type, link.linkname = kind, str(tmp_path / "secret")
    members = {"0.jpg": jpeg, "0.txt": "A dog.", name: link}
    assert kinds(source_of(members)) == [["json"]]


def test_names_that_lead_outside_are_only_names(source_of: Any, jpeg: bytes, tmp_path: Path) -> None:
    source = source_of({"../../evil.jpg": jpeg, "../../evil.txt": "A dog.", "/etc/0.jpg": jpeg, "/etc/0.txt": "A cat."})
    before = sorted(tmp_path.rglob("*.jpg"))
    assert [image.read() for sample in source for image in sample.images] == [jpeg, jpeg]
    assert sorted(tmp_path.rglob("*.jpg")) == before


def test_large_members_are_refused_without_reading(source_of: Any, kinds: Any, jpeg: bytes, monkeypatch: Any) -> None:
    monkeypatch.setattr(tars, "_MAX_TEXT_BYTES", 100)
    monkeypatch.setattr(tars, "MAX_IMAGE_BYTES", 10)
    source = source_of({"0.jpg": jpeg, "0.txt": "A dog.", "1.jpg": jpeg, "1.txt": "x" * 101})
    assert kinds(source) == [[], ["json"]]
    with pytest.raises(OSError, match="larger"):
        source.sample(next(source.records())).images[0].read()


def test_damaged_shards_are_located_and_the_others_are_read(
    create: Any, kinds: Any, jpeg: bytes, tmp_path: Path
) -> None:
    for name in "abcdef":
        write(
            tmp_path / f"{name}.tar",
            {f"{name}0.jpg": jpeg, f"{name}0.txt": "A.", f"{name}1.jpg": jpeg, f"{name}1.txt": "B."},
        )
    whole = (tmp_path / "a.tar").read_bytes()
    third_header = 2 * tarfile.BLOCKSIZE + tarfile.BLOCKSIZE * -(-len(jpeg) // tarfile.BLOCKSIZE) + tarfile.BLOCKSIZE
    (tmp_path / "b.tar").write_bytes(whole[: third_header + 700])
    (tmp_path / "c.tar").write_bytes(whole[:third_header] + b"damaged" + whole[third_header + 7 :])
    (tmp_path / "d.tar").write_bytes(b"<html>")
    (tmp_path / "e.tar").write_bytes(b"")
    source = create("webdataset", path=tmp_path)
    problems = {Path(record.where.split(" ")[0]).name: record.problem for record in source.records() if record.problem}
    assert problems.keys() == {"b.tar", "c.tar", "d.tar", "e.tar"}
    usable = ["a.tar a0", "a.tar a1", "b.tar a0", "c.tar a0", "f.tar f0", "f.tar f1"]
    records = [record for record in source.records() if not record.problem and not source.examine(record)[0]]
    assert [record.where.rpartition("/")[2] for record in records] == usable
    assert [record.index for record in source.records()] == list(range(len(kinds(source))))
    with pytest.raises(DataError, match=r"b\.tar"):
        list(source)


def test_the_index_of_a_shard_is_cached_until_it_changes(source_of: Any, jpeg: bytes, monkeypatch: Any) -> None:
    scanned: list[Path] = []
    scan = tars._scan
    monkeypatch.setattr(tars, "_scan", lambda shard: scanned.append(shard) or scan(shard))
    source = source_of({"0.jpg": jpeg, "0.txt": "A dog."})
    first = list(source)
    assert list(source) == first
    assert len(scanned) == 1
    identity, image, stamp = source.identity(), first[0].images[0], first[0].images[0].stamp()
    write(source.options.path, {"0.jpg": jpeg, "0.txt": "A dog.", "1.jpg": jpeg, "1.txt": "A cat."})
    assert len(list(source)) == 2
    assert len(scanned) == 2
    assert source.identity() != identity
    assert image.stamp() != stamp
    with pytest.raises(OSError, match="changed"):
        image.read()


@pytest.mark.parametrize("damage", ["", "[]", '{"stamp": 3}', "\xff"])
def test_a_damaged_cache_is_written_again(source_of: Any, jpeg: bytes, home: Path, damage: str) -> None:
    source = source_of({"0.jpg": jpeg, "0.txt": "A dog."})
    first = list(source)
    for cached in home.rglob("tar-indexes/*.json"):
        cached.write_text(damage, encoding="latin-1")
        assert list(source) == first
        assert cached.read_text() not in ("", damage)


def test_the_cache_is_optional(source_of: Any, jpeg: bytes, home: Path) -> None:
    home.parent.mkdir(exist_ok=True)
    home.write_text("a file")
    assert len(list(source_of({"0.jpg": jpeg, "0.txt": "A dog."}))) == 1


def test_filtered_captions_refer_to_members(source_of: Any, jpeg: bytes, tmp_path: Path) -> None:
    """`data filter` writes records that `llava-json` reads from the same shards after `data expand`."""
    source = source_of(
        {f"{index}.{kind}": each for index in range(3) for kind, each in (("jpg", jpeg), ("txt", "A red dog."))}
    )
    records = tmp_path / "captions.json"
    records.write_text(json.dumps([record.value for record in source.records()]))
    expanded = run_cli("data", "expand", str(records), "--out", str(tmp_path / "stage1.json"), cwd=tmp_path)
    assert expanded.exit_code == 0, expanded.stderr
    checked = run_cli("data", "check", str(tmp_path / "stage1.json"), "--images", str(source.options.path), "--json")
    assert (checked.exit_code, checked.json()["records"]) == (0, 3), checked.stderr


def test_a_missing_shard(create: Any, tmp_path: Path, jpeg: bytes) -> None:
    write(tmp_path / "00000.tar", {"0.jpg": jpeg, "0.txt": "A dog."})
    with pytest.raises(DataError, match=r"00001\.tar"):
        create("webdataset", path=tmp_path / "{00000..00001}.tar").check()
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(DataError):
        list(create("webdataset", path=tmp_path))
