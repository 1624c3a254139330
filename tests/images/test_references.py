"""Images in archives, at URLs and in base64: exact bytes, no path outside the root, from any thread or process."""

from __future__ import annotations

import base64
import io
import json
import multiprocessing
import os
import pickle
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llavactl import DataError, RecipeError
from llavactl.images.archive_index import DuplicateMemberError
from llavactl.images.decode import decode
from llavactl.images.image_file import ImageFile, RelativeImage
from llavactl.images.references import ImageRoot, check_image_root, image_in, image_in_memory
from llavactl.recipe.load import load_recipe
from llavactl.verbs.extract import extract

IMAGES = {f"train/{index:03}.jpg": b"image %d " % index * (index + 1) for index in range(40)}


def zipped(path: Path, images: dict[str, bytes] = IMAGES, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        file.mkdir("train")
        for name, data in images.items():
            file.writestr(name, data)
    return path


def tarred(path: Path, images: dict[str, bytes] = IMAGES) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in images.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def shards(folder: Path) -> str:
    folder.mkdir()
    for number in range(4):
        tarred(folder / f"{number}.tar", dict(list(IMAGES.items())[number::4]))
    return str(folder / "*.tar")


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder in fsspec's memory file system."""
    filesystem = fsspec.filesystem("memory")
    for name, data in IMAGES.items():
        filesystem.pipe(f"/bucket/{name}", data)
    yield "memory://bucket"
    filesystem.rm("/bucket", recursive=True)


def at_url(path: Path) -> str:
    fsspec.filesystem("memory").pipe(f"/bucket/{path.name}", path.read_bytes())
    return f"memory://bucket/{path.name}"


LOCATIONS: dict[str, Callable[[Path, str], str]] = {
    "zip": lambda folder, _: str(zipped(folder / "photos.zip")),
    "stored zip": lambda folder, _: str(zipped(folder / "photos.zip", method=zipfile.ZIP_STORED)),
    "tar": lambda folder, _: str(tarred(folder / "photos.tar")),
    "tars": lambda folder, _: shards(folder / "shards"),
    "url": lambda _, memory: memory,
    "zip at a url": lambda folder, _: at_url(zipped(folder / "photos.zip")),
    "tar at a url": lambda folder, _: at_url(tarred(folder / "photos.tar")),
    "local url": lambda folder, _: f"file://{tarred(folder / 'photos.tar')}",
}


@pytest.fixture(params=list(LOCATIONS))
def location(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    return LOCATIONS[request.param](tmp_path, memory)


def test_members_are_read_in_any_order_and_thread(location: str) -> None:
    check_image_root(location)
    images = [image_in(location, name) for name in IMAGES]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda image: image.read(), [*images, *images[::-1]])) == [
            *IMAGES.values(),
            *list(IMAGES.values())[::-1],
        ]
    assert [pickle.loads(pickle.dumps(image)).name for image in images] == list(IMAGES)
    assert len({image.stamp() for image in images}) == len(images)
    assert len({*images, *(image_in(location, name) for name in IMAGES)}) == len(images)


def test_a_missing_member_is_an_os_error(location: str) -> None:
    for name in ("train/999.jpg", "train"):
        with pytest.raises(OSError, match="no such"):
            image_in(location, name).read()


@pytest.mark.parametrize("name", ["../000.jpg", "/etc/passwd", "train/../../x", "", "a\0b", "..\\x"])
def test_paths_outside_the_root_are_refused(location: str, name: str) -> None:
    with pytest.raises(DataError, match="outside its root"):
        image_in(location, name)


def _read(location: str, names: list[str]) -> list[bytes]:
    return [image_in(location, name).read() for name in names]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_concurrent_processes(tmp_path: Path, start: str) -> None:
    location = str(zipped(tmp_path / "photos.zip"))
    check_image_root(location)
    names = list(IMAGES)
    with multiprocessing.get_context(start).Pool(3) as pool:
        found = pool.starmap(_read, [(location, names[at::3]) for at in range(3)])
    assert [dict(zip(names[at::3], found[at], strict=True)) for at in range(3)] == [
        {name: IMAGES[name] for name in names[at::3]} for at in range(3)
    ]


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_changed_archive_is_indexed_again(tmp_path: Path, pack: Callable[..., Path]) -> None:
    path = tmp_path / ("photos.zip" if pack is zipped else "photos.tar")
    image = image_in(str(pack(path)), "train/000.jpg")
    before = image.stamp()
    pack(path, {"new.jpg": b"first", "train/000.jpg": b"another"})
    assert image.read() == b"another"
    assert image.stamp() != before
    path.unlink()
    with pytest.raises(FileNotFoundError):
        image.read()


