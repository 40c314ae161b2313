"""Tiny models as tasks see them, with answers that the test chooses or the model draws."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from dovetail.data.records import Prompt
from dovetail.engine.hybrid import HybridEngine
from dovetail.rlhf.rewards import Answer
from dovetail.rlhf.tasks import subject as subject_module
from dovetail.rlhf.tasks.subject import Subject
from dovetail.text.chat_format import ChatFormat
from dovetail.training.step import TokenBudget
from tests.fakes import byte_tokenizer, tiny_model


def subject(model: Any = None) -> Subject:
    """A tiny model as tasks see it."""
    chosen = tiny_model() if model is None else model
    return Subject(
        model=chosen,
        chat=ChatFormat(byte_tokenizer()),
        engine=HybridEngine(chosen),
        device=torch.device("cpu"),
        budget=TokenBudget(10_000),
    )


def say_instead(monkeypatch: pytest.MonkeyPatch, reply: Callable[[int, str], str]) -> list[Any]:
    """Let every model say `reply(index, question)`; returns the settings of the draws."""
    draws: list[Any] = []

    def complete(ids: Sequence[Any], prompts: Sequence[Any], *more: Any, **_: Any) -> list[Answer]:
        draws.append(more[2])
        return [
            Answer(
                messages=tuple(turns),
                text=reply(index, turns[-1]["content"]),
                prompt_ids=(1,),
                answer_ids=(2,),
                logprobs=(0.0,),
                finished=True,
            )
            for index, turns in enumerate(prompts)
        ]

    monkeypatch.setattr(subject_module, "complete", complete)
    return draws


def prompt(text: str, **row: Any) -> Prompt:
    """A prompt of one question, with the other columns of its row."""
    return replace(Prompt(messages=({"role": "user", "content": text},)), row=row, place="rows.jsonl line 3")
