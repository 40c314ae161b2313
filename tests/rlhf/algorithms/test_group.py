"""Methods without a critic on the engine: their loss and gradient by definition."""

import copy
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dovetail.config.policy import METHODS, PolicyConfig
from dovetail.config.stages import PpoConfig, SamplingConfig
from dovetail.errors import ConfigError
from dovetail.rlhf.algorithms.named import algorithm_named
from dovetail.rlhf.algorithms.protocol import Algorithm, Scored
from dovetail.rlhf.api import PPOTrainer, RLHFEngine
from dovetail.rlhf.build import Setup
from dovetail.rlhf.rewards import Answer
from dovetail.rlhf.rollout import Collected, pack_rollout
from dovetail.rlhf.update import policy_loss
from tests.fakes import byte_tokenizer, tiny_model
from tests.rlhf.tiny import end_often, tiny_config

PROMPTS = ["Hi", "What is two plus two?", "x"]
TEMPERATURE, LIMIT, BETA = 0.7, 12, 0.1
WITH_RATIO = [name for name, settings in METHODS.items() if "ratio" in settings]


def low_tokens(answers: Sequence[Answer]) -> list[float]:
    """The share of the lower half of the bytes in each answer; at most 1."""
    return [sum(token < 128 for token in a.answer_ids) / len(a.answer_ids) for a in answers]


def engine_of(
    name: str, config: PpoConfig, dtype: torch.dtype = torch.float32, **policy: object
) -> RLHFEngine:
    return RLHFEngine(
        actor_model=end_often(tiny_model("llama", dtype=dtype)),
        tokenizer=byte_tokenizer(),
        total_steps=40,
        config=config,
        reward=low_tokens,
        setup=Setup(device="cpu"),
        algorithm=algorithm_named(name, PolicyConfig.model_validate(policy), config),
    )


