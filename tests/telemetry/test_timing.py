from collections.abc import Callable

import pytest

from dovetail.telemetry.timing import Stopwatch


def ticking(times: list[float]) -> Callable[[], float]:
    left = iter(times)
    return lambda: next(left)


def test_phases_add_up_by_name() -> None:
    watch = Stopwatch(clock=ticking([0.0, 2.0, 10.0, 11.0, 20.0, 20.5]))
    for name in ("collect", "update", "collect"):
        with watch.phase(name):
            pass
    assert watch.seconds("ppo") == {"ppo/collect_seconds": 2.5, "ppo/update_seconds": 1.0}


def test_a_phase_that_raises_is_counted() -> None:
    watch = Stopwatch(clock=ticking([0.0, 3.0]))
    with pytest.raises(KeyError), watch.phase("collect"):
        raise KeyError
    assert watch.seconds("ppo") == {"ppo/collect_seconds": 3.0}


def test_the_device_is_waited_for_before_each_reading() -> None:
    events: list[str] = []

    def clock() -> float:
        events.append("read")
        return 0.0

    with Stopwatch(synchronize=lambda: events.append("wait"), clock=clock).phase("update"):
        events.append("work")
    assert events == ["wait", "read", "work", "wait", "read"]
