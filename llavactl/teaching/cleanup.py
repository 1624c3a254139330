"""Cleaning a language model's reply: removes thinking, code fences or tags around it, and remarks to the user.

Only unambiguous text is removed; otherwise the reply is refused. Losing a sample is better than keeping assistant
boilerplate or removing content.
"""

from __future__ import annotations

import re

from llavactl.core.errors import DataError


class ChatterError(DataError):
    """A reply with remarks to the user that can't be separated from its content."""


_THOUGHT = r"(?:think|thinking|thoughts?|reasoning|reflection|scratchpad|analysis|seed:think)"
_MARK = re.compile(
    rf"(?P<end><\s?/\s?{_THOUGHT}\s?>|◁/think▷|\[/THINK\]|<\|end_of_thought\|>|<\|END_THINKING\|>)"
    rf"|<\s?{_THOUGHT}\s?>|◁think▷|\[THINK\]|<\|begin_of_thought\|>|<\|START_THINKING\|>",
    re.IGNORECASE,
)
"""Thinking tags of DeepSeek and Qwen, Kimi, Magistral, Sky-T1 and Command, and those commonly requested in prompts."""

_FINAL = re.compile(r"<\|channel\|>\s{0,9}final\b[^<]{0,80}(?:<\|constrain\|>[^<]{0,80})?<\|message\|>")
_FLAT = re.compile(r"\A\s*analysis(?=[A-Z\"'(])")
"""Channels of gpt-oss, also without their special tokens: ``analysisWe …assistantfinalA dog.``"""

_END = re.compile(r"<\|(?:end|return)\|>\s*\Z")

_YES = r"(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|alright|great|gladly|understood|no problem)"
_LIKE = (
    r"(?:(?:detailed|thorough|brief|short|long|rich|full|complete|vivid|concise|comprehensive|accurate|possible|"
    r"sample|requested|generated|image|picture|photo|scene|visual|training|multi-turn|one|two|three|four|five|six|and|"
    r"new),? ){0,6}"
)
_WORK = r"(?:description|conversation|dialogue|dialog|question|answer|response|reply|q&a)s?"
_SOURCE = r"(?:image|picture|photo|scene|captions?|information|lines|list|details|text|boxes|depicted|described|shown)"
_OF = rf"(?: (?:of|for|about|based on|from) (?:the|this|your|what)\b[^\n:.!]{{0,60}}\b{_SOURCE}\b[^\n:.!]{{0,40}})?"
_HERE = (
    rf"(?:here(?:['’]s| is| are)|below (?:is|are)) (?:(?:a|an|the|your|my|some) )?{_LIKE}{_WORK}(?: and {_WORK})?{_OF}"
)
_SELF = (
    r"(?:i['’]d be (?:happy|glad) to|i can|i will|i['’]ll|let me) "
    r"(?:help|assist|describe|write|create|provide|give|generate)\b[^\n.!?:]{0,120}[.!:]"
)
_LEAD = re.compile(
    rf"\A(?:(?:{_YES} ?[!.,:—–-]*|{_SELF}) +){{0,4}}"
    rf"(?:{_HERE}(?::|[.!](?=[ \t]*\n))|(?:{_YES} ?[!.,:]+|{_SELF})[ \t]*\n)[ \t]*",
    re.IGNORECASE,
)
"""``Sure! Here is a detailed description of the image:``, before the text or on its own line."""

_NAMED = r"(?:(?:detailed|image|picture|photo|scene|full|final) ){0,3}(?:description|answer|response)"
_LABEL = re.compile(
    rf"\A(?:(?:\#{{1,6}} *)?(?:(?P<b>\*\*|__){_NAMED}(?:(?P=b) ?:|:(?P=b))|{_NAMED} ?:)"
    rf"|(?:\#{{1,6}} *{_NAMED}|\*\*{_NAMED}\*\*)[ \t]*\n)[ \t]*",
    re.IGNORECASE,
)
_OFFER = (
    r"(?:(?:please )?let me know (?:if|whether|what|when|how)\b|(?:please )?(?:feel free|don['’]t hesitate) to "
    r"(?:ask|reach out|let me know|adjust|modify|request)\b|i hope (?:this|that|these|it)\b"
    r"|hope (?:this|that|it) helps\b"
    r"|would you like me to\b|do you (?:want|need) me to\b|is there anything (?:else|you)\b)"
)
_IF = (
    r"if you(?:['’]d| would| need| want| have)\b[^\n.!?]{0,120}, "
    r"(?:please )?(?:let me know|just ask|i can|i['’]d be happy)"
)
_TAIL = re.compile(rf"(?:(?:{_IF}|{_OFFER})\b[^\n.!?]{{0,200}}[.!?]+[^\w\n]*)+", re.IGNORECASE)
_SPECIAL = r"<\|\w{2,40}\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]"
"""Special tokens of chat templates, which a server should have removed."""

