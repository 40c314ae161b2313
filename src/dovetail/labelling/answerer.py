"""A checkpoint that answers prompts, for people to compare.

Responsible for: prompts in, answers out, by whatever completes them; scoring answers. Not responsible for: loading
(inference/loading.py), which prompts and when (supply.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dovetail.engine.answers import Completion
from dovetail.engine.sampling import Sampling
from dovetail.inference.loading import load_chat
from dovetail.model.load import expect_reward_head, load_scalar_model
from dovetail.rlhf.rewards import Answer, RewardModelScorer, Scorer
from dovetail.rlhf.rollout import answer_of
from dovetail.text.chat_format import ChatFormat
from dovetail.text.message import Message
from dovetail.text.tokenizer import load_tokenizer
from dovetail.training.memory import TokenBudget
from dovetail.training.placement import resolve_device, resolve_dtype

_SCORED_TOKENS = 8192

Complete = Callable[
    [Sequence[Sequence[int]], Sampling, Sequence[int], Callable[[], bool]], Sequence[Completion]
]
"""complete(prompt_ids, sampling, seeds, is_cancelled): a completion of each; cancelled, the rest ends early."""


@dataclass(frozen=True, slots=True)
class ModelAnswerer:
    """A causal language model with its chat format."""

    name: str
    chat: ChatFormat
    complete: Complete
    context: Callable[[], int | None]
    """The most tokens of prompt and answer together; None: no limit."""

    def answers(
        self,
        prompts: Sequence[Sequence[Message]],
        seeds: Sequence[int],
        sampling: Sampling,
        is_cancelled: Callable[[], bool],
    ) -> list[Answer | None]:
        """An answer to each prompt, None where prompt and longest answer outgrow the context.

        Once `is_cancelled` says so the rest ends early, and what is returned is not to be used.
        """
        prompt_ids, context = self.chat.encode_prompts(prompts), self.context()
        fitting = [
            i
            for i, ids in enumerate(prompt_ids)
            if context is None or len(ids) + sampling.max_new_tokens <= context
        ]
        completions = self.complete(
            [prompt_ids[i] for i in fitting],
            replace(sampling, stop_token_ids=self.chat.stop_token_ids),
            [seeds[i] for i in fitting],
            is_cancelled,
        )
        found: list[Answer | None] = [None] * len(prompts)
        for i, completion in zip(fitting, completions, strict=True):
            found[i] = answer_of(prompts[i], prompt_ids[i], completion, self.chat)
        return found


def load_answerer(path: str, *, device: str) -> ModelAnswerer:
    """A model by folder, .gguf file or hub name, in a place of its own. Raises ModelError if it cannot be loaded."""
    loaded = load_chat(path, device=device)
    engine = loaded.engine()

    def complete(
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        is_cancelled: Callable[[], bool],
    ) -> list[Completion]:
        with engine.generating() as generate:
            return generate(prompt_ids, sampling, seeds=seeds, on_token=lambda *_: is_cancelled())

    return ModelAnswerer(path, loaded.chat, complete, lambda: loaded.context)


def reward_scorer(path: str, *, device: str) -> Scorer:
    """A finished reward model, which reads answers as text in its own chat format. Raises ModelError."""
    expect_reward_head(path)
    where = resolve_device(device)
    model = load_scalar_model(
        path, dtype=resolve_dtype("auto", where), device=where, seed=0, pad_token_id=None
    )
    model.train(False)
    chat = ChatFormat(load_tokenizer(path))
    return RewardModelScorer(model, TokenBudget(_SCORED_TOKENS), where, chat)
