"""One whole PPO update, against a re-derivation that shares no code with it.

The reference runs each sequence alone through Hugging Face's own forward, in plain loops, and differentiates
InstructGPT's objective as printed. Given the same rollout, losses and gradients must agree, however the batch is cut.
"""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.config.stages import OptimizerConfig
from dovetail.rlhf.api import PPOTrainer, RLHFEngine
from dovetail.rlhf.rollout import Collected
from tests.rlhf.tiny import PROMPTS, tiny_config, tiny_engine

BETA, CLIP, VALUE_CLIP, LAMBDA, TEMPERATURE = 0.1, 0.2, 0.2, 0.9, 0.7


class ByDefinition:
    """PPO's losses for one rollout, sequence by sequence, token by token."""

    def __init__(self, engine: RLHFEngine, collected: Collected) -> None:
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
        rows = []
        for answer, score in zip(self.collected.answers, self.collected.experience.scores_S, strict=True):
            new = self.logprobs(self.actor, answer.prompt_ids, answer.answer_ids)
            with torch.no_grad():
                ref = self.logprobs(self.reference_alone, answer.prompt_ids, answer.answer_ids)
            value = self.values(answer.prompt_ids, answer.answer_ids)
            old = [float(p.detach()) for p in new]
            before = [float(v.detach()) for v in value]
            rewards = [-BETA * (o - float(r)) for o, r in zip(old, ref, strict=True)]
            rewards[-1] += float(score) if answer.finished else -1.0
            advantages = self.advantages(rewards, before)
            rows.append((new, old, value, before, advantages))
        flat = [a for row in rows for a in row[4]]
        mean = sum(flat) / len(flat)
        std = (sum((a - mean) ** 2 for a in flat) / len(flat)) ** 0.5
        actor_loss, critic_loss = torch.zeros(()), torch.zeros(())
        for new, old, value, before, advantages in rows:
            for p, o, v, b, a in zip(new, old, value, before, advantages, strict=True):
                ratio, scaled = (p - o).exp(), (a - mean) / (std + 1e-8)
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
def test_one_update_equals_the_equations_as_printed(
    name: str, dtype: torch.dtype, tolerance: float, micro_batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(micro_batch_tokens=micro_batch_tokens)
    engine = tiny_engine(name, config, dtype)
    trainer = PPOTrainer(engine)
    collected = trainer.generate_experience(PROMPTS)
    expected = ByDefinition(engine, collected)
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

        def grad_norm(role: str = role, model: PreTrainedModel = model, measure: object = measure) -> Tensor:
            seen[role] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            return measure()  # type: ignore[operator]

        monkeypatch.setattr(optimizer, "grad_norm", grad_norm)
    return seen


def test_a_learning_rate_of_zero_gives_ratio_one_and_no_kl() -> None:
    tiny_rate = OptimizerConfig(learning_rate=0.0, schedule="constant")
    config = tiny_config(actor_optimizer=tiny_rate, critic_optimizer=tiny_rate, ppo_epochs=2)
    trainer = PPOTrainer(tiny_engine("llama", config))
    for _ in range(2):
        collected = trainer.generate_experience(PROMPTS)
        report = trainer.update(collected)
        assert report.stats["ppo/clipped_fraction"] == 0.0
        assert report.stats["ppo/approx_kl_nats_per_token"] == 0.0
        assert collected.kl_nats_per_answer == 0.0


def test_another_packing_changes_the_ratio_by_rounding_alone() -> None:
    tiny_rate = OptimizerConfig(learning_rate=0.0, schedule="constant")
    config = tiny_config(actor_optimizer=tiny_rate, critic_optimizer=tiny_rate, minibatches=3)
    trainer = PPOTrainer(tiny_engine("gpt2", config))
    report = trainer.update(trainer.generate_experience(PROMPTS))
    assert report.stats["ppo/clipped_fraction"] == 0.0
    assert abs(report.stats["ppo/approx_kl_nats_per_token"]) < 1e-6
