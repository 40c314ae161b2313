"""Several processes come to what one comes to: losses, statistics and weights of all three stages.

The reference is the path of one process, which knows nothing of groups. Tolerance: tests/tolerance.py, float32.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dovetail.config.run import RunConfig
from dovetail.stages import pipeline
from tests.parallel.group import Case, run_all
from tests.parallel.worker import Stop, run_to
from tests.stages.runs import tiny_run
from tests.tolerance import assert_near

MODELS = ("sft/model", "reward/model", "ppo/model", "ppo/model_ema", "ppo/best")
MICRO = {stage: {"micro_batch_tokens": 100} for stage in ("sft", "reward", "ppo")}
"""Several micro-batches a step, and not as many in every process."""
SEVERAL_STEPS = {"ppo": {"minibatches": 2, "ppo_epochs": 2, "micro_batch_tokens": 60}}
LORA = {"actor": {"lora": {"rank": 4, "alpha": 8}}, "reward_model": {"lora": {"rank": 4, "alpha": 8}}}
RECOMPUTED = {stage: {"activation_checkpointing": True} for stage in ("sft", "reward", "ppo")}


def zero(stage: int) -> dict[str, Any]:
    frozen = 3 if stage == 3 else 0
    return {"zero_stage": {"actor": stage, "critic": stage, "reference": frozen, "reward_model": frozen}}


def at_stage(config: RunConfig, stage: int) -> RunConfig:
    """The run with all models at this ZeRO stage."""
    zero_stage = type(config.zero_stage).model_validate(zero(stage)["zero_stage"])
    return config.model_copy(update={"zero_stage": zero_stage})


def hybrid(stage: int) -> dict[str, Any]:
    """Pairs of processes hold a copy each."""
    return {"zero_stage": {**zero(stage)["zero_stage"], "shard_over": 2}}


OFFLOADED = {"offload": dict.fromkeys(("actor", "critic", "reference", "reward_model"), True)}
LEARNERS_OFFLOADED = {"offload": {"actor": True, "critic": True}}


def merged(*groups: dict[str, Any]) -> dict[str, Any]:
    both: dict[str, Any] = {}
    for group in groups:
        for key, value in group.items():
            both[key] = merged(both.get(key, {}), value) if isinstance(value, dict) else value
    return both


TWO_PARTS = {"tensor_parallel": {"generation": 2}}
DIVIDED = {"tensor_parallel": {"training": 2}}
DIVIDED_ALL_ALONG = {"tensor_parallel": {"training": 2, "generation": 2}}


ALIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "lora": ("opt", LORA),
    "several-steps": ("qwen2", SEVERAL_STEPS),
    "wide": ("llama", {stage: {"batch_size": 8} for stage in ("sft", "reward", "ppo")}),
}
"""Runs of one process: name -> (architecture, changes)."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero-3": ("llama", zero(3) | MICRO),
    "zero-1-lora": ("lora", zero(1)),
    "zero-3-two-parts": ("llama", zero(3) | TWO_PARTS | OFFLOADED),
    "zero-1-divided": ("llama", zero(1) | MICRO | DIVIDED_ALL_ALONG),
}
"""Runs of several: name -> (the run that it must equal, changes)."""
MORE_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero-0": ("llama", zero(0) | MICRO),
    "zero-1": ("llama", zero(1) | MICRO),
    "zero-2": ("llama", zero(2) | MICRO),
    "zero-0-lora": ("lora", zero(0) | MICRO),
    "zero-2-lora": ("lora", zero(2) | MICRO),
    "zero-3-lora": ("lora", zero(3) | RECOMPUTED),
    "zero-1-several-steps": ("several-steps", zero(1)),
    "zero-3-several-steps": ("several-steps", zero(3)),
    "zero-3-recomputed": ("llama", zero(3) | RECOMPUTED),
    "zero-0-two-parts": ("llama", zero(0) | MICRO | TWO_PARTS),
    "zero-0-two-parts-lora": ("lora", zero(0) | TWO_PARTS),
    "zero-3-two-parts-lora": ("lora", zero(3) | RECOMPUTED | TWO_PARTS),
    "zero-1-offloaded": ("several-steps", zero(1) | LEARNERS_OFFLOADED),
    "zero-2-offloaded-lora": ("lora", zero(2) | MICRO | LEARNERS_OFFLOADED),
    "zero-3-offloaded": ("llama", zero(3) | MICRO | OFFLOADED),
    "zero-0-divided": ("llama", zero(0) | MICRO | DIVIDED),
    "zero-0-divided-lora": ("lora", zero(0) | DIVIDED),
    "zero-2-divided-lora": ("lora", zero(2) | MICRO | DIVIDED_ALL_ALONG),
    "zero-3-divided": ("llama", zero(3) | RECOMPUTED | DIVIDED_ALL_ALONG),
    "zero-3-divided-lora": ("lora", zero(3) | MICRO | DIVIDED),
}


