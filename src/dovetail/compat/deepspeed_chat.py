"""DeepSpeed-Chat's names over our engine: its training loop runs with only the import line changed.

Responsible for: `DeepSpeedRLHFEngine`, `DeepSpeedPPOTrainer`, `DeepSpeedPPOTrainerUnsupervised`, `MiniDataset` and
`moving_average` as the predecessor's `main.py` calls them, with its padded dictionaries at the border.
Not responsible for: anything of its own: sampling, scoring and steps are rlhf/'s. Of `args`, what has a meaning here
is read (learning rates, lengths, epochs, LoRA, dtype, seed, EMA, checkpointing); ZeRO and offload flags have none on
one device.

Shapes: B sequences, L padded tokens, T packed tokens, S sequences.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dovetail.batches import Experience, pack
from dovetail.config.model import LoraConfig
from dovetail.config.stages import OptimizerConfig, PpoConfig, SamplingConfig
from dovetail.data.records import Message
from dovetail.engine.sampling import Sampling
from dovetail.errors import ConfigError
from dovetail.rlhf.api import RLHFEngine
from dovetail.rlhf.build import Setup
from dovetail.rlhf.rewards import Answer
from dovetail.rlhf.rollout import complete, score_answers
from dovetail.rlhf.update import actor_step, critic_step, language_model_loss, rate_at
from dovetail.training.ema import Ema
from dovetail.training.step import Term, gradient_step

Batch = Mapping[str, Tensor]
"""The predecessor's exchange format: tensors whose first dimension is the batch."""

_SCHEDULES: dict[str, Literal["cosine", "linear", "constant"]] = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}

_COLUMNS = {
    "logprobs": "old_logprobs_T",
    "ref_logprobs": "reference_logprobs_T",
    "value": "old_values_T",
    "token_rewards": "rewards_T",
    "advantages": "advantages_T",
    "returns": "returns_T",
}
"""Keys of the padded dictionary that have a number a token, and what an `Experience` calls them."""


