"""A whole PPO step: OPT-1.3B actor and reference, OPT-350M critic and reward; or OPT-13B with LoRA.

    python benchmarks/ppo_step.py --batch 64                       prompt 256 + answer 256
    python benchmarks/ppo_step.py --batch 256 --ragged --peer naive
    python benchmarks/ppo_step.py --model opt-13b --lora 128 --batch 64 --micro-tokens 2048 --steps 5

Sampling, scoring and the update are the product's own code; only text is left out, since random
weights have none. Answers have no end token, so lengths are exact. One JSON line a step and one of the medians,
with TFLOP/s by the predecessor's formula (perf.py counts generation and both training passes, not the scoring).
The `naive` peer is what one writes with transformers alone: padded generate, four separate models, padded forwards
with full logits, AdamW on bf16 weights, the largest micro-batch that fits. The `trl` peer is TRL's PPOTrainer
(trl_ppo.py; requirements/bench.txt). One epoch, one update a rollout.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import shapes
import torch
from torch import Tensor

from dovetail.config.stages import PpoConfig, SamplingConfig
from dovetail.engine import HybridEngine, Sampling
from dovetail.model.copies import copy_of
from dovetail.model.lora import add_lora
from dovetail.parallel.shard import sharding_of
from dovetail.parallel.sharing import Sharing
from dovetail.rlhf.build import make_learners
from dovetail.rlhf.rewards import Answer, RewardModelScorer
from dovetail.rlhf.roles import Roles
from dovetail.rlhf.rollout import request_seeds, score_answers
from dovetail.rlhf.update import Learners, update
from dovetail.training.step import TokenBudget

FIGURE_6 = {"opt-1.3b": (23.8, 62.9, 43.4), "opt-13b": (33.0, 97.3, 67.1)}
"""DeepSpeed-Chat, A100: TFLOP/s per GPU of generation, training and the whole at its best GPU count."""


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    lengths = shapes.ragged_lengths(options.batch) if options.ragged else [options.new] * options.batch
    shapes.fresh(device)
    medians = measure_ours(options, device, lengths)
    if options.peer:
        shapes.fresh(device)
        measure = {"naive": measure_naive, "trl": measure_trl}[options.peer]
        ratio = measure(options, device, lengths) / medians
        shapes.show(benchmark="ppo_step", **{f"ratio_to_{options.peer}": ratio})


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[workload()])
    parser.add_argument("--ragged", action="store_true", help="answers of 16 to 512 tokens")
    parser.add_argument("--peer", choices=["naive", "trl"])
    parser.add_argument(
        "--only", choices=["generate", "learn"], help="one phase with all parts in memory: its time and peak"
    )
    parser.add_argument("--naive-micro", type=int, default=16, help="sequences; halved until they fit")
    parser.add_argument("--trl-micro", type=int, default=16, help="sequences; divides the batch")
    return checked(parser, words)


def checked(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """The flags; the first step is not counted, so one is too few."""
    options = parser.parse_args(words)
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: the first is not counted, so give 2 or more")
    return options


def workload() -> argparse.ArgumentParser:
    """The flags that say what a step is, for every benchmark of one."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", choices=shapes.SHAPES, default="opt-1.3b")
    parser.add_argument("--reward", choices=shapes.SHAPES, default="opt-350m", help="and the critic")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 trains all weights of the actor")
    parser.add_argument("--batch", type=int, default=64, help="answers of a rollout")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--micro-tokens", type=int, default=16384, help="of one forward and backward pass")
    parser.add_argument("--steps", type=int, default=4, help="the first is not counted")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    return parser


