"""``data check`` locates seeded faults in files and recipes, and ``--fix`` removes them."""

from __future__ import annotations

import json
import shlex
import shutil
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llavactl.curation.lengths import stage_lengths
from llavactl.curation.problems import KINDS
from llavactl.data.image_order import arrange
from llavactl.data.records import samples
from llavactl.recipe.load import load_recipe
from llavactl.testing import run_cli

FIXTURES = Path(__file__).parents[1] / "fixtures"
REAL = Path(__file__).parents[3] / "shared" / "data" / "llava"


def record(number: int, image: str | None = "photo-000.jpg", **changes: Any) -> dict[str, Any]:
    talk = [{"from": "human", "value": "<image>\nWhat?" if image else "What?"}, {"from": "gpt", "value": "A dog."}]
    return {"id": f"r{number}", **({"image": image} if image else {}), "conversations": talk, **changes}


def talk(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": text} for speaker, text in messages]


FAULTS: dict[str, Any] = {
    "record": {"id": "f"},
    "media": record(0, None, video="x.mp4"),
    "message": record(0, conversations=[{"from": "human"}, {"from": "gpt", "value": "Yes."}]),
    "role": record(0, None, conversations=talk(("martian", "Hi"), ("gpt", "Yes."))),
    "turns": record(0, conversations=talk(("human", "<image>"), ("human", "Hi"), ("gpt", "Yes."))),
    "no-answer": record(0, None, conversations=talk(("human", "Hi"), ("gpt", " "))),
    "tags": record(0, conversations=talk(("human", "<image>"), ("gpt", "A."), ("human", "<image>"), ("gpt", "B."))),
    "placeholder": record(0, conversations=talk(("human", "<|image|>Hi"), ("gpt", "Yes."))),
    "image-path": record(0, "../../etc/passwd"),
    "image-missing": record(0, "none.jpg"),
    "image-broken": record(0, "cut.jpg"),
    "empty-answer": record(0, None, conversations=talk(("human", "A"), ("gpt", "B"), ("human", "C"), ("gpt", ""))),
    "duplicate-id": record(1, None),
    "no-id": record(0, None, id=None),
    "no-tag": record(0, conversations=talk(("human", "Hi"), ("gpt", "Yes."))),
    "unread": record(0, None, system="Be brief."),
    "placeholder-text": record(0, None, conversations=talk(("human", "<video>?"), ("gpt", "Yes."))),
    "tag-as-text": record(0, None, conversations=talk(("human", "<image>\nHi"), ("gpt", "Yes."))),
    "repeated-tag": record(0, conversations=talk(("human", "<image>\nTwo <image> tags"), ("gpt", "Yes."))),
    "tag-in-answer": record(0, None, conversations=talk(("human", "Hi"), ("gpt", "An <image>."))),
    "assistant-first": record(0, None, conversations=talk(("gpt", "Hello"), ("human", "Hi"), ("gpt", "Yes."))),
    "unanswered": record(0, None, conversations=talk(("human", "Hi"), ("gpt", "Yes."), ("human", "More?"))),
    "empty-question": record(0, None, conversations=talk(("human", ""), ("gpt", "Yes."))),
}


@pytest.fixture
def photos(toys: Path, tmp_path: Path) -> Path:
    """Images, one of them truncated after a valid header."""
    folder = tmp_path / "photos"
    shutil.copytree(toys / "images", folder)
    data = (folder / "photo-001.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    return folder


def check(file: Path, *more: str) -> tuple[int, Any]:
    result = run_cli("data", "check", str(file), "--json", *more)
    return result.exit_code, result.json()


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_each_problem_is_located(photos: Path, tmp_path: Path, kind: str, suffix: str) -> None:
    records = [
        record(1),
        record(2),
        {"id": f"{kind}", **FAULTS[kind], **({"id": "r1"} if kind == "duplicate-id" else {})},
    ]
    if kind == "no-id":
        del records[2]["id"]
    path = tmp_path / f"records.{suffix}"
    lines = [json.dumps(each) for each in records]
    path.write_text("[\n" + ",\n".join(lines) + "\n]" if suffix == "json" else "\n".join(lines))
    code, report = check(path, "--images", str(photos))
    (problem,) = report["problems"]
    assert (problem["problem"], problem["count"], problem["effect"]) == (kind, 1, KINDS[kind].effect)
    location = f"{path}:4 (record 2)" if suffix == "json" else f"{path}:3"
    assert problem["locations"][0].startswith(location)
    assert report["ok"] == (KINDS[kind].effect == "noted")
    assert code == (0 if report["ok"] else 1)
    assert report["records"] == 3


def test_every_kind_of_problem_is_tested() -> None:
    others = {"empty", "json", "source", "template", "untrained", "truncated"}
    others.add("image-absent")  # features/test_packs.py
    others |= {"no-caption", "no-image", "duplicate-caption", "encoding"}  # components/sources/test_image_folder.py
    assert set(KINDS) - set(FAULTS) == others | {"image-cut", "image-link", "image-twice"}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_repaired_file_has_no_errors(photos: Path, tmp_path: Path, suffix: str) -> None:
    faults = list(FAULTS.values())
    lines = [json.dumps(each) for fault in faults for each in (record(7), fault)]
    lines.insert(5, '{"id": "broken", "conversations": [')
    path, out = tmp_path / "in.json", tmp_path / f"out.{suffix}"
    path.write_text("[" + ",\n".join(lines) + "]")
    before = path.read_bytes()
    code, report = check(path, "--images", str(photos), "--fix", str(out))
    assert code == 0
    assert not report["ok"]
    assert path.read_bytes() == before
    after = check(out, "--images", str(photos))
    assert after[0] == 0
    assert after[1]["errors"] == 0
    assert after[1]["records"] == report["repaired"]["written"] >= 2 * len(FAULTS) - 12
    notes = [json.loads(line) for line in Path(report["repaired"]["log"]).read_text().splitlines()]
    assert len(notes) == report["repaired"]["changed"] + report["repaired"]["dropped"]
    assert any("image-broken: cut.jpg" in change for note in notes for change in note["changes"])
    read = json.loads(out.read_text()) if suffix == "json" else [json.loads(line) for line in out.open()]
    assert sum(each == record(7) for each in read) == len(FAULTS)
    assert run_cli("data", "check", str(path), "--fix", str(path)).exit_code == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["image-link", "image-twice"])
def test_fix_keeps_records_with_problems_outside_the_records(photos: Path, tmp_path: Path, kind: str) -> None:
    """Links to outside the folder and duplicate names in archives are reported; --fix drops no record for them."""
    if kind == "image-link":
        images = tmp_path / "links"
        images.mkdir()
        (images / "photo-000.jpg").symlink_to(photos / "photo-000.jpg")
    else:
        for number in (0, 1):
            with zipfile.ZipFile(tmp_path / f"{number}.zip", "w") as file:
                file.write(photos / f"photo-00{number}.jpg", "photo-000.jpg")
        images = tmp_path / "*.zip"
    path, out = tmp_path / "records.json", tmp_path / "out.json"
    path.write_text(json.dumps([record(1), record(2)]))
    code, report = check(path, "--images", str(images), "--fix", str(out))
    assert code == 1, "the output can't be used yet"
    assert [(each["problem"], each["count"], each["effect"]) for each in report["problems"]] == [(kind, 2, "stops")]
    assert (report["repaired"]["written"], report["repaired"]["dropped"]) == (2, 0)
    assert json.loads(out.read_text()) == [record(1), record(2)]
    result = run_cli("data", "check", str(path), "--images", str(images))
    assert result.exit_code == 1
    if kind == "image-link":
        assert "follow_links" in result.stderr
        assert check(path, "--images", str(images), "--follow-links")[0] == 0


def test_extract_and_train_refuse_what_check_refuses(toy: Path, tmp_path: Path) -> None:
    (toy / "images").rename(tmp_path / "photos")
    (toy / "images").mkdir()
    for each in (tmp_path / "photos").iterdir():
        (toy / "images" / each.name).symlink_to(each)
    recipe = str(toy / "recipe.yaml")
    report = run_cli("data", "check", "-r", recipe, "--json").json()
    assert {each["problem"] for each in report["problems"]} == {"image-link"}
    for verb in (["extract"], ["train", "--stage", "1", "-o", "features.mode=live"]):
        result = run_cli(*verb, "-r", recipe)
        assert result.exit_code == 1
        assert "follow_links" in result.stderr
        assert result.stderr.count("\n") < 20
    (tmp_path / "linked.yaml").write_text(
        (toy / "recipe.yaml").read_text().replace("images: images/", "images: images/, follow_links: true")
    )
    (tmp_path / "linked.yaml").rename(toy / "recipe.yaml")
    assert run_cli("data", "check", "-r", recipe).exit_code == 0
    assert run_cli("extract", "-r", recipe).exit_code == 0


def test_only_full_decoding_finds_damaged_pixels(photos: Path, tmp_path: Path) -> None:
    """The file has a valid header and end."""
    data = bytearray((photos / "photo-002.jpg").read_bytes())
    scan = data.index(b"\xff\xda")
    data[scan + 20 : -2] = b"\xff\xc3" * ((len(data) - scan - 22) // 2)
    (photos / "photo-002.jpg").write_bytes(data)
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record(1, "photo-002.jpg")]))
    reports = {mode: check(path, "--images", str(photos), "--decode", mode) for mode in ("no", "header", "full")}
    assert [code for code, _ in reports.values()] == [0, 0, 1]
    assert reports["full"][1]["problems"][0]["problem"] == "image-broken"
    assert [report["images"] for _, report in reports.values()] == [1, 1, 1]


