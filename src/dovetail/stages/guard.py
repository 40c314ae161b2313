"""Keep the best model, warn of a policy that goes wrong, and stop a run that is beyond repair.

Responsible for: `ppo/best`, the warnings of a rollout, and when a run stops.
Not responsible for: measuring (rlhf/rollout.py, rlhf/evaluation.py).

What goes wrong in PPO shows in few numbers. The actor drifts: its KL to the reference grows. It collapses: entropy
falls, and answers to different prompts become one. It finds a gap of the reward: answers grow or shrink for no reason
of the task. It learns nothing: all answers have one score. Each is compared with the first rollout of the run.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dovetail.config.stages import PpoConfig
from dovetail.errors import TrainingStopped
from dovetail.rlhf.api import RLHFEngine
from dovetail.stages.diagnosis import Trends
from dovetail.stages.saving import save_model
from dovetail.stages.verdict import LossWatch
from dovetail.telemetry.log import say, warn

WARN_KL_PER_TOKEN = 0.5
"""Nats: a KL that is modest by the answer can be spent on a few tokens."""
WARN_SHARE = 1 / 3
"""Warn when entropy, distinct answers or length fall below this share of the start's, or length rises above 1 / it."""
LOST_ENTROPY, LOST_DISTINCT = 1 / 10, 1 / 4
"""The policy has collapsed when it keeps no more than these shares of the start's entropy and distinct answers."""
LOST_FOR = 3
"""Rollouts in a row after which a collapsed policy ends the run: it draws nothing any more that could teach it."""
WARN_CUT_OFF = 0.3
"""Share of answers that reach the length limit."""
WARN_CLIPPED = 0.05
"""Share of scores at the clipping limit."""
REPEAT_AFTER = 20
"""The number of rollouts after which a lasting problem is reported again."""
MEASURES = ("entropy_nats_per_token", "distinct_fraction", "answer_tokens")


def has_collapsed(now: Mapping[str, float], first: Mapping[str, float]) -> bool:
    """Return whether entropy and distinct answers are nearly gone, both measured against the start."""
    return (
        now["entropy_nats_per_token"] <= LOST_ENTROPY * first["entropy_nats_per_token"]
        and now["distinct_fraction"] <= LOST_DISTINCT * first["distinct_fraction"]
    )


def warnings_of_the_policy(row: Mapping[str, float], first: Mapping[str, float]) -> dict[str, str]:
    """Return the warnings that a rollout's answers call for: a short name of each, and the cause with the remedy.

    row: the numbers of the rollout. first: `MEASURES` of the first rollout.
    """
    found: dict[str, str] = {}
    entropy, distinct, tokens = (row[f"ppo/{name}"] for name in MEASURES)
    kl, per_token = row["ppo/kl_nats_per_answer"], row["ppo/kl_nats_per_token"]
    if kl < -1.0:
        found["negative KL"] = (
            f"the KL estimate is {kl:.2f} nats per answer; a negative one means that sampling and scoring disagree "
            "(temperature, forced or forbidden tokens) or that the batch is very small"
        )
    if per_token > WARN_KL_PER_TOKEN:
        found["KL"] = (
            f"KL to the reference is {per_token:.2f} nats per token ({kl:.1f} per answer of {tokens:.0f} tokens): the "
            "actor is leaving the language it was tuned on; raise ppo.kl_coefficient or set ppo.kl_target"
        )
    if entropy < WARN_SHARE * first["entropy_nats_per_token"]:
        found["entropy"] = (
            f"entropy fell from {first['entropy_nats_per_token']:.2f} to {entropy:.2f} nats per token: answers become "
            "predictable and exploration ends; raise ppo.kl_coefficient or lower ppo.actor_optimizer.learning_rate"
        )
    if distinct < WARN_SHARE * first["distinct_fraction"]:
        found["distinct answers"] = (
            f"only {distinct:.0%} of the answers differ from one another, {first['distinct_fraction']:.0%} did at the "
            "start: the actor says one thing to all prompts, most likely because the reward has a gap; read "
            "ppo/samples.jsonl, and raise ppo.kl_coefficient"
        )
    if not WARN_SHARE * first["answer_tokens"] < tokens < first["answer_tokens"] / WARN_SHARE:
        found["length"] = (
            f"answers had {first['answer_tokens']:.0f} tokens at the start and have {tokens:.0f} now: the reward may "
            "pay for length rather than for the answer; read ppo/samples.jsonl"
        )
    return found


def warnings_of_the_reward(row: Mapping[str, float], config: PpoConfig) -> dict[str, str]:
    """Return the warnings about scores that teach little or nothing."""
    found: dict[str, str] = {}
    cut_off = row["ppo/cut_off_fraction"]
    if cut_off == 1.0 and config.cut_off_answers != "keep_score":
        effect = "get one and the same score" if config.cut_off_answers == "penalise" else "are left out"
        found["all cut off"] = (
            f"every answer reached ppo.sampling.max_new_tokens = {config.sampling.max_new_tokens} without an end, so "
            f"all {effect} and nothing is learnt: raise it, fine-tune the actor on answers that end, or set "
            "ppo.cut_off_answers=keep_score"
        )
    elif cut_off > WARN_CUT_OFF:
        found["cut off"] = (
            f"{cut_off:.0%} of the answers reached ppo.sampling.max_new_tokens = {config.sampling.max_new_tokens} "
            f"without an end; raise it, or choose with ppo.cut_off_answers how they count"
        )
    if row["ppo/score_std"] == 0.0:
        found["equal scores"] = (
            f"all answers have the score {row['ppo/score_mean']:g}, so nothing tells a good one from a bad one: "
            "look at the reward function or model"
        )
    if row.get("ppo/score_clipped_fraction", 0.0) > WARN_CLIPPED:
        found["clipped scores"] = (
            f"{row['ppo/score_clipped_fraction']:.0%} of the scores lie beyond ppo.score_clip = {config.score_clip:g} "
            f"and count as if they were there (the mean is {row['ppo/score_mean']:.2f}): raise it, or null for none"
        )
    return found


