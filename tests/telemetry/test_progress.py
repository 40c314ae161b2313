import io

import pytest
from rich.console import Console

from dovetail.telemetry.progress import Progress, format_rate, format_seconds


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock, **settings: int) -> tuple[Progress, io.StringIO]:
    text = io.StringIO()
    return Progress("sft", console=Console(file=text), clock=clock, **settings), text


def test_without_a_terminal_there_is_a_plain_line_now_and_then() -> None:
    clock = Clock()
    progress, text = plain(clock, total=25, print_every=10)
    with progress:
        for step in range(25):
            clock.now += 0.5
            progress.advance({"loss": 3.0 - step / 10})
    assert text.getvalue().splitlines() == [
        "sft 1/25  2 steps/s  0:12 left  loss 3",
        "sft 10/25  2 steps/s  0:08 left  loss 2.1",
        "sft 20/25  2 steps/s  0:02 left  loss 1.1",
        "sft 25/25  2 steps/s  0:00 left  loss 0.6",
    ]


def test_slow_steps_are_not_kept_silent() -> None:
    clock = Clock()
    progress, text = plain(clock, total=1000, print_every=100)
    with progress:
        for _ in range(4):
            clock.now += 61.0
            progress.advance()
    assert len(text.getvalue().splitlines()) == 4


def test_a_resumed_stage_counts_on_and_measures_its_own_rate() -> None:
    clock = Clock()
    progress, text = plain(clock, total=100, start=90)
    with progress:
        clock.now += 2.0
        progress.advance()
    assert text.getvalue() == "sft 91/100  2 s/step  0:18 left\n"


def test_the_rate_is_that_of_the_last_steps() -> None:
    clock = Clock()
    progress, text = plain(clock, total=1000, print_every=1)
    with progress:
        clock.now += 1000.0
        progress.advance()
        for _ in range(40):
            clock.now += 0.25
            progress.advance()
    assert "4 steps/s" in text.getvalue().splitlines()[-1]


def test_a_clock_that_stands_still_gives_no_rate() -> None:
    progress, text = plain(Clock(), total=3)
    with progress:
        progress.advance()
    assert text.getvalue() == "sft 1/3\n"


def test_on_a_terminal_there_is_a_bar() -> None:
    clock, text = Clock(), io.StringIO()
    console = Console(file=text, force_terminal=True, width=120, color_system=None)
    with Progress("ppo", total=4, console=console, clock=clock) as progress:
        for _ in range(4):
            clock.now += 2.0
            progress.advance({"score": 0.25})
        console.print("a line above the bar")
    last = text.getvalue()
    for shown in ("ppo", "4/4", "2 s/step", "0:00 left", "score 0.25", "a line above the bar"):
        assert shown in last


def test_the_terminal_is_given_back_when_the_stage_raises() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True)
    with pytest.raises(KeyError), Progress("ppo", total=4, console=console):
        raise KeyError
    assert text.getvalue().count("\x1b[?25l") == text.getvalue().count(
        "\x1b[?25h"
    )  # cursor hidden, then shown


@pytest.mark.parametrize(
    ("rate", "text"), [(250.0, "250 steps/s"), (3.14159, "3.14 steps/s"), (0.016, "62.5 s/step")]
)
def test_rates_are_readable(rate: float, text: str) -> None:
    assert format_rate(rate) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (59.6, "1:00"), (725, "12:05"), (10809, "3:00:09")]
)
def test_times_are_readable(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
