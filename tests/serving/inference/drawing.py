"""Answers by the engine itself."""

from __future__ import annotations

from dovetail.engine import HybridEngine, Sampling
from dovetail.text.chat_format import ChatFormat
from dovetail.text.message import Message
from tests.fakes import byte_tokenizer, tiny_model


def drawn(messages: list[Message], seed: int, max_new_tokens: int = 12) -> str:
    """The answer of the tiny model to one conversation."""
    chat = ChatFormat(byte_tokenizer())
    sampling = Sampling(max_new_tokens=max_new_tokens, stop_token_ids=chat.stop_token_ids)
    with HybridEngine(tiny_model()).generating() as generate:
        (answer,) = generate([chat.prompt_ids(messages)], sampling, seeds=[seed])
    return chat.decode(answer.token_ids)