class Guard:
    """The figures of the first rollout, the warnings given, and how many rollouts a collapse has lasted."""

    def __init__(self, config: PpoConfig) -> None:
        self.config = config
        self.first: dict[str, float] | None = None
        self.warned_at: dict[str, int] = {}
        self.lost_for = 0
        self.losses = LossWatch()
        self.trends = Trends()

    def check(self, row: Mapping[str, float], *, step: int) -> None:
        """Warn of what rollout `step` shows; raises TrainingStopped when the policy is beyond repair.

        Where the actor took no step that could be measured (all answers left out, all steps skipped), the scores alone
        are judged.
        """
        self._warn(warnings_of_the_reward(row, self.config), step)
        self.losses.see(row, step=step)
        self._warn(self.trends.see(row), step)
        now = {name: row.get(f"ppo/{name}", math.nan) for name in MEASURES}
        if any(math.isnan(value) for value in now.values()):
            return
        self.first = self.first or now
        self._warn(warnings_of_the_policy(row, self.first), step)
        self.lost_for = self.lost_for + 1 if has_collapsed(now, self.first) else 0
        self._stop_if_lost(row, step)

    def _warn(self, found: Mapping[str, str], step: int) -> None:
        """Give each warning that was not given lately."""
        for name, message in found.items():
            if step - self.warned_at.get(name, -REPEAT_AFTER) >= REPEAT_AFTER:
                self.warned_at[name] = step
                warn(f"rollout {step}: {message}")

    def _stop_if_lost(self, row: Mapping[str, float], step: int) -> None:
        kl, limit = row["ppo/kl_nats_per_answer"], self.config.kl_stop
        if limit is not None and kl > limit:
            what = f"KL to the reference is {kl:.1f} nats per answer, above ppo.kl_stop = {limit:g}"
        elif self.lost_for >= LOST_FOR:
            what = f"the actor has given nearly the same answer to all prompts for {LOST_FOR} rollouts"
        else:
            return
        raise TrainingStopped(
            f"rollout {step}: {what} (score {row['ppo/score_mean']:.2f}, entropy "
            f"{row['ppo/entropy_nats_per_token']:.2f} nats per token, {row['ppo/distinct_fraction']:.0%} distinct "
            f"answers of {row['ppo/answer_tokens']:.0f} tokens): the actor has left the language it was tuned on, most "
            "likely for a gap of the reward",
            hint="ppo/best holds the best model so far, if there are held-out prompts; raise ppo.kl_coefficient or set "
            "ppo.kl_target, or lower ppo.actor_optimizer.learning_rate",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on with."""
        return {
            "first": self.first,
            "warned_at": self.warned_at,
            "lost_for": self.lost_for,
            "trends": self.trends.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.first, self.lost_for = state["first"], state["lost_for"]
        self.warned_at = dict(state["warned_at"])
        self.trends.load_state_dict(state["trends"])


class Best:
    """The actor with the highest held-out objective so far, kept as a model folder.

    The objective is the one that is trained: the score as PPO counts it (clipped, cut-off answers by their rule) less
    the KL penalty. An actor beyond the KL limit or collapsed is never the best, whatever the reward model says of it.
    """

    def __init__(self, folder: Path, *, kl_limit: float) -> None:
        self.folder = folder
        self.kl_limit = kl_limit
        self.first: dict[str, float] | None = None
        self.objective: float | None = None
        self.step: int | None = None

    def offer(self, judged: Mapping[str, float], engine: RLHFEngine, *, step: int) -> None:
        """Save the actor if it is the best so far; without held-out prompts there is nothing to compare."""
        if "ppo/held_out_objective" not in judged:
            return
        now = {name: judged[f"ppo/held_out_{name}"] for name in MEASURES}
        self.first = self.first or now
        objective, kl = judged["ppo/held_out_objective"], judged["ppo/held_out_kl_nats_per_answer"]
        if not math.isfinite(objective) or (self.objective is not None and objective <= self.objective):
            return
        if not kl <= self.kl_limit:  # NaN is within no limit
            say(f"ppo/best stays: KL {kl:.1f} nats per answer is above ppo.kl_limit = {self.kl_limit:g}")
            return
        if has_collapsed(now, self.first):
            say("ppo/best stays: the actor answers nearly the same to all held-out prompts")
            return
        self.objective, self.step = objective, step
        stops = engine.roles.chat.stop_token_ids
        save_model(engine.roles.actor, engine.tokenizer, self.folder, stop_token_ids=stops)

    def state_dict(self) -> dict[str, Any]:
        """Return what the best was, to compare with after a resume."""
        return {"first": self.first, "objective": self.objective, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.first, self.objective, self.step = state["first"], state["objective"], state["step"]
