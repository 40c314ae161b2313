"""One whole PPO update, against a re-derivation that shares no code with it.

The reference runs each sequence alone through Hugging Face's own forward, in plain loops, and differentiates
InstructGPT's objective as printed. Given the same rollout, losses and gradients must agree, however the batch is cut.
"""

import copy
import math
from collections.abc import Callable, Collection

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.config.stages import OptimizerConfig
from dovetail.rlhf import update
from dovetail.rlhf.api import PPOTrainer, RLHFEngine
from dovetail.rlhf.rollout import Collected
from tests.rlhf.tiny import PROMPTS, draw_from_another_policy, tiny_config, tiny_engine

BETA, CLIP, VALUE_CLIP, LAMBDA, TEMPERATURE, CAP = 0.1, 0.2, 0.2, 0.9, 0.7, 1.01
SOURCES = ["training", "generation"]


class ByDefinition:
    """PPO's losses for one rollout, sequence by sequence, token by token."""

    def __init__(self, engine: RLHFEngine, collected: Collected, source: str) -> None:
        self.source = source
        self.actor = copy.deepcopy(engine.roles.actor)
        self.critic = copy.deepcopy(engine.roles.critic)
        self.reference = engine.roles.reference
        self.collected = collected
        for model in (self.actor, self.critic):  # Hugging Face's own attention, not ours
            model.set_attn_implementation("sdpa")
            model.zero_grad()
        self.reference_alone = copy.deepcopy(self.reference)
        self.reference_alone.set_attn_implementation("sdpa")

    def logprobs(
        self, model: PreTrainedModel, prompt: tuple[int, ...], answer: tuple[int, ...]
    ) -> list[Tensor]:
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0] / TEMPERATURE
        table = logits - logits.exp().sum(-1, keepdim=True).log()
        return [table[len(prompt) + k - 1, token] for k, token in enumerate(answer)]

    def values(self, prompt: tuple[int, ...], answer: tuple[int, ...]) -> list[Tensor]:
        ids = torch.tensor([[*prompt, *answer]])
        hidden = self.critic.base_model(ids).last_hidden_state[0]
        table = hidden @ self.critic.score.weight[0]
        return [table[len(prompt) + k - 1] for k in range(len(answer))]

    def losses(self) -> tuple[Tensor, Tensor]:
        found, rows = [], []
        for answer, score in zip(self.collected.answers, self.collected.experience.scores_S, strict=True):
            new = self.logprobs(self.actor, answer.prompt_ids, answer.answer_ids)
            with torch.no_grad():
                ref = self.logprobs(self.reference_alone, answer.prompt_ids, answer.answer_ids)
            value = self.values(answer.prompt_ids, answer.answer_ids)
            old = [float(p.detach()) for p in new]
            drawn = [float(torch.tensor(p)) for p in answer.logprobs]  # a rollout holds them in float32
            penalised = old if self.source == "training" else drawn
            rewards = [-BETA * (o - float(r)) for o, r in zip(penalised, ref, strict=True)]
            rewards[-1] += float(score) if answer.finished else -1.0
            weights = [min(math.exp(o - d), CAP) for o, d in zip(old, drawn, strict=True)]
            found.append((new, old, value, rewards, weights))
        gaps = [
            sum(rewards[t:]) - float(value[t].detach())
            for _, _, value, rewards, _ in found
            for t in range(len(rewards))
        ]
        shift = sum(gaps) / len(gaps)  # so that the values' mean is that of the rewards to come
        for new, old, raw, rewards, weights in found:
            value = [v + shift for v in raw]
            before = [float(v.detach()) for v in value]
            rows.append((new, old, value, before, self.advantages(rewards, before), weights))
        flat = [a for row in rows for a in row[4]]
        mean = sum(flat) / len(flat)
        std = (sum((a - mean) ** 2 for a in flat) / len(flat)) ** 0.5
        actor_loss, critic_loss = torch.zeros(()), torch.zeros(())
        for row in rows:
            for p, o, v, b, a, w in zip(*row, strict=True):
                ratio, scaled = (p - o).exp(), w * (a - mean) / (std + 1e-8)
                actor_loss = actor_loss + torch.max(
                    -scaled * ratio, -scaled * ratio.clamp(1 - CLIP, 1 + CLIP)
                )
                target, limited = a + b, b + (v - b).clamp(-VALUE_CLIP, VALUE_CLIP)
                critic_loss = critic_loss + 0.5 * torch.max((v - target) ** 2, (limited - target) ** 2)
        return actor_loss / len(flat), critic_loss / len(flat)

    @staticmethod
    def advantages(rewards: list[float], values: list[float]) -> list[float]:
        following = [*values[1:], 0.0]
        delta = [r + n - v for r, n, v in zip(rewards, following, values, strict=True)]
        return [sum(LAMBDA**k * delta[t + k] for k in range(len(delta) - t)) for t in range(len(delta))]


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 60, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", ["llama", "opt-post-norm"])
@pytest.mark.parametrize("source", SOURCES)
def test_one_update_equals_the_equations_as_printed(
    source: str,
    name: str,
    dtype: torch.dtype,
    tolerance: float,
    micro_batch_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config(micro_batch_tokens=micro_batch_tokens, old_logprobs=source, importance_cap=CAP)
    engine = tiny_engine(name, config, dtype)
    trainer = PPOTrainer(engine)
    draw_from_another_policy(monkeypatch)
    collected = trainer.generate_experience(PROMPTS)
    expected = ByDefinition(engine, collected, source)
    actor_loss, critic_loss = expected.losses()
    (actor_loss + critic_loss).backward()
    gradients = record_gradients(engine, monkeypatch)
    report = trainer.update(collected)
    assert abs(report.actor_loss - actor_loss.item()) < tolerance * max(1.0, abs(actor_loss.item()))
    assert abs(report.critic_loss - critic_loss.item()) < tolerance * abs(critic_loss.item())
    for role, model in (("actor", expected.actor), ("critic", expected.critic)):
        for parameter_name, parameter in model.named_parameters():
            if parameter.grad is not None:
                error = (gradients[role][parameter_name] - parameter.grad).norm()
                assert error <= 10 * tolerance * max(float(parameter.grad.norm()), 1e-3), (
                    role,
                    parameter_name,
                )


def record_gradients(engine: RLHFEngine, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Tensor]]:
    """The gradients of the whole batch, as they are when the optimiser is about to be stepped, before clipping."""
    seen: dict[str, dict[str, Tensor]] = {}
    for role, model in (("actor", engine.roles.actor), ("critic", engine.roles.critic)):
        optimizer = getattr(engine.learners, role)
        measure = optimizer.grad_norm

        def grad_norm(
            left_out: Collection[str],
            role: str = role,
            model: PreTrainedModel = model,
            measure: Callable[..., Tensor] = measure,
        ) -> Tensor:
            seen[role] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            return measure(left_out)

        monkeypatch.setattr(optimizer, "grad_norm", grad_norm)
    return seen


