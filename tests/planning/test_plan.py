"""Plans of whole runs: what is in memory in which phase, what fits, and what follows from more GPUs."""

from typing import Any

import pytest

from dovetail.config.load import load
from dovetail.planning.fit import remedies
from dovetail.planning.hardware import gpu_named, gpus
from dovetail.planning.memory import SLACK, total
from dovetail.planning.plan import plan_of
from dovetail.planning.result import Machine, Phase, Plan

GIB = 2**30


def planned(recipe: str, *overrides: str, gpu: str = "h100", **machine: Any) -> Plan:
    return plan_of(load(recipe, overrides), Machine(gpu=gpu_named(gpu), **machine))


def phase_of(plan: Plan, name: str) -> Phase:
    return next(phase for phase in plan.stages[-1].phases if phase.name == name)


def test_ppo_holds_four_models_and_two_optimisers_in_every_phase() -> None:
    plan = planned("opt-1.3b")
    weights, small = 1315758080, 331196928
    for phase in plan.stages[-1].phases:
        assert phase.items["actor weights"] == phase.items["reference weights"] == 2 * weights
        assert phase.items["critic weights"] == phase.items["reward model weights"] == 2 * small
        assert phase.items["actor master weights"] == phase.items["actor moving average"] == 4 * weights
        assert phase.items["critic moments"] == 8 * small
    assert "KV cache" in phase_of(plan, "generate").items
    assert "actor gradients" in phase_of(plan, "train").items
    assert [stage.name for stage in plan.stages] == ["sft", "reward", "ppo"]


@pytest.mark.parametrize(("overrides", "item", "is_there"), [
    (("actor.lora.rank=8",), "reference weights", False),
    (("algorithm=grpo", "policy.answers_per_prompt=4"), "critic weights", False),
    (("ppo.reward_function=exact",), "reward model weights", False),
    (("ppo.reward_function=exact", "ppo.reward_function_weight=1"), "reward model weights", True),
    (("ppo.offload_while_generating=true",), "actor moments", False),
    (("precision=fp32",), "actor master weights", False),
])  # fmt: skip
def test_settings_decide_what_is_held_while_answers_are_generated(
    overrides: tuple[str, ...], item: str, is_there: bool
) -> None:
    assert (item in phase_of(planned("opt-1.3b", *overrides), "generate").items) == is_there


def test_what_is_parked_is_in_the_host_s_memory_and_back_to_train() -> None:
    plan = planned("opt-1.3b", "ppo.offload_while_generating=true")
    assert phase_of(plan, "train").items["actor moments"] == plan.stages[-1].on_host["actor moments"]


def test_the_cache_takes_what_is_left_and_fewer_answers_run_at_once() -> None:
    roomy, tight = (
        planned("opt-13b", gpu="h200"),
        planned(
            "opt-13b",
            gpu="a6000",
        ),
    )
    assert roomy.stages[-1].running == 64
    assert tight.stages[-1].running is not None
    assert 1 <= tight.stages[-1].running < 64
    assert phase_of(tight, "generate").peak <= gpu_named("a6000").usable_bytes
    assert (
        phase_of(tight, "generate").seconds["reading weights"]
        > phase_of(roomy, "generate").seconds["reading weights"]
    )


def test_activations_are_recomputed_where_a_step_would_not_fit_otherwise() -> None:
    settings = ("ppo.micro_batch_tokens=16384",)
    roomy, tight = (planned("opt-1.3b", *settings, gpu=gpu) for gpu in ("h100", "a6000"))
    assert not roomy.stages[-1].is_checkpointed
    assert tight.stages[-1].is_checkpointed
    gradients = phase_of(roomy, "train"), phase_of(tight, "train")
    assert gradients[0].items["actor activations"] > 4 * gradients[1].items["actor activations"]
    assert planned("opt-1.3b", "ppo.activation_checkpointing=false", *settings, gpu="a6000").fits is False


