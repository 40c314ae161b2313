"""Record what TRL's trainers say of the inputs: advantages, losses and gradients.

Run it where `trl` is installed, from the root of the repository: python -m tests.conformance.recorded.from_trl

The trainers are real, on a random model of one layer. Its log-probabilities and its answers are replaced by the inputs;
from there to the loss it is TRL's own code.
"""

import tempfile
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from tests.conformance.recorded import inputs

PROMPTS = ["a", "b", "c"]
K3 = {"beta": inputs.BETA, "use_bias_correction_kl": False}
SEQUENCE = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
GRPO: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", **K3},
    "grpo, KL times ratio": {"loss_type": "grpo", "beta": inputs.BETA},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "bnpo": {"loss_type": "bnpo", **K3},
    "gspo": {**SEQUENCE, "epsilon": 3e-4, "epsilon_high": 4e-4},
    "gspo, wide": {**SEQUENCE, "epsilon": 0.1, "epsilon_high": 0.05},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "dual clip": {"loss_type": "grpo", "delta": inputs.DUAL_CLIP},
}
"""By name: settings of GRPOTrainer."""
RLOO: dict[str, dict[str, Any]] = {"rloo": {"beta": inputs.BETA}, "rloo, one step": {"beta": inputs.BETA}}
"""By name: settings of RLOOTrainer. In one step the old policy is the new one."""


