"""``llavactl init``: recipes for all kinds of data, models and devices, which check and train."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llavactl.core.errors import DataError, RecipeError
from llavactl.core.quantities import gigabytes
from llavactl.core.registry import registry
from llavactl.curation.recognize import recognize
from llavactl.recipe.load import load_recipe
from llavactl.recipe.stages import STAGES
from llavactl.testing import run_cli, toy_photos
from llavactl.training.prediction.published import fastest_fit, stored_verdict
from llavactl.training.prediction.target import Target
from llavactl.verbs.init.memory import StageMemory
from llavactl.verbs.init.settings import MemorySettings
from llavactl.verbs.init.text import RecipeFacts

FIXTURES = Path(__file__).parents[1] / "fixtures"
COCO = '{"images": [], "annotations": []}'
ODD_NAMES = (
    "my photos",
    "Fotos für Oma",
    'it\'s "quoted"',
    "a#b: c, [d]",
    "~user",
    "-r",
    "true",
    "{x}",
    "日本",
    "a\tb",
)


@pytest.fixture
def project(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with toy models, photos and records, which is the working directory."""
    folder = tmp_path / "project"
    shutil.copytree(toys, folder)
    (folder / "recipe.yaml").unlink()
    monkeypatch.chdir(folder)
    return folder


def captioned(folder: Path, count: int = 6) -> Path:
    """Photos with text files beside them."""
    for index, photo in enumerate(toy_photos(folder, count)):
        photo.with_suffix(".txt").write_text(f"Picture number {index} of one color.\n")
    return folder


def records(file: Path, kind: str, count: int = 6) -> Path:
    """LLaVA records: captions, conversations or text only."""
    values = []
    for index in range(count):
        question = "Give a short description." if kind == "captions" else f"What is in photo {index}?"
        tag = "" if kind == "text" else "<image>\n"
        turns = [{"from": "human", "value": tag + question}, {"from": "gpt", "value": f"A photo, number {index}."}]
        image = {} if kind == "text" else {"image": f"photo-{index:03d}.jpg"}
        values.append({"id": str(index), **image, "conversations": turns})
    lines = [json.dumps(value) for value in values]
    file.write_text("\n".join(lines) if file.suffix == ".jsonl" else json.dumps(values))
    return file


