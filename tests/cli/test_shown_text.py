from dovetail.cli.shown_text import ShownText


def shown(*pieces: str) -> list[str]:
    """What the terminal gets of an answer that comes in these pieces."""
    written: list[str] = []
    text = ShownText(written.append)
    for piece in pieces:
        text.add(piece)
    assert text.finish() == "".join(written)
    return written


def test_each_piece_is_shown_as_it_comes() -> None:
    assert shown("a", "ñ", "b") == ["a", "ñ", "b"]


def test_blanks_around_an_answer_are_not_part_of_it_and_those_inside_are() -> None:
    assert shown(" ", " hi", " ", "\n", "there ", "\n") == ["hi", " \nthere"]


def test_an_answer_of_blanks_shows_nothing() -> None:
    assert shown(" ", "\n") == shown() == []
