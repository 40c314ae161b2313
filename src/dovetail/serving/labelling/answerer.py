"""Answer prompts with a checkpoint, so that people can compare the answers.

Responsible for: turning prompts into answers through a given `Complete`; scoring answers. Not responsible for: loading
(serving/inference/loading.py), the choice of prompts and the time (supply.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dovetail.engine.sampling import Sampling
from dovetail.engine.scheduler import Completion
from dovetail.model.load import expect_reward_head, load_scalar_model
from dovetail.model.placement import resolve_device, resolve_dtype
from dovetail.rlhf.rewards import Answer, RewardModelScorer, Scorer
from dovetail.rlhf.rollout import answer_of
from dovetail.serving.inference.loading import load_chat
from dovetail.text.chat_format import ChatFormat
from dovetail.text.message import Message
from dovetail.text.tokenizer import load_tokenizer
from dovetail.training.step import TokenBudget

_SCORED_TOKENS = 8192

Complete = Callable[
    [Sequence[Sequence[int]], Sampling, Sequence[int], Callable[[], bool]], Sequence[Completion]
]
"""A function that completes each prompt. The rest ends early once its last argument, `is_cancelled`, returns true."""


@dataclass(frozen=True, slots=True)
class ModelAnswerer:
    """A causal language model with its chat format."""

    name: str
    chat: ChatFormat
    complete: Complete
    context: Callable[[], int | None]
    """A function that returns the largest number of tokens of prompt and answer together, or None without a limit."""

    def answers(
        self,
        prompts: Sequence[Sequence[Message]],
        seeds: Sequence[int],
        sampling: Sampling,
        is_cancelled: Callable[[], bool],
    ) -> list[Answer | None]:
        """Answer each prompt, with None where the prompt and the longest answer exceed the context.

        The rest ends early once `is_cancelled` returns true; the result must not be used then.
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
    """Load a model by folder, .gguf file or hub name, with an engine of its own. Raises ModelError if that fails."""
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
    """Load a finished reward model, which reads answers in its own chat format. Raises ModelError if that fails."""
    expect_reward_head(path)
    where = resolve_device(device)
    model = load_scalar_model(
        path, dtype=resolve_dtype("auto", where), device=where, seed=0, pad_token_id=None
    )
    model.train(False)
    chat = ChatFormat(load_tokenizer(path))
    return RewardModelScorer(model, TokenBudget(_SCORED_TOKENS), where, chat)
