"""Answer in a conversation with a loaded model.

Responsible for: settings that stay the same for a conversation. Not responsible for: loading and sampling
(serving/inference/chat_model.py), the conversation (chat.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from dovetail.cli.shown_text import ShownText
from dovetail.engine.sampling import Sampling
from dovetail.serving.inference.chat_model import ChatModel
from dovetail.text.message import Message

_NO_LIMIT = 8192


class ModelSpeaker:
    """A speaker that answers with a `ChatModel`."""

    def __init__(self, path: str, sampling: Sampling, *, seed: int, device: str) -> None:
        self._model = ChatModel(path, device=device)
        self.context = self._model.context or _NO_LIMIT
        self.max_new_tokens = min(sampling.max_new_tokens, self.context // 2)
        self._sampling = replace(sampling, max_new_tokens=self.max_new_tokens)
        self._seed = seed

    def num_tokens(self, messages: Sequence[Message]) -> int:
        """Return the number of tokens of the conversation as the model reads it before an answer."""
        return self._model.num_tokens(messages)

    def speak(self, messages: Sequence[Message], *, turn: int, on_text: Callable[[str], None]) -> str:
        """Sample an answer, show its pieces as they come, and return all of it."""
        shown = ShownText(on_text)
        for piece in self._model.stream(
            messages, sampling=self._sampling, seed=self._seed * 1_000_003 + turn
        ):
            shown.add(piece)
        return shown.finish()
