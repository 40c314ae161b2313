"""A checkpoint that answers prompts, for people to compare.

Responsible for: loading it, and drawing answers with the project's own engine. Not responsible for: which
prompts and when (supply.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from dovetail.engine.hybrid import HybridEngine
from dovetail.engine.modules import context_of
from dovetail.engine.sampling import Sampling
from dovetail.model.load import expect_rows_for, load_causal_lm, load_scalar_model
from dovetail.rlhf.rewards import Answer, RewardModelScorer, Scorer
from dovetail.rlhf.rollout import answer_of
from dovetail.text.chat_format import ChatFormat
from dovetail.text.message import Message
from dovetail.text.tokenizer import load_tokenizer
from dovetail.training.memory import TokenBudget
from dovetail.training.placement import resolve_device, resolve_dtype

_SCORED_TOKENS = 8192


class ModelAnswerer:
    """A causal language model with its chat format."""

    def __init__(self, path: str, *, device: str) -> None:
        """Raises ModelError if it cannot be loaded."""
        where = resolve_device(device)
        tokenizer = load_tokenizer(path)
        model = load_causal_lm(path, dtype=resolve_dtype("auto", where), device=where)
        expect_rows_for(tokenizer, model, path)
        self.name = path
        self._chat = ChatFormat(tokenizer)
        self._context = context_of(model)
        self._engine = HybridEngine(model, device=where)

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
        prompt_ids = self._chat.encode_prompts(prompts)
        fitting = [i for i, ids in enumerate(prompt_ids) if self._fits(ids, sampling)]
        with self._engine.generating() as generate:
            completions = generate(
                [prompt_ids[i] for i in fitting],
                replace(sampling, stop_token_ids=self._chat.stop_token_ids),
                seeds=[seeds[i] for i in fitting],
                on_token=lambda *_: is_cancelled(),
                decode_text=self._chat.decode,
            )
        found: list[Answer | None] = [None] * len(prompts)
        for i, completion in zip(fitting, completions, strict=True):
            found[i] = answer_of(prompts[i], prompt_ids[i], completion, self._chat)
        return found

    def _fits(self, ids: Sequence[int], sampling: Sampling) -> bool:
        return self._context is None or len(ids) + sampling.max_new_tokens <= self._context


def reward_scorer(path: str, *, device: str) -> Scorer:
    """A finished reward model, which reads answers as text in its own chat format. Raises ModelError."""
    where = resolve_device(device)
    model = load_scalar_model(
        path, dtype=resolve_dtype("auto", where), device=where, seed=0, pad_token_id=None
    )
    model.train(False)
    chat = ChatFormat(load_tokenizer(path))
    return RewardModelScorer(model, TokenBudget(_SCORED_TOKENS), where, chat)
