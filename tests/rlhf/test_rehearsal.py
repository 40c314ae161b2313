"""PPO's rehearsal: each phase at its largest, nothing changed, and memory that ends in a phase is survived."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dovetail.config.policy import METHODS, PolicyConfig
from dovetail.errors import GenerationError, TrainingStopped
from dovetail.model.forward import plain_model
from dovetail.rlhf.algorithms.named import algorithm_named
from dovetail.rlhf.api import PPOTrainer, RLHFEngine, prompt_of
from dovetail.rlhf.build import Setup
from dovetail.rlhf.rehearsal import longest_prompts, longest_rollout, rehearse_ppo
from tests.rlhf.tiny import PROMPTS, tiny_config, tiny_engine

ASKED = [prompt_of(text) for text in PROMPTS]


class Roomy:
    """A device with more memory than is ever held."""

    def begin(self) -> None: ...

    def peak(self) -> int:
        return 1

    def limit(self) -> int:
        return 2**40


def tensors_of(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors_of(value)]
    return []


@pytest.mark.parametrize("changes", [{}, {"minibatches": 3, "ppo_epochs": 2}, {"critic_warmup_rollouts": 2}])
def test_a_step_is_the_same_to_the_bit_after_a_rehearsal(changes: dict[str, Any]) -> None:
    found = []
    for rehearses in (False, True):
        torch.manual_seed(11)
        engine = tiny_engine("llama", tiny_config(micro_batch_tokens=128, **changes), total_steps=40)
        trainer = PPOTrainer(engine)
        if rehearses:
            before = copy.deepcopy(trainer.state_dict())
            engine.check_parity(ASKED)
            rehearse_ppo(engine, ASKED, Roomy())
            for one, other in zip(tensors_of(before), tensors_of(trainer.state_dict()), strict=True):
                assert torch.equal(one, other)
        collected = trainer.generate_experience(ASKED)
        trainer.update(collected)
        found.append((collected.stats, tensors_of(trainer.state_dict()), torch.get_rng_state()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("name", METHODS)
def test_methods_without_a_critic_are_rehearsed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(batch_size=9)
    engine = RLHFEngine(
        actor_model=tiny_engine().roles.actor,
        critic_model=None,
        tokenizer=tiny_engine().tokenizer,
        total_steps=5,
        config=config,
        reward=lambda answers: [0.0] * len(answers),
        setup=Setup(device="cpu"),
        algorithm=algorithm_named(name, PolicyConfig(answers_per_prompt=3), config),
    )
    rehearse_ppo(engine, ASKED, Roomy())
    said = capsys.readouterr().err
    assert "ppo: generating peaks at" in said
    assert "ppo: learning peaks at" in said


def limited(model: Any, limit: int, *, in_training: bool | None = None) -> Callable[[], None]:
    """Let forwards of more tokens fail as a GPU does whose memory ends; returns what lifts the limit."""
    layer = plain_model(model).get_input_embeddings()

    def fail(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        tokens = arguments[0].numel()
        if tokens > limit and in_training in (None, torch.is_grad_enabled()):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    handle: Any = layer.register_forward_pre_hook(fail)
    return handle.remove  # type: ignore[no-any-return]


@pytest.mark.parametrize("phase", ["generate", "score", "train the actor", "train the critic"])
def test_memory_that_ends_in_a_phase_halves_what_is_done_at_once_and_goes_on(
    phase: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tiny_engine("llama", tiny_config(micro_batch_tokens=512))
    engine.check_parity(ASKED)
    roles = engine.roles
    match phase:
        case "generate":
            limited(roles.actor, 60, in_training=False)
        case "score":
            limited(roles.reference, 150)
        case "train the actor":
            limited(roles.actor, 150, in_training=True)
        case _:
            limited(roles.critic, 150, in_training=True)
    rehearse_ppo(engine, ASKED, Roomy())
    said = capsys.readouterr().err
    assert "out of memory" in said
    assert "halved from" in said
    trainer = PPOTrainer(engine)
    trainer.update(trainer.generate_experience(ASKED))
    assert "out of memory" not in capsys.readouterr().err  # the rehearsal has found what fits


def test_answers_do_not_depend_on_a_smaller_cache() -> None:
    whole, tight = tiny_engine("llama"), tiny_engine("llama")
    asked = [f"{text} {'again ' * 12}" for text in PROMPTS]
    expected = whole.generate(asked, seed=5)
    lift = limited(tight.roles.actor, 150, in_training=False)
    found = tight.generate(asked, seed=5)
    lift()
    assert [answer.answer_ids for answer in found] == [answer.answer_ids for answer in expected]


def test_what_does_not_fit_alone_is_refused_before_the_run() -> None:
    engine = tiny_engine("llama", tiny_config(micro_batch_tokens=512))
    engine.check_parity(ASKED)
    lift = limited(engine.roles.actor, 0, in_training=False)
    with pytest.raises(GenerationError, match="does not fit in memory") as caught:
        rehearse_ppo(engine, ASKED, Roomy())
    assert "max_new_tokens" in str(caught.value.hint)
    lift()
    limited(engine.roles.critic, 0)
    with pytest.raises(TrainingStopped, match="does not fit in memory"):
        rehearse_ppo(engine, ASKED, Roomy())


def test_the_rollout_of_the_rehearsal_has_the_greatest_length_and_shares_no_more_than_a_real_one() -> None:
    engine = tiny_engine("llama", tiny_config(micro_batch_tokens=512))
    longest = longest_prompts(engine, ASKED)
    lengths = [len(engine.roles.chat.prompt_ids(prompt.messages)) for prompt in ASKED]
    assert [len(ids) for ids in longest] == sorted(lengths, reverse=True)
    rollout = longest_rollout(engine, engine.config, longest[0])
    assert set(rollout.lengths) == {max(lengths) + 12}
    assert rollout.num_sequences == len(ASKED)
    assert not any(rollout.shared_lengths or ())
