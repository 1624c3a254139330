"""``data filter`` and ``data expand`` on real and synthetic captions, also if interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llavactl.curation import noun_phrases
from llavactl.curation.captions import INSTRUCTIONS
from llavactl.testing import run_cli

FIXTURE = Path(__file__).parents[1] / "fixtures" / "pretrain.json"
REAL = Path(__file__).parents[3] / "shared" / "data" / "llava" / "blip_laion_cc_sbu_2k.json"
needs_real = pytest.mark.skipif(not REAL.is_file(), reason="needs ../shared/data")


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    texts = ["a dog on a lawn"] * 40 + ["a cat"] * 3 + ["a zebra"] + ["the blue bus"] * 5
    path = tmp_path / "captions.jsonl"
    rows = [{"id": f"c{n}", "image": f"{n}.jpg", "caption": text, "url": n} for n, text in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def rows(path: Path) -> list[Any]:
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def run(*words: Any) -> Any:
    result = run_cli("data", *map(str, words), "--json")
    assert result.exit_code == 0, result.stderr
    return result.json()


@pytest.mark.parametrize("workers", [1, 2])
def test_filter_balances_concepts(captions: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out.json"
    report = run("filter", captions, "--out", out, "--at-most", 10, "--workers", workers)
    kept = rows(out)
    assert all(row in rows(captions) for row in kept)
    assert [row["url"] for row in kept] == sorted(row["url"] for row in kept)
    counts = Counter(row["caption"] for row in kept)
    assert (counts["a cat"], counts["a zebra"], counts["the blue bus"]) == (3, 0, 5)
    assert 10 <= counts["a dog on a lawn"] <= 20
    assert (report["captions"], report["kept"], report["rare"], report["frequent"]) == (49, len(kept), 1, 2)
    first = out.read_bytes()
    run("filter", captions, "--out", out, "--at-most", 10)
    assert out.read_bytes() == first
    run("filter", captions, "--out", out, "--at-most", 10, "--seed", 1)
    assert out.read_bytes() != first


def test_another_extractor(captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "def last_words(captions):\n    return [[c.split()[-1]] for c in captions]\n"
        "def wrong(captions):\n    return [['a']]\n"
        "def none(captions):\n    return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    report = run("filter", captions, "--out", tmp_path / "o.jsonl", "--extractor", "mine:last_words")
    assert (report["phrases"], report["rare"], report["kept"]) == (4, 1, 48)
    for extractor, message in (
        ("mine:wrong", "49 captions"),
        ("mine:none", "mine:none"),
        ("mine:gone", "'mine:gone'"),
        ("nowhere:x", "'nowhere:x'"),
        ("mine", "module:attr"),
    ):
        words = ["data", "filter", str(captions), "--out", str(tmp_path / "x.json"), "--extractor", extractor]
        result = run_cli(*words, "--workers", "1")
        assert result.exit_code == 1
        assert message in result.stderr
        assert not (tmp_path / "x.json").exists()


def test_expanded_records_pass_check(captions: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert run("expand", captions, "--out", out)["records"] == 49
    first = rows(out)
    assert run("check", out)["problems"] == []
    questions = [row["conversations"][0]["value"] for row in first]
    assert {text.replace("<image>", "").strip() for text in questions} <= set(INSTRUCTIONS)
    assert len({text.replace("<image>", "").strip() for text in questions}) >= 11
    assert 10 < sum(text.startswith("<image>\n") for text in questions) < 39
    assert [row["conversations"][1]["value"] for row in first] == [row["caption"] for row in rows(captions)]
    for position, count in (("first", 49), ("last", 0)):
        run("expand", captions, "--out", out, "--image-tag", position)
        assert sum(row["conversations"][0]["value"].startswith("<image>\n") for row in rows(out)) == count


def test_a_records_instruction_does_not_depend_on_other_records(captions: Path, tmp_path: Path) -> None:
    complete, partial = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    run("expand", captions, "--out", complete, "--seed", 5)
    captions.write_text("\n".join(captions.read_text().splitlines()[10:]))
    run("expand", captions, "--out", partial, "--seed", 5)
    assert rows(partial) == rows(complete)[10:]
    run("expand", captions, "--out", partial, "--seed", 6)
    assert rows(partial) != rows(complete)[10:]


@pytest.mark.parametrize(
    ("file", "count", "most"),
    [(FIXTURE, 80, 0.9), pytest.param(REAL, 2183, 0.8, marks=needs_real)],
    ids=["fixture", "real"],
)
def test_captions_of_llava_records(file: Path, count: int, most: float, tmp_path: Path) -> None:
    out, again = tmp_path / "kept.json", tmp_path / "expanded.jsonl"
    report = run("filter", file, "--out", out)
    assert report["captions"] == count
    assert report["rare"] > 0
    assert 0.3 < report["kept"] / report["captions"] < most
    assert run("expand", out, "--out", again)["records"] == report["kept"]
    llava_instructions = {each["conversations"][0]["value"].replace("<image>", "").strip() for each in rows(file)}
    assert len(INSTRUCTIONS) == len(set(INSTRUCTIONS)) >= 11
    assert not llava_instructions & set(INSTRUCTIONS)


def test_captions_and_seed_of_a_recipe(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    recipe = ["-r", str(toy / "recipe.yaml")]
    assert run("filter", *recipe, "--out", out)["captions"] == 12
    assert run("expand", *recipe, "-o", "seed=3", "--out", out)["seed"] == 3
    result = run_cli("data", "expand", *recipe, "-o", "data.stage1=[]", "--out", str(out))
    assert result.exit_code == 1
    assert "data.stage1" in result.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 1, "caption": " "}', ":50: no `caption`"),
        ("{oops", ":50: not JSON"),
        ("[1]", ":50: no `caption`"),
        ('{"id": 1, "caption": "a dog"}', ":50: no `image`"),
    ],
)
def test_records_without_a_caption_are_reported_and_nothing_is_written(
    captions: Path, tmp_path: Path, line: str, message: str
) -> None:
    captions.write_text(captions.read_text() + "\n" + line)
    out = tmp_path / "out.json"
    result = run_cli("data", "expand", str(captions), "--out", str(out))
    assert result.exit_code == 1
    assert message in result.stderr
    assert not out.exists()


def test_an_interruption_leaves_the_output_unchanged(tmp_path: Path) -> None:
    """A subprocess, interrupted while it writes."""
    path, folder = tmp_path / "many.jsonl", tmp_path / "out"
    folder.mkdir()
    with path.open("w") as file:
        for number in range(400_000):
            file.write(json.dumps({"id": number, "image": "a.jpg", "caption": "a dog on a lawn"}) + "\n")
    out = folder / "out.json"
    out.write_text("before")
    words = [sys.executable, "-m", "llavactl", "data", "expand", str(path), "--out", str(out)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, env={**os.environ, "LLAVACTL_PLUGINS": ""})
    until = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert out.read_text() == "before"
    assert list(folder.iterdir()) == [out]


@pytest.mark.parametrize("verb", ["filter", "expand"])
def test_the_input_is_never_overwritten(captions: Path, verb: str) -> None:
    before = captions.read_bytes()
    result = run_cli("data", verb, str(captions), "--out", str(captions))
    assert result.exit_code == 1
    assert str(captions) in result.stderr
    assert captions.read_bytes() == before


@pytest.mark.parametrize("verb", ["filter", "expand"])
def test_all_records_without_a_caption_are_reported_at_once(captions: Path, tmp_path: Path, verb: str) -> None:
    text = captions.read_text() + '\n{"id": 1, "image": "a.jpg", "caption": " "}\n{"id": 2}\n{"id": 3\n'
    captions.write_text(text + '{"id": 4}\n' * 30)
    out = tmp_path / "out.json"
    result = run_cli("data", verb, str(captions), "--out", str(out))
    assert result.exit_code == 1
    for line in (50, 51, 53, 69):
        assert f"{captions}:{line}: no `caption`" in result.stderr
    assert f"{captions}:52: not JSON" in result.stderr
    assert "and 13 more" in result.stderr
    assert not out.exists()


def test_filter_without_textblob_names_the_extra(
    captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noun_phrases._tagger.cache_clear()
    noun_phrases.load_extractor.cache_clear()
    monkeypatch.setitem(sys.modules, "textblob.en", None)
    result = run_cli("data", "filter", str(captions), "--out", str(tmp_path / "out.jsonl"))
    assert result.exit_code == 1
    assert "textblob" in result.stderr
    assert "pip install 'llavactl[captions]'" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out.jsonl").exists()
