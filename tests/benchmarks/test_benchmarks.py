"""The benchmarks run at all, and their floors and formulas are those worked out by hand."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = ["--model", "tiny", "--device", "cpu", "--dtype", "float32"]


def load(name: str) -> ModuleType:
    """A benchmark as a module; they are scripts in no package."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there for the meaning of their annotations
    spec.loader.exec_module(module)
    return module


shapes: Any = load("shapes")


def run(script: str, *words: str) -> list[dict[str, Any]]:
    """The JSON lines that a benchmark prints."""
    done = subprocess.run(
        [sys.executable, FOLDER / script, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_the_predecessor_s_formulas_give_what_one_works_out_by_hand() -> None:
    config = shapes.SHAPES["tiny"]()  # h 32, L 2, V 128
    # 24 x 3 x 64 x 2 x 32^2 = 9,437,184, times 1 + 64/192 + 128/1024 = 35/24
    forward = 13_762_560
    assert shapes.predecessor_generation_flop(config, 3, 64) == pytest.approx(forward)
    assert shapes.predecessor_training_flop(config, 3, 64) == pytest.approx(3 * forward)
    assert shapes.predecessor_training_flop(config, 3, 64, checkpointing=True) == pytest.approx(4 * forward)
    # rank 8: 3 - (1 - 16/32)
    assert shapes.predecessor_training_flop(config, 3, 64, rank=8) == pytest.approx(2.5 * forward)


@pytest.mark.parametrize(("batch", "steps"), [(2, 10), (1, 14)])
def test_the_floor_reads_weights_once_a_step_and_each_answer_s_cache_once_a_token(
    batch: int, steps: int
) -> None:
    model = shapes.causal_lm("tiny", torch.device("cpu"), torch.float32)
    # Two answers, of 4 and 10 tokens, after 8 of the prompt. Two at a time: as many steps as the longer has.
    parameters = sum(p.numel() for p in model.parameters())
    prefill = 2 * parameters * 16 / 811e12
    keys_and_values = (
        (4 * (8 + 2) + 10 * (8 + 5)) * 2 * 2 * 32 * 4
    )  # tokens x (k, v) x layers x width x bytes
    expected = prefill + (parameters * 4 * steps + keys_and_values) / 3.02e12
    assert shapes.generation_floor(model, 8, [4, 10], batch, torch.float32) == pytest.approx(expected)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_decode_step_reads_every_weight_it_multiplies_by_and_the_cache(is_tied: bool) -> None:
    config = shapes.small_llama(100)
    config.tie_word_embeddings = is_tied
    model = shapes.causal_lm(config, torch.device("cpu"), torch.float32)
    # Width 256, 8 heads and 4 of keys of 32 each, 688 inner, 6 layers, two norms a layer and one at the end.
    layer = 256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 688 + 2 * 256
    read = 4 * (6 * layer + 256 + 100 * 256)
    cached = 3 * 40 * 6 * 2 * 4 * 32 * 4  # rows x tokens x layers x (k, v) x heads x width x bytes
    assert shapes.decode_floor(model, 3, 40, torch.float32) == pytest.approx((read + cached) / 3.02e12)


def test_ragged_lengths_stay_in_bounds_and_have_a_long_tail() -> None:
    lengths = sorted(shapes.ragged_lengths(512))
    assert (lengths[0], lengths[-1]) == (16, 512)
    assert 80 < lengths[256] < 125
    assert sum(lengths) / 512 > lengths[256] * 1.2


@pytest.mark.slow
def test_generation_beside_hugging_face() -> None:
    words = ["--prompt", "8", "--new", "4", "--batch", "3", "--peer", "hf", "--repeats", "1"]
    ours, peer, ratio = run("generate.py", *TINY, *words)
    assert [row["system"] for row in (ours, peer)] == ["dovetail", "hf"]
    assert ours["new_tokens"] == 12
    assert ratio["ratio_to_hf"] == pytest.approx(peer["seconds"] / ours["seconds"], rel=1e-3)


@pytest.mark.slow
def test_greedy_tokens_agree_with_hugging_face() -> None:
    [row] = run("generate.py", *TINY, "--prompt", "8", "--new", "16", "--check")
    assert row["tokens_before_a_difference"] == row["tokens"] == 64


@pytest.mark.slow
def test_a_training_step_beside_hugging_face() -> None:
    rows = run("train_step.py", *TINY, "--sequences", "2", "--micro", "1", "--repeats", "1")
    assert [row.get("system") for row in rows] == ["dovetail", "hf_bf16", "hf_autocast", None]
    assert rows[0]["tokens"] == 1024


@pytest.mark.slow
def test_a_ppo_step_beside_the_naive_one() -> None:
    words = ["--reward", "tiny-350m", "--batch", "2", "--prompt", "8", "--new", "4", "--steps", "2"]
    rows = run("ppo_step.py", *TINY, *words, "--peer", "naive")
    *steps, medians, peer, ratio = rows
    for row in steps:
        assert row["generate"] + row["score"] + row["train"] == pytest.approx(row["seconds"], rel=1e-3)
    assert medians["seconds"] == steps[1]["seconds"]
    assert medians["sequences_per_second"] == pytest.approx(2 / medians["seconds"], rel=1e-3)
    assert ratio["ratio_to_naive"] == pytest.approx(peer["seconds"] / medians["seconds"], rel=1e-3)


@pytest.mark.slow
def test_sharding_in_one_process_beside_the_plain_step() -> None:
    rows = run("train_step.py", *TINY, "--sharded", "--sequences", "2", "--micro", "1", "--repeats", "1")
    for stage, (plain, sharded, ratio) in enumerate(zip(*[iter(rows)] * 3, strict=True), start=1):
        assert (plain["system"], sharded["system"]) == ("dovetail", f"zero_{stage}")
        assert (plain["parameters"], sharded["parameters"]) == ("Tensor", "DTensor")
        expected = pytest.approx(sharded["seconds"] / plain["seconds"], rel=1e-3)
        assert ratio[f"ratio_to_zero_{stage}"] == expected


def test_prompts_computed_once_and_n_times_give_one_loss() -> None:
    rows = run(
        "prompt_once.py",
        *TINY,
        "--groups",
        "2",
        "--answers",
        "3",
        "--prompt",
        "16",
        "--answer",
        "4",
        "--repeats",
        "1",
    )
    apart, once, ratios = rows
    assert apart["tokens"] == 2 * 3 * (16 + 4)
    assert once["tokens"] == 2 * (16 + 3 * 4)
    assert once["loss"] == pytest.approx(apart["loss"], rel=1e-4)
    assert ratios["tokens_ratio"] == pytest.approx(120 / 56, rel=1e-4)


@pytest.mark.slow
def test_a_ppo_step_on_one_and_two_processes() -> None:
    words = ["--reward", "tiny-350m", "--batch", "4", "--prompt", "8", "--new", "4", "--steps", "2"]
    rows = run("multi_gpu.py", *TINY, *words, "--processes", "1", "2", "--zero-actor", "3")
    *_, alone, _, second, two, compared = rows
    assert (alone["processes"], two["processes"]) == (1, 2)
    assert (alone["is_sharded"], two["is_sharded"]) == (False, True)
    assert alone["received_bytes"] == {}
    weights = 4 * shapes.num_parameters(shapes.causal_lm("tiny", torch.device("cpu"), torch.float32))
    assert two["gather_bytes"] == pytest.approx(weights / 2, rel=1e-3)
    assert (
        two["received_bytes"]["allgather_base"] > two["gather_bytes"]
    )  # scoring and training gather as well
    parts = [second[phase] for phase in ("generate", "gather", "score", "train")]
    assert sum(parts) >= second["seconds"] * 0.999  # each is that of the slowest process
    rates = {int(number): rate for number, rate in compared["sequences_per_second"].items()}
    assert rates == {1: alone["sequences_per_second"], 2: two["sequences_per_second"]}
    assert compared["scaling_efficiency"]["2"] == pytest.approx(rates[2] / rates[1] / 2, rel=1e-3)


def test_the_engine_s_own_share_of_a_token_leaves_out_modules_and_draw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    cpu: Any = load("cpu")
    model = shapes.causal_lm("tiny", torch.device("cpu"), torch.float32)
    clock = iter(range(1000))
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: next(clock))
    # Of the ticks, each call that is timed has one for itself, and one comes between two of them: n calls leave n + 1.
    drawn = 3
    assert cpu.loop_microseconds(model, [[1, 2, 3]], [drawn]) / 1e6 * drawn >= 2 * drawn + 1


def test_environments_that_wait_draw_the_same_tokens_as_others() -> None:
    small = ["--episodes", "3", "--turns", "2", "--turn-tokens", "4", "--prompt", "8", "--max-tokens", "60"]
    rows = run("environments.py", *TINY, *small, "--mean-seconds", "0.01", "--warmup", "0", "--repeats", "1")
    assert [row.get("run") for row in rows] == ["without waiting", "waiting", None]
    assert rows[0]["sampled_tokens"] == rows[1]["sampled_tokens"] > 0
    assert rows[2]["same_tokens"] is True
