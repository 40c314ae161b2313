"""Tokens in, text out, while an answer is being drawn.

Responsible for: no half characters, nothing of a stop string or after it, and a cost a token that does not grow with
the answer. Not responsible for: drawing (engine/), blanks around an answer (who shows it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextStream:
    """Token ids in, new text out as soon as its characters are whole and cannot belong to a stop string."""

    def __init__(self, decode: Callable[[Sequence[int]], str], *, stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._context = 0
        """The ids before this one cannot change how new ones read."""
        self._read = 0
        """The ids before this one are text already."""
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.has_stopped = False
        """A stop string was completed; what comes after it is not read."""

    def add(self, ids: Sequence[int]) -> str:
        """More tokens; returns what can be shown now."""
        self._ids += ids
        text = self._new_text()
        return "" if text.endswith("\ufffd") else self._take(text)

    def finish(self) -> str:
        """What was still held back."""
        text = self._take(self._new_text())
        if not self.has_stopped:
            text, self._held = text + self._held, ""
        return text

    def _new_text(self) -> str:
        """Of the ids not yet read. The tokens before them are decoded along: some tokenizers write a token
        otherwise at the beginning of a text.
        """
        known = self._decode(self._ids[self._context : self._read])
        return self._decode(self._ids[self._context :])[len(known) :]

    def _take(self, text: str) -> str:
        if not text or self.has_stopped:
            return ""
        self._context, self._read = self._read, len(self._ids)
        text = self._held + text
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self.has_stopped, self._held = True, ""
            return text[: min(ends)]
        held = self._num_held_back(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _num_held_back(self, text: str) -> int:
        beginnings = (stop[:length] for stop in self._stops for length in range(len(stop) - 1, 0, -1))
        return max((len(begin) for begin in beginnings if text.endswith(begin)), default=0)