def siglip(folder: Path) -> Path:
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    SiglipVisionModel(SiglipVisionConfig(**size, image_size=28, patch_size=14)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def without_chat_template(project: Path, name: str) -> str:
    shutil.copytree(project / "language", project / name)
    (project / name / "chat_template.jinja").unlink()
    return name


def init(*arguments: str, models: bool = True) -> dict[str, Any]:
    """The report of ``init`` with the toy models."""
    named = ("--vision", "clip", "--language", "language") if models else ()
    result = run_cli("init", *named, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = result.json()
    return report


def check(report: dict[str, Any]) -> None:
    """Checks the recipe, which ``init`` has done as well before it wrote the recipe."""
    checked = run_cli("recipes", "check", report["recipe"])
    assert checked.exit_code == 0, checked.stdout


Case = Callable[[Path], tuple[str, ...]]
DATA: dict[str, tuple[Case, tuple[str, ...]]] = {
    "folder with text files": (lambda p: (str(captioned(p / "photos")),), ("captions",)),
    "table": (lambda p: (str(table(p)),), ("captions",)),
    "table and images": (lambda p: (str(table(p, "elsewhere.csv")), "--images", "images"), ("captions",)),
    "conversations": (lambda p: ("records.json",), ("conversations",)),
    "jsonl": (lambda p: (str(records(p / "r.jsonl", "conversations")),), ("conversations",)),
    "llava captions": (lambda p: (str(records(p / "c.json", "captions")),), ("captions",)),
    "text only": (lambda p: (str(records(p / "t.json", "text")),), ("conversations",)),
    "folder of records": (lambda p: (str(nested(p)),), ("conversations",)),
    "source": (lambda p: ("scenes", "-t", "scenes=8", "-t", "content=descriptions"), ("captions",)),
    "coco": (lambda p: (str(FIXTURES / "coco_captions.json"), "--images", "images"), ("captions",)),
    "coco with boxes": (
        lambda p: (
            *("coco", "-t", f"captions={FIXTURES / 'coco_captions.json'}"),
            *("-t", f"instances={FIXTURES / 'coco_instances.json'}", "-t", "images=images"),
        ),
        ("captions",),
    ),
    "captions and boxes": (
        lambda p: (str(FIXTURES / "caps_boxes.jsonl"), "-t", "images=images", "-t", "missing=true"),
        ("captions",),
    ),
    "captions and conversations": (
        lambda p: (str(captioned(p / "photos")), "--data", "records.json"),
        ("captions", "conversations"),
    ),
}

FAST = ("folder with text files", "coco with boxes")


def table(project: Path, name: str = "images/metadata.csv") -> Path:
    file = project / name
    rows = [f"photo-{index:03d}.jpg,A photo with number {index}.\n" for index in range(6)]
    file.write_text("file_name,text\n" + "".join(rows))
    return file


def nested(project: Path) -> Path:
    (project / "set").mkdir()
    shutil.copytree(project / "images", project / "set" / "jpg")
    shutil.copy(project / "records.json", project / "set" / "instruct.json")
    return project / "set"


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in DATA]
)
def test_data_is_recognized(name: str, project: Path) -> None:
    arguments, content = DATA[name]
    report = init("--data", *arguments(project))
    check(report)
    assert tuple(each["content"] for each in report["data"]) == content
    assert report["fits"]
    recipe = load_recipe(report["recipe"])
    for stage in STAGES:
        (source,) = recipe.sources(stage)
        samples = list(registry().create("sources", source.spec()))
        assert samples
        images = [image for sample in samples for image in sample.images if name != "captions and boxes"]
        assert all(image.read() for image in images)
    templates = [recipe.stage(stage).template for stage in STAGES]
    names = [template if isinstance(template, str) else template["name"] for template in templates]
    assert names == ["plain" if "captions" in content else "tokenizer", "tokenizer"]


def captions_table(suffix: str, caption: str, folder: Path) -> Path:
    """A table of short captions in one of the supported forms."""
    rows = {photo.name: f"{caption} {index}" for index, photo in enumerate(sorted(folder.glob("*.jpg")))}
    listed = [{"image": name, "caption": text} for name, text in rows.items()]
    text = {
        "csv": "image,caption\n" + "".join(f"{name},{text}\n" for name, text in rows.items()),
        "tsv": "image\tcaption\n" + "".join(f"{name}\t{text}\n" for name, text in rows.items()),
        "list.json": json.dumps(listed),
        "map.json": json.dumps(rows),
        "jsonl": "".join(json.dumps(each) + "\n" for each in listed),
    }[suffix]
    file = folder.parent / f"table.{suffix}"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("caption", ["Ä", "hallo", "a photo with number"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "list.json", "map.json", "jsonl"])
def test_a_table_of_captions_has_captions_however_short(suffix: str, caption: str, project: Path) -> None:
    data = recognize(str(captions_table(suffix, caption, project / "images")), str(project / "images"))
    assert (data.content, data.samples) == ("captions", len(list((project / "images").glob("*.jpg"))))


def test_short_answers_of_records_are_no_captions(project: Path) -> None:
    file = records(project / "short.json", "captions")
    document = json.loads(file.read_text())
    for index, record in enumerate(document):
        record["conversations"][1]["value"] = ("yes", "no")[index % 2]
    file.write_text(json.dumps(document))
    assert recognize(str(file), str(project / "images")).content == "conversations"


