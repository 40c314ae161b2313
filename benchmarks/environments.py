"""Environments: tokens per second of episodes whose environments take their time, and of the same without waiting.

    python benchmarks/environments.py                               64 environments on a CPU
    python benchmarks/environments.py --model opt-1.3b --device cuda --dtype bfloat16

Every environment replies to each turn after a time of its own, uniformly between 0 and twice the mean. Turns end at a
token out of a set that makes them `--turn-tokens` long on average, so both runs draw the same tokens, which is checked.
One JSON line a run, and the ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from functools import partial
from typing import Any

import shapes
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dovetail.config.stages import EnvironmentConfig
from dovetail.data.records import Prompt, message
from dovetail.engine import HybridEngine, Sampling
from dovetail.rlhf.environments import Step, Turn, environments_of
from dovetail.rlhf.episodes import play
from dovetail.rlhf.rewards import Answer
from dovetail.text.chat_format import ChatFormat

TEMPLATE = "{% for m in messages %}{{ m.role + ' ' + m.content + ' <end> ' }}{% endfor %}{{ 'assistant ' }}"


class Office:
    """An environment that takes its time for each reply."""

    def __init__(self, mean_seconds: float, turns: int, reply: str) -> None:
        self.mean_seconds, self.turns, self.reply = mean_seconds, turns, reply

    def reset(self, row: dict[str, Any], seed: int) -> None:
        """Begin; the times are the same in each run."""
        self.draw, self.num_turns = random.Random(seed), 0

    async def step(self, turn: Turn) -> Step:
        """Reply after a while."""
        self.num_turns += 1
        seconds = self.draw.uniform(0, 2 * self.mean_seconds)
        if seconds:
            await asyncio.sleep(seconds)
        return Step(self.reply, done=self.num_turns == self.turns)


def main() -> None:
    """Play the episodes with and without waiting."""
    options = arguments()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    model = shapes.causal_lm(options.model, device, dtype)
    vocabulary = model.config.vocab_size
    chat = ChatFormat(tokenizer_of(vocabulary))
    prompts = [
        Prompt(messages=(message("user", words_of(ids)),))
        for ids in shapes.prompts_of(options.episodes, options.prompt, vocabulary)
    ]
    stops = range(0, vocabulary, options.turn_tokens)
    sampling = Sampling(max_new_tokens=options.max_tokens, stop_token_ids=tuple(stops))
    reply = words_of(shapes.prompts_of(1, options.reply, vocabulary, seed=1)[0])
    engine = HybridEngine(model, max_running=options.places)  # one for all calls, as PPO has it
    common = {
        "benchmark": "environments", "model": options.model, "episodes": options.episodes, "places": options.places,
        "turns": options.turns, "dtype": options.dtype, **shapes.setting(device),
    }  # fmt: skip
    means = {"without waiting": 0.0, "waiting": options.mean_seconds}
    seconds: dict[str, list[float]] = {name: [] for name in means}
    answers: dict[str, list[Answer]] = {}
    for _ in range(options.warmup + options.repeats):
        for name, mean_seconds in means.items():  # by turns, so that what else the machine does hits both
            config = EnvironmentConfig(source="Office", max_turns=options.turns)
            environments = environments_of(partial(Office, mean_seconds, options.turns, reply), config, chat)
            assert environments is not None
            start = shapes.now(device)
            answers[name] = play(
                prompts, list(range(len(prompts))), environments, engine, sampling, context=engine.context
            )
            seconds[name].append(shapes.now(device) - start)
    drawn = {name: [answer.answer_ids for answer in given] for name, given in answers.items()}
    speeds = {
        name: row_of(answers[name], statistics.median(seconds[name][options.warmup :])) for name in means
    }
    for name, mean_seconds in means.items():
        shapes.show(**common, run=name, mean_seconds=mean_seconds, **speeds[name])
    rates = {name: row["tokens_per_second"] for name, row in speeds.items()}
    shapes.show(
        benchmark="environments",
        ratio=rates["waiting"] / rates["without waiting"],
        same_tokens=drawn["waiting"] == drawn["without waiting"],
    )


def row_of(answers: list[Answer], seconds: float) -> dict[str, float]:
    """Return the figures of one run."""
    num_sampled = sum(sum(answer.chosen) for answer in answers)
    num_turns = sum(answer.episode.num_turns for answer in answers if answer.episode)
    return {"seconds": seconds, "sampled_tokens": num_sampled, "sampled_turns": num_turns,
            "tokens_per_second": num_sampled / seconds}  # fmt: skip


def words_of(ids: list[int]) -> str:
    """Return the text of ids."""
    return " ".join(f"w{i}" for i in ids)


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a word for each id."""
    words = ["<unk>", "<end>", "assistant", "user"] + [f"w{i}" for i in range(4, vocabulary)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=shapes.SHAPES, default="small")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--places", type=int, default=64, help="the most episodes that decode at once")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--reply", type=int, default=16, help="tokens of each reply")
    parser.add_argument("--turn-tokens", type=int, default=32, help="tokens of a turn, on average")
    parser.add_argument("--max-tokens", type=int, default=384, help="tokens of an episode, at most")
    parser.add_argument("--mean-seconds", type=float, default=0.25, help="the mean time for a reply")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
