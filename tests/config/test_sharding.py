"""Who shards together: what the setting means, and what is refused."""

import pytest

from dovetail.config.load import check
from dovetail.config.run import RunConfig
from dovetail.config.sharding import OffloadConfig, TensorParallelConfig, ZeroStageConfig
from dovetail.errors import ConfigError


@pytest.mark.parametrize(
    ("shard_over", "processes", "per_machine", "size"),
    [
        ("all", 6, 0, 6),
        ("node", 8, 4, 4),
        ("node", 4, 4, 4),
        ("node", 1, 1, 1),
        (2, 6, 0, 2),
        (6, 6, 3, 6),
        (1, 1, 1, 1),
    ],
)
def test_groups_are_all_a_machine_or_so_many(
    shard_over: str | int, processes: int, per_machine: int, size: int
) -> None:
    stages = ZeroStageConfig.model_validate({"shard_over": shard_over})
    assert stages.shard_size(processes=processes, per_machine=per_machine) == size


@pytest.mark.parametrize(
    ("shard_over", "processes", "per_machine", "told", "hint"),
    [
        (
            4,
            6,
            6,
            "shard_over = 4, but the run has 6 processes: no whole number of groups",
            "to all, 2, 3, 6",
        ),
        (8, 4, 4, "shard_over = 8, but the run has 4 processes", "to all, 2, 4"),
        (2, 1, 1, "shard_over = 2, but the run has 1 process: ", "to all$"),
        (1, 4, 4, "shard_over = 1, but .*: one process alone has none to shard with", "to all, 2, 4"),
        ("node", 3, 1, "shard_over = node \\(1 on each machine\\), but .*: one process alone", "to all, 3"),
        ("node", 5, 0, "node needs the same number of processes on every machine", "--num-gpus"),
    ],
)
def test_other_numbers_are_refused_with_those_that_are_possible(
    shard_over: str | int, processes: int, per_machine: int, told: str, hint: str
) -> None:
    stages = ZeroStageConfig.model_validate({"shard_over": shard_over})
    with pytest.raises(ConfigError, match=told) as caught:
        stages.shard_size(processes=processes, per_machine=per_machine)
    caught.match(hint)


def test_groups_without_anything_to_shard_are_refused() -> None:
    run = {"actor": {"path": "some/model"}, "output_dir": "runs/x"}
    whole = {"actor": 0, "critic": 0}
    assert check(run | {"zero_stage": whole | {"reference": 3, "shard_over": "node"}})
    with pytest.raises(
        ConfigError, match=r"zero_stage: shard_over = node .*nothing is sharded; set a stage to"
    ):
        check(run | {"zero_stage": whole | {"shard_over": "node"}})


@pytest.mark.parametrize("value", [0, -2, "nodes", 1.5])
def test_what_is_no_number_of_processes_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="shard_over"):
        RunConfig.model_validate(
            {"actor": {"path": "m"}, "output_dir": "x", "zero_stage": {"shard_over": value}}
        )


@pytest.mark.parametrize("model", ["actor", "critic", "reference", "reward_model"])
def test_only_what_is_sharded_is_offloaded(model: str) -> None:
    run = {"actor": {"path": "some/model"}, "output_dir": "runs/x", "offload": {model: True}}
    assert check(run | {"zero_stage": {model: 3}}).offload.models == [model]
    with pytest.raises(
        ConfigError, match=f"offload.{model} = true, but zero_stage.{model} = 0: .*={3}, which"
    ):
        check(run | {"zero_stage": {model: 0}})


def test_what_does_not_go_with_divided_layers_is_refused() -> None:
    grouped, kept = ZeroStageConfig(shard_over=2), OffloadConfig(critic=True)
    with pytest.raises(ConfigError, match=r"training = 2 and zero_stage\.shard_over = 2 cannot be combined"):
        TensorParallelConfig(training=2).expect_supported(grouped, OffloadConfig())
    with pytest.raises(ConfigError, match=r"training = 2 and offload\.critic = true cannot be combined"):
        TensorParallelConfig(training=2).expect_supported(ZeroStageConfig(), kept)
    TensorParallelConfig().expect_supported(grouped, kept)
    TensorParallelConfig(training=2).expect_supported(ZeroStageConfig(), OffloadConfig())
