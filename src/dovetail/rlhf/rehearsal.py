"""The largest pieces of a PPO step, run once before the first rollout.

Responsible for: a full batch of the longest prompts read and decoded for a step, scoring and both gradient steps on the
longest answers. Nothing that a later step depends on changes.
Not responsible for: judging the memory (training/rehearsal.py).
"""

from collections.abc import Sequence
from functools import partial
from itertools import islice

import torch

from dovetail.batches import Experience, Rollout
from dovetail.config.stages import PpoConfig
from dovetail.data.records import Prompt
from dovetail.engine.sampling import Sampling
from dovetail.parallel.shard import sharding_of
from dovetail.planning.memory import MAX_RUNNING, cache_bytes, merged, prefill_bytes, total
from dovetail.rlhf.api import RLHFEngine
from dovetail.rlhf.rewards import Answer
from dovetail.rlhf.rollout import pack_rollout, request_seeds
from dovetail.rlhf.update import policy_loss, value_loss
from dovetail.training.rehearsal import Probe, halve, rehearse
from dovetail.training.step import Term, rehearse_step
from dovetail.training.step_memory import held_as


def rehearse_ppo(engine: RLHFEngine, prompts: Sequence[Prompt], probe: Probe) -> None:
    """Rehearse generation, scoring and the update with the longest prompts and answers; say how memory compares."""
    longest = longest_prompts(engine, prompts)
    config, budget = engine.config, engine.roles.budget
    length = len(longest[0]) + config.sampling.max_new_tokens
    rehearse(
        lambda: generate_a_step(engine, longest),
        probe=probe,
        what="ppo: generating",
        planned=lambda: planned_generation(engine, longest),
        shrink=lambda: None,  # the KV cache has left a part of the memory free
    )
    rehearse(
        lambda: score_and_learn(engine, config, longest[0]),
        probe=probe,
        what="ppo: learning",
        planned=lambda: planned_step(engine, length),
        shrink=lambda: halve(budget, length),
    )