def test_a_table_of_questions_and_answers_has_no_captions(project: Path) -> None:
    file = project / "questions.csv"
    file.write_text("image,question,answer,label\nphoto-000.jpg,What?,A dog.,1\n")
    with pytest.raises(DataError, match="questions and answers") as caught:
        recognize(str(file), str(project / "images"))
    assert "conversations" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "text", "mentioned"),
    [
        ("table.csv", "Bild,Beschreibung\nphoto-000.jpg,ein Hund\n", ("Bild, Beschreibung", "image_column")),
        ("labels.csv", "Bild,Beschreibung\nphoto-000.jpg,ein Hund\n", ("Bild, Beschreibung", "-t captions=")),
        ("table.csv", "photo-000.jpg,a dog\nphoto-001.jpg,a cat\n", ("name", "-t captions=bare/table.csv")),
        ("table.jsonl", '{"image": "photo-000.jpg", "text": "a dog"}\n', ("name", "-t captions=bare/table.jsonl")),
        ("metadata.csv", "", ("no rows",)),
        ("metadata.csv", "file_name,text\n", ("no rows",)),
        ("annotations.json", "[]", ("no rows",)),
        ("captions.json", COCO, ("--data coco -t captions=bare/captions.json",)),
        ("captions_train2017.json", COCO, ("--data coco -t captions=bare/captions_train2017.json",)),
    ],
)
def test_a_table_that_is_not_used_is_named_with_the_reason(
    name: str, text: str, mentioned: tuple[str, ...], project: Path
) -> None:
    toy_photos(project / "bare", 2)
    (project / "bare" / name).write_text(text)
    with pytest.raises(DataError) as caught:
        recognize("bare")
    assert all(each in f"{caught.value.message} {caught.value.hint}" for each in (name, *mentioned))
    if "-t captions=" in caught.value.hint and "Bild" not in text and text != COCO:
        assert recognize("bare", options={"captions": f"bare/{name}"}).content == "captions"
    with pytest.raises(DataError) as bare:
        recognize(str(project / "images"))
    assert "not used" not in bare.value.message


