"""Feature packs: exported where the images are, imported where they are not, and trained there to the same bits."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from safetensors.torch import load_file

from llavactl import StoreError
from llavactl.features import FeatureStore, StoreWriter, stage_fingerprint
from llavactl.features.manifest import read_manifest
from llavactl.features.pack import IMAGES, PACK, README, UNFINISHED, read_pack
from llavactl.features.shards import checksum
from llavactl.recipe.frame import Recipe
from llavactl.recipe.load import load_recipe
from llavactl.testing import run_cli
from llavactl.verbs.cache import export_pack, import_pack, verify
from llavactl.verbs.extract import extract

from ..preloaded import Interpreters

Load = Callable[..., Recipe]
WithSmallFiles = Callable[..., subprocess.CompletedProcess[str]]

_KEY = 64 * "0"


@pytest.fixture(scope="module")
def exported(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pack of the toy recipe and the home with its store; don't write into it."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(toys, folder / "toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVACTL_HOME", str(folder / "home"))
        loaded = load_recipe(folder / "toy/recipe.yaml")
        extract(loaded)
        export_pack(folder / "pack", loaded, base=folder / "toy")
    return folder


@pytest.fixture
def pack(exported: Path, home: Path, tmp_path: Path) -> Path:
    """A copy of the pack; the store is in this test's home."""
    shutil.copytree(exported / "home", home)
    shutil.copytree(exported / "pack", tmp_path / "pack")
    return tmp_path / "pack"


@pytest.fixture
def elsewhere(toy: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the recipe on a machine without images and with an empty cache."""
    folder = tmp_path / "elsewhere"
    shutil.move(toy, folder)
    shutil.rmtree(folder / "images")
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "other-home"))
    monkeypatch.chdir(folder)
    return folder


def ok(*words: str, cwd: Path) -> Any:
    """The JSON of a command that must succeed."""
    result = run_cli(*words, "--json", cwd=cwd)
    assert result.exit_code == 0, result.stderr
    return result.json()


def weights(run: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(run)): b"".join(tensor.numpy().tobytes() for tensor in load_file(file).values())
        for file in sorted(run.glob("stage*/model/**/*.safetensors"))
    }


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def files_below(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


_WITH_SMALL_FILES = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.argv[0] = "llavactl"
runpy.run_module("llavactl", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def with_small_files(interpreters: Interpreters) -> WithSmallFiles:
    """Runs a command that can't write beyond 4,096 bytes of a file, as if the disk were full: no shard fits."""
    return lambda *words, cwd: interpreters.run(_WITH_SMALL_FILES, *words, cwd=cwd, env=os.environ)


def edit(pack: Path, **changes: Any) -> None:
    document = json.loads((pack / PACK).read_text())
    (pack / PACK).write_text(json.dumps({**document, **changes}))


def relist(shard: Path) -> None:
    """Makes the size and the checksum of a changed ``shard`` of a pack valid."""
    manifest = read_manifest(shard.parent)
    assert manifest
    entries = [replace(each, sha256=checksum(shard.parent / each.file)) for each in manifest.shards]
    replace(manifest, shards=tuple(entries)).write(shard.parent)
    pack = shard.parent.parent
    files = json.loads((pack / PACK).read_text())["files"]
    for name in files:
        files[name] |= {"sha256": checksum(pack / name), "bytes": (pack / name).stat().st_size}
    edit(pack, files=files)


def test_training_where_the_images_are_not_gives_the_same_weights(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (toy / "images/photo-003.jpg").write_bytes(b"not an image")
    (toy / "images/photo-004.jpg").unlink()
    pack, other = tmp_path / "pack", tmp_path / "other"
    ok("extract", cwd=toy)
    exported = ok("cache", "export", "-r", "recipe.yaml", "--to", str(pack), cwd=toy)
    assert exported["images"] == 11
    assert exported["stores"][0]["images"] == 10
    ok("train", "--stage", "1", cwd=toy)
    shutil.copytree(toy, other, ignore=shutil.ignore_patterns("images", "runs"))
    shutil.move(toy / "images", tmp_path / "gone")
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "other-home"))
    refused = run_cli("train", "--stage", "1", cwd=other)
    assert refused.exit_code == 1
    assert ok("cache", "import", str(pack), cwd=other)["stores"][0]["added"] == 10
    extracted = ok("extract", cwd=other)
    assert (extracted["images"], extracted["to_encode"], extracted["skipped"]) == (12, 0, 2)
    checked = run_cli("data", "check", "-r", "recipe.yaml", "--json", cwd=other).json()
    counts = {problem["problem"]: problem["count"] for problem in checked["problems"]}
    assert (counts["image-absent"], counts["image-missing"], checked["trains"]) == (11, 1, True)
    assert run_cli("recipes", "check", "recipe.yaml", cwd=other).exit_code == 0
    ok("train", "--stage", "1", cwd=other)
    ours, theirs = weights(toy / "runs/toy"), weights(other / "runs/toy")
    assert ours == theirs
    assert ours
    left_out = [(run / "runs/toy/stage1/left_out.jsonl").read_text().splitlines() for run in (toy, other)]
    assert [len(lines) for lines in left_out] == [2, 2]


