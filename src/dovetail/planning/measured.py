"""Steps that were measured, as runs that can be planned.

Responsible for: reading measured.yaml, and the run that each row is of. Not responsible for: the plan (plan.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dovetail.config.load import check
from dovetail.planning.hardware import gpu_named
from dovetail.planning.plan import plan_of
from dovetail.planning.result import Machine, Stage

FILE = Path(__file__).with_name("measured.yaml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One measured PPO step."""

    gpu: str
    actor: str
    reward: str
    lora: int
    batch: int
    prompt: int
    new: int
    micro: int
    seconds: tuple[float, ...]
    """The seconds of generate, score and train."""
    gib: tuple[float | None, ...]
    """The peaks of generate, score and train, or the peak of the whole step; None if it was not recorded."""
    fitted: bool
    """True if the constants of time.py come from it."""
    commit: str
    date: Any

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds)

    @property
    def peak(self) -> float | None:
        """GiB of the whole step."""
        known = [size for size in self.gib if size is not None]
        return max(known, default=None)

    def predicted(self) -> Stage:
        """Plan the same step."""
        actor = {"path": self.actor} | ({"lora": {"rank": self.lora}} if self.lora else {})
        config = check(
            {
                "actor": actor,
                "reward_model": {"path": self.reward},
                "output_dir": "runs/measured",
                "stages": ["ppo"],
                "data": {"max_prompt_tokens": self.prompt},
                "ppo": {
                    "batch_size": self.batch,
                    "micro_batch_tokens": self.micro,
                    "activation_checkpointing": False,
                    "sampling": {"max_new_tokens": self.new},
                },
            }
        )
        return plan_of(config, Machine(gpu=gpu_named(self.gpu))).stages[0]


@cache
def measured() -> tuple[Measured, ...]:
    """Return all measured steps."""
    rows: list[dict[str, Any]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return tuple(
        Measured(**{**row, "seconds": tuple(row["seconds"]), "gib": tuple(row["gib"])}) for row in rows
    )
