"""The API to build on: an engine that holds the models, a trainer that turns prompts into updates.

Responsible for: the pieces an algorithm is made of (`generate`, `pack`, `logprobs`, `reference_logprobs`,
`values`, `rewards`, `step_actor`), the two-call loop `generate_experience` / `train_rlhf`, and their state.
Not responsible for: making the models (rlhf/build.py), data, evaluation, checkpoints on disk (stages/ppo.py).

Shapes: T packed tokens, S sequences.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dovetail.batches import Groups, PackedBatch, Rollout, SummedLoss, moved
from dovetail.config.stages import PpoConfig
from dovetail.data.records import Message, Prompt, message
from dovetail.engine.parity import PROMPT_TOKENS, check_parity
from dovetail.maths.ppo import adaptive_kl_coefficient
from dovetail.model.forward import plain_model, token_logprobs
from dovetail.model.tolerance import has_experts, is_exact
from dovetail.parallel.shard import sharding_of
from dovetail.rlhf.algorithms.ppo import Ppo
from dovetail.rlhf.algorithms.protocol import Algorithm
from dovetail.rlhf.build import Setup, make_learners, make_roles, name_of
from dovetail.rlhf.environments import EnvironmentSource
from dovetail.rlhf.refill import collect_full
from dovetail.rlhf.rewards import Answer, RewardFunction
from dovetail.rlhf.rollout import Collected, collect, pack_rollout, sample_answers
from dovetail.rlhf.update import UpdateReport, rate_at, update
from dovetail.telemetry.log import say
from dovetail.text.tokenizer import load_tokenizer
from dovetail.training.step import StepReport, Term, gradient_step
from dovetail.training.weights import load_trained, trained_weights

Conversation = str | Sequence[Message] | Prompt
"""A prompt: a user's message as text, chat messages ending with the user's, or a `Prompt` with a row of data beside."""


class RLHFEngine:
    """Actor, reference, critic and reward on one device, with what trains them.

    actor_model: name, folder or module of a causal LM. critic_model: name, folder or module of a reward model;
    the critic starts as a copy of it. None: the critic starts from the actor, and `reward` must be given.
    tokenizer: the actor's; by default loaded from `actor_model`. total_steps: optimiser steps of the run, for the
    schedules. reward: a function of the answers, in place of the reward model, or beside it if
    `config.reward_function_weight` is set. setup: device, precision, seed, adapters. algorithm: PPO by default; a
    method without a critic makes none (`algorithm_named`). environment: a class with `reset` and `step`, or a list of
    functions as tools, in place of `config.environment.source`.
    Raises ConfigError if neither a reward model nor a function is given, ModelError if a model cannot be loaded.
    """

    def __init__(  # noqa: PLR0913 -- every one is a part that a caller may bring along
        self,
        *,
        actor_model: str | PreTrainedModel,
        critic_model: str | PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        total_steps: int,
        config: PpoConfig | None = None,
        reward: RewardFunction | None = None,
        setup: Setup | None = None,
        algorithm: Algorithm | None = None,
        environment: EnvironmentSource | None = None,
    ) -> None:
        self.config = config or PpoConfig()
        self.setup = setup or Setup()
        self.tokenizer = tokenizer or load_tokenizer(name_of(actor_model))
        self.roles = make_roles(
            actor_model,
            critic_model,
            self.tokenizer,
            reward,
            self.config,
            self.setup,
            algorithm or Ppo(),
            environment,
        )
        self.learners = make_learners(self.roles, self.config, total_steps=total_steps)
        self._is_checked = False

    def check_parity(self, prompts: Sequence[Conversation]) -> None:
        """Compare generation and training with the plain forward on a few of `prompts`, and say what was found.

        Done once, before the first step; further calls return at once. Raises ParityError on a difference that
        rounding cannot explain.
        """
        if self._is_checked:
            return
        chat = self.roles.chat
        ids = [chat.prompt_ids(prompt_of(prompt).messages) for prompt in prompts[: len(PROMPT_TOKENS)]]
        reach = self._reach(prompts)
        engine, actor = self.roles.engine, self.roles.actor
        with self.learners.offloaded(), nullcontext() if engine.group.size > 1 else engine.weights():
            # Slices prove nothing of themselves: they are compared with the model that is trained.
            is_divided = max(engine.group.size, sharding_of(actor).tensor_size) > 1
            trained = actor if is_divided else None
            report = check_parity(engine, ids, decode_text=chat.decode, trained=trained, reach=reach)
        sharding_of(actor).reshard()
        self.roles.check_readers(ids, reach)
        self._is_checked = True
        say(
            f"parity: {report.num_tokens} tokens of {len(ids)} answers, generated and trained on, against the plain "
            f"forward: largest gap {report.largest_gap:.2g} nats"
        )
        if has_experts(plain_model(actor).config) and not is_exact(actor.dtype):
            say(
                "the actor is a mixture of experts: rounding may send a token to other experts in training than in "
                "generation. Experts are not replayed; ppo.importance_cap weighs each token for the difference, and "
                "rollout/logprob_gap_max and rollout/mismatch_kl_nats_per_token measure it"
            )

    def _reach(self, prompts: Sequence[Conversation]) -> int:
        """Estimate the most tokens of a prompt with its answer, from the longest text."""
        longest = max(
            (prompt_of(prompt).messages for prompt in prompts),
            key=lambda turns: sum(len(turn["content"]) for turn in turns),
        )
        return len(self.roles.chat.prompt_ids(longest)) + self.config.sampling.max_new_tokens

    def generate(self, prompts: Sequence[Conversation], *, seed: int, greedy: bool = False) -> list[Answer]:
        """One answer to each prompt, sampled (or greedy) by the actor as it is now."""
        asked = [prompt_of(prompt) for prompt in prompts]
        with self.learners.offloaded():
            return sample_answers(asked, self.roles, self.config.sampling, seed=seed, greedy=greedy)

    def pack(self, answers: Sequence[Answer]) -> Rollout:
        """Prompts and answers end to end on the device; `mask_T` marks the sampled tokens."""
        rollout = pack_rollout(answers)
        self.roles.expect_readable(rollout)
        return rollout.to(self.roles.device)

    def rewards(self, answers: Sequence[Answer]) -> Tensor:
        """float32 [S]: the score of each answer."""
        return moved(self.roles.score(answers).scores_S, self.roles.device)

    def logprobs(self, batch: PackedBatch) -> Tensor:
        """float32 [T]: of the marked tokens under the actor, without gradient; 0 elsewhere."""
        return self.roles.actor_logprobs(batch, temperature=self.config.sampling.temperature).logprobs_T

    def reference_logprobs(self, batch: PackedBatch) -> Tensor:
        """float32 [T]: of the marked tokens under the frozen reference; 0 elsewhere."""
        return self.roles.reference_logprobs(batch, temperature=self.config.sampling.temperature)

    def values(self, batch: PackedBatch) -> Tensor:
        """float32 [T]: the critic's value of the state in which each token was chosen."""
        return self.roles.values(batch)

    def step_actor(
        self, batch: PackedBatch, loss_of: Callable[[Tensor, Any], Tensor], *, group_size: int
    ) -> StepReport:
        """Take one optimiser step of the actor on a loss of your own.

        `loss_of(logprobs_T, micro)` gets the differentiable float32 log-probabilities of the marked tokens of one
        micro-batch (a part of `batch`, of the same class, with all its columns) and returns the *sum* of the loss
        over them. The sum over all micro-batches is divided by the number of marked tokens of the whole batch.

        group_size: so many sequences in a row stay in one micro-batch, in their order: 1 where the loss of a sequence
        needs no other, 2 for pairs, n for n answers to a prompt. (Prompts of a `RankedBatch` stay whole by
        themselves.) Raises ValueError if the batch does not divide into such groups.
        """
        temperature = self.config.sampling.temperature

        def summed(micro: Groups) -> SummedLoss:
            logprobs_T = token_logprobs(self.roles.actor, micro.batch, temperature=temperature).logprobs_T
            return SummedLoss(loss_of(logprobs_T, micro.batch), micro.batch.mask_T.sum())

        optimizer = self.config.actor_optimizer
        report = gradient_step(
            self.roles.actor,
            self.learners.actor,
            [Term(Groups(batch, group_size), summed)],
            max_grad_norm=optimizer.max_grad_norm,
            budget=self.roles.budget,
            learning_rate=rate_at(self.learners, optimizer, self.learners.actor_step),
            device=self.roles.device,
        )
        self.learners.ema.update()
        self.learners.actor_step += 1
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return trained weights, optimisers, EMA and counters: with PPOTrainer's, all the next step depends on."""
        return {
            "actor": trained_weights(self.roles.actor),
            "actor_optimizer": self.learners.actor.state_dict(),
            "ema": self.learners.ema.state_dict(),
            "actor_step": self.learners.actor_step,
            "critic_step": self.learners.critic_step,
            "left_out": self.learners.left_out,
            "warmup": self.learners.warmup.state_dict(),
            "value_offset": self.roles.value_offset,
            "budget": self.roles.budget.state_dict(),
        } | self._critic_state()

    def _critic_state(self) -> dict[str, Any]:
        """Return the critic's part of the state; empty without a critic."""
        if self.roles.critic is None or self.learners.critic is None:
            return {}
        return {
            "critic": trained_weights(self.roles.critic),
            "critic_optimizer": self.learners.critic.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`, bit for bit."""
        load_trained(self.roles.actor, state["actor"])
        self.learners.actor.load_state_dict(state["actor_optimizer"])
        if self.roles.critic is not None and self.learners.critic is not None:
            load_trained(self.roles.critic, state["critic"])
            self.learners.critic.load_state_dict(state["critic_optimizer"])
        self.learners.ema.load_state_dict(state["ema"])
        self.learners.actor_step = state["actor_step"]
        self.learners.critic_step = state["critic_step"]
        self.learners.left_out = state["left_out"]
        self.learners.warmup.load_state_dict(state["warmup"])
        self.roles.value_offset = state["value_offset"]
        self.roles.budget.load_state_dict(state["budget"])


class PPOTrainer:
    """A PPO loop in two calls, with what it remembers between them: the iteration and the KL coefficient."""

    def __init__(self, engine: RLHFEngine, *, config: PpoConfig | None = None) -> None:
        self.engine = engine
        self.config = config or engine.config
        self.iteration = 0
        self.kl_coefficient = engine.roles.algorithm.kl_weight(self.config)
        algorithm = engine.roles.algorithm
        self._needs_old_logprobs = algorithm.needs_old_logprobs and self.config.needs_old_logprobs()

    def generate_experience(
        self, prompts: Sequence[Conversation], *, more: Callable[[int], Sequence[Conversation]] | None = None
    ) -> Collected:
        """Sample the answers to each prompt and score them: everything `train_rlhf` needs.

        more: gives so many further prompts, for methods that ask them in the place of prompts that teach nothing.
        The first call compares generation and training with the plain forward (`RLHFEngine.check_parity`).
        """
        self.engine.check_parity(prompts)
        # While the critic may be learning alone, nothing but a scoring of its own measures the actor.
        warms_up = not self.engine.learners.warmup.is_over
        how: Callable[..., Collected] = collect
        if more is not None and self.engine.roles.algorithm.refill_rounds:
            how = partial(collect_full, more=lambda count: [prompt_of(prompt) for prompt in more(count)])
        with self.engine.learners.offloaded():
            collected = how(
                [prompt_of(prompt) for prompt in prompts],
                self.engine.roles,
                self.config,
                kl_coefficient=self.kl_coefficient,
                iteration=self.iteration,
                seed=self.engine.setup.seed,
                with_old_logprobs=self._needs_old_logprobs or warms_up,
            )
        if not self.engine.learners.warmup.is_over:
            self.engine.learners.warmup.judge(collected.stats["ppo/explained_variance"])
        return collected

    def train_rlhf(
        self, collected: Collected, *, next_texts: Callable[[int], PackedBatch] | None = None
    ) -> tuple[float, float]:
        """Update actor and critic; returns (actor loss, critic loss). `update` returns the whole report."""
        report = self.update(collected, next_texts=next_texts)
        return report.actor_loss, report.critic_loss

    def update(
        self, collected: Collected, *, next_texts: Callable[[int], PackedBatch] | None = None
    ) -> UpdateReport:
        """Update as `train_rlhf` does and report all there is; moves the KL coefficient and the iteration on."""
        report = update(
            collected.experience,
            self.engine.roles,
            self.engine.learners,
            self.config,
            iteration=self.iteration,
            seed=self.engine.setup.seed,
            next_texts=next_texts,
        )
        # While the critic learns alone the actor is its reference, and a KL of 0 says nothing.
        if self.config.kl_target is not None and self.engine.learners.warmup.is_over:
            self.kl_coefficient = adaptive_kl_coefficient(
                self.kl_coefficient, collected.kl_nats_per_answer, self.config.kl_target
            )
        self.iteration += 1
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return the iteration, the KL coefficient, and the engine's state."""
        own = {"iteration": self.iteration, "kl_coefficient": self.kl_coefficient}
        return own | {"engine": self.engine.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`, bit for bit."""
        self.iteration = state["iteration"]
        self.kl_coefficient = state["kl_coefficient"]
        self.engine.load_state_dict(state["engine"])


def prompt_of(conversation: Conversation) -> Prompt:
    """Return the prompt that text or messages stand for; text is one user message."""
    if isinstance(conversation, Prompt):
        return conversation
    if isinstance(conversation, str):
        return Prompt(messages=(message("user", conversation),))
    return Prompt(messages=tuple(conversation))
