"""DeepSpeed-Chat's PPO trainer: the two calls of its loop, and mixture training.

Responsible for: `DeepSpeedPPOTrainer` and `DeepSpeedPPOTrainerUnsupervised`.
Not responsible for: what is learnt (objective.py), sampling and scoring (rlhf/), the padded layout (padding.py),
optimiser steps (accumulation.py).

Shapes: B sequences, L padded tokens, W longest answer, S sequences of a micro-batch, T packed tokens.
"""

import time
from argparse import Namespace

import torch
from torch import Tensor

from dovetail.batches import Experience, SummedLoss, moved
from dovetail.data.records import Message
from dovetail.engine.sampling import Sampling
from dovetail.errors import ConfigError
from dovetail.model.forward import language_model_loss, token_logprobs
from dovetail.rlhf.compat.accumulation import AccumulatedSteps
from dovetail.rlhf.compat.flags import accumulation_from
from dovetail.rlhf.compat.models import DeepSpeedRLHFEngine, expect_no_overrides
from dovetail.rlhf.compat.objective import Objective, summed
from dovetail.rlhf.compat.padding import (
    Batch,
    own_part,
    packed,
    packed_texts,
    padded,
    unpadded,
)
from dovetail.rlhf.rewards import Answer
from dovetail.rlhf.rollout import complete, pack_rollout
from dovetail.telemetry.log import say

_NOT_CALLED = (
    "_generate_sequence",
    "_validate_training_mode",
    "_validate_evaluation_mode",
    "dump_model_norms",
)


class DeepSpeedPPOTrainer(Objective):
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
        self.config = self.engine.config
        super().__init__(self.config)
        self.max_answer_seq_len = self.config.sampling.max_new_tokens
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

        `rewards` are the scores as the reward model gave them. Training uses `advantages` and `returns`,
        computed over the rows of all processes, so that it does not matter which rows `train_rlhf` is given together.
        """
        if not isinstance(prompts, Tensor):
            batch: Batch = prompts
            prompts, mask = batch["prompt"], batch.get("prompt_att_mask")
        shares = self.world.gather(unpadded(prompts, mask, self.engine.tokenizer.pad_token_id))
        answers = self._answer([ids for share in shares for ids in share], step)
        experience = self.with_advantages(self._scored(answers))
        start = sum(len(share) for share in shares[: self.world.rank])
        own = {name: rows[start : start + len(prompts)] for name, rows in experience.items()}
        self._print(own, step)
        return {name: rows.to(prompts.device) for name, rows in own.items()}

    def train_rlhf(self, inputs: Batch) -> tuple[Tensor, Tensor]:
        """Add the losses of these rows, take the steps of actor and critic that are due, and return the two losses.

        The rows of all processes count as one batch.
        """
        experience = self._packed(inputs)
        actor = self._actor_steps.add(experience, self._actor_loss)
        critic = self._critic_steps.add(experience, self._critic_loss)
        return actor, critic

    def get_overflow(self) -> tuple[bool, bool]:
        """Return whether the last step of actor and critic was skipped because its gradient was not finite."""
        return self._actor_steps.overflowed, self._critic_steps.overflowed

    def train(self) -> None:
        """Do nothing: generation and training are modes of the same weights, entered where needed."""

    def eval(self) -> None:
        """Do nothing, as in `train`."""

    def _steps(self) -> tuple[AccumulatedSteps, AccumulatedSteps]:
        roles, learners, of_the_critic = self.engine.roles, self.engine.learners, self.engine.learners.critic
        assert of_the_critic is not None
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
                roles.held_critic,
                of_the_critic,
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
        """Return the numbers of actor, reference, critic and reward model for the answers, padded."""
        roles, temperature = self.engine.roles, self.config.sampling.temperature
        rollout = pack_rollout(answers)
        roles.expect_readable(rollout)
        rollout = rollout.to(roles.device)
        columns = {
            "logprobs": roles.actor_logprobs(rollout, temperature=temperature).logprobs_T,
            "ref_logprobs": roles.reference_logprobs(rollout, temperature=temperature),
            "value": roles.values(rollout),
        }
        scores = moved(roles.score(answers).scores_S, torch.device("cpu"))
        prompts = [answer.prompt_ids for answer in answers]
        return padded(prompts, rollout, columns, self.engine.tokenizer.pad_token_id or 0) | {
            "rewards": scores,
            "scores": scores.clone(),
            "finished": rollout.finished_S.cpu(),
        }

    def _packed(self, inputs: Batch) -> Experience:
        """Return the rows that all processes pass in, rank by rank; each may pass in only some of its rows."""
        return packed(self.world.gather(own_part(inputs)))

    def _actor_loss(self, micro: Experience) -> SummedLoss:
        found = token_logprobs(self.engine.roles.actor, micro, temperature=self.config.sampling.temperature)
        assert micro.old_logprobs_T is not None
        columns = (found.logprobs_T, micro.old_logprobs_T, micro.advantages_T)
        return summed(self.actor_loss_fn, micro, *columns)

    def _critic_loss(self, micro: Experience) -> SummedLoss:
        values_T = self.engine.roles.values_of(micro)
        assert micro.old_values_T is not None
        assert micro.returns_T is not None
        return summed(self.critic_loss_fn, micro, values_T, micro.old_values_T, micro.returns_T)

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
    """The trainer with mixture training as a call of its own."""

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
