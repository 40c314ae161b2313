"""A mixture of experts: the same experts where rounding cannot choose others; else it is said, measured and weighed."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM

from dovetail.batches import Rollout
from dovetail.model.forward import token_logprobs
from dovetail.rlhf.api import PPOTrainer, RLHFEngine
from dovetail.rlhf.build import Setup
from tests.fakes import byte_tokenizer
from tests.rlhf.tiny import PROMPTS, tiny_config, tiny_engine

SIZES: dict[str, Any] = dict(
    vocab_size=258, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, num_experts_per_tok=2,
)  # fmt: skip
CLASSES = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4)),
}


def trainer_of(name: str, dtype: torch.dtype) -> PPOTrainer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLASSES[name]().to(dtype).eval()
    engine = RLHFEngine(
        actor_model=model,
        tokenizer=byte_tokenizer(),
        total_steps=4,
        config=tiny_config(),
        reward=lambda answers: [float(len(answer.text)) for answer in answers],
        setup=Setup(device="cpu"),
    )
    return PPOTrainer(engine)


def routers_of(model: Any) -> list[Any]:
    return [layer.mlp.gate for layer in model.model.layers]


class Chosen:
    """The experts of each token that a model reads, for each layer."""

    def __init__(self, model: Any) -> None:
        self.rows: list[list[tuple[int, ...]]] = [[] for _ in routers_of(model)]
        for own, router in zip(self.rows, routers_of(model), strict=True):
            router.register_forward_hook(
                lambda _, given, __, own=own, router=router: own.extend(self.best(router, given[0]))
            )

    @staticmethod
    def best(router: Any, hidden: Tensor) -> list[tuple[int, ...]]:
        logits = hidden.reshape(-1, hidden.shape[-1]) @ router.weight.T
        return [tuple(sorted(row)) for row in logits.topk(2).indices.tolist()]

    def clear(self) -> None:
        for own in self.rows:
            own.clear()


@pytest.mark.parametrize("name", CLASSES)
def test_generation_and_training_choose_the_same_experts_in_float32(name: str) -> None:
    engine = trainer_of(name, torch.float32).engine
    chosen = Chosen(engine.roles.actor)
    [answer] = engine.generate([PROMPTS[1]], seed=3)
    length = len(answer.prompt_ids) + len(answer.answer_ids)
    # The engine tries the model before it generates, and the last token is drawn and not read.
    generated = [own[1 - length :] for own in chosen.rows]
    chosen.clear()
    batch: Rollout = engine.pack([answer])
    with torch.no_grad():
        token_logprobs(engine.roles.actor, batch, temperature=1.0)
    assert len({experts for own in generated for experts in own}) > 1
    assert generated == [own[: length - 1] for own in chosen.rows]


@pytest.mark.parametrize(("name", "dtype"), [("mixtral", torch.bfloat16), ("olmoe", torch.bfloat16)])
def test_where_rounding_may_choose_others_it_is_said_measured_and_weighed(
    name: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_of(name, dtype)
    collected = trainer.generate_experience(PROMPTS)
    stats = collected.stats | trainer.update(collected).stats
    assert "mixture of experts" in capsys.readouterr().err
    assert stats["rollout/logprob_gap_max"] > 0
    assert stats["rollout/mismatch_kl_nats_per_token"] >= 0
    assert "ppo/importance_capped_fraction" in stats


def test_nothing_is_said_of_other_models(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_engine().check_parity(PROMPTS)
    assert "mixture of experts" not in capsys.readouterr().err
