"""Methods and losses as training calls them, against what other frameworks' own code said of the same numbers.

The numbers and the scripts that asked for them stand in `recorded/`. Where a definition differs, the test says by what.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.batches import pack, pack_preferences
from dovetail.config.policy import PolicyConfig
from dovetail.config.stages import DpoConfig, PpoConfig, SamplingConfig
from dovetail.maths.preference import estimated_kl
from dovetail.rlhf.algorithms.named import algorithm_named
from dovetail.rlhf.algorithms.protocol import Scored
from dovetail.rlhf.rewards import Answer
from dovetail.rlhf.rollout import experience_of, pack_rollout, shape_rewards
from dovetail.stages.dpo import judged
from tests.conformance.recorded import inputs
from tests.conformance.subject import maths
from tests.tolerance import assert_near

TRL, TRL_PPO, VERL, OPENRLHF = (
    inputs.read(f"from_{name}") for name in ("trl", "trl_ppo", "verl", "openrlhf")
)
STARTS = [sum(inputs.LENGTHS[:i]) for i in range(len(inputs.LENGTHS) + 1)]
ANSWERS = [
    Answer(
        messages=({"role": "user", "content": "?"},),
        text="",
        prompt_ids=(0, 0),
        answer_ids=tuple(range(1 + start, 1 + start + length)),
        logprobs=(0.0,) * length,
        finished=True,
    )
    for start, length in zip(STARTS, inputs.LENGTHS, strict=False)
]
"""Answers in which every token is another one, so that a table of one number per token is a policy."""


@dataclass(frozen=True)
class Learnt:
    """The outcome of a method: advantages of all actions, the loss, and its gradient by each of them."""

    advantages: Tensor
    loss: Tensor
    gradient: Tensor


def flat(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=torch.float64)


def learn(
    name: str,
    *,
    old: list[list[float]] = inputs.OLD,
    max_tokens: int = 1000,
    advantages_of_answers: Sequence[float] | None = None,
    dual_clip: float | None = None,
    **policy: Any,
) -> Learnt:
    """Rewards, advantages, micro-batches and loss by the functions that a training step calls.

    advantages_of_answers: taken in place of the method's own.
    """
    config = PpoConfig(
        batch_size=len(ANSWERS),
        kl_coefficient=inputs.BETA,
        cut_off_answers="keep_score",
        sampling=SamplingConfig(max_new_tokens=inputs.LIMIT),
        dual_clip=dual_clip,
    )
    settings = PolicyConfig.model_validate({"answers_per_prompt": inputs.GROUP_SIZE, **policy})
    algorithm = algorithm_named(name, settings, config)
    rollout = pack_rollout(ANSWERS)

    def column(rows: list[list[float]]) -> Tensor:
        return torch.zeros(rollout.num_tokens).double().masked_scatter(rollout.mask_T, flat(rows))

    old_T, reference_T = column(old), column(inputs.REFERENCE)
    scores_S = torch.tensor(inputs.REWARDS, dtype=torch.float64)
    weight = inputs.BETA if algorithm.kl_in_reward else 0.0
    rewards_T = shape_rewards(rollout, old_T, reference_T, scores_S, config, weight, score_clip=None)
    scored = Scored(rollout=rollout, learnt=rollout, rewards_T=rewards_T, values_T=None)
    advantages = algorithm.advantages(scored, config)
    if advantages_of_answers is not None:
        given_T = torch.zeros(rollout.num_tokens).double()
        given_T = given_T.masked_scatter(rollout.mask_T, over_tokens(advantages_of_answers))
        advantages = replace(advantages, advantages_T=given_T)
    experience = experience_of(scored, advantages, old_T, reference_T, scores_S)
    prepared = algorithm.prepared(experience, config)
    table = torch.cat([torch.zeros(1).double(), flat(inputs.NEW)]).requires_grad_()
    total = sum(
        algorithm.loss(
            table[micro.token_ids_T], micro.old_logprobs_T, micro.advantages_T, micro, config
        ).total
        for micro in prepared.micro_batches(max_tokens)
    )
    loss = total / prepared.num_targets
    loss.backward()
    return Learnt(advantages.advantages_T[rollout.mask_T], loss.detach(), table.grad[1:])


def over_tokens(per_answer: Sequence[float]) -> Tensor:
    """Each answer's number at every token of it."""
    return torch.tensor(per_answer).double().repeat_interleave(torch.tensor(inputs.LENGTHS))


SAME_AS_TRL: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {}),
    "dr_grpo": ("dr_grpo", {}),
    "dapo": ("dapo", {"drop_equal_groups": False}),
    "bnpo": ("grpo", {"aggregation": "token_mean"}),
    "gspo": ("gspo", {}),
    "gspo, wide": ("gspo", {"clip": (0.1, 0.05)}),
    "cispo": ("cispo", {}),
    "dual clip": ("grpo", {"kl": "none", "dual_clip": inputs.DUAL_CLIP}),
}
"""By TRL's name of a loss: the method and what of it is not its default."""


