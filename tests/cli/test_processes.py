"""What `dovetail train` makes of flags about processes: a run, ranks, or commands for several machines."""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from dovetail.cli import processes
from dovetail.cli.main import main
from dovetail.cli.processes import without_launch_flags
from dovetail.errors import ProcessFailed
from dovetail.launch.topology import Topology, expect_enough_work
from dovetail.parallel.world import World
from dovetail.stages import checks
from dovetail.stages.checks import refuse
from tests.stages.runs import tiny_run

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process, with several processes allowed: exit code, stdout, stderr."""

    def allow(config: Any, world_size: int, per_machine: int) -> None:
        expect_enough_work({"ppo.batch_size": config.ppo.batch_size}, world_size)

    monkeypatch.setattr(processes, "_expect_possible", allow)

    def check(config: Any, world: World, *more: Callable[[], None]) -> None:
        """Look at the number of GPUs alone where the model is not on this machine."""
        if Path(config.actor.path).is_dir():
            refuse(config, world, *more)
        for one in more:
            one()

    monkeypatch.setattr(checks, "refuse", check)

    def run_command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run_command


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Topology, list[str]]]:
    """Stands in for torch's agent: the topologies and commands that were started."""
    starts: list[tuple[Topology, list[str]]] = []
    module = ModuleType("dovetail.launch.start")
    module.start = lambda topology, command, output_dir: starts.append((topology, command))  # type: ignore[attr-defined]
    module.Stopped = KeyboardInterrupt  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dovetail.launch.start", module)
    return starts


def test_every_process_is_given_the_same_command_without_what_says_where(
    run: Run, started: list[tuple[Topology, list[str]]]
) -> None:
    flags = ["--num-gpus=3", "--max-restarts", "2", "--deployment-type", "single_node"]
    assert run("train", "opt-125m", "--step", "1", "2", "seed=3", *flags)[0] == 0
    ((topology, command),) = started
    assert (topology.size, topology.max_restarts) == (3, 2)
    at = command.index("dovetail")
    assert command[at + 1 :] == ["train", "opt-125m", "--step", "1", "2", "seed=3", "--num-gpus", "3"]
    assert command[0] == sys.executable


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_one_stage_takes_the_same_flags(
    run: Run, started: list[tuple[Topology, list[str]]], stage: str
) -> None:
    assert run(stage, "opt-125m", "--num-gpus", "2")[0] == 0
    assert started[0][0].size == 2
    assert stage in started[0][1]


def test_one_process_that_offloads_is_started_as_a_group(
    run: Run, started: list[tuple[Topology, list[str]]]
) -> None:
    assert run("train", "opt-125m", "offload.actor=true")[0] == 0
    assert started[0][0].size == 1


def test_one_process_that_is_to_restart_is_started_by_a_launcher(
    run: Run, started: list[tuple[Topology, list[str]]]
) -> None:
    assert run("train", "opt-125m", "--max-restarts", "3")[0] == 0
    assert (started[0][0].size, started[0][0].max_restarts) == (1, 3)


@pytest.mark.parametrize("folder", [".", "/"])
def test_a_folder_without_a_name_gives_the_meeting_one(
    run: Run, started: list[tuple[Topology, list[str]]], folder: str
) -> None:
    assert run("train", "opt-125m", "--num-gpus", "2", "--output-dir", folder)[0] == 0
    assert started[0][0].rdzv_id == (Path.cwd().name if folder == "." else "dovetail")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": None}, "but MASTER_ADDR is not set"),
        ({"RANK": "x"}, "RANK='x' is not a number"),
        ({"RANK": "2"}, "RANK=2 is not one of WORLD_SIZE=2 processes"),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE='x' is not a number"),
    ],
)
def test_half_an_environment_of_a_rank_is_one_message(
    run: Run, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], message: str
) -> None:
    whole = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    for name, value in {**whole, **changes}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "dovetail.launch.preflight.preflight", lambda *given, **named: pytest.fail("it came too late")
    )
    code, _, err = run("train", "opt-125m")
    assert code == 2
    assert message in err


def test_a_recipe_may_say_how_many(run: Run, started: list[tuple[Topology, list[str]]]) -> None:
    run("train", "opt-125m", "num_gpus=2")
    assert started[0][0].size == 2


def test_several_machines_get_a_command_each_that_leads_back_here(
    run: Run, started: list[tuple[Topology, list[str]]]
) -> None:
    code, out, _ = run("train", "opt-125m", "seed=3", "--num-nodes", "2", "--num-gpus", "4", "--rdzv-id", "x")
    assert code == 0
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("#")][1:] == ["# on node 0", "# on node 1"]
    assert started == []
    for rank, line in enumerate(line for line in lines if not line.startswith("#")):
        program, *arguments = shlex.split(line)
        assert program == "dovetail"
        run(*arguments)
        topology = started[rank][0]
        assert (topology.node_rank, topology.size, topology.rdzv_id) == (rank, 8, "x")
        assert topology.endpoint == "NODE0:29500"


