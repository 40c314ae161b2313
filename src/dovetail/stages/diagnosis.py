"""Diagnose a PPO run by what its last rollouts have in common.

Responsible for: the illnesses that no single rollout shows, each with its cause and its remedy in words.
Not responsible for: those that one rollout shows, and when they are told (guard.py); the page of a run (report.py).

A rule looks at windows of rollouts, because a score of a few dozen answers moves by chance from one to the next.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any, NamedTuple

WINDOW = 10
"""Rollouts over which a number is averaged."""
LITTLE_EXPLAINED = 0.05
"""Explained variance below which the critic is as good as none."""
LITTLE_KL = 0.05
"""Nats per answer within which the actor is still the model that it was."""
MOSTLY_EQUAL = 0.8
"""Share of prompts whose answers all have the same reward, above which a rollout teaches little."""
SATURATED = 0.1
"""Share of the first spread of the scores below which the reward no longer tells answers apart."""
APART = 0.05
"""Nats per token between the generator's numbers and the trainer's that rounding in bf16 does not reach."""
SHORTER, SURER = 0.5, 0.5
"""Shares of the first length and entropy below which a rising score is more likely cheated than earned."""
READ = (
    *("ppo/score_mean", "ppo/score_std", "ppo/answer_tokens", "ppo/entropy_nats_per_token"),
    *("ppo/kl_nats_per_answer", "ppo/explained_variance", "ppo/equal_groups_fraction", "ppo/learning_rate"),
    *("rollout/mismatch_kl_nats_per_token", "ppo/held_out_reward", "ppo/held_out_reward_stderr"),
)
"""The metrics that the rules read."""


class Trends:
    """The first rollouts of a run, the last ones, and all evaluations on held-out prompts."""

    def __init__(self) -> None:
        self.first: list[dict[str, float]] = []
        self.last: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self.held_out: list[tuple[float, float]] = []
        """Mean reward and its standard error at each evaluation."""
        self.seen = 0
        """Rollouts so far."""

    def see(self, row: Mapping[str, float]) -> dict[str, str]:
        """Take the metrics of the next rollout; return a short name and the message of each illness it shows."""
        kept = {name: row[name] for name in READ if math.isfinite(row.get(name, math.nan))}
        if len(self.first) < WINDOW:
            self.first.append(kept)
        self.last.append(kept)
        self.seen += 1
        if "ppo/held_out_reward" in kept:
            self.held_out.append((kept["ppo/held_out_reward"], kept["ppo/held_out_reward_stderr"]))
        if self.seen < 2 * WINDOW:
            return {}
        found = {
            "reward hacking": self._cheated_reward(),
            "held-out reward": self._rewards_that_part(),
            "critic": self._useless_critic(),
            "nothing moves": self._no_movement(),
            "equal groups": self._groups_without_signal(),
            "saturated reward": self._saturated_reward(),
            "generator and trainer": self._two_models(),
        }
        return {name: message for name, message in found.items() if message}

    def _cheated_reward(self) -> str | None:
        score, tokens = self._change("ppo/score_mean"), self._change("ppo/answer_tokens")
        entropy, spread = self._change("ppo/entropy_nats_per_token"), self._change("ppo/score_std")
        if score is None or tokens is None or entropy is None or spread is None:
            return None
        is_higher = score.now - score.first > spread.first / 2
        if not (is_higher and tokens.now < SHORTER * tokens.first and entropy.now < SURER * entropy.first):
            return None
        return (
            f"the score rose from {score.first:.2f} to {score.now:.2f} while answers shrank from {tokens.first:.0f} to "
            f"{tokens.now:.0f} tokens and entropy from {entropy.first:.2f} to {entropy.now:.2f} nats per token: the "
            "actor may have found a stock phrase that the reward likes; read ppo/samples.jsonl, and raise "
            "ppo.kl_coefficient or set ppo.kl_target, or take a reward that such answers do not please"
        )

    def _rewards_that_part(self) -> str | None:
        score = self._change("ppo/score_mean")
        if len(self.held_out) < 3 or score is None:
            return None
        best, newest = max(self.held_out), self.held_out[-1]
        error = math.hypot(best[1], newest[1])
        if score.now <= score.first or newest[0] >= best[0] - 2 * error:
            return None
        return (
            f"the score of training prompts rose from {score.first:.2f} to {score.now:.2f}, but the held-out reward "
            f"fell from {best[0]:.2f} at its best to {newest[0]:.2f}: the actor learns these prompts rather than the "
            "task; ppo/best holds the best model so far, and more prompts help"
        )

    def _useless_critic(self) -> str | None:
        explained = self._change("ppo/explained_variance")
        if explained is None or self.seen < 3 * WINDOW or explained.now >= LITTLE_EXPLAINED:
            return None
        return (
            f"over {WINDOW} rollouts the critic explained {explained.now:.2f} of the variance of the rewards to come, "
            "so advantages are little better than the rewards themselves: raise ppo.critic_optimizer.learning_rate or "
            "ppo.critic_warmup_rollouts, or take a method without a critic (algorithm=rloo or grpo)"
        )

    def _no_movement(self) -> str | None:
        kl, score, spread = (
            self._change(name) for name in ("ppo/kl_nats_per_answer", "ppo/score_mean", "ppo/score_std")
        )
        has_learnt = all(row.get("ppo/learning_rate") for row in self.last)  # not in the critic's warm-up
        if kl is None or score is None or spread is None or not has_learnt:
            return None
        if abs(kl.now) > LITTLE_KL or abs(score.now - score.first) > spread.first / 4:
            return None
        return (
            f"after {self.seen} rollouts the actor is {kl.now:.3f} nats per answer from its start and the score went "
            f"from {score.first:.2f} to {score.now:.2f}: it hardly moves; raise ppo.actor_optimizer.learning_rate, "
            "ppo.minibatches or ppo.batch_size"
        )

    def _groups_without_signal(self) -> str | None:
        equal = self._change("ppo/equal_groups_fraction")
        if equal is None or equal.now <= MOSTLY_EQUAL:
            return None
        return (
            f"at {equal.now:.0%} of the prompts all answers have the same reward, and such a prompt teaches nothing: "
            "take prompts that the actor answers now well, now badly, raise policy.answers_per_prompt, or give part of "
            "the reward for a part of the task"
        )

    def _saturated_reward(self) -> str | None:
        spread = self._change("ppo/score_std")
        if spread is None or not 0 < spread.now < SATURATED * spread.first:
            return None
        return (
            f"the scores of a rollout differed by {spread.first:.3g} (standard deviation) at the start and differ by "
            f"{spread.now:.3g} now: the reward hardly tells answers apart any more, so what is learnt is noise; stop "
            "here, or take harder prompts or a finer reward"
        )

    def _two_models(self) -> str | None:
        gap = self._change("rollout/mismatch_kl_nats_per_token")
        if gap is None or gap.now <= APART:
            return None
        return (
            f"generation and training disagree by {gap.now:.3f} nats per token about the same answers, more than "
            "rounding explains: set ppo.importance_cap, or precision=fp32 to see whether the dtype is the cause"
        )

    def _change(self, name: str) -> "_Change | None":
        """Return the means of a metric over the first rollouts and over the last; None where it was not measured."""
        first, now = _mean(self.first, name), _mean(self.last, name)
        return None if first is None or now is None else _Change(first, now)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on with."""
        return {
            "first": self.first,
            "last": list(self.last),
            "held_out": [list(one) for one in self.held_out],
            "seen": self.seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.first, self.seen = list(state["first"]), state["seen"]
        self.last = deque(state["last"], maxlen=WINDOW)
        self.held_out = [(reward, error) for reward, error in state["held_out"]]


class _Change(NamedTuple):
    """The mean of a metric over the first rollouts of a run, and over the last."""

    first: float
    now: float


def _mean(rows: Iterable[Mapping[str, float]], name: str) -> float | None:
    """Return the mean of a metric over the rows that have it; None where none has."""
    values = [row[name] for row in rows if name in row]
    return fmean(values) if values else None
