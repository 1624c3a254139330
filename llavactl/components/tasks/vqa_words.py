"""Short answers brought to one form before they are compared, as VQA's evaluation does (Antol et al. 2015).

Source of every rule: ``vqaEval.py`` of github.com/GT-Vision-Lab/VQA. Its oddities are kept, for they are in
all published numbers: one comma between digits lets every sign vanish, also where it would have become a space.
"""

from __future__ import annotations

import re

_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(at) for at, word in enumerate(_COUNTED)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_WHOLE = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# Each is known with any one of its apostrophes left out. "somebody'd" alone goes the other way in the original.
_CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word for word in _WHOLE.split() for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}
_PERIODS = 32
"""How many full stops go at most: the original hands the flag ``re.UNICODE`` over as the count."""


def normal(text: str) -> str:
    """``Two dogs, a cat.`` → ``2 dogs cat``."""
    words = [_NUMBERS.get(word, word) for word in _without_signs(text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def one_line(text: str) -> str:
    """``text`` without line ends, tabs and outer spaces."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def text_vqa(text: str) -> str:
    """TextVQA's form: commas and question marks go first, ``'s`` becomes a word of its own (``m4c_evaluator.py``)."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normal(one_line(text.strip()))


def _without_signs(text: str) -> str:
    numbers, kept = re.search(r"\d,\d", text), text
    for sign in _SIGNS:
        gone = numbers or f"{sign} " in text or f" {sign}" in text
        kept = kept.replace(sign, "" if gone else " ")
    return re.sub(r"\.(?!\d)", "", kept, count=_PERIODS)
