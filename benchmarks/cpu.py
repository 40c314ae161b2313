"""`make bench`: what anybody can rerun on a CPU, beside Hugging Face's generate and TRL's PPO, in under ten minutes.

    python benchmarks/cpu.py --output bench.json

A small Llama with random weights, float32 for all, medians of five in one run. Ratios are the rival's time over ours:
generate_batch1_vs_hf (64 + 128 tokens), generate_ragged32_vs_hf (32 prompts of 16 to 128 tokens, answers of 16 to
256; the rival pads on the left and runs to the longest), ppo_step_vs_trl (32 prompts of 32 tokens, answers that end
by themselves after 1 to 192 tokens, one epoch, one update). TRL 1.12.0 is its last release with a PPO trainer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import shapes
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from dovetail.config.stages import PpoConfig, SamplingConfig
from dovetail.engine import HybridEngine, Sampling
from dovetail.model.copies import copy_of
from dovetail.rlhf.build import make_learners
from dovetail.rlhf.rewards import Answer, RewardModelScorer
from dovetail.rlhf.roles import Roles
from dovetail.rlhf.rollout import request_seeds, score_answers
from dovetail.rlhf.update import update
from dovetail.training.memory import TokenBudget

CPU = torch.device("cpu")
END, PAD, VOCABULARY = 2, 1, 128  # near-uniform draws: an answer ends at each token with 1 chance in 128
BATCH, PROMPT, LONGEST = 32, 32, 192
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    model = shapes.causal_lm("small", CPU, torch.float32)
    one = shapes.prompts_of(1, 64, model.config.vocab_size)
    lengths = shapes.ragged_lengths(32, high=256)
    many = [ids[:n] for ids, n in zip(
        shapes.prompts_of(32, 128, model.config.vocab_size), shapes.ragged_lengths(32, seed=1, high=128), strict=True
    )]  # fmt: skip
    rows = {
        "generate_batch1_vs_hf": beside(
            lambda: ours(model, one, [128]), lambda: hugging_face(model, one, [128])
        ),
        "generate_ragged32_vs_hf": beside(
            lambda: ours(model, many, lengths), lambda: hugging_face(model, many, lengths)
        ),
        "ppo_step_vs_trl": (statistics.median(ppo_ours()), statistics.median(ppo_trl())),
    }
    print(f"{'':28}{'ours, s':>10}{'rival, s':>10}{'ratio':>8}")
    for name, (mine, rival) in rows.items():
        print(f"{name:28}{mine:10.3f}{rival:10.3f}{rival / mine:8.2f}")
    result = {name: round(rival / mine, 3) for name, (mine, rival) in rows.items()}
    seconds = {name: {"dovetail": mine, "rival": rival} for name, (mine, rival) in rows.items()}
    options.output.write_text(
        json.dumps({**result, "seconds": seconds, **shapes.setting(CPU)}, indent=1) + "\n"
    )


def beside(mine: Callable[[], None], rival: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of both, taken in turns after one run of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + REPEATS):
        for run, taken in zip((mine, rival), times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def ours(model: Any, prompts: list[list[int]], lengths: list[int]) -> None:
    with HybridEngine(model).generating() as generate:
        found = generate(prompts, [Sampling(max_new_tokens=n) for n in lengths], seeds=range(len(prompts)))
    assert [len(answer.token_ids) for answer in found] == lengths


@torch.no_grad()
def hugging_face(model: Any, prompts: list[list[int]], lengths: list[int]) -> None:
    model.set_attn_implementation("sdpa")
    width, longest = max(map(len, prompts)), max(lengths)
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=longest, min_new_tokens=longest, do_sample=True, top_k=0,
        eos_token_id=None, pad_token_id=PAD, use_cache=True,
    )  # fmt: skip


def models() -> tuple[Any, Any, Any, Any]:
    """Actor, reference, critic, reward model of the PPO step."""
    actor = shapes.causal_lm(shapes.small_llama(VOCABULARY), CPU, torch.float32)
    torch.manual_seed(1)
    config = shapes.small_llama(VOCABULARY)
    config.num_labels = 1
    reward = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").eval()
    return actor, copy_of(actor).requires_grad_(False), copy_of(reward), reward.requires_grad_(False)


def ppo_ours() -> list[float]:
    """Seconds of each step after the first."""
    actor, reference, critic, reward = models()
    config = PpoConfig(batch_size=BATCH, sampling=SamplingConfig(max_new_tokens=LONGEST))
    budget = TokenBudget(config.micro_batch_tokens)
    roles = Roles(
        actor=actor, critic=critic, reference=reference, score=RewardModelScorer(reward, budget, CPU),
        chat=SimpleNamespace(), engine=HybridEngine(actor), device=CPU, budget=budget,
    )  # type: ignore[arg-type]  # fmt: skip
    learners = make_learners(roles, config, total_steps=100)
    sampling = Sampling(max_new_tokens=LONGEST, stop_token_ids=(END,))
    times = []
    for step in range(1 + REPEATS):
        prompts = shapes.prompts_of(BATCH, PROMPT, VOCABULARY, seed=step)
        start = time.perf_counter()
        with roles.engine.generating() as generate:
            found = generate(prompts, sampling, seeds=request_seeds(step, BATCH))
        answers = [
            Answer(messages=(), text="", prompt_ids=tuple(p), answer_ids=f.token_ids, logprobs=f.logprobs,
                   finished=f.finish_reason == "stop")
            for p, f in zip(prompts, found, strict=True)
        ]  # fmt: skip
        collected = score_answers(answers, roles, config, kl_coefficient=0.05, with_old_logprobs=False)
        update(
            collected.experience,
            roles,
            learners,
            config,
            seed=0,
            iteration=config.critic_warmup_rollouts + step,
        )
        times.append(time.perf_counter() - start)
    return times[1:]


def ppo_trl() -> list[float]:
    """The same step by TRL's own trainer, in the largest micro-batches: one."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    warnings.simplefilter("ignore")
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    actor, reference, critic, reward = models()
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    rows = [
        ids for step in range(2 + REPEATS) for ids in shapes.prompts_of(BATCH, PROMPT, VOCABULARY, seed=step)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        config = PPOConfig(
            output_dir=scratch, report_to="none", disable_tqdm=True, save_strategy="no", eval_strategy="no",
            per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, num_mini_batches=1, num_ppo_epochs=1,
            total_episodes=BATCH * (2 + REPEATS), local_rollout_forward_batch_size=BATCH, response_length=LONGEST,
            temperature=1.0, stop_token="eos", missing_eos_penalty=1.0, num_sample_generations=0, bf16=False,
            gradient_checkpointing=False, learning_rate=1e-5, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        PPOTrainer(
            args=config, processing_class=tokenizer(), model=actor, ref_model=reference, reward_model=reward,
            value_model=critic, train_dataset=Dataset.from_dict({"input_ids": rows}), callbacks=[Clock()],
        ).train()  # fmt: skip
    return [b - a for a, b in itertools.pairwise(ends)][1:]


def tokenizer() -> PreTrainedTokenizerFast:
    """Numbers as words: TRL wants one for padding and printing."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"w{i}": i for i in range(VOCABULARY) if i not in (END, PAD)} | {"<end>": END, "<pad>": PAD}
    core = Tokenizer(WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", pad_token="<pad>", padding_side="left"
    )


if __name__ == "__main__":
    main()
