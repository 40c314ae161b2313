"""Tools in episodes: results and errors reach the model as the template prints them, and a model learns to call one."""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from dovetail.config.stages import EnvironmentConfig, OptimizerConfig, PpoConfig, SamplingConfig
from dovetail.data.records import Prompt, message
from dovetail.engine.sampling import Sampling
from dovetail.engine.scheduler import Load
from dovetail.parallel.world import WHOLE
from dovetail.rlhf.api import PPOTrainer, RLHFEngine
from dovetail.rlhf.build import Setup
from dovetail.rlhf.environments import Step, Tools, Turn, environments_of
from dovetail.rlhf.episodes import play
from dovetail.rlhf.rewards import Answer
from dovetail.text.chat_format import ChatFormat
from dovetail.text.tools import ToolCall
from tests.fakes import byte_tokenizer
from tests.text.test_tools import QWEN

TEMPLATE = QWEN.replace("<|im_end|>", "<|end|>")


class Scripted:
    """A stand-in for the engine, whose turns are given."""

    group = WHOLE

    def __init__(self, chat: ChatFormat, turns: Sequence[str]) -> None:
        self.chat, self.turns = chat, turns
        self.max_tokens = 10_000
        self.num_blocks = 0

    @contextmanager
    def generating(self) -> Iterator["Scripted"]:
        self.num_blocks += 1
        yield self

    def serve(self, longest: Sequence[int]) -> "Scripted":
        return self

    def __call__(self, source: Any) -> None:
        turns = iter(self.turns)
        while (requests := source.poll(Load(0, 0, 0))) is not None:
            for request in requests:
                request.token_ids = self.chat.answer_ids(next(turns))
                request.logprobs = [0.0] * len(request.token_ids)
                request.finish_reason = "stop"