HYBRID_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "hybrid-1-lora": ("lora", hybrid(1) | MICRO),
    "hybrid-2": ("wide", hybrid(2) | MICRO),
}
"""Of four processes: two copies, each over two."""
MORE_HYBRID_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "hybrid-1": ("wide", hybrid(1) | MICRO),
    "hybrid-2-lora": ("lora", hybrid(2) | MICRO),
    "hybrid-3": ("wide", hybrid(3) | MICRO),
    "hybrid-3-lora": ("lora", hybrid(3) | RECOMPUTED),
    "hybrid-3-several-steps": ("several-steps", hybrid(3)),
    "hybrid-3-two-parts": ("wide", hybrid(3) | MICRO | TWO_PARTS),
    "hybrid-3-offloaded": ("wide", hybrid(3) | MICRO | OFFLOADED),
}
ON_FOUR = (
    *(
        "zero-0",
        "zero-1-lora",
        "zero-2-lora",
        "zero-3",
        "zero-3-several-steps",
        "zero-3-two-parts",
        "zero-3-offloaded",
    ),
    *("zero-1-divided", "zero-3-divided-lora"),
)
"""Of CASES and MORE_CASES: each way to hold a model once."""
FOUR_CASES = MORE_HYBRID_CASES | {name: (CASES | MORE_CASES)[name] for name in ON_FOUR}

Move = tuple[int, dict[str, Any], Stop]
MOVES: dict[str, tuple[str, list[Move]]] = {
    "from one to four to two and back": (
        "llama",
        [
            (1, zero(3), ("sft", 2)),
            (4, zero(3), ("reward", 1)),
            (2, zero(3), ("ppo", 2)),
            (1, zero(3), None),
        ],
    ),
    "between groups of every size": (
        "lora",
        [
            (4, hybrid(3), ("sft", 2)),
            (2, zero(2), ("reward", 1)),
            (4, zero(3), ("reward", 2)),
            (4, hybrid(1), ("ppo", 2)),
            (1, zero(1), None),
        ],
    ),
    "between whole and divided layers": (
        "llama",
        [
            (2, zero(0) | DIVIDED, ("sft", 2)),
            (1, {}, ("reward", 1)),
            (4, zero(3) | DIVIDED, ("ppo", 1)),
            (2, zero(1), ("ppo", 2)),
            (2, zero(3) | DIVIDED_ALL_ALONG, None),
        ],
    ),
}
"""Runs that go on elsewhere: name -> (the run that it must equal, [processes, changes, where it stops])."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Runs"]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Runs(tmp_path_factory.mktemp("parallel"))
    torch.set_num_threads(threads)


class Runs:
    """Folders of finished runs, made when asked for the first time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def config(self, name: str, **changes: Any) -> RunConfig:
        """Of a run of one process, in its own folder unless the changes say otherwise."""
        architecture, own = ALIKE[name]
        return tiny_run(
            self.folder, architecture, **merged({"output_dir": str(self.folder / name)}, own, changes)
        )

    def alone(self, name: str) -> Path:
        """The run of one process."""
        folder = self.folder / name
        if not folder.exists():
            pipeline.run(self.config(name))
        return folder

    def together(self, cases: dict[str, tuple[str, dict[str, Any]]], *, size: int) -> dict[str, Path]:
        """Case -> folder of its run of `size` processes."""
        folders = {case: self.folder / f"{case}-on-{size}" for case in cases}
        if not all(folder.exists() for folder in folders.values()):
            runs: list[Case] = [
                (self.config(alike, **changes, output_dir=str(folders[case])), None)
                for case, (alike, changes) in cases.items()
            ]
            # The same processes, because starting some takes longer than all they do here.
            if cases is CASES:
                runs.append((self.moving("moving", zero(3)), ("ppo", 1)))
            elif cases is HYBRID_CASES:
                runs.append((self.moving("moving-pairs", hybrid(3)), ("ppo", 1)))
            said = run_all(runs, size=size)
            assert said[1:] == [""] * (size - 1), "only the first process speaks"
        return folders

    def moving(self, name: str, changes: dict[str, Any]) -> RunConfig:
        """A run that one process began, unsharded, and stopped after the second step of stage 1; to go on changed."""
        folder = str(self.folder / name)
        config = self.config("llama", output_dir=folder)
        run_to(("sft", 2), config)
        return self.config("llama", **changes, output_dir=folder)

    def moved(self) -> dict[str, Path]:
        """Folders of all MOVES, whose parts share starts of processes where they can."""
        folders = {name: self.folder / name for name in MOVES}
        if any(folder.exists() for folder in folders.values()):
            return folders
        left = {name: list(moves) for name, (_, moves) in MOVES.items()}
        while any(left.values()):
            for size in (1, 2, 4):
                cases: list[Case] = [
                    (self.config(MOVES[name][0], **changes, output_dir=str(folders[name])), stop)
                    for name, moves in left.items()
                    for changes, stop in taken_first(moves, size)
                ]
                if size > 1 and cases:
                    run_all(cases, size=size)
                for config, stop in cases if size == 1 else ():
                    run_to(stop, config)
        return folders


