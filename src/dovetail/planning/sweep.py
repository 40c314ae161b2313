"""The tables and figures of the predecessor for this engine, beside what it published.

Responsible for: the cells, each measured or predicted, and DeepSpeed-Chat's figures (its blog "DeepSpeed Chat: Easy,
Fast and Affordable RLHF Training of ChatGPT-like Models at All Scales" and arXiv:2308.01320).
Not responsible for: the plan of a cell (plan.py), the page around the tables (page.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

from dovetail.config.load import check
from dovetail.config.run import RunConfig
from dovetail.planning.architecture import Shape, shape_of
from dovetail.planning.hardware import GPUS_PER_NODE, gpu_named
from dovetail.planning.measured import measured
from dovetail.planning.plan import plan_of
from dovetail.planning.report import duration
from dovetail.planning.result import Machine, Plan

PAIRS = 264_292
"""DeepSpeed-Chat's epoch: prompts of 256 and answers of 256 tokens, at most 1,024 pairs a step."""
BATCH = 1024
MODELS = (
    "opt-125m",
    "opt-350m",
    "opt-1.3b",
    "opt-2.7b",
    "opt-6.7b",
    "opt-13b",
    "opt-30b",
    "opt-66b",
    "opt-175b",
)
LORA_FROM = 6e9
"""Models of so many weights learn through adapters of rank 128, as in DeepSpeed-Chat's scripts; smaller ones whole."""

TABLE_1 = {  # README's table, a superset of tables 1 and 2
    ("v100-32g", 1): {"opt-1.3b": "1.8 days"},
    ("a6000-48g", 1): {"opt-1.3b": "1.1 days", "opt-6.7b": "5.6 days"},
    ("a100-40g", 1): {"opt-1.3b": "15.4 h", "opt-6.7b": "3.4 days"},
    ("a100-80g", 1): {"opt-1.3b": "11.7 h", "opt-6.7b": "1.7 days", "opt-13b": "4.9 days"},
    ("a100-40g", 8): {"opt-1.3b": "2 h", "opt-6.7b": "5.7 h", "opt-13b": "10.8 h", "opt-30b": "1.85 days"},
    ("a100-80g", 8): {
        "opt-1.3b": "1.4 h ($45)", "opt-6.7b": "4.1 h ($132)", "opt-13b": "9 h ($290)", "opt-30b": "18 h ($580)",
        "opt-66b": "2.1 days ($1,620)",
    },
    ("a100-80g", 64): {
        "opt-1.3b": "31 min", "opt-6.7b": "51 min", "opt-13b": "1.25 h ($320)", "opt-30b": "4 h ($1,024)",
        "opt-66b": "7.5 h ($1,920)", "opt-175b": "20 h ($5,120)",
    },
    ("h100-80g", 1): {}, ("h200-141g", 1): {}, ("b200", 1): {}, ("h100-80g", 8): {}, ("h200-141g", 8): {},
}  # fmt: skip
SIZES = ("opt-1.3b", "opt-6.7b", "opt-13b", "opt-30b", "opt-66b", "opt-175b")
TABLE_3 = {"v100-32g": "opt-2.7b", "a6000-48g": "opt-6.7b", "a100-40g": "opt-6.7b", "a100-80g": "opt-13b"}
END_TO_END = (
    (4, "opt-13b", "a100-40g", 8, 660_730, ("2.5 h", "0.25 h", "10.8 h", "13.6 h")),
    (5, "opt-66b", "a100-80g", 64, 660_730, ("82 min", "5 min", "7.5 h", "9 h")),
    (6, "opt-1.3b", "a6000-48g", 1, 76_256, ("2,900 s", "670 s", "1.2 h", "2.2 h")),
)
"""Number of the table, actor, GPU, GPUs, rows of all stages (two, four and four tenths), published times."""
FIGURE_3 = {"opt-1.3b": (4.8, 0.095, 0.48), "opt-6.7b": (0.88, None, None)}
FIGURE_4 = {
    "opt-125m": (97, 16, 68), "opt-1.3b": (39.5, 2.2, 3.8), "opt-6.7b": (12.9, 0.68, None),
    "opt-13b": (6.8, None, None),
}  # fmt: skip
"""Sequences a second of DeepSpeed-Chat, Colossal-AI and Hugging Face DDP, read off the bars; None: out of memory."""
FIGURE_6 = {
    ("opt-1.3b", 8): (23.8, 62.9, 43.4), ("opt-6.7b", 8): (32.9, 100.7, 71.2), ("opt-13b", 8): (33.0, 97.3, 67.1),
    ("opt-30b", 32): (48.2, 103.6, 82.0), ("opt-66b", 16): (29.3, 110.4, 67.8), ("opt-175b", 64): (25.4, 74.4, 52.8),
}  # fmt: skip
"""TFLOP/s of a GPU in generation, training and both, by DeepSpeed-Chat's formula, on A100s."""
FIGURE_7 = {
    ("opt-13b", "a100-40g"): (7, 14.2, 23.5, 48),
    ("opt-66b", "a100-80g"): (1.5, 3.3, 5.7, 10),
}
"""Sequences a second on 1, 2, 4 and 8 nodes of 8."""