@pytest.mark.parametrize("same", [True, False])
def test_a_recipe_is_checked_in_both_stages(toy: Path, same: bool) -> None:
    """A source that both stages read is checked once, with the lengths of each."""
    (toy / "images" / "photo-003.jpg").unlink()
    if not same:
        shutil.copy(toy / "records.json", toy / "other.json")
        recipe = (toy / "recipe.yaml").read_text().replace("path: records.json", "path: other.json", 1)
        (toy / "recipe.yaml").write_text(recipe)
    result = run_cli("data", "check", "-r", str(toy / "recipe.yaml"), "--json")
    report, sources = result.json(), 1 if same else 2
    assert report["records"] == 12 * sources
    (problem,) = report["problems"]
    assert (problem["problem"], problem["count"]) == ("image-missing", sources)
    assert len(set(problem["locations"])) == sources
    assert all(f"stage {stage}, max_length 2048" in report["token_counting"] for stage in (1, 2))
    assert result.exit_code == 1


def test_lengths_of_a_source_count_once_for_stages_with_the_same_ones(toy: Path) -> None:
    def truncated(*overrides: str) -> dict[str, int]:
        options = [word for each in ("stage1.template=vicuna-v1", *overrides) for word in ("-o", each)]
        report = run_cli("data", "check", "-r", str(toy / "recipe.yaml"), *options, "--json").json()
        return {each["problem"]: each["count"] for each in report["problems"]}

    one, other = "stage1.max_length=70", "stage2.max_length=70"
    assert truncated(one) == truncated(other) == truncated(one, other) == {"truncated": 12}
    assert truncated(one, "stage2.max_length=60") == {"truncated": 24}


