"""Draw the next token of each sequence, reproducibly, and say how likely it was.

Responsible for: the sampling settings, the random numbers, truncation, the draw and its log-probability.
Not responsible for: when a sequence stops (scheduler.py), or where the logits come from.

Randomness is a pure function: one uniform number per (seed, position), by an integer hash, turned into a
token by inverting the cumulative distribution. So a draw depends on its own logits, seed and position and on
nothing else in the batch, survives preemption, and needs no generator state. It costs about 50 microseconds on a
CPU core whatever the batch and vocabulary, once for some steps, where Gumbel noise, one number a vocabulary entry,
takes a millisecond a step for 64 x 1,024 of them.

The reported log-probability is that of the distribution actually drawn from: after repetition penalty,
temperature and truncation. Without penalty and truncation (PPO uses neither) it is log softmax(logits /
temperature). For greedy decoding it is that of temperature 1.

Shapes: S sequences (one new token each), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import GenerationError

_MASK_32 = 0xFFFFFFFF
MOST_TOP_LOGPROBS = 20
_DRAWS_AHEAD = 16
"""The number of draws whose random numbers are hashed together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The settings for drawing the tokens of one answer."""

    max_new_tokens: int
    """The most tokens to draw, the stop token included."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token (greedy)."""
    top_k: int | None = None
    """Keep only the k likeliest tokens."""
    top_p: float | None = None
    """Keep the smallest set of likeliest tokens that holds at least this probability."""
    min_p: float | None = None
    """Keep tokens at least this fraction as likely as the likeliest."""
    repetition_penalty: float | None = None
    """Makes tokens already in prompt or answer less likely (above 1): divides or multiplies their logits."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer; the one that ended it is part of the answer."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end the answer, which keeps the token that completes one."""
    top_logprobs: int = 0
    """The number of likeliest tokens to report at each place, at most 20."""

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        _require(
            self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1, or None for all tokens"
        )
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.min_p is None or 0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        penalty = self.repetition_penalty
        _require(penalty is None or penalty > 0, "repetition_penalty", penalty, "above 0 (1 = no penalty)")
        top = self.top_logprobs
        _require(0 <= top <= MOST_TOP_LOGPROBS, "top_logprobs", top, f"0 to {MOST_TOP_LOGPROBS}")
        _require("" not in self.stop_strings, "stop_strings", self.stop_strings, "non-empty texts")

    @property
    def truncates(self) -> bool:
        """Return whether some tokens may become impossible."""
        return not (self.top_k is None and self.top_p in (None, 1.0) and self.min_p in (None, 0.0))

    @property
    def mass_limit(self) -> float:
        """The bound that the probability mass before a kept token stays below.

        Without top-p it is out of reach: in float32 the sum of many probabilities comes to 1 before the last of them.
        """
        return 2.0 if self.top_p in (None, 1.0) else self.top_p

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty not in (None, 1.0)


