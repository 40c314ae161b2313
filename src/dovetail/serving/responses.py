"""Write answers in the forms of OpenAI's API, whole or as server-sent events.

Responsible for: the JSON of chat and text completions, and cancelling answers when the client disconnects.
Not responsible for: reading requests (routes.py), text from tokens (choices.py).
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

from dovetail.engine.prompt_scores import TokenScore
from dovetail.serving.choices import Answering, Piece
from dovetail.serving.problems import Problem, problem_of
from dovetail.serving.token_listing import ListedToken, TokenTexts
from dovetail.text.chat_format import ChatFormat

_LEAST_LOGPROB = -9999.0
"""The smallest log-probability in a response, because JSON has no infinity."""


class Form(Protocol):
    """The form in which one request's answers are written."""

    def envelope(self, *, is_chunk: bool) -> dict[str, Any]: ...

    def opening(self, index: int) -> dict[str, Any] | None: ...

    def chunk(self, piece: Piece) -> dict[str, Any]: ...

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]: ...

    def response(self, answering: Answering, choices: list[dict[str, Any]]) -> dict[str, Any]: ...


class _Named:
    """The parts that both forms share."""

    kind: str
    chunk_kind: str

    def __init__(
        self,
        name: str,
        model: str,
        chat: ChatFormat,
        *,
        has_logprobs: bool,
        num_prompt_logprobs: int | None,
    ) -> None:
        self._name = name
        self._model = model
        self._chat = chat
        self._has_logprobs = has_logprobs
        self._num_prompt_logprobs = num_prompt_logprobs
        self._created = int(time.time())

    def envelope(self, *, is_chunk: bool) -> dict[str, Any]:
        """Return the fields that identify a response or chunk, without its choices."""
        kind = self.chunk_kind if is_chunk else self.kind
        return {"id": self._name, "object": kind, "created": self._created, "model": self._model}

    def response(self, answering: Answering, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the whole response."""
        return {**self.envelope(is_chunk=False), "choices": choices, "usage": _usage(answering)}

    def _prompt_logprobs(self, answering: Answering, index: int) -> list[dict[str, Any] | None]:
        """List the log-probabilities of an answer's prompt as vLLM does: its token and the likeliest ones, by id."""
        assert self._num_prompt_logprobs is not None
        texts, count = TokenTexts(self._chat), self._num_prompt_logprobs

        def entries(token_id: int, score: TokenScore) -> dict[str, Any]:
            likeliest = enumerate(score.top_logprobs[:count], start=1)
            ranked = {i: (rank, logprob) for rank, (i, logprob) in likeliest}
            ranked[token_id] = (score.rank, score.logprob)
            return {
                str(i): {
                    "logprob": max(logprob, _LEAST_LOGPROB),
                    "rank": rank,
                    "decoded_token": texts.behind(i),
                }
                for i, (rank, logprob) in ranked.items()
            }

        scored = zip(answering.prompts[index][1:], answering.prompt_scores[index], strict=True)
        return [None, *(entries(token_id, score) for token_id, score in scored)]


class ChatForm(_Named):
    """The form of chat completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the first chunk of an answer, which names the role of the speaker."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """Return the choice of one chunk of a stream."""
        delta = {"content": piece.text} if piece.text else {}
        chunk: dict[str, Any] = {"index": piece.index, "delta": delta, "finish_reason": piece.finish_reason}
        if self._has_logprobs:
            chunk["logprobs"] = self._logprobs([piece])
        return chunk

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return the choice of a whole answer."""
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
                    **self._entry(token.text, token.logprob),
                    "top_logprobs": [self._entry(*other) for other in token.top_logprobs],
                }
                for piece in pieces
                for token in piece.tokens
            ]
        }

    def response(self, answering: Answering, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the whole response; all its answers have one prompt."""
        whole = super().response(answering, choices)
        if self._num_prompt_logprobs is not None:
            whole["prompt_logprobs"] = self._prompt_logprobs(answering, 0)
        return whole

    def _entry(self, text: str, logprob: float | None) -> dict[str, Any]:
        spelt = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _in_json(logprob), "bytes": spelt}


class TextForm(_Named):
    """The form of text completions."""

    kind = chunk_kind = "text_completion"

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return None, because a text has no speaker to name."""
        return None

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """Return the choice of one chunk of a stream, which has the form of a short text."""
        return self.choice(piece.index, [piece])

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return the choice of a whole text."""
        return {
            "index": index,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": self._logprobs(pieces) if self._has_logprobs else None,
            "finish_reason": pieces[-1].finish_reason,
        }

    def response(self, answering: Answering, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the whole response; each choice has its own prompt."""
        if self._num_prompt_logprobs is not None:
            for index, choice in enumerate(choices):
                choice["prompt_logprobs"] = self._prompt_logprobs(answering, index)
        return super().response(answering, choices)

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        tokens = [token for piece in pieces for token in piece.tokens]
        has_top = any(token.top_logprobs for token in tokens)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [_in_json(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens] if has_top else None,
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: ListedToken) -> dict[str, float] | None:
        """Map texts to log-probabilities, the token's own included. The likelier of two equal texts counts."""
        if token.logprob is None:
            return None
        texts: dict[str, float] = {}
        for text, logprob in (*token.top_logprobs, (token.text, token.logprob)):
            texts.setdefault(text, max(logprob, _LEAST_LOGPROB))
        return texts


def _in_json(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LEAST_LOGPROB)


async def whole(answering: Answering, form: Form, request: Request) -> dict[str, Any]:
    """Return the response when all answers are finished. Cancels them and raises Problem if the client disconnects."""
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
    return form.response(answering, choices)


class EventStream(StreamingResponse):
    """The answers as server-sent events. Unfinished answers are cancelled when the response ends for any reason."""

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
            yield _event({**envelope, "choices": [form.chunk(piece)]})
    except Exception as error:  # the status is sent already, so the stream itself reports the error
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
