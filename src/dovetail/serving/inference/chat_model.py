"""`ChatModel`: a finished model in Python, without a server.

Responsible for: answers to one conversation, to many at once, and piece by piece.
Not responsible for: loading (loading.py), HTTP (serving/), the terminal (cli/chat.py).

    model = ChatModel("runs/demo")
    model.chat("What is a dovetail joint?")
    for piece in model.stream([{"role": "user", "content": "Tell me a story."}]): ...
    model.chat_many(["One question.", "Another."], sampling=Sampling(max_new_tokens=64, temperature=0))
"""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

from dovetail.engine import FinishReason, Sampling
from dovetail.engine.scheduler import Answer, Load
from dovetail.errors import DataError, DovetailError
from dovetail.runs.run_models import model_folder
from dovetail.serving.inference.loading import load_chat
from dovetail.text.message import Message, message

Conversation = str | Sequence[Message]
"""A question, or the turns up to the point where the model must answer."""
OnRefusal = Callable[[int, DovetailError], object]
"""The type of on_refusal(index, error), which receives a conversation that gets no answer, and the reason."""

DEFAULT_SAMPLING = Sampling(max_new_tokens=256, temperature=0.7, top_p=0.95)
_CACHE_TOKENS = 32768
_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one of many conversations."""

    index: int
    """The index of its conversation among those given."""
    text: str
    finish_reason: FinishReason


class ChatModel:
    """A chat model by run folder, model folder, LoRA adapter, .gguf file or hub name. One call at a time."""

    def __init__(self, path: str, *, device: str = "auto", system: str | None = None) -> None:
        """Load the model.

        system: a message that is put before every conversation that has no system message of its own.
        Raises ModelError if there is no model, ConfigError if there is no such device.
        """
        loaded = load_chat(model_folder(path), device=device)
        self.fingerprint = loaded.fingerprint
        self._format = loaded.chat
        self._one = loaded.engine()
        self._many = loaded.engine(max_running=_AT_ONCE, max_cache_tokens=_CACHE_TOKENS)
        self._system = system
        self.context = loaded.context
        """The largest number of tokens of conversation and answer together; None if the model names no limit."""

    def num_tokens(self, conversation: Conversation) -> int:
        """Return the number of tokens of a conversation as the model reads it, ready for an answer."""
        return len(self._prompts([conversation])[0])

    def chat(
        self, conversation: Conversation, *, sampling: Sampling = DEFAULT_SAMPLING, seed: int | None = None
    ) -> str:
        """Return the answer to one conversation.

        seed: the same seed gives the same answer; None draws a random one.

        Raises GenerationError if the conversation leaves no room for an answer.
        """
        return "".join(self.stream(conversation, sampling=sampling, seed=seed))

    def stream(
        self, conversation: Conversation, *, sampling: Sampling = DEFAULT_SAMPLING, seed: int | None = None
    ) -> Iterator[str]:
        """Yield the same answer piece by piece. Leaving the loop ends the generation."""
        prompt, settings = self._prompts([conversation])[0], self._settings(sampling)
        text = self._format.answer_stream(settings.stop_strings)
        tokens: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        has_left = threading.Event()

        def on_token(_index: int, token_id: int, _logprob: float) -> bool:
            tokens.put(token_id)
            return has_left.is_set()

        def generate() -> None:
            try:
                with self._one.generating() as answer:
                    answer(
                        [prompt],
                        settings,
                        seeds=[_drawn_unless(seed)],
                        on_token=on_token,
                        decode_text=self._format.decode,
                    )
                tokens.put(None)
            except BaseException as error:  # raised again in the thread that waits for it
                tokens.put(error)

        thread = threading.Thread(target=generate, name="engine", daemon=True)
        thread.start()
        try:
            while (token := tokens.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                if piece := text.add([token]):
                    yield piece
            if piece := text.finish():
                yield piece
        finally:
            has_left.set()
            thread.join()

    def chat_many(
        self,
        conversations: Sequence[Conversation],
        *,
        sampling: Sampling = DEFAULT_SAMPLING,
        seeds: Sequence[int] | None = None,
        on_reply: Callable[[Reply], object] | None = None,
        on_refusal: OnRefusal | None = None,
    ) -> list[str]:
        """Return the answers to many conversations, generated together; each is what it would be alone.

        seeds: one per conversation. on_reply: called with each answer as soon as it is finished, in any order.
        on_refusal: called, before any answer, for each conversation that leaves no room for an answer or that the chat
        template does not take; its answer stays empty, and on_reply is not called for it. Without on_refusal the first
        such error is raised.
        """
        settings, refuse = self._settings(sampling), on_refusal or _raised
        chosen = [secrets.randbits(62) for _ in conversations] if seeds is None else list(seeds)
        texts = [""] * len(conversations)

        def on_done(answer: Answer) -> None:
            assert answer.finish_reason is not None
            text = self._format.answer_stream(settings.stop_strings)
            texts[answer.index] = text.add(answer.token_ids) + text.finish()
            if on_reply is not None:
                on_reply(Reply(answer.index, texts[answer.index], answer.finish_reason))

        answers = [
            Answer(index, tuple(prompt), settings, chosen[index], settings.max_new_tokens)
            for index, prompt in self._encoded(conversations, refuse)
        ]
        with self._many.serving() as serve:
            usable = []
            for answer in answers:
                answer.max_new_tokens = max(
                    1, min(answer.max_new_tokens, serve.max_tokens - len(answer.prompt))
                )
                with _refusing(answer.index, refuse):
                    serve.expect_usable(answer, self._format.decode)
                    usable.append(answer)
            serve(_Feed(usable, on_done), decode_text=self._format.decode)
        return texts

    def _encoded(
        self, conversations: Sequence[Conversation], refuse: OnRefusal
    ) -> list[tuple[int, list[int]]]:
        """Encode each conversation that the chat template takes, and return its place and tokens."""
        try:
            return list(enumerate(self._prompts(conversations)))  # all at once is much faster
        except DataError:
            encoded = []
            for index, conversation in enumerate(conversations):
                with _refusing(index, refuse):
                    encoded.append((index, self._prompts([conversation])[0]))
            return encoded

    def _prompts(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        return self._format.encode_prompts([self._turns(conversation) for conversation in conversations])

    def _turns(self, conversation: Conversation) -> list[Message]:
        turns = [message("user", conversation)] if isinstance(conversation, str) else list(conversation)
        if self._system is not None and (not turns or turns[0]["role"] != "system"):
            return [message("system", self._system), *turns]
        return turns

    def _settings(self, sampling: Sampling) -> Sampling:
        """Return the settings with the tokens and texts that end an answer in this model's chat format."""
        return replace(
            sampling,
            stop_token_ids=(*sampling.stop_token_ids, *self._format.stop_token_ids),
            stop_strings=(*sampling.stop_strings, *self._format.stop_strings),
        )


class _Feed:
    """A source that yields the next answer as soon as there is a place for it."""

    def __init__(self, answers: Iterable[Answer], on_done: Callable[[Answer], None]) -> None:
        self._coming = iter(answers)
        self._on_done = on_done
        self._open: list[Answer] = []

    def poll(self, load: Load) -> Sequence[Answer] | None:
        """Return new answers, as `Source` defines it; report the finished ones."""
        finished = [answer for answer in self._open if answer.finish_reason]
        if finished:
            self._open = [answer for answer in self._open if not answer.finish_reason]
        for answer in finished:
            self._on_done(answer)
        new = list(islice(self._coming, _AT_ONCE - len(self._open)))
        self._open += new
        return new if self._open else None


@contextmanager
def _refusing(index: int, refuse: OnRefusal) -> Iterator[None]:
    """Pass an error of one conversation to `refuse`, and continue after the block."""
    try:
        yield
    except DovetailError as error:
        refuse(index, error)


def _raised(_index: int, error: DovetailError) -> None:
    raise error


def _drawn_unless(seed: int | None) -> int:
    return secrets.randbits(62) if seed is None else seed
