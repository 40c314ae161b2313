"""Reward-model accuracy on held-out preferences: Dovetail beside a plain Hugging Face script, same rows, same run.

    python benchmarks/reward_accuracy.py MODEL hh_pairs.jsonl.gz --held-out 400 --seeds 3

MODEL: a causal LM folder or .gguf file. The pairs are Anthropic transcripts in `chosen` and `rejected`. The peer is
what one writes without us: AutoModelForSequenceClassification, right padding, AdamW, autocast, one epoch. Prints one
JSON line a run and one with means and standard errors.
"""

import argparse
import gzip
import json
import math
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from dovetail.config.data import DataConfig, SourceConfig
from dovetail.config.model import ModelConfig
from dovetail.config.run import RunConfig, TrackingConfig
from dovetail.config.stages import OptimizerConfig, RewardConfig
from dovetail.model.load import load_causal_lm
from dovetail.model.save import save_model
from dovetail.stages import pipeline
from dovetail.text.tokenizer import load_tokenizer

MAX_TOKENS = 512


def main() -> None:
    """Train and judge both with each seed."""
    options = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        model = plain_folder(options.model, work / "start")
        train, held_out = split_rows(options.pairs, options.held_out, work)
        found: dict[str, list[float]] = {"dovetail": [], "hugging_face": []}
        for seed in range(options.seeds):
            for name, fit in (("dovetail", fit_dovetail), ("hugging_face", fit_hugging_face)):
                start = time.perf_counter()
                accuracy = fit(model, train, held_out, seed, options, work)
                found[name].append(accuracy)
                row = {
                    "system": name,
                    "seed": seed,
                    "accuracy": accuracy,
                    "seconds": time.perf_counter() - start,
                }
                print(json.dumps(row), flush=True)
    rows = {name: {"mean": statistics.fmean(a), "stderr": standard_error(a)} for name, a in found.items()}
    print(
        json.dumps({"learning_rate": options.learning_rate, "held_out": options.held_out, **rows}), flush=True
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("pairs", type=Path)
    parser.add_argument(
        "--held-out", type=int, default=400, help="the last rows of the file, never trained on"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--batch-size", type=int, default=32, help="pairs per optimiser step")
    return parser.parse_args()


def plain_folder(model: str, folder: Path) -> str:
    """Both systems start from the same Hugging Face folder."""
    tokenizer = load_tokenizer(model)
    save_model(load_causal_lm(model, dtype=torch.float32, device=torch.device("cpu")), tokenizer, folder)
    return str(folder)


def split_rows(pairs: Path, held_out: int, work: Path) -> tuple[Path, Path]:
    opener = gzip.open if pairs.suffix == ".gz" else open
    with opener(pairs, "rt", encoding="utf-8") as file:
        rows = file.readlines()
    train, test = work / "train.jsonl", work / "held_out.jsonl"
    train.write_text("".join(rows[:-held_out]), encoding="utf-8")
    test.write_text("".join(rows[-held_out:]), encoding="utf-8")
    return train, test


def fit_dovetail(model: str, train: Path, held_out: Path, seed: int, options: Any, work: Path) -> float:
    """Stage 2 as `dovetail reward` runs it."""
    columns = {"chosen": "chosen", "rejected": "rejected", "transcript": True, "stages": ("reward",)}
    config = RunConfig(
        actor=ModelConfig(path=model),
        data=DataConfig(
            blend=(
                SourceConfig(path=str(train), held_out=False, **columns),
                SourceConfig(path=str(held_out), held_out=True, **columns),
            ),
            max_tokens=MAX_TOKENS,
            too_long="truncate_left",
            max_eval_rows=100_000,
            cache_dir=str(work / "cache"),
        ),
        reward=RewardConfig(
            batch_size=options.batch_size,
            micro_batch_tokens=32_768,
            eval_every=10_000,
            optimizer=OptimizerConfig(learning_rate=options.learning_rate, warmup_steps=3),
        ),
        stages=("reward",),
        output_dir=str(work / f"dovetail-{seed}"),
        seed=seed,
        tracking=TrackingConfig(tensorboard=False),
    )
    pipeline.run(config)
    summary = json.loads((work / f"dovetail-{seed}" / "summary.json").read_text())
    return float(summary["reward"]["accuracy"])


def fit_hugging_face(model: str, train: Path, held_out: Path, seed: int, options: Any, work: Path) -> float:
    """The same with nothing but transformers and torch."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(model)
    scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32).to(
        device
    )
    scorer.config.pad_token_id = 0 if tokenizer.eos_token_id != 0 else 1
    rows = [encode(json.loads(line), tokenizer) for line in train.open(encoding="utf-8")]
    test = [encode(json.loads(line), tokenizer) for line in held_out.open(encoding="utf-8")]
    optimizer = torch.optim.AdamW(
        scorer.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    steps = max(1, len(rows) // options.batch_size)
    for step in range(steps):
        rate = min(1.0, (step + 1) / 4) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = options.learning_rate * rate
        batch = [rows[i] for i in order[step * options.batch_size : (step + 1) * options.batch_size]]
        for part in (batch[i : i + 16] for i in range(0, len(batch), 16)):
            better, worse = scores(scorer, part, device)
            (-torch.nn.functional.logsigmoid(better - worse).sum() / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    scorer.eval()
    right = 0.0
    with torch.no_grad():
        for part in (test[i : i + 16] for i in range(0, len(test), 16)):
            better, worse = scores(scorer, part, device)
            right += float((better > worse).sum())
    return right / len(test)


def encode(row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Chosen and rejected transcript in the tokenizer's own chat template, cut from the left."""

    def ids(transcript: str) -> list[int]:
        turns = re.split(r"\n\n(Human|Assistant): ?", transcript)[1:]
        roles = {"Human": "user", "Assistant": "assistant"}
        messages = [
            {"role": roles[r], "content": c.strip()} for r, c in zip(turns[::2], turns[1::2], strict=True)
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False).input_ids)[-MAX_TOKENS:]

    return ids(row["chosen"]), ids(row["rejected"])


def scores(
    scorer: Any, pairs: list[tuple[list[int], list[int]]], device: torch.device
) -> tuple[Tensor, Tensor]:
    rows = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    width, pad = max(map(len, rows)), scorer.config.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = scorer(input_ids=ids, attention_mask=mask).logits.squeeze(-1).float()
    return logits[: len(pairs)], logits[len(pairs) :]


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
