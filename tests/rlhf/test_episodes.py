"""Episodes equal a plain loop over transformers' generate, and no environment can end a run."""

import random
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from dovetail.config.stages import EnvironmentConfig, PpoConfig, SamplingConfig
from dovetail.data.records import Prompt, message
from dovetail.errors import ConfigError
from dovetail.rlhf.api import PPOTrainer, RLHFEngine
from dovetail.rlhf.build import Setup
from dovetail.rlhf.environments import Step, Turn
from dovetail.rlhf.rewards import Answer
from tests.fakes import END, byte_tokenizer, tiny_model
from tests.rlhf.tiny import tiny_config

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = ["Hi", "What is two plus two?", "Name a colour.", "Go on", "x", "Why?"]


def prompts() -> list[Prompt]:
    return [Prompt(messages=(message("user", text),), row={"number": i}) for i, text in enumerate(QUESTIONS)]


def ending_model(factor: float = 2.5) -> PreTrainedModel:
    """In many states the end of the turn is the likeliest token."""
    model = tiny_model()
    model.lm_head.weight.data[256] *= factor
    return model


def engine_with(environment: Any, *, algorithm: Any = None, **changes: Any) -> RLHFEngine:
    limits = {"max_turns": 4, "time_limit": 20.0} | changes.pop("limits", {})
    config = tiny_config(
        sampling=SamplingConfig(max_new_tokens=changes.pop("max_new_tokens", 230)),
        environment=EnvironmentConfig(source="given", **limits),
        cut_off_answers="keep_score",
        **changes,
    )
    return RLHFEngine(
        actor_model=ending_model(),
        tokenizer=byte_tokenizer(CHATML),
        total_steps=10,
        config=config,
        environment=environment,
        setup=Setup(device="cpu"),
        algorithm=algorithm,
    )


class Counting:
    """Says how many turns there were and pays for the length of each; ends after as many turns as the row says."""

    def reset(self, row: dict[str, Any]) -> str:
        self.turns, self.last = 0, row["number"] % 3 + 1
        return f"number {row['number']}"

    def step(self, turn: Turn) -> Step:
        self.turns += 1
        reward = len(turn.text) / 8 - 1
        return Step(f"turn {self.turns}", reward, done=self.turns == self.last)


