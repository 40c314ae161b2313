"""Runs of several processes that cannot work: one message, the code for what can be repaired, nobody left behind."""

import os
import sys
from pathlib import Path

import pytest

from dovetail.config.run import RunConfig
from tests.launch.ports import free_port
from tests.launch.training import expect_end, launched
from tests.stages.runs import tiny_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]


def expect_nobody(config: RunConfig) -> None:
    """No process has the run's recipe on its command line."""
    recipe = os.fsencode(Path(config.output_dir).with_suffix(".yaml"))
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        assert recipe not in command, folder


def expect_one_error(said: str, message: str) -> None:
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert message in errors[0]
    assert said.count("hint: ") == 1
    assert "Traceback" not in said


def test_machines_with_other_settings_say_so_and_do_not_begin(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    port = str(free_port())
    where = ("--num-gpus", "1", "--num-nodes", "2", "--master-addr", "127.0.0.1", "--master-port", port)
    with (
        launched(config, *where, "--node-rank", "0") as first,
        launched(config, "ppo.gamma=0.5", *where, "--node-rank", "1") as second,
    ):
        said = [expect_end(first, config, 2), expect_end(second, config, 2)]
    for text in said:  # ranks go by address, and both machines have the same here: either may be the odd one
        expect_one_error(text, "ppo.gamma = ")
        assert "0.5" in text
        assert "1.0" in text
    assert not Path(config.output_dir, "sft").exists()
    expect_nobody(config)