_TALKS = (
    rf"\A(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|alright|gladly|understood|no problem)\s?[!,.:—–-]"
    rf"|\A(?:okay|ok|alright),? so\b|\A(?:great|good|excellent) question\b|\Athank(?:s| you) for (?:the|your)\b"
    rf"|\bhere you go\b|\b{_HERE}\b|\bi(?:['’]d| would) be (?:happy|glad) to\b|\bi(?:['’]m| am) ready to\b"
    rf"|\bas (?:you )?requested\b|\bas an? (?:ai |language |ai language )?(?:assistant|model)\b"
    rf"|\A(?:let me|let['’]s|i (?:need|have|should|will)|i['’]ll|we (?:need|have|should)|to describe)\b"
    rf"|\Ai think (?:we|i) (?:need|should)\b|\bthe user (?:wants|asks|asked|needs)\b"
    rf"|\bthe following is (?:a|an|the|my) {_LIKE}{_WORK}\b|\Avoici\b"
)
_FRAMED = (
    r"\A\W{0,6}(?:assistant|ai|thinking|reasoning|thoughts?|thought process|analysis|output|text|caption|note)\b"
    r"\W{0,4}(?::|\n)|\A\W{0,6}(?:description|caption) of the (?:image|picture|photo|scene)\W{0,4}(?::|\n)"
    r"|\A<(?:answer|response|output|final|final_answer|description|caption)>"
    r"|\A\[(?:answer|response|output|description)\]"
    r"|\A\{\s?[\"']|^[ \t]*(?:\#{1,6} *)?(?:human|user|assistant) ?:"
    r"|^\W{0,4}(?:word count|total words)\b|\(\d+ words\)|\bp\.s\.|\s(?-i:END)\W*\Z"
    r"|^\W{0,4}end of (?:the )?(?:description|answer|response)\b|\bhow does (?:this|that) (?:look|sound)\b"
    r"|\bthis (?:description|answer|response) (?:covers|includes|is based|should)\b"
)
_LEFT = re.compile(rf"{_TALKS}|{_FRAMED}|{_SPECIAL}|\b(?:{_IF}|{_OFFER})", re.IGNORECASE | re.MULTILINE)
_LEFT_IN_TALK = re.compile(rf"\b(?:{_IF}|{_OFFER})\b|{_SPECIAL}", re.IGNORECASE)
"""The subset that isn't valid in a conversation, either, where ``Certainly!`` may answer a question."""

_RULE = re.compile(r"(?:-{3,}|\*{3,}|_{3,})")
_FENCE = re.compile(r"[ \t]*(?:```|~~~)[\w-]*[ \t]*")
_LAYERS = 8
"""Nested wrappings that are removed; a reply with more is refused."""

_WRAPPED = re.compile(
    r"\A<(answer|response|output|final|final_answer|description|caption)>(.*)</\1>\Z", re.IGNORECASE | re.DOTALL
)


def without_thinking(reply: str) -> str:
    """``reply`` without the thinking at its beginning, whether or not its opening tag is there.

    Raises:
        DataError: the thinking has no end, or occurs again within the answer.
    """
    if "<|channel|>" in reply:
        finals = [match.end() for match in _FINAL.finditer(reply)]
        if not finals:
            raise DataError("the reply has only thinking: no channel `final`")
        return _END.sub("", reply[finals[-1] :])
    if _FLAT.match(reply):
        _, ended, reply = reply.rpartition("assistantfinal")
        if not ended:
            raise DataError("the reply has only thinking, without an end")
    begin, thinking = 0, False
    for mark in _MARK.finditer(reply):
        if mark["end"]:
            begin, thinking = mark.end(), False
        elif not thinking and reply[begin : mark.start()].strip():
            raise DataError(f"the answer contains thinking: {mark[0]}")
        else:
            thinking = True
    if thinking:
        raise DataError("the thinking in the reply has no end")
    return reply[begin:]


def without_wrapping(reply: str, *, label: bool = False) -> str:
    """``reply`` without a code fence, tag or rule around it, and without remarks to the user before and after it.

    With ``label``, a leading ``Description:`` or the like is removed, too.
    """
    text = reply.strip()
    for _ in range(_LAYERS):
        text = _inside(text)
        for pattern in (_LEAD, _LABEL) if label else (_LEAD,):
            if (match := pattern.match(text)) and text[match.end() :].strip():
                text = text[match.end() :].strip()
        first, _, rest = text.partition("\n")
        if _RULE.fullmatch(first.strip()) and rest.strip():
            text = rest.strip()
        rest, _, last = text.rpartition("\n")
        if rest.strip() and (_RULE.fullmatch(last.strip()) or _TAIL.fullmatch(last.strip())):
            text = rest.strip()
    return text


def _inside(text: str) -> str:
    """The content of a code fence or tag that encloses all of ``text``."""
    if match := _WRAPPED.match(text):
        return match[2].strip()
    lines = text.split("\n")
    fences = [at for at, line in enumerate(lines) if _FENCE.fullmatch(line)]
    return "\n".join(lines[1:-1]).strip() if fences == [0, len(lines) - 1] and len(lines) > 2 else text


def reject_chatter(text: str, *, talk: bool) -> None:
    """Raises ChatterError if ``text``, an answer in a conversation (``talk``) or a description, addresses the user."""
    if match := (_LEFT_IN_TALK if talk else _LEFT).search(text):
        context = " ".join(text[max(match.start() - 30, 0) : match.end() + 30].split())
        raise ChatterError(f"the reply addresses the user: {context!r}")