@pytest.mark.parametrize("max_tokens", [20, 1000])
@pytest.mark.parametrize("case", SAME_AS_TRL)
def test_methods_give_the_advantages_losses_and_gradients_of_trl(case, max_tokens):
    """GRPOTrainer's loss types, whole and in micro-batches; its advantages are in float32."""
    name, policy = SAME_AS_TRL[case]
    found, said = learn(name, max_tokens=max_tokens, **policy), TRL[case]
    assert_near(found.advantages, over_tokens(said["advantages"]), dtype=torch.float32)
    assert_near(found.loss, said["loss"], dtype=torch.float32)
    assert_near(found.gradient, flat(said["gradient"]), dtype=torch.float32)


def test_dapo_leaves_groups_without_signal_out_of_the_mean_as_well():
    """TRL counts their tokens: its loss is smaller by the share of the tokens that are left."""
    found, said = learn("dapo"), TRL["dapo"]
    left = sum(inputs.LENGTHS[:4]) + sum(inputs.LENGTHS[8:])
    share = left / sum(inputs.LENGTHS)
    assert_near(found.loss * share, said["loss"], dtype=torch.float32)
    assert_near(found.gradient * share, flat(said["gradient"]), dtype=torch.float32)


def test_rloo_has_the_advantages_of_trl_and_in_one_step_its_gradient():
    """TRL's ratio is that of the whole answer, ours of each token: with one step per rollout both are 1, and the
    gradient is TRL's divided by the constant length."""
    assert_near(learn("rloo").advantages, over_tokens(TRL["rloo"]["advantages"]), dtype=torch.float32)
    found, said = learn("rloo", old=inputs.NEW), TRL["rloo, one step"]
    assert_near(found.advantages, over_tokens(said["advantages"]), dtype=torch.float32)
    assert_near(found.gradient * inputs.LIMIT, flat(said["gradient"]), dtype=torch.float32)


def preference(loss: str, **settings: Any) -> tuple[Tensor, Tensor]:
    """The loss of each pair and its gradient by both answers, by the functions that a step of the stage calls."""
    config = DpoConfig.model_validate({"loss": loss, "beta": inputs.PAIR_BETA, **settings})
    losses, gradients = [], []
    kl = estimated_kl(torch.tensor(inputs.OTHERS), torch.tensor(inputs.REFERENCE_OTHERS))
    for pair in range(len(inputs.CHOSEN)):
        tokens = inputs.CHOSEN_TOKENS[pair], inputs.REJECTED_TOKENS[pair]
        reference = [inputs.REFERENCE_CHOSEN[pair], inputs.REFERENCE_REJECTED[pair]]
        batch = pack_preferences(
            [[[0] * (2 + n) for n in tokens]],
            [[(0, 1, 0.0)]],
            [2],
            reference_logprobs=reference if config.needs_reference else None,
            kl=kl,
        )
        sums = torch.tensor([inputs.CHOSEN[pair], inputs.REJECTED[pair]]).double().requires_grad_()
        total, _ = judged(sums, batch, config)
        total.backward()
        losses.append(total.detach())
        gradients.append(sums.grad)
    return torch.stack(losses), torch.stack(gradients)


def test_trl_multiplies_the_kl_in_the_loss_by_the_ratio_and_the_paper_does_not():
    """Unless told otherwise TRL's term is r k3, whose gradient is that of KL(policy || reference); GRPO's is k3."""
    corrections = []
    for rows in zip(inputs.NEW, inputs.OLD, inputs.REFERENCE, strict=True):
        terms = [
            (math.exp(p - old) - 1) * (math.exp(ref - p) - 1 + p - ref)
            for p, old, ref in zip(*rows, strict=True)
        ]
        corrections.append(sum(terms) / len(terms))
    correction = inputs.BETA * sum(corrections) / len(corrections)
    assert abs(correction) > 1e-3
    assert_near(learn("grpo").loss + correction, TRL["grpo, KL times ratio"]["loss"], dtype=torch.float32)


def group_deviations() -> Tensor:
    """The sample's deviation of the rewards of each answer's group, at each of its tokens."""
    groups = torch.tensor(inputs.REWARDS).double().view(-1, inputs.GROUP_SIZE)
    return over_tokens(groups.std(1).repeat_interleave(inputs.GROUP_SIZE).tolist())