def taken_first(moves: list[Move], size: int) -> Iterator[tuple[dict[str, Any], Stop]]:
    """The next moves, as long as they are of that many processes; they are taken away."""
    while moves and moves[0][0] == size:
        _, changes, stop = moves.pop(0)
        yield changes, stop


def metrics_of(run: Path) -> list[tuple[int, dict[str, float]]]:
    """All rows but their times, and what only sharded runs and those of several processes report. Without
    perplexities: beside the loss they say nothing new, and an exponential multiplies its rounding."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = ("seconds", "gather", "slowest", "perplexity")
    return [
        (row["step"], {k: v for k, v in row.items() if "/" in k and not any(name in k for name in own)})
        for row in rows
    ]


def expect_alike(run: Path, reference: Path) -> None:
    """All numbers and all weights of two runs are the same to float32 tolerance, and every answer."""
    assert (run / "ppo/samples.jsonl").read_text() == (reference / "ppo/samples.jsonl").read_text()
    expect_same_numbers(run, reference, MODELS)


def expect_same_numbers(run: Path, reference: Path, models: Iterable[str]) -> None:
    """All numbers and the weights of these models are the same to float32 tolerance."""
    for (step, row), (expected_step, expected) in zip(metrics_of(run), metrics_of(reference), strict=True):
        assert step == expected_step
        assert row.keys() == expected.keys()
        for name, value in row.items():
            assert_near(torch.tensor(value), expected[name]), name
    for model in models:
        weights, same = (load_file(folder / model / "model.safetensors") for folder in (run, reference))
        assert weights.keys() == same.keys()
        for name, weight in weights.items():
            assert_near(weight, same[name])


@pytest.mark.parametrize("case", CASES)
def test_two_processes_come_to_what_one_comes_to(runs: Runs, case: str) -> None:
    expect_alike(runs.together(CASES, size=2)[case], runs.alone(CASES[case][0]))


@pytest.mark.parametrize("case", ["zero-3", "zero-3-two-parts", "hybrid-2"])
def test_a_sharded_run_reports_what_gathering_for_generation_cost(runs: Runs, case: str) -> None:
    cases, size = (CASES, 2) if case in CASES else (HYBRID_CASES, 4)  # a copy is held by two processes in all
    run = runs.together(cases, size=size)[case]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    received = [row["ppo/gather_bytes"] for row in rows if "ppo/gather_bytes" in row]
    weights = load_file(run / "ppo/model/model.safetensors").values()
    half = sum(weight.numel() * weight.element_size() for weight in weights) / 2
    # One gathering per rollout; the parity check and the first evaluation come before the first row.
    assert received == [3 * half, half, 2 * half]


def test_slices_of_layers_are_not_sent_to_generate_with_them(runs: Runs) -> None:
    run = runs.together(CASES, size=2)["zero-1-divided"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    received = [row["ppo/gather_bytes"] for row in rows if "ppo/gather_bytes" in row]
    # Embedding and head alone, whose rows are filled up to multiples of eight to generate.
    half = 2 * 258 * 32 * 4 / 2
    assert received == [3 * half, half, 2 * half]


@pytest.mark.parametrize("name", ["moving", "moving-pairs"])
def test_a_run_moves_from_one_process_to_several_and_back(runs: Runs, name: str) -> None:
    if name == "moving":
        runs.together(CASES, size=2)
    else:
        runs.together(HYBRID_CASES, size=4)
    moving = runs.config("llama", output_dir=str(runs.folder / name))
    assert not (runs.folder / name / "ppo/model").exists()
    pipeline.run(moving)
    expect_alike(runs.folder / name, runs.alone("llama"))


def test_of_several_copies_one_writes_each_row_of_a_checkpoint(runs: Runs) -> None:
    run = runs.together(HYBRID_CASES, size=4)["hybrid-2"]
    manifests = [json.loads(path.read_text()) for path in run.glob("*/checkpoints/*/manifest.json")]
    assert manifests
    for manifest in manifests:
        assert manifest["rows"]
        for name, files in manifest["rows"].items():
            assert len(files) == 2, name
            (start, middle), (again, _) = files.values()
            assert (start, middle) == (0, again), name


@pytest.mark.parametrize("case", HYBRID_CASES)
def test_pairs_that_hold_a_copy_each_come_to_what_one_process_comes_to(runs: Runs, case: str) -> None:
    expect_alike(runs.together(HYBRID_CASES, size=4)[case], runs.alone(HYBRID_CASES[case][0]))


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES)
def test_two_processes_come_to_what_one_comes_to_in_every_way(runs: Runs, case: str) -> None:
    expect_alike(runs.together(MORE_CASES, size=2)[case], runs.alone(MORE_CASES[case][0]))


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR_CASES)
def test_four_processes_come_to_what_one_comes_to_in_every_way(runs: Runs, case: str) -> None:
    expect_alike(runs.together(FOUR_CASES, size=4)[case], runs.alone(FOUR_CASES[case][0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVES)
def test_a_run_moves(runs: Runs, name: str) -> None:
    expect_alike(runs.moved()[name], runs.alone(MOVES[name][0]))
