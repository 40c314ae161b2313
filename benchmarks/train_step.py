"""One optimiser step: full OPT-1.3B or LoRA OPT-13B, ours beside plain Hugging Face, optimiser included.

    python benchmarks/train_step.py --model opt-1.3b --sequences 16 --micro 16
    python benchmarks/train_step.py --model opt-13b --lora 128 --sequences 8 --micro 4
    python benchmarks/train_step.py --sharded       ours alone, plain and with FSDP2 at ZeRO stages 1 to 3

Sequences of 512 tokens, every token a target. Peers: the modules with SDPA attention, cross-entropy over full
logits and fused AdamW; once with bf16 weights and moments (`hf_bf16`: fastest, but steps below 1/256 of a weight
are lost), once with float32 weights under autocast (`hf_autocast`: as precise as ours). With LoRA, `hf_bf16` is
Hugging Face + peft. `--sharded` really shards, by one process that is a group of its own: parameters are DTensors.
One JSON line a system.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import shapes
import torch
from peft import LoraConfig, get_peft_model

from dovetail.batches import pack
from dovetail.model.forward import language_model_loss, plain_model
from dovetail.model.lora import add_lora
from dovetail.parallel.shard import shard_model
from dovetail.parallel.world import ALONE, World, joined
from dovetail.training.optim import build_optimizer
from dovetail.training.step import Term, TokenBudget, gradient_step

LENGTH = 512

Make = Callable[[Any, argparse.Namespace, torch.device], Callable[[], None]]
"""Model, options, device -> one optimiser step."""


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    if options.sharded:
        with group_of_one(device) as world:
            for stage in (1, 2, 3):
                sharded = partial(ours, world=world, stage=stage)
                show_ratios(
                    measure({"dovetail": ours, f"zero_{stage}": sharded}, options, world.device(device))
                )
        return
    makers: dict[str, Make] = {"dovetail": ours, "hf_bf16": partial(hugging_face, autocast=False)}
    if not options.lora:
        makers["hf_autocast"] = partial(hugging_face, autocast=True)
    seconds: dict[str, float] = {}
    for name, make in makers.items():  # each has the device to itself
        seconds |= measure({name: make}, options, device)
    show_ratios(seconds)


def show_ratios(seconds: Mapping[str, float]) -> None:
    """One line with the seconds of the others over ours."""
    ours_s = seconds["dovetail"]
    ratios = {f"ratio_to_{name}": s / ours_s for name, s in seconds.items() if name != "dovetail"}
    shapes.show(benchmark="train_step", **ratios)


def measure(
    makers: Mapping[str, Make], options: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    """Median seconds of a step of each; several take turns, so that a busy host is busy for all. One line each."""
    shapes.fresh(device)
    models = {name: model_of(options, device) for name in makers}
    # Puts adapters on a model in place, or shards it.
    steps = {name: make(models[name], options, device) for name, make in makers.items()}
    kinds = {name: type(next(model.parameters()).data).__name__ for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(2 + options.repeats):
        for name, step in steps.items():
            start = shapes.now(device)
            step()
            times[name].append(shapes.now(device) - start)
    for name, model in models.items():
        show(name, model, kinds[name], times[name][2:], options, device)
    return {name: statistics.median(own[2:]) for name, own in times.items()}


def show(
    name: str,
    model: Any,
    kind: str,
    times: Sequence[float],
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    """The line of one system; kind: of its parameters."""
    seconds = statistics.median(times)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = options.sequences * LENGTH
    flop = (6 * trained + 4 * frozen) * tokens
    shapes.show(
        benchmark="train_step", system=name, model=options.model, lora=options.lora, tokens=tokens,
        micro_sequences=options.micro, parameters=kind, seconds=seconds, fastest=min(times), slowest=max(times),
        tokens_per_second=tokens / seconds, model_tflops=flop / seconds / 1e12,
        of_matmul=flop / seconds / shapes.ceiling().flop_per_second,
        **shapes.setting(device), **shapes.memory(device),
    )  # fmt: skip


@contextmanager
def group_of_one(device: torch.device) -> Iterator[World]:
    """This process as torchrun would have started it, alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    described = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({**described, "MASTER_PORT": str(port)})
    with joined(device) as world:
        yield world


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=shapes.SHAPES, default="opt-1.3b")
    parser.add_argument(
        "--lora", type=int, default=0, help="rank of adapters on all linear layers; 0 = train all"
    )
    parser.add_argument("--sequences", type=int, default=16, help="of 512 tokens, per optimiser step")
    parser.add_argument("--micro", type=int, default=16, help="sequences of one forward and backward pass")
    parser.add_argument("--sharded", action="store_true", help="plain beside FSDP2 in one process; no peers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def model_of(options: argparse.Namespace, device: torch.device) -> Any:
    model = shapes.causal_lm(options.model, device, getattr(torch, options.dtype))
    return model.train()


def ours(
    model: Any, options: argparse.Namespace, device: torch.device, *, world: World = ALONE, stage: int = 0
) -> Callable[[], None]:
    if options.lora:
        model = add_lora(model, rank=options.lora, alpha=options.lora, seed=0)
    shard_model(model, stage=stage, world=world, device=device)
    optimizer = build_optimizer(model, learning_rate=1e-5)
    ids = shapes.prompts_of(options.sequences, LENGTH, plain_model(model).config.vocab_size)
    batch = pack(ids, [[True] * LENGTH] * options.sequences)
    budget = TokenBudget(options.micro * LENGTH)
    term = Term(batch, partial(language_model_loss, model))

    def step() -> None:
        gradient_step(
            model, optimizer, [term], max_grad_norm=1.0, budget=budget, device=device, learning_rate=1e-5
        )

    return step


def hugging_face(
    model: Any, options: argparse.Namespace, device: torch.device, *, autocast: bool
) -> Callable[[], None]:
    if options.lora:
        settings = LoraConfig(r=options.lora, lora_alpha=options.lora, target_modules="all-linear")
        model = get_peft_model(model, settings, autocast_adapter_dtype=False)
    if autocast:
        model.float()
    plain_model(model).set_attn_implementation("sdpa")
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True, weight_decay=0.0)
    ids = torch.tensor(
        shapes.prompts_of(options.sequences, LENGTH, plain_model(model).config.vocab_size), device=device
    )

    def step() -> None:
        for part in ids.split(options.micro):
            with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
                loss = model(input_ids=part, labels=part, use_cache=False).loss
            (loss * (len(part) / len(ids))).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
