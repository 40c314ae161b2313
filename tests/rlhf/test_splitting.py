import pytest
import torch

from dovetail.config.stages import PpoConfig, SamplingConfig
from dovetail.errors import ConfigError
from dovetail.parallel.shard import Layout, ShardedModel
from dovetail.parallel.world import ALONE, World
from dovetail.rlhf import splitting
from dovetail.rlhf.splitting import _chosen, cache_bytes, smallest_that_fits, split_to_generate
from tests.fakes import tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(("room", "size"), [(100, 1), (99, 2), (55, 2), (54, 4), (0, 4)])
def test_as_few_processes_as_fit_hold_a_model_together_or_all_if_none_does(room: int, size: int) -> None:
    assert smallest_that_fits({1: 100, 2: 55, 4: 30}, room) == size


def test_the_cache_of_a_group_holds_the_answers_of_its_share() -> None:
    config = PpoConfig(batch_size=24, sampling=SamplingConfig(max_new_tokens=10))
    model = tiny_model("llama", dtype=torch.bfloat16)
    layers, head_width, bytes_each = 2, 8, 2
    for size, answers, key_heads in (
        (1, 6, 2),
        (2, 12, 1),
        (4, 24, 1),
    ):  # with 4, each key head is there twice
        expected = answers * 10 * layers * 2 * key_heads * head_width * bytes_each
        assert cache_bytes(model, size, config, num_processes=4) == expected


def test_auto_divides_a_sharded_actor_only_if_it_does_not_fit_a_gpu_whole(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, world = (
        PpoConfig(batch_size=8, sampling=SamplingConfig(max_new_tokens=1)),
        World(0, 4, is_group=True),
    )
    model, copy = tiny_model("llama"), tiny_model("llama")
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "gather", lambda _, value: [value])  # the other processes measured the same
        patch.setattr(splitting, "sharding_of", lambda _: ShardedModel(model, Layout(world, 3, copy)))
        found = [
            _chosen(model, config, room=room, world=world, device=torch.device("cuda"))
            for room in (2 * weights, weights, weights // 2)
        ]
        assert found == [1, 2, 4]
        assert "groups of 4 processes hold the actor together" in capsys.readouterr().err
        assert _chosen(model, config, room=0, world=world, device=CPU) == 1
    assert _chosen(model, config, room=0, world=world, device=torch.device("cuda")) == 1  # not sharded


def test_one_process_has_the_model_for_itself_and_is_refused_more() -> None:
    model, config = tiny_model(), PpoConfig()
    assert split_to_generate(model, "auto", config, room=0, world=ALONE, device=CPU) is None
    assert split_to_generate(model, 1, config, room=0, world=ALONE, device=CPU) is None
    with pytest.raises(ConfigError, match=r"tensor_parallel\.generation = 2"):
        split_to_generate(model, 2, config, room=0, world=ALONE, device=CPU)
