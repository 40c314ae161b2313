"""DeepSpeed-Chat's PPO trainer: the two calls of its loop, and the methods that its users override.

Responsible for: `DeepSpeedPPOTrainer`, `DeepSpeedPPOTrainerUnsupervised`, and the objective as methods and numbers of
theirs, which are read at every call.
Not responsible for: sampling and scoring (rlhf/), the padded layout (padding.py), optimiser steps (accumulation.py).

Shapes: B sequences, L padded tokens, W longest answer, S sequences of a micro-batch, T packed tokens.
"""

import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dovetail.batches import Experience, SummedLoss, moved
from dovetail.compat.accumulation import AccumulatedSteps
from dovetail.compat.flags import accumulation_from
from dovetail.compat.models import DeepSpeedRLHFEngine, expect_no_overrides
from dovetail.compat.padding import (
    Batch,
    answers_of,
    is_action,
    own_part,
    packed,
    packed_texts,
    padded,
    unpadded,
)
from dovetail.data.records import Message
from dovetail.engine.sampling import Sampling
from dovetail.errors import ConfigError
from dovetail.maths.gae import gae
from dovetail.maths.masked import normalise
from dovetail.maths.policy_loss import clipped_policy_loss
from dovetail.maths.rewards import clip_scores, per_token_rewards, replace_missing_end
from dovetail.maths.value_loss import clipped_value_loss
from dovetail.model.forward import token_logprobs
from dovetail.rlhf.rewards import Answer
from dovetail.rlhf.rollout import complete, pack_rollout
from dovetail.rlhf.update import language_model_loss
from dovetail.telemetry.log import say

_NOT_CALLED = (
    "_generate_sequence",
    "_validate_training_mode",
    "_validate_evaluation_mode",
    "dump_model_norms",
)


