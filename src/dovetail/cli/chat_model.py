"""A loaded model as a partner in conversation.

Responsible for: loading it and asking it. Not responsible for: the conversation (chat.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from dovetail.cli.shown_text import ShownText
from dovetail.engine.hybrid import HybridEngine
from dovetail.engine.modules import context_of
from dovetail.engine.sampling import Sampling
from dovetail.model.load import expect_rows_for, load_causal_lm
from dovetail.text.chat_format import ChatFormat
from dovetail.text.message import Message
from dovetail.text.tokenizer import load_tokenizer
from dovetail.training.placement import resolve_device, resolve_dtype

_NO_LIMIT = 8192


class ModelSpeaker:
    """Answers with a causal language model, in its own chat format."""

    def __init__(self, path: str, sampling: Sampling, *, seed: int, device: str) -> None:
        where = resolve_device(device)
        tokenizer = load_tokenizer(path)
        self._chat = ChatFormat(tokenizer)
        model = load_causal_lm(path, dtype=resolve_dtype("auto", where), device=where)
        expect_rows_for(tokenizer, model, path)
        self.context = context_of(model) or _NO_LIMIT
        self.max_new_tokens = min(sampling.max_new_tokens, self.context // 2)
        self._sampling = replace(
            sampling,
            max_new_tokens=self.max_new_tokens,
            stop_token_ids=self._chat.stop_token_ids,
            stop_strings=self._chat.stop_strings,
        )
        self._engine = HybridEngine(model, device=where)
        self._seed = seed

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The conversation as the model reads it, ready for an answer."""
        return self._chat.prompt_ids(messages)

    def speak(self, prompt_ids: Sequence[int], *, turn: int, on_text: Callable[[str], None]) -> str:
        """Draw an answer, showing its pieces as they come."""
        stream = ShownText(self._chat.decode, on_text, stops=self._chat.stop_strings)

        def on_token(_request: int, token_id: int, _logprob: float) -> None:
            if token_id not in self._sampling.stop_token_ids:
                stream.add(token_id)

        with self._engine.generating() as generate:
            generate(
                [prompt_ids],
                self._sampling,
                seeds=[self._seed * 1_000_003 + turn],
                on_token=on_token,
                decode_text=self._chat.decode,
            )
        return stream.finish()
