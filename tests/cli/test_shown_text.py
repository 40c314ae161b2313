import pytest

from dovetail.cli.shown_text import ShownText


def stream(data: bytes, stops: tuple[str, ...] = ()) -> tuple[list[str], str]:
    """The pieces shown when each byte is a token, and the whole text."""
    pieces: list[str] = []
    shown = ShownText(lambda ids: bytes(ids).decode(errors="replace"), pieces.append, stops=stops)
    for token in data:
        shown.add(token)
    return pieces, shown.finish()


@pytest.mark.parametrize("text", ["plain words", "naïve café", "日本語 and 👍🏽", "a\n\nb", ""])
def test_the_pieces_are_the_text_and_no_piece_is_half_a_character(text: str) -> None:
    pieces, whole = stream(text.encode())
    assert "".join(pieces) == whole == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_each_character_is_shown_as_soon_as_it_is_whole() -> None:
    pieces, _ = stream("añb".encode())
    assert pieces == ["a", "ñ", "b"]


def test_blanks_around_an_answer_are_not_part_of_it() -> None:
    pieces, whole = stream(b"  hi there \n")
    assert whole == "hi there"
    assert "".join(pieces).rstrip() == "hi there"


def test_nothing_of_a_stop_string_or_after_it_is_shown() -> None:
    pieces, whole = stream(b"Four.\n\nHuman: and five?", ("\n\nHuman:",))
    assert whole == "Four."
    assert "".join(pieces) == "Four."


def test_what_only_begins_like_a_stop_string_is_shown_in_the_end() -> None:
    pieces, whole = stream(b"One.\n\nHumans say two.\n\nHu", ("\n\nHuman:",))
    assert "".join(pieces) == whole == "One.\n\nHumans say two.\n\nHu"


def test_a_broken_character_at_the_end_is_shown_as_such() -> None:
    pieces, whole = stream("é".encode()[:1])
    assert "".join(pieces) == whole == "\ufffd"