def longest_prompts(engine: RLHFEngine, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return as many tokenised prompts as this process answers at once, the longest first, each as often as asked."""
    roles = engine.roles
    asked = min(MAX_RUNNING, -(-engine.config.batch_size // sharding_of(roles.actor).world.size))
    by_text = sorted(prompts, key=lambda prompt: -sum(len(turn["content"]) for turn in prompt.messages))
    ids = [roles.chat.prompt_ids(prompt.messages) for prompt in islice(by_text, asked)]
    ids.sort(key=len, reverse=True)
    repeated: list[list[int]] = ids * (asked // len(ids) + 1)
    return repeated[:asked]


def generate_a_step(engine: RLHFEngine, prompts: Sequence[Sequence[int]]) -> None:
    """Read the prompts and decode once for each, in a KV cache that has room for whole answers."""
    sampling = Sampling(max_new_tokens=engine.config.sampling.max_new_tokens)
    with engine.learners.offloaded(), engine.roles.engine.generating() as generate:
        generate.rehearse(prompts, sampling, seeds=request_seeds(0, len(prompts)))


def score_and_learn(engine: RLHFEngine, config: PpoConfig, prompt: Sequence[int]) -> None:
    """Score answers of the greatest length, and do all of a step of actor and critic but the update."""
    roles, learners = engine.roles, engine.learners
    needs_old = roles.algorithm.needs_old_logprobs and config.needs_old_logprobs()
    needs_old = needs_old or not learners.warmup.is_over
    rollout = longest_rollout(engine, config, prompt)
    with learners.offloaded():
        roles.reference_logprobs(rollout, temperature=config.sampling.temperature)
        if roles.critic is not None:
            roles.values(rollout)
        if needs_old:
            roles.actor_logprobs(rollout, temperature=config.sampling.temperature)
    experience = nothing_to_learn(rollout, with_values=roles.critic is not None, with_old=needs_old)
    loss = partial(policy_loss, roles.actor, config=config, algorithm=roles.algorithm)
    term = Term(roles.algorithm.prepared(experience, config), loss, name="policy")
    rehearse_step(roles.actor, learners.actor, [term], budget=roles.budget, device=roles.device)
    if roles.critic is not None and learners.critic is not None:
        term = Term(experience, partial(value_loss, roles, config=config), name="value")
        rehearse_step(roles.critic, learners.critic, [term], budget=roles.budget, device=roles.device)


def longest_rollout(engine: RLHFEngine, config: PpoConfig, prompt: Sequence[int]) -> Rollout:
    """Return answers of the greatest length, enough for three micro-batches in each process.

    Each prompt is the longest one, begun at another token: models would compute equal ones once.
    """
    roles, new = engine.roles, config.sampling.max_new_tokens
    each = max(1, roles.budget.tokens // (len(prompt) + new))
    size = roles.algorithm.answers_per_prompt
    count = min(config.batch_size // config.minibatches, 3 * each * sharding_of(roles.actor).world.size)
    num_prompts = -(-count // size)
    num_prompts += num_prompts * size % 2  # some methods learn from pairs
    answer = [prompt[place % len(prompt)] for place in range(new)]
    answers = [
        Answer(
            messages=(),
            text="",
            prompt_ids=(*prompt[start:], *prompt[:start]),
            answer_ids=tuple(answer),
            logprobs=(0.0,) * new,
            finished=True,
        )
        for number in range(num_prompts)
        for start in [number % len(prompt)] * size
    ]
    return pack_rollout(answers).to(roles.device)


def nothing_to_learn(rollout: Rollout, *, with_values: bool, with_old: bool) -> Experience:
    """Return experience in which every advantage and every target is 0."""
    zeros_T = torch.zeros_like(rollout.sampled_logprobs_T)
    return Experience(
        token_ids_T=rollout.token_ids_T,
        cu_seqlens_S1=rollout.cu_seqlens_S1,
        lengths=rollout.lengths,
        mask_T=rollout.mask_T,
        target_counts=rollout.target_counts,
        sampled_logprobs_T=zeros_T,
        old_logprobs_T=zeros_T if with_old else None,
        reference_logprobs_T=zeros_T,
        old_values_T=zeros_T if with_values else None,
        rewards_T=zeros_T,
        advantages_T=zeros_T,
        returns_T=zeros_T if with_values else None,
        scores_S=zeros_T[: rollout.num_sequences],
        finished_S=rollout.finished_S,
    )


def planned_step(engine: RLHFEngine, length: int) -> float:
    """Return the planned peak of a gradient step on answers of this length, prompts included."""
    roles, config = engine.roles, engine.config
    each = max(1, roles.budget.tokens // length)
    parts = -(-config.batch_size // config.minibatches // sharding_of(roles.actor).world.size // each)
    learning = [held_as(roles.actor, is_averaged=True)]
    learning += [held_as(roles.critic)] if roles.critic is not None else []
    kept = merged([*_weights(engine), *(held.states() for held in learning)])
    is_checkpointed = bool(getattr(roles.actor, "is_gradient_checkpointing", False))
    steps = [held.training(each * length, parts, is_checkpointed=is_checkpointed) for held in learning]
    return total(kept) + max(map(total, steps))


def planned_generation(engine: RLHFEngine, prompts: Sequence[Sequence[int]]) -> float:
    """Return the planned peak of generating."""
    actor = held_as(engine.roles.actor, is_averaged=True)
    of, size, new = actor.architecture, actor.element_bytes, engine.config.sampling.max_new_tokens
    learning = [actor] + ([held_as(engine.roles.critic)] if engine.roles.critic is not None else [])
    states = [] if engine.learners.offloads else [held.states() for held in learning]
    caches = sum(cache_bytes(of, tokens=len(prompt) + new, element_bytes=size) for prompt in prompts)
    reading = prefill_bytes(of, tokens=sum(map(len, prompts)), answers=len(prompts), element_bytes=size)
    size_of_group = engine.roles.engine.group.size
    gathered = actor.weights / size_of_group if actor.is_gathered or size_of_group > 1 else 0.0
    return total(merged([*_weights(engine), *states])) + gathered + caches / size_of_group + reading


def _weights(engine: RLHFEngine) -> list[dict[str, float]]:
    roles = engine.roles
    models = (roles.actor, roles.critic, roles.reference, roles.reward_model)
    return [held_as(model).resident() for model in models if model is not None]
