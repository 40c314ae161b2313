"""Record what the loss modules of OpenRLHF say of the inputs.

Run it from the root of the repository where `openrlhf.models.loss` can be imported (made with its version at commit
f5b3f08a05fd): python -m tests.conformance.recorded.from_openrlhf
"""

from typing import Any

import torch
from openrlhf.models.loss import DPOLoss, PairWiseLoss, PolicyLoss, ValueLoss

from tests.conformance.recorded import inputs

LOSSES: dict[str, dict[str, Any]] = {
    "token mean": {"clip_eps_high": inputs.CLIP_HIGH},
    "sequence mean": {"token_level_loss": False},
    "dual clip": {"dual_clip": inputs.DUAL_CLIP},
    "gspo": {"policy_loss_type": "gspo", "clip_eps_low": 0.1, "clip_eps_high": 0.05},
}
"""By name: settings of PolicyLoss."""


def padded(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(inputs.padded(rows), dtype=torch.float64)


def double(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


MASK = padded([[1.0] * length for length in inputs.LENGTHS])


def answered(loss: torch.Tensor, of: torch.Tensor) -> dict[str, Any]:
    loss.backward()
    return {"loss": float(loss.detach()), "gradient": inputs.cut(of.grad.tolist())}


def policy_case(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the loss and its gradient where each answer's reward is its advantage."""
    new = padded(inputs.NEW).requires_grad_()
    per_answer = double(inputs.REWARDS)[:, None] * MASK
    return answered(PolicyLoss(**settings)(new, padded(inputs.OLD), per_answer, MASK)[0], new)


def value_case() -> dict[str, Any]:
    """Return the critic's loss and gradient where each answer's reward is the target at every token."""
    values = padded(inputs.NEW_VALUES).requires_grad_()
    targets = double(inputs.REWARDS)[:, None] * MASK
    return answered(
        ValueLoss(clip_eps=inputs.VALUE_CLIP)(values, padded(inputs.VALUES), targets, MASK), values
    )


def pair_case(**settings: float) -> dict[str, Any]:
    """Return each pair's loss and its gradient by both answers: DPO with settings, the reward model's without."""
    losses, gradients = [], []
    for pair in range(len(inputs.CHOSEN)):
        both = double([inputs.CHOSEN[pair], inputs.REJECTED[pair]]).requires_grad_()
        reference = double([inputs.REFERENCE_CHOSEN[pair], inputs.REFERENCE_REJECTED[pair]])
        if settings:
            loss = DPOLoss(**settings)(both[:1], both[1:], reference[:1], reference[1:])[0]
        else:
            loss = PairWiseLoss()(both[:1], both[1:], margin=double([inputs.MARGIN]))
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(both.grad.tolist())
    return {"losses": losses, "gradients": gradients}


def main() -> None:
    cases: dict[str, Any] = {f"loss, {name}": policy_case(settings) for name, settings in LOSSES.items()}
    cases["critic"] = value_case()
    cases["sigmoid"] = pair_case(beta=inputs.PAIR_BETA)
    cases["sigmoid, smoothed"] = pair_case(beta=inputs.PAIR_BETA, label_smoothing=inputs.SMOOTHING)
    cases["ranking"] = pair_case()
    inputs.write(__file__, {"openrlhf": "f5b3f08a05fd", "torch": torch.__version__}, cases)


if __name__ == "__main__":
    main()