@pytest.mark.parametrize(
    "name", ["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
)
def test_advantages_are_those_of_verl_but_for_the_number_beside_the_deviation(name):
    """GRPO: verl adds 1e-6 to a group's deviation, we 1e-4 as TRL does. REINFORCE++: verl divides by the deviation of
    the sample, we by that of the population; with a baseline it counts each answer once for each of its tokens, so the
    same numbers are normalised over the answers here."""
    policy = {"answers_per_prompt": 1} if name == "reinforce_plus_plus" else {}
    found, said = learn(name, **policy).advantages.double(), flat(VERL[name]["advantages"])
    if name == "grpo":
        said = said * (group_deviations() + 1e-6) / (group_deviations() + 1e-4)
    if name == "reinforce_plus_plus":
        count = sum(inputs.LENGTHS)
        said = said * math.sqrt(count / (count - 1))
    if name == "reinforce_plus_plus_baseline":
        rows = [row[0] for row in VERL[name]["advantages"]]
        mean, deviation = statistics.mean(rows), statistics.pstdev(rows)
        said = over_tokens([(x - mean) / deviation for x in rows])
    assert_near(found, said, dtype=torch.float32)


LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "loss, token mean": ("dapo", {"clip": (inputs.CLIP, inputs.CLIP_HIGH), "drop_equal_groups": False}),
    "loss, sequence mean": ("grpo", {"kl": "none"}),
    "loss, constant length": ("dr_grpo", {}),
    "loss, dual clip": (
        "dapo",
        {
            "clip": (inputs.CLIP, inputs.CLIP),
            "drop_equal_groups": False,
            "dual_clip": inputs.DUAL_CLIP,
        },
    ),
    "loss, gspo": ("gspo", {"clip": (0.1, 0.05)}),
    "loss, cispo": ("cispo", {}),
}
"""By the name of a recorded loss: the method and what of it is not its default."""


