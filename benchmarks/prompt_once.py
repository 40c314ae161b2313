"""One scoring pass and one optimiser step over groups of answers, with each prompt computed once and n times.

    python benchmarks/prompt_once.py --model opt-1.3b --groups 8 --answers 8 --prompt 1024 --answer 256
    python benchmarks/prompt_once.py --model tiny --device cpu --dtype float32 --prompt 16 --answer 4

The two ways take turns on one model, so that a busy host is busy for both. Every answer token is a target. One JSON
line for each way, with its tokens, its median seconds and the loss of its first step, then one with the ratios.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import shapes
import torch

from dovetail.batches import PackedBatch, pack, share_prompts
from dovetail.model.forward import language_model_loss, token_logprobs
from dovetail.rlhf.roles import over_tokens
from dovetail.training.optim import build_optimizer
from dovetail.training.step import Term, TokenBudget, gradient_step


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    shapes.fresh(device)
    model: Any = shapes.causal_lm(options.model, device, getattr(torch, options.dtype)).train()
    optimizer = build_optimizer(model, learning_rate=1e-6)
    ways = batches_of(options, model.config.vocab_size)
    ways = {name: batch.to(device) for name, batch in ways.items()}
    budget = TokenBudget(options.micro_tokens)
    score_s: dict[str, list[float]] = {name: [] for name in ways}
    train_s: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, float] = {}
    for _ in range(2 + options.repeats):
        for name, batch in ways.items():
            start = shapes.now(device)
            with torch.no_grad():
                over_tokens(batch, lambda part: (token_logprobs(model, part).logprobs_T,), budget.tokens)
            scored = shapes.now(device)
            report = gradient_step(
                model,
                optimizer,
                [Term(batch, partial(language_model_loss, model))],
                max_grad_norm=1.0,
                budget=budget,
                device=device,
                learning_rate=0.0,
            )
            score_s[name].append(scored - start)
            train_s[name].append(shapes.now(device) - scored)
            losses.setdefault(name, report.loss)
    medians = {
        name: (statistics.median(score_s[name][2:]), statistics.median(train_s[name][2:])) for name in ways
    }
    for name, batch in ways.items():
        shapes.show(
            benchmark="prompt_once", system=name, model=options.model, groups=options.groups,
            answers=options.answers, prompt=options.prompt, answer=options.answer, tokens=sum(batch.own_lengths),
            score_seconds=medians[name][0], train_seconds=medians[name][1], loss=losses[name],
            **shapes.setting(device), **shapes.memory(device),
        )  # fmt: skip
    (score_apart, train_apart), (score_once, train_once) = medians["separate"], medians["prompt_once"]
    shapes.show(
        benchmark="prompt_once",
        tokens_ratio=ways["separate"].num_tokens / sum(ways["prompt_once"].own_lengths),
        score_ratio=score_apart / score_once,
        train_ratio=train_apart / train_once,
        ratio=(score_apart + train_apart) / (score_once + train_once),
    )


def batches_of(options: argparse.Namespace, vocabulary: int) -> dict[str, PackedBatch]:
    """The same sequences, once apart and once with shared prompts."""
    prompts = shapes.prompts_of(options.groups, options.prompt, vocabulary)
    answers = shapes.prompts_of(options.groups * options.answers, options.answer, vocabulary, seed=1)
    sequences = [prompts[i // options.answers] + answer for i, answer in enumerate(answers)]
    mask = [False] * options.prompt + [True] * options.answer
    batch = pack(sequences, [mask] * len(sequences))
    return {"separate": batch, "prompt_once": share_prompts(batch, [options.prompt] * len(sequences))}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=shapes.SHAPES, default="opt-1.3b")
    parser.add_argument("--groups", type=int, default=8, help="prompts of one optimiser step")
    parser.add_argument("--answers", type=int, default=8, help="to each prompt")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--answer", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--micro-tokens", type=int, default=16384, help="of one forward and backward pass")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
