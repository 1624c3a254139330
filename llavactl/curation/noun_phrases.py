"""Noun phrases of captions: a part-of-speech tagger with its own lexicon, and a small grammar over its tags.

The tagger is TextBlob's (a lexicon and rules, MIT license, no download after installation). LLaVA used spaCy, whose
models are not on the package index; it can be used as the extractor instead (docs/reference/data.md).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from llavactl.core.errors import LlavactlError, PluginError

Extractor = Callable[[Sequence[str]], Iterable[Sequence[str]]]
"""Returns the noun phrases of each caption, in the same order."""

DEFAULT = "llavactl.curation.noun_phrases:noun_phrases"

_TAG_LETTERS = {
    **dict.fromkeys(["DT", "PDT", "PRP$", "WP$"], "D"),
    **dict.fromkeys(["JJ", "JJR", "JJS", "CD"], "A"),
    **dict.fromkeys(["VBN", "VBG", "VBD"], "V"),
    **dict.fromkeys(["NN", "NNS", "NNP", "NNPS"], "N"),
}
"""Letters for Penn Treebank tags: Determiner, Adjective or number, Verb participle, Noun."""

_PHRASE = re.compile("D*(?P<phrase>(?:(?<=D)[AV]+|A[AV]*)?N+(?:A+N+)*)")
"""Nouns and their modifiers; a participle only after a determiner or adjective (`a clipped hedge`)."""


def noun_phrases(captions: Sequence[str]) -> list[list[str]]:
    """The noun phrases of each of ``captions``, in lower case, without articles, possessives and pronouns."""
    return [_phrases(_tagged(caption)) for caption in captions]


@cache
def load_extractor(target: str) -> Extractor:
    """The extractor ``module:attr``.

    Raises:
        PluginError: it can't be imported or isn't callable.
        LlavactlError: it is the default one, and TextBlob is not installed.
    """
    if target == DEFAULT:
        _tagger()  # fails here, before any caption is read
    module, _, attribute = target.partition(":")
    try:
        extractor = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise PluginError(f"extractor {target!r} can't be loaded: {error}", hint="expected module:attr") from error
    if not callable(extractor):
        raise PluginError(
            f"extractor {target!r} is not a function", hint="expected a function from captions to phrases of each"
        )
    loaded: Extractor = extractor
    return loaded


@cache
def _tagger() -> Callable[..., Any]:
    """TextBlob's tagger, from the extra ``captions``."""
    try:
        from textblob.en import parse
    except ImportError as error:
        raise LlavactlError(
            f"extracting noun phrases needs textblob, which can't be imported ({error})",
            hint="pip install 'llavactl[captions]'",
        ) from error
    tagger: Callable[..., Any] = parse
    return tagger


def _tagged(caption: str) -> list[tuple[str, str]]:
    """(word, Penn Treebank tag) of each token."""
    sentences = _tagger()(caption, tokenize=True, tags=True, chunks=False).split()
    return [(word.lower(), tag) for sentence in sentences for word, tag, *_ in sentence]


def _phrases(tagged: Sequence[tuple[str, str]]) -> list[str]:
    letters = "".join(_TAG_LETTERS.get(tag, ".") for _, tag in tagged)
    spans = [match.span("phrase") for match in _PHRASE.finditer(letters)]
    return [" ".join(word for word, _ in tagged[start:end]) for start, end in spans]
