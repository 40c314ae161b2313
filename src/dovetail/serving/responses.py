"""Answers in the forms of OpenAI's API, whole and as server-sent events.

Responsible for: the JSON of chat and text completions, and letting go when the client does.
Not responsible for: what was asked (routes.py), text from tokens (choices.py).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from dovetail.serving.choices import Answering, DrawnToken, Piece
from dovetail.serving.problems import Problem, problem_of
from dovetail.text.chat_format import ChatFormat

_LEAST_LOGPROB = -9999.0
"""In place of numbers that JSON has not."""


class Form(Protocol):
    """How one request's answers are written."""

    def envelope(self, *, is_chunk: bool) -> dict[str, Any]: ...

    def opening(self, index: int) -> dict[str, Any] | None: ...

    def chunk(self, piece: Piece) -> dict[str, Any]: ...

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]: ...


class _Named:
    """What both forms share."""

    kind: str
    chunk_kind: str

    def __init__(self, name: str, model: str, chat: ChatFormat, *, has_logprobs: bool) -> None:
        self._name = name
        self._model = model
        self._chat = chat
        self._has_logprobs = has_logprobs
        self._created = int(time.time())

    def envelope(self, *, is_chunk: bool) -> dict[str, Any]:
        """Everything but the choices."""
        kind = self.chunk_kind if is_chunk else self.kind
        return {"id": self._name, "object": kind, "created": self._created, "model": self._model}

    def _text_of(self, token_id: int) -> str:
        """Half a character reads as U+FFFD."""
        return str(self._chat.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))


class ChatForm(_Named):
    """Chat completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        """Who speaks."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece of a stream."""
        delta = {"content": piece.text} if piece.text else {}
        chunk: dict[str, Any] = {"index": piece.index, "delta": delta, "finish_reason": piece.finish_reason}
        if self._has_logprobs:
            chunk["logprobs"] = self._logprobs([piece])
        return chunk

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A whole answer."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(piece.text for piece in pieces)},
            "logprobs": self._logprobs(pieces) if self._has_logprobs else None,
            "finish_reason": pieces[-1].finish_reason,
        }

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **self._entry(token.id, token.logprob),
                    "top_logprobs": [self._entry(*other) for other in token.top_logprobs],
                }
                for piece in pieces
                for token in piece.tokens
            ]
        }

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._text_of(token_id)
        spelt = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": spelt}


class TextForm(_Named):
    """Text completions."""

    kind = chunk_kind = "text_completion"

    def opening(self, index: int) -> dict[str, Any] | None:
        """A text has no speaker."""
        return None

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece of a stream: a short text."""
        return self.choice(piece.index, [piece])

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A whole text."""
        return {
            "index": index,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": self._logprobs(pieces) if self._has_logprobs else None,
            "finish_reason": pieces[-1].finish_reason,
        }

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        tokens = [token for piece in pieces for token in piece.tokens]
        has_top = any(token.top_logprobs for token in tokens)
        return {
            "tokens": [self._text_of(token.id) for token in tokens],
            "token_logprobs": [max(token.logprob, _LEAST_LOGPROB) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens] if has_top else None,
        }

    def _top(self, token: DrawnToken) -> dict[str, float]:
        """By text; of two tokens that read alike the likelier. The drawn one is always there."""
        texts: dict[str, float] = {}
        for token_id, logprob in (*token.top_logprobs, (token.id, token.logprob)):
            texts.setdefault(self._text_of(token_id), max(logprob, _LEAST_LOGPROB))
        return texts


async def whole(answering: Answering, form: Form, request: Request) -> dict[str, Any]:
    """The response when all answers are there; none, and nothing generated further, when the client leaves."""
    collecting = asyncio.ensure_future(_collect(answering))
    leaving = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise Problem(499, "the client left")
        choices = [form.choice(index, pieces) for index, pieces in enumerate(collecting.result())]
    finally:
        answering.close()
        collecting.cancel()
        leaving.cancel()
    return {**form.envelope(is_chunk=False), "choices": choices, "usage": _usage(answering)}


class EventStream(StreamingResponse):
    """The answers as server-sent events; whatever ends the response, ended or not, cancels the rest of them."""

    def __init__(self, answering: Answering, form: Form, *, has_usage: bool) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(_events(answering, form, has_usage), media_type="text/event-stream", headers=headers)
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answering.close()


async def _events(answering: Answering, form: Form, has_usage: bool) -> AsyncIterator[bytes]:
    envelope = form.envelope(is_chunk=True)
    if has_usage:
        envelope["usage"] = None
    for index in range(len(answering)):
        if (opening := form.opening(index)) is not None:
            yield _event({**envelope, "choices": [opening]})
    try:
        async for piece in answering:
            if piece.text or piece.finish_reason or piece.tokens:
                yield _event({**envelope, "choices": [form.chunk(piece)]})
    except Exception as error:  # the status is sent already: the stream itself has to say it
        yield _event(problem_of(error).body)
        return
    if has_usage:
        yield _event({**envelope, "choices": [], "usage": _usage(answering)})
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


async def _collect(answering: Answering) -> list[list[Piece]]:
    pieces: list[list[Piece]] = [[] for _ in range(len(answering))]
    async for piece in answering:
        pieces[piece.index].append(piece)
    return pieces


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _usage(answering: Answering) -> dict[str, int]:
    prompt, drawn = answering.num_prompt_tokens, answering.num_tokens
    return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}
