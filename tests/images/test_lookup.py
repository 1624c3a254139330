"""Symbolic links: followed if the user names them, refused if they lead outside the image root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llavactl import DataError
from llavactl.images.lookup import LinkOutsideError
from llavactl.images.references import ImageRoot, check_image_root, image_in, named_image

COMMIT, BLOB = "a" * 40, "b" * 64


def linked(tmp_path: Path, target: str) -> Path:
    """A folder ``root`` with a link ``link.jpg`` to ``target``, and a file beside the folder."""
    (tmp_path / "outside.jpg").write_bytes(b"outside")
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "root" / "inside.jpg").write_bytes(b"inside")
    (tmp_path / "root" / "link.jpg").symlink_to(target)
    return tmp_path / "root"


def test_a_linked_root_and_links_within_it_are_followed(tmp_path: Path) -> None:
    linked(tmp_path, "inside.jpg")
    (tmp_path / "named").symlink_to("root")
    (tmp_path / "root/again").symlink_to(tmp_path / "named")
    check_image_root(str(tmp_path / "named"))
    for root in ("named", "root"):
        assert image_in(str(tmp_path / root), "link.jpg").read() == b"inside"
        assert image_in(str(tmp_path / root), "again/again/inside.jpg").read() == b"inside"


@pytest.mark.parametrize("target", ["../outside.jpg", "/etc/passwd"])
def test_a_link_to_outside_the_root_needs_follow_links(tmp_path: Path, target: str) -> None:
    root = linked(tmp_path, target)
    image = image_in(str(root), "link.jpg")
    for access in (image.read, image.stamp):
        with pytest.raises(LinkOutsideError) as caught:
            access()
        assert "link.jpg" in caught.value.message
        assert "follow_links: true" in caught.value.hint
    followed = image_in(ImageRoot(str(root), follow_links=True), "link.jpg")
    assert followed.read() == (root / target).read_bytes()
    assert followed.stamp() is not None
    assert followed != image


def test_a_linked_folder_outside_the_root_needs_follow_links(tmp_path: Path) -> None:
    root = linked(tmp_path, "inside.jpg")
    (root / "up").symlink_to("..")
    with pytest.raises(LinkOutsideError):
        image_in(str(root), "up/outside.jpg").read()
    assert image_in(ImageRoot(str(root), follow_links=True), "up/outside.jpg").read() == b"outside"


def test_links_of_equivalent_spellings_are_refused_too(tmp_path: Path) -> None:
    root = linked(tmp_path, "../outside.jpg")
    (root / "sub/é.jpg").symlink_to("../../outside.jpg")
    for name in (" link.jpg", "sub\\é.jpg", "sub/e\u0301.jpg"):
        with pytest.raises(LinkOutsideError):
            image_in(str(root), name).read()


def test_a_folder_whose_name_begins_with_the_root_is_outside(tmp_path: Path) -> None:
    root = linked(tmp_path, "../root-2/a.jpg")
    (tmp_path / "root-2").mkdir()
    (tmp_path / "root-2/a.jpg").write_bytes(b"a")
    with pytest.raises(LinkOutsideError):
        image_in(str(root), "link.jpg").read()


def test_broken_links_are_missing_images_with_a_short_reason(tmp_path: Path) -> None:
    root = linked(tmp_path, "../gone.jpg")
    (root / "loop.jpg").symlink_to("loop.jpg")
    for name in ("link.jpg", "loop.jpg"):
        for follow_links in (False, True):
            with pytest.raises(OSError, match="link") as caught:
                image_in(ImageRoot(str(root), follow_links), name).stamp()
            assert len(caught.value.strerror or "") < 60


def test_hard_links_are_files(tmp_path: Path) -> None:
    root = linked(tmp_path, "inside.jpg")
    os.link(tmp_path / "outside.jpg", root / "hard.jpg")
    assert image_in(str(root), "hard.jpg").read() == b"outside"


def hub(tmp_path: Path, repository: str = "datasets--x--y", blob: str = BLOB) -> Path:
    """A snapshot of huggingface_hub: every file is a link to a blob of the repository."""
    folder = tmp_path / repository
    snapshot = folder / "snapshots" / COMMIT
    (snapshot / "train").mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "blobs" / blob).write_bytes(b"image")
    (snapshot / "a.jpg").symlink_to(f"../../blobs/{blob}")
    (snapshot / "train/a.jpg").symlink_to(f"../../../blobs/{blob}")
    return snapshot


def test_a_hub_snapshot_is_readable(tmp_path: Path) -> None:
    snapshot = hub(tmp_path)
    (tmp_path / "named").symlink_to(snapshot)
    for root in (snapshot, tmp_path / "named", snapshot.parents[2]):
        name = str(snapshot.relative_to(root) / "a.jpg") if root in snapshot.parents else "a.jpg"
        assert image_in(str(root), name).read() == b"image"
    assert image_in(str(snapshot / "train"), "a.jpg").read() == b"image"
    assert image_in(str(snapshot), "train/a.jpg").read() == b"image"


def test_layouts_that_resemble_a_hub_snapshot_are_refused(tmp_path: Path) -> None:
    plain = hub(tmp_path / "1", repository="photos")
    named = hub(tmp_path / "2", blob="passwords.txt")
    other = hub(tmp_path / "3")
    (other / "b.jpg").symlink_to(hub(tmp_path / "3", repository="datasets--private--z") / "a.jpg")
    (other / "c.jpg").symlink_to(other.parent / "secret.jpg")
    (other.parent / "secret.jpg").write_bytes(b"secret")
    for root, name in ((plain, "a.jpg"), (named, "a.jpg"), (other, "b.jpg"), (other, "c.jpg")):
        with pytest.raises(LinkOutsideError):
            image_in(str(root), name).read()


def test_links_named_by_the_user_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = linked(tmp_path, "../outside.jpg")
    monkeypatch.chdir(root)
    names = [
        "link.jpg",
        "../outside.jpg",
        str(root / "link.jpg"),
        (root / "link.jpg").as_uri(),
        "sub/../../outside.jpg",
    ]
    assert [named_image(name).read() for name in names] == [b"outside"] * len(names)
    assert named_image("link.jpg", root).read() == b"outside"
    for name in ("..", "/"):
        with pytest.raises(DataError, match="folder"):
            named_image(name)
