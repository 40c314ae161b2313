"""What the tests judge by: small worlds that can be enumerated, in plain Python.

Responsible for: every answer of a toy language, the distribution of a policy over them, and the policy that
maximises E[r] - beta KL(policy || reference), which no amount of training may move away from:

    pi*(y) = pi_ref(y) exp(r(y) / beta) / Z,   Z = sum_y pi_ref(y) exp(r(y) / beta)

(Korbak et al. 2022, arXiv:2205.11275; Rafailov et al. 2023, arXiv:2305.18290, eq. 4). It attains beta log Z.
Not responsible for: torch. Numbers are Python floats, answers are tuples of token ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Answer = tuple[int, ...]
NextProbabilities = Callable[[Answer], Sequence[float]]
"""The tokens sampled so far -> a probability for each token."""


def every_answer(num_tokens: int, end_id: int, max_length: int) -> list[Answer]:
    """All answers that end with their first `end_id`, and those cut off at `max_length` tokens."""
    answers: list[Answer] = []
    open_prefixes: list[Answer] = [()]
    for length in range(1, max_length + 1):
        longer = [(*prefix, token) for prefix in open_prefixes for token in range(num_tokens)]
        answers += [y for y in longer if y[-1] == end_id or length == max_length]
        open_prefixes = [y for y in longer if y[-1] != end_id]
    return answers


def distribution(next_probabilities: NextProbabilities, answers: Sequence[Answer]) -> list[float]:
    """p(y) = prod_t p(y_t | y_<t) of each answer; sums to 1 over `every_answer`."""
    return [math.prod(next_probabilities(y[:t])[y[t]] for t in range(len(y))) for y in answers]


def next_probabilities_of(
    probabilities: Sequence[float], answers: Sequence[Answer], num_tokens: int
) -> NextProbabilities:
    """The conditionals of a distribution: p(token | prefix) = mass(prefix + token) / mass(prefix)."""

    def mass(prefix: Answer) -> float:
        pairs = zip(probabilities, answers, strict=True)
        return math.fsum(p for p, y in pairs if y[: len(prefix)] == prefix)

    return lambda prefix: [mass((*prefix, token)) / mass(prefix) for token in range(num_tokens)]


def kl_regularised_optimum(reference: Sequence[float], rewards: Sequence[float], beta: float) -> list[float]:
    """pi*(y), in the order of the arguments. An answer impossible under the reference stays impossible."""
    pairs = zip(reference, rewards, strict=True)
    log_weights = [math.log(q) + r / beta if q > 0 else -math.inf for q, r in pairs]
    highest = max(log_weights)
    weights = [math.exp(w - highest) for w in log_weights]
    return [w / math.fsum(weights) for w in weights]


def optimal_objective(reference: Sequence[float], rewards: Sequence[float], beta: float) -> float:
    """beta log Z: what the optimum attains, and nothing exceeds."""
    pairs = zip(reference, rewards, strict=True)
    return beta * math.log(math.fsum(q * math.exp(r / beta) for q, r in pairs))


def regularised_objective(
    policy: Sequence[float], reference: Sequence[float], rewards: Sequence[float], beta: float
) -> float:
    """E_policy[r] - beta KL(policy || reference)."""
    expected = math.fsum(p * r for p, r in zip(policy, rewards, strict=True))
    return expected - beta * kl_divergence(policy, reference)


def kl_divergence(policy: Sequence[float], reference: Sequence[float]) -> float:
    """KL(policy || reference) = sum_y policy(y) log(policy(y) / reference(y)), in nats."""
    return math.fsum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True) if p > 0)


def total_variation(p: Sequence[float], q: Sequence[float]) -> float:
    """Half the summed absolute difference: the largest error in the probability of any event."""
    return math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