class DeepSpeedPPOTrainer:
    """`generate_experience` and `train_rlhf` over padded dictionaries.

    `kl_ctl`, `clip_reward_value`, `gamma` and `lam` take effect in `generate_experience`, `cliprange` and
    `cliprange_value` in `train_rlhf`, as they are when it is called.
    """

    learns_from_text = False

    def __init__(
        self,
        rlhf_engine: DeepSpeedRLHFEngine | None = None,
        args: Namespace | None = None,
        *,
        engine: DeepSpeedRLHFEngine | None = None,
    ) -> None:
        expect_no_overrides(
            self,
            _NOT_CALLED,
            "override generate_experience, compute_rewards, get_advantages_and_returns, actor_loss_fn or "
            "critic_loss_fn",
        )
        held = rlhf_engine or engine
        if held is None:
            raise ConfigError(
                "the trainer was given no engine", hint="write DeepSpeedPPOTrainer(rlhf_engine, args)"
            )
        self.rlhf_engine = held
        self.engine = held.engine
        self.args = args or held.args
        self.tokenizer = held.tokenizer
        self.actor_model, self.critic_model = held.actor, held.critic
        self.ref_model, self.reward_model = held.ref, held.reward
        config = self.config = self.engine.config
        self.max_answer_seq_len = config.sampling.max_new_tokens
        self.kl_ctl = config.kl_coefficient
        self.clip_reward_value = config.score_clip
        self.cliprange = config.ratio_clip
        self.cliprange_value = config.value_clip
        self.gamma = config.gamma
        self.lam = config.gae_lambda
        self.generate_time = 0.0
        self.world = self.engine.setup.sharing.world
        self._calls = 0
        self._actor_steps, self._critic_steps = self._steps()

    def generate_experience(
        self, prompts: Tensor | Batch, mask: Tensor | None = None, step: int | None = None
    ) -> dict[str, Tensor]:
        """Answer padded prompts [B, L] and score the answers; every value of the result has B rows.

        prompts: ids, or a batch with `prompt` and `prompt_att_mask`. mask: 1 = a real token; without one, tokens
        equal to the pad token at the left are padding. step: seeds the sampling; by default calls are counted.

        `rewards` are the scores as the reward model gave them. What is learned from are `advantages` and `returns`,
        taken over the rows of all processes, so that they do not depend on which rows `train_rlhf` is given together.
        """
        if not isinstance(prompts, Tensor):
            batch: Batch = prompts
            prompts, mask = batch["prompt"], batch.get("prompt_att_mask")
        shares = self.world.gather(unpadded(prompts, mask, self.engine.tokenizer.pad_token_id))
        answers = self._answer([ids for share in shares for ids in share], step)
        experience = self._with_advantages(self._scored(answers))
        start = sum(len(share) for share in shares[: self.world.rank])
        own = {name: rows[start : start + len(prompts)] for name, rows in experience.items()}
        self._print(own, step)
        return {name: rows.to(prompts.device) for name, rows in own.items()}

    def train_rlhf(self, inputs: Batch) -> tuple[Tensor, Tensor]:
        """Add the losses of these rows, and take the steps of actor and critic that are due; returns the two losses.

        The rows of all processes count as one batch.
        """
        experience = self._packed(inputs)
        actor = self._actor_steps.add(experience, self._actor_loss)
        critic = self._critic_steps.add(experience, self._critic_loss)
        return actor, critic

    def compute_rewards(
        self,
        prompts: Tensor,
        log_probs: Tensor,
        ref_log_probs: Tensor,
        reward_score: Tensor,
        action_mask: Tensor,
    ) -> Tensor:
        """Return the reward of each token, [B, L - 1]: the clipped score at the last one, minus the KL penalty.

        reward_score: 1 below the lowest for answers that were cut off.
        """
        counts = is_action(prompts, action_mask)
        num_rows, width = counts.shape
        last_B = width - 1 - counts.flip(1).long().argmax(dim=1)
        rewards = per_token_rewards(
            log_probs.flatten(),
            ref_log_probs.flatten(),
            clip_scores(reward_score, self.clip_reward_value),
            counts.flatten(),
            last_B + width * torch.arange(num_rows, device=counts.device),
            kl_coefficient=self.kl_ctl,
        )
        return rewards.view(num_rows, width)

    def get_advantages_and_returns(
        self, values: Tensor, rewards: Tensor, start: int
    ) -> tuple[Tensor, Tensor]:
        """Return GAE and the critic's targets, [B, L - 1 - start]; values and rewards are 0 behind each answer."""
        values, rewards = values[:, start:], rewards[:, start:]
        num_rows, width = values.shape
        advantages = gae(
            rewards.flatten(),
            values.flatten(),
            width * torch.arange(num_rows + 1, device=values.device),
            gamma=self.gamma,
            lam=self.lam,
            longest=width,
        ).view(num_rows, width)
        return advantages, advantages + values

    def actor_loss_fn(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> Tensor:
        """Return the mean of PPO's clipped surrogate over the tokens with mask 1; everything is [S, W]."""
        loss = clipped_policy_loss(logprobs, old_logprobs, advantages, mask.bool(), clip=self.cliprange)
        return loss.total / loss.count

    def critic_loss_fn(self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        """Return the mean of the clipped squared error over the tokens with mask 1; everything is [S, W]."""
        loss = clipped_value_loss(values, old_values, returns, mask.bool(), clip=self.cliprange_value)
        return loss.total / loss.count

    def get_overflow(self) -> tuple[bool, bool]:
        """Return whether the last step of actor and critic was skipped because its gradient was not finite."""
        return self._actor_steps.overflowed, self._critic_steps.overflowed

    def train(self) -> None:
        """Do nothing: generation and training are modes of the same weights, entered where needed."""

    def eval(self) -> None:
        """Do nothing, as in `train`."""

    def _steps(self) -> tuple[AccumulatedSteps, AccumulatedSteps]:
        roles, learners = self.engine.roles, self.engine.learners
        of_actor, of_critic = accumulation_from(self.args, with_text=self.learns_from_text)
        total = self.rlhf_engine.num_total_iters
        return (
            AccumulatedSteps(
                roles.actor,
                learners.actor,
                self.config.actor_optimizer,
                roles,
                size=of_actor,
                total_steps=total,
            ),
            AccumulatedSteps(
                roles.critic,
                learners.critic,
                self.config.critic_optimizer,
                roles,
                size=of_critic,
                total_steps=total,
            ),
        )

    def _answer(self, prompt_ids: list[list[int]], step: int | None) -> list[Answer]:
        """Draw an answer to each prompt of all processes."""
        roles = self.engine.roles
        seed = self.world.from_first(self._calls if step is None else step)
        self._calls = seed + 1
        messages: list[list[Message]] = [
            [{"role": "user", "content": roles.chat.decode(ids)}] for ids in prompt_ids
        ]
        self.engine.check_parity(messages)
        how = Sampling(
            temperature=self.config.sampling.temperature,
            max_new_tokens=self.max_answer_seq_len,
            stop_token_ids=roles.chat.stop_token_ids,
        )
        start = time.monotonic()
        seed += self.engine.setup.seed * 1_000_003
        answers = complete(prompt_ids, messages, roles.engine, roles.chat, how, seed=seed, world=self.world)
        self.generate_time = time.monotonic() - start
        return answers

    def _scored(self, answers: list[Answer]) -> dict[str, Tensor]:
        """Return what actor, reference, critic and reward model say of the answers, padded."""
        roles, temperature = self.engine.roles, self.config.sampling.temperature
        rollout = pack_rollout(answers)
        roles.expect_readable(rollout)
        rollout = rollout.to(roles.device)
        columns = {
            "logprobs": roles.actor_logprobs(rollout, temperature=temperature).logprobs_T,
            "ref_logprobs": roles.reference_logprobs(rollout, temperature=temperature),
            "value": roles.values(rollout),
        }
        scores = moved(roles.score(answers), torch.device("cpu"))
        prompts = [answer.prompt_ids for answer in answers]
        return padded(prompts, rollout, columns, self.engine.tokenizer.pad_token_id or 0) | {
            "rewards": scores,
            "scores": scores.clone(),
            "finished": rollout.finished_S.cpu(),
        }

    def _with_advantages(self, scored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add `token_rewards`, `advantages` (normalised over all rows) and `returns`, by the overridable methods."""
        prompts, action_mask = scored["prompts"], scored["attention_mask"][:, 1:]
        worth = replace_missing_end(scored["rewards"], scored["finished"], self.config.missing_end_penalty)
        rewards = self.compute_rewards(
            prompts, scored["logprobs"].clone(), scored["ref_logprobs"].clone(), worth, action_mask
        )
        expect_shape("compute_rewards", rewards, action_mask.shape)
        counts, start = is_action(prompts, action_mask), prompts.shape[1] - 1
        found = self.get_advantages_and_returns(
            scored["value"].masked_fill(~counts, 0.0), rewards.masked_fill(~counts, 0.0), start
        )
        columns = [torch.zeros(counts.shape) for _ in found]
        for column, part in zip(columns, found, strict=True):
            expect_shape("get_advantages_and_returns", part, counts[:, start:].shape)
            column[:, start:] = part
        advantages, returns = columns
        return scored | {
            "token_rewards": rewards,
            "advantages": normalise(advantages, counts),
            "returns": returns.masked_fill(~counts, 0.0),
        }

    def _packed(self, inputs: Batch) -> Experience:
        """Return the rows that the processes pass in, whichever of each dictionary they kept, rank by rank."""
        return packed(self.world.gather(own_part(inputs)))

    def _actor_loss(self, micro: Experience) -> SummedLoss:
        found = token_logprobs(self.engine.roles.actor, micro, temperature=self.config.sampling.temperature)
        assert micro.old_logprobs_T is not None
        columns = (found.logprobs_T, micro.old_logprobs_T, micro.advantages_T)
        return _summed(self.actor_loss_fn, micro, *columns)

    def _critic_loss(self, micro: Experience) -> SummedLoss:
        values_T = self.engine.roles.values_of(micro)
        return _summed(self.critic_loss_fn, micro, values_T, micro.old_values_T, micro.returns_T)

    def _print(self, own: dict[str, Tensor], step: int | None) -> None:
        """Print prompts and answers if `--print_answers` asks for it."""
        at = self._calls - 1 if step is None else step
        if not getattr(self.args, "print_answers", False) or at % self.args.print_answers_interval:
            return
        width = own["prompts"].shape[1]
        for ids in own["input_ids"]:
            prompt, answer = (
                self.tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:width], ids[width:])
            )
            say(f"step {at}, rank {self.world.rank}\nprompt: {prompt}\nanswer: {answer}")


class DeepSpeedPPOTrainerUnsupervised(DeepSpeedPPOTrainer):
    """With mixture training as a call of its own."""

    learns_from_text = True

    def train_unsupervised(self, inputs: Batch, unsup_coef: float) -> Tensor:
        """Add the loss of plain text to the actor's, times `unsup_coef`, and take the step if it is due.

        inputs: `input_ids` and `attention_mask`, [B, L], and `labels` if not all tokens are targets. Returns the
        loss per token.
        """
        names = [name for name in ("input_ids", "attention_mask", "labels") if name in inputs]
        texts = packed_texts(self.world.gather({name: inputs[name].cpu() for name in names}))
        actor = self.engine.roles.actor
        return self._actor_steps.add(texts, lambda micro: language_model_loss(actor, micro), unsup_coef)


def _summed(loss_fn: Callable[..., Any], micro: Experience, *columns_T: Tensor) -> SummedLoss:
    """Call a loss that is a mean over answer tokens, and return it as the sum that the gradient step adds up."""
    *columns, mask = answers_of(micro, *columns_T, torch.ones_like(micro.mask_T, dtype=torch.long))
    mean = loss_fn(*columns, mask)
    expect_shape(loss_fn.__name__, mean, ())
    count = micro.mask_T.sum()
    return SummedLoss(mean * count, count)


def expect_shape(name: str, found: Any, shape: tuple[int, ...]) -> None:
    """Raise ConfigError if an overridden method returned anything but a tensor of that shape."""
    if not isinstance(found, Tensor) or found.shape != shape:
        what = (
            f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        )
        raise ConfigError(
            f"{name} returned {what}",
            hint=f"return a tensor of shape {tuple(shape)}" if shape else "return one number, as a tensor",
        )
