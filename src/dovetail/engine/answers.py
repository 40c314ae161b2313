"""An answer on its way from request to completion.

Responsible for: what a request is, what it has produced so far, and when and why it ends.
Not responsible for: drawing tokens (sampling.py), or which requests run together (scheduler.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dovetail.engine.sampling import Sampling
from dovetail.errors import GenerationError

FinishReason = Literal["stop", "length", "cancelled"]
OnToken = Callable[[int, int, float], object]
"""on_token(request_index, token_id, logprob), as each token is drawn; a true result cancels the request."""
DecodeText = Callable[[Sequence[int]], str]
"""decode_text(token_ids): the text of some tokens, needed for stop strings only."""


TopLogprobs = Sequence[tuple[int, float]]
"""The likeliest tokens at one place with their log-probabilities, the likeliest first; none that cannot be drawn."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The tokens generated for one prompt."""

    token_ids: tuple[int, ...]
    """The answer, the stop token included."""
    logprobs: tuple[float, ...]
    """The log-probability of each token under the distribution it was drawn from."""
    finish_reason: FinishReason
    """"stop": a stop token or string; "length": the token limit or the context; "cancelled": by on_token."""


@dataclass(frozen=True, slots=True)
class Listener:
    """The callbacks of the caller of a generation: one for each token, one that decodes text."""

    on_token: OnToken | None = None
    decode_text: DecodeText | None = None


@dataclass(slots=True, eq=False)
class Answer:
    """A request and what it has produced so far."""

    index: int
    """Its place among the requests of the caller."""
    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    max_new_tokens: int
    """The number asked for, or less where context or cache end sooner."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    """The likeliest tokens at each token's place, if the sampling settings ask for them."""
    pages: list[int] = field(default_factory=list)
    """Pages of the KV cache that hold its tokens, in order; empty while it waits. Full ones may be shared."""
    num_cached: int = 0
    """Tokens whose keys and values are stored, or will be by the forwards under way."""
    num_pending: int = 0
    """Tokens drawn on the device that the host has not read yet."""
    finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        """The length of prompt and answer, pending tokens included."""
        return len(self.prompt) + self.num_drawn

    @property
    def num_drawn(self) -> int:
        """Tokens of the answer, pending ones included; also the index of the next random number."""
        return len(self.token_ids) + self.num_pending

    @property
    def is_unread(self) -> bool:
        """Whether a part of the prompt, or of what was drawn before a preemption, is yet to be read."""
        return self.num_cached < self.num_tokens - min(1, self.num_drawn)

    @property
    def can_decode(self) -> bool:
        """Whether its last token is drawn and not yet fed, and another one is wanted."""
        return (
            self.finish_reason is None
            and 0 < self.num_drawn < self.max_new_tokens
            and self.num_cached == self.num_tokens - 1
        )

    @property
    def all_ids(self) -> tuple[int, ...]:
        """The tokens that the host knows."""
        return (*self.prompt, *self.token_ids)

    @property
    def max_tokens(self) -> int:
        """The greatest length that this sequence can reach."""
        return len(self.prompt) + self.max_new_tokens

    def accept(self, token_id: int, logprob: float, listener: Listener, likeliest: TopLogprobs = ()) -> None:
        """Take in one drawn token; afterwards `finish_reason` says whether it was the last.

        likeliest: the likeliest tokens at its place, as many as any request of the batch asked for.
        """
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        if self.sampling.top_logprobs:
            self.top_logprobs.append(likeliest[: self.sampling.top_logprobs])
        cancelled = listener.on_token is not None and listener.on_token(self.index, token_id, logprob)
        if token_id in self.sampling.stop_token_ids or self._completes_a_stop_string(listener):
            self.finish_reason = "stop"
        elif cancelled:
            self.finish_reason = "cancelled"
        elif len(self.token_ids) >= self.max_new_tokens:
            self.finish_reason = "length"

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(tuple(self.token_ids), tuple(self.logprobs), self.finish_reason)

    def _completes_a_stop_string(self, listener: Listener) -> bool:
        strings = self.sampling.stop_strings
        if not strings or listener.decode_text is None:
            return False
        # A token may be one byte of a four-byte character, and the first few may be the end of a broken one.
        tail = 4 * max(map(len, strings)) + 8
        text = listener.decode_text(self.token_ids[-tail:])
        return any(string in text for string in strings)


def expect_usable(answer: Answer, *, vocabulary: int, context: int | None, listener: Listener) -> None:
    """Raise GenerationError, naming the request, unless it can be generated."""
    where = f"request {answer.index}"
    if not answer.prompt:
        raise GenerationError(
            f"{where}: the prompt is empty", hint="begin it with a token, such as BOS or a space"
        )
    if context is not None and len(answer.prompt) >= context:
        raise GenerationError(
            f"{where}: the prompt has {len(answer.prompt)} tokens, the model's context is {context}",
            hint=f"shorten it to at most {context - 1} tokens, so that one more fits",
        )
    for kind, ids in (("prompt token", answer.prompt), ("stop token", answer.sampling.stop_token_ids)):
        if min(ids, default=0) < 0 or max(ids, default=0) >= vocabulary:
            unknown = next(i for i in ids if not 0 <= i < vocabulary)
            raise GenerationError(
                f"{where}: {kind} {unknown} is not in the model's vocabulary of {vocabulary}",
                hint="use the tokenizer that belongs to this model",
            )
    if answer.sampling.stop_strings and listener.decode_text is None:
        raise GenerationError(
            f"{where}: stop strings need text, and no decode_text was given",
            hint="pass decode_text=tokenizer.decode to generate, or use stop_token_ids",
        )
