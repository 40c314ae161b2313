"""Turn one score per answer into one reward per token.

Responsible for: score clipping, the score of answers that were cut off, the KL penalty, and where each lands.
Not responsible for: the scores (rlhf/), or scaling rewards over the batch (maths/masked.py).

The order is: clip the model's scores, replace those of cut-off answers, then spread with the penalty. Only
scores are clipped, never the penalty: that would free the policy to move once it is far enough.

Shapes: T packed tokens, S sequences.
"""

from torch import Tensor

from dovetail.maths.kl import k1
from dovetail.maths.masked import zero_outside
from dovetail.maths.precision import at_least_float32


def clip_scores(scores_S: Tensor, clip: float | None) -> Tensor:
    """min(max(score, -c), c); [S]. None: as they are. NaN stays NaN."""
    scores_S = at_least_float32(scores_S)
    return scores_S if clip is None else scores_S.clamp(-clip, clip)


def replace_missing_end(scores_S: Tensor, finished_S: Tensor, penalty: float | None) -> Tensor:
    """`penalty` as the score of each answer that was cut off, the others' as they are; [S].

    The reward model never saw answers without an end, so what it says of them means nothing (Huang et al.
    2024, arXiv:2403.17031, the "EOS trick": a fixed low score instead).

    penalty None: 1 below the lowest score of the batch, so give it the whole rollout and not a micro-batch.
    finished_S: bool, by the generator's account of why it stopped, not by the last token's value.
    """
    scores_S = at_least_float32(scores_S)
    if penalty is None:
        lowest = scores_S.min() if scores_S.numel() else scores_S.new_zeros(())
        return scores_S.where(finished_S, lowest - 1)
    return scores_S.masked_fill(~finished_S, penalty)


def per_token_rewards(
    logprobs_T: Tensor,
    reference_logprobs_T: Tensor,
    scores_S: Tensor,
    mask_T: Tensor,
    last_action_index_S: Tensor,
    *,
    kl_coefficient: float,
) -> Tensor:
    """r_t = -beta (log p_t - log p_ref,t) + [t is the last action] score; [T], 0 where mask_T is False.

    Ouyang et al. 2022 (arXiv:2203.02155), eq. 2 without the pretraining term, spread over tokens (Ziegler et
    al. 2019, arXiv:1909.08593, eq. 2). With gamma = 1 an answer's rewards add up to score - beta KL estimate.

    logprobs_T: of the actor that sampled, before the update. mask_T: bool, True = action.
    last_action_index_S: index in T of each answer's last action (its end token, if it has one): the score is
    added there, once, not on a position after it.
    """
    log_ratio_T = k1(zero_outside(logprobs_T, mask_T), zero_outside(reference_logprobs_T, mask_T))
    penalty_T = -kl_coefficient * log_ratio_T
    return penalty_T.index_add(0, last_action_index_S, scores_S.to(penalty_T.dtype))
