"""The whole system at small scale: make data and a small model, train it through all stages, and measure it.

Responsible for: the demo's data, its configuration and the order of work; the ordinary stages do the training.
Not responsible for: the tasks and the gold score (data/synthetic/), the settings (recipes/), the table (cli/).
"""

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from dovetail.batches import PackedBatch, pack
from dovetail.config.run import RunConfig
from dovetail.config.stages import SftConfig
from dovetail.demo import (
    Dataset,
    Sizes,
    TaskPrompt,
    dataset,
    gold,
    gold_of,
    new_model,
    small_llama,
    train_tokenizer,
    write_answer,
)
from dovetail.engine.hybrid import HybridEngine
from dovetail.engine.sampling import Sampling
from dovetail.model.forward import language_model_loss
from dovetail.model.load import load_causal_lm
from dovetail.rlhf.rewards import Answer
from dovetail.rlhf.rollout import complete
from dovetail.stages.context import Context, open_run
from dovetail.stages.pipeline import run_stages
from dovetail.stages.same_data import SameData
from dovetail.stages.saving import save_model
from dovetail.stages.supervised import Task, fit
from dovetail.telemetry.log import say
from dovetail.text.chat_format import ChatFormat
from dovetail.text.tokenizer import load_tokenizer

PARTS = ("truth", "politeness", "brevity", "clean")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPlan:
    """The size and settings of the demo."""

    run: RunConfig
    """The three stages."""
    sizes: Sizes
    base: SftConfig | None
    """The training of the base model from random weights on plain text; None = the actor is a pretrained model."""
    answers_per_prompt: int = 4
    """Answers that a labeller rates beside each other."""
    from_writers: float = 0.15
    """Share of the compared answers that are demonstrations, not samples of the SFT model."""
    careless: float = 0.05
    """Share of the ratings that say nothing, as some of people's do."""


def run(plan: DemoPlan) -> None:
    """Everything from data to the measured models, whose scores are in `summary.json` at the end."""
    started = time.monotonic()
    rows = dataset(plan.run.seed, plan.sizes)
    with open_run(plan.run) as context:
        if context.world.is_first:
            rows.write(context.folder.path / "data")
        context.world.wait()
        if plan.base is not None:
            make_base_model(rows, plan.base, context)
        run_stages(replace(context, config=plan.run.model_copy(update={"stages": ("sft",)})))
        make_comparisons(rows, plan, context)
        run_stages(context, judge=gold_judge)
        seconds = time.monotonic() - started
        measured = measure(rows, plan, context)
        if context.world.is_first:
            context.folder.update_summary(measured | {"seconds": {"total": seconds}})


def make_base_model(rows: Dataset, settings: SftConfig, context: Context) -> None:
    """Train a tokenizer and a model from random weights with the supervised loop, every token of plain text counted."""
    folder = Path(context.config.actor.path)
    if (folder / "config.json").exists():
        say("base model: finished before, skipped")
        return
    say("base model: plain text, from random weights")
    tokenizer = train_tokenizer(
        [*rows.documents, *(m["content"] for row in rows.demonstrations for m in row.messages)]
    )
    model = new_model(small_llama(tokenizer), seed=context.config.seed)
    nn.Module.to(model, device=context.device, dtype=context.dtype)
    context.sharing.shard(model, "actor", context.device)
    texts = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in rows.documents]
    task = Task(
        stage="base",
        model=model,
        settings=settings,
        num_rows=len(texts),
        batch_of=lambda index: pack_texts([texts[i] for i in index]),
        loss_of=partial(language_model_loss, model),
        evaluate=dict,
        data=SameData(context.folder.path / "base", ChatFormat(tokenizer), *rows.documents),
    )
    fit(task, context)
    save_model(model, tokenizer, folder)


def pack_texts(texts: Sequence[Sequence[int]]) -> PackedBatch:
    """Plain text: every token but the first of each text counts."""
    return pack(texts, [[True] * len(ids) for ids in texts])