@dataclass(slots=True, kw_only=True)
class SamplingRows:
    """The settings of the sequences that draw together, as columns on the device."""

    keys_S: Tensor
    positions_S: Tensor
    """The tokens each answer has already: the index of its first random number."""
    temperature_S: Tensor
    greedy_S: Tensor
    top_k_S: Tensor
    top_p_S: Tensor
    min_p_S: Tensor
    penalty_S: Tensor
    all_greedy: bool
    some_greedy: bool
    all_at_one: bool
    """True where all temperatures are 0 or 1: logits need no division."""
    truncates: bool
    penalises: bool
    num_likeliest: int
    seen_SV: Tensor | None = None
    """The tokens that are in each sequence already, marked True; only the repetition penalty needs them."""
    draws_ahead: int = _DRAWS_AHEAD
    """The number of draws whose random numbers are computed at once."""
    _num_drawn: int = 0
    _ahead_NS: Tensor | None = None

    @classmethod
    def of(
        cls,
        settings: Sequence[Sampling],
        seeds: Sequence[int],
        positions: Sequence[int],
        *,
        device: torch.device,
    ) -> SamplingRows:
        """Make the columns from settings; `positions`: the tokens that each answer has already."""

        def column(values: Sequence[Any], dtype: torch.dtype | None = None) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        temperatures = [s.temperature for s in settings]
        return cls(
            keys_S=random_keys(column([seed & (2**63 - 1) for seed in seeds])),
            positions_S=column(list(positions)),
            temperature_S=column([t or 1.0 for t in temperatures], torch.float64),
            greedy_S=column([t == 0 for t in temperatures]),
            top_k_S=column([s.top_k or 2**31 for s in settings]),
            top_p_S=column([s.mass_limit for s in settings]),
            min_p_S=column([s.min_p or 0.0 for s in settings]),
            penalty_S=column([s.repetition_penalty or 1.0 for s in settings]),
            all_greedy=not any(temperatures),
            some_greedy=0 in temperatures,
            all_at_one=all(t in (0, 1) for t in temperatures),
            truncates=any(s.truncates for s in settings),
            penalises=any(s.penalises for s in settings),
            num_likeliest=max((s.top_logprobs for s in settings), default=0),
        )

    def remember(self, token_ids: Sequence[Sequence[int]], vocabulary: int) -> None:
        """Note the tokens already in each sequence; only the repetition penalty needs them."""
        device = self.keys_S.device
        self.seen_SV = torch.zeros(len(token_ids), vocabulary, dtype=torch.bool, device=device)
        for row, ids in enumerate(token_ids):
            self.seen_SV[row, torch.tensor(list(ids), device=device)] = True

    def uniforms_S(self) -> Tensor:
        """Return the random number of each sequence's next token. The hash is computed for some draws at once."""
        if self.draws_ahead == 1:
            return uniforms(self.keys_S, self.positions_S + self._num_drawn)
        place = self._num_drawn % self.draws_ahead
        if place == 0 or self._ahead_NS is None:
            draws_N1 = torch.arange(self.draws_ahead, device=self.keys_S.device)[:, None] + self._num_drawn
            self._ahead_NS = uniforms(self.keys_S, self.positions_S + draws_N1)
        return self._ahead_NS[place]

    def advance(self, ids_S: Tensor) -> None:
        """Go on to the next random number after a draw, and note the tokens drawn."""
        self._num_drawn += 1
        if self.seen_SV is not None:
            self.seen_SV.scatter_(1, ids_S[:, None], True)


def sample_next(logits_SV: Tensor, rows: SamplingRows) -> tuple[Tensor, Tensor]:
    """Draw a token for each row: return ids and log-probabilities (float32, or float64 for float64 logits)."""
    logits_SV = adjusted(logits_SV, rows)
    probs_SV = logits_SV.softmax(dim=-1)
    if rows.all_greedy:
        ids_S = logits_SV.argmax(dim=-1)
    else:
        ids_S = invert_distribution(probs_SV, rows.uniforms_S())
        if rows.some_greedy:
            ids_S = torch.where(rows.greedy_S, logits_SV.argmax(dim=-1), ids_S)
    return ids_S, probs_SV.gather(1, ids_S[:, None]).squeeze(1).log()


