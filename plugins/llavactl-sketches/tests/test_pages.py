"""Pages, their positions and their sketches: splits are disjoint, everything fits, and images are reproducible."""

import hashlib
import io
import subprocess
import sys
from itertools import combinations

import pytest
from llavactl_sketches import drawing
from llavactl_sketches.layout import FRAMES, PAGE, place
from llavactl_sketches.pages import LAYOUTS, ROWS, Element, Page, draw_page, split_of
from llavactl_sketches.source import SketchesOptions, sketches
from llavactl_sketches.words import WORDS
from PIL import Image, ImageStat

PAGES = [draw_page(split, seed, index, "en") for split in ("train", "test") for seed in (0, 1) for index in range(300)]


def test_no_structure_is_in_both_splits_for_any_seeds():
    structures = {split: {page.structure for page in PAGES if page.id.startswith(split)} for split in ("train", "test")}
    assert not structures["train"] & structures["test"]
    assert min(map(len, structures.values())) > 100
    assert all(split_of(structure) == split for split, found in structures.items() for structure in found)


def test_texts_are_not_part_of_the_structure():
    pages = [Page("", "", (Element("h1", text), Element("img"))) for text in ("Tea", "Garden")]
    assert len({page.structure for page in pages}) == 1
    assert len({page.html for page in pages}) == 2


def test_layouts_take_turns_and_each_occurs_in_both_splits():
    assert [page.layout for page in PAGES[:5]] == list(LAYOUTS)
    for split in ("train", "test"):
        for layout in LAYOUTS:
            pages = [page for page in PAGES if page.layout == layout and page.id.startswith(split)]
            assert len({page.structure for page in pages}) >= 8


def test_all_elements_fit_on_the_page_without_overlaps():
    for page in PAGES:
        items = [item for item in place(page.body) if item.tag not in FRAMES]
        assert len(items) <= 3 * ROWS
        for item in items:
            left, top, right, bottom = item.box
            assert 0 <= left < right <= PAGE
            assert 0 <= top < bottom <= PAGE
        for one, other in combinations(items, 2):
            (a, b, c, d), (e, f, g, h) = one.box, other.box
            assert min(c, g) <= max(a, e) or min(d, h) <= max(b, f), (one, other)


def test_frames_contain_their_elements():
    for page in PAGES:
        items = place(page.body)
        frames = [item.box for item in items if item.tag in FRAMES]
        inside = [
            any(a <= e and b <= f and g <= c and h <= d for a, b, c, d in frames)
            for e, f, g, h in (item.box for item in items if item.tag not in FRAMES)
        ]
        assert bool(frames) == any(inside)


@pytest.mark.parametrize("language", WORDS)
def test_words_have_one_place_and_fit_into_the_narrowest_column(language):
    words = WORDS[language]
    groups = (words.menu, words.heading, words.action, words.label, words.item)
    everything = [word for group in groups for word in group]
    assert len(set(everything)) == len(everything) == 40
    for word in everything:
        assert len(word) <= 8
        assert all(drawing._letter(letter) for letter in word), "the font has this letter"
        assert word.isalpha()
    assert all(drawing._letter(letter) != drawing._letter("?") for letter in "".join(everything))


def test_the_seed_and_the_index_determine_a_sketch():
    def digest(**options: object) -> list[str]:
        samples = sketches(SketchesOptions(count=3, **options))
        return [hashlib.sha256(sample.images[0].read()).hexdigest() for sample in samples]

    first = digest()
    assert first == digest()
    others = [digest(seed=1), digest(split="test"), digest(language="de"), digest(size=300)]
    assert len({*first, *(each for other in others for each in other)}) == 15


def test_another_process_draws_the_same_bytes():
    code = """
import hashlib
from llavactl_sketches.source import SketchesOptions, sketches
for sample in sketches(SketchesOptions(count=5)):
    print(hashlib.sha256(sample.images[0].read() + repr(sample.turns[1]).encode()).hexdigest())
"""
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0].split())) == 5


DIGEST = "3e44ed77768a3bc8eca9e0956bda6e8de58f6eff0ee4be458e0640d59c142508"
"""sha256 of the pixels of five sketches. If it changes, increment ``DRAWING_VERSION``."""


def test_the_pixels_are_those_of_this_version():
    pixels = hashlib.sha256()
    for sample in sketches(SketchesOptions(count=5)):
        pixels.update(Image.open(io.BytesIO(sample.images[0].read())).tobytes())
    assert (drawing.DRAWING_VERSION, pixels.hexdigest()) == (1, DIGEST)


def test_the_stamp_changes_with_the_image():
    options = [{}, {"seed": 1}, {"language": "fr"}, {"size": 300}, {"split": "test"}]
    images = [next(iter(sketches(SketchesOptions(count=1, **each)))).images[0] for each in options]
    assert len({image.stamp() for image in images}) == len(options)


def test_nothing_is_drawn_before_an_image_is_read(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(drawing, "draw", refuse)
    samples = list(sketches(SketchesOptions(count=500)))
    assert all(image.stamp() for sample in samples for image in sample.images)
    with pytest.raises(AssertionError):
        samples[0].images[0].read()


@pytest.mark.parametrize("size", [112, 224, 500])
def test_ink_is_where_elements_are(size):
    """The image below the last element is paper, and each element has ink in or around its box."""
    for sample in sketches(SketchesOptions(count=10, size=size)):
        image = Image.open(io.BytesIO(sample.images[0].read())).convert("L")
        assert image.size == (size, size)
        paper = image.getpixel((size // 2, size - 2)) if sample.boxes[-1].xyxy[3] < 0.9 else 225
        for box in sample.boxes:
            left, top, right, bottom = (round(side * size) for side in box.xyxy)
            grown = (max(left - 4, 0), max(top - 4, 0), min(right + 4, size), min(bottom + 4, size))
            assert ImageStat.Stat(image.crop(grown)).extrema[0][0] < paper - 60, box


def test_samples_describe_their_image():
    for sample in sketches(SketchesOptions(count=20, prompt="HTML?")):
        user, assistant = sample.turns
        assert user.text == "\nHTML?"
        assert assistant.text.startswith("```html\n")
        assert assistant.text.endswith("\n```")
        texts = [box.category.split()[0] for box in sample.boxes if len(box.category.split()) > 1]
        assert texts
        assert all(text in assistant.text for text in texts)
        assert len(sample.captions[0].split(", ")) == len(sample.boxes)
