"""Generation: tokens per second, the floor, and Hugging Face's generate in the same run.

    python benchmarks/generate.py --model opt-1.3b --batch 64 --prompt 256 --new 256 --peer hf
    python benchmarks/generate.py --model opt-1.3b --ragged --peer hf        512 requests, answers of 16 to 512

    python benchmarks/generate.py --model opt-1.3b --check                   greedy tokens beside Hugging Face's

Random weights of the true shapes, no end token: every length is exact. The peer takes ragged requests in order of
arrival, 64 at a time, and runs each batch to its longest answer; we are given all at once. One JSON line a system.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import shapes
import torch
from transformers import PreTrainedModel

from dovetail.engine import HybridEngine, Sampling

HF_BATCH = 64


def main() -> None:
    options = arguments()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    model = shapes.causal_lm(options.model, device, dtype)
    if options.check:
        shapes.show(
            benchmark="generate", model=options.model, dtype=options.dtype, **agreement(model, options)
        )
        return
    count = options.requests if options.ragged else options.batch
    lengths = shapes.ragged_lengths(count) if options.ragged else [options.new] * count
    prompts = shapes.prompts_of(count, options.prompt, model.config.vocab_size)
    batch = min(count, options.max_running)
    floor = shapes.generation_floor(model, options.prompt, lengths, batch, dtype)
    common = {
        "benchmark": "generate", "model": options.model, "requests": count, "prompt": options.prompt,
        "new_tokens": sum(lengths), "ragged": options.ragged, "dtype": options.dtype, **shapes.setting(device),
    }  # fmt: skip
    engine = HybridEngine(model, max_running=options.max_running)  # one for all calls, as PPO has it
    systems = {"dovetail": lambda seed: ours(engine, prompts, lengths, seed)}
    if options.peer:
        systems["hf"] = lambda seed: hugging_face(
            model, prompts, lengths, seed, count if not options.ragged else HF_BATCH
        )
    seconds: dict[str, float] = {}
    for name, run in systems.items():
        shapes.fresh(device)
        times = []
        # Hugging Face's first ragged batch is the warm-up of the seven others.
        warmup, repeats = (0, 1) if name == "hf" and options.ragged else (options.warmup, options.repeats)
        for repeat in range(warmup + repeats):
            start = shapes.now(device)
            run(repeat)
            times.append(shapes.now(device) - start)
        seconds[name] = statistics.median(times[warmup:])
        length = options.prompt + sum(lengths) / count
        flop = shapes.predecessor_generation_flop(model.config, count, length)  # type: ignore[arg-type]
        row = {
            "system": name, "seconds": seconds[name], "first_seconds": times[0],
            "tokens_per_second": sum(lengths) / seconds[name], "predecessor_tflops": flop / seconds[name] / 1e12,
        }  # fmt: skip
        if device.type == "cuda":
            row |= {"floor_seconds": floor, "of_floor": floor / seconds[name]}
        shapes.show(**common, **row, **shapes.memory(device))
    if options.peer:
        shapes.show(benchmark="generate", ratio_to_hf=seconds["hf"] / seconds["dovetail"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=shapes.SHAPES, default="opt-1.3b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument(
        "--ragged", action="store_true", help="answers of 16 to 512 tokens in place of --batch x --new"
    )
    parser.add_argument("--requests", type=int, default=512, help="with --ragged")
    parser.add_argument("--max-running", type=int, default=256)
    parser.add_argument("--peer", choices=["hf"])
    parser.add_argument("--check", action="store_true", help="no timing: compare greedy tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def ours(engine: HybridEngine, prompts: Sequence[list[int]], lengths: Sequence[int], seed: int) -> None:
    with engine.generating() as generate:
        found = generate(
            prompts,
            [Sampling(max_new_tokens=length) for length in lengths],
            seeds=range(seed * 10_000, seed * 10_000 + len(prompts)),
        )
    assert [len(completion.token_ids) for completion in found] == list(lengths)


@torch.no_grad()
def hugging_face(
    model: PreTrainedModel, prompts: Sequence[list[int]], lengths: Sequence[int], seed: int, batch: int
) -> None:
    """Its own generate with its default cache, sampling as we do; a batch runs to its longest answer."""
    model.set_attn_implementation("sdpa")
    torch.manual_seed(seed)
    for start in range(0, len(prompts), batch):
        longest = max(lengths[start : start + batch])
        ids = torch.tensor(prompts[start : start + batch], device=model.device)
        out = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, min_new_tokens=longest,
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=1, use_cache=True,
        )  # fmt: skip
        assert out.shape[1] == len(prompts[0]) + longest


@torch.no_grad()
def agreement(model: PreTrainedModel, options: argparse.Namespace) -> dict[str, int]:
    """Greedy tokens of four prompts until the first that differs from Hugging Face's; all, unless rounding decides
    between two tokens: then the two logits are next to equal, which half precision makes common."""
    prompts = shapes.prompts_of(4, options.prompt, model.config.vocab_size)
    with HybridEngine(model).generating() as generate:
        found = generate(prompts, Sampling(max_new_tokens=options.new, temperature=0.0), seeds=range(4))
    model.set_attn_implementation("sdpa")
    ids = torch.tensor(prompts, device=model.device)
    peer = model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.new, min_new_tokens=options.new,
        do_sample=False, eos_token_id=None, pad_token_id=1,
    )[:, options.prompt :].tolist()  # fmt: skip
    same = [
        next((i for i, (a, b) in enumerate(zip(ours.token_ids, theirs, strict=True)) if a != b), options.new)
        for ours, theirs in zip(found, peer, strict=True)
    ]
    return {"tokens": 4 * options.new, "tokens_before_a_difference": sum(same)}


if __name__ == "__main__":
    main()
