"""The peer of ppo_step.py: TRL's PPOTrainer on the same models, prompts and lengths.

TRL's own code does all the work. It pads every answer to the longest, which is how long its generate runs; so that
lengths are those of our run, each answer's end token is put where it has to be once generation is done. No random
draw of the end or padding token ends an answer early. Phases are timed by wrapping two of TRL's functions.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import shapes
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from datasets import Dataset, disable_progress_bars
from trl.experimental.ppo import PPOConfig, ppo_trainer

PAD, END, FIRST_WORD = 1, 2, 3


def step_seconds(
    model: str,
    reward: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    prompt: int,
    lengths: Sequence[int],
    micro: int,
    steps: int,
) -> list[dict[str, float]]:
    """Seconds of the phases of each step. micro: sequences of one forward and backward pass."""
    disable_progress_bars()
    batch, longest = len(lengths), max(lengths)
    actor, reference = (shapes.causal_lm(model, device, dtype) for _ in range(2))
    critic, scorer = (shapes.scalar_model(reward, device, dtype) for _ in range(2))
    vocabulary = actor.config.vocab_size
    rows = [row for step in range(steps) for row in shapes.prompts_of(batch, prompt, vocabulary, seed=step)]
    watch = Stopwatch(device)
    with tempfile.TemporaryDirectory() as folder, timed(watch, lengths):
        config = PPOConfig(
            output_dir=folder, report_to="none", disable_tqdm=True, save_strategy="no", eval_strategy="no",
            logging_strategy="no", per_device_train_batch_size=micro,
            gradient_accumulation_steps=batch // micro, num_mini_batches=1, num_ppo_epochs=1,
            total_episodes=batch * steps, local_rollout_forward_batch_size=batch, response_length=longest,
            temperature=1.0, stop_token=None, num_sample_generations=0, gradient_checkpointing=False, bf16=False,
            learning_rate=1e-6, use_cpu=device.type == "cpu", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = ppo_trainer.PPOTrainer(
            args=config, processing_class=tokenizer(vocabulary), model=actor,
            ref_model=reference.requires_grad_(False), reward_model=scorer.requires_grad_(False),
            value_model=critic, train_dataset=Dataset.from_dict({"input_ids": rows}), callbacks=[watch],
        )  # fmt: skip
        # After the trainer is made: it cuts answers at the end token, but its generate does not look for one.
        trainer.stop_token_id = END
        trainer.remove_callback(ppo_trainer.PrinterCallback)
        trainer.train()
    assert len(watch.rows) == steps
    return watch.rows


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Seconds of generation, scoring and learning of every step."""

    def __init__(self, device: torch.device) -> None:
        self.rows: list[dict[str, float]] = []
        self._device = device
        self._marks: dict[str, float] = {}

    def mark(self, name: str) -> None:
        self._marks.setdefault(name, shapes.now(self._device))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        end, marks = shapes.now(self._device), self._marks
        self.rows.append({
            "generate": marks["generated"] - marks["start"], "score": marks["scored"] - marks["generated"],
            "train": end - marks["scored"], "seconds": end - marks["start"],
        })  # fmt: skip
        self._marks = {}


@contextmanager
def timed(watch: Stopwatch, lengths: Sequence[int]) -> Iterator[None]:
    """Wrap TRL's generation, for times and lengths, and its forward, whose first call on actor and critic together
    begins the training."""
    generation, forward = ppo_trainer.batch_generation, ppo_trainer.forward

    def timed_generation(model: Any, queries: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        watch.mark("start")
        found, logits = generation(model, queries, *rest)
        watch.mark("generated")
        return with_ends(found, queries.shape[1], lengths), logits

    def timed_forward(model: Any, *rest: Any, **named: Any) -> Any:
        if hasattr(model, "critic_backbone"):
            watch.mark("scored")
        return forward(model, *rest, **named)

    ppo_trainer.batch_generation, ppo_trainer.forward = timed_generation, timed_forward
    try:
        yield
    finally:
        ppo_trainer.batch_generation, ppo_trainer.forward = generation, forward


def with_ends(ids: Tensor, prompt: int, lengths: Sequence[int]) -> Tensor:
    """The answers with one end token each, as their last."""
    assert ids.shape == (len(lengths), prompt + max(lengths)), ids.shape
    answers = ids[:, prompt:].clamp(min=FIRST_WORD)
    lasts = torch.tensor(lengths, device=ids.device)[:, None] - 1
    places = torch.arange(answers.shape[1], device=ids.device)
    answers = answers.scatter(1, lasts, END).masked_fill(places > lasts, PAD)
    return torch.cat([ids[:, :prompt], answers], dim=1)


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Words w3, w4, ...: the trainer wants a tokenizer, though no text is read."""
    words = {"<unk>": 0, "<pad>": PAD, "</s>": END} | {f"w{i}": i for i in range(FIRST_WORD, vocabulary)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", padding_side="left"
    )