@pytest.mark.parametrize(
    ("said", "case"),
    [(said, case) for said in (VERL, OPENRLHF) for case in LOSSES if case in said],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_losses_and_gradients_are_those_of_verl_and_openrlhf(said, case):
    """Of the same advantages. verl's dual clip, which is on by default, is on where its name says so."""
    name, policy = LOSSES[case]
    found = learn(name, advantages_of_answers=inputs.REWARDS, **policy)
    assert_near(found.loss, said[case]["loss"], dtype=torch.float32)
    assert_near(found.gradient, flat(said[case]["gradient"]), dtype=torch.float32)


def critic(returns: Tensor) -> tuple[Tensor, Tensor]:
    """The critic's loss per token and its gradient by each value."""
    values = flat(inputs.NEW_VALUES).requires_grad_()
    everywhere = torch.ones(len(values), dtype=torch.bool)
    loss = maths.clipped_value_loss(values, flat(inputs.VALUES), returns, everywhere, clip=inputs.VALUE_CLIP)
    (loss.total / loss.count).backward()
    return loss.total.detach() / loss.count, values.grad


def test_the_critics_targets_loss_and_gradient_are_those_of_verl_and_openrlhf():
    """GAE and returns of penalised rewards by verl; OpenRLHF gets each answer's reward as its targets."""
    lengths = torch.tensor(inputs.LENGTHS)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    old, reference = flat(inputs.OLD), flat(inputs.REFERENCE)
    everywhere = torch.ones(len(old), dtype=torch.bool)
    rewards = maths.per_token_rewards(
        old,
        reference,
        torch.tensor(inputs.REWARDS).double(),
        everywhere,
        bounds[1:] - 1,
        kl_coefficient=inputs.BETA,
    )
    advantages = maths.gae(rewards, flat(inputs.VALUES), bounds, gamma=inputs.GAMMA, lam=inputs.LAMBDA)
    said, count = VERL["critic"], sum(inputs.LENGTHS)
    whitened = flat(said["advantages"]) * math.sqrt(count / (count - 1))
    assert_near(maths.normalise(advantages, everywhere), whitened, dtype=torch.float32)
    assert_near(advantages + flat(inputs.VALUES), flat(said["returns"]), dtype=torch.float32)
    for found, case in (
        (critic(flat(said["returns"])), said),
        (critic(over_tokens(inputs.REWARDS)), OPENRLHF["critic"]),
    ):
        assert_near(found[0], case["loss"], dtype=torch.float32)
        assert_near(found[1], flat(case["gradient"]), dtype=torch.float32)


def test_a_ppo_step_has_the_numbers_of_trl_but_for_the_token_after_the_end():
    """Rewards, GAE, returns, both losses and gradients, once ours is told what TRL counts: it pays the score one token
    after the last, which the critic learns from and the actor does not; and it whitens with the sample's deviation."""
    said = TRL_PPO["ppo"]
    ends = [last + 1 for last in said["last_token"]]
    width = len(said["rewards"][0])
    paid = [min(end, width - 1) for end in ends]
    kept = [slice(0, last + 1) for last in paid]
    masks = [[False] + [True] * (last + 1) for last in paid]
    batch = pack([[0] * len(mask) for mask in masks], masks)
    is_action = torch.tensor([t < end for last, end in zip(paid, ends, strict=True) for t in range(last + 1)])

    def column(name: str) -> Tensor:
        rows = [row[own] for row, own in zip(said[name], kept, strict=True)]
        return flat(rows)

    bounds = maths.cu_actions(batch.mask_T, batch.cu_seqlens_S1)
    everywhere = torch.ones(len(is_action), dtype=torch.bool)
    scores = torch.tensor(said["scores"]).double()
    old, reference, values = column("logprobs"), column("ref_logprobs"), column("values")
    rewards = maths.per_token_rewards(
        old, reference, scores, everywhere, bounds[1:].long() - 1, kl_coefficient=inputs.BETA
    )
    assert_near(rewards, column("rewards"), dtype=torch.float32)
    advantages = maths.gae(rewards, values, bounds, gamma=inputs.GAMMA, lam=inputs.LAMBDA)
    assert_near(advantages + values, column("returns"), dtype=torch.float32)
    count = int(is_action.sum())
    whitened = maths.normalise(advantages, is_action)
    assert_near(whitened, column("advantages") * math.sqrt(count / (count - 1)), dtype=torch.float32)

    new, new_values = column("new_logprobs").requires_grad_(), column("vpred").requires_grad_()
    actor = maths.clipped_policy_loss(new, old, column("advantages"), is_action, clip=inputs.CLIP)
    critic = maths.clipped_value_loss(
        new_values, values, column("returns"), everywhere, clip=inputs.VALUE_CLIP
    )
    for loss, by, name in ((actor, new, "policy"), (critic, new_values, "value")):
        (loss.total / loss.count).backward()
        assert_near(loss.total.detach() / loss.count, said[f"{name}_loss"], dtype=torch.float32)
        assert_near(by.grad, column(f"{name}_gradient"), dtype=torch.float32)


PAIRS: dict[str, tuple[str, dict[str, float]]] = {
    "sigmoid": ("sigmoid", {}),
    "sigmoid, smoothed": ("sigmoid", {"label_smoothing": inputs.SMOOTHING}),
    "ipo": ("ipo", {}),
    "kto": ("kto", {}),
    "simpo": ("simpo", {"simpo_gamma": inputs.SIMPO_GAMMA}),
}


@pytest.mark.parametrize(
    ("said", "case"),
    [(said, case) for said in (TRL, OPENRLHF) for case in PAIRS if case in said],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_preference_losses_and_gradients_are_those_of_trl_and_openrlhf(said, case):
    """DPOTrainer, KTOTrainer (both answers of a pair, their mean) and CPOTrainer (the smoothed one and SimPO)."""
    name, settings = PAIRS[case]
    losses, gradients = preference(name, **settings)
    assert_near(losses, said[case]["losses"], dtype=torch.float32)
    assert_near(gradients, said[case]["gradients"], dtype=torch.float32)


def test_the_loss_of_a_reward_model_and_its_gradient_are_those_of_openrlhf():
    """PairWiseLoss with a margin."""
    chosen, rejected = (
        torch.tensor(row).double().requires_grad_() for row in (inputs.CHOSEN, inputs.REJECTED)
    )
    margin = torch.full_like(chosen, inputs.MARGIN)
    said = OPENRLHF["ranking"]
    for pair in range(len(inputs.CHOSEN)):
        own = slice(pair, pair + 1)
        loss = maths.ranking_loss(chosen[own], rejected[own], margin[own], torch.ones(1).double())
        loss.backward()
        assert_near(loss.detach(), said["losses"][pair], dtype=torch.float32)
    gradients = torch.stack([chosen.grad, rejected.grad], 1)
    assert_near(gradients, said["gradients"], dtype=torch.float32)


def test_orpo_is_trls_odds_and_the_cross_entropy_of_the_chosen_answer():
    """TRL's cross-entropy is the mean over all tokens of all chosen texts, prompts among them; ours is the mean over
    pairs of the mean over the chosen answer, as in the paper. The odds are the same; TRL takes them in float32."""
    losses, gradients = preference("orpo")
    said, tokens = TRL["orpo, odds alone"], torch.tensor(inputs.CHOSEN_TOKENS)
    cross_entropy = -torch.tensor(inputs.CHOSEN) / tokens
    assert_near(losses - cross_entropy, said["losses"], dtype=torch.float32)
    gradients[:, 0] += 1 / tokens
    assert_near(gradients, said["gradients"], dtype=torch.float32)
