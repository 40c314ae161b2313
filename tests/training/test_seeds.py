import torch

from dovetail.training.step import step_seed


def test_the_seeds_of_runs_made_so_far_stay_what_they_were() -> None:
    # Worked by hand: checkpoints and the figures in the documentation were made with these numbers.
    assert [step_seed(0, step) for step in (0, 1, 99)] == [0, 1, 99]
    assert [step_seed(7, step) for step in (0, 1, 99)] == [7_000_021, 7_000_022, 7_000_120]


def test_neighbouring_runs_share_no_seed() -> None:
    seeds = [step_seed(seed, step) for seed in range(20) for step in range(0, 1_000_000, 977)]
    assert len(set(seeds)) == len(seeds)


def test_nested_seeds_differ_and_every_generator_takes_them() -> None:
    seeds = [
        step_seed(step_seed(seed, step), part)
        for seed in (0, 1, 2**40, 2**70)
        for step in range(30)
        for part in range(9)
    ]
    assert len(set(seeds)) == len(seeds)
    for seed in seeds:
        torch.Generator().manual_seed(seed)
