"""Keep the best model, and stop a run that has run away.

Responsible for: `ppo/best` and the KL stop. Not responsible for: measuring (evaluation/answers.py).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dovetail.config.stages import PpoConfig
from dovetail.errors import TrainingStopped
from dovetail.rlhf.api import RLHFEngine
from dovetail.stages.saving import save_model
from dovetail.telemetry.log import warn


class Best:
    """The actor with the highest held-out reward among those within the KL limit, kept as a model folder."""

    def __init__(self, folder: Path, *, kl_limit: float) -> None:
        self.folder = folder
        self.kl_limit = kl_limit
        self.reward: float | None = None
        self.step: int | None = None

    def offer(self, judged: Mapping[str, float], engine: RLHFEngine, *, step: int) -> None:
        """Save the actor if it is the best so far; without held-out prompts nobody knows."""
        if "ppo/held_out_reward" not in judged:
            return
        reward, kl = judged["ppo/held_out_reward"], judged["ppo/held_out_kl_nats_per_answer"]
        if not math.isfinite(reward) or not kl <= self.kl_limit:  # NaN is within no limit
            return
        if self.reward is not None and reward <= self.reward:
            return
        self.reward, self.step = reward, step
        stops = engine.roles.chat.stop_token_ids
        save_model(engine.roles.actor, engine.tokenizer, self.folder, stop_token_ids=stops)

    def state_dict(self) -> dict[str, Any]:
        """What the best was, to compare with after a resume."""
        return {"reward": self.reward, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.reward, self.step = state["reward"], state["step"]


def check_kl(row: Mapping[str, float], config: PpoConfig, *, step: int) -> None:
    """Raise TrainingStopped when the actor has left the reference behind; warn when the estimate is impossible."""
    kl = row["ppo/kl_nats_per_answer"]
    if config.kl_stop is not None and kl > config.kl_stop:
        raise TrainingStopped(
            f"KL to the reference is {kl:.1f} nats per answer at rollout {step}, above ppo.kl_stop = "
            f"{config.kl_stop:g} (score {row['ppo/score_mean']:.2f}, entropy "
            f"{row['ppo/entropy_nats_per_token']:.2f} nats per token, answers of {row['ppo/answer_tokens']:.0f} "
            "tokens): the actor is leaving the language it was tuned on, most likely for the reward model's gaps",
            hint="ppo/best holds the best model so far, if there are held-out prompts; raise ppo.kl_coefficient or set "
            "ppo.kl_target, or lower ppo.actor_optimizer.learning_rate",
        )
    if kl < -1.0:
        warn(
            f"rollout {step}: the KL estimate is {kl:.2f} nats per answer; a negative one means that sampling and "
            "scoring disagree (temperature, forced or forbidden tokens) or that the batch is very small"
        )