def test_an_absent_image_without_features_for_the_recipe_is_missing(elsewhere: Path, pack: Path) -> None:
    ok("cache", "import", str(pack), cwd=elsewhere)

    def counts(*words: str) -> dict[str, int]:
        problems = run_cli("data", "check", *words, "--json", cwd=elsewhere).json()["problems"]
        return {each["problem"]: each["count"] for each in problems if each["problem"].startswith("image-")}

    assert counts("-r", "recipe.yaml") == {"image-absent": 12}
    assert counts("-r", "recipe.yaml", "-o", "vision.layer=-3") == {"image-missing": 12}
    assert counts("records.json", "--images", "images") == {"image-missing": 12}


def test_what_needs_images_says_so(elsewhere: Path, pack: Path) -> None:
    ok("cache", "import", str(pack), cwd=elsewhere)
    live = run_cli("train", "--stage", "1", "-o", "features.mode=live", cwd=elsewhere)
    assert live.exit_code == 1
    assert "No such file" in live.stderr
    shown = ok("data", "show", "--stage", "1", cwd=elsewhere)["shown"][0]
    assert (shown["left_out"], shown["images"][0]["problem"]) == ("", "No such file or directory")
    preview = run_cli(
        "train", "--stage", "1", "-o", "stage1.preview_every=2", "-o", "stage1.max_steps=2", cwd=elsewhere
    )
    assert preview.exit_code == 0, preview.stderr
    (result,) = ok_recompute(elsewhere)
    assert (result["verdict"], result["compared"]) == ("none", 0)


def ok_recompute(folder: Path) -> Any:
    result = run_cli("cache", "verify", "-r", "recipe.yaml", "--recompute", "3", "--json", cwd=folder)
    assert result.exit_code == 1
    return result.json()["recomputed"]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_pack_has_only_what_the_recipe_needs(
    recipe: Load, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    complete = recipe(f"features.dtype={dtype}")
    extract(complete)
    extract(recipe("vision.layer=-3"))
    records = json.loads((toy / "records.json").read_text())
    (toy / "some.json").write_text(json.dumps(records[:2] + records[5:10]))
    some = [f"data.stage{n}=[{{name: llava-json, path: {toy}/some.json, images: {toy}/images}}]" for n in (1, 2)]
    part = recipe(*some, f"features.dtype={dtype}")
    store = FeatureStore.open(stage_fingerprint(complete, 1))
    report = export_pack(tmp_path / "pack", part, base=toy)
    assert (report.images, [each.images for each in report.stores]) == (7, [7])
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "other-home"))
    imported = import_pack(tmp_path / "pack", part, base=toy)
    assert imported.stores[0].added == 7
    copied = FeatureStore.open(stage_fingerprint(part, 1))
    assert len(copied) == 7
    for key in (key.decode() for key in copied.keys.tolist()):
        for ours, theirs in zip(copied.stored(key), store.stored(key), strict=True):
            assert np.array_equal(ours, theirs)
    assert verify(part).sound
    monkeypatch.undo()


def test_without_a_recipe_all_stores_are_exported_with_the_names_that_they_record(
    recipe: Load, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(recipe("stage1.image=square"))
    report = export_pack(tmp_path / "pack", base=toy)
    assert (len(report.stores), report.images) == (2, 12)
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "other-home"))
    assert len(import_pack(tmp_path / "pack", base=toy).stores) == 2
    assert extract(recipe("stage1.image=square")).to_encode == 0