def measure_ours(options: argparse.Namespace, device: torch.device, lengths: Sequence[int]) -> float:
    config = PpoConfig(
        batch_size=options.batch,
        micro_batch_tokens=options.micro_tokens,
        critic_warmup_rollouts=0,
        sampling=SamplingConfig(max_new_tokens=max(lengths)),
    )
    roles, learners = make_parts(options, device, config)
    rows = []
    for step in range(options.steps):
        if options.only == "generate":
            rows.append(generate_twice(options, roles, lengths, step))
        elif options.only == "learn":
            rows.append(learn(roles, learners, config, made_up(options, roles, lengths, step), step))
        else:
            rows.append(one_step(options, roles, learners, config, lengths, step))
        shapes.show(benchmark="ppo_step", system="dovetail", step=step, **rows[-1], **shapes.memory(device))
    if options.only:
        return statistics.median(sum(row.values()) for row in rows[1:])
    names = ("generate", "score", "train", "seconds")
    medians = {name: statistics.median(row[name] for row in rows[1:]) for name in names}
    shapes.show(
        benchmark="ppo_step", system="dovetail", model=options.model, lora=options.lora, batch=options.batch,
        prompt=options.prompt, new_tokens=sum(lengths), ragged=options.ragged, **medians,
        sequences_per_second=options.batch / medians["seconds"], **rates(options, roles, lengths, medians),
        **shapes.setting(device), **shapes.memory(device),
    )  # fmt: skip
    return medians["seconds"]


def make_parts(
    options: argparse.Namespace, device: torch.device, config: PpoConfig
) -> tuple[Roles, Learners]:
    roles = make_roles(options, device)
    return roles, make_learners(roles, config, total_steps=1000)


def make_roles(
    options: argparse.Namespace, device: torch.device, sharing: Sharing | None = None
) -> Roles:  # fmt: skip
    """Models with the same random weights in each process."""
    sharing = sharing or Sharing()
    dtype = getattr(torch, options.dtype)
    actor: Any = shapes.causal_lm(options.model, device, dtype)
    reference = None if options.lora else copy_of(actor).requires_grad_(False)
    if options.lora:
        actor = add_lora(actor, rank=options.lora, alpha=options.lora, seed=0)
    sharing.shard(actor, "actor", device)
    if reference is not None:
        sharing.shard(reference, "reference", device)
    reward = shapes.scalar_model(options.reward, device, dtype)
    critic = copy_of(reward)
    sharing.shard(critic, "critic", device)
    sharing.shard(reward.requires_grad_(False), "reward_model", device)
    budget = TokenBudget(options.micro_tokens, may_shrink=sharing.may_retry)
    return Roles(
        actor=actor, critic=critic, reference=reference, score=RewardModelScorer(reward, budget, device),
        chat=SimpleNamespace(decode=lambda _: ""), device=device, budget=budget,
        engine=HybridEngine(sharding_of(actor).generation_model, device=device, weights=sharding_of(actor).unsharded),
    )  # type: ignore[arg-type]  # fmt: skip


def one_step(
    options: argparse.Namespace, roles: Roles, learners: Learners, config: PpoConfig, lengths: Sequence[int], step: int
) -> dict[str, float]:  # fmt: skip
    """Seconds of the phases of one step."""
    vocabulary = roles.engine.vocabulary
    prompts = shapes.prompts_of(options.batch, options.prompt, vocabulary, seed=step)
    start = shapes.now(roles.device)
    with roles.engine.generating() as generate:
        completions = generate(
            prompts, [Sampling(max_new_tokens=n) for n in lengths], seeds=request_seeds(step, len(prompts))
        )
    generated = shapes.now(roles.device)
    answers = [
        Answer(
            messages=(), text="", prompt_ids=tuple(prompt), answer_ids=found.token_ids, logprobs=found.logprobs,
            finished=True,
        )
        for prompt, found in zip(prompts, completions, strict=True)
    ]  # fmt: skip
    phases = learn(roles, learners, config, answers, step)
    seconds = generated - start + sum(phases.values())
    return {"generate": generated - start, **phases, "seconds": seconds, "micro_tokens": roles.budget.tokens}


