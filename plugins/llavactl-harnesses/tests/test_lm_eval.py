"""Local tasks, with images and without, run by lm-evaluation-harness on a toy model."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llavactl import Assistant, Sampling, Turn, image_in_memory

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval isn't installed: `make test-harnesses` installs it")

CHOICES = ["red", "green", "blue", "yellow"]
QUESTION = "Which color is it?"
IMAGES = """
from PIL import Image


def images(doc):
    return [Image.open(doc["file"])]
"""
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
"""
GENERATE = """
output_type: generate_until
doc_to_target: '{{CHOICES[label]}}'
generation_kwargs: {until: ["STOP"], max_gen_toks: 9, do_sample: false}
metric_list: [{metric: exact_match}]
"""
CHOOSE = """
output_type: multiple_choice
doc_to_choice: CHOICES
doc_to_target: label
metric_list: [{metric: acc}]
"""
WITH_IMAGE = 'doc_to_text: "<image>\\n{{question}}"\ndoc_to_image: !function images.images\n'
WITHOUT = "doc_to_text: '{{question}}'\ndescription: 'Answer in one word. '\n"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, photos: Sequence[Path]) -> Path:
    """A folder of four tasks: generation and multiple choice, with images and without."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "images.py").write_text(IMAGES)
    data = folder / "data.jsonl"
    records = [{"question": QUESTION, "file": str(photo), "label": index} for index, photo in enumerate(photos)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    for kind, output in (("generate", GENERATE), ("choose", CHOOSE)):
        for form, text in (("image", WITH_IMAGE), ("text", WITHOUT)):
            config = f"task: toy_{kind}_{form}{COMMON}{output}{text}"
            config = config.replace("DATA", json.dumps(str(data))).replace("CHOICES", json.dumps(CHOICES))
            (folder / f"{kind}_{form}.yaml").write_text(config)
    return folder


def conversations(photos: Sequence[Path], *, images: bool, chat: bool) -> list[list[Turn]]:
    """What lm-eval asks in a task."""
    if images:
        return [[Turn("user", (image_in_memory(opened(photo)), "\n", QUESTION))] for photo in photos]
    instruction = "Answer in one word. "
    turns = [Turn("system", (instruction,)), Turn("user", (QUESTION,))]
    return [turns if chat else [Turn("user", (instruction + QUESTION,))]] * len(photos)


def opened(photo: Path) -> Any:
    from PIL import Image

    return Image.open(photo)


def evaluated(folder: Path, tasks: Path, name: str, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    """The responses of the model, and the scores."""
    from llavactl_harnesses import lm_eval_model  # noqa: F401
    from lm_eval.tasks import TaskManager

    done = lm_eval.simple_evaluate(
        model="llavactl",
        model_args={"model": str(folder)},
        tasks=[name],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cuda:0",
        batch_size=3,
        bootstrap_iters=0,
        **options,
    )
    return [sample["resps"] for sample in done["samples"][name]], done["results"][name]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("form", ["image", "text"])
def test_generation_equals_llavactl(
    folder: Path, model: Assistant, tasks: Path, photos: Sequence[Path], form: str, chat: bool
) -> None:
    asked = conversations(photos, images=form == "image", chat=chat)
    complete = model.answer(asked, Sampling(9))
    path = tasks / f"generate_{form}.yaml"
    stop = next(text[1:3] for text in complete if len(text) > 3)
    original = path.read_text()
    try:
        path.write_text(original.replace('"STOP"', json.dumps(stop)))
        responses, scores = evaluated(folder, tasks, f"toy_generate_{form}", apply_chat_template=chat)
    finally:
        path.write_text(original)
    texts = [sample[0][0] for sample in responses]
    assert texts == [text.split(stop)[0].strip() for text in complete]
    assert texts != complete, "the stop string ends at least one answer"
    correct = [text == choice for text, choice in zip(texts, CHOICES, strict=True)]
    assert scores["exact_match,none"] == pytest.approx(sum(correct) / 4)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("form", ["image", "text"])
def test_multiple_choice_equals_llavactl(
    folder: Path, model: Assistant, tasks: Path, photos: Sequence[Path], form: str, chat: bool
) -> None:
    responses, scores = evaluated(folder, tasks, f"toy_choose_{form}", apply_chat_template=chat)
    best = []
    for turns, response in zip(conversations(photos, images=form == "image", chat=chat), responses, strict=True):
        expected = [model.log_likelihoods([turns], [choice])[0] for choice in CHOICES]
        assert [one[0][0] for one in response] == pytest.approx([each.log_probability for each in expected], abs=1e-3)
        assert [one[0][1] for one in response] == [each.greedy for each in expected]
        best.append(max(range(4), key=lambda index, expected=expected: expected[index].log_probability))
    assert scores["acc,none"] == pytest.approx(sum(index == choice for index, choice in enumerate(best)) / 4)


def test_examples_become_turns(folder: Path, model: Assistant, tasks: Path) -> None:
    path = tasks / "choose_text.yaml"
    original = path.read_text()
    try:
        path.write_text(original + "fewshot_split: test\nfewshot_config: {sampler: first_n}\n")
        responses, _ = evaluated(
            folder, tasks, "toy_choose_text", apply_chat_template=True, num_fewshot=1, fewshot_as_multiturn=True
        )
    finally:
        path.write_text(original)
    turns = [
        Turn("system", ("Answer in one word. ",)),
        Turn("user", (QUESTION,)),
        Turn("assistant", ("green",)),
        Turn("user", (QUESTION,)),
    ]
    expected = [model.log_likelihoods([turns], [choice])[0].log_probability for choice in CHOICES]
    # The first document's example is the second one: a document is not its own example.
    assert [one[0][0] for one in responses[0]] == pytest.approx(expected, abs=1e-3)


def test_the_command(folder: Path, tasks: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "llavactl", "lm-eval", "--model_args", f"model={folder}", "--batch_size", "2"),
        *("--include_path", str(tasks), "--tasks", "toy_choose_image", "--output_path", str(tmp_path / "out")),
        *("--use_cache", str(tmp_path / "cache")),
    ]
    for _ in range(2):  # the second run reads lm-eval's cache
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    results = [json.loads(file.read_text())["results"] for file in (tmp_path / "out").rglob("results_*.json")]
    assert len(results) == 2
    assert results[0]["toy_choose_image"]["acc,none"] == results[1]["toy_choose_image"]["acc,none"]
    assert "Requests remaining: 0" in done.stderr


def test_perplexity_is_refused(folder: Path) -> None:
    from llavactl_harnesses.lm_eval_model import LlavactlLM

    from llavactl import ModelError

    with pytest.raises(ModelError):
        LlavactlLM(str(folder), device="cpu").loglikelihood_rolling([])
