"""An answer on the terminal, without the blanks around it.

Responsible for: showing text as it comes. Not responsible for: which text is whole (text/text_stream.py).
"""

from collections.abc import Callable, Sequence

from dovetail.text.text_stream import TextStream


class ShownText:
    """Token ids in, text shown as soon as it cannot change."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        on_text: Callable[[str], None],
        *,
        stops: Sequence[str] = (),
    ) -> None:
        self._stream = TextStream(decode, stops=stops)
        self._on_text = on_text
        self._shown = ""

    def add(self, token_id: int) -> None:
        """One more token; what may still change waits."""
        self._show(self._stream.add([token_id]))

    def finish(self) -> str:
        """Show what is still held back; returns the whole text."""
        self._show(self._stream.finish().rstrip())
        return self._shown.rstrip()

    def _show(self, text: str) -> None:
        if not self._shown:
            text = text.lstrip()  # blanks before an answer belong to the format
        if text:
            self._on_text(text)
            self._shown += text