def learn(
    roles: Roles, learners: Learners, config: PpoConfig, answers: Sequence[Answer], step: int
) -> dict[str, float]:
    """Seconds of scoring and of both updates."""
    start = shapes.now(roles.device)
    with_old = config.needs_old_logprobs()
    collected = score_answers(answers, roles, config, kl_coefficient=0.05, with_old_logprobs=with_old)
    scored = shapes.now(roles.device)
    update(collected.experience, roles, learners, config, iteration=step, seed=0)
    return {"score": scored - start, "train": shapes.now(roles.device) - scored}


def generate_twice(
    options: argparse.Namespace, roles: Roles, lengths: Sequence[int], step: int
) -> dict[str, float]:
    """`switch`: into generation and out of it, that is, what the first call takes longer than a second one in the
    same block, which finds cache and graphs in place."""
    prompts = shapes.prompts_of(options.batch, options.prompt, roles.engine.vocabulary, seed=step)
    requests, seeds = [Sampling(max_new_tokens=n) for n in lengths], request_seeds(step, len(prompts))
    start = shapes.now(roles.device)
    with roles.engine.generating() as generate:
        generate(prompts, requests, seeds=seeds)
        between = shapes.now(roles.device)
        generate(prompts, requests, seeds=seeds)
        second = shapes.now(roles.device) - between
    both = shapes.now(roles.device) - start
    return {"generate": second, "switch": both - 2 * second}


def made_up(options: argparse.Namespace, roles: Roles, lengths: Sequence[int], step: int) -> list[Answer]:
    """Answers of the right lengths that nobody drew."""
    vocabulary = roles.engine.vocabulary
    prompts = shapes.prompts_of(options.batch, options.prompt, vocabulary, seed=step)
    answers = (shapes.prompts_of(1, length, vocabulary, seed=-step)[0] for length in lengths)
    return [
        Answer(messages=(), text="", prompt_ids=tuple(prompt), answer_ids=tuple(ids), logprobs=(-10.8,) * len(ids),
               finished=True)
        for prompt, ids in zip(prompts, answers, strict=True)
    ]  # fmt: skip


def rates(
    options: argparse.Namespace, roles: Roles, lengths: Sequence[int], medians: dict[str, float]
) -> dict[str, Any]:
    """TFLOP/s by the predecessor's formula, beside its own figures."""
    length = options.prompt + sum(lengths) / len(lengths)
    count = len(lengths)
    actor, critic = roles.engine.model.config, roles.critic.config
    generation = shapes.predecessor_generation_flop(actor, count, length)  # type: ignore[arg-type]
    training = shapes.predecessor_training_flop(
        actor,
        count,
        length,
        rank=options.lora or None,  # type: ignore[arg-type]
    ) + shapes.predecessor_training_flop(critic, count, length)  # type: ignore[arg-type]
    return {
        "tflops_generate_train_whole": [
            round(generation / medians["generate"] / 1e12, 1),
            round(training / medians["train"] / 1e12, 1),
            round((generation + training) / medians["seconds"] / 1e12, 1),
        ],
        "predecessor_figure_6": FIGURE_6.get(options.model),
    }


def measure_trl(options: argparse.Namespace, device: torch.device, lengths: Sequence[int]) -> float:
    """TRL on the same models; its rollout is one batch."""
    import trl_ppo  # only this peer needs TRL

    rows = trl_ppo.step_seconds(
        options.model, options.reward, device=device, dtype=getattr(torch, options.dtype), prompt=options.prompt,
        lengths=lengths, micro=options.trl_micro, steps=options.steps,
    )  # fmt: skip
    names = ("generate", "score", "train", "seconds")
    medians = {name: statistics.median(row[name] for row in rows[1:]) for name in names}
    shapes.show(
        benchmark="ppo_step", system="trl", model=options.model, batch=options.batch, ragged=options.ragged,
        micro_sequences=options.trl_micro, **medians, sequences_per_second=options.batch / medians["seconds"],
        **shapes.setting(device), **shapes.memory(device),
    )  # fmt: skip
    return medians["seconds"]


