"""The losses that train a policy on preference pairs directly, without a reward model.

Responsible for: the loss of each pair, and what a step reports of its pairs.
Not responsible for: log-probabilities (model/forward.py), which pairs a ranking yields and their weights
(batches.pack_ranked), or dividing by the number of prompts (training/step.py).

A log-ratio is log pi(y | x) - log pi_ref(y | x), summed over the tokens of the answer y. A mean is log pi(y | x)
divided by the number of those tokens. All are float32 at least before the arithmetic.

Shapes: P preference pairs.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dovetail.maths.masked import at_least_float32
from dovetail.maths.ranking import won_pairs


def dpo_loss(
    chosen_ratio_P: Tensor, rejected_ratio_P: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """[P]: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), h = log-ratio of chosen - log-ratio of rejected.

    Rafailov et al. 2023 (arXiv:2305.18290), eq. 7. e, the share of pairs that are thought to be labelled the wrong way
    round, as in conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3).
    """
    scaled_P = beta * _difference(chosen_ratio_P, rejected_ratio_P)
    return -(1 - label_smoothing) * logsigmoid(scaled_P) - label_smoothing * logsigmoid(-scaled_P)


def ipo_loss(chosen_mean_ratio_P: Tensor, rejected_mean_ratio_P: Tensor, *, beta: float) -> Tensor:
    """[P]: (h - 1 / (2 beta))^2, h = log-ratio per token of chosen - log-ratio per token of rejected.

    Azar et al. 2023 (arXiv:2310.12036), eq. 17, with beta for their tau. The paper leaves the division by the number
    of tokens out; its authors confirmed to TRL that their results were made with it.
    """
    return (_difference(chosen_mean_ratio_P, rejected_mean_ratio_P) - 1 / (2 * beta)).square()


def kto_loss(chosen_ratio_P: Tensor, rejected_ratio_P: Tensor, kl: float, *, beta: float) -> Tensor:
    """[P]: ((1 - sigmoid(beta (r_chosen - kl))) + (1 - sigmoid(beta (kl - r_rejected)))) / 2, r the log-ratios.

    Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 8, with lambda_D = lambda_U = 1: a pair holds one desirable and one
    undesirable answer. kl: the estimate of KL(pi || pi_ref), their z_0, which is no function of the weights.
    """
    chosen_P, rejected_P = at_least_float32(chosen_ratio_P), at_least_float32(rejected_ratio_P)
    # 1 - sigmoid(x) = sigmoid(-x), which does not round to 0.
    return (torch.sigmoid(beta * (kl - chosen_P)) + torch.sigmoid(beta * (rejected_P - kl))) / 2


def simpo_loss(chosen_mean_P: Tensor, rejected_mean_P: Tensor, *, beta: float, gamma: float) -> Tensor:
    """[P]: -log sigmoid(beta (mean of chosen - mean of rejected) - gamma).

    Meng et al. 2024 (arXiv:2405.14734), eq. 6.
    """
    return -logsigmoid(beta * _difference(chosen_mean_P, rejected_mean_P) - gamma)


def orpo_loss(chosen_mean_P: Tensor, rejected_mean_P: Tensor, *, beta: float) -> Tensor:
    """[P]: -mean of chosen - beta log sigmoid(log odds of chosen - log odds of rejected), odds = p / (1 - p).

    Hong et al. 2024 (arXiv:2403.07691), eq. 3 to 7, with p = exp(mean) and beta for their lambda.
    """
    chosen_P, rejected_P = at_least_float32(chosen_mean_P), at_least_float32(rejected_mean_P)
    return -chosen_P - beta * logsigmoid(_log_odds(chosen_P) - _log_odds(rejected_P))


def estimated_kl(policy_S: Tensor, reference_S: Tensor) -> float:
    """max(0, mean of log pi - log pi_ref) over answers to other prompts, for `kto_loss`.

    Ethayarajh et al. 2024, section 4.1: the answers y' are of other prompts of the batch.
    """
    return max(0.0, float((policy_S.double() - reference_S.double()).mean()))


def pair_sums(chosen_reward_P: Tensor, rejected_reward_P: Tensor, weight_P: Tensor) -> dict[str, Tensor]:
    """Return sums over pairs, each times its weight: how often the chosen answer has the higher reward (a tie counts
    half), by how much it is higher, and the rewards.

    A reward here is what the loss compares: beta times log-ratio or mean.
    """
    chosen_P, rejected_P = at_least_float32(chosen_reward_P), at_least_float32(rejected_reward_P)
    return {
        "accuracy": (weight_P * won_pairs(chosen_P, rejected_P)).sum(),
        "reward_margin": (weight_P * (chosen_P - rejected_P)).sum(),
        "chosen_reward": (weight_P * chosen_P).sum(),
        "rejected_reward": (weight_P * rejected_P).sum(),
    }


def _difference(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    return at_least_float32(chosen_P) - at_least_float32(rejected_P)


def _log_odds(mean_P: Tensor) -> Tensor:
    """log(p / (1 - p)) for p = exp(mean); finite where p rounds to 1."""
    below_P = mean_P.clamp(max=-torch.finfo(mean_P.dtype).eps)
    return mean_P - torch.log(-torch.expm1(below_P))