@pytest.mark.parametrize(
    ("change", "trains", "left_out"),
    [
        ({"image": "none.jpg"}, True, 1),
        ({"conversations": talk(("human", "A"), ("gpt", "B"), ("human", "C"), ("gpt", ""))}, True, 0),
        ({"image": "../none.jpg"}, False, 0),
        ({"conversations": []}, False, 0),
    ],
)
def test_the_report_says_whether_training_works(
    photos: Path, tmp_path: Path, change: dict[str, Any], trains: bool, left_out: int
) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record(1), {**record(2), **change}]))
    code, report = check(path, "--images", str(photos))
    assert (code, report["ok"], report["trains"], report["left_out"]) == (1, False, trains, left_out)
    result = run_cli("data", "check", str(path), "--images", str(photos))
    assert result.exit_code == 1
    first, hint = result.stderr.splitlines()
    assert first.startswith("warning: " if trains else "error: ")
    assert ("1 sample" in first) == (left_out == 1)
    assert "--fix" in hint


def test_training_does_not_work_if_no_record_of_a_stage_is_left(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record(1, "none.jpg")]))
    code, report = check(path, "--images", str(photos))
    assert (code, report["trains"], report["left_out"]) == (1, False, 1)
    assert run_cli("data", "check", str(path), "--images", str(photos)).stderr.startswith("error: ")


