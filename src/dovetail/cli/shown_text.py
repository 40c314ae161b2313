"""Show an answer on the terminal, without the blanks around it.

Responsible for: showing text as it comes. Not responsible for: which text is complete (text/text_stream.py).
"""

from collections.abc import Callable


class ShownText:
    """A filter that shows the pieces of an answer without the blanks before and after it."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._on_text = on_text
        self._shown = ""
        self._blanks = ""
        """Blanks held back until it is known whether more text follows."""

    def add(self, text: str) -> None:
        """Show one more piece."""
        text = self._blanks + text if self._shown else text.lstrip()
        words = text.rstrip()
        self._blanks = text[len(words) :]
        if words:
            self._on_text(words)
            self._shown += words

    def finish(self) -> str:
        """Return all the text that was shown."""
        return self._shown
