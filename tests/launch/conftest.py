"""The run that others are compared with."""

import pytest

from dovetail.config.run import RunConfig
from dovetail.stages import pipeline
from tests.stages.runs import tiny_run


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run of one process that nothing disturbed. PPO has steps left when one is seen to be done."""
    config = tiny_run(tmp_path_factory.mktemp("training"), ppo={"max_steps": 8})
    pipeline.run(config)
    return config