def played(environment: Any, turns: Sequence[str], **limits: Any) -> Answer:
    """Return the one episode that the given turns make."""
    config = EnvironmentConfig(source="given", **limits)
    environments = environments_of(environment, config, ChatFormat(byte_tokenizer(TEMPLATE)))
    assert environments is not None
    prompt = Prompt(messages=(message("user", "How much?"),), row={"answer": "5"})
    engine: Any = Scripted(environments.chat, turns)
    sampling = Sampling(max_new_tokens=5000)
    (answer,) = play([prompt], [0], environments, engine, sampling, context=None)
    return answer


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first one.
        b: The second one.
    """
    return a + b


async def slow_add(a: int, b: int) -> int:
    """Add two numbers, slowly.

    Args:
        a: The first one.
        b: The second one.
    """
    await asyncio.sleep(0.01)
    return a + b


def call(text: str) -> str:
    return f"<tool_call>{text}</tool_call>"


def called(name: str, **arguments: Any) -> str:
    return call(json.dumps({"name": name, "arguments": arguments}))


def replies_in(answer: Answer) -> list[str]:
    return [turn["content"] for turn in answer.messages if turn["role"] == "tool"]


@pytest.mark.parametrize("tool", [add, slow_add])
def test_a_call_is_answered_and_the_tokens_are_those_of_the_template(tool: Callable[..., Any]) -> None:
    asks = "Let me add. " + called(tool.__name__, a=2, b=3)
    answer = played([tool], [asks, "It is 5."])
    tokenizer = byte_tokenizer(TEMPLATE)
    text = tokenizer.decode(answer.answer_ids)
    reply = "\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|end|>\n<|im_start|>assistant\n"
    assert text == f"{asks}<|end|>{reply}It is 5.<|end|>"
    own = tokenizer.decode([i for i, mine in zip(answer.answer_ids, answer.chosen, strict=True) if mine])
    assert own == f"{asks}<|end|>It is 5.<|end|>"
    assert answer.text == "It is 5."
    assert answer.finished
    assert answer.episode is not None
    assert (answer.episode.num_turns, answer.episode.num_calls) == (2, 1)


ERRORS = {
    "no JSON": (call("add(2, 3)"), "error: the call is not valid JSON", 1),
    "never closed": ('<tool_call>{"name": "add"', "error: the call has no closing tag", 1),
    "unknown": (called("sub"), "error: there is no tool sub; the tools are add", 0),
    "lacks an argument": (called("add", a=1), "error: add: missing a required argument", 0),
    "one too many": (
        called("add", a=1, b=1, c=1), "error: add: got an unexpected", 0,
    ),
    "raises": (called("add", a=1, b="x"), "error: TypeError: unsupported operand", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_a_call_that_goes_wrong_is_answered_with_the_error(name: str) -> None:
    wrong, error, num_unread = ERRORS[name]
    answer = played([add], [wrong, called("add", a=2, b=3), "5"])
    first, second = replies_in(answer)
    assert first.startswith(error)
    assert second == "5"
    assert answer.episode is not None
    assert answer.episode.num_unread_calls == num_unread
    assert answer.episode.failure is None


def test_several_calls_of_a_turn_are_answered_in_order() -> None:
    both = called("add", a=1, b=1) + called("add", a=2, b=2)
    assert replies_in(played([add], [both, "ok"])) == ["2", "4"]


def test_nothing_is_run_of_a_turn_with_a_call_that_cannot_be_read() -> None:
    mixed = called("add", a=1, b=1) + call("{")
    (reply,) = replies_in(played([add], [mixed, "ok"]))
    assert reply.startswith("error: the call is not valid JSON")


def test_weights_are_gathered_also_where_no_episode_begins() -> None:
    class Broken:
        def reset(self, row: dict[str, Any]) -> None:
            raise OSError

        def step(self, turn: Turn) -> None: ...

    chat = ChatFormat(byte_tokenizer(TEMPLATE))
    environments = environments_of(Broken, None, chat)
    assert environments is not None
    engine: Any = Scripted(chat, [])
    prompt = Prompt(messages=(message("user", "How much?"),))
    for prompts in ([prompt], []):  # a process may have no share at all
        play(prompts, [0] * len(prompts), environments, engine, Sampling(max_new_tokens=5), context=None)
    assert engine.num_blocks == 2


class Graded(Tools):
    """Tools, and a reward for the right answer."""

    def __init__(self) -> None:
        super().__init__([add])

    def reset(self, row: dict[str, Any]) -> None:
        self.right = row["answer"]
        self.calls: list[ToolCall] = []

    def step(self, turn: Turn) -> Step:
        self.calls += turn.calls
        if turn.calls:
            return super().step(turn)._replace(reward=0.25)
        return Step(reward=float(turn.text == self.right), done=True)


def test_a_class_with_tools_of_its_own_may_grade_turns() -> None:
    answer = played(Graded, [called("add", a=2, b=3), "5"])
    assert answer.episode is not None
    assert [reward for _, reward in answer.episode.rewards] == [0.25, 1.0]
    assert [answer.answer_ids[place] for place, _ in answer.episode.rewards] == [256, 256]


def test_a_model_that_only_calls_is_cut_off() -> None:
    again = called("add", a=2, b=3)
    answer = played([add], [again] * 3, max_turns=3)
    assert not answer.finished
    assert answer.chosen[-1]
    assert len(replies_in(answer)) == 2


LOOK = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
WORDS = [
    "<pad>",
    "<unk>",
    "<user>",
    "<assistant>",
    "<tool>",
    "<tools>",
    "<end>",
    "?",
    LOOK,
    "0",
    "1",
    "2",
    "3",
]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of the task, the call included."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.add_tokens([AddedToken(word, special=False) for word in WORDS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% if tools %}<tools>{% endif %}{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def look() -> str:
    """Look at the hidden number."""
    raise AssertionError("the environment answers")


class Hidden:
    """A number that the tool shows; a first look is worth something, and to say the number after it much more."""

    tools = (look,)

    def reset(self, row: dict[str, Any], seed: int) -> None:
        self.number, self.has_looked = str(seed % 4), False

    def step(self, turn: Turn) -> Step:
        if turn.calls:
            is_first, self.has_looked = not self.has_looked, True
            return Step([{"role": "tool", "content": self.number, "name": "look"}], reward=0.2 * is_first)
        return Step(reward=float(self.has_looked and turn.text == self.number), done=True)


def test_a_model_learns_to_call_the_tool() -> None:
    tokenizer = word_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64, eos_token_id=6, pad_token_id=0, bos_token_id=None,
        )  # fmt: skip
        actor = AutoModelForCausalLM.from_config(config)
    constant = OptimizerConfig(learning_rate=5e-3, schedule="constant")
    engine = RLHFEngine(
        actor_model=actor,
        tokenizer=tokenizer,
        total_steps=1000,
        config=PpoConfig(
            sampling=SamplingConfig(max_new_tokens=16),
            environment=EnvironmentConfig(source="given", max_turns=3),
            actor_optimizer=constant,
            critic_optimizer=constant,
            critic_warmup_rollouts=0,
            minibatches=4,
            ppo_epochs=2,
            kl_coefficient=0.0,
        ),
        environment=Hidden,
        setup=Setup(device="cpu"),
    )
    trainer = PPOTrainer(engine)
    calls = []
    for _ in range(30):
        collected = trainer.generate_experience(["?"] * 64)
        trainer.train_rlhf(collected)
        calls.append(collected.stats["environment/calls_mean"])
    assert calls[0] < 0.4
    assert min(calls[-3:]) > 0.8
    assert collected.stats["reward/environment_mean"] > 0.18