def test_a_hostfile_names_the_machines_of_the_commands(
    run: Run, tmp_path: Any, started: list[tuple[Topology, list[str]]]
) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    _, out, _ = run("ppo", "opt-125m", "--hostfile", str(tmp_path / "hosts"))
    assert [line for line in out.splitlines() if line.startswith("#")] == ["# on a", "# on b"]
    assert "--master-addr a " in out
    run("ppo", "opt-125m", "--hostfile", str(tmp_path / "hosts"), "--node-rank", "1")
    assert (started[0][0].node_rank, started[0][0].size) == (1, 4)


def test_a_dry_run_says_how_many_processes(run: Run, started: list[tuple[Topology, list[str]]]) -> None:
    assert "# 2 processes on this machine" in run("train", "opt-125m", "--num-gpus", "2", "--dry-run")[1]
    assert "--node-rank 1" in run("train", "opt-125m", "--num-nodes", "2", "--dry-run")[1]
    assert started == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-gpus", "0"], "--num-gpus"),
        (["--num-gpus", "-2"], "--num-gpus"),
        (["num_gpus=0"], "num_gpus = 0"),
        (["--num-nodes", "0"], "--num-nodes"),
        (["--num-gpus", "2", "ppo.batch_size=1"], "ppo.batch_size = 1 is smaller than the 2 processes"),
        (["--deployment-type", "cloud"], "--deployment-type cloud: no such type"),
    ],
)
def test_wrong_counts_are_one_message(
    run: Run, started: list[tuple[Topology, list[str]]], flags: list[str], message: str
) -> None:
    code, _, err = run("train", "opt-125m", *flags)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert started == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("generation=3", "error: tensor_parallel.generation = 3: "),  # of 4 heads
        ("training=3", "error: tensor_parallel.training = 3: "),
        (
            "generation=2",
            "error: tensor_parallel.generation = 2: the run's 3 processes cannot form groups of 2",
        ),
    ],
)
def test_models_that_cannot_be_divided_are_refused_before_anything_starts(
    run: Run, started: list[tuple[Topology, list[str]]], tmp_path: Path, setting: str, message: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_run(tmp_path).model_dump(mode="json")))
    code, _, err = run("train", str(recipe), "--num-gpus", "3", f"tensor_parallel.{setting}")
    assert code == 2
    assert err.startswith(message)
    assert err.count("\n") == 2  # and a hint
    assert started == []


def test_more_processes_than_gpus_are_refused_unless_the_run_is_on_the_cpu(
    run: Run, started: list[tuple[Topology, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_count_gpus", lambda: 1)
    code, _, err = run("train", "opt-125m", "--num-gpus", "2")
    assert (code, err.splitlines()[0]) == (2, "error: --num-gpus 2: this machine has 1 GPU")
    assert run("train", "opt-125m", "--num-gpus", "2", "device=cpu")[0] == 0
    assert len(started) == 1


def test_the_exit_code_is_that_of_the_failure(
    run: Run, started: list[tuple[Topology, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ProcessFailed("rank 1 was killed", hint="more memory", exit_code=3)

    monkeypatch.setattr(sys.modules["dovetail.launch.start"], "start", fail)
    assert run("train", "opt-125m", "--num-gpus", "2") == (
        3, "", "error: rank 1 was killed\nhint: more memory\n",
    )  # fmt: skip


def test_flags_about_machines_are_taken_out_in_both_spellings() -> None:
    given = ["train", "a=b", "--num-gpus=2", "--hostfile", "h", "--data", "x", "--rdzv-id=r", "--seed", "1"]
    assert without_launch_flags(given) == ["train", "a=b", "--data", "x", "--seed", "1"]


class TorchLogLevel:
    """A finder of modules that notes the log level which torch would read where a module imports it."""

    def __init__(self, module: str) -> None:
        self.module, self.found = module, list[str | None]()

    def find_spec(self, name: str, *_: Any) -> None:
        if name == self.module:
            self.found.append(os.environ.get("TORCH_CPP_LOG_LEVEL"))


def test_a_launcher_s_torch_keeps_quiet_of_lost_peers_and_its_processes_do_not(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_run(tmp_path).model_dump(mode="json")))
    finder = TorchLogLevel("dovetail.stages.checks")
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    monkeypatch.delitem(sys.modules, finder.module)
    assert run("train", str(recipe), "device=mps", "--num-gpus", "2")[0] == 2  # before anything is started
    assert finder.found == ["ERROR"]
    assert "TORCH_CPP_LOG_LEVEL" not in os.environ
