"""PPO written out from its papers, to judge whole runs by: one answer at a time, a loop for each sum.

It shares no code with the package. Given: the answers that a run drew, and its first weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dovetail.config.stages import PpoConfig
from dovetail.rlhf.rewards import Answer
from tests.by_definition import Learner, Row, float32, rate

END_ID = 256
"""The token that ends an answer, in the tests' tokenizer."""
ENOUGH, SHARE, PASSES, ANSWERS, FASTER = 0.2, 10, 4, 16, 3
"""The critic's warm-up: the explained variance that ends it, at most one rollout in so many, its passes over each, its
answers in a step, and its rate against the ordinary one unless a setting says another."""
Table = list[list[float]]
"""A number for each token of each answer."""


@dataclass
class Experience:
    """The numbers of one answer's tokens."""

    ids: list[int]
    start: int
    """Tokens of the prompt."""
    counts: bool
    """Whether anything is learnt from it."""
    old: list[float]
    weights: list[float]
    values: list[float]
    to_come: list[float]
    advantages: list[float]
    returns: list[float]


class Ppo:
    """PPO as InstructGPT prints it, over the rollouts that a run drew, after a warm-up of the critic."""

    def __init__(
        self,
        config: PpoConfig,
        actor: Learner,
        critic: Learner,
        *,
        score: Callable[[Sequence[Answer]], list[float]],
        num_rollouts: int,
        seed: int,
    ) -> None:
        self.config, self.actor, self.critic, self.score = config, actor, critic, score
        self.reference = Learner(actor.model, actor.settings)
        self.seed, self.beta, self.rollout = seed, config.kl_coefficient, 0
        self.steps_left = num_rollouts * config.ppo_epochs * config.minibatches
        self.actor_step = self.critic_step = 0
        self.warmup_rollouts = min(config.critic_warmup_rollouts, num_rollouts // SHARE)
        self.warmup_step, self.value_offset = 0, 0.0
        self.actor_waits = self.warmup_rollouts > 0
        self.average = {name: weight.detach().clone() for name, weight in actor.trained.items()}
        self.seen = dict.fromkeys(("ratio", "value", "score", "weight", "actor", "critic"), 0.0)
        """The largest of what there is to clip, over the run; of actor and critic, the gradient's norm."""

    def learn(self, answers: Sequence[Answer], texts_of: Callable[[int], list[Row]] | None = None) -> None:
        """All steps on one rollout, then the next coefficient of the penalty."""
        experience, kl = self.experience(answers)
        has_time = self.actor_waits and self.rollout < self.warmup_rollouts
        if has_time and self.explained_variance(experience) < ENOUGH:
            self.learn_values_alone(experience)
        else:
            self.actor_waits, limit, first_step = (
                False,
                self.config.approx_kl_stop or math.inf,
                self.actor_step,
            )
            for batch in self.minibatches(experience, self.config.ppo_epochs, self.config.minibatches):
                distance = self.distance(batch)
                self.step_actor(batch, texts_of(self.actor_step) if texts_of else [])
                critic_rate = rate(self.critic_step, self.config.critic_optimizer, self.steps_left)
                self.step_critic(batch, critic_rate, self.config.value_clip)
                self.actor_step += 1
                self.critic_step += 1
                if distance > limit:
                    break
            planned = self.config.ppo_epochs * self.config.minibatches
            self.steps_left -= planned - (self.actor_step - first_step)
            if self.config.kl_target is not None:
                self.beta *= 1 + 0.1 * max(-0.2, min(0.2, kl / self.config.kl_target - 1))
        self.rollout += 1

    def learn_values_alone(self, experience: list[Experience]) -> None:
        """The critic learns the rewards to come, without clipping, at a rate that rises over its first steps."""
        settings = self.config.critic_optimizer
        peak = self.config.critic_warmup_learning_rate or FASTER * settings.learning_rate
        count = min(len(experience), max(self.config.minibatches, math.ceil(len(experience) / ANSWERS)))
        for one in experience:
            one.returns = one.to_come
        for batch in self.minibatches(experience, PASSES, count):
            self.warmup_step += 1
            self.step_critic(batch, peak * min(1.0, self.warmup_step / settings.warmup_steps), None)
        self.steps_left -= self.config.ppo_epochs * self.config.minibatches

    def minibatches(self, experience: list[Experience], epochs: int, count: int) -> list[list[Experience]]:
        """A fresh deal of all answers in each epoch; one minibatch keeps their order."""
        batches, num = [], len(experience)
        for epoch in range(epochs):
            own_seed = (self.seed * 1_000_003 + self.rollout) * 1_000_003 + epoch
            order = torch.randperm(num, generator=torch.Generator().manual_seed(own_seed)).tolist()
            order = order if count > 1 else list(range(num))
            parts = [order[num * k // count : num * (k + 1) // count] for k in range(count)]
            batches += [[experience[i] for i in part if experience[i].counts] for part in parts]
        return [batch for batch in batches if batch]

    @torch.no_grad()
    def experience(self, answers: Sequence[Answer]) -> tuple[list[Experience], float]:
        """What each answer teaches, and the mean over answers of the summed log-ratio to the reference."""
        config = self.config
        sequences = [[*answer.prompt_ids, *answer.answer_ids] for answer in answers]
        starts = [len(answer.prompt_ids) for answer in answers]
        old, reference = (
            [[float(p) for p in row[a - 1 :]] for a, row in zip(starts, found, strict=True)]
            for found in (
                who.logprobs(sequences, config.sampling.temperature) for who in (self.actor, self.reference)
            )
        )
        drawn = [[float32(p) for p in answer.logprobs] for answer in answers]
        is_scored = config.old_logprobs == "training" or config.ppo_epochs * config.minibatches > 1
        gaps = minus(old if is_scored or self.actor_waits else drawn, reference)
        rewards = self.rewards(answers, gaps)
        counts = [self.is_finished(answer) or config.cut_off_answers != "leave_out" for answer in answers]
        values = self.values(sequences, starts)
        to_come = [self.sums(row, config.gamma) for row in rewards]
        if self.rollout == 0:
            self.value_offset = mean_of(minus(to_come, values), counts)
            values = self.values(sequences, starts)
        advantages = [self.gae(*rows) for rows in zip(rewards, values, strict=True)]
        mean = mean_of(advantages, counts)
        deviation = math.sqrt(mean_of([[(a - mean) ** 2 for a in row] for row in advantages], counts))
        experience = [
            Experience(
                ids=sequences[i],
                start=starts[i],
                counts=counts[i],
                old=old[i],
                weights=[math.exp(gap) for gap in minus(old, drawn)[i]],
                values=values[i],
                to_come=to_come[i],
                advantages=[(a - mean) / (deviation + 1e-8) for a in advantages[i]],
                returns=[a + v for a, v in zip(advantages[i], values[i], strict=True)],
            )
            for i in range(len(answers))
        ]
        return experience, float32(sum(map(sum, gaps)) / len(answers))

    @torch.no_grad()
    def objective(self, answers: Sequence[Answer]) -> float:
        """What training raises, of these answers: the score as it counts, less the penalty of the setting."""
        sequences = [[*answer.prompt_ids, *answer.answer_ids] for answer in answers]
        own, reference = (
            [sum(row[len(a.prompt_ids) - 1 :]) for a, row in zip(answers, found, strict=True)]
            for found in (
                who.logprobs(sequences, self.config.sampling.temperature)
                for who in (self.actor, self.reference)
            )
        )
        kl = sum(float(p - q) for p, q in zip(own, reference, strict=True)) / len(answers)
        return sum(self.final_scores(answers)) / len(answers) - self.config.kl_coefficient * kl

    def values(self, sequences: list[list[int]], starts: list[int]) -> Table:
        """The critic at the token before each token of the answers, shifted as the first rollout asked for."""
        found = self.critic.numbers(sequences)
        return [
            [float(v) + self.value_offset for v in row[a - 1 : -1]]
            for a, row in zip(starts, found, strict=True)
        ]

    def rewards(self, answers: Sequence[Answer], gaps: Table) -> Table:
        """The penalty at each token, the score at the last; of unit deviation over the rollout if asked for."""
        rewards = [[-self.beta * gap for gap in row] for row in gaps]
        for row, score in zip(rewards, self.final_scores(answers), strict=True):
            row[-1] += score
        if not self.config.whiten_rewards:
            return rewards
        everything = [True] * len(rewards)
        mean = mean_of(rewards, everything)
        deviation = math.sqrt(mean_of([[(r - mean) ** 2 for r in row] for row in rewards], everything))
        return [[(r - mean) / (deviation + 1e-8) + mean for r in row] for row in rewards]

    def final_scores(self, answers: Sequence[Answer]) -> list[float]:
        """Clipped first; those of answers without an end are then replaced, if they are penalised."""
        scores = [float32(score) for score in self.score(answers)]
        self.note("score", *scores)
        limit = self.config.score_clip
        scores = scores if limit is None else [max(-limit, min(limit, score)) for score in scores]
        penalty = self.config.missing_end_penalty
        penalty = min(scores) - 1 if penalty is None else penalty
        keeps = self.config.cut_off_answers != "penalise"
        return [
            float32(score if self.is_finished(answer) or keeps else penalty)
            for score, answer in zip(scores, answers, strict=True)
        ]

    def is_finished(self, answer: Answer) -> bool:
        """Whether the answer has its end; one without is as long as answers can be."""
        has_end = answer.answer_ids[-1] == END_ID
        assert has_end or len(answer.answer_ids) == self.config.sampling.max_new_tokens
        return has_end

    @staticmethod
    def sums(terms: list[float], decay: float) -> list[float]:
        """sum_k decay^k terms_{t+k} for each t."""
        return [sum(decay**k * terms[t + k] for k in range(len(terms) - t)) for t in range(len(terms))]

    def gae(self, rewards: list[float], values: list[float]) -> list[float]:
        """A_t = sum_k (gamma lambda)^k delta_{t+k}; the value after the last token is 0."""
        gamma, following = self.config.gamma, [*values[1:], 0.0]
        delta = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
        return self.sums(delta, gamma * self.config.gae_lambda)

    def explained_variance(self, experience: list[Experience]) -> float:
        """1 - Var(G - V) / Var(G) over the tokens that are learnt from."""
        counts = [one.counts for one in experience]
        to_come = [one.to_come for one in experience]
        missed = minus(to_come, [one.values for one in experience])
        left, whole = (
            mean_of([[x * x for x in row] for row in table], counts) - mean_of(table, counts) ** 2
            for table in (missed, to_come)
        )
        return 1 - left / whole

    @torch.no_grad()
    def distance(self, batch: list[Experience]) -> float:
        """How far the actor is from where the rollout's update began: r - 1 - log r, a mean over the tokens."""
        logprobs = self.actor.logprobs([one.ids for one in batch], self.config.sampling.temperature)
        gaps = [
            float(p) - old
            for one, row in zip(batch, logprobs, strict=True)
            for p, old in zip(row[one.start - 1 :], one.old, strict=True)
        ]
        return sum(math.exp(gap) - 1 - gap for gap in gaps) / len(gaps)

    def step_actor(self, batch: list[Experience], texts: list[Row]) -> None:
        """The clipped surrogate per token, and the texts' cross-entropy per token beside it."""
        config, terms = self.config, []
        clip, cap = config.ratio_clip, config.importance_cap or math.inf
        logprobs = self.actor.logprobs([one.ids for one in batch], config.sampling.temperature)
        for one, row in zip(batch, logprobs, strict=True):
            columns = (row[one.start - 1 :], one.old, one.weights, one.advantages)
            for p, old, weight, advantage in zip(*columns, strict=True):
                ratio = torch.exp(p - old)
                self.note("ratio", float(ratio.detach()) - 1)
                self.note("weight", weight)
                scaled = advantage * (1.0 if config.importance_cap is None else min(weight, cap))
                term = torch.minimum(scaled * ratio, scaled * ratio.clamp(1 - clip, 1 + clip))
                if config.dual_clip is not None and scaled < 0:
                    term = term.clamp(min=scaled * config.dual_clip)
                terms.append(term)
        loss = -torch.stack(terms).mean()
        if texts:
            found = self.actor.logprobs([ids for ids, _ in texts], 1.0)
            rows = zip(found, texts, strict=True)
            learnt = [p for row, (_, mask) in rows for p, m in zip(row, mask[1:], strict=True) if m]
            loss = loss - config.ptx_coefficient * torch.stack(learnt).mean()
        norm = self.actor.step(loss, rate(self.actor_step, config.actor_optimizer, self.steps_left))
        self.note("actor", norm)
        for name, weight in self.actor.trained.items():
            old_average = self.average[name]
            self.average[name] = config.ema_decay * old_average + (1 - config.ema_decay) * weight.detach()

    def step_critic(self, batch: list[Experience], learning_rate: float, clip: float | None) -> None:
        """Half the larger of two squared errors, per token."""
        terms = []
        for one, row in zip(batch, self.critic.numbers([one.ids for one in batch]), strict=True):
            columns = (row[one.start - 1 : -1], one.values, one.returns)
            for head, before, target in zip(*columns, strict=True):
                value = head + self.value_offset
                self.note("value", float(value.detach()) - before)
                error = (value - target) ** 2
                if clip is not None:
                    near = before + (value - before).clamp(-clip, clip)
                    error = torch.maximum(error, (near - target) ** 2)
                terms.append(error / 2)
        self.note("critic", self.critic.step(torch.stack(terms).mean(), learning_rate))

    def note(self, name: str, *numbers: float) -> None:
        """Remember the largest number."""
        self.seen[name] = max(self.seen[name], *map(abs, numbers))


def minus(some: Table, others: Table) -> Table:
    """The differences, token by token."""
    return [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(some, others, strict=True)]


def mean_of(table: Table, counts: list[bool]) -> float:
    """The mean over the tokens of the answers that count."""
    flat = [x for row, is_in in zip(table, counts, strict=True) if is_in for x in row]
    return sum(flat) / len(flat)


def scores_of(model: Learner) -> Callable[[Sequence[Answer]], list[float]]:
    """The reward model's score at each answer's last token."""

    def score(answers: Sequence[Answer]) -> list[float]:
        sequences = [[*answer.prompt_ids, *answer.answer_ids] for answer in answers]
        return [float(row[-1].detach()) for row in model.numbers(sequences)]

    return score