def test_shards_shrink_with_the_processes_and_steps_get_shorter() -> None:
    zero = ("zero_stage.actor=3", "zero_stage.reference=3")
    one = planned("opt-6.7b", "actor.lora=null", *zero)
    eight = planned("opt-6.7b", "actor.lora=null", *zero, num_gpus=8)
    assert not one.fits
    assert eight.fits
    whole, part = phase_of(one, "train").items, phase_of(eight, "train").items
    assert part["actor master weights"] == whole["actor master weights"] / 8
    assert part["reward model weights"] == whole["reward model weights"]
    assert eight.stages[-1].step_seconds < one.stages[-1].step_seconds / 5


def test_tensor_parallel_training_cuts_every_model() -> None:
    plan = planned("opt-66b", "tensor_parallel.training=8", num_gpus=8)
    assert phase_of(plan, "train").items["reward model weights"] == 2 * 331196928 / 8


def test_the_remedies_fit_and_the_fastest_comes_first() -> None:
    config = load("opt-13b", ("actor.lora=null",))
    machine = Machine(gpu=gpu_named("a100-80g"))
    found = remedies(
        config, machine, rows=1000, with_overrides=lambda more: load("opt-13b", ("actor.lora=null", *more))
    )
    assert found
    assert all(way.plan.fits for way in found)
    assert [way.plan.seconds for way in found] == sorted(way.plan.seconds for way in found)
    assert ("actor.lora.rank=64",) in [way.overrides for way in found]
    fitting = load("opt-1.3b")
    assert remedies(fitting, machine, rows=1000, with_overrides=lambda more: fitting) == []


def test_a_plan_fits_if_its_peak_and_what_allocators_lose_do() -> None:
    plan = planned("opt-1.3b")
    assert plan.fits == (plan.peak * SLACK <= plan.machine.gpu.usable_bytes)
    assert plan.peak == max(total(phase.items) for stage in plan.stages for phase in stage.phases)


def test_rows_are_shared_out_and_steps_multiply() -> None:
    config = load("opt-1.3b", ("data.stage_split=[1,0,3]",))
    plan = plan_of(config, Machine(gpu=gpu_named("h100")), rows=6400)
    assert [stage.rows for stage in plan.stages] == [1600, 0, 4800]
    assert plan.stages[-1].steps == 4800 // 64
    assert plan.stages[-1].seconds == 75 * plan.stages[-1].step_seconds
    short = plan_of(load("opt-1.3b", ("ppo.max_steps=5",)), Machine(gpu=gpu_named("h100")))
    assert short.stages[-1].steps == 5


def test_cost_is_hours_times_gpus_times_price() -> None:
    machine = Machine(gpu=gpu_named("h100"), num_gpus=4, num_nodes=2, price=2.5)
    plan = plan_of(load("opt-1.3b"), machine)
    assert plan.dollars == pytest.approx(plan.seconds / 3600 * 8 * 2.5)


def test_every_gpu_has_figures_and_their_sources() -> None:
    assert len(gpus()) == 11
    for gpu in gpus().values():
        assert gpu.source
        assert gpu.price_source
        assert 20 < gpu.memory < 200
        assert gpu.bytes_per_second > 2e11


def test_a_model_that_fits_no_gpu_is_divided_to_generate_as_in_a_run() -> None:
    zero = ("actor.lora.rank=64", "zero_stage.actor=3")
    plan = planned("opt-66b", *zero, gpu="a100-80g", num_gpus=8)
    generate = phase_of(plan, "generate")
    assert plan.fits
    assert generate.items["actor weights, gathered"] < 0.6 * 2 * plan.actor.num_weights
    assert generate.seconds["sums over the group"] > 0
    small = phase_of(planned("opt-1.3b", "zero_stage.actor=3", gpu="a100-80g", num_gpus=8), "generate")
    assert small.seconds["sums over the group"] == 0