def test_a_damaged_tar_header_is_an_error(tmp_path: Path) -> None:
    path = tarred(tmp_path / "photos.tar")
    data = bytearray(path.read_bytes())
    data[data.index(b"train/001.jpg") + 110] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"photos\.tar .*byte 1024"):
        check_image_root(str(path))


def test_an_unsupported_compression_method_is_an_os_error(tmp_path: Path) -> None:
    path = zipped(tmp_path / "photos.zip", method=zipfile.ZIP_BZIP2)
    with pytest.raises(OSError, match=r"deflate in .*photos\.zip"):
        image_in(str(path), "train/000.jpg").read()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    for access in (ImageFile(str(tmp_path), "a.jpg").read, ImageFile(str(tmp_path), "a.jpg").stamp):
        with pytest.raises(OSError, match="pipe"):
            access()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_is_an_os_error(tmp_path: Path, method: int) -> None:
    path = zipped(tmp_path / "photos.zip", {"a.jpg": bytes(range(256)) * 9, "b.jpg": b"b"}, method)
    check_image_root(str(path))
    data = bytearray(path.read_bytes())
    data[data.index(b"a.jpg") + 60] ^= 255
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"damaged in .*photos\.zip"):
        image_in(str(path), "a.jpg").read()
    assert image_in(str(path), "b.jpg").read() == b"b"


@given(st.dictionaries(st.from_regex(r"[a-z]{1,4}(/[a-zé ]{1,4})?\.png", fullmatch=True), st.binary(), min_size=1))
def test_any_bytes_and_names_round_trip(images: dict[str, bytes]) -> None:
    filesystem = fsspec.filesystem("memory")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in images.items():
            file.writestr(name, data)
    filesystem.pipe("/any.zip", packed.getvalue())
    check_image_root("memory://any.zip")
    assert {name: image_in("memory://any.zip", name).read() for name in images} == images


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        ("nothing.zip", "no such file"),
        ("none*.tar", "no such file"),
        ("folder", "no such folder"),
        ("broken.zip", "can't be read"),
        ("packed.tar", "can't be read"),
        ("nonsense://x/", "can't be opened"),
    ],
)
def test_unusable_roots_are_errors(tmp_path: Path, root: str, reason: str) -> None:
    (tmp_path / "broken.zip").write_bytes(b"no zip")
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    with pytest.raises(DataError, match=reason):
        check_image_root(root if "://" in root else str(tmp_path / root))


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_duplicate_names_are_refused_only_if_contents_differ(tmp_path: Path, pack: Callable[..., Path]) -> None:
    suffix = "zip" if pack is zipped else "tar"
    for number in (1, 2):
        own = b"%d" % number
        beside = dict.fromkeys(("README.md", ".DS_Store", "Thumbs.db", "meta.json"), own)
        pack(tmp_path / f"{number}.{suffix}", {**beside, "same.jpg": b"same", "x.jpg": own, f"{number}.jpg": own})
    location = str(tmp_path / f"*.{suffix}")
    check_image_root(location)
    assert [image_in(location, name).read() for name in ("1.jpg", "2.jpg", "same.jpg")] == [b"1", b"2", b"same"]
    for access in (image_in(location, "x.jpg").read, image_in(location, "x.jpg").stamp):
        with pytest.raises(DuplicateMemberError) as caught:
            access()
        assert all(f"{number}.{suffix}" in caught.value.message for number in (1, 2))


def test_duplicate_names_in_different_top_folders_are_refused(tmp_path: Path) -> None:
    for top in ("train", "val"):
        zipped(tmp_path / f"{top}.zip", {f"{top}/1.jpg": top.encode(), "README": b""})
    location = str(tmp_path / "*.zip")
    with pytest.raises(DataError, match=r"train\.zip .*val\.zip"):
        image_in(location, "1.jpg").read()
    assert image_in(location, "val/1.jpg").read() == b"val"


SPELLINGS = {
    "Käse/é.jpg": ["Käse/é.jpg", unicodedata.normalize("NFD", "Käse/é.jpg"), " Käse/é.jpg ", "./Käse//é.jpg"],
    unicodedata.normalize("NFD", "Käse/é.jpg"): ["Käse/é.jpg", "Käse\\é.jpg"],
    "sub\\a.jpg": ["sub\\a.jpg", "sub/a.jpg"],
    "sub/a.jpg": ["sub\\a.jpg", "sub/a.jpg", "./sub/./a.jpg", "sub//a.jpg", "sub/a.jpg\n"],
}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
@pytest.mark.parametrize("written", SPELLINGS)
def test_equivalent_spellings_of_a_name(tmp_path: Path, kind: str, written: str) -> None:
    if kind == "folder":
        (tmp_path / written).parent.mkdir(exist_ok=True)
        (tmp_path / written).write_bytes(b"x")
        location = str(tmp_path)
    else:
        location = str((zipped if kind == "zip" else tarred)(tmp_path / f"a.{kind}", {written: b"x", "z/z.jpg": b""}))
    for named in SPELLINGS[written]:
        assert image_in(location, named).read() == b"x"
        assert image_in(location, named).stamp() == image_in(location, written).stamp()
    with pytest.raises(FileNotFoundError, match=r"different case"):
        image_in(location, SPELLINGS[written][0].upper()).read()