@pytest.mark.parametrize("length", [3, 70, 90])
def test_truncation_equals_that_of_training(toy: Path, length: int) -> None:
    recipe = load_recipe(str(toy / "recipe.yaml"), [f"stage2.max_length={length}"])
    lengths = stage_lengths(recipe, 2)
    report = run_cli(
        "data", "check", "-r", str(toy / "recipe.yaml"), "-o", f"stage2.max_length={length}", "--stage", "2", "--json"
    ).json()
    counted = {each["problem"]: each["count"] for each in report["problems"]}
    expected: Counter[str] = Counter()
    for sample in samples(recipe.data.stage2):
        full = lengths.encoding.encode(arrange(sample.turns, "first", ""))
        trained = sum(label != -100 for label in full.labels[:length])
        expected["untrained"] += len(full) > length and not trained
        expected["truncated"] += len(full) > length and trained > 0
    assert counted == {kind: count for kind, count in expected.items() if count}


def test_batched_lengths_equal_single_lengths(toy: Path) -> None:
    for path in [FIXTURES / "instruct.json", REAL / "llava_instruct_100.json", toy / "records.json"]:
        if not path.is_file():
            continue
        where = [f"data.stage2=[{{name: llava-json, path: {path}, images: {toy}}}]"]
        for change in ("stage2.image_order=first", "stage2.image_order=as-data", "stage2.template=tokenizer"):
            recipe = load_recipe(str(toy / "recipe.yaml"), [*where, change])
            lengths = stage_lengths(recipe, 2)
            all_samples = list(samples(recipe.data.stage2))
            one_by_one = [
                len(lengths.encoding.encode(arrange(each.turns, recipe.stage2.image_order, each.id)))
                for each in all_samples
            ]
            assert lengths.count(all_samples) == one_by_one
            for most in (0, 400, 1200, 10_000):
                limited = replace(lengths, max_length=most)
                assert limited.too_long(all_samples) == [length > most for length in one_by_one]


def test_fix_writes_the_only_source_of_a_recipe(toy: Path, tmp_path: Path) -> None:
    records = json.loads((toy / "records.json").read_text())
    records[3]["conversations"][0]["from"] = "Human"
    (toy / "records.json").write_text(json.dumps(records))
    words = ["data", "check", "-r", str(toy / "recipe.yaml"), "--fix", str(tmp_path / "out.json")]
    assert run_cli(*words).exit_code == 1, "two sources, one per stage"
    report = run_cli(*words, "--stage", "2", "--json").json()
    assert {key: report["repaired"][key] for key in ("written", "changed", "dropped")} == {
        "written": 12,
        "changed": 1,
        "dropped": 0,
    }
    records[3]["conversations"][0]["from"] = "human"
    assert json.loads((tmp_path / "out.json").read_text()) == records


@pytest.mark.parametrize(
    ("sources", "repairs"),
    [
        ({"stage1": ["good"], "stage2": ["bad"]}, ["--stage 2 --fix OUT"]),
        ({"stage1": ["bad"], "stage2": ["bad"]}, ["--stage 1 --fix OUT", "--stage 2 --fix OUT"]),
        ({"stage1": [], "stage2": ["bad"]}, ["--fix OUT"]),
        ({"stage1": ["good"], "stage2": ["bad", "good"]}, ["llavactl data check BAD --images IMAGES --fix FIXED"]),
    ],
)
def test_the_repairs_that_a_report_names_work(
    toy: Path, tmp_path: Path, sources: dict[str, list[str]], repairs: list[str]
) -> None:
    records = json.loads((toy / "records.json").read_text())
    (toy / "good.json").write_text(json.dumps(records))
    (toy / "bad.json").write_text(json.dumps([{**records[0], "conversations": []}, *records]))
    data = {
        stage: [
            {"name": "llava-json", "path": str(toy / f"{name}.json"), "images": str(toy / "images")} for name in names
        ]
        for stage, names in sources.items()
    }
    (toy / "data.yaml").write_text(json.dumps({"name": "data", "data": data}))
    words = ["data", "check", "-r", str(toy / "data.yaml")]
    result = run_cli(*words)
    assert result.exit_code == 1
    paths = {
        "BAD": toy / "bad.json",
        "IMAGES": toy / "images",
        "FIXED": toy / "bad.fixed.json",
        "OUT": tmp_path / "o.json",
    }
    for repair in repairs:
        assert f"`{_with_paths(repair, {**paths, 'OUT': 'OUT'})}`" in result.stderr
        typed = shlex.split(_with_paths(repair, paths))
        fixed = run_cli(*(typed[1:] if typed[0] == "llavactl" else [*words, *typed]), "--json").json()["repaired"]
        assert (fixed["written"], fixed["dropped"]) == (len(records), 1)
    if sum(map(len, sources.values())) > 1:
        refused = run_cli(*words, "--fix", str(tmp_path / "all.json"))
        assert refused.exit_code == 1
        assert _with_paths(repairs[0], {**paths, "OUT": "OUT"}) in refused.stderr


