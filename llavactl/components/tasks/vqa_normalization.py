"""Normalization of short answers before comparison, as in the official VQA evaluation (Antol et al. 2015).

Source of all rules: ``vqaEval.py`` of github.com/GT-Vision-Lab/VQA. Its peculiarities are kept, since they are part of
all published scores: one comma between digits removes all punctuation, also where it would have become a space.
"""

from __future__ import annotations

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# Each contraction is recognized with any one of its apostrophes missing. "somebody'd" loses its apostrophe instead.
_CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word for word in _CONTRACTED.split() for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}
_MAX_PERIODS = 32
"""Maximum number of periods removed: the original passes the flag ``re.UNICODE`` (32) as ``count``."""


def normalize_vqa(text: str) -> str:
    """``Two dogs, a cat.`` → ``2 dogs cat``."""
    words = [_DIGITS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def one_line(text: str) -> str:
    """``text`` without newlines, tabs and surrounding whitespace."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_textvqa(text: str) -> str:
    """As TextVQA's ``m4c_evaluator.py``: also removes commas and question marks, and makes ``'s`` a separate word."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize_vqa(one_line(text.strip()))


def _without_punctuation(text: str) -> str:
    has_digit_comma, result = re.search(r"\d,\d", text), text
    for mark in _PUNCTUATION:
        is_removed = has_digit_comma or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_removed else " ")
    return re.sub(r"\.(?!\d)", "", result, count=_MAX_PERIODS)
