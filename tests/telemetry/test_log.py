import pytest
from rich.table import Table

from dovetail.telemetry.log import say, warn


def test_lines_go_to_standard_error_and_leave_standard_output_to_results(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say("loading")
    warn("the disk is slow", hint="use another")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "loading\nwarning: the disk is slow\nhint: use another\n"


def test_a_long_line_stays_one_line_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    say("word " * 100)
    assert capsys.readouterr().err.count("\n") == 1


def test_brackets_are_text_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    say("[bold] [/nothing] :smile:")
    assert capsys.readouterr().err == "[bold] [/nothing] :smile:\n"


def test_a_table_can_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("model", "gold")
    table.add_row("sft", "0.71")
    say(table)
    assert "0.71" in capsys.readouterr().err
