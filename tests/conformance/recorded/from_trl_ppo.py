"""Record one PPO step of TRL 1.12, its last release with a PPO trainer.

Run it where `trl==1.12.0` is installed, from the root of the repository:
python -m tests.conformance.recorded.from_trl_ppo

TRL's arithmetic stands in the middle of PPOTrainer.train, so the trainer runs on random models of one layer, and what
it works with is read out of its frame when it asks for the gradient of its second epoch.
"""

import inspect
import tempfile
import warnings
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from tests.conformance.recorded import inputs

NUM_ANSWERS = 8
SHAPE = dict(
    vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    initializer_range=0.7, num_labels=1, pad_token_id=5, eos_token_id=4, bos_token_id=None,
)  # fmt: skip
COLUMNS = ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns", "new_logprobs", "vpred")


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {text: i for i, text in enumerate(["a", "b", "c", "d", "<end>", "<pad>"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="d"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")


def trainer_in(folder: str) -> PPOTrainer:
    torch.manual_seed(19)
    config = LlamaConfig(**SHAPE)
    language_models = [LlamaForCausalLM(config) for _ in range(2)]
    scoring_models = [LlamaForSequenceClassification(config) for _ in range(2)]
    settings = PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=NUM_ANSWERS,
        num_mini_batches=1,
        num_ppo_epochs=2,
        total_episodes=NUM_ANSWERS,
        response_length=inputs.LIMIT,
        stop_token="eos",
        learning_rate=0.05,
        kl_coef=inputs.BETA,
        kl_estimator="k1",
        cliprange=inputs.CLIP,
        cliprange_value=inputs.VALUE_CLIP,
        gamma=inputs.GAMMA,
        lam=inputs.LAMBDA,
        temperature=1.0,
        num_sample_generations=0,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        seed=5,
    )
    rows = Dataset.from_dict({"input_ids": [[i % 4, (i // 4) % 4, 2] for i in range(NUM_ANSWERS)]})
    return PPOTrainer(
        args=settings,
        processing_class=tokenizer(),
        model=language_models[0],
        ref_model=language_models[1],
        reward_model=scoring_models[0],
        value_model=scoring_models[1],
        train_dataset=rows,
        eval_dataset=rows,
    )


def main() -> None:
    warnings.simplefilter("ignore")
    seen: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_in(folder)
        backward = trainer.accelerator.backward

        def watched(loss: torch.Tensor, **named: Any) -> None:
            frame = inspect.currentframe()
            assert frame is not None
            assert frame.f_back is not None
            here = frame.f_back.f_locals
            order = torch.as_tensor(here["micro_batch_inds"]).argsort()
            found = {name: here[name].detach() for name in COLUMNS}
            gradients = (
                torch.autograd.grad(here["pg_loss"], here["new_logprobs"], retain_graph=True)[0],
                torch.autograd.grad(here["vf_loss"], here["vpred"], retain_graph=True)[0],
            )
            found |= {"policy_gradient": gradients[0], "value_gradient": gradients[1]}
            for name in ("new_logprobs", "vpred", "policy_gradient", "value_gradient"):
                found[name] = found[name][order]
            found |= {"scores": here["scores"], "last_token": here["sequence_lengths"]}
            losses = {"policy_loss": float(here["pg_loss"]), "value_loss": float(here["vf_loss"])}
            seen.append({name: column.tolist() for name, column in found.items()} | losses)
            backward(loss, **named)

        trainer.accelerator.backward = watched
        trainer.train()
    versions = {module.__name__: module.__version__ for module in (trl, transformers, torch)}
    inputs.write(__file__, versions, {"ppo": seen[-1]})


if __name__ == "__main__":
    main()