def test_the_exact_name_precedes_other_spellings(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.jpg").write_bytes(b"slash")
    (tmp_path / "a\\b.jpg").write_bytes(b"backslash")
    for location in (str(tmp_path), str(zipped(tmp_path / "a.zip", {"a/b.jpg": b"slash", "a\\b.jpg": b"backslash"}))):
        assert image_in(location, "a/b.jpg").read() == b"slash"
        assert image_in(location, "a\\b.jpg").read() == b"backslash"


def test_utf8_names_without_the_flag_as_in_macos_archives(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"x1x.jpg": b"x", "train/y.jpg": b""})
    path.write_bytes(path.read_bytes().replace(b"x1x.jpg", "ö.jpg".encode() + b"g").replace(b"\xb6.jpgg", b"\xb6x.jpg"))
    assert image_in(str(path), "öx.jpg").read() == b"x"


def test_links_inside_a_tar_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        info = tarfile.TarInfo("blobs/1")
        info.size = 1
        file.addfile(info, io.BytesIO(b"x"))
        for name, kind, target in [
            ("s/hard.jpg", tarfile.LNKTYPE, "blobs/1"),
            ("s/soft.jpg", tarfile.SYMTYPE, "../blobs/1"),
            ("s/soft2.jpg", tarfile.SYMTYPE, "soft.jpg"),
            ("s/loop.jpg", tarfile.SYMTYPE, "loop.jpg"),
            ("s/out.jpg", tarfile.SYMTYPE, "../../../etc/passwd"),
        ]:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            file.addfile(link)
    assert [image_in(str(path), f"s/{name}.jpg").read() for name in ("hard", "soft", "soft2")] == [b"x"] * 3
    for name in ("loop", "out"):
        with pytest.raises(FileNotFoundError):
            image_in(str(path), f"s/{name}.jpg").read()


def test_an_absolute_path_or_url_below_the_root_is_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a b.jpg").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    for root in ("real", "link"):
        for written in ("real", "link"):
            file = tmp_path / written / "a b.jpg"
            for named in (str(file), file.as_uri(), f"file://localhost{file.as_posix()}", f" {file} "):
                assert image_in(str(tmp_path / root), named) == ImageFile(str(tmp_path / root), "a b.jpg")
    assert image_in("memory://bucket/", "memory://bucket/a.jpg").name == "a.jpg"
    assert image_in((tmp_path / "real").as_uri(), "a b.jpg") == ImageFile(str(tmp_path / "real"), "a b.jpg")


OUTSIDE = (
    *("/etc/passwd", " /etc/passwd", "../x.jpg", " ../x.jpg", "a/../../x.jpg", "..\\x.jpg", "C:\\x.jpg", "c:/x.jpg"),
    *(
        "\\\\server\\x.jpg",
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "FILE:///etc/passwd",
        "file:///%2e%2e/x",
    ),
    *("https://host/a.jpg", "s3://bucket/a.jpg", "", " ", ".", "./", "a\0b", "x.jpg/" * 5000),
)


@pytest.mark.parametrize("named", OUTSIDE)
@pytest.mark.parametrize("follow_links", [False, True])
def test_paths_outside_are_refused_with_a_short_message(tmp_path: Path, named: str, *, follow_links: bool) -> None:
    for root in (str(tmp_path), str(tmp_path / "a.zip"), "memory://bucket"):
        with pytest.raises(DataError) as caught:
            image_in(ImageRoot(root, follow_links), named)
        assert len(caught.value.message) < 300 + len(root)
        assert caught.value.hint


