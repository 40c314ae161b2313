"""The settings of the methods without a critic, and their defaults by name.

Responsible for: the group `policy` of a configuration. Not responsible for: the equations (maths/groups.py), the loop's
settings (stages.py).
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from dovetail.config.frozen import FrozenModel

Bound = Annotated[float, Field(ge=0)]

_GRPO: dict[str, Any] = {
    "answers_per_prompt": 8,
    "advantages_by": "group_std",
    "ratio": "token",
    "clip": (0.2, 0.2),
    "aggregation": "sequence_mean",
    "kl": "k3",
    "drop_equal_groups": False,
    "refill_rounds": 0,
    "overlong_tokens": 0,
}
_PICKED: dict[str, Any] = {
    "answers_per_prompt": 8,
    "aggregation": "token_mean",
    "refill_rounds": 0,
    "overlong_tokens": 0,
}
METHODS: dict[str, dict[str, Any]] = {
    "grpo": _GRPO,
    "dr_grpo": _GRPO | {"advantages_by": "group_mean", "aggregation": "constant_length", "kl": "none"},
    "dapo": _GRPO
    | {
        "clip": (0.2, 0.28),
        "aggregation": "token_mean",
        "kl": "none",
        "drop_equal_groups": True,
        "refill_rounds": 9,
    },
    "gspo": _GRPO | {"ratio": "sequence", "clip": (3e-4, 4e-4), "kl": "none"},
    "cispo": _GRPO | {"ratio": "weight", "clip": (1.0, 4.0), "aggregation": "token_mean", "kl": "none"},
    "rloo": _GRPO
    | {
        "answers_per_prompt": 4,
        "advantages_by": "leave_one_out",
        "aggregation": "constant_length",
        "kl": "reward",
    },
    "reinforce_plus_plus": _GRPO
    | {"answers_per_prompt": 1, "advantages_by": "batch", "aggregation": "token_mean", "kl": "reward"},
    "reinforce_plus_plus_baseline": _GRPO
    | {"advantages_by": "batch_of_groups", "aggregation": "token_mean", "kl": "k2"},
    "best_of_n": _PICKED | {"drop_equal_groups": True},
    "expert_iteration": _PICKED | {"min_reward": 1.0},
    "online_dpo": {"answers_per_prompt": 2, "refill_rounds": 0, "overlong_tokens": 0},
}
"""The defaults of each method, which are all the settings that it takes: papers, TRL for 8 answers per prompt, and for
CISPO's weights of at most 5 what TRL recommends after Khatri et al. 2025 (ScaleRL, arXiv:2510.13786)."""


class PolicyConfig(FrozenModel):
    """The settings of a method without a critic; null = the default of `algorithm` (docs/algorithms.md)."""

    advanced: ClassVar[frozenset[str]] = frozenset(
        {"clip", "aggregation", "kl", "drop_equal_groups", "refill_rounds", "min_reward", "overlong_tokens"}
    )

    answers_per_prompt: PositiveInt | None = None
    """Answers to each prompt of a rollout; `ppo.batch_size` counts answers, so it is a multiple of this."""
    clip: tuple[Bound, Bound] | None = None
    """The ratio is clipped to [1 - first, 1 + second]."""
    aggregation: Literal["sequence_mean", "token_mean", "constant_length"] | None = None
    """The mean that the loss is: over answers, over tokens, or over answers of `ppo.sampling.max_new_tokens`."""
    kl: Literal["none", "reward", "k2", "k3"] | None = None
    """The place of the KL to the reference, with the weight `ppo.kl_coefficient`: nowhere, in the reward of each token
    (k1), or in the loss by one of two estimators."""
    drop_equal_groups: bool | None = None
    """Leave out the prompts whose answers all have the same reward."""
    refill_rounds: NonNegativeInt | None = None
    """The most times that a rollout asks further prompts in the place of those that are left out. After that it goes on
    with fewer, and `ppo/unfilled_fraction` says how many are missing. DAPO asks ten times in all, as verl's recipe."""
    min_reward: float | None = Field(default=None, allow_inf_nan=False)
    """`expert_iteration` learns from the answers with at least this reward; by default 1, the verifiers' full one."""
    overlong_tokens: NonNegativeInt | None = None
    """The penalty of long answers rises from 0 to 1 over the last so many tokens before
    `ppo.sampling.max_new_tokens`; 0 = no penalty. The DAPO paper takes a fifth of the limit; set
    `ppo.cut_off_answers: keep_score` with it, which would be a second penalty."""
