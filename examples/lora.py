"""LoRA on one GPU: only small adapters learn, and the frozen weights below them are the reference.

    python examples/lora.py ACTOR_FOLDER --steps 20

One copy of the actor serves three purposes: it generates, it is trained, and with its adapters off it is the reference.
Optimiser states exist for the adapters alone. Without a GPU the same program runs on the CPU.
"""

import argparse

from dovetail import PPOTrainer, RLHFEngine
from dovetail.config.model import LoraConfig
from dovetail.config.stages import OptimizerConfig, PpoConfig, SamplingConfig
from dovetail.rlhf.build import Setup

ADAPTERS = LoraConfig(rank=16, alpha=32.0)
CONFIG = PpoConfig(
    sampling=SamplingConfig(max_new_tokens=32),
    actor_optimizer=OptimizerConfig(learning_rate=1e-4),  # adapters bear more than whole weights
)


def setup(device: str = "auto") -> Setup:
    """Give actor and critic adapters."""
    return Setup(device=device, actor_lora=ADAPTERS, critic_lora=ADAPTERS)


def trained_share(engine: RLHFEngine) -> float:
    """Return the share of the actor's weights that learn."""
    weights = list(engine.roles.actor.parameters())
    return sum(w.numel() for w in weights if w.requires_grad) / sum(w.numel() for w in weights)


def main() -> None:
    """Teach a model brief answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("actor", help="a folder or hub name of a causal language model")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    engine = RLHFEngine(
        actor_model=options.actor,
        total_steps=options.steps,
        config=CONFIG,
        reward=lambda answers: [-len(answer.answer_ids) / 32 for answer in answers],
        setup=setup(),
    )
    print(f"{trained_share(engine):.1%} of the actor's weights learn")
    trainer = PPOTrainer(engine)
    for step in range(options.steps):
        collected = trainer.generate_experience(["Tell me a story."] * 32)
        trainer.train_rlhf(collected)
        print(f"step {step}: mean score {collected.stats['ppo/score_mean']:.3f}")


if __name__ == "__main__":
    main()