def make_comparisons(rows: Dataset, plan: DemoPlan, context: Context) -> None:
    """Several answers of the SFT model to each prompt, rated by a labeller who knows the gold score.

    Training rows have some writers' answers among them and some careless ratings; held-out rows have neither.
    """
    folder = context.folder.path / "data"
    if (folder / "held_out_comparisons.jsonl").exists():
        return
    sample = sampler_of(context.folder.model("sft"), context)
    rng = random.Random(f"comparisons {plan.run.seed}")
    train = compare(rows.reward_prompts, sample, rng, plan)
    honest = replace(plan, answers_per_prompt=2, from_writers=0.0, careless=0.0)
    held_out = compare([*rows.test, *rows.dev], sample, rng, honest)
    if context.world.is_first:
        write_lines(folder / "comparisons.jsonl", train)
        write_lines(folder / "held_out_comparisons.jsonl", held_out)
    context.world.wait()
    say(f"comparisons: {len(train)} prompts with {plan.answers_per_prompt} rated answers each")


Sample = Callable[[Sequence[TaskPrompt], int, bool], list[Answer]]


def compare(
    prompts: Sequence[TaskPrompt], sample: Sample, rng: random.Random, plan: DemoPlan
) -> list[dict[str, Any]]:
    """Rows with `prompt`, `answers` and `scores`; prompts whose answers all got one score are left out."""
    drawn = [sample(prompts, number, False) for number in range(plan.answers_per_prompt)]
    found = []
    for prompt, answers in zip(prompts, zip(*drawn, strict=True), strict=True):
        texts, scores = [], []
        for answer in answers:
            is_written = rng.random() < plan.from_writers
            text = write_answer(prompt.task, rng) if is_written else answer.text
            score = gold(prompt.task, text, finished=is_written or answer.finished).total
            texts.append(text)
            scores.append(rng.random() if rng.random() < plan.careless else score)
        if len(set(scores)) > 1:
            found.append({"prompt": prompt.messages, "answers": texts, "scores": scores})
    return found


def sampler_of(model: Path, context: Context) -> Sample:
    """Return a function that samples from a finished model: (prompts, seed, greedy) -> answers."""
    engine = HybridEngine(
        load_causal_lm(str(model), dtype=context.dtype, device=context.device), device=context.device
    )
    chat = ChatFormat(load_tokenizer(str(model)))
    settings = context.config.ppo.sampling

    def sample(prompts: Sequence[TaskPrompt], seed: int, greedy: bool) -> list[Answer]:
        how = Sampling(
            temperature=0.0 if greedy else settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            stop_token_ids=chat.stop_token_ids,
        )
        messages = [prompt.messages for prompt in prompts]
        ids = [chat.prompt_ids(m) for m in messages]
        return complete(ids, messages, engine, chat, how, seed=seed, world=context.world)

    return sample


def gold_judge(answers: Sequence[Answer]) -> Mapping[str, float]:
    """Mean gold score of answers to the demo's own prompts, and of its parts."""
    scores = [gold_of(answer.messages, answer.text, finished=answer.finished) for answer in answers]
    parts = {f"gold_{part}": fmean(getattr(score, part) for score in scores) for part in PARTS}
    return {"gold": fmean(score.total for score in scores)} | parts


def measure(rows: Dataset, plan: DemoPlan, context: Context) -> dict[str, Any]:
    """Gold score of base, SFT, PPO and EMA model on the test prompts, sampled and greedy."""
    folder = context.folder
    base = Path(plan.run.actor.path)
    models = {
        "base": base,
        "sft": folder.model("sft"),
        "ppo": folder.model("ppo"),
        "ema": folder.model("ema"),
    }
    results: dict[str, Any] = {"gold": {}, "gold_greedy": {}, "parts": {}, "parts_greedy": {}}
    results["test_prompts"] = len(rows.test)
    for name, path in models.items():
        sample = sampler_of(path, context)
        for kind, greedy in (("", False), ("_greedy", True)):
            answers = sample(rows.test, 99, greedy)
            judged = dict(gold_judge(answers))
            results["gold" + kind][name] = judged.pop("gold")
            results["parts" + kind][name] = {part: judged[f"gold_{part}"] for part in PARTS}
        if context.world.is_first:
            write_lines(folder.path / "answers" / f"{name}.jsonl", [answer_row(a) for a in answers])
    return results


def answer_row(answer: Answer) -> dict[str, Any]:
    """Return a greedy answer with its gold score, for the report."""
    score = gold_of(answer.messages, answer.text, finished=answer.finished)
    return {"messages": list(answer.messages), "answer": answer.text, "gold": score.total}


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON-lines file that is complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".half")
    half.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    half.replace(path)
