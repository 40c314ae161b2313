"""Tokens in, text out, while an answer is being drawn.

Responsible for: no half characters, nothing of a stop string or after it, and a cost a token that does not grow with
the answer. Not responsible for: drawing (engine/), blanks around an answer (who shows it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_ENOUGH_CONTEXT = 8
"""Tokens before a text that decide how its first ones are written."""


class TextStream:
    """Token ids in, new text out as soon as its characters are whole and nothing can still take them away."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        stops: Sequence[str] = (),
        lead: str = "",
        before_end: str = "",
        behind: Sequence[int] = (),
    ) -> None:
        """decode: the text of any stretch of ids. lead, before_end: taken off the text's two ends, once. behind: ids
        whose text the new one goes on; none if it stands alone.
        """
        self._decode = decode
        self._lead = lead
        self._before_end = before_end
        self._stops = [stop for stop in stops if stop]
        before = list(behind[-_ENOUGH_CONTEXT:])
        self.goes_on = bool(before) and not decode(before).endswith("\ufffd")
        """The text stands behind another one; half a character is no place to go on from."""
        self._ids: list[int] = before if self.goes_on else []
        self._context = 0
        """The ids before this one cannot change how new ones read."""
        self._read = len(self._ids)
        """The ids before this one are text already."""
        self._held = ""
        """Text that may belong to the lead, a stop string or what stands before the end."""
        self.taken_lead = ""
        """The lead, once it was taken off; empty where the text began otherwise."""
        self.has_stopped = False
        """A stop string was completed; what comes after it is not read."""

    def add(self, ids: Sequence[int]) -> str:
        """More tokens; returns what can be shown now."""
        self._ids += ids
        text = self._new_text()
        return "" if text.endswith("\ufffd") else self._take(text)

    def finish(self) -> str:
        """What was still held back."""
        text = self._take(self._new_text(), is_last=True)
        return text if self.has_stopped else text.removesuffix(self._before_end)

    def _new_text(self) -> str:
        """Of the ids not yet read. The tokens before them are decoded along: some tokenizers write a token
        otherwise at the beginning of a text.
        """
        known = self._decode(self._ids[self._context : self._read])
        return self._decode(self._ids[self._context :])[len(known) :]

    def _take(self, text: str, *, is_last: bool = False) -> str:
        if self.has_stopped:
            return ""
        if text:
            self._context, self._read = self._read, len(self._ids)
        text, self._held = self._held + text, ""
        if text != self._lead and self._lead.startswith(text) and not is_last:
            self._held = text
            return ""
        if self._lead and text.startswith(self._lead):
            text, self.taken_lead = text.removeprefix(self._lead), self._lead
        self._lead = ""
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self.has_stopped = True
            return text[: min(ends)]
        if is_last:
            return text
        shown = len(text) - self._num_held_back(text)
        self._held = text[shown:]
        return text[:shown]

    def _num_held_back(self, text: str) -> int:
        beginnings = [stop[:length] for stop in self._stops for length in range(1, len(stop))]
        beginnings += [self._before_end[: length + 1] for length in range(len(self._before_end))]
        return max((len(begin) for begin in beginnings if text.endswith(begin)), default=0)
