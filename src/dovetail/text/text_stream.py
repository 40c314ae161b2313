"""Turn tokens into text while an answer is generated.

Responsible for: whole characters, no text of a stop string or after it, and a cost per token that does not grow with
the answer. Not responsible for: generation (engine/), blanks around an answer (the code that shows it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_ENOUGH_CONTEXT = 8
"""The number of tokens before a text that decide how its first ones are written."""


class TextStream:
    """A stream of text from token ids, which shows characters as soon as they are whole and certain to stay."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        stops: Sequence[str] = (),
        lead: str = "",
        before_end: str = "",
        behind: Sequence[int] = (),
    ) -> None:
        """Begin a stream.

        decode: returns the text of any stretch of ids. lead, before_end: texts that are removed once, from the start
        and from the end. behind: the ids whose text the new one continues; none if it stands alone.
        """
        self._decode = decode
        self._lead = lead
        self._before_end = before_end
        self._stops = [stop for stop in stops if stop]
        before = list(behind[-_ENOUGH_CONTEXT:])
        self.goes_on = bool(before) and not decode(before).endswith("\ufffd")
        """True if the text continues another one; it cannot continue half a character."""
        self._ids: list[int] = before if self.goes_on else []
        self._context = 0
        """The index of the first id that can change how new ones are decoded."""
        self._read = len(self._ids)
        """The index of the first id that is not text yet."""
        self._held = ""
        """The text that may belong to the lead, to a stop string or to `before_end`."""
        self.taken_lead = ""
        """The lead, once it is removed; empty where the text began otherwise."""
        self.has_stopped = False
        """True if a stop string was completed; text after it is not read."""

    def add(self, ids: Sequence[int]) -> str:
        """Add tokens and return the text that can be shown now."""
        self._ids += ids
        text = self._new_text()
        return "" if text.endswith("\ufffd") else self._take(text)

    def finish(self) -> str:
        """Return the text that was still held back."""
        text = self._take(self._new_text(), is_last=True)
        return text if self.has_stopped else text.removesuffix(self._before_end)

    def _new_text(self) -> str:
        """Decode the ids that are not read yet.

        The tokens before them are decoded along, since some tokenizers write a token otherwise at the beginning of a
        text.
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
