"""A step-3 script in the shape of DeepSpeed-Chat's: the same flags, calls and order, imports from compat.

python -m tests.rlhf.compat.step3 --actor_model_name_or_path A --critic_model_name_or_path R --output_dir OUT ...
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data.distributed import DistributedSampler
from transformers import SchedulerType, default_data_collator

import dovetail.rlhf.compat.deepspeed_chat as deepspeed
from dovetail.rlhf.compat.deepspeed_chat import (
    DataCollatorRLHF,
    DeepSpeedPPOTrainer,
    DeepSpeedPPOTrainerUnsupervised,
    DeepSpeedRLHFEngine,
    ExponentialMovingAverage,
    MiniDataset,
    convert_lora_to_linear_layer,
    create_prompt_dataset,
    get_accelerator,
    get_all_reduce_mean,
    get_unsupervised_data,
    load_hf_tokenizer,
    moving_average,
    print_rank_0,
    print_throughput_step3,
    save_hf_format,
    save_zero_three_model,
    set_random_seed,
    to_device,
)

VALUES: dict[str, Any] = {
    "data_split": "2,4,4",
    "data_output_path": "/tmp/data_files",
    "unsupervised_dataset_name": None,
    "unsupervised_dataset_config_name": None,
    "unsup_coef": 27.8,
    "actor_model_name_or_path": None,
    "critic_model_name_or_path": None,
    "num_padding_at_beginning": 1,
    "per_device_generation_batch_size": 16,
    "per_device_training_batch_size": 16,
    "generation_batches": 1,
    "ppo_epochs": 1,
    "max_prompt_seq_len": 256,
    "max_answer_seq_len": 256,
    "actor_learning_rate": 9.65e-6,
    "critic_learning_rate": 5e-6,
    "actor_weight_decay": 0.0,
    "critic_weight_decay": 0.0,
    "num_train_epochs": 1,
    "gradient_accumulation_steps": 1,
    "num_warmup_steps": 100,
    "output_dir": None,
    "seed": None,
    "preprocessing_num_workers": None,
    "local_rank": -1,
    "inference_tp_size": 1,
    "tp_gather_partition_size": 8,
    "dtype": "fp16",
    "actor_zero_stage": 0,
    "critic_zero_stage": 0,
    "actor_dropout": None,
    "critic_dropout": None,
    "actor_lora_dim": 0,
    "actor_lora_module_name": "decoder.layers.",
    "critic_lora_dim": 0,
    "critic_lora_module_name": "decoder.layers.",
    "actor_lora_learning_rate": 5e-4,
    "critic_lora_learning_rate": 5e-4,
    "tensorboard_path": "step3_tensorboard",
    "print_answers_interval": 1,
    "test_stop_step": 0,
}
"""Flags that take a value, and their defaults."""

WHOLE_NUMBERS = ("seed", "preprocessing_num_workers")
FRACTIONS = ("actor_dropout", "critic_dropout")

SWITCHES = (
    "enable_hybrid_engine",
    "unpin_actor_parameters",
    "release_inference_cache",
    "offload",
    "offload_reference_model",
    "offload_reward_model",
    "actor_gradient_checkpointing",
    "critic_gradient_checkpointing",
    "only_optimize_lora",
    "enable_ema",
    "enable_mixed_precision_lora",
    "compute_fp32_loss",
    "enable_tensorboard",
    "add_eot_token",
    "align_overflow",
    "print_answers",
    "enable_test_mode",
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of the published script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_path", nargs="*", default=["Dahoas/rm-static"])
    parser.add_argument("--lr_scheduler_type", type=SchedulerType, default="cosine")
    for name, default in VALUES.items():
        kind = int if name in WHOLE_NUMBERS else float if name in FRACTIONS else type(default)
        parser.add_argument(
            f"--{name}", default=default, type=str if default is None and kind is type(None) else kind
        )
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    parser = deepspeed.add_config_arguments(parser)
    return parser.parse_args(argv)


def has_text(args: argparse.Namespace) -> bool:
    return bool(args.unsupervised_dataset_name and args.unsupervised_dataset_config_name)


def loaders(args: argparse.Namespace, tokenizer: Any) -> tuple[Any, Any, int]:
    """Prompts, texts (or Nones), and the optimiser steps of the run."""
    prompts, _ = create_prompt_dataset(
        args.local_rank, args.data_path, args.data_split, args.data_output_path, 3, args.seed, tokenizer,
        args.max_prompt_seq_len,
    )  # fmt: skip
    sampler: Any = RandomSampler if args.local_rank == -1 else DistributedSampler
    collate = DataCollatorRLHF(args.max_prompt_seq_len, args.inference_tp_size)
    size = args.per_device_generation_batch_size
    of_prompts: Any = DataLoader(prompts, collate_fn=collate, sampler=sampler(prompts), batch_size=size)
    of_texts: Any = [None] * len(of_prompts)
    if has_text(args):
        texts = get_unsupervised_data(args, tokenizer)
        of_texts = DataLoader(
            texts, collate_fn=default_data_collator, sampler=sampler(texts), batch_size=size
        )
    steps_per_epoch = (
        min(len(of_prompts), len(of_texts))
        * (size / args.per_device_training_batch_size)
        * args.ppo_epochs
        / args.gradient_accumulation_steps
    )
    return of_prompts, of_texts, int(args.num_train_epochs * steps_per_epoch)


def learn(
    args: argparse.Namespace, engine: Any, trainer: Any, experience: list[Any], texts: list[Any]
) -> Any:
    """All steps on what was generated: sums of the losses and of the mean rewards, and their number."""
    sums, reward, num = [0.0, 0.0, 0.0], torch.tensor(0.0), 0
    if args.actor_gradient_checkpointing:
        engine.actor.gradient_checkpointing_enable()
    for _ in range(args.ppo_epochs):
        for part, text in zip(experience, texts, strict=False):
            actor_loss, critic_loss = trainer.train_rlhf(part)
            sums[0] += actor_loss.item()
            sums[1] += critic_loss.item()
            reward = reward + part["rewards"].mean()
            if has_text(args):
                sums[2] += trainer.train_unsupervised(text, args.unsup_coef).item()
            num += 1
            if args.enable_ema:
                moving_average(engine.actor, engine.actor_ema, zero_stage=args.actor_zero_stage)
        random.shuffle(experience)
        random.shuffle(texts)
    return sums, reward, num


def text_of(args: argparse.Namespace, text: Any, device: Any) -> Any:
    """What is collected beside the prompts: a batch of text, or one Nothing for each prompt."""
    return [[None] * args.per_device_generation_batch_size] if text is None else to_device(text, device)


def train(
    args: argparse.Namespace, engine: Any, trainer: Any, of_prompts: Any, of_texts: Any, device: Any
) -> None:
    experiences = MiniDataset(args.generation_batches, args.per_device_training_batch_size)
    collected_texts = MiniDataset(args.generation_batches, args.per_device_training_batch_size)
    steps_without_overflow, average, smoothed = 0, 0.0, ExponentialMovingAverage()
    for epoch in range(args.num_train_epochs):
        for step, (prompts, text) in enumerate(zip(of_prompts, of_texts, strict=False)):
            prompts = to_device(prompts, device)
            out = trainer.generate_experience(prompts["prompt"], prompts["prompt_att_mask"], step)
            began = time.time()
            texts = collected_texts.add(text_of(args, text, device))
            experience = experiences.add(out)
            if experience is not None:
                sums, reward, num = learn(args, engine, trainer, experience, texts)
                seconds = time.time() - began
                print_rank_0(
                    f"epoch {epoch} step {step} losses {[loss / num for loss in sums]}", args.global_rank
                )
                print_throughput_step3(
                    engine.actor.module,
                    engine.critic,
                    args,
                    seconds + trainer.generate_time * args.generation_batches,
                    trainer.generate_time,
                    seconds,
                    args.global_rank,
                )
                average += get_all_reduce_mean(reward).item() / args.gradient_accumulation_steps_actor
                if (step + 1) % args.gradient_accumulation_steps_actor == 0:
                    smoothed.update(average)
                    average = 0.0
                print_rank_0(f"reward {reward.item() / num} smoothed {smoothed.get()}", args.global_rank)
            if args.actor_gradient_checkpointing:
                engine.actor.gradient_checkpointing_disable()
            steps_without_overflow += not any(trainer.get_overflow())
            if args.enable_test_mode and steps_without_overflow == args.test_stop_step:
                break
        if args.enable_test_mode:
            break


def save(args: argparse.Namespace, engine: Any, tokenizer: Any) -> None:
    engine.actor = convert_lora_to_linear_layer(engine.actor)
    engine.critic = convert_lora_to_linear_layer(engine.critic)
    if args.enable_ema:
        engine.actor_ema = convert_lora_to_linear_layer(engine.actor_ema)
    if torch.distributed.get_rank() == 0:
        save_hf_format(engine.actor, tokenizer, args, sub_folder="actor")
        save_hf_format(engine.critic, tokenizer, args, sub_folder="critic")
        if args.enable_ema:
            save_hf_format(engine.actor_ema, tokenizer, args, sub_folder="actor_ema")
    for name, stage in (("actor", args.actor_zero_stage), ("critic", args.critic_zero_stage)):
        if stage == 3:
            folder = str(Path(args.output_dir) / name)
            save_zero_three_model(
                getattr(engine, name), global_rank=args.global_rank, save_dir=folder, zero_stage=stage
            )


def main(argv: Sequence[str]) -> tuple[Any, Any]:
    """Returns engine and trainer, for tests."""
    args = parse(argv)
    if args.local_rank == -1:
        device = torch.device(get_accelerator().device_name())
    else:
        get_accelerator().set_device(args.local_rank)
        device = torch.device(get_accelerator().device_name(), args.local_rank)
        deepspeed.init_distributed()
    args.global_rank = torch.distributed.get_rank()
    args.gradient_accumulation_steps_actor = args.gradient_accumulation_steps * (2 if has_text(args) else 1)
    set_random_seed(args.seed)
    torch.distributed.barrier()
    args.end_of_conversation_token = "<|endoftext|>"
    added = args.end_of_conversation_token if args.add_eot_token else None
    tokenizer = load_hf_tokenizer(
        args.actor_model_name_or_path, fast_tokenizer=True, add_special_tokens=added
    )
    of_prompts, of_texts, num_steps = loaders(args, tokenizer)
    engine = DeepSpeedRLHFEngine(
        actor_model_name_or_path=args.actor_model_name_or_path,
        critic_model_name_or_path=args.critic_model_name_or_path,
        tokenizer=tokenizer,
        num_total_iters=num_steps,
        args=args,
    )
    trainer_class = DeepSpeedPPOTrainerUnsupervised if has_text(args) else DeepSpeedPPOTrainer
    trainer = trainer_class(engine, args)
    print_rank_0(f"training (total_iters={num_steps})", args.global_rank)
    train(args, engine, trainer, of_prompts, of_texts, device)
    if args.output_dir is not None:
        save(args, engine, tokenizer)
    return engine, trainer


if __name__ == "__main__":
    main(sys.argv[1:])
