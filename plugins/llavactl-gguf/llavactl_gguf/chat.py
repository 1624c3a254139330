"""The chat template for llama.cpp, which passes content as text with a marker at the place of each image."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from llavactl import ModelError, SavedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_IMAGE = chr(0xFDD0)
"""A Unicode noncharacter, which doesn't occur in text."""

_LISTS = (
    "{%- set given = namespace(messages=[], marker='<__media__>') -%}"
    "{%- for message in messages -%}"
    "{%- set read = namespace(text='', images=[]) -%}"
    "{%- set content = message['content'] -%}"
    "{%- if content is not string -%}"
    "{%- for item in content -%}"
    "{%- if item['type'] == 'text' -%}{%- set read.text = read.text + item['text'] -%}"
    "{%- else -%}{%- set read.images = read.images + [{'type': 'image'}] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- else -%}"
    "{%- set parts = content.split('<__media') -%}"
    "{%- set read.text = parts[0] -%}"
    "{%- for part in parts[1:] -%}"
    "{%- set halves = part.split('__>') -%}"
    "{%- if halves | length > 1 -%}"
    "{%- set given.marker = '<__media' + halves[0] + '__>' -%}"
    "{%- set read.images = read.images + [{'type': 'image'}] -%}"
    "{%- set read.text = read.text + (halves[1:] | join('__>')) -%}"
    "{%- else -%}{%- set read.text = read.text + '<__media' + part -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- set text = {'type': 'text', 'text': read.text} -%}"
    "{%- set content = read.images + [text] if read.images else read.text -%}"
    "{%- set given.messages = given.messages + [{'role': message['role'], 'content': content}] -%}"
    "{%- endfor -%}"
    "{%- set messages = given.messages -%}"
)
"""Replaces each text with markers by a list of images and text; the marker differs in each process of the server."""


def chat_template(saved: SavedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A chat template that renders conversations as in training; None if none is equivalent, with a log message.

    A tokenizer's own chat template that supports images is returned unchanged: llama.cpp leaves images where they are
    in the text.
    """
    try:
        text = saved.chat_template(tokenizer, image=_IMAGE)
    except ModelError as error:
        log.warning("%s; the export has no chat template", error.message)
        return None
    literal = json.dumps(_IMAGE, ensure_ascii=False)
    return _LISTS + text.replace(literal, "given.marker") if literal in text else text
