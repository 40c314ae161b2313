"""Print what TRL's own losses say of four pairs: the numbers in test_preference.py.

Run it where `trl` is installed (made with trl 1.16.0): python tests/maths/trl_preference_vectors.py
"""

import json
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch

CHOSEN = [-4.0, -12.5, -3.25, -30.0]
REJECTED = [-6.0, -9.0, -3.5, -45.0]
REFERENCE_CHOSEN = [-5.0, -11.0, -3.25, -38.0]
REFERENCE_REJECTED = [-5.5, -9.75, -3.0, -40.0]
CHOSEN_TOKENS = [3, 7, 1, 20]
REJECTED_TOKENS = [4, 5, 2, 25]
OTHERS, REFERENCE_OTHERS = [-8.0, -7.0, -20.0, -6.5], [-9.0, -7.5, -18.75, -9.0]
"""Answers to other prompts, for KTO's estimate of the KL."""
BETA = 0.3


def double(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def answers(sums: list[float], tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities of answers behind one token, all of them on the first, and the mask of their tokens."""
    logprobs = torch.zeros(len(sums), max(tokens), dtype=torch.float64)
    logprobs[:, 0] = double(sums)
    mask = torch.tensor([[0] + [1] * n + [0] * (max(tokens) - n) for n in tokens])
    return logprobs, mask


def model(logprobs: torch.Tensor) -> MagicMock:
    """Return a model whose forward gives these log-probabilities, and zeros for what is only reported."""
    zeros = torch.zeros_like(logprobs)
    output = SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return MagicMock(return_value=output)


def trainer(**settings):
    """Return a trainer of one process with these settings, and nothing behind its other attributes."""
    made = MagicMock(beta=BETA, precompute_ref_logps=True, aux_loss_enabled=False, **settings)
    made.accelerator.device = torch.device("cpu")
    made.accelerator.gather.side_effect = made.accelerator.gather_for_metrics.side_effect = lambda value: (
        value
    )
    return made


def dpo(loss_type: str) -> list[float]:
    from trl.trainer.dpo_trainer import DPOTrainer

    policy, mask = answers(CHOSEN + REJECTED, CHOSEN_TOKENS + REJECTED_TOKENS)
    losses = []
    for pair in range(4):
        rows = [pair, pair + 4]
        settings = {"loss_types": [loss_type], "loss_weights": [1.0], "label_smoothing": 0.0}
        own = trainer(ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False, **settings)
        inputs = {
            "completion_mask": mask[rows],
            "input_ids": mask[rows],
            "attention_mask": mask[rows],
            "ref_chosen_logps": double([REFERENCE_CHOSEN[pair]]),
            "ref_rejected_logps": double([REFERENCE_REJECTED[pair]]),
        }
        losses.append(float(DPOTrainer._compute_loss(own, model(policy[rows]), inputs, False)))
    return losses


def kto() -> list[float]:
    """Return the mean over each pair's two answers, with one KL for all."""
    from trl.trainer.kto_trainer import KTOTrainer

    policy, mask = answers(CHOSEN + REJECTED, CHOSEN_TOKENS + REJECTED_TOKENS)
    losses = []
    for pair in range(4):
        rows = [pair, pair + 4]
        own = trainer(calculate_KL=True, loss_type="kto", desirable_weight=1.0, undesirable_weight=1.0)
        own._compute_kl_logps.return_value = double(OTHERS)
        inputs = {
            "label": torch.tensor([1, 0]),
            "completion_mask": mask[rows],
            "input_ids": mask[rows],
            "attention_mask": mask[rows],
            "ref_logps": double([REFERENCE_CHOSEN[pair], REFERENCE_REJECTED[pair]]),
            "ref_KL_logps": double(REFERENCE_OTHERS),
        }
        losses.append(float(KTOTrainer._compute_loss(own, model(policy[rows]), inputs, False)))
    return losses


def cpo(loss_type: str, chosen, rejected, **settings: float) -> list[float]:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    own = trainer(alpha=0.0, loss_type=loss_type, **settings)
    return CPOTrainer.cpo_loss(own, chosen, rejected)[0].tolist()


def main() -> None:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    chosen, rejected, reference_chosen, reference_rejected, chosen_tokens, rejected_tokens = (
        double(values)
        for values in (CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED, CHOSEN_TOKENS, REJECTED_TOKENS)
    )
    means = chosen / chosen_tokens, rejected / rejected_tokens
    ratios = chosen - reference_chosen, rejected - reference_rejected
    found = {
        "sigmoid": dpo("sigmoid"),
        "sigmoid, smoothed": cpo("sigmoid", *ratios, label_smoothing=0.2),
        "ipo": dpo("ipo"),
        "kto": kto(),
        "simpo": cpo("simpo", *means, simpo_gamma=0.7, label_smoothing=0.0),
        # TRL returns what is subtracted from the mean cross-entropy of the chosen answers.
        "orpo, odds alone": (-ORPOTrainer.odds_ratio_loss(trainer(), *means)[0]).tolist(),
    }
    sys.stdout.write(json.dumps(found, indent=4) + "\n")


if __name__ == "__main__":
    main()
