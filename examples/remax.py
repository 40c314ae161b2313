"""An algorithm of your own: ReMax (Li et al. 2023, arXiv:2310.10505), REINFORCE with the greedy answer as baseline.

One sampled and one greedy answer to each prompt; the advantage of every token of the sampled answer is the
difference of their rewards. No critic, no clipping. Built from four pieces of the engine: generate, rewards, pack,
step_actor.

    python examples/remax.py ACTOR_FOLDER --steps 20
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dovetail import RLHFEngine
from dovetail.batches import Rollout
from dovetail.config.stages import PpoConfig, SamplingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class WithAdvantages(Rollout):
    """A rollout with one more column: columns named _T follow their tokens into every micro-batch."""

    advantages_T: Tensor


def remax_step(engine: RLHFEngine, prompts: Sequence[str], seed: int) -> float:
    """One iteration; returns the mean reward of the sampled answers."""
    sampled = engine.generate(prompts, seed=seed)
    greedy = engine.generate(prompts, seed=seed, greedy=True)
    rewards_S = engine.rewards(sampled)
    advantages_S = rewards_S - engine.rewards(greedy)
    rollout = engine.pack(sampled)
    lengths_S = torch.tensor(rollout.lengths, device=rewards_S.device)
    batch = WithAdvantages(
        **{field.name: getattr(rollout, field.name) for field in fields(rollout)},
        advantages_T=advantages_S.repeat_interleave(lengths_S),
    )
    loss_of = lambda logprobs_T, micro: -(logprobs_T * micro.advantages_T).sum()  # noqa: E731
    engine.step_actor(batch, loss_of, group_size=1)
    return float(rewards_S.mean())


def main() -> None:
    """Teach a model to use the letter e: a reward that needs no reward model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("actor")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    config = PpoConfig(sampling=SamplingConfig(max_new_tokens=32))
    share_of_e = lambda answers: [a.text.count("e") / max(1, len(a.text)) for a in answers]  # noqa: E731
    engine = RLHFEngine(
        actor_model=options.actor, total_steps=options.steps, config=config, reward=share_of_e
    )
    for step in range(options.steps):
        print(step, round(remax_step(engine, ["Tell me a story."] * 32, seed=step), 4))


if __name__ == "__main__":
    main()
