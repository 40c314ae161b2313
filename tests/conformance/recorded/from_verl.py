"""Record what the functions of verl say of the inputs.

Run it where `verl` can be imported, from the root of the repository: python -m tests.conformance.recorded.from_verl
"""

from importlib.metadata import version
from typing import Any

import numpy
import torch
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

from tests.conformance.recorded import inputs

LOSSES: dict[str, tuple[str, str, dict[str, float]]] = {
    "token mean": ("vanilla", "token-mean", {"clip_ratio_high": inputs.CLIP_HIGH}),
    "sequence mean": ("vanilla", "seq-mean-token-mean", {}),
    "constant length": ("vanilla", "seq-mean-token-sum-norm", {}),
    "dual clip": ("vanilla", "token-mean", {"clip_ratio_c": inputs.DUAL_CLIP}),
    "gspo": ("gspo", "seq-mean-token-mean", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.05}),
    "cispo": ("cispo", "token-mean", {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0}),
}
"""By name: a loss, its aggregation and its bounds."""


def padded(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(inputs.padded(rows), dtype=torch.float64)


MASK = padded([[1.0] * length for length in inputs.LENGTHS])
GROUPS = numpy.arange(len(inputs.LENGTHS)) // inputs.GROUP_SIZE


def rewards(beta: float) -> torch.Tensor:
    """Return the score at the last token, less the penalty of each."""
    penalty = core_algos.kl_penalty(padded(inputs.OLD), padded(inputs.REFERENCE), "kl")
    found = -beta * penalty * MASK
    for row, (length, score) in enumerate(zip(inputs.LENGTHS, inputs.REWARDS, strict=True)):
        found[row, length - 1] += score
    return found


def advantages() -> dict[str, torch.Tensor]:
    plain, penalised = rewards(0.0), rewards(inputs.BETA)
    config = AlgoConfig(gamma=1.0)
    by_std = {"norm_adv_by_std_in_grpo": True}
    by_mean = {"norm_adv_by_std_in_grpo": False}
    return {
        "grpo": core_algos.compute_grpo_outcome_advantage(plain.clone(), MASK, GROUPS, **by_std)[0],
        "dr_grpo": core_algos.compute_grpo_outcome_advantage(plain.clone(), MASK, GROUPS, **by_mean)[0],
        "rloo": core_algos.compute_rloo_outcome_advantage(penalised.clone(), MASK, GROUPS)[0],
        "reinforce_plus_plus": core_algos.compute_reinforce_plus_plus_outcome_advantage(
            penalised.clone(), MASK, config=config
        )[0],
        "reinforce_plus_plus_baseline": core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(
            plain.clone(), MASK, GROUPS
        )[0],
    }


def loss_case(name: str) -> dict[str, Any]:
    """Return the loss and its gradient where each answer's reward is its advantage."""
    loss, aggregation, bounds = LOSSES[name]
    clip = {"clip_ratio": inputs.CLIP, "clip_ratio_low": inputs.CLIP, "clip_ratio_high": inputs.CLIP}
    clip |= {"clip_ratio_c": 1e9, **bounds}  # no third bound but where it is asked for
    config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **clip)
    new = padded(inputs.NEW).requires_grad_()
    per_answer = torch.tensor(inputs.REWARDS, dtype=torch.float64)[:, None] * MASK
    found, _ = core_algos.get_policy_loss_fn(loss)(
        padded(inputs.OLD), new, per_answer, MASK, loss_agg_mode=aggregation, config=config
    )
    found.backward()
    return {"loss": float(found.detach()), "gradient": inputs.cut(new.grad.tolist())}


def critic_case() -> dict[str, Any]:
    found, returns = core_algos.compute_gae_advantage_return(
        rewards(inputs.BETA), padded(inputs.VALUES), MASK, inputs.GAMMA, inputs.LAMBDA
    )
    values = padded(inputs.NEW_VALUES).requires_grad_()
    loss, _ = core_algos.compute_value_loss(values, returns, padded(inputs.VALUES), MASK, inputs.VALUE_CLIP)
    loss.backward()
    return {
        "advantages": inputs.cut(found.tolist()),
        "returns": inputs.cut(returns.tolist()),
        "loss": float(loss.detach()),
        "gradient": inputs.cut(values.grad.tolist()),
    }


def main() -> None:
    cases: dict[str, Any] = {
        name: {"advantages": inputs.cut(found.tolist())} for name, found in advantages().items()
    }
    cases |= {f"loss, {name}": loss_case(name) for name in LOSSES}
    cases["critic"] = critic_case()
    inputs.write(__file__, {name: version(name) for name in ("verl", "torch")}, cases)


if __name__ == "__main__":
    main()
