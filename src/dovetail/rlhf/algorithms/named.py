"""Make a method from its name, or load a user's own.

Responsible for: the setting `algorithm`, with errors that say what is wrong. Not responsible for: the methods.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dovetail.config.policy import METHODS, PolicyConfig
from dovetail.config.stages import PpoConfig
from dovetail.errors import ConfigError
from dovetail.rlhf.algorithms.group import GroupMethod, WithoutCritic
from dovetail.rlhf.algorithms.imitation import Imitation
from dovetail.rlhf.algorithms.online_dpo import OnlineDpo
from dovetail.rlhf.algorithms.ppo import Ppo
from dovetail.rlhf.algorithms.protocol import Algorithm
from dovetail.rlhf.attempts import module_from_file, what_and_where

_MEMBERS = (
    "answers_per_prompt",
    "needs_critic",
    "needs_old_logprobs",
    "kl_in_reward",
    "refill_rounds",
    "kl_weight",
    "advantages",
    "prepared",
    "loss",
)
_CLASSES: dict[str, Callable[..., Algorithm]] = {
    "best_of_n": Imitation,
    "expert_iteration": Imitation,
    "online_dpo": OnlineDpo,
}


def algorithm_named(name: str, policy: PolicyConfig, config: PpoConfig) -> Algorithm:
    """Return the method of that name with the given settings, or the user's own of `file.py:Class`.

    Raises ConfigError if there is no such method, or if it and the settings of the loop contradict each other.
    """
    given = {key: value for key, value in policy.model_dump().items() if value is not None}
    if name in METHODS:
        found: Algorithm = _CLASSES.get(name, GroupMethod)(**METHODS[name] | given)
    elif ":" in name:
        found = _own(name, policy)
    elif name != "ppo":
        known = ", ".join(["ppo", *METHODS])
        raise ConfigError(
            f"algorithm = {name!r} is unknown", hint=f"write one of {known}, or path/to/file.py:Class"
        )
    else:
        return Ppo()
    _expect_consistent(name, found, config)
    return found


def _expect_consistent(name: str, algorithm: Algorithm, config: PpoConfig) -> None:
    """Raise ConfigError if the loop's settings ask for what the method does not have."""
    size = algorithm.answers_per_prompt
    if config.batch_size % size:
        raise ConfigError(
            f"ppo.batch_size = {config.batch_size} answers is not divisible by the {size} answers to each prompt of "
            f"algorithm = {name}",
            hint=f"set ppo.batch_size to {-(-config.batch_size // size) * size}, or policy.answers_per_prompt",
        )
    if isinstance(algorithm, WithoutCritic) and size < 2 and algorithm.compares_answers:
        raise ConfigError(
            f"policy.answers_per_prompt = {size}, but algorithm = {name} compares the answers to one prompt",
            hint="set policy.answers_per_prompt to 2 or more",
        )
    if config.dual_clip is not None and isinstance(algorithm, GroupMethod) and algorithm.ratio == "weight":
        raise ConfigError(
            f"ppo.dual_clip = {config.dual_clip:g} bounds a ratio from above where the advantage is negative, and "
            f"algorithm = {name} bounds its weights for all advantages",
            hint="remove ppo.dual_clip, or set the second number of policy.clip",
        )
    if isinstance(algorithm, OnlineDpo):
        _expect_pairs(config, size)
    if config.kl_target is not None and not algorithm.kl_in_reward:
        raise ConfigError(
            f"ppo.kl_target = {config.kl_target:g} moves the KL penalty in the reward, and algorithm = {name} has none",
            hint="remove ppo.kl_target, or set policy.kl=reward",
        )
    if config.approx_kl_stop is not None and not algorithm.needs_old_logprobs:
        raise ConfigError(
            f"ppo.approx_kl_stop = {config.approx_kl_stop:g} measures the KL from the actor before the update, which "
            f"algorithm = {name} does not compare with",
            hint="remove ppo.approx_kl_stop",
        )
    if config.whiten_rewards and not algorithm.needs_critic:
        raise ConfigError(
            f"ppo.whiten_rewards = true scales the rewards of tokens, and algorithm = {name} learns from whole answers",
            hint="set ppo.whiten_rewards=false",
        )


def _expect_pairs(config: PpoConfig, size: int) -> None:
    """Raise ConfigError if minibatches would cut pairs, or the loss would be a constant."""
    prompts = config.batch_size // size
    if prompts % config.minibatches:
        raise ConfigError(
            f"ppo.minibatches = {config.minibatches} does not divide the {prompts} prompts of a rollout, whose "
            "pairs of answers stay together with algorithm = online_dpo",
            hint=f"set ppo.batch_size to a multiple of {size * config.minibatches}",
        )
    if config.kl_coefficient == 0:
        raise ConfigError(
            "ppo.kl_coefficient = 0 is the beta of algorithm = online_dpo, whose loss would be a constant",
            hint="set ppo.kl_coefficient to more than 0, such as 0.1",
        )


def _own(spec: str, policy: PolicyConfig) -> Algorithm:
    """Load the class of a user's file and make it with the group `policy`."""
    file, _, name = spec.rpartition(":")
    try:
        found: Any = getattr(module_from_file(Path(file), "algorithm"), name)(policy)
    except (Exception, SystemExit) as error:  # whatever the user's file does when it is run
        raise ConfigError(
            f"algorithm = {spec!r} cannot be loaded: {what_and_where(error)}",
            hint="write path/to/file.py:Class; the class is called with the settings of the group policy",
        ) from error
    missing = [member for member in _MEMBERS if not hasattr(found, member)]
    if missing:
        raise ConfigError(
            f"algorithm = {spec!r} has no {', '.join(missing)}",
            hint="see the protocol Algorithm in dovetail.rlhf.algorithms.protocol",
        )
    return found  # type: ignore[no-any-return]