@pytest.mark.parametrize(("source", "epochs"), [("training", 2), ("training", 1), ("generation", 1)])
def test_a_learning_rate_of_zero_gives_ratio_one_and_no_kl(source: str, epochs: int) -> None:
    no_rate = OptimizerConfig(learning_rate=0.0, schedule="constant")
    config = tiny_config(
        actor_optimizer=no_rate, critic_optimizer=no_rate, ppo_epochs=epochs, old_logprobs=source
    )
    trainer = PPOTrainer(tiny_engine("llama", config))
    for _ in range(2):
        collected = trainer.generate_experience(PROMPTS)
        report = trainer.update(collected)
        assert report.stats["ppo/clipped_fraction"] == 0.0
        assert report.stats["ppo/approx_kl_nats_per_token"] == 0.0
        # The generator's own numbers differ from the reference's training forward by rounding.
        rounding = 0.0 if source == "training" else 1e-4
        assert abs(collected.kl_nats_per_answer) <= rounding


@pytest.mark.parametrize("cap", [CAP, 1.0, None])
def test_both_sources_report_the_same_mismatch_and_entropy(
    cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_from_another_policy(monkeypatch)
    rows = []
    for source in SOURCES:
        config = tiny_config(old_logprobs=source, importance_cap=cap)
        trainer = PPOTrainer(tiny_engine("llama", config))
        collected = trainer.generate_experience(PROMPTS)
        assert (collected.experience.old_logprobs_T is None) == (source == "generation")
        rows.append(collected.stats | trainer.update(collected).stats)
    training, generation = rows
    assert training.keys() == generation.keys()
    assert ("ppo/importance_capped_fraction" in training) == (cap is not None)
    for name in (*MEASURED, *(["ppo/importance_capped_fraction"] if cap else [])):
        assert training[name] > 0
        assert generation[name] == pytest.approx(training[name], rel=1e-4)
    if cap == 1.0:  # gaps are as often below zero as above
        assert training["ppo/importance_capped_fraction"] == pytest.approx(0.5, abs=0.15)
    assert 0.04 < training["rollout/logprob_gap_max"] < 0.0501
    assert training["rollout/logprob_gap_mean"] == pytest.approx(0.025, rel=0.3)
    assert training["rollout/mismatch_kl_nats_per_token"] == pytest.approx(0.05**2 / 6, rel=0.3)


MEASURED = (
    "ppo/entropy_nats_per_token",
    "rollout/logprob_gap_mean",
    "rollout/logprob_gap_max",
    "rollout/mismatch_kl_nats_per_token",
)


def test_while_only_the_critic_learns_the_actor_is_measured_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(update, "ENOUGH", math.inf)
    trainer = PPOTrainer(tiny_engine("llama", tiny_config(critic_warmup_rollouts=1)))
    for is_scored in (True, True, False):
        collected = trainer.generate_experience(PROMPTS)
        assert (collected.experience.old_logprobs_T is not None) == is_scored
        stats = collected.stats | trainer.update(collected).stats
        assert set(MEASURED) <= stats.keys()


@pytest.mark.parametrize("changes", [{"ppo_epochs": 2}, {"minibatches": 2}])
def test_several_steps_need_old_logprobs_of_their_own(changes: dict[str, int]) -> None:
    assert tiny_config(**changes).needs_old_logprobs()
    assert not tiny_config().needs_old_logprobs()
    with pytest.raises(ValidationError, match="old_logprobs = generation with ppo_epochs = "):
        tiny_config(old_logprobs="generation", **changes)


def test_another_packing_changes_the_ratio_by_rounding_alone() -> None:
    tiny_rate = OptimizerConfig(learning_rate=0.0, schedule="constant")
    config = tiny_config(actor_optimizer=tiny_rate, critic_optimizer=tiny_rate, minibatches=3)
    trainer = PPOTrainer(tiny_engine("gpt2", config))
    report = trainer.update(trainer.generate_experience(PROMPTS))
    assert report.stats["ppo/clipped_fraction"] == 0.0
    assert abs(report.stats["ppo/approx_kl_nats_per_token"]) < 1e-6