def run_of(
    model: str, *, all_weights: bool | None = None, stages: Sequence[str] = ("ppo",), **ppo: object
) -> RunConfig:
    """Return a run of DeepSpeed-Chat's workload with an OPT-350M critic and reward model."""
    whole = shape_of(model).num_weights < LORA_FROM if all_weights is None else all_weights
    adapters = {} if whole else {"lora": {"rank": 128, "alpha": 16}}
    return check(
        {
            "actor": {"path": model, **adapters},
            "reward_model": {"path": "opt-350m"},
            "output_dir": "runs/sweep",
            "stages": stages,
            "sft": {"micro_batch_tokens": ppo.get("micro_batch_tokens", 8192)},
            "ppo": {"batch_size": BATCH, **ppo},
        }
    )


@cache
def fastest(
    model: str, gpu: str, gpus: int, *, all_weights: bool | None = None, stages: tuple[str, ...] = ("ppo",),
    rows: int = PAIRS,
) -> Plan | None:  # fmt: skip
    """Return the fastest plan that fits, over micro-batches, ZeRO stages and groups that generate; None if none does.

    Where none fits the cards, actor and reference are kept in host memory, as much as that takes.
    """
    on_cards = _fastest(model, gpu, gpus, all_weights, stages, rows, from_host=False)
    return on_cards or _fastest(model, gpu, gpus, all_weights, stages, rows, from_host=True)