PNG = bytes.fromhex("89504e470d0a1a0a") + bytes(range(256)) * 3


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(PNG).decode(),
        base64.encodebytes(PNG).decode(),
        base64.urlsafe_b64encode(PNG).decode().rstrip("="),
        f"data:image/png;base64,{base64.b64encode(PNG).decode()}",
        f"DATA:image/png;charset=utf-8;base64, {base64.b64encode(PNG).decode()}",
        f"data:;base64,{quote(base64.b64encode(PNG).decode(), safe='')}",
        f"data:image/png,{quote(PNG)}",
    ],
)
def test_base64_is_decoded(tmp_path: Path, text: str) -> None:
    image = image_in(str(tmp_path), text)
    assert image.read() == PNG
    assert len(image.name) < 30
    assert pickle.loads(pickle.dumps(image)) == image == image_in("memory://x", text)
    assert len({image, image_in(str(tmp_path), text)}) == 1
    assert image.stamp() == image_in(str(tmp_path / "photos.zip"), text).stamp()
    assert image != image_in(str(tmp_path), base64.b64encode(PNG + b"x").decode())


def test_invalid_base64_is_an_unreadable_image(tmp_path: Path) -> None:
    text = base64.b64encode(PNG * 300).decode()
    for broken in (
        f"{text[:5000]}!{text[5000:]}",
        f"/9j/{text[:400]}.",
        f"data:image/png;base64,{text}*",
        text[:-3] + "=",
    ):
        image = image_in(str(tmp_path), broken)
        with pytest.raises(OSError, match="base64"):
            image.read()
        assert len(image.name) < 30


@given(st.text(min_size=1, max_size=80))
def test_any_path_is_below_its_root_or_refused(name: str) -> None:
    for root in ("/nowhere/images", "/nowhere/a.zip"):
        try:
            image = image_in(root, name)
        except DataError as error:
            assert error.hint  # noqa: PT017
            continue
        path = os.path.normpath(f"{root}/{image.path.strip()}" if isinstance(image, RelativeImage) else root)
        assert path.startswith(root)


def test_long_names_are_shortened_uniquely(tmp_path: Path) -> None:
    names = ["d/" * 300 + f"{at}.jpg" for at in range(2)]
    images = [image_in(str(tmp_path), name) for name in names]
    assert all(len(image.name) <= 200 for image in images)
    assert len({image.name for image in images}) == 2
    for image in images:
        with pytest.raises(FileNotFoundError):
            image.read()


def test_a_folder_named_like_an_archive_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").mkdir()
    (tmp_path / "photos.zip" / "a.jpg").write_bytes(b"a")
    check_image_root(str(tmp_path / "photos.zip"))
    assert image_in(str(tmp_path / "photos.zip"), "a.jpg") == ImageFile(str(tmp_path / "photos.zip"), "a.jpg")


@pytest.mark.parametrize("kind", ["photos.zip", "shards/*.tar", "memory://toy-images"])
def test_features_equal_those_of_the_folder(toy: Path, kind: str) -> None:
    images = {path.name: path.read_bytes() for path in sorted((toy / "images").iterdir())}
    whole = extract(load_recipe(toy / "recipe.yaml", ()))
    assert whole.encoded == len(images)
    zipped(toy / "photos.zip", images)
    (toy / "shards").mkdir()
    for at in range(2):
        tarred(toy / "shards" / f"{at}.tar", dict(list(images.items())[at::2]))
    for name, data in images.items():
        fsspec.filesystem("memory").pipe(f"/toy-images/{name}", data)
    path = toy / "recipe.yaml"
    path.write_text(path.read_text().replace("images: images/", f"images: {json.dumps(kind)}"))
    found = extract(load_recipe(path, ()))
    assert (found.images, found.encoded, found.stored_before, found.skipped) == (len(images), 0, len(images), 0)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_duplicate_name_in_one_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for content in (b"1", b"2"):
            file.writestr("x.jpg", content)
        for _ in range(2):
            file.writestr("same.jpg", b"same")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("x.jpg", b"1"), ("x.jpg", b"2"), ("same.jpg", b"same"), ("same.jpg", b"same")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for archive in ("a.zip", "a.tar"):
        assert image_in(str(tmp_path / archive), "same.jpg").read() == b"same"
        with pytest.raises(DuplicateMemberError):
            image_in(str(tmp_path / archive), "x.jpg").read()


def test_dots_that_stay_inside_are_resolved(tmp_path: Path) -> None:
    assert image_in(str(tmp_path), "a/../b/./c/../x.jpg").name == "b/x.jpg"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "YCbCr", "LAB", "HSV", "F"])
def test_a_pil_image_in_memory(mode: str) -> None:
    red = Image.new("RGB", (3, 2), (200, 30, 40))
    image = Image.new(mode, (3, 2)) if mode in ("I;16", "LAB") else red.convert(mode)
    reference = image_in_memory(image)
    assert reference == image_in_memory(image.copy())
    assert decode(reference.read()).tobytes() == image.convert("RGB").tobytes()


def test_only_pil_images_are_taken_from_memory() -> None:
    with pytest.raises(RecipeError):
        image_in_memory(b"bytes")  # type: ignore[arg-type]
