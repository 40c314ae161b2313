import pytest
import torch

from dovetail.errors import ConfigError
from dovetail.parallel.world import ALONE, VARIABLES, joined
from tests.parallel.group import run_group

CPU = torch.device("cpu")
DESCRIBED = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_process_of_its_own_joins_nothing(environment: pytest.MonkeyPatch) -> None:
    with joined(CPU) as world:
        assert world is ALONE
        assert not torch.distributed.is_initialized()
        assert world.gather("me") == ["me"]
        assert world.sum(torch.tensor([2.0])).tolist() == [2.0]
        assert world.from_first(3) == 3
    assert world.device(CPU) == CPU


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_a_description_is_refused(environment: pytest.MonkeyPatch, missing: str) -> None:
    for name, value in DESCRIBED.items():
        if name != missing:
            environment.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{missing} is not set") as caught, joined(CPU):
        pass
    assert "torchrun" in str(caught.value.hint)


def test_a_missing_size_is_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"), joined(CPU):
        pass


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("RANK", "2", "RANK=2"), ("LOCAL_RANK", "x", "'x'"), ("MASTER_PORT", "x", "MASTER_PORT='x'")],
)
def test_impossible_numbers_are_refused(
    environment: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    for key, good in DESCRIBED.items():
        environment.setenv(key, good)
    environment.setenv(name, value)
    with pytest.raises(ConfigError, match=told), joined(CPU):
        pass


def test_a_size_that_is_no_number_is_refused_without_a_rank_too(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("WORLD_SIZE", "x")
    with pytest.raises(ConfigError, match="WORLD_SIZE='x' is not a number"), joined(CPU):
        pass


@pytest.mark.parametrize("who", ["one", "all"])
def test_an_error_is_told_once_and_ends_all_processes(who: str) -> None:
    codes, said = run_group(["tests.parallel.failing", who], size=3)
    assert sorted(codes) == [1, 1, 2]
    assert sorted(said) == ["", "", "row 7 has no text\n"]