def test_a_folder_with_the_name_of_a_source_can_be_written_as_a_path(project: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recognize("coco")
    assert "./coco" not in caught.value.hint
    captioned(project / "coco")
    with pytest.raises(RecipeError) as caught:
        recognize("coco")
    assert "./coco" in caught.value.hint
    assert recognize("./coco").samples == 6


@pytest.mark.slow
def test_several_captions_per_image_are_counted_as_data_check_counts_them(project: Path) -> None:
    folder = captioned(project / "photos")
    for file in sorted(folder.glob("*.txt"))[:4]:
        file.write_text("One caption of this photo.\nAnother caption of this photo.\n")
    report = init("--data", "photos")
    checked = run_cli("data", "check", "-r", report["recipe"], "--json").json()
    assert report["data"][0]["samples"] == checked["records"] == 10
    assert "# 10 samples" in report["text"]
    generate = next(line for line in report["text"].splitlines() if line.startswith("#   source:"))
    assert "every_caption" not in generate, "a teacher receives all captions of an image at once"
    one_each = init("--data", "photos", "-t", "every_caption=false", "--force")
    assert one_each["data"][0]["samples"] == 6


def test_models_are_recognized(project: Path) -> None:
    siglip(project / "siglip")
    report = init("--data", "records.json", "--vision", "./siglip", "--language", "language", models=False)
    check(report)
    assert report["template"] == "tokenizer"
    for name, template in (("base", "vicuna-v1"), ("my-vicuna", "vicuna-v1")):
        language = without_chat_template(project, name)
        report = init("--data", "records.json", "--vision", "clip", "--language", language, "--force", models=False)
        assert report["template"] == template


@pytest.mark.parametrize(
    ("language", "memory", "method", "fits"),
    [
        ("lmsys/vicuna-7b-v1.5", "24GB", "lora", True),
        ("lmsys/vicuna-7b-v1.5", "16GB", "qlora", True),
        ("lmsys/vicuna-7b-v1.5", "192GB", "full", True),
        ("lmsys/vicuna-13b-v1.5", "48GB", "lora", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "8GB", "full", True),
        ("someone/unknown-7b-chat", "24GB", "lora", None),
    ],
)
def test_models_of_the_hub(language: str, memory: str, method: str, fits: bool | None, project: Path) -> None:
    arguments = ("--vision", "openai/clip-vit-large-patch14-336", "--language", language, "--device-memory", memory)
    report = init("--data", str(captioned(project / "photos")), *arguments, models=False)
    check(report)
    assert (report["method"], report["fits"]) == (method, fits)
    assert report["device"]["kind"] == "cuda"
    stage = load_recipe(report["recipe"]).stage2
    assert stage.method == method
    assert stage.micro_batch_tokens == stage.gradient_checkpointing == "auto"


@pytest.mark.parametrize(("fitting", "method"), [("full", "full"), ("lora", "lora"), (None, "qlora")])
def test_the_first_method_that_fits_is_chosen(
    fitting: str | None, method: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predicted(facts: RecipeFacts, stage: int, _target: Target, *, slow: bool) -> StageMemory:
        return StageMemory(stage == 1 or facts.method == fitting, 10**9, MemorySettings())

    monkeypatch.setattr("llavactl.verbs.init.memory._predicted", predicted)
    report = init("--data", "records.json", "--device-memory", "1GB")
    assert (report["method"], report["fits"]) == (method, fitting is not None)
    assert load_recipe(report["recipe"]).stage2.method == method


@pytest.mark.slow  # traces every choice of settings
def test_a_prediction_chooses_the_method(project: Path) -> None:
    """The toy model needs 20 MB; without room for the optimizer state of all weights, adapters are trained."""
    sizes = {memory: init("--data", "records.json", "--force", "--device-memory", memory) for memory in ("1GB", "1MB")}
    assert sizes["1GB"]["method"] == "full"
    assert sizes["1GB"]["peak_bytes"]["stage2"] < 10**9
    assert sizes["1MB"]["method"] == "qlora"
    assert not sizes["1MB"]["fits"]
    assert sizes["1MB"]["warnings"]
    asked = init("--data", "records.json", "--force", "--method", "lora")
    assert load_recipe(asked["recipe"]).stage2.method == "lora"


@pytest.mark.parametrize(
    "device",
    [
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("--device-memory", "1GB"), marks=pytest.mark.slow),
        ("--device-memory", "1GB", "--devices", "2"),
        pytest.param(("--devices", "2"), marks=pytest.mark.slow),
    ],
)
def test_a_dry_run_of_the_recipe_predicts_the_same(device: tuple[str, ...], project: Path) -> None:
    """Exactly while the data's lengths are unknown; with them, the same is the upper bound."""
    data = captioned(project / "photos")
    report = init("--data", str(data), *device)
    kind = "device" if report["device"]["kind"] == "cuda" else "host"
    assert report["device"]["count"] == (2 if "--devices" in device else 1)

    def planned(stage: str) -> dict[str, Any]:
        run = run_cli("train", "-r", report["recipe"], "--stage", stage[-1], "--dry-run", "--json", *device)
        assert run.exit_code == 0, run.stderr
        plan: dict[str, Any] = run.json()
        assert plan["device"]["count"] == report["device"]["count"]
        return plan

    for stage, peak in report["peak_bytes"].items():
        bound = planned(stage)["upper_bound"]
        assert bound["peak_bytes"][kind] == peak
        assert {key: bound[key] for key in ("samples", "tokens")} == report["assumes"][stage]
        assert load_recipe(report["recipe"]).stage(int(stage[-1])).settings.max_length == bound["tokens"]
    shutil.rmtree(data)
    assert planned("stage1")["peak_bytes"][kind] == report["peak_bytes"]["stage1"]


def test_the_comment_has_the_prediction_and_its_assumption(project: Path) -> None:
    report = init("--data", "records.json", "--device-memory", "24GB", "--devices", "8")
    comments = " ".join(line.strip(" #") for line in report["text"].splitlines() if line.lstrip().startswith("#"))
    assert gigabytes(report["peak_bytes"]["stage2"]) in report["text"]
    assert f"{report['assumes']['stage2']['tokens']:,} tokens" in report["text"]
    assert "--device-memory 24GB --devices 8" in comments, "the dry run that shows the same"


def test_on_a_cpu_the_recipe_has_the_settings_of_its_stored_prediction(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=25 * 10**9))
    models = ("--vision", "openai/clip-vit-large-patch14-336", "--language", "lmsys/vicuna-7b-v1.5")
    report = init("--data", "records.json", *models, "--method", "lora", models=False)
    peak = fastest_fit("Vicuna 7B", "connector", Target(False, 25 * 10**9))
    assert peak is not None
    settings = load_recipe(report["recipe"]).stage1
    assert report["peak_bytes"]["stage1"] == peak.bytes
    assert settings.gradient_checkpointing is peak.gradient_checkpointing is True
    assert settings.micro_batch_tokens == peak.micro_batch_tokens


