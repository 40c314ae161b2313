"""Several GPUs: the same loop in several processes, which share the weights of the actor.

    torchrun --nproc-per-node 2 examples/several_gpus.py ACTOR_FOLDER --steps 20

Every process runs this program with the same prompts. Each generates and trains a part of the batch on its own GPU, and
the results are those of one process, but for rounding. Without GPUs the processes share the CPU.
"""

import argparse

import torch

from dovetail import PPOTrainer, RLHFEngine
from dovetail.config.sharding import ZeroStageConfig
from dovetail.config.stages import PpoConfig, SamplingConfig
from dovetail.model.placement import resolve_device
from dovetail.parallel.sharing import Sharing
from dovetail.parallel.world import World, joined
from dovetail.rlhf.build import Setup


def train(world: World, device: torch.device, actor: str, steps: int) -> None:
    """Teach a model brief answers, with its weights divided over the processes (ZeRO stage 3)."""
    sharing = Sharing(world=world, zero_stage=ZeroStageConfig(actor=3, critic=3, reference=3))
    engine = RLHFEngine(
        actor_model=actor,
        total_steps=steps,
        config=PpoConfig(sampling=SamplingConfig(max_new_tokens=32)),
        reward=lambda answers: [-len(answer.answer_ids) / 32 for answer in answers],
        setup=Setup(device=str(world.device(device)), sharing=sharing),
    )
    trainer = PPOTrainer(engine)
    for step in range(steps):
        collected = trainer.generate_experience(["Tell me a story."] * 32)
        trainer.train_rlhf(collected)
        if world.is_first:
            print(f"step {step}: mean score {collected.stats['ppo/score_mean']:.4f}, {world.size} processes")


def main() -> None:
    """Join the other processes and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("actor", help="a folder or hub name of a causal language model")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    device = resolve_device("auto")
    with joined(device) as world:
        train(world, device, options.actor, options.steps)


if __name__ == "__main__":
    main()