class DeepSpeedRLHFEngine:
    """Actor, reference, critic and reward by the predecessor's names."""

    def __init__(
        self,
        actor_model_name_or_path: Any,
        critic_model_name_or_path: Any,
        tokenizer: PreTrainedTokenizerBase,
        args: Namespace,
        num_total_iters: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.args = args
        self.engine = RLHFEngine(
            actor_model=actor_model_name_or_path,
            critic_model=critic_model_name_or_path,
            tokenizer=tokenizer,
            total_steps=num_total_iters,
            config=config_from(args),
            setup=setup_from(args),
        )
        roles = self.engine.roles
        self.actor, self.critic, self.ref = roles.actor, roles.critic, roles.reference
        self.actor_ema: Ema | None = self.engine.learners.ema if getattr(args, "enable_ema", False) else None


class DeepSpeedPPOTrainer:
    """`generate_experience` and `train_rlhf` over padded dictionaries."""

    def __init__(self, engine: DeepSpeedRLHFEngine, args: Namespace) -> None:
        self.rlhf_engine = engine
        self.engine = engine.engine
        self.args = args
        self.config = self.engine.config
        self._iteration = 0

    def generate_experience(
        self, prompts: Tensor | Batch, mask: Tensor | None = None, step: int | None = None
    ) -> dict[str, Tensor]:
        """Answer padded prompts [B, L] and score the answers; every value of the result has B rows.

        prompts: ids, or a batch with `prompt` and `prompt_att_mask`. mask: 1 = a real token; without one, tokens
        equal to the pad token at the left are padding. step: seeds the sampling; by default calls are counted.

        `rewards` are the scores as the reward model gave them. What is learned from are `advantages` and `returns`,
        taken over all B rows, so that they do not depend on which rows `train_rlhf` is given together.
        """
        if not isinstance(prompts, Tensor):
            batch: Batch = prompts
            prompts, mask = batch["prompt"], batch.get("prompt_att_mask")
        seed = self._iteration if step is None else step
        self._iteration = seed + 1
        prompt_ids = self._unpadded(prompts, mask)
        roles = self.engine.roles
        messages: list[list[Message]] = [
            [{"role": "user", "content": roles.chat.decode(ids)}] for ids in prompt_ids
        ]
        self.engine.check_parity(messages)
        how = Sampling(
            temperature=self.config.sampling.temperature,
            max_new_tokens=self.config.sampling.max_new_tokens,
            stop_token_ids=roles.chat.stop_token_ids,
        )
        seed += self.engine.setup.seed * 1_000_003
        answers = complete(prompt_ids, messages, roles.engine, roles.chat, how, seed=seed)
        collected = score_answers(
            answers,
            roles,
            self.config,
            kl_coefficient=self.config.kl_coefficient,
            with_old_logprobs=True,
        )
        assert collected.experience.old_logprobs_T is not None
        return self._padded(answers, collected.experience)

    def train_rlhf(self, inputs: Batch) -> tuple[Tensor, Tensor]:
        """One optimiser step of actor and critic; returns the two losses."""
        experience = self._packed(inputs)
        roles, learners = self.engine.roles, self.engine.learners
        actor = actor_step(experience, None, roles, learners, self.config)
        critic = critic_step(experience, roles, learners, self.config)
        return torch.tensor(actor.loss), torch.tensor(critic.loss)

    def train(self) -> None:
        """Nothing to switch: generation and training are modes of the same weights, entered where needed."""

    def eval(self) -> None:
        """Nothing to switch, as in `train`."""

    def _unpadded(self, prompts: Tensor, mask: Tensor | None) -> list[list[int]]:
        pad = self.engine.tokenizer.pad_token_id
        rows = []
        for i, row in enumerate(prompts.tolist()):
            if mask is not None:
                rows.append([token for token, real in zip(row, mask[i].tolist(), strict=True) if real])
                continue
            start = next((k for k, token in enumerate(row) if token != pad), len(row))
            rows.append(row[start:])
        return rows

    def _padded(self, answers: list[Answer], experience: Experience) -> dict[str, Tensor]:
        """Prompts padded on the left, answers on the right, as the predecessor lays them out."""
        pad = self.engine.tokenizer.pad_token_id or 0
        width_prompt = max(len(a.prompt_ids) for a in answers)
        width = width_prompt + max(len(a.answer_ids) for a in answers)
        input_ids = torch.full((len(answers), width), pad)
        mask = torch.zeros((len(answers), width), dtype=torch.long)
        columns: dict[str, Tensor] = {name: getattr(experience, column) for name, column in _COLUMNS.items()}
        padded = {name: torch.zeros(len(answers), width - 1) for name in columns}
        start = 0
        for i, (answer, length) in enumerate(zip(answers, experience.lengths, strict=True)):
            at = slice(width_prompt - len(answer.prompt_ids), width_prompt - len(answer.prompt_ids) + length)
            input_ids[i, at] = experience.token_ids_T[start : start + length].cpu()
            mask[i, at] = 1
            for name, column_T in columns.items():
                padded[name][i, max(at.start - 1, 0) : at.stop - 1] = column_T[
                    start + (at.start == 0) : start + length
                ].cpu()
            start += length
        return {
            "prompts": input_ids[:, :width_prompt],
            **padded,
            "rewards": experience.scores_S.cpu(),
            "input_ids": input_ids,
            "attention_mask": mask,
            "finished": experience.finished_S.cpu(),
        }

    def _packed(self, inputs: Batch) -> Experience:
        """Back from the padded dictionary, whichever rows of it the caller kept."""
        width_prompt = inputs["prompts"].shape[1]
        real = inputs["attention_mask"].bool()
        is_answer = real & (torch.arange(real.shape[1]) >= width_prompt)
        rows = [ids[keep].tolist() for ids, keep in zip(inputs["input_ids"], real, strict=True)]
        packed = pack(rows, [answer[keep].tolist() for answer, keep in zip(is_answer, real, strict=True)])

        def column_T(name: str) -> Tensor:
            aligned = torch.nn.functional.pad(inputs[name], (1, 0))[real]
            return aligned.masked_fill(~packed.mask_T, 0.0)

        columns: dict[str, Any] = {field.name: getattr(packed, field.name) for field in fields(packed)}
        columns |= {column: column_T(name) for name, column in _COLUMNS.items()}
        return Experience(
            **columns,
            sampled_logprobs_T=torch.zeros(packed.num_tokens),
            scores_S=inputs["rewards"],
            finished_S=inputs["finished"],
        ).to(self.engine.roles.device)


class DeepSpeedPPOTrainerUnsupervised(DeepSpeedPPOTrainer):
    """With mixture training as a call of its own."""

    def train_unsupervised(self, inputs: Batch, unsup_coef: float) -> Tensor:
        """One optimiser step of the actor on plain text: `input_ids` and `attention_mask`, [B, L].

        A step of its own, because the predecessor's loop calls it so; `update(next_texts=...)` joins both losses in
        one step.
        """
        real = inputs["attention_mask"].bool()
        rows = [ids[keep].tolist() for ids, keep in zip(inputs["input_ids"], real, strict=True)]
        texts = pack(rows, [[True] * len(ids) for ids in rows])
        roles, learners = self.engine.roles, self.engine.learners
        report = gradient_step(
            roles.actor,
            learners.actor,
            [Term(texts, lambda micro: language_model_loss(roles.actor, micro), unsup_coef, name="ptx")],
            max_grad_norm=self.config.actor_optimizer.max_grad_norm,
            budget=roles.budget,
            learning_rate=rate_at(learners, self.config.actor_optimizer, learners.actor_step),
            device=roles.device,
        )
        return torch.tensor(report.losses["ptx"])


class MiniDataset:
    """Collects batches and deals them out in smaller ones."""

    def __init__(self, max_size: int, small_batch_size: int) -> None:
        self.dataset: list[Any] = []
        self.max_size = max_size
        self.small_batch_size = small_batch_size

    def add(self, data: Any) -> list[Any] | None:
        """Keep `data`; when `max_size` batches are there, return them all in small ones and start anew."""
        if len(self.dataset) >= self.max_size:
            raise ValueError("the collection is full: use what `add` returned before adding more")
        self.dataset.append(data)
        if len(self.dataset) < self.max_size:
            return None
        small, size = [], self.small_batch_size
        for large in self.dataset:
            if isinstance(large, Mapping):
                length = len(next(iter(large.values())))
                small += [{k: v[i : i + size] for k, v in large.items()} for i in range(0, length, size)]
            else:
                small += [large[i : i + size] for i in range(0, len(large), size)]
        self.free()
        return small

    def free(self) -> None:
        """Forget what was collected."""
        self.dataset = []


def moving_average(
    model: Any, model_ema: Ema, beta: float = 0.992, device: Any = None, zero_stage: int = 0
) -> None:
    """Update the float32 average of the actor. `model` and `device` are where they have been since the start."""
    model_ema.decay = beta
    model_ema.update()


def config_from(args: Namespace) -> PpoConfig:
    """The predecessor's flags as our settings; a flag that is not there keeps our default."""
    given = vars(args)
    schedule = str(
        getattr(given.get("lr_scheduler_type", "cosine"), "value", given.get("lr_scheduler_type", "cosine"))
    )
    if schedule not in _SCHEDULES:
        raise ConfigError(
            f"lr_scheduler_type = {schedule!r} has no counterpart here",
            hint=f"use one of {', '.join(_SCHEDULES)}",
        )

    def optimizer(role: str, rate: float) -> OptimizerConfig:
        lora_rate = given.get(f"{role}_lora_learning_rate") if given.get(f"{role}_lora_dim") else None
        return OptimizerConfig(
            learning_rate=lora_rate or given.get(f"{role}_learning_rate", rate),
            weight_decay=given.get(f"{role}_weight_decay", 0.0),
            schedule=_SCHEDULES[schedule],
            warmup_steps=given.get("num_warmup_steps", 0),
        )

    return PpoConfig(
        sampling=SamplingConfig(max_new_tokens=given.get("max_answer_seq_len", 256)),
        actor_optimizer=optimizer("actor", 9.65e-6),
        critic_optimizer=optimizer("critic", 5e-6),
        ppo_epochs=given.get("ppo_epochs", 1),
        activation_checkpointing=bool(given.get("actor_gradient_checkpointing", False)) or "auto",
        kl_coefficient=0.1,
        old_logprobs="training",
        importance_cap=None,  # the exchange format has one log-probability per token
        critic_warmup_rollouts=0,
    )


def setup_from(args: Namespace) -> Setup:
    """Device, precision, seed and adapters from the predecessor's flags."""
    given = vars(args)

    def lora(role: str) -> LoraConfig | None:
        rank = given.get(f"{role}_lora_dim", 0)
        # The predecessor scales its adapters by 1 / rank.
        return LoraConfig(rank=rank, alpha=1.0) if rank else None

    return Setup(
        precision=given.get("dtype", "auto"),
        seed=given.get("seed") or 0,
        actor_lora=lora("actor"),
        critic_lora=lora("critic"),
    )