@pytest.mark.parametrize(
    ("memory", "language", "fits", "not_checked"),
    [
        (25 * 10**9, "lmsys/vicuna-7b-v1.5", False, []),
        (40 * 10**9, "lmsys/vicuna-7b-v1.5", True, []),
        (25 * 10**9, "someone/unknown-7b", None, ["someone/unknown-7b"]),
    ],
)
def test_init_and_the_check_have_one_verdict_about_models_that_are_not_here(
    memory: int,
    language: str,
    fits: bool | None,
    not_checked: list[str],
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=memory))
    monkeypatch.setattr("llavactl.verbs.init._precision", lambda *_: "bfloat16")
    result = run_cli("init", "--data", "records.json", "--vision", "clip", "--language", language)
    assert result.exit_code == 0
    assert ("doesn't fit" in result.stderr) == ("doesn't fit" in result.stdout) == (fits is False)
    comments = " ".join(Path("recipe.yaml").read_text().replace("#", " ").split())
    assert ("this doesn't fit" in comments) == (fits is False)
    check = run_cli("recipes", "check", "--json")
    assert check.exit_code == 0
    document = check.json()
    assert document["ok"]
    assert bool(document.get("warnings")) == (fits is False)
    assert document.get("memory_not_checked", []) == not_checked
    assert [line for line in check.stderr.splitlines() if "memory not checked" in line] == [
        f"llavactl: memory not checked: {each} isn't on this machine" for each in not_checked
    ]
    report = run_cli(
        "init", "--data", "records.json", "--vision", "clip", "--language", language, "--dry-run", "--json"
    )
    assert report.json()["fits"] is fits


@pytest.mark.parametrize(
    ("override", "covered"),
    [
        ("stage2.lora.r=16", False),
        ("stage2.max_length=4096", False),
        ("features.mode=live", False),
        ("stage2.precision=float32", False),
        ("stage2.micro_batch_size=2", True),
    ],
)
def test_a_stored_prediction_is_used_only_for_what_it_covers(override: str, covered: bool) -> None:
    recipe = load_recipe("llava-v1.5-7b-lora", [override])
    device = Target(True, 80 * 10**9)
    verdict = stored_verdict(recipe, 2, device)
    assert (verdict is not None and verdict.fits) == covered
    small = stored_verdict(load_recipe("llava-v1.5-7b-lora"), 2, Target(True, 10**9))
    assert small is not None
    assert not small.fits


