"""A plan in words: tables of memory and time, whether it fits, and what makes it fit.

Responsible for: text for the terminal. Not responsible for: the numbers (plan.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dovetail.planning.fit import Remedy
from dovetail.planning.result import Plan, Stage

GIB = 2**30
TITLES = {"sft": "SFT", "reward": "reward model", "ppo": "PPO", "dpo": "DPO"}


def lines_of(plan: Plan, remedies: Sequence[Remedy]) -> Iterator[str]:
    """Yield the lines of a plan."""
    machine = plan.machine
    nodes = f" on each of {machine.num_nodes} nodes" if machine.num_nodes > 1 else ""
    yield (
        f"{plan.actor.name} ({count(plan.actor.num_weights)} weights) with {plan.reward_model.name} as reward model "
        f"({count(plan.reward_model.num_scalar_weights)}), {machine.num_gpus} x {machine.gpu.name}{nodes}"
    )
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _verdict(plan, remedies)
    yield ""
    yield from _time(plan)


def short(plan: Plan) -> str:
    """Return a plan in one line: the peak, and what a step of each stage takes."""
    steps = ", ".join(f"{TITLES[stage.name]} {stage.step_seconds:.3g} s" for stage in plan.stages)
    usable = plan.machine.gpu.usable_bytes / GIB
    verdict = "" if plan.fits else ", which is too much: `dovetail plan` says what fits"
    return (
        f"plan: at most {plan.peak / GIB:.1f} GiB of {usable:.1f} GiB ({plan.machine.gpu.name}){verdict}; "
        f"a step, at full length: {steps}"
    )


def _memory(plan: Plan) -> Iterator[str]:
    columns = [
        (f"{TITLES[stage.name]}" if len(stage.phases) == 1 else f"{phase.name}", phase)
        for stage in plan.stages
        for phase in stage.phases
    ]
    items = list(dict.fromkeys(name for _, phase in columns for name in phase.items))
    width = max(map(len, [*items, "GiB of each process, at the peak of"]))
    yield "  ".join(
        [f"{'GiB of each process, at the peak of':<{width}}", *(f"{name:>12}" for name, _ in columns)]
    )
    for item in items:
        cells = [phase.items.get(item, 0.0) / GIB for _, phase in columns]
        yield "  ".join(
            [f"{item:<{width}}", *(f"{cell:12.2f}" if cell else " " * 12 for cell in cells)]
        ).rstrip()
    peaks = [f"{phase.peak / GIB:12.2f}" for _, phase in columns]
    yield "  ".join([f"{'peak':<{width}}", *peaks])


def _verdict(plan: Plan, remedies: Sequence[Remedy]) -> Iterator[str]:
    usable = plan.machine.gpu.usable_bytes / GIB
    verdict = "fits" if plan.fits else "does not fit"
    yield f"{verdict}: {plan.peak / GIB:.1f} GiB of the {usable:.1f} GiB that torch can use ({plan.machine.gpu.name})"
    for stage in plan.stages:
        if stage.is_checkpointed:
            yield f"{TITLES[stage.name]}: activations are recomputed (activation_checkpointing)"
        if host := sum(stage.on_host.values()):
            yield f"{TITLES[stage.name]}: {host / GIB:.0f} GiB of host memory for each process"
    for remedy in remedies:
        yield (
            f"it fits with {' '.join(remedy.overrides)}: {remedy.plan.peak / GIB:.1f} GiB, "
            f"{duration(remedy.plan.seconds)}, ${remedy.plan.dollars:,.2f}"
        )
    if not plan.fits and not remedies:
        yield "no setting that is known makes it fit: take more GPUs, larger ones, or a smaller model"


def _time(plan: Plan) -> Iterator[str]:
    for stage in plan.stages:
        yield _stage_line(stage)
        for phase in stage.phases:
            seconds = sum(phase.seconds.values())
            parts = sorted(phase.seconds.items(), key=lambda part: -part[1])
            listed = ", ".join(
                f"{name} {value / seconds:.0%}" for name, value in parts if value >= 0.01 * seconds
            )
            yield f"  {phase.name:<9} {seconds:8.3f} s  {listed}"
    price = plan.dollars / plan.seconds * 3600
    yield f"all stages: {duration(plan.seconds)}, ${plan.dollars:,.2f} at ${price:,.2f} an hour"
    yield "without loading, evaluation and saving; every row as long as data.max_tokens and ppo.sampling allow"


def _stage_line(stage: Stage) -> str:
    rate = stage.tokens_per_step / stage.step_seconds
    at_once = f", {stage.running} answers at once" if stage.running else ""
    return (
        f"{TITLES[stage.name]}: {stage.steps:,} steps of {stage.step_seconds:.3g} s, {duration(stage.seconds)} for "
        f"{stage.rows:,} rows; {rate:,.0f} tokens/s{at_once}"
    )


def count(number: float) -> str:
    """Write a number of weights as people do: 1.32B, 125M."""
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


def duration(seconds: float) -> str:
    """Write a time in the largest unit that it fills: 42 s, 12 min, 3.4 h, 2.1 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