def test_the_pack_names_no_local_folder(exported: Path, recipe: Load, toy: Path, tmp_path: Path) -> None:
    for name, data in content(exported / "pack").items():
        assert name.endswith(".h5") or str(exported).encode() not in data, name
    outside = tmp_path / "private-project"
    shutil.move(toy / "images", outside)
    sources = [f"data.stage{n}=[{{name: llava-json, path: {toy}/records.json, images: {outside}}}]" for n in (1, 2)]
    extract(recipe(*sources))
    for base in (toy, tmp_path / "a/b/c"):
        export_pack(tmp_path / "pack", recipe(*sources), base=base)
        for name, data in content(tmp_path / "pack").items():
            assert name.endswith(".h5") or outside.name.encode() not in data, name
        assert [root.relative for root in read_pack(tmp_path / "pack").roots] == [None]


def test_images_that_cannot_be_read_are_counted(recipe: Load, toy: Path, tmp_path: Path) -> None:
    extract(recipe())
    for name in ("photo-000.jpg", "photo-001.jpg"):
        (toy / "images" / name).unlink()
    report = export_pack(tmp_path / "pack", recipe(), base=toy)
    assert (report.images, sum(report.unreadable.values())) == (10, 2)
    result = run_cli("cache", "export", "-r", "recipe.yaml", "--to", str(tmp_path / "pack"), "--json", cwd=toy)
    assert sum(result.json()["unreadable"].values()) == 2
    assert "2 images" in result.stderr


def test_old_recorded_recipes_do_not_stop_an_export(
    recipe: Load, toy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extract(recipe())
    folder = FeatureStore.open(stage_fingerprint(recipe(), 1)).folder
    manifest = read_manifest(folder)
    assert manifest
    (record,) = manifest.recipes
    old = [{"name": 1}, {**record, "data": {"stage1": [{"name": "no-such-source"}]}}]
    replace(manifest, recipes=(*old, record)).write(folder)
    assert export_pack(tmp_path / "pack", base=toy).images == 12
    assert len([each for each in caplog.records if each.levelname == "WARNING"]) == len(old)


def test_an_export_writes_nothing_beside_its_folder(
    recipe: Load, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(recipe())
    pack = tmp_path / "mount/pack"
    pack.mkdir(parents=True)
    monkeypatch.chdir(pack)
    pack.parent.chmod(0o555)
    before = pack.parent.stat().st_mtime_ns
    export_pack(Path(), recipe(), base=toy)
    assert pack.parent.stat().st_mtime_ns == before
    pack.parent.chmod(0o755)
    assert (pack / README).read_text().startswith("# pack\n")
    assert not [path for path in pack.iterdir() if "lock" in path.name]


def test_readme_and_licenses(recipe: Load, toy: Path, tmp_path: Path) -> None:
    (toy / "clip/README.md").write_text("---\nlicense: mit\n---\n")
    extract(recipe())
    pack = tmp_path / "pack"
    ok("cache", "export", "-r", "recipe.yaml", "--to", str(pack), "--license", "CC BY 4.0", cwd=toy)
    text = (pack / README).read_text()
    assert "CC BY 4.0" in text
    assert "`clip`: mit" in text
    assert f"llavactl cache import path/to/{pack.name}" in text
    (pack / README).write_text("edited")
    import_pack(pack, recipe(), base=toy)


def test_dry_runs_write_nothing(recipe: Load, pack: Path, elsewhere: Path, tmp_path: Path) -> None:
    before = content(tmp_path)
    planned = ok("cache", "import", str(pack), "--dry-run", cwd=elsewhere)
    assert (planned["dry_run"], planned["stores"][0]["added"], planned["images"]) == (True, 12, 12)
    assert planned["bytes"] == sum(path.stat().st_size for path in pack.rglob("*.h5"))
    assert content(tmp_path) == before


def test_a_dry_export_writes_nothing(recipe: Load, toy: Path, tmp_path: Path) -> None:
    extract(recipe())
    before = {name for name in content(tmp_path) if ".lock" not in name}
    planned = ok("cache", "export", "-r", "recipe.yaml", "--to", str(tmp_path / "pack"), "--dry-run", cwd=toy)
    assert (planned["dry_run"], planned["images"], planned["stores"][0]["images"]) == (True, 12, 12)
    assert {name for name in content(tmp_path) if ".lock" not in name} == before
    report = export_pack(tmp_path / "pack", recipe(), base=toy)
    assert report.bytes == planned["bytes"]


def test_importing_twice_changes_nothing(pack: Path, elsewhere: Path, tmp_path: Path) -> None:
    ok("cache", "import", str(pack), cwd=elsewhere)
    before = content(tmp_path / "other-home")
    again = ok("cache", "import", str(pack), cwd=elsewhere)
    assert (again["bytes"], again["stores"][0]["added"], again["stores"][0]["stored"]) == (0, 0, 12)
    assert content(tmp_path / "other-home") == before


def test_exporting_twice_gives_the_same_files(recipe: Load, toy: Path, pack: Path) -> None:
    assert export_pack(pack, recipe(), base=toy).unchanged == 3
    before = content(pack)
    again = export_pack(pack, recipe(), base=toy)
    assert again.unchanged == again.stores[0].shards == 3
    assert content(pack) == before


def test_an_export_of_something_else_replaces_the_pack(recipe: Load, toy: Path, pack: Path) -> None:
    other = recipe("vision.layer=-3")
    extract(other)
    export_pack(pack, other, base=toy)
    names = {name.partition("/")[0] for name in content(pack) if name.endswith(".h5")}
    assert names == {stage_fingerprint(other, 1).id}
    assert set(content(pack)) == {PACK, *json.loads((pack / PACK).read_text())["files"]}


def test_features_are_merged_without_duplicates(
    recipe: Load, toy: Path, tmp_path: Path, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = FeatureStore.open(stage_fingerprint(recipe(), 1))
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "other-home"))
    kept = sorted((toy / "images").iterdir())[2:5]
    gone = tmp_path / "gone"
    gone.mkdir()
    for path in (toy / "images").iterdir():
        if path not in kept:
            shutil.move(path, gone)
    extract(recipe())
    assert import_pack(pack, recipe(), base=toy).stores[0].added == 9
    merged = FeatureStore.open(stage_fingerprint(recipe(), 1))
    assert sorted(merged.keys.tolist()) == sorted(set(merged.keys.tolist())) == sorted(expected.keys.tolist())
    assert verify(recipe()).sound


def test_a_missing_image_of_another_folder_is_not_mistaken_for_a_known_one(
    recipe: Load, elsewhere: Path, pack: Path
) -> None:
    ok("cache", "import", str(pack), cwd=elsewhere)
    (elsewhere / "others").mkdir()
    sources = [f"data.stage{n}=[{{name: llava-json, path: records.json, images: others}}]" for n in (1, 2)]
    words = [word for source in sources for word in ("-o", source)]
    refused = run_cli("train", "--stage", "1", *words, cwd=elsewhere)
    assert refused.exit_code == 1


def test_an_image_that_exists_is_identified_by_its_content(recipe: Load, elsewhere: Path, pack: Path) -> None:
    ok("cache", "import", str(pack), cwd=elsewhere)
    (elsewhere / "images").mkdir()
    (elsewhere / "images/photo-000.jpg").write_bytes(b"another image")
    report = ok("extract", "--dry-run", cwd=elsewhere)
    assert (report["images"], report["to_encode"]) == (12, 1)


def test_the_same_archive_elsewhere(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.make_archive(str(toy / "photos"), "zip", toy / "images")
    sources = [f"data.stage{n}=[{{name: llava-json, path: records.json, images: photos.zip}}]" for n in (1, 2)]
    words = [word for source in sources for word in ("-o", source)]
    ok("extract", *words, cwd=toy)
    ok("cache", "export", "-r", "recipe.yaml", *words, "--to", str(tmp_path / "pack"), cwd=toy)
    (toy / "photos.zip").unlink()
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "other-home"))
    ok("cache", "import", str(tmp_path / "pack"), cwd=toy)
    assert ok("extract", *words, cwd=toy)["to_encode"] == 0
    assert ok("extract", *words, cwd=toy)["skipped"] == 0


