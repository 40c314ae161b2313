"""Sampled answers: the KL against the sum over all answers of a tiny model, the win rate against plain counting."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dovetail.maths.evaluation import wilson_interval
from dovetail.rlhf.evaluation import answer_figures
from dovetail.rlhf.rewards import Answer
from dovetail.rlhf.roles import policy_logprobs
from dovetail.rlhf.rollout import pack_rollout
from dovetail.rlhf.tasks.answered import Answered, wins
from dovetail.training.step import TokenBudget

VOCABULARY, END, LONGEST = 5, 0, 3
PROMPT = (3, 1)
TEMPERATURE = 0.8


def model(seed: int) -> Any:
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, initializer_range=0.7, bos_token_id=None, eos_token_id=0)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).double().eval()


@torch.no_grad()
def next_probabilities(language_model: Any, ids: tuple[int, ...]) -> list[float]:
    logits = language_model(input_ids=torch.tensor([ids])).logits[0, -1] / TEMPERATURE
    found: list[float] = logits.softmax(-1).tolist()
    return found


def exact_kl(policy: Any, reference: Any, answer: tuple[int, ...] = ()) -> float:
    """KL of whole answers, from the recursion over states."""
    if len(answer) == LONGEST or answer[-1:] == (END,):
        return 0.0
    p, q = (next_probabilities(m, PROMPT + answer) for m in (policy, reference))
    return sum(
        p[a] * (math.log(p[a] / q[a]) + exact_kl(policy, reference, (*answer, a))) for a in range(VOCABULARY)
    )


def all_answers(
    policy: Any, answer: tuple[int, ...] = (), chance: float = 1.0
) -> Iterator[tuple[tuple[int, ...], float]]:
    if len(answer) == LONGEST or answer[-1:] == (END,):
        yield answer, chance
        return
    for token, p in enumerate(next_probabilities(policy, PROMPT + answer)):
        yield from all_answers(policy, (*answer, token), chance * p)


def answer_of(ids: tuple[int, ...]) -> Answer:
    return Answer(messages=(), text=str(ids), prompt_ids=PROMPT, answer_ids=ids, logprobs=(0.0,) * len(ids),
                  finished=ids[-1] == END)  # fmt: skip


def test_the_kl_of_answers_has_the_expectation_of_the_exact_one() -> None:
    policy, reference = model(0), model(1)
    expected = exact_kl(policy, reference)
    assert expected > 0.1
    mean = 0.0
    answers = list(all_answers(policy))
    assert sum(chance for _, chance in answers) == pytest.approx(1.0)
    batch = pack_rollout([answer_of(ids) for ids, _ in answers])
    own, other = (
        policy_logprobs(m, batch, TokenBudget(64), temperature=TEMPERATURE) for m in (policy, reference)
    )
    for index, (ids, chance) in enumerate(answers):
        own_T, other_T = (
            column.split_with_sizes(batch.lengths)[index] for column in (own.logprobs_T, other.logprobs_T)
        )
        alone = batch.sequences([index])
        assert own.entropy_T is not None
        entropy_T = own.entropy_T.split_with_sizes(batch.lengths)[index]
        figures = answer_figures([answer_of(ids)], alone, type(own)(own_T, entropy_T), other_T)
        mean += chance * figures["kl_nats_per_answer"]
    assert mean == pytest.approx(expected, rel=1e-6)


def test_the_figures_of_several_answers_are_means_over_answers_and_tokens() -> None:
    policy, reference = model(0), model(1)
    answers = [answer_of(ids) for ids in ((2, 0), (4, 4, 4), (2, 0), (1, 2, 0))]
    batch = pack_rollout(answers)
    own, other = (
        policy_logprobs(m, batch, TokenBudget(64), temperature=TEMPERATURE) for m in (policy, reference)
    )
    found = answer_figures(answers, batch, own, other.logprobs_T)
    plain = (model(0), model(1))  # the others read packed batches now
    gaps, entropies = [], []
    for answer in answers:
        gap = 0.0
        for t, token in enumerate(answer.answer_ids):
            p, q = (next_probabilities(m, PROMPT + answer.answer_ids[:t]) for m in plain)
            gap += math.log(p[token] / q[token])
            entropies.append(-sum(x * math.log(x) for x in p))
        gaps.append(gap)
    mean = sum(gaps) / 4
    assert found["kl_nats_per_answer"] == pytest.approx(mean, rel=1e-5)
    stderr = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 4 / 4)
    assert found["kl_nats_per_answer_stderr"] == pytest.approx(stderr, rel=1e-5)
    assert found["entropy_nats_per_token"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert found["distinct_fraction"] == 3 / 4
    assert found["distinct_1"] == 4 / 10
    assert found["distinct_2"] == 3 / 6
    assert (found["answer_tokens"], found["cut_off_fraction"]) == (2.5, 0.25)
    assert "kl_nats_per_answer" not in answer_figures(answers, batch, own, None)


def test_wins_count_ties_as_halves_and_leave_out_what_the_judge_did_not_say() -> None:
    one, other = (
        Answered([], {"reward": torch.tensor(scores)}, {})
        for scores in ([1.0, 2.0, 0.0, 5.0], [0.0, 2.0, 3.0, 4.0])
    )
    nan = float("nan")
    found = wins(one, other, lambda ones, others: torch.tensor([1.0, nan, 0.5, 0.0]))
    low, high = wilson_interval(2.5, 4)
    assert [found[f"reward_wins{end}"] for end in ("", "_low", "_high")] == pytest.approx(
        [2.5 / 4, low, high]
    )
    low, high = wilson_interval(1.5, 3)
    assert [found[f"judge_wins{end}"] for end in ("", "_low", "_high")] == pytest.approx([0.5, low, high])
    assert list(wins(one, other, None)) == ["reward_wins", "reward_wins_low", "reward_wins_high"]