def double(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def padded(rows: list[list[float]]) -> torch.Tensor:
    return double(inputs.padded(rows))


def tiny(folder: str) -> PreTrainedTokenizerFast:
    """Save a model, which is loaded once more as the reference, and return its tokenizer."""
    vocabulary = {text: i for i, text in enumerate(["a", "b", "c", "d", "<end>", "<pad>"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="d"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return tokenizer


def group_case(name: str, folder: str) -> dict[str, Any]:
    """Return advantages, loss and the gradient of each answer's tokens."""
    is_rloo = name in RLOO
    trainer_class, config_class = (RLOOTrainer, RLOOConfig) if is_rloo else (GRPOTrainer, GRPOConfig)
    tokenizer = tiny(folder)
    config = config_class(
        output_dir=folder,
        per_device_train_batch_size=len(inputs.LENGTHS),
        num_generations=inputs.GROUP_SIZE,
        max_completion_length=inputs.LIMIT,
        num_iterations=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **(RLOO if is_rloo else GRPO)[name],
    )
    trainer = trainer_class(
        model=folder,
        reward_funcs=lambda completions, **_: list(inputs.REWARDS),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    asked = [{"prompt": prompt} for prompt in PROMPTS for _ in range(inputs.GROUP_SIZE)]
    prompt_ids = [tokenizer(row["prompt"])["input_ids"] for row in asked]
    answer_ids = [[3] * (length - 1) + [4] for length in inputs.LENGTHS]
    texts = ["d"] * len(asked)
    drawn = (prompt_ids, answer_ids, texts), (prompt_ids, answer_ids, None, texts, None, {}, None, None)
    trainer._generate = lambda prompts: drawn[0] if is_rloo else drawn[1]
    is_one_step = name.endswith("one step")
    current = {"policy": padded(inputs.NEW if is_one_step else inputs.OLD)}

    def logprobs(model: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
        found = padded(inputs.REFERENCE) if model is trainer.ref_model else current["policy"]
        return found, torch.zeros_like(found), None

    trainer._get_per_token_logps_and_entropies = logprobs
    batch = trainer._generate_and_score_completions(asked)
    new = current["policy"] = padded(inputs.NEW).requires_grad_()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return {
        "advantages": batch["advantages"].tolist(),
        "loss": float(loss.detach()),
        "gradient": inputs.cut(new.grad.tolist()),
    }


def answers(sums: torch.Tensor, tokens: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities of answers behind one token, all of them on the first, and the mask of their tokens."""
    first = torch.zeros(len(tokens), max(tokens), dtype=torch.float64)
    first[:, 0] = 1.0
    mask = torch.tensor([[0] + [1] * n + [0] * (max(tokens) - n) for n in tokens])
    return first * sums[:, None], mask


def model_of(logprobs: torch.Tensor) -> MagicMock:
    """Return a model whose forward gives these log-probabilities, and zeros for what is only reported."""
    zeros = torch.zeros_like(logprobs)
    output = SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return MagicMock(return_value=output)


def trainer_of(**settings: Any) -> MagicMock:
    """Return a trainer of one process with these settings, and nothing behind its other attributes."""
    made = MagicMock(beta=inputs.PAIR_BETA, precompute_ref_logps=True, aux_loss_enabled=False, **settings)
    made.accelerator.device = torch.device("cpu")
    made.accelerator.gather.side_effect = made.accelerator.gather_for_metrics.side_effect = lambda x: x
    return made


def dpo(sums: torch.Tensor, pair: int, loss_type: str) -> torch.Tensor:
    own = trainer_of(
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=0.0,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    logprobs, mask = answers(sums, (inputs.CHOSEN_TOKENS[pair], inputs.REJECTED_TOKENS[pair]))
    batch = {
        "completion_mask": mask,
        "input_ids": mask,
        "attention_mask": mask,
        "ref_chosen_logps": double([inputs.REFERENCE_CHOSEN[pair]]),
        "ref_rejected_logps": double([inputs.REFERENCE_REJECTED[pair]]),
    }
    return DPOTrainer._compute_loss(own, model_of(logprobs), batch, False)


def kto(sums: torch.Tensor, pair: int) -> torch.Tensor:
    """Return the mean over a pair's two answers, with one KL for all pairs."""
    own = trainer_of(calculate_KL=True, loss_type="kto", desirable_weight=1.0, undesirable_weight=1.0)
    own._compute_kl_logps.return_value = double(inputs.OTHERS)
    logprobs, mask = answers(sums, (inputs.CHOSEN_TOKENS[pair], inputs.REJECTED_TOKENS[pair]))
    batch = {
        "label": torch.tensor([1, 0]),
        "completion_mask": mask,
        "input_ids": mask,
        "attention_mask": mask,
        "ref_logps": double([inputs.REFERENCE_CHOSEN[pair], inputs.REFERENCE_REJECTED[pair]]),
        "ref_KL_logps": double(inputs.REFERENCE_OTHERS),
    }
    return KTOTrainer._compute_loss(own, model_of(logprobs), batch, False)


def means(sums: torch.Tensor, pair: int) -> torch.Tensor:
    return sums / double([inputs.CHOSEN_TOKENS[pair], inputs.REJECTED_TOKENS[pair]])


def ratios(sums: torch.Tensor, pair: int) -> torch.Tensor:
    return sums - double([inputs.REFERENCE_CHOSEN[pair], inputs.REFERENCE_REJECTED[pair]])


def cpo(compared: torch.Tensor, loss_type: str, **settings: float) -> torch.Tensor:
    own = trainer_of(alpha=0.0, loss_type=loss_type, **settings)
    return CPOTrainer.cpo_loss(own, compared[:1], compared[1:])[0].sum()


def orpo(compared: torch.Tensor) -> torch.Tensor:
    """Return what TRL adds to the cross-entropy of the chosen answer."""
    return -ORPOTrainer.odds_ratio_loss(trainer_of(), compared[:1], compared[1:])[0].sum()


PAIRS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "sigmoid": lambda sums, pair: dpo(sums, pair, "sigmoid"),
    "sigmoid, smoothed": lambda sums, pair: cpo(
        ratios(sums, pair), "sigmoid", label_smoothing=inputs.SMOOTHING
    ),
    "ipo": lambda sums, pair: dpo(sums, pair, "ipo"),
    "kto": kto,
    "simpo": lambda sums, pair: cpo(
        means(sums, pair), "simpo", simpo_gamma=inputs.SIMPO_GAMMA, label_smoothing=0.0
    ),
    "orpo, odds alone": lambda sums, pair: orpo(means(sums, pair)),
}


def pair_case(loss: Callable[[torch.Tensor, int], torch.Tensor]) -> dict[str, Any]:
    """Return each pair's loss, and its gradient by the log-probabilities of the two answers."""
    losses, gradients = [], []
    for pair in range(len(inputs.CHOSEN)):
        sums = double([inputs.CHOSEN[pair], inputs.REJECTED[pair]]).requires_grad_()
        found = loss(sums, pair)
        found.backward()
        losses.append(float(found.detach()))
        gradients.append(sums.grad.tolist())
    return {"losses": losses, "gradients": gradients}


def main() -> None:
    warnings.simplefilter("ignore")
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in [*GRPO, *RLOO]:
            cases[name] = group_case(name, folder)
    for name, loss in PAIRS.items():
        cases[name] = pair_case(loss)
    versions = {module.__name__: module.__version__ for module in (trl, transformers, torch)}
    inputs.write(__file__, versions, cases)


if __name__ == "__main__":
    main()