class ByDefinition:
    """The loss of one rollout, answer by answer in plain Python, with the log-probabilities of transformers itself."""

    def __init__(self, name: str, engine: RLHFEngine, collected: Collected, old: list[list[float]]) -> None:
        self.name, self.old, self.answers = name, old, collected.answers
        self.scores = [float(s) for s in collected.experience.scores_S]
        self.actor = copy.deepcopy(engine.roles.actor)
        self.actor.zero_grad()
        self.actor.set_attn_implementation("sdpa")
        self.reference = copy.deepcopy(engine.roles.reference)
        self.reference.set_attn_implementation("sdpa")

    @staticmethod
    def logprobs(model: torch.nn.Module, answer: Answer) -> list[Tensor]:
        ids = torch.tensor([[*answer.prompt_ids, *answer.answer_ids]])
        table = (model(ids).logits[0] / TEMPERATURE).log_softmax(-1)
        start = len(answer.prompt_ids) - 1
        return [table[start + k, token] for k, token in enumerate(answer.answer_ids)]

    def advantages(self, penalties: list[list[float]]) -> list[list[float]]:
        size = {"rloo": 4, "reinforce_plus_plus": 1}.get(self.name, 2 if self.name != "dapo" else 4)
        in_reward = self.name in ("rloo", "reinforce_plus_plus")
        rewards = [
            score - (BETA * sum(own) if in_reward else 0.0)
            for score, own in zip(self.scores, penalties, strict=True)
        ]
        if self.name == "reinforce_plus_plus":
            to_come = [
                [score - BETA * sum(own[t:]) for t in range(len(own))]
                for score, own in zip(self.scores, penalties, strict=True)
            ]
            return self.normalised(to_come)
        found = []
        for i, reward in enumerate(rewards):
            group = rewards[i // size * size : i // size * size + size]
            if self.name == "rloo":
                found.append(reward - (sum(group) - reward) / (size - 1))
            elif self.name in ("dr_grpo", "reinforce_plus_plus_baseline"):
                found.append(reward - statistics.mean(group))
            else:
                found.append((reward - statistics.mean(group)) / (statistics.stdev(group) + 1e-4))
        if self.name == "reinforce_plus_plus_baseline":
            [found] = self.normalised([found])
        return [[a] * len(own) for a, own in zip(found, penalties, strict=True)]

    @staticmethod
    def normalised(rows: list[list[float]]) -> list[list[float]]:
        flat = [x for row in rows for x in row]
        mean, deviation = statistics.mean(flat), statistics.pstdev(flat)
        return [[(x - mean) / (deviation + 1e-8) for x in row] for row in rows]

    def token_losses(
        self, new: list[Tensor], old: list[float], ref: list[float], a: list[float]
    ) -> list[Tensor]:
        low, high = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}.get(
            self.name, (0.2, 0.2)
        )
        ratios = [(p - o).exp() for p, o in zip(new, old, strict=True)]
        if self.name == "gspo":
            product = torch.stack([p - o for p, o in zip(new, old, strict=True)]).mean().exp()
            ratios = [product] * len(new)
        if self.name == "cispo":
            return [
                -min(max(float(r.detach()), 1 - low), 1 + high) * x * p
                for r, x, p in zip(ratios, a, new, strict=True)
            ]
        losses = [-torch.min(r * x, r.clamp(1 - low, 1 + high) * x) for r, x in zip(ratios, a, strict=True)]
        gaps = [p - r for p, r in zip(new, ref, strict=True)]
        if self.name == "grpo":
            return [loss + BETA * ((-d).exp() - 1 + d) for loss, d in zip(losses, gaps, strict=True)]
        if self.name == "reinforce_plus_plus_baseline":
            return [loss + BETA * d * d / 2 for loss, d in zip(losses, gaps, strict=True)]
        return losses

    def loss(self, begun: list[list[float]]) -> Tensor:
        """begun: the actor's log-probabilities where the rollout was scored, for the penalty in the reward."""
        with torch.no_grad():
            refs = [[float(p) for p in self.logprobs(self.reference, a)] for a in self.answers]
        penalties = [[p - r for p, r in zip(*rows, strict=True)] for rows in zip(begun, refs, strict=True)]
        rows = [
            self.token_losses(self.logprobs(self.actor, answer), old, ref, own)
            for answer, old, ref, own in zip(
                self.answers, self.old, refs, self.advantages(penalties), strict=True
            )
        ]
        if self.name in ("grpo", "gspo"):
            return torch.stack([torch.stack(row).mean() for row in rows]).mean()
        if self.name in ("dr_grpo", "rloo"):
            return torch.stack([torch.stack(row).sum() / LIMIT for row in rows]).mean()
        return torch.stack([loss for row in rows for loss in row]).mean()


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 60])
@pytest.mark.parametrize("name", WITH_RATIO)
def test_loss_and_gradient_are_those_of_the_equations(name: str, micro_batch_tokens: int) -> None:
    size = {"rloo": 4, "dapo": 4, "reinforce_plus_plus": 1}.get(name, 2)
    config = tiny_config(
        batch_size=12,
        micro_batch_tokens=micro_batch_tokens,
        old_logprobs="training",
        importance_cap=None,
        cut_off_answers="keep_score",
        sampling=SamplingConfig(temperature=TEMPERATURE, max_new_tokens=LIMIT),
    )
    engine = engine_of(name, config, torch.float64, answers_per_prompt=size)
    noise, rng = torch.Generator().manual_seed(2), random.Random(4)
    for weight in engine.roles.actor.parameters():  # away from the reference
        weight.data += 0.02 * torch.randn(weight.shape, generator=noise, dtype=weight.dtype)
    prompts = [rng.choice(PROMPTS) + str(i) for i in range(12 // size)]
    collected = PPOTrainer(engine).generate_experience(prompts)
    experience = collected.experience
    assert len({answer.text for answer in collected.answers}) > 6
    assert experience.old_logprobs_T is not None
    begun_T = experience.old_logprobs_T
    old_T = begun_T + 0.3 * torch.randn(begun_T.shape, generator=noise, dtype=begun_T.dtype)
    begun, old = (
        [part[mask].tolist() for part, mask in zip(
            column.split(list(experience.lengths)), experience.mask_T.split(list(experience.lengths)), strict=True
        )]
        for column in (begun_T, old_T)
    )  # fmt: skip
    expected = ByDefinition(name, engine, collected, old)
    expected_loss = expected.loss(begun)
    expected_loss.backward()

    prepared = engine.roles.algorithm.prepared(replace(experience, old_logprobs_T=old_T), config)
    parts = [
        policy_loss(engine.roles.actor, micro, config=config, algorithm=engine.roles.algorithm)
        for micro in prepared.micro_batches(micro_batch_tokens)
    ]
    loss = sum(part.total for part in parts) / prepared.num_targets
    loss.backward()
    assert math.isclose(float(loss.detach()), float(expected_loss.detach()), rel_tol=1e-5, abs_tol=1e-7)
    for (label, own), other in zip(
        engine.roles.actor.named_parameters(), expected.actor.parameters(), strict=True
    ):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6, msg=label)


def test_answers_to_one_prompt_are_neighbours_and_differ() -> None:
    config = tiny_config(batch_size=8)
    collected = PPOTrainer(engine_of("grpo", config, answers_per_prompt=4)).generate_experience(["Hi", "x"])
    asked = [answer.messages[-1]["content"] for answer in collected.answers]
    assert asked == ["Hi"] * 4 + ["x"] * 4
    assert len({answer.answer_ids for answer in collected.answers}) == 8


def test_prompts_with_equal_rewards_are_left_out_by_dapo() -> None:
    config = tiny_config(batch_size=8, cut_off_answers="keep_score")
    engine = engine_of("dapo", config, answers_per_prompt=4)
    engine.roles.score = lambda answers: type(scored)(  # type: ignore[assignment]
        torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0, 1.0, 0.0, 1.0]), scored.stats
    )
    scored = engine_of("grpo", config).roles.score(engine.generate(["Hi"], seed=0))
    collected = PPOTrainer(engine).generate_experience(["Hi", "x"])
    assert collected.experience.target_counts[:4] == (0, 0, 0, 0)
    assert min(collected.experience.target_counts[4:]) > 0
    assert collected.stats["ppo/equal_groups_fraction"] == 0.5


