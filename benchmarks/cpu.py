"""`make bench`: what anybody can rerun on a CPU, beside Hugging Face's generate and TRL's PPO, in under ten minutes.

    python benchmarks/cpu.py --output bench.json

A small Llama with random weights, float32 for all, medians of five in one run. Ratios are the rival's time over ours:
generate_batch1_vs_hf (64 + 128 tokens), generate_ragged32_vs_hf (32 prompts of 16 to 128 tokens, answers of 16 to
256; the rival pads on the left and runs to the longest), ppo_step_vs_trl (32 prompts of 32 tokens, answers of 16 to
192, the same for both, one epoch, one update). TRL 1.12.0 is its last release with a PPO trainer.
loop_microseconds_per_token: what the engine's generation takes outside the modules and the draw.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import ppo_step
import shapes
import torch

from dovetail.engine import HybridEngine, Sampling, forward
from dovetail.engine.forward import PackedModules

CPU = torch.device("cpu")
PAD = 1
TRL_MICRO = 32
"""Sequences of TRL's micro-batch."""
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    model = shapes.causal_lm("small", CPU, torch.float32)
    one = shapes.prompts_of(1, 64, model.config.vocab_size)
    lengths = shapes.ragged_lengths(32, high=256)
    many = [ids[:n] for ids, n in zip(
        shapes.prompts_of(32, 128, model.config.vocab_size), shapes.ragged_lengths(32, seed=1, high=128), strict=True
    )]  # fmt: skip
    rows = {
        "generate_batch1_vs_hf": beside(
            lambda: ours(model, one, [128]), lambda: hugging_face(model, one, [128])
        ),
        "generate_ragged32_vs_hf": beside(
            lambda: ours(model, many, lengths), lambda: hugging_face(model, many, lengths)
        ),
        "ppo_step_vs_trl": ppo_seconds(shapes.ragged_lengths(32, high=192)),
    }
    loop = {
        "batch1": loop_microseconds(model, one, [128]),
        "ragged32": loop_microseconds(model, many, lengths),
    }
    print(f"{'':28}{'ours, s':>10}{'rival, s':>10}{'ratio':>8}")
    for name, (mine, rival) in rows.items():
        print(f"{name:28}{mine:10.3f}{rival:10.3f}{rival / mine:8.2f}")
    for name, microseconds in loop.items():
        print(f"loop, {name:22}{microseconds:10.1f} microseconds a token")
    result = {name: round(rival / mine, 3) for name, (mine, rival) in rows.items()}
    seconds = {name: {"dovetail": mine, "rival": rival} for name, (mine, rival) in rows.items()}
    extra = {"loop_microseconds_per_token": loop, "seconds": seconds, **shapes.setting(CPU)}
    options.output.write_text(json.dumps({**result, **extra}, indent=1) + "\n")


def beside(mine: Callable[[], None], rival: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of both, taken in turns after one run of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + REPEATS):
        for run, taken in zip((mine, rival), times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def ours(model: Any, prompts: list[list[int]], lengths: list[int]) -> None:
    with HybridEngine(model).generating() as generate:
        found = generate(prompts, [Sampling(max_new_tokens=n) for n in lengths], seeds=range(len(prompts)))
    assert [len(answer.token_ids) for answer in found] == lengths


@torch.no_grad()
def hugging_face(model: Any, prompts: list[list[int]], lengths: list[int]) -> None:
    model.set_attn_implementation("sdpa")
    width, longest = max(map(len, prompts)), max(lengths)
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=longest, min_new_tokens=longest, do_sample=True, top_k=0,
        eos_token_id=None, pad_token_id=PAD, use_cache=True,
    )  # fmt: skip


def loop_microseconds(model: Any, prompts: list[list[int]], lengths: list[int]) -> float:
    """Per token: what the engine spends outside the modules and the draw, nearly all of it Python."""
    inside = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*positional: Any, **named: Any) -> Any:
            nonlocal inside
            start = time.perf_counter()
            result = function(*positional, **named)
            inside += time.perf_counter() - start
            return result

        return call

    with (
        mock.patch.object(PackedModules, "next_logits", timed(PackedModules.next_logits)),
        mock.patch.object(forward, "sample_next", timed(forward.sample_next)),
    ):
        start = time.perf_counter()
        ours(model, prompts, lengths)
        total = time.perf_counter() - start
    return (total - inside) / sum(lengths) * 1e6


def ppo_seconds(lengths: list[int]) -> tuple[float, float]:
    """Median seconds of a PPO step, ours and TRL's: ppo_step.py on the model of the other rows."""
    words = "--model small --reward small --device cpu --dtype float32 --prompt 32 --micro-tokens 8192"
    words += f" --batch {len(lengths)} --trl-micro {TRL_MICRO} --steps {1 + REPEATS}"
    options = ppo_step.arguments(words.split())
    return ppo_step.measure_ours(options, CPU, lengths), ppo_step.measure_trl(options, CPU, lengths)


if __name__ == "__main__":
    main()
