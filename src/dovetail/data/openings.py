"""Answers that go on wrongly from a generation prompt that ends with a mark, such as `<think>`.

Responsible for: counting them, and the notes about them.
Not responsible for: the marks themselves (text/turn_shape.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from dovetail.data.records import Comparison, Demonstration, Record
from dovetail.text.chat_format import ChatFormat


def faults_at_opening(record: Record, chat: ChatFormat) -> list[str]:
    """Return "repeated" for each answer that begins with the mark, "unclosed" for each that lacks its closing tag."""
    answers: tuple[str, ...] = ()
    if chat.opening is not None and isinstance(record, Comparison):
        answers = record.answers
    elif chat.opening is not None and isinstance(record, Demonstration):
        answers = (record.messages[-1]["content"],)
    tag = chat.closing_tag
    repeated = ["repeated" for answer in answers if chat.repeats_opening(answer)]
    return repeated + ["unclosed" for answer in answers if tag is not None and tag not in answer]


def opening_notes(faults: Mapping[str, int], chat: ChatFormat) -> list[str]:
    """Return a line for each kind of fault that was found, with what to do."""
    texts = {
        "repeated": f"answers begin with {chat.opening}, as the generation prompt ends: it stands once, in the prompt",
        "unclosed": f"answers lack {chat.closing_tag}, though the generation prompt ends with {chat.opening}: they are "
        "learnt as what it opens. Write the tag before them, or set chat_template to one that opens nothing",
    }
    return [f"{faults[fault]:,} {text}" for fault, text in texts.items() if fault in faults]