def test_defaults_of_a_machine_without_gpu(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llavactl.verbs.init.models import DEMO_MODELS, HUB_MODELS, default_models

    assert default_models(cuda=True) == HUB_MODELS
    installed = DEMO_MODELS[0] in registry().names("vision")
    assert default_models(cuda=False) == (DEMO_MODELS if installed else HUB_MODELS)


@pytest.mark.parametrize(
    "name", [name if name in ("-r", "a\tb") else pytest.param(name, marks=pytest.mark.slow) for name in ODD_NAMES]
)
def test_odd_names_of_folders(name: str, project: Path) -> None:
    captioned(project / name)
    (project / "sub").mkdir()
    for model in ("clip", "language"):
        shutil.copytree(project / model, project / name / f".{model}")
    report = init(
        *("--data", f"./{name}", "--vision", f"./{name}/.clip", "--language", f"./{name}/.language"),
        *("--to", "sub/recipe.yaml"),
        models=False,
    )
    recipe = load_recipe(report["recipe"])
    assert Path(recipe.sources(1)[0].spec()["path"]).samefile(project / name)
    assert Path(recipe.language.spec()["model"]).samefile(project / name / ".language")
    moved = project.rename(project.with_name("moved"))
    assert Path(load_recipe(moved / "sub" / "recipe.yaml").sources(1)[0].spec()["path"]).samefile(moved / name)


def test_absolute_paths_outside_stay_absolute(project: Path, tmp_path: Path) -> None:
    photos = captioned(tmp_path / "elsewhere")
    report = init("--data", str(photos))
    assert f"path: {photos}}}" in report["text"]
    assert load_recipe(report["recipe"]).sources(1)[0].spec()["path"] == str(photos)


@pytest.mark.parametrize(("samples", "size", "epochs"), [(10, 4, 5), (500, 4, 1), (5000, 16, 1), (558_000, 256, 1)])
def test_batches_leave_enough_steps(samples: int, size: int, epochs: int) -> None:
    from llavactl.verbs.init import settings

    assert settings.batch_size(samples, 256) == size
    assert settings.epochs(samples, 256) == epochs


def test_the_commented_section_is_valid(project: Path) -> None:
    report = init("--data", str(captioned(project / "photos")))
    lines = report["text"].splitlines()
    start = lines.index("# generate:")
    file = Path(report["recipe"])
    file.write_text("\n".join([*lines[:start], *(line.removeprefix("# ") for line in lines[start:])]))
    assert run_cli("recipes", "check", str(file)).exit_code == 0
    assert load_recipe(file).generate is not None


def test_the_schema_for_editors(project: Path) -> None:
    report = init("--data", "records.json", "--json-schema")
    document = json.loads(Path(report["schema"]).read_text())
    recipe = load_recipe(report["recipe"])
    assert set(document["properties"]) >= set(recipe.model_dump())
    first = report["text"].splitlines()[0]
    match = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert match
    assert Path(report["recipe"]).with_name(match[1]).samefile(report["schema"])


def test_nothing_is_overwritten_or_written_by_accident(project: Path) -> None:
    before = sorted(project.rglob("*"))
    result = run_cli("init", "--data", "records.json", "--vision", "clip", "--language", "language", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert sorted(project.rglob("*")) == before
    (project / "recipe.yaml").write_text(result.stdout)
    assert run_cli("recipes", "check").exit_code == 0
    (project / "recipe.yaml").write_text("name: mine\n")
    refused = run_cli("init", "--data", "records.json")
    assert refused.exit_code == 1
    assert "--force" in refused.stderr
    printed = run_cli("init", "--data", "records.json", "--vision", "clip", "--language", "language", "--dry-run")
    assert printed.stdout == result.stdout, "a dry run overwrites nothing, so it isn't refused"
    assert (project / "recipe.yaml").read_text() == "name: mine\n"
    empty = run_cli("init", "--data", "", "--force")
    assert empty.exit_code == 1
    assert "empty" in empty.stderr
    assert init("--data", "records.json", "--force")["written"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can create files")
def test_a_dry_run_finds_a_destination_that_cannot_be_written(project: Path) -> None:
    arguments = ("init", "--data", "records.json", "--vision", "clip", "--language", "language")
    for more in ((), ("--dry-run",)):
        result = run_cli(*arguments, "--to", "/proc/recipe.yaml", *more)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "/proc/recipe.yaml" in result.stderr


def test_a_folder_as_destination_gets_a_recipe_yaml(project: Path) -> None:
    (project / "new").mkdir()
    assert init("--data", "records.json", "--to", "new")["recipe"] == str(Path("new", "recipe.yaml"))
    assert "DIR" in run_cli("init", "--help").stdout


def test_what_is_missing_is_a_usage_error(project: Path) -> None:
    for arguments, option in (
        ((), "--data"),
        (("--data", str(records(project / "sub.json", "conversations"))), "--images"),
    ):
        shutil.rmtree(project / "images", ignore_errors=bool(arguments))
        result = run_cli("init", *arguments, "--vision", "clip", "--language", "language")
        assert result.exit_code == 2
        assert option in result.stderr
        (project / "images").mkdir()


def test_on_a_terminal_it_asks_again_until_answers_are_usable(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llavactl.cli import init as cli_init

    terminal = SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(cli_init, "sys", terminal)
    data = records(tmp_path / "r.json", "conversations")
    answers = ("nothing.json", str(data), "nowhere", "images", "24 bananas", "24GB", "./nothing", "clip", "language")
    result = run_cli("init", "--name", "asked", stdin="\n".join(answers) + "\n")
    assert result.exit_code == 0, result.stderr
    recipe = load_recipe(project / "recipe.yaml")
    assert (recipe.name, recipe.stage2.micro_batch_tokens) == ("asked", "auto")
    assert Path(recipe.sources(2)[0].spec()["images"]).samefile(project / "images")
    assert Path(recipe.language.spec()["model"]).samefile(project / "language")
    assert "error: nothing.json: no such file" in result.stderr
    assert "Error" not in result.stderr
    assert run_cli("init", "--yes").exit_code == 2, "it asks nothing with --yes"


@pytest.mark.parametrize(
    ("arguments", "mentioned"),
    [
        (("--data", "nothing.json"), "nothing.json"),
        (("--data", "clip"), "no images"),
        (("--data", "bare"), "no captions"),
        (("--data", "messages.json"), "conversations"),
        (("--data", "records.json", "--vision", "language"), "language"),
        (("--data", "records.json", "--language", "./nowhere"), "nowhere"),
        (("--data", "records.json", "--to", "missing/recipe.yaml"), "missing"),
        (("--data", "records.json", "--to", "recipe.txt"), ".yaml"),
    ],
)
def test_what_cannot_be_used_is_an_error(arguments: tuple[str, ...], mentioned: str, project: Path) -> None:
    toy_photos(project / "bare", 2)
    (project / "messages.json").write_text('[{"messages": [], "images": ["a.jpg"]}]')
    (project / "clip" / "preprocessor_config.json").touch()
    before = sorted(project.rglob("*"))
    named = [] if "--vision" in arguments else ["--vision", "clip"]
    named += [] if "--language" in arguments else ["--language", "language"]
    result = run_cli("init", *arguments, *named)
    assert (result.exit_code, result.stdout) == (1, ""), result.stderr
    assert mentioned in result.stderr
    assert sorted(project.rglob("*")) == before


@pytest.mark.parametrize(
    "name", [pytest.param("folder with text files", marks=pytest.mark.slow), "captions and conversations"]
)
def test_the_recipe_trains(name: str, project: Path) -> None:
    report = init("--data", *DATA[name][0](project))
    short = [f"-o stage{stage}.{key}=2".split() for stage in STAGES for key in ("max_steps", "epochs")]
    result = run_cli("run", "-r", report["recipe"], "--json", *(word for option in short for word in option))
    assert result.exit_code == 0, result.stderr
    held_out = [line for line in result.stderr.splitlines() if "held out" in line]
    assert [re.findall(r"stage(\d)", line) for line in held_out] == [["1"], ["2"]]
    trained = result.json()
    assert trained["stage2"]["steps"] == 2
    assert trained["stage2"]["val_loss"] > 0
    model = report["next"][-1].rpartition(" ")[2]
    photo = next(project.glob("*/*.jpg"))
    answer = run_cli("chat", "--model", model, "--image", str(photo), "--prompt", "What is this?", "--json")
    assert answer.exit_code == 0, answer.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--data", "images/{image}"), "is an image"),
        (("--data", "images", "--images", "clip"), "leave out `--images`"),
        (("--vision", "speaker"), "speaker is a language model, expected a vision encoder"),
        (("--language", "looker"), "looker is a vision encoder, expected a language model"),
    ],
)
def test_mistaken_names_are_explained(
    project: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], why: str
) -> None:
    from llavactl.core.registry import Registry

    names = Registry.names
    added = {"vision": ["looker"], "languages": ["speaker"]}
    monkeypatch.setattr(Registry, "names", lambda self, kind: [*names(self, kind), *added.get(kind, [])])
    image = next(file for file in (project / "images").iterdir() if file.suffix in (".png", ".jpg"))
    (project / "images" / f"{image.stem}.txt").write_text("A photo.")
    given = {"--data": "records.json", "--vision": "clip", "--language": "language"}
    given |= dict(zip(arguments[::2], (each.format(image=image.name) for each in arguments[1::2]), strict=True))
    result = run_cli("init", *(word for pair in given.items() for word in pair))
    assert result.exit_code == 1
    assert why in result.stderr


@pytest.mark.parametrize(
    "data", ["folder with text files", pytest.param("captions and conversations", marks=pytest.mark.slow)]
)
def test_steps_are_those_of_training(data: str, project: Path) -> None:
    report = init("--data", *DATA[data][0](project))
    for stage, section in STAGES.items():
        told = re.search(rf"^{section}:.*?# about ([\d,]+) steps", report["text"], re.MULTILINE | re.DOTALL)
        assert told is not None
        plan = run_cli("train", "--stage", str(stage), "-r", report["recipe"], "--dry-run", "--json").json()
        assert int(told[1].replace(",", "")) == plan["steps"]


@pytest.mark.parametrize(("key", "option"), [("vision.model", "--vision"), ("stage2.method", "--method")])
def test_errors_name_options_and_not_a_file_that_is_not_written(
    key: str, option: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llavactl.verbs import preflight

    arguments = ("init", "--data", "records.json", "--vision", "clip", "--language", "language")
    named = [run_cli(*arguments, "--name", name) for name in ("a/b", "..", "")]
    monkeypatch.setattr(preflight, "faults", lambda _recipe: [(key, "can't be used")])
    for result, cited in (*((each, "--name") for each in named), (run_cli(*arguments), option)):
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error: {cited}: ")
        assert "recipe.yaml" not in result.stderr


@pytest.mark.slow
def test_what_llavactl_wrote_is_not_data(project: Path) -> None:
    captioned(project / "photos")
    report = init("--data", "photos")
    run = project / "photos" / "runs" / "demo"
    shutil.copytree(project / "photos", run / "stage1", ignore=shutil.ignore_patterns("runs"))
    (run / "recipe.yaml").write_text("name: demo\n")
    for folder, marker in (("photos/trained", "llavactl.json"), ("photos/exported", "llavactl_export.json")):
        captioned(project / folder, 2)
        (project / folder / marker).write_text("{}")
    captioned(project / "photos" / "runs" / "mine", 3)
    before = report["data"][0]["samples"]
    result = run_cli("init", "--data", "photos", "--vision", "clip", "--language", "language", "--force", "--json")
    assert result.json()["data"][0]["samples"] == before + 3, "the folder `runs` itself isn't special"
    for folder in (run, project / "photos" / "trained", project / "photos" / "exported"):
        assert str(folder) in result.stderr


@pytest.mark.parametrize(("command", "resumes"), [(("init",), False), (("doctor",), False), (("extract",), True)])
def test_only_commands_that_resume_say_so(
    command: tuple[str, ...], resumes: bool, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llavactl.verbs import doctor, extract

    def interrupt(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "doctor", interrupt)
    monkeypatch.setattr(extract, "extract", interrupt)
    monkeypatch.setattr("llavactl.cli.init.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    result = run_cli(*command, cwd=toy)  # at a question, the end of the input is handled as Ctrl-C
    assert result.exit_code == 130
    last = result.stderr.splitlines()[-1]
    assert last.startswith("interrupted")
    assert ("resume" in last) == resumes