def _fastest(
    model: str, gpu: str, gpus: int, all_weights: bool | None, stages: tuple[str, ...], rows: int, *, from_host: bool
) -> Plan | None:  # fmt: skip
    nodes = max(1, gpus // GPUS_PER_NODE)
    machine = Machine(gpu=gpu_named(gpu), num_gpus=gpus // nodes, num_nodes=nodes)
    found: list[Plan] = []
    for micro in (16384, 8192, 2048, 512):
        base = run_of(model, all_weights=all_weights, stages=stages, micro_batch_tokens=micro)
        for stage, split in itertools.product((3,) if from_host else (1, 3) if gpus > 1 else (1,), (1, 2, 8)):
            if split > machine.num_gpus:
                continue
            zero = {"actor": stage, "reference": 3 if stage == 3 else 0}
            config = base.model_copy(
                update={
                    "zero_stage": base.zero_stage.model_copy(update=zero),
                    "tensor_parallel": base.tensor_parallel.model_copy(update={"generation": split}),
                    "offload": base.offload.model_copy(update={"actor": from_host, "reference": from_host}),
                }
            )
            plan = plan_of(config, machine, rows=rows)
            found += [plan] if plan.fits else []
    return min(found, key=lambda plan: plan.seconds, default=None)


def rate_of(plan: Plan | None) -> float | None:
    """Return sequences a second of PPO."""
    return None if plan is None else BATCH / plan.stages[-1].step_seconds


def tables() -> Iterator[str]:
    """Yield all tables and figures as Markdown."""
    yield from epochs()
    yield from largest()
    yield from end_to_end()
    yield from throughput("Figure 3", "one A100 40GB", FIGURE_3, 1)
    yield from throughput("Figure 4", "8 A100 40GB", FIGURE_4, 8)
    yield from figure_6()
    yield from figure_7()


def epochs() -> Iterator[str]:
    """Yield tables 1 and 2: hours and dollars of an epoch of step 3."""
    yield "### Tables 1 and 2: one epoch of step 3"
    yield ""
    yield f"{PAIRS:,} pairs of 256 + 256 tokens: ours, its cost at the catalogue's price; in brackets, theirs."
    yield ""
    yield row(["GPUs", *(name.upper() for name in SIZES)])
    yield rule(1 + len(SIZES))
    for (gpu, gpus), published in TABLE_1.items():
        cells = [epoch_cell(model, gpu, gpus, published.get(model)) for model in SIZES]
        yield row([f"{gpus} x {gpu_named(gpu).name}", *cells])
    yield ""


def epoch_cell(model: str, gpu: str, gpus: int, published: str | None) -> str:
    """Return the time of an epoch: measured by a few steps where there is such a row, else predicted."""
    beside = f" [{published}]" if published else ""
    known = [one for one in measured() if (one.actor, one.gpu, one.prompt, one.new) == (model, gpu, 256, 256)]
    is_whole = shape_of(model).num_weights < LORA_FROM
    known = [one for one in known if bool(one.lora) != is_whole]
    if gpus == 1 and known:
        best = max(known, key=lambda one: one.batch / one.step_seconds)
        seconds = PAIRS / best.batch * best.step_seconds
        return f"{duration(seconds)} m{' f' if best.fitted else ''}{beside}"
    plan = fastest(model, gpu, gpus)
    if plan is None:
        return f"does not fit p{beside}"
    seconds = PAIRS / BATCH * plan.stages[-1].step_seconds
    mark = "p h" if is_from_host(plan) else "p"
    return f"{duration(seconds)}, ${seconds * plan.machine.dollars_per_second:,.0f} {mark}{beside}"


def is_from_host(plan: Plan) -> bool:
    """Return whether the plan keeps models in host memory."""
    return any(stage.on_host for stage in plan.stages)


def largest() -> Iterator[str]:
    """Yield table 3: the largest model that fits one GPU."""
    yield "### Table 3: the largest OPT on one GPU"
    yield ""
    yield "With the host's memory: all weights, actor and reference in host memory, and how much of it that takes."
    yield ""
    yield row(["GPU", "all weights", "adapters of rank 128", "with the host's memory", "published"])
    yield rule(5)
    for gpu in (*TABLE_3, "l4", "rtx-4090", "rtx-5090", "l40s", "h100-80g", "h200-141g", "b200"):
        cells = []
        for all_weights in (True, False):
            fitting = [
                model for model in MODELS if fastest(model, gpu, 1, all_weights=all_weights) is not None
            ]
            cells.append(f"{fitting[-1].upper()} p" if fitting else "none p")
        yield row([gpu_named(gpu).name, *cells, TABLE_3.get(gpu, "").upper()])
    yield ""


def end_to_end() -> Iterator[str]:
    """Yield tables 4 to 6: the three stages, one pass each."""
    yield "### Tables 4 to 6: all three steps, one pass each"
    yield ""
    yield row(["table", "machine", "actor", "step 1", "step 2", "step 3", "all"])
    yield rule(7)
    for number, model, gpu, gpus, rows, published in END_TO_END:
        plan = fastest(model, gpu, gpus, stages=("sft", "reward", "ppo"), rows=rows)
        seconds: list[float | None] = [None] * 4
        if plan is not None:
            seconds = [*(stage.seconds for stage in plan.stages), plan.seconds]
        cells = [
            f"{'does not fit' if ours is None else duration(ours)} p [{theirs}]"
            for ours, theirs in zip(seconds, published, strict=True)
        ]
        yield row([str(number), f"{gpus} x {gpu_named(gpu).name}", model.upper(), *cells])
    yield ""


def throughput(
    title: str, machine: str, published: Mapping[str, tuple[float | None, ...]], gpus: int
) -> Iterator[str]:  # fmt: skip
    """Yield figure 3 or 4: sequences a second of step 3."""
    yield f"### {title}: sequences a second of step 3, {machine}"
    yield ""
    yield row(["actor", "Dovetail", "DeepSpeed-Chat", "Colossal-AI", "Hugging Face DDP"])
    yield rule(5)
    for model, theirs in published.items():
        ours = rate_of(fastest(model, "a100-40g", gpus))
        cells = ["out of memory" if rate is None else f"{rate:g}" for rate in theirs]
        yield row([model.upper(), number(ours), *cells])
    yield ""


def figure_6() -> Iterator[str]:
    """Yield figure 6: TFLOP/s of a GPU by the predecessor's formula."""
    yield "### Figure 6: TFLOP/s of each A100 80GB, by DeepSpeed-Chat's formula"
    yield ""
    yield row(["actor", "GPUs", "generation", "training", "both"])
    yield rule(5)
    for (model, gpus), published in FIGURE_6.items():
        plan = fastest(model, "a100-80g", gpus)
        ours: list[float | None] = [None] * 3 if plan is None else tflops(plan, gpus)
        cells = [f"{number(value)} [{theirs}]" for value, theirs in zip(ours, published, strict=True)]
        yield row([model.upper(), str(gpus), *cells])
    yield ""


def tflops(plan: Plan, gpus: int) -> list[float | None]:
    """Return TFLOP/s of generation, training and both, by the predecessor's formula."""
    stage = plan.stages[-1]
    seconds = {phase.name: sum(phase.seconds.values()) for phase in stage.phases}
    generated = predecessor_flop(plan.actor, BATCH, 512)
    passes = 4.0 if stage.is_checkpointed else 3.0
    passes -= 1 - 2 * 128 / plan.actor.architecture.width if plan.actor.num_weights >= LORA_FROM else 0.0
    trained = passes * generated + 3 * predecessor_flop(plan.reward_model, BATCH, 512)
    each = gpus * 1e12
    whole = generated + trained
    return [
        generated / seconds["generate"] / each,
        trained / seconds["train"] / each,
        whole / stage.step_seconds / each,
    ]


def predecessor_flop(shape: Shape, sequences: int, length: int) -> float:
    """Count the FLOP of a forward pass as its perf.py does: 24 B s L h^2 (1 + s / 6h + V / 16Lh)."""
    h, layers, vocabulary = (
        shape.architecture.width,
        shape.architecture.num_layers,
        shape.architecture.vocabulary,
    )
    return 24 * sequences * length * layers * h * h * (1 + length / (6 * h) + vocabulary / (16 * layers * h))


def figure_7() -> Iterator[str]:
    """Yield figure 7: how step 3 scales over nodes."""
    yield "### Figure 7: sequences a second of step 3 on nodes of 8 GPUs"
    yield ""
    yield row(["actor", "GPU", "1 node", "2 nodes", "4 nodes", "8 nodes"])
    yield rule(6)
    for (model, gpu), published in FIGURE_7.items():
        rates = [rate_of(fastest(model, gpu, 8 * nodes)) for nodes in (1, 2, 4, 8)]
        cells = [f"{number(ours)} [{theirs:g}]" for ours, theirs in zip(rates, published, strict=True)]
        yield row([model.upper(), gpu_named(gpu).name, *cells])
    yield ""


def scaling() -> Iterator[str]:
    """Yield a table of step 3 with all weights on 1 to 512 H100s."""
    yield row(["actor", "GPUs", "generate", "score", "train", "step", "sequences/s", "efficiency"])
    yield rule(8)
    for model in ("opt-1.3b", "opt-13b", "opt-66b", "opt-175b"):
        first = None
        for gpus in (2**i for i in range(10)):
            plan = fastest(model, "h100-80g", gpus, all_weights=True)
            if plan is None:
                continue
            stage = plan.stages[-1]
            rate = BATCH / stage.step_seconds
            first = first or rate / gpus
            phases = [f"{sum(phase.seconds.values()):.3g}" for phase in stage.phases]
            cells = [*phases, f"{stage.step_seconds:.3g}", f"{rate:,.3g}" if rate < 1000 else f"{rate:,.0f}"]
            yield row([model.upper(), str(gpus), *cells, f"{rate / gpus / first:.2f}"])


def number(value: float | None) -> str:
    """Write a predicted number to three digits."""
    return "does not fit p" if value is None else f"{value:.3g} p"


def row(cells: Sequence[str]) -> str:
    """Write a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def rule(columns: int) -> str:
    """Write the line under the head of a Markdown table."""
    return "|---" * columns + "|"
