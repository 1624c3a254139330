"""Tokenizes the text of a conversation and computes labels from character offsets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from llavactl.core.schema import IGNORE, Content, Segment, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATORS = tuple(chr(0xFDEF - index) for index in range(32))
"""Unicode noncharacters. One that doesn't occur in a conversation is inserted into the names of special tokens, so that
the tokenizer doesn't recognize them. The separator's own tokens are removed after tokenization.
"""


class TokenRun(NamedTuple):
    """The tokens of the text between two images, or of one image.

    ``offsets`` are the tokens' positions in ``text``; ``separator`` is the one inserted into ``text``, if any. Before
    ``Encoding`` splits it at images, a run may contain images as single tokens.
    """

    ids: list[int]
    labels: list[int]
    text: str = ""
    offsets: Sequence[tuple[int, int]] = ()
    separator: str = ""

    def texts(self) -> Iterator[str]:
        """The characters of each token; a character of several tokens belongs to the first of them."""
        covered = 0
        for start, end in self.offsets or [(0, 0)] * len(self.ids):
            text = self.text[max(start, covered) : end]
            yield text.replace(self.separator, "") if self.separator else text
            covered = max(end, covered)


def tokenize(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, separator: str) -> TokenRun:
    """Tokenizes ``texts`` as one string. A token is a target if its last character is in ``trained`` text."""
    text = "".join(part.text for part in texts)
    if not text:
        return TokenRun([], [])
    is_target = [part.trained for part in texts for _ in part.text]
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoding["input_ids"]), list(encoding["offset_mapping"])
    if contains_separator(text, separator):
        kept = [index for index, (start, end) in enumerate(offsets) if text[start:end] != separator]
        ids, offsets = [ids[index] for index in kept], [offsets[index] for index in kept]
    # A token that the tokenizer inserted itself (SentencePiece's leading space) has no characters.
    last = [min(max(start, end - 1), len(is_target) - 1) for start, end in offsets]
    labels = [token if is_target[index] else IGNORE for token, index in zip(ids, last, strict=True)]
    return TokenRun(ids, labels, text, offsets, separator)


def contains_separator(text: str, separator: str) -> bool:
    return bool(separator) and separator in text


def insert_separator(part: Content, special_names: re.Pattern[str], separator: str) -> Content:
    """``part`` with ``separator`` after the first character of each special token's name."""
    return special_names.sub(rf"\1{separator}", part) if isinstance(part, str) else part


def special_name_pattern(names: set[str]) -> re.Pattern[str] | None:
    """Matches the first character of each of ``names``; None if there are none of two or more characters."""
    longer = sorted(name for name in names if len(name) > 1)
    if not longer:
        return None
    first_characters = "".join(sorted({re.escape(name[0]) for name in longer}))
    # Searching for a character class is three times as fast as searching for an alternation of names.
    return re.compile(f"([{first_characters}])(?<=(?={'|'.join(map(re.escape, longer))}).)", re.DOTALL)


def split_at_images(segments: Sequence[Segment]) -> list[list[Text] | None]:
    """The texts between images, tokenized together; None stands for an image."""
    chunks: list[list[Text] | None] = []
    for segment in segments:
        if not isinstance(segment, Text):
            chunks.append(None)
        elif chunks and (texts := chunks[-1]) is not None:
            texts.append(segment)
        else:
            chunks.append([segment])
    return chunks


def restore_spaces(texts: list[Text], omitted: re.Pattern[str]) -> list[Text]:
    """``texts`` with an additional space at the end of each match of ``omitted``."""
    positions = [match.end() for match in omitted.finditer("".join(part.text for part in texts))]
    if not positions:
        return texts
    spaced, start = [], 0
    for part in texts:
        end = start + len(part.text)
        cuts = [start, *(position for position in positions if start <= position < end), end]
        pieces = [part.text[left - start : right - start] for left, right in pairwise(cuts)]
        spaced.append(Text(" ".join(pieces), part.trained))
        start = end
    return spaced
