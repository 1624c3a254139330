"""Noun phrases of captions: a part-of-speech tagger that ships its lexicon, and a small grammar over its tags.

The tagger is TextBlob's (a lexicon and rules; MIT, nothing to download after it is installed). LLaVA used spaCy, whose
models are not on the package index; whoever has one names it as the extractor instead (docs/data.md).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from llavactl.core.errors import LlavactlError, PluginError

Extractor = Callable[[Sequence[str]], Iterable[Sequence[str]]]
"""Captions to the noun phrases of each, in the same order."""

DEFAULT = "llavactl.curation.noun_phrases:noun_phrases"

_SIGN = {
    **dict.fromkeys(["DT", "PDT", "PRP$", "WP$"], "D"),
    **dict.fromkeys(["JJ", "JJR", "JJS", "CD"], "A"),
    **dict.fromkeys(["VBN", "VBG", "VBD"], "V"),
    **dict.fromkeys(["NN", "NNS", "NNP", "NNPS"], "N"),
}
"""A letter for tags of the Penn Treebank: determiner, adjective or number, participle, noun."""

_PHRASE = re.compile("D*(?P<phrase>(?:(?<=D)[AV]+|A[AV]*)?N+(?:A+N+)*)")
"""Nouns with what stands before them; a participle only behind a determiner or adjective (`a clipped hedge`)."""


def noun_phrases(captions: Sequence[str]) -> list[list[str]]:
    """The noun phrases of each of ``captions``, in lower case, without articles, possessives and pronouns."""
    return [_chunks(_tagged(caption)) for caption in captions]


@cache
def load_extractor(target: str) -> Extractor:
    """The extractor ``module:attr``.

    Raises:
        PluginError: it can't be imported or called.
        LlavactlError: it is the default one, and TextBlob is not installed.
    """
    if target == DEFAULT:
        _tagger()  # fails here, before any caption is read
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise PluginError(f"extractor {target!r} can't be loaded: {error}", hint="it is written module:attr") from error
    if not callable(found):
        raise PluginError(f"extractor {target!r} is no function", hint="it takes captions and gives phrases of each")
    loaded: Extractor = found
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
    """(word, Penn Treebank tag) of each word and sign."""
    sentences = _tagger()(caption, tokenize=True, tags=True, chunks=False).split()
    return [(word.lower(), tag) for sentence in sentences for word, tag, *_ in sentence]


def _chunks(tagged: Sequence[tuple[str, str]]) -> list[str]:
    signs = "".join(_SIGN.get(tag, ".") for _, tag in tagged)
    spans = [match.span("phrase") for match in _PHRASE.finditer(signs)]
    return [" ".join(word for word, _ in tagged[start:end]) for start, end in spans]
