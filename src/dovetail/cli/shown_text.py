"""An answer on the terminal, without the blanks around it.

Responsible for: showing text as it comes. Not responsible for: which text is whole (text/text_stream.py).
"""

from collections.abc import Callable


class ShownText:
    """Pieces of an answer in, the same on the terminal but for blanks before and after it."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._on_text = on_text
        self._shown = ""
        self._blanks = ""
        """Held back until it is known whether more follows."""

    def add(self, text: str) -> None:
        """One more piece."""
        text = self._blanks + text if self._shown else text.lstrip()
        words = text.rstrip()
        self._blanks = text[len(words) :]
        if words:
            self._on_text(words)
            self._shown += words

    def finish(self) -> str:
        """The whole of what was shown."""
        return self._shown
