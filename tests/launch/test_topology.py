from pathlib import Path

import pytest

from dovetail.errors import ConfigError
from dovetail.launch.topology import (
    LaunchFlags,
    Topology,
    expect_enough_gpus,
    expect_enough_work,
    is_rank,
    topology_of,
)


def topology(flags: LaunchFlags, *, num_gpus: int = 1, gpus_here: int = 8) -> Topology:
    return topology_of(flags, num_gpus=num_gpus, run_name="opt-1.3b", count_gpus=lambda: gpus_here)


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\nc slots=4\n", encoding="utf-8")
    return str(tmp_path / "hosts")


def test_without_flags_a_run_is_one_process_here() -> None:
    alone = topology(LaunchFlags())
    assert (alone.size, alone.num_nodes, alone.node_rank) == (1, 1, 0)


def test_gpus_are_counted_per_machine() -> None:
    several = topology(LaunchFlags(num_gpus=4, num_nodes=3, node_rank=2, master_addr="a"), num_gpus=4)
    assert several.size == 12
    assert several.endpoint == "a:29500"
    assert several.rdzv_id == "opt-1.3b"


def test_nobody_said_which_machine_this_is() -> None:
    assert topology(LaunchFlags(num_nodes=2)).node_rank is None


def test_a_hostfile_gives_machines_slots_and_the_meeting_place(hostfile: str) -> None:
    of_two = topology(LaunchFlags(hostfile=hostfile, num_nodes=2))
    assert (of_two.hosts, of_two.num_gpus, of_two.master_addr) == (("a", "b"), 8, "a")
    of_all = topology(LaunchFlags(hostfile=hostfile, num_gpus=4), num_gpus=4)
    assert (of_all.num_nodes, of_all.size) == (3, 12)


def test_a_recipe_s_number_counts_beside_a_hostfile(hostfile: str) -> None:
    assert topology(LaunchFlags(hostfile=hostfile), num_gpus=4).size == 12
    with pytest.raises(ConfigError, match="num_gpus = 8: c has slots=4"):
        topology(LaunchFlags(hostfile=hostfile), num_gpus=8)


@pytest.mark.parametrize(
    ("kind", "flags", "size"),
    [
        ("single_gpu", {}, 1),
        ("single_node", {}, 8),
        ("single_node", {"num_gpus": 2}, 2),
        ("multi_node", {"num_nodes": 2}, 16),
        ("multi_node", {"num_nodes": 2, "num_gpus": 1}, 2),
    ],
)
def test_deployment_types_mean_what_they_did(kind: str, flags: dict[str, int], size: int) -> None:
    asked = LaunchFlags(deployment_type=kind, **flags)  # type: ignore[arg-type]
    assert topology(asked, num_gpus=flags.get("num_gpus", 1)).size == size


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (LaunchFlags(deployment_type="cloud"), "cloud: no such type"),
        (LaunchFlags(deployment_type="single_gpu", num_nodes=2), "single_gpu, but 2 processes"),
        (LaunchFlags(deployment_type="single_node", num_nodes=2), "single_node, but --num-nodes 2"),
        (LaunchFlags(deployment_type="multi_node"), "nothing names more than one machine"),
        (LaunchFlags(num_nodes=2, node_rank=2, master_addr="a"), "with 2 nodes it is 0 to 1"),
        (LaunchFlags(node_rank=1), "with 1 node it is 0"),
        (LaunchFlags(num_nodes=2, node_rank=1), "the address of node 0 is missing"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: LaunchFlags, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        topology(flags)
    assert caught.value.hint


def test_a_hostfile_that_does_not_fit_the_flags_is_refused(hostfile: str) -> None:
    with pytest.raises(ConfigError, match="c has slots=4 and a slots=8") as caught:
        topology(LaunchFlags(hostfile=hostfile))
    assert "--num-gpus 4" in str(caught.value.hint)
    with pytest.raises(ConfigError, match=r"--num-nodes 4: .* has 3 machines"):
        topology(LaunchFlags(hostfile=hostfile, num_nodes=4))
    with pytest.raises(ConfigError, match="--num-gpus 8: c has slots=4"):
        topology(LaunchFlags(hostfile=hostfile, num_gpus=8), num_gpus=8)


def test_all_gpus_of_a_machine_without_any_are_not_none() -> None:
    with pytest.raises(ConfigError, match="this one has none"):
        topology(LaunchFlags(deployment_type="single_node"), gpus_here=0)


def test_only_a_started_process_is_a_rank() -> None:
    assert not is_rank({})
    assert not is_rank({"RANK": "1", "WORLD_SIZE": "2"})  # of a machine, as some schedulers set them
    assert is_rank({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})


def test_a_batch_smaller_than_the_world_is_refused_and_an_equal_one_is_not() -> None:
    expect_enough_work({"sft.batch_size": 8, "ppo.batch_size": 9}, 8)
    with pytest.raises(ConfigError, match=r"^ppo.batch_size = 4 is smaller than the 8 processes") as caught:
        expect_enough_work({"sft.batch_size": 8, "ppo.batch_size": 4}, 8)
    assert "at most 4 processes" in str(caught.value.hint)


def test_more_processes_than_gpus_are_refused_and_a_machine_without_gpus_takes_any() -> None:
    expect_enough_gpus(4, 4)
    expect_enough_gpus(4, 0)
    with pytest.raises(ConfigError, match=r"--num-gpus 4: this machine has 1 GPU\n"):
        expect_enough_gpus(4, 1)
