"""The package as a plugin: what it registers and imports, and each source through the command line."""

import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from llavactl import DataError, registry
from llavactl.testing import check_plugin, run_cli, toy_recipe

HEAVY = ["torch", "transformers", "numpy", "PIL", "pyarrow", "datasets"]
COLORS = ("red", "green", "blue", "yellow")


def answers(photos: Sequence[Path]) -> list[str]:
    return [f"The picture is {COLORS[index % len(COLORS)]}." for index in range(len(photos))]


def messages(folder: Path, photos: Sequence[Path]) -> dict[str, Any]:
    records = [
        {
            "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": answer}],
            "images": [photo.name],
        }
        for photo, answer in zip(photos, answers(photos), strict=True)
    ]
    (folder / "records.json").write_text(json.dumps(records))
    return {"path": str(folder / "records.json"), "images": str(photos[0].parent)}


def parquet(folder: Path, photos: Sequence[Path]) -> dict[str, Any]:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    images = [{"bytes": photo.read_bytes(), "path": photo.name} for photo in photos]
    table = pa.table({"image": images, "question": ["What?"] * len(photos), "answer": answers(photos)})
    write_table(table, folder / "rows.parquet")
    return {"path": str(folder / "rows.parquet")}


def webdataset(folder: Path, photos: Sequence[Path]) -> dict[str, Any]:
    with tarfile.open(folder / "shard-0.tar", "w") as shard:
        for index, (photo, answer) in enumerate(zip(photos, answers(photos), strict=True)):
            shard.add(photo, f"{index:05}.jpg")
            text = io.BytesIO(answer.encode())
            member = tarfile.TarInfo(f"{index:05}.txt")
            member.size = len(answer)
            shard.addfile(member, text)
    return {"path": str(folder / "shard-*.tar")}


def hf_datasets(folder: Path, photos: Sequence[Path]) -> dict[str, Any]:
    from datasets import Dataset, Image

    rows = {"image": list(map(str, photos)), "question": ["What?"] * len(photos), "answer": answers(photos)}
    Dataset.from_dict(rows).cast_column("image", Image()).save_to_disk(str(folder / "saved"))
    return {"path": str(folder / "saved")}


def hf_stream(folder: Path, photos: Sequence[Path]) -> dict[str, Any]:
    return {**hf_datasets(folder, photos), "streaming": True}


def vqa(folder: Path, photos: Sequence[Path]) -> dict[str, Any]:
    ids = range(len(photos))
    questions = [{"question_id": each, "image_id": each, "question": "What?"} for each in ids]
    annotations = [
        {"question_id": each, "multiple_choice_answer": answer}
        for each, answer in zip(ids, answers(photos), strict=True)
    ]
    (folder / "questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    files = {name: str(folder / f"{name}.json") for name in ("questions", "annotations")}
    return {**files, "images": str(photos[0].parent), "image": "photo-{:03d}.jpg"}


DATA: dict[str, Callable[[Path, Sequence[Path]], dict[str, Any]]] = {
    "messages": messages,
    "parquet": parquet,
    "webdataset": webdataset,
    "hf-datasets": hf_datasets,
    "vqa": vqa,
}
FAST = ("messages", "parquet", "webdataset")
MODULES = ["messages", "parquet", "tars", "hub", "questions", "regions"]


@pytest.mark.parametrize("module", ["llavactl_sources", *(f"llavactl_sources.{name}" for name in MODULES)])
def test_modules_import_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_source_conforms(tmp_path: Path, photos: Sequence[Path]) -> None:
    options = {}
    for name, write in DATA.items():
        (tmp_path / name).mkdir()
        options[name] = write(tmp_path / name, photos)
    assert check_plugin("sources", options) == []
    checked = run_cli("plugins", "check", "sources", "--json")
    assert checked.exit_code == 0, checked.stderr
    conform = {each["name"] for each in checked.json()["checks"] if each["check"] == "conformance" and each["ok"]}
    registered = {entry.name for entry in registry() if entry.plugin == "sources" and entry.kind == "sources"}
    assert conform == registered, "with the package's own examples"


@pytest.mark.parametrize(
    ("name", "write"),
    [
        *(pytest.param(*each, marks=() if each[0] in FAST else pytest.mark.slow) for each in DATA.items()),
        pytest.param("hf-datasets", hf_stream, marks=pytest.mark.slow),
    ],
)
def test_data_is_checked_shown_extracted_and_trained(
    name: str, write: Callable[[Path, Sequence[Path]], dict[str, Any]], tmp_path: Path, photos: Sequence[Path]
) -> None:
    recipe = toy_recipe(tmp_path / "recipe", photos=1)
    spec = {"name": name, **write(tmp_path, photos)}
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("  stage")]
    for stage in ("stage2", "stage1"):
        lines.insert(lines.index("data:") + 1, f"  {stage}: [{json.dumps(spec)}]")
    recipe.write_text("\n".join(lines))
    recipe_option = ["-r", str(recipe)]

    checked = run_cli("data", "check", *recipe_option, "--json", cwd=tmp_path)
    assert checked.exit_code == 0, checked.stderr
    assert checked.json()["records"] == len(photos)
    shown = run_cli("data", "show", *recipe_option, cwd=tmp_path)
    assert shown.exit_code == 0, shown.stderr
    text = shown.stdout.replace("·", "")
    assert "<image x 4>" in text
    assert "The picture is red." in text
    extracted = run_cli("extract", *recipe_option, "--json", cwd=tmp_path)
    assert extracted.exit_code == 0, extracted.stderr
    assert extracted.json()["images"] == len(photos)
    trained = run_cli("train", *recipe_option, "--stage", "1", "-o", "stage1.max_steps=2", "--json", cwd=tmp_path)
    assert trained.exit_code == 0, trained.stderr
    assert trained.json()["steps"] == 2


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("parquet", "pyarrow.parquet", "parquet"), ("hf-datasets", "datasets", "datasets")]
)
def test_a_missing_package_names_the_extra(
    name: str, module: str, extra: str, tmp_path: Path, photos: Sequence[Path], monkeypatch: Any
) -> None:
    source = registry().create("sources", {"name": name, **DATA[name](tmp_path, photos)})
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError) as error:
        next(iter(source))
    assert f"llavactl-sources[{extra}]" in error.value.hint
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    ("name", "write"), [*(each for each in DATA.items() if each[0] != "webdataset"), ("hf-datasets", hf_stream)]
)
def test_a_missing_folder_of_images_stops_before_the_first_record(
    name: str, write: Callable[[Path, Sequence[Path]], dict[str, Any]], tmp_path: Path, photos: Sequence[Path]
) -> None:
    options = {**write(tmp_path, photos), "images": str(tmp_path / "none")}
    source = registry().create("sources", {"name": name, **options})
    for use in (source.check, lambda: next(iter(source))):
        with pytest.raises(DataError, match="none"):
            use()


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"^```text\n(data:.*?)^```$", README, re.MULTILINE | re.DOTALL))
def test_the_recipes_of_the_readme_are_valid(block: str) -> None:
    for specs in yaml.safe_load(block)["data"].values():
        for spec in specs:
            registry().options("sources", spec)


@pytest.mark.parametrize("entry", [each for each in registry() if each.plugin == "sources" and each.kind == "sources"])
def test_the_readme_has_every_source_and_option(entry: Any) -> None:
    assert f"`{entry.name}`" in README
    assert [name for name in entry.options_model().model_fields if f"`{name}`" not in README] == []