def likeliest_next(logits_SV: Tensor, rows: SamplingRows, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` likeliest token ids and their log-probabilities [S, count], the likeliest first.

    They are those of the distribution that `sample_next` draws from; -inf: that token cannot be drawn.
    """
    top = adjusted(logits_SV, rows).softmax(dim=-1).topk(count, dim=-1)
    return top.indices, top.values.log()


def adjusted(logits_SV: Tensor, rows: SamplingRows) -> Tensor:
    """Return the logits of the distribution drawn from: after penalty, temperature and truncation."""
    if logits_SV.dtype in (torch.bfloat16, torch.float16):
        logits_SV = logits_SV.float()  # near -10 bfloat16 steps by 0.06: a log-probability would be 6 % off
    if rows.penalises and rows.seen_SV is not None:
        logits_SV = penalise_repetition(logits_SV, rows.seen_SV, rows.penalty_S)
    if not rows.all_at_one:
        logits_SV = logits_SV / rows.temperature_S[:, None].to(logits_SV.dtype)
    return keep_likely(logits_SV, rows) if rows.truncates else logits_SV


def invert_distribution(probs_SV: Tensor, uniforms_S: Tensor) -> Tensor:
    """Return the token whose slice of [0, 1) holds the uniform number."""
    # float64: in float32 the sum near 1 moves in steps of 6e-8, which would swallow rare tokens.
    cumulative_SV = probs_SV.cumsum(dim=-1, dtype=torch.float64)
    threshold_S1 = uniforms_S[:, None] * cumulative_SV[:, -1:]
    # right=True finds the first sum above the threshold, so a token of probability 0 can never be drawn.
    ids_S = torch.searchsorted(cumulative_SV, threshold_S1, right=True).squeeze(1)
    return ids_S.clamp_(max=probs_SV.shape[1] - 1)  # NaN logits must not give an id outside


def penalise_repetition(logits_SV: Tensor, seen_SV: Tensor, penalty_S: Tensor) -> Tensor:
    """Make tokens already seen less likely.  Keskar et al. 2019 (arXiv:1909.05858), section 4.1."""
    penalty_S1 = penalty_S[:, None].to(logits_SV.dtype)
    lowered_SV = torch.where(logits_SV > 0, logits_SV / penalty_S1, logits_SV * penalty_S1)
    return torch.where(seen_SV, lowered_SV, logits_SV)


def keep_likely(logits_SV: Tensor, rows: SamplingRows) -> Tensor:
    """Set the logits of all but the kept tokens to -inf: top-k first, top-p of what remains, then min-p."""
    sorted_SV, order_SV = logits_SV.sort(dim=-1, descending=True)
    rank_V = torch.arange(sorted_SV.shape[1], device=sorted_SV.device)
    keep_SV = rank_V < rows.top_k_S[:, None]
    probs_SV = sorted_SV.masked_fill(~keep_SV, -torch.inf).softmax(dim=-1)
    mass_before_SV = probs_SV.cumsum(dim=-1) - probs_SV
    keep_SV &= mass_before_SV < rows.top_p_S[:, None]
    keep_SV &= probs_SV >= rows.min_p_S[:, None] * probs_SV[:, :1]
    keep_SV[:, 0] = True  # rounding must never leave a row without tokens
    dropped_SV = torch.empty_like(keep_SV).scatter_(1, order_SV, ~keep_SV)
    return logits_SV.masked_fill(dropped_SV, -torch.inf)


def random_keys(seeds_S: Tensor) -> Tensor:
    """Return a well mixed 32-bit key for each 63-bit seed, so that neighbouring seeds have nothing in common."""
    return _mixed(_mixed(seeds_S & _MASK_32) ^ (seeds_S >> 32) ^ 0x5BD1E995)


def uniforms(keys_S: Tensor, positions_S: Tensor) -> Tensor:
    """Return the random number of each (key, position), float64 in (0, 1)."""
    return (_mixed(_mixed(positions_S ^ 0x3C6EF372) ^ keys_S) + 0.5).double() * 2.0**-32


def _mixed(x: Tensor) -> Tensor:
    """Mix x to 32 bits, each of which depends on every bit of x.

    The multipliers are those of Wellons' hash-prospector. Below 2**31, with operands below 2**32,
    they cannot overflow int64, so every device agrees.
    """
    x = x ^ (x >> 15)
    x = (x * 0x2C1B3C6D) & _MASK_32
    x = x ^ (x >> 12)
    x = (x * 0x297A2D39) & _MASK_32
    return x ^ (x >> 15)


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise GenerationError(f"{name} = {value!r} cannot be used", hint=f"set {name} to {wanted}")
