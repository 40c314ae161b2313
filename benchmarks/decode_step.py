"""One decode step: milliseconds by the fused step and by the modules in the same run, beside the floor.

    python benchmarks/decode_step.py --model qwen3-8b --batch 64 128
    python benchmarks/decode_step.py --model opt-1.3b --batch 64 --profile     kernels by name

Random weights of the true shapes; the cache holds random numbers, as if prompts had been read. The period between two
graph replays, draw included, over `--new` steps from `--prompt` tokens on. The floor is all weights (of untied
embeddings only the head's) and the cache read once.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import shapes
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from dovetail.engine import HybridEngine, Sampling, graphs
from dovetail.engine.kv_cache import KVArena, KVShape, pages_for
from dovetail.engine.scheduler import Answer, Listener


def main() -> None:
    options = arguments()
    device, dtype = torch.device("cuda"), torch.bfloat16
    model = shapes.causal_lm(options.model, device, dtype)
    for batch in options.batch:
        compare(model, batch, options, device)


fused_step = graphs.fused_step


def compare(model: PreTrainedModel, batch: int, options: argparse.Namespace, device: torch.device) -> None:
    """Measure and show each system's step of so many rows, beside the floor."""
    floor = 1000 * shapes.decode_floor(model, batch, options.prompt + options.new / 2, model.dtype)
    found: dict[str, float] = {}
    for system in options.systems:
        shapes.fresh(device)
        graphs.fused_step = fused_step if system == "fused" else lambda *_: (None, None)  # type: ignore[assignment]
        times, kernels = period(model, batch, options, device)
        found[system] = statistics.median(times)
        shapes.show(
            benchmark="decode_step", model=options.model, batch=batch, system=system, ms=found[system],
            first_ms=times[0], last_ms=times[-1], floor_ms=floor, of_floor=floor / found[system],
            prompt=options.prompt, new=options.new, **shapes.setting(device),
        )  # fmt: skip
        for name, (count, ms) in kernels.items():
            print(f"    {ms:8.4f} ms {count:7.1f} x {1000 * ms / count:7.2f} us  {name[:90]}", flush=True)
    if len(found) == 2:
        shapes.show(benchmark="decode_step", ratio=found["modules"] / found["fused"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=shapes.SHAPES, default="opt-1.3b")
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--systems", nargs="+", default=["fused", "modules"])
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


@torch.no_grad()
def period(
    model: PreTrainedModel, batch: int, options: argparse.Namespace, device: torch.device
) -> tuple[list[float], dict[str, tuple[float, float]]]:
    """Measure milliseconds from each step to the next, and the kernels of a step if they are asked for."""
    modules = HybridEngine(model).modules
    shape = modules.kv_shape()
    assert shape is not None
    answers, arena = filled(shape, batch, options, device)
    with modules.our_attention():
        decoder = graphs.GraphDecoder(modules, arena, device, places=batch, pages=len(answers[0].pages))
        decoder.use(arena)
        decoder.place(answers, torch.zeros(len(answers), dtype=torch.long, device=device))
        steps(decoder, answers, 8)
        times = steps(decoder, answers, options.new - 1 - 20 * options.profile)
        kernels: dict[str, tuple[float, float]] = {}
        if options.profile:
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                steps(decoder, answers, 10)
            kernels = kernels_of(trace, 10)
    return times, kernels


def filled(
    shape: KVShape, batch: int, options: argparse.Namespace, device: torch.device
) -> tuple[list[Answer], KVArena]:
    """Make answers whose prompts are as good as read, and their arena."""
    pages = pages_for(options.prompt + options.new + 8)
    arena = KVArena(shape, pages * batch, device, dense=False)
    for layer in arena._storage:
        layer.normal_()
    order = torch.randperm(arena.num_pages, generator=torch.Generator().manual_seed(0)).tolist()
    sampling = Sampling(max_new_tokens=options.new + 8)
    answers = [
        Answer(
            row, (1,) * options.prompt, sampling, row, options.new + 8, token_ids=[1],
            pages=order[row * pages : (row + 1) * pages], num_cached=options.prompt,
        )
        for row in range(batch)
    ]  # fmt: skip
    return answers, arena


def steps(decoder: graphs.GraphDecoder, answers: Sequence[Answer], count: int) -> list[float]:
    """Decode as the engine does, the host a step ahead."""
    listener, events, draws = Listener(), [], []
    for _ in range(count):
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
        draws.append(decoder.step(answers, 0))
        if len(draws) > 1:
            draws.pop(0).deliver(listener)
    for draw in draws:
        draw.deliver(listener)
    torch.cuda.synchronize()
    return [one.elapsed_time(other) for one, other in pairwise(events)]


def kernels_of(trace: Any, count: int) -> dict[str, tuple[float, float]]:
    """Sum up calls and milliseconds a step of every kernel, the longest first."""
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name][0] += 1 / count
            found[event.name][1] += event.device_time / 1000 / count
    return {name: (calls, ms) for name, (calls, ms) in sorted(found.items(), key=lambda item: -item[1][1])}


if __name__ == "__main__":
    main()
