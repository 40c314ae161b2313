"""Find settings that make a run fit a machine.

Responsible for: which settings save memory, in the order of what they cost, and trying them. Not responsible for: the
plan of each (plan.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dovetail.config.run import RunConfig
from dovetail.errors import ConfigError
from dovetail.planning.plan import plan_of
from dovetail.planning.result import Machine, Plan

MOST = 3
"""The number of remedies that are worth reading."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """Overrides with which a run fits, and its plan."""

    overrides: tuple[str, ...]
    plan: Plan


def remedies(
    config: RunConfig, machine: Machine, *, rows: int, with_overrides: Callable[[tuple[str, ...]], RunConfig]
) -> list[Remedy]:
    """Return up to three ways to make the run fit, the fastest first; none if it fits as it is.

    with_overrides: loads the run with further overrides.
    """
    if plan_of(config, machine, rows=rows).fits:
        return []
    found: list[Remedy] = []
    for overrides in _candidates(config, machine):
        if any(set(remedy.overrides) <= set(overrides) for remedy in found):
            continue  # what fits needs nothing more
        try:
            plan = plan_of(with_overrides(overrides), machine, rows=rows)
        except ConfigError:
            continue  # settings that do not go together
        if plan.fits:
            found.append(Remedy(overrides, plan))
    return sorted(found, key=lambda remedy: remedy.plan.seconds)[:MOST]


def _candidates(config: RunConfig, machine: Machine) -> Iterator[tuple[str, ...]]:
    """Yield combinations of settings, fewer first."""
    stages = ("ppo", "sft") if config.algorithm != "dpo" else ("dpo", "sft")
    smaller = []
    tokens = config.ppo.micro_batch_tokens // 2
    while tokens >= max(
        config.data.max_tokens, config.data.max_prompt_tokens + config.ppo.sampling.max_new_tokens
    ):
        smaller.append(tuple(f"{stage}.micro_batch_tokens={tokens}" for stage in stages))
        tokens //= 2
    again = tuple(f"{stage}.activation_checkpointing=true" for stage in stages)
    smallest = smaller[-1:] or [()]
    yield from smaller
    yield again
    yield (*again, *smallest[0])
    yield ("ppo.offload_while_generating=true",)
    bases: list[tuple[str, ...]] = []
    if machine.processes > 1:
        bases.append(("zero_stage.actor=3", "zero_stage.reference=3"))
    if config.actor.lora is None:
        bases.append(("actor.lora.rank=64",))
        if machine.processes > 1:
            bases.append(("actor.lora.rank=64", "zero_stage.actor=3"))
    bases.append(
        ("zero_stage.actor=3", "offload.actor=true", "zero_stage.reference=3", "offload.reference=true")
    )
    for base in bases:
        for more in ((), *smaller, again, (*again, *smallest[0])):
            yield (*base, *more)
