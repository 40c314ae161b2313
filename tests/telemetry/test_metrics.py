import math

import numpy as np
import pytest

from dovetail.telemetry.metrics import Metrics
from dovetail.telemetry.sinks import MemorySink


def test_every_sink_gets_every_row_as_plain_floats() -> None:
    sinks = MemorySink(), MemorySink()
    with Metrics(sinks) as metrics:
        metrics.record(
            3, {"ppo/kl_nats_per_answer": 1, "ppo/gold.base@1": np.float32(0.5), "ppo/skipped": True}
        )
    for sink in sinks:
        assert sink.rows == [(3, {"ppo/kl_nats_per_answer": 1.0, "ppo/gold.base@1": 0.5, "ppo/skipped": 1.0})]
        assert all(type(value) is float for value in sink.rows[0][1].values())
        assert sink.is_closed


def test_not_a_number_passes_through() -> None:
    sink = MemorySink()
    Metrics([sink]).record(0, {"sft/loss": math.nan})
    assert math.isnan(sink.rows[0][1]["sft/loss"])


@pytest.mark.parametrize("name", ["loss", "sft/", "/loss", "sft/the loss", "sft//loss"])
def test_a_name_without_group_or_with_blanks_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="metric name"):
        Metrics([]).record(0, {name: 1.0})


def test_sinks_are_closed_when_the_block_raises() -> None:
    sink = MemorySink()
    with pytest.raises(KeyError), Metrics([sink]):
        raise KeyError
    assert sink.is_closed