def _with_paths(text: str, paths: dict[str, Any]) -> str:
    return " ".join(str(paths.get(word, word)) for word in text.split())


def test_a_recipe_without_weights_is_checked_without_lengths(toy: Path) -> None:
    shutil.rmtree(toy / "language")
    missing = f"language.model={toy / 'language'}"  # a path, so that no hub is contacted
    result = run_cli("data", "check", "-r", str(toy / "recipe.yaml"), "-o", missing, "--json")
    assert result.exit_code == 0
    assert "not counted for stage 1" in result.json()["token_counting"]


def test_a_source_without_a_file(toy: Path) -> None:
    scenes = "data.stage2=[{name: scenes, scenes: 3}]"
    result = run_cli("data", "check", "-r", str(toy / "recipe.yaml"), "-o", scenes, "--stage", "2", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.json()["images"] > 0


def test_invalid_calls(toy: Path, tmp_path: Path) -> None:
    for words in (
        [str(tmp_path / "none.json")],
        [str(toy / "records.json"), "--images", str(tmp_path / "none")],
        ["-r", str(toy / "recipe.yaml"), "--fix", str(tmp_path / "out.json")],
        [str(toy / "records.json"), "--fix", str(tmp_path / "out.csv")],
    ):
        result = run_cli("data", "check", *words)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_valid_files(tmp_path: Path) -> None:
    code, report = check(FIXTURES / "instruct.json")
    assert (code, report["problems"], report["records"]) == (0, [], 12)
    code, report = check(FIXTURES / "pretrain.json", "--images", str(tmp_path))
    assert (code, report["records"], report["errors"]) == (1, 80, 80)
    assert [each["problem"] for each in report["problems"]] == ["image-missing"]


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
def test_real_records() -> None:
    code, report = check(REAL / "llava_instruct_100.json")
    assert (code, report["problems"], report["records"]) == (0, [], 100)
    code, report = check(REAL / "blip_laion_cc_sbu_2k.json", "--images", str(REAL))
    assert (code, report["records"], report["errors"]) == (1, 2183, 2183)


def test_json_has_all_locations_and_the_table_the_first(tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    file.write_text("{\n" * 40 + json.dumps(record(1, None)))
    (problem,) = json.loads(run_cli("data", "check", str(file), "--json").stdout)["problems"]
    assert [place.split(":")[1] for place in problem["locations"]] == [str(line) for line in range(1, 41)]
    printed = run_cli("data", "check", str(file)).stdout
    assert printed.count(f"{file}:") == 3
    assert "json: and 37 more" in printed


@pytest.mark.parametrize("text", ["", " \n", "[]"])
def test_a_file_without_records_is_a_problem(tmp_path: Path, text: str) -> None:
    file = tmp_path / "none.json"
    file.write_text(text)
    result = run_cli("data", "check", str(file), "--json")
    assert result.exit_code == 1
    assert [problem["problem"] for problem in json.loads(result.stdout)["problems"]] == ["empty"]


@pytest.mark.parametrize("verb", ["check", "stats", "filter", "expand"])
def test_a_folder_and_a_missing_file(tmp_path: Path, verb: str) -> None:
    out = ["--out", str(tmp_path / "out.json")] if verb in ("filter", "expand") else []
    assert f"{tmp_path} is a folder" in run_cli("data", verb, str(tmp_path), *out).stderr
    assert "no such file" in run_cli("data", verb, str(tmp_path / "none.json"), *out).stderr