class TestRefusedImport:
    def refused(self, pack: Path, elsewhere: Path, *words: str) -> str:
        result = run_cli("cache", "import", str(pack), *words, cwd=elsewhere)
        assert result.exit_code == 1
        assert "Traceback" not in result.stderr
        return result.stderr

    def shard(self, pack: Path, index: int = 1) -> Path:
        return next(pack.glob(f"*/shard-{index:05}.h5"))

    def test_other_fingerprint(self, pack: Path, elsewhere: Path) -> None:
        message = self.refused(pack, elsewhere, "-r", "recipe.yaml", "-o", "vision.layer=-1")
        assert "layer" in message

    def test_missing_shard(self, pack: Path, elsewhere: Path) -> None:
        self.shard(pack).unlink()
        assert "shard-00001.h5" in self.refused(pack, elsewhere)

    def test_truncated_shard(self, pack: Path, elsewhere: Path) -> None:
        path = self.shard(pack)
        path.write_bytes(path.read_bytes()[:-1])
        assert "shard-00001.h5" in self.refused(pack, elsewhere)

    @pytest.mark.parametrize("position", [0.0, 0.6, 1.0])
    def test_damaged_shard(self, pack: Path, elsewhere: Path, tmp_path: Path, position: float) -> None:
        path = self.shard(pack)
        data = bytearray(path.read_bytes())
        data[int(position * (len(data) - 1))] ^= 4
        path.write_bytes(data)
        assert "shard-00001.h5" in self.refused(pack, elsewhere)
        data[int(position * (len(data) - 1))] ^= 4
        path.write_bytes(data)
        assert not list((tmp_path / "other-home").rglob("*.partial"))
        ok("cache", "import", str(pack), cwd=elsewhere)

    @pytest.mark.parametrize("new_images", [12, 1])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_features_that_are_not_finite(
        self, pack: Path, elsewhere: Path, value: float, new_images: int, tmp_path: Path
    ) -> None:
        path = self.shard(pack)
        with h5py.File(path, "r+") as shard:
            if new_images == 1:  # the others are stored already, so only rows of the shard are copied
                features, keys = shard["features"][:-1], [key.decode() for key in shard["keys"][:-1]]
                manifest = read_manifest(path.parent)
                assert manifest
                store = read_pack(pack).stores[0]
            shard["features"][-1, 1, 2] = value
            key = shard["keys"][-1].decode()
        relist(path)
        if new_images == 1:
            with StoreWriter(store.fingerprint, manifest.shape, 10) as writer:
                writer.append(keys, features)
        message = self.refused(pack, elsewhere)
        assert "shard-00001.h5" in message
        assert key in message
        assert not list((tmp_path / "other-home").rglob("*.partial"))

    def test_damaged_names(self, pack: Path, elsewhere: Path) -> None:
        text = (pack / IMAGES).read_text()
        (pack / IMAGES).write_text(text.replace("photo-000", "photo-900"))
        assert IMAGES in self.refused(pack, elsewhere)

    def test_other_format(self, pack: Path, elsewhere: Path) -> None:
        edit(pack, format=2)
        message = self.refused(pack, elsewhere)
        assert "format 2" in message
        assert "expected 1" in message

    def test_unfinished_export(self, pack: Path, elsewhere: Path) -> None:
        (pack / PACK).rename(pack / UNFINISHED)
        assert "cache export" in self.refused(pack, elsewhere)

    def test_no_pack(self, elsewhere: Path, tmp_path: Path) -> None:
        assert PACK in self.refused(elsewhere, elsewhere)
        assert "no such folder" in self.refused(tmp_path / "nothing", elsewhere)

    @pytest.mark.parametrize("name", ["../recipe.yaml", "/etc/passwd", "0123456789abcdef/../../x.h5", "a/b.h5", "\0"])
    def test_path_outside_the_pack(self, pack: Path, elsewhere: Path, name: str) -> None:
        files = json.loads((pack / PACK).read_text())["files"]
        edit(pack, files={**files, name: {"bytes": 1, "sha256": ""}})
        assert PACK in self.refused(pack, elsewhere)

    def test_link_outside_the_pack(self, pack: Path, elsewhere: Path, tmp_path: Path) -> None:
        path = self.shard(pack)
        shutil.move(path, tmp_path / "target.h5")
        path.symlink_to(tmp_path / "target.h5")
        assert "symbolic link" in self.refused(pack, elsewhere)

    @pytest.mark.parametrize("value", ["x", None, [], {"a": 1}, {IMAGES: {}}])
    def test_malformed_list_of_files(self, pack: Path, elsewhere: Path, value: Any) -> None:
        edit(pack, files=value)
        assert PACK in self.refused(pack, elsewhere)

    @pytest.mark.parametrize(
        "value",
        [
            *(None, [{}], [{"id": "../x", "relative": ""}]),
            *([{"id": "0" * 32, "relative": relative}] for relative in (1, "../x", "a/../../x", "/etc", "C:\\x")),
        ],
    )
    def test_malformed_roots(self, pack: Path, elsewhere: Path, value: Any) -> None:
        edit(pack, roots=value)
        assert PACK in self.refused(pack, elsewhere)

    @pytest.mark.parametrize(
        "line",
        [
            *("", "{", "[]", '{"root": 7, "image": "a", "key": "00"}', '{"root": 0}'),
            *(f'{{"root": {root}, "image": "a", "key": "{_KEY}"}}' for root in ("0.0", "true", "-1", "1")),
            "[" * 100_000,
            "\n".join(f'{{"root": 0, "image": "a", "key": "{64 * digit}"}}' for digit in "12"),
            "\udcff",  # not UTF-8
        ],
    )
    def test_malformed_names(self, pack: Path, elsewhere: Path, tmp_path: Path, line: str) -> None:
        from llavactl.features.shards import checksum

        (pack / IMAGES).write_bytes(f"{line}\n".encode("utf-8", "surrogateescape"))
        files = json.loads((pack / PACK).read_text())["files"]
        files[IMAGES] = {"bytes": (pack / IMAGES).stat().st_size, "sha256": checksum(pack / IMAGES)}
        edit(pack, files=files)
        assert IMAGES in self.refused(pack, elsewhere)
        assert files_below(tmp_path / "other-home") == []

    @pytest.mark.parametrize("value", ["12", 1.0, float("inf"), None, True])
    def test_malformed_numbers(self, pack: Path, elsewhere: Path, value: Any) -> None:
        edit(pack, images=value)
        assert PACK in self.refused(pack, elsewhere)
        files = json.loads((pack / PACK).read_text())["files"]
        edit(pack, images=12, files={**files, IMAGES: {**files[IMAGES], "bytes": value}})
        assert PACK in self.refused(pack, elsewhere)

    @pytest.mark.parametrize("name", ["manifest.json", "fingerprint.json"])
    @pytest.mark.parametrize("text", ["[", "[]", "[" * 100_000])
    def test_malformed_description_of_a_store(self, pack: Path, elsewhere: Path, name: str, text: str) -> None:
        from llavactl.features.shards import checksum

        path = self.shard(pack).with_name(name)
        path.write_text(text)
        files = json.loads((pack / PACK).read_text())["files"]
        files[f"{path.parent.name}/{name}"] = {"bytes": len(text), "sha256": checksum(path)}
        edit(pack, files=files)
        message = self.refused(pack, elsewhere)
        assert name in message
        assert "llavactl extract" not in message  # the hint for a store on this machine

    def test_deeply_nested_pack(self, pack: Path, elsewhere: Path) -> None:
        (pack / PACK).write_text("[" * 100_000)
        assert PACK in self.refused(pack, elsewhere)

    def test_shard_of_another_store(self, recipe: Load, pack: Path, elsewhere: Path) -> None:
        from llavactl.features.shards import checksum

        path = self.shard(pack)
        with h5py.File(path, "r+") as shard:
            shard.attrs["fingerprint"] = '{"other":1}'
        manifest = json.loads((path.parent / "manifest.json").read_text())
        for entry in manifest["shards"]:
            if entry["file"] == path.name:
                entry |= {"sha256": checksum(path), "bytes": path.stat().st_size}
        (path.parent / "manifest.json").write_text(json.dumps(manifest))
        files = json.loads((pack / PACK).read_text())["files"]
        for file in (path, path.parent / "manifest.json"):
            files[f"{path.parent.name}/{file.name}"] = {"bytes": file.stat().st_size, "sha256": checksum(file)}
        edit(pack, files=files)
        assert path.name in self.refused(pack, elsewhere)

    def test_disk_too_small(
        self, pack: Path, elsewhere: Path, small_disk: Callable[[Path, str], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LLAVACTL_HOME", str(elsewhere / "small"))
        small_disk(elsewhere / "small", "size=16k")
        assert "free disk space" in self.refused(pack, elsewhere)
        assert files_below(elsewhere / "small") == []

    def test_failing_writes(
        self, pack: Path, elsewhere: Path, tmp_path: Path, with_small_files: WithSmallFiles
    ) -> None:
        refused = with_small_files("cache", "import", str(pack), cwd=elsewhere)
        assert (refused.returncode, "Traceback" in refused.stderr) == (1, False)
        assert os.strerror(errno.EFBIG) in refused.stderr
        assert not [name for name in files_below(tmp_path / "other-home") if name.endswith((".partial", ".h5"))]
        assert ok("cache", "import", str(pack), cwd=elsewhere)["stores"][0]["added"] == 12

    def test_store_in_use(self, pack: Path, elsewhere: Path) -> None:
        store = read_pack(pack).stores[0]
        with StoreWriter(store.fingerprint, store.manifest.shape, 4):
            assert "another process" in self.refused(pack, elsewhere)


class TestRefusedExport:
    def refused(self, toy: Path, to: Path) -> str:
        result = run_cli("cache", "export", "-r", "recipe.yaml", "--to", str(to), cwd=toy)
        assert result.exit_code == 1
        assert "Traceback" not in result.stderr
        return result.stderr

    def test_nothing_extracted(self, toy: Path, tmp_path: Path) -> None:
        assert "extract" in self.refused(toy, tmp_path / "pack")
        assert run_cli("cache", "export", "--to", str(tmp_path / "pack"), cwd=toy).exit_code == 1

    def test_images_without_features(self, recipe: Load, toy: Path, tmp_path: Path) -> None:
        extract(recipe())
        path = toy / "images/photo-000.jpg"
        path.write_bytes(path.read_bytes() + b"x")
        assert "1 images" in self.refused(toy, tmp_path / "pack")
        assert not (tmp_path / "pack").exists()

    def test_folder_with_other_files(self, recipe: Load, toy: Path) -> None:
        extract(recipe())
        before = content(toy)
        assert "not empty" in self.refused(toy, toy)
        assert content(toy) == before
        assert "file" in self.refused(toy, toy / "recipe.yaml")

    def test_folder_of_the_stores(self, recipe: Load, toy: Path, home: Path) -> None:
        extract(recipe())
        self.refused(toy, home / "cache/features/pack")

    def test_damaged_shard(self, recipe: Load, toy: Path, tmp_path: Path) -> None:
        extract(recipe())
        path = FeatureStore.open(stage_fingerprint(recipe(), 1)).folder / "shard-00001.h5"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert "shard-00001.h5" in self.refused(toy, tmp_path / "pack")
        assert not (tmp_path / "pack" / PACK).exists()

    def test_store_in_use(self, recipe: Load, toy: Path, tmp_path: Path) -> None:
        extract(recipe())
        store = FeatureStore.open(stage_fingerprint(recipe(), 1))
        with StoreWriter(store.fingerprint, store.shape, 4):
            assert "another process" in self.refused(toy, tmp_path / "pack")

    def test_disk_too_small(
        self, recipe: Load, toy: Path, tmp_path: Path, small_disk: Callable[[Path, str], None]
    ) -> None:
        extract(recipe())
        small_disk(tmp_path / "small", "size=16k")
        assert "free disk space" in self.refused(toy, tmp_path / "small/pack")
        assert not list((tmp_path / "small/pack").rglob("*.h5"))

    def test_failing_writes(self, recipe: Load, toy: Path, tmp_path: Path, with_small_files: WithSmallFiles) -> None:
        extract(recipe())
        refused = with_small_files("cache", "export", "-r", "recipe.yaml", "--to", str(tmp_path / "pack"), cwd=toy)
        assert (refused.returncode, "Traceback" in refused.stderr) == (1, False)
        assert os.strerror(errno.EFBIG) in refused.stderr
        assert files_below(tmp_path / "pack") == [UNFINISHED]
        export_pack(tmp_path / "pack", recipe(), base=toy)

    def test_names_of_a_tampered_pack_are_not_followed(self, recipe: Load, toy: Path, pack: Path) -> None:
        files = json.loads((pack / PACK).read_text())["files"]
        edit(pack, files={**files, "../toy/recipe.yaml": {"bytes": 1, "sha256": "", "source": ""}})
        export_pack(pack, recipe(), base=toy)
        assert (toy / "recipe.yaml").exists()


def test_a_read_only_pack_is_imported(pack: Path, elsewhere: Path, small_disk: Callable[[Path, str], None]) -> None:
    folder = elsewhere / "mounted"
    small_disk(folder, "size=1m")
    shutil.copytree(pack, folder / "pack")
    small_disk(folder, "remount,ro")
    assert ok("cache", "import", str(folder / "pack"), cwd=elsewhere)["stores"][0]["added"] == 12


def test_an_import_changes_nothing_in_the_pack(pack: Path, elsewhere: Path) -> None:
    def state() -> list[tuple[Path, int, int]]:
        """What changes whenever a file is written, created, renamed or removed, also for a moment."""
        stats = [(path, path.stat()) for path in [pack, *sorted(pack.rglob("*"))]]
        return [(path, stat.st_ino, stat.st_mtime_ns) for path, stat in stats]

    before = state()
    ok("cache", "import", str(pack), cwd=elsewhere)
    assert state() == before


def test_known_images_are_listed_and_pruned_with_their_stores(pack: Path, elsewhere: Path, tmp_path: Path) -> None:
    ok("cache", "import", str(pack), cwd=elsewhere)
    images = tmp_path / "other-home/cache/images"
    files = sorted(map(str, images.glob("*.npy")))
    listed = ok("cache", "info", cwd=elsewhere)["known_images"]
    assert [(each["path"], each["images"]) for each in listed] == [(file, 12) for file in files]
    assert files
    assert ok("cache", "prune", "--yes", cwd=elsewhere)["files"] == []
    for shard in (tmp_path / "other-home").rglob("shard-00000.h5"):
        shard.rename(shard.with_suffix(".away"))
    assert ok("cache", "prune", "--yes", cwd=elsewhere)["files"] == []  # perhaps those of the shard
    shutil.rmtree(tmp_path / "other-home/cache/features")
    left = images / f".{Path(files[0]).name}.x1"
    left.write_bytes(b"12345")
    planned = ok("cache", "prune", "--dry-run", cwd=elsewhere)
    assert sorted(planned["files"]) == sorted([*files, str(left)])
    assert left.exists()
    assert ok("cache", "prune", "--yes", cwd=elsewhere)["files"] == planned["files"]
    assert ok("cache", "info", cwd=elsewhere)["known_images"] == []
    assert not [name for name in files_below(images) if not name.endswith(".lock")]


def test_a_store_that_is_pruned_takes_its_known_images_along(pack: Path, elsewhere: Path) -> None:
    ok("cache", "import", str(pack), cwd=elsewhere)
    known = ok("cache", "info", cwd=elsewhere)["known_images"]
    pruned = ok("cache", "prune", "-r", "recipe.yaml", "-o", "vision.layer=-3", "--yes", cwd=elsewhere)
    assert (len(pruned["stores"]), pruned["files"]) == (1, [each["path"] for each in known])


def test_shown_samples_whose_features_are_gone_are_left_out(pack: Path, elsewhere: Path, tmp_path: Path) -> None:
    ok("cache", "import", str(pack), cwd=elsewhere)

    def left_out(*words: str) -> str:
        (sample,) = ok("data", "show", "--stage", "1", *words, cwd=elsewhere)["shown"]
        return str(sample["left_out"])

    assert left_out() == ""
    assert left_out("-o", "vision.layer=-3")
    shutil.rmtree(tmp_path / "other-home/cache/features")
    assert left_out()


def test_captioned_images_that_are_known_but_have_no_features_are_left_out(pack: Path, elsewhere: Path) -> None:
    """The source keeps them, as it can't ask a store; training lists them with a reason."""
    records = json.loads((elsewhere / "records.json").read_text())
    captioned = [{"id": each["id"], "image": each["image"], "captions": ["A photo."]} for each in records]
    (elsewhere / "captions.json").write_text(json.dumps(captioned))
    sources = "data.stage1=[{name: caps-boxes, path: captions.json, images: images}]"
    ok("cache", "import", str(pack), cwd=elsewhere)
    (store,) = (Path(entry["path"]) for entry in ok("cache", "info", cwd=elsewhere)["stores"])
    manifest = read_manifest(store)
    assert manifest
    gone = manifest.shards[1]
    with h5py.File(store / gone.file) as shard:
        lost = {key.decode() for key in shard["keys"]}
    manifest.without({gone.file}).write(store)
    (store / gone.file).unlink()
    names = {each["image"]: each["key"] for each in map(json.loads, (pack / IMAGES).read_text().splitlines())}
    trained = ok("train", "--stage", "1", "-o", sources, cwd=elsewhere)
    left_out = [json.loads(line) for line in (elsewhere / "runs/toy/stage1/left_out.jsonl").read_text().splitlines()]
    assert {record["id"] for record in records if names[record["image"]] in lost} == {each["id"] for each in left_out}
    assert all(each["reason"] for each in left_out)
    assert (trained["samples"], trained["skipped_samples"]) == (12 - len(lost), len(lost))
    assert len(lost) == 5


def test_a_folder_that_is_not_on_this_machine_is_logged(
    pack: Path, elsewhere: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ok("cache", "import", str(pack), cwd=elsewhere)
    ok("extract", cwd=elsewhere)
    assert len([each for each in caplog.records if str(elsewhere / "images") in each.getMessage()]) == 1


def test_a_damaged_table_of_known_images_is_an_error(pack: Path, elsewhere: Path, tmp_path: Path) -> None:
    ok("cache", "import", str(pack), cwd=elsewhere)
    for path in (tmp_path / "other-home/cache/images").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:-5])
    result = run_cli("extract", cwd=elsewhere)
    assert result.exit_code == 1
    assert "import" in result.stderr


def test_export_of_a_missing_store_lists_the_differing_fields(recipe: Load, tmp_path: Path, toy: Path) -> None:
    extract(recipe())
    with pytest.raises(StoreError, match="layer"):
        export_pack(tmp_path / "pack", recipe("vision.layer=-3"), base=toy)