def advantages_of(method: Algorithm, lengths: Sequence[int], scores: Sequence[float]) -> list[float]:
    """The advantage of each answer, by its last token; answers of these lengths with these scores and no penalty."""
    answers = [
        Answer(
            messages=(), text="", prompt_ids=(1,), answer_ids=(2,) * n, logprobs=(-1.0,) * n, finished=True
        )
        for n in lengths
    ]
    rollout = pack_rollout(answers)
    rewards_T = torch.zeros(rollout.num_tokens).index_add(0, rollout.last_index_S(), torch.tensor(scores))
    scored = Scored(rollout=rollout, learnt=rollout, rewards_T=rewards_T, values_T=None)
    found = method.advantages(scored, tiny_config(batch_size=8)).advantages_T[rollout.last_index_S()]
    return [float(advantage) for advantage in found]


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"reinforce_plus_plus"}))
def test_a_long_answer_does_not_dominate_the_statistics(name: str) -> None:
    """With one advantage for each answer. (REINFORCE++ without a baseline has one for each token, by definition.)"""
    policy = PolicyConfig(answers_per_prompt=4)
    method = algorithm_named(name, policy, tiny_config(batch_size=8))
    scores = [3.0, 0.0, 1.0, 0.5, -1.0, 0.0, 0.25, 2.0]
    short = advantages_of(method, [3] * 8, scores)
    assert advantages_of(method, [500, *[3] * 7], scores) == short
    if name == "reinforce_plus_plus_baseline":
        assert statistics.mean(short) == pytest.approx(0.0, abs=1e-6)
        assert statistics.pstdev(short) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "policy", "settings", "said"),
    [
        ("grpo", {}, {"batch_size": 12}, "set ppo.batch_size to 16"),
        ("rloo", {"answers_per_prompt": 1}, {}, "2 or more"),
        ("dapo", {}, {"kl_target": 3.0, "batch_size": 8}, "ppo.kl_target"),
        ("cispo", {}, {"dual_clip": 3.0, "batch_size": 8}, "ppo.dual_clip"),
        ("gspo", {}, {"whiten_rewards": True, "batch_size": 8}, "ppo.whiten_rewards"),
        ("best_of_n", {"answers_per_prompt": 1}, {}, "2 or more"),
        ("online_dpo", {}, {"minibatches": 2}, "ppo.minibatches = 2 does not divide the 3 prompts"),
        ("online_dpo", {}, {"kl_coefficient": 0.0}, "beta of algorithm = online_dpo"),
        ("best_of_n", {}, {"approx_kl_stop": 0.1, "batch_size": 8}, "ppo.approx_kl_stop"),
        ("nothing.py:Here", {}, {}, "cannot be loaded"),
        ("grop", {}, {}, "write one of ppo, grpo"),
    ],
)
def test_contradictions_are_named(
    name: str, policy: dict[str, object], settings: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        algorithm_named(name, PolicyConfig.model_validate(policy), tiny_config(**settings))
    assert said in f"{caught.value} {caught.value.hint}"
