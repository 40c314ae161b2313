"""Where Python asks for numbers of a tensor, which on a GPU is to wait for it.

Counted on the CPU: every reading of a number, and every operation whose result has a shape that only the numbers
know. tests/gpu asks the driver itself.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dovetail.model.forward import language_model_loss
from dovetail.rlhf.api import PPOTrainer
from dovetail.rlhf.rollout import score_answers
from dovetail.training.step import Term, TokenBudget, gradient_step
from tests.rlhf.tiny import PROMPTS, tiny_config, tiny_engine

_SHAPED_BY_NUMBERS = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
ON_A_CPU = "_update"
"""torch's own AdamW, which looks at the scale first; on a GPU a kernel takes it from memory (tests/gpu)."""
_READS = {"_local_scalar_dense", "equal", "is_nonzero"}


class _Watch(TorchDispatchMode):
    """Notes the functions of ours that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        by_mask = name.startswith("index") and any(_is_mask(x) for x in _flat(args[1:2]))
        counts = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in _READS | _SHAPED_BY_NUMBERS or by_mask or counts:
            self.note()
        return func(*args, **kwargs)

    def note(self) -> None:
        frame = sys._getframe(1)
        while frame is not None and "dovetail" not in frame.f_globals.get("__name__", ""):
            frame = frame.f_back
        assert frame is not None
        self.seen.append(frame.f_code.co_name)


def _is_mask(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.bool


def _flat(x: Any) -> list[Any]:
    return [leaf for part in x for leaf in _flat(part)] if isinstance(x, list | tuple) else [x]


@contextmanager
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    watch = _Watch()
    with monkeypatch.context() as patch:
        for name in ("tolist", "cpu", "numpy"):
            honest = getattr(Tensor, name)

            def noted(self: Tensor, *args: Any, honest: Any = honest, **kwargs: Any) -> Any:
                watch.note()
                return honest(self, *args, **kwargs)

            patch.setattr(Tensor, name, noted)
        with watch:
            yield watch.seen


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 60])
@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (2, 3)])
def test_a_ppo_step_waits_once_for_its_statistics_and_once_for_each_gradient_step(
    epochs: int, minibatches: int, micro_batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(
        ppo_epochs=epochs, minibatches=minibatches, micro_batch_tokens=micro_batch_tokens, whiten_rewards=True
    )
    trainer = PPOTrainer(tiny_engine("llama", config))
    engine = trainer.engine
    trainer.update(trainer.generate_experience(PROMPTS))
    answers = engine.generate(PROMPTS, seed=1)
    with watching(monkeypatch) as seen:
        collected = score_answers(
            answers,
            engine.roles,
            config,
            kl_coefficient=0.1,
            with_old_logprobs=config.needs_old_logprobs(),
        )
    # Neighbours that share a prompt, and the highest token id, are looked up on the host, before the batch moves.
    assert seen == ["share_prompts", "expect_readable", "rollout_stats"]
    with watching(monkeypatch) as seen:
        trainer.update(collected)
    waits = [name for name in seen if name not in ("minibatches", ON_A_CPU)]
    assert waits == ["_on_host"] * (2 * epochs * minibatches)
    assert seen.count("minibatches") == (
        epochs if minibatches > 1 else 0
    )  # the order of answers, on the host


def test_a_supervised_step_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    batch = engine.pack(engine.generate(PROMPTS, seed=1))
    loss_of = lambda micro: language_model_loss(engine.roles.actor, micro)  # noqa: E731

    def step() -> None:
        gradient_step(
            engine.roles.actor,
            engine.learners.actor,
            [Term(batch, loss_of)],
            max_grad_norm=1.0,
            budget=TokenBudget(60),
            device=torch.device("cpu"),
            learning_rate=1e-3,
        )

    step()
    with watching(monkeypatch) as seen:
        step()
    assert [name for name in seen if name != ON_A_CPU] == ["_on_host"]