def measure_naive(options: argparse.Namespace, device: torch.device, lengths: Sequence[int]) -> float:
    """The largest micro-batch that fits, found by halving from --naive-micro; the rollout is the whole batch."""
    micro = min(options.naive_micro, options.batch)
    while micro:
        try:
            return naive_run(options, device, lengths, micro)
        except torch.OutOfMemoryError:
            micro //= 2
        shapes.fresh(device)
    raise SystemExit("the naive peer does not fit at all")


def naive_run(options: argparse.Namespace, device: torch.device, lengths: Sequence[int], micro: int) -> float:
    dtype = getattr(torch, options.dtype)
    actor, reference = (shapes.causal_lm(options.model, device, dtype) for _ in range(2))
    critic, reward = (shapes.scalar_model(options.reward, device, dtype) for _ in range(2))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-6, fused=True) for m in (actor, critic)]
    times = []
    for step in range(options.steps):
        prompts = shapes.prompts_of(options.batch, options.prompt, actor.config.vocab_size, seed=step)
        start = shapes.now(device)
        naive_step(actor, reference, critic, reward, optimizers, prompts, lengths, micro)
        times.append(shapes.now(device) - start)
    seconds = statistics.median(times[1:])
    shapes.show(
        benchmark="ppo_step", system="naive", model=options.model, batch=options.batch, ragged=options.ragged,
        micro_sequences=micro, seconds=seconds, sequences_per_second=options.batch / seconds,
        **shapes.setting(device), **shapes.memory(device),
    )  # fmt: skip
    return seconds


def naive_step(
    actor: Any, reference: Any, critic: Any, reward: Any, optimizers: Sequence[Any], prompts: Sequence[list[int]],
    lengths: Sequence[int], micro: int,
) -> None:  # fmt: skip
    """Padded all the way: a batch is as long as its longest answer."""
    device = actor.device
    ids = torch.tensor(prompts, device=device)
    prompt, longest = ids.shape[1], max(lengths)
    with torch.no_grad():
        ids = actor.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, min_new_tokens=longest,
            do_sample=True, top_k=0, eos_token_id=None, pad_token_id=1,
        )  # fmt: skip
    ends = prompt + torch.tensor(lengths, device=device)
    is_real = torch.arange(ids.shape[1], device=device) < ends[:, None]
    is_action = (is_real & (torch.arange(ids.shape[1], device=device) >= prompt))[:, 1:]
    parts = [slice(i, i + micro) for i in range(0, len(ids), micro)]
    with torch.no_grad():
        old = torch.cat([logprobs(actor, ids[p], is_real[p]) for p in parts])
        base = torch.cat([logprobs(reference, ids[p], is_real[p]) for p in parts])
        values = torch.cat([value_of(critic, ids[p], is_real[p]) for p in parts])
        scores = torch.cat([value_of(reward, ids[p], is_real[p]) for p in parts])
        rewards = -0.05 * (old - base) * is_action
        rewards.scatter_add_(1, (ends - 2)[:, None], scores.gather(1, (ends - 2)[:, None]))
        advantages = gae(rewards, values * is_action, is_action)
    count = is_action.sum()
    for p in parts:
        ratio = (logprobs(actor, ids[p], is_real[p]) - old[p]).exp()
        gain = torch.minimum(ratio * advantages[p], ratio.clamp(0.8, 1.2) * advantages[p])
        (-(gain * is_action[p]).sum() / count).backward()
        error = value_of(critic, ids[p], is_real[p]) - (advantages[p] + values[p])
        (0.5 * (error.square() * is_action[p]).sum() / count).backward()
    for model, optimizer in zip((actor, critic), optimizers, strict=True):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def logprobs(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, :-1]
    return logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def value_of(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    hidden = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    return model.score(hidden[:, :-1]).squeeze(-1).float()


def gae(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Token by token from the end, gamma 1, lambda 0.95."""
    out, last = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(last)
        last = (rewards[:, t] + following - values[:, t] + 0.95 * last) * mask[:, t]
        out[:, t] = last
    return out


if __name__ == "__main__":
    main()
