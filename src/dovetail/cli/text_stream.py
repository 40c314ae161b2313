"""Tokens in, text out, while an answer is being drawn.

Responsible for: showing no half characters and nothing after a stop string.
Not responsible for: drawing (engine/).
"""

from collections.abc import Callable, Sequence


class TextStream:
    """Token ids in, text out as soon as its characters are whole and cannot belong to a stop string."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        on_text: Callable[[str], None],
        *,
        stops: Sequence[str] = (),
    ) -> None:
        self._decode = decode
        self._on_text = on_text
        self._stops = stops
        self._ids: list[int] = []
        self._shown = ""

    def add(self, token_id: int) -> None:
        """One more token; what may still change waits."""
        self._ids.append(token_id)
        text = self._text()
        if not text.endswith("\ufffd"):  # half a character: its other bytes come with the next token
            self._show(text[: len(text) - self._num_held_back(text)])

    def finish(self) -> str:
        """Show what is still held back; returns the whole text."""
        text = self._text().rstrip()
        self._show(text)
        return text

    def _text(self) -> str:
        text = self._decode(self._ids).lstrip()  # blanks before an answer belong to the format
        for stop in self._stops:
            text = text.partition(stop)[0]
        return text

    def _num_held_back(self, text: str) -> int:
        beginnings = (stop[:length] for stop in self._stops for length in range(len(stop) - 1, 0, -1))
        return max((len(begin) for begin in beginnings if text.endswith(begin)), default=0)

    def _show(self, text: str) -> None:
        if len(text) > len(self._shown):
            self._on_text(text[len(self._shown) :])
            self._shown = text