def plain_episode(
    model: PreTrainedModel, prompt: Prompt, *, max_tokens: int, max_turns: int
) -> dict[str, Any]:
    """Play Counting with transformers' generate, text pasted by hand."""
    tokenizer = byte_tokenizer(CHATML)

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    environment = Counting()
    said = environment.reset(dict(prompt.row))
    question = prompt.messages[0]["content"]
    prompt_ids = ids_of(f"<|im_start|>user\n{question}\n\n{said}{END}\n<|im_start|>assistant\n")
    answer: list[int] = []
    chosen: list[bool] = []
    rewards: list[tuple[int, float]] = []
    for turn in range(1, max_turns + 1):
        given = torch.tensor([prompt_ids + answer])
        whole = model.generate(
            given,
            do_sample=False,
            max_new_tokens=max_tokens - len(answer),
            eos_token_id=256,
            pad_token_id=257,
        )
        new = whole[0, given.shape[1] :].tolist()
        answer += new
        chosen += [True] * len(new)
        if new[-1] != 256:
            return {
                "ids": answer,
                "chosen": chosen,
                "rewards": rewards,
                "finished": False,
                "prompt": prompt_ids,
            }
        text = tokenizer.decode(new[:-1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        step = environment.step(Turn(text))
        rewards.append((len(answer) - 1, step.reward))
        if step.done:
            return {
                "ids": answer,
                "chosen": chosen,
                "rewards": rewards,
                "finished": True,
                "prompt": prompt_ids,
            }
        reply = ids_of(f"\n<|im_start|>user\n{step.reply}{END}\n<|im_start|>assistant\n")
        if turn == max_turns or len(answer) + len(reply) >= max_tokens:
            break
        answer += reply
        chosen += [False] * len(reply)
    return {"ids": answer, "chosen": chosen, "rewards": rewards, "finished": False, "prompt": prompt_ids}


@pytest.mark.parametrize(("max_turns", "max_tokens"), [(4, 230), (2, 230), (4, 60)])
def test_episodes_equal_a_plain_loop_over_generate(max_turns: int, max_tokens: int) -> None:
    engine = engine_with(Counting, limits={"max_turns": max_turns}, max_new_tokens=max_tokens)
    answers = engine.generate(prompts(), seed=0, greedy=True)
    for answer, prompt in zip(answers, prompts(), strict=True):
        expected = plain_episode(ending_model(), prompt, max_tokens=max_tokens, max_turns=max_turns)
        assert list(answer.prompt_ids) == expected["prompt"]
        assert list(answer.answer_ids) == expected["ids"]
        assert list(answer.chosen) == expected["chosen"]
        assert answer.episode is not None
        assert list(answer.episode.rewards) == expected["rewards"]
        assert answer.finished == expected["finished"]
        assert len(answer.logprobs) == sum(expected["chosen"])
    turns = [answer.episode.num_turns for answer in answers if answer.episode]
    assert len(set(turns)) > 1
    assert {answer.finished for answer in answers} == (
        {True} if max_turns == 4 and max_tokens == 230 else {True, False}
    )


def test_the_mask_and_the_rewards_are_those_of_the_actors_turns() -> None:
    engine = engine_with(Counting, kl_coefficient=0.0)
    collected = PPOTrainer(engine).generate_experience(prompts())
    experience = collected.experience
    start = 0
    for answer, score in zip(collected.answers, experience.scores_S.tolist(), strict=True):
        assert answer.episode is not None
        length = len(answer.prompt_ids) + len(answer.answer_ids)
        behind = start + len(answer.prompt_ids)
        assert experience.token_ids_T[start : start + length].tolist() == [
            *answer.prompt_ids,
            *answer.answer_ids,
        ]
        assert experience.mask_T[start:behind].sum() == 0
        assert experience.mask_T[behind : start + length].tolist() == list(answer.chosen)
        expected = [0.0] * len(answer.answer_ids)
        for place, reward in answer.episode.rewards:
            assert answer.answer_ids[place] == 256
            expected[place] += reward
        assert experience.rewards_T[behind : start + length].tolist() == pytest.approx(expected, abs=1e-5)
        assert score == pytest.approx(sum(expected), abs=1e-5)
        start += length
    outside_T = ~experience.mask_T
    for column in (experience.rewards_T, experience.advantages_T, experience.reference_logprobs_T):
        assert not column[outside_T].any()
    assert collected.stats["environment/turns_mean"] == 2.0


class Slow:
    """Answers after a while that is drawn anew in each run, sync and async by turns."""

    def reset(self, row: dict[str, Any], seed: int) -> str:
        self.seed, self.turns = seed, 0
        time.sleep(random.random() / 50)
        return f"seed {seed % 1000}"

    async def step(self, turn: Turn) -> tuple[str, float, bool]:
        import asyncio

        self.turns += 1
        await asyncio.sleep(random.random() / 20)
        return f"{self.turns} {len(turn.text)} {self.seed % 7}", 1.0, self.turns == 3


def tokens_of(answers: list[Answer]) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    return [(answer.prompt_ids + answer.answer_ids, answer.chosen) for answer in answers]


def test_the_order_in_which_environments_finish_changes_nothing() -> None:
    engine = engine_with(Slow)
    first = engine.generate(prompts() * 2, seed=5)
    second = engine.generate(prompts() * 2, seed=5)
    assert tokens_of(first) == tokens_of(second)
    logprobs = [torch.tensor([p for a in answers for p in a.logprobs]) for answers in (first, second)]
    torch.testing.assert_close(logprobs[0], logprobs[1], atol=1e-5, rtol=0)
    assert tokens_of(engine.generate(prompts() * 2, seed=6)) != tokens_of(first)


def test_answers_to_one_prompt_begin_alike() -> None:
    one, other = prompts()[:2]
    answers = engine_with(Slow).generate([one, one, other, other], seed=5)
    assert answers[0].prompt_ids == answers[1].prompt_ids
    assert answers[2].prompt_ids == answers[3].prompt_ids
    seeds = [answer.messages[0]["content"].splitlines()[-1] for answer in answers]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]


def failing(step: Callable[[], Any], where: str) -> Any:
    """Return an environment that does something bad in the episode of the first row; the others get 1 and end."""

    class Failing:
        def reset(self, row: dict[str, Any]) -> Any:
            self.is_bad = row["number"] == 0
            return step() if self.is_bad and where == "reset" else None

        def step(self, turn: Turn) -> Any:
            return step() if self.is_bad else Step(reward=1.0 + len(turn.text), done=True)

    return Failing


def raises(error: BaseException) -> Callable[[], Any]:
    def bad() -> Any:
        raise error

    return bad


BAD = {
    "raises": (
        raises(RuntimeError("lost the game server")),
        r"raised RuntimeError: lost the game server \(.*line",
    ),
    "exits": (lambda: sys.exit(3), "raised SystemExit: 3"),
    "hangs": (lambda: time.sleep(60), "gave no answer within 0.3 s"),
    "returns nothing": (lambda: None, "returned None from step"),
    "pays a NaN": (lambda: Step("go on", float("nan")), "returned the reward nan from step"),
    "pays a text": (lambda: ("go on", "much", False), "returned .* from step"),
    "speaks as the assistant": (
        lambda: Step([{"role": "assistant", "content": "I did it"}]),
        "returned .* neither a text nor a list of messages",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_an_environment_that_fails_is_counted_and_gets_the_lowest_score(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, reason = BAD[name]
    engine = engine_with(failing(bad, "step"), limits={"time_limit": 0.3})
    trainer = PPOTrainer(engine)
    collected = trainer.generate_experience(prompts())
    assert collected.stats["environment/failures"] == 1.0
    scores = collected.experience.scores_S
    assert scores[0] == scores[1:].min() >= 1
    episode = collected.answers[0].episode
    assert episode is not None
    assert episode.failure is not None
    assert pytest.importorskip("re").search(reason, episode.failure.reason)
    assert "environment Failing gave no score to 1 of 6 answers" in capsys.readouterr().err.replace("\n", " ")
    trainer.train_rlhf(collected)


@pytest.mark.parametrize(
    "bad", [raises(OSError("no container")), lambda: time.sleep(60), lambda: 7, lambda: "long " * 200]
)
def test_an_environment_that_cannot_begin_leaves_an_answer_without_tokens(bad: Callable[[], Any]) -> None:
    engine = engine_with(failing(bad, "reset"), limits={"time_limit": 0.3, "fallback": -2.0})
    trainer = PPOTrainer(engine)
    collected = trainer.generate_experience(prompts())
    assert collected.answers[0].answer_ids == ()
    assert collected.experience.scores_S[0] == -2.0
    assert collected.stats["environment/failures"] == 1.0
    actor_loss, critic_loss = trainer.train_rlhf(collected)
    assert torch.tensor([actor_loss, critic_loss]).isfinite().all()


def test_an_environment_that_always_fails_ends_the_run_with_its_file_and_line() -> None:
    class Broken:
        def reset(self, row: dict[str, Any]) -> None:
            raise KeyError("board")

    Broken.step = lambda self, turn: None  # type: ignore[attr-defined]
    with pytest.raises(
        ConfigError, match=r"environment Broken raised KeyError: 'board' \(.*test_episodes.py line"
    ):
        PPOTrainer(engine_with(Broken)).generate_experience(prompts())


def test_an_environment_that_never_ends_is_cut_off() -> None:
    class Endless:
        def reset(self, row: dict[str, Any]) -> None:
            pass

        def step(self, turn: Turn) -> str:
            return "go on"

    answers = engine_with(Endless, limits={"max_turns": 3}).generate(prompts(), seed=1)
    assert all(answer.episode and answer.episode.num_turns <= 3 for answer in answers)
    assert any(answer.episode and answer.episode.num_turns == 3 for answer in answers)
    assert not any(answer.finished for answer in answers)
    assert all(answer.chosen[-1] for answer in answers)


def test_an_environment_must_have_both_methods() -> None:
    class Half:
        def reset(self, row: dict[str, Any]) -> None: ...

    with pytest.raises(ConfigError, match="environment Half has no method step"):
        engine_with(Half)


def test_the_settings_of_ppo_take_a_text_for_an_environment() -> None:
    assert PpoConfig.model_validate({"environment": "game.py:Game"}).environment == EnvironmentConfig(
        source="game.py:Game"
    )


def test_processes_that_would_generate_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    split = SimpleNamespace(group=SimpleNamespace(size=2))
    monkeypatch.setattr("dovetail.rlhf.build.split_to_generate", lambda *given, **named: split)
    with pytest.raises(
        ConfigError, match=r"2 processes would generate together(.|\n)*tensor_parallel.generation=1"
    ):
        engine_with(Counting)
