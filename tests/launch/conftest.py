"""The run that others are compared with."""

import pytest

from dovetail.config.run import RunConfig
from dovetail.stages import pipeline
from tests.stages.runs import tiny_run


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run of one process that nothing disturbed."""
    config = tiny_run(tmp_path_factory.mktemp("training"))
    pipeline.run(config)
    return config
