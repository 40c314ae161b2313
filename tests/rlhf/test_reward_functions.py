"""Functions in each of their forms, and functions that raise, hang or return nonsense."""

import asyncio
import math
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.config.stages import PpoConfig, RewardTerm
from dovetail.errors import ConfigError
from dovetail.parallel.world import World
from dovetail.rlhf import attempts
from dovetail.rlhf.reward_functions import function_scorer, load_reward_function
from dovetail.rlhf.rewards import Answer, FirstRankScorer, Part, Scored, WeightedSum

TEXTS = ["a", "bb", "ccc", "dddd"]
ROWS = [{"answer": str(i), "level": i} for i in range(len(TEXTS))]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "PAUSES", (0.0, 0.0))


def answers(texts: Sequence[str] = TEXTS, rows: Sequence[dict[str, Any]] = ROWS) -> list[Answer]:
    return [
        Answer(
            messages=({"role": "user", "content": f"Say {text}"},),
            text=text,
            prompt_ids=(1,),
            answer_ids=tuple(range(len(text))),
            logprobs=(0.0,) * len(text),
            finished=True,
            row=row,
        )
        for text, row in zip(texts, rows, strict=True)
    ]


def batched(given: list[Answer]) -> list[float]:
    return [len(one.text) + one.row["level"] for one in given]


def lazy(given: list[Answer]) -> Any:
    yield from batched(given)


def by_lists(completions: list[str], level: list[int], **columns: Any) -> list[float]:
    assert columns["answer"] == ["0", "1", "2", "3"]
    assert columns["prompts"][1] == [{"role": "user", "content": "Say bb"}]
    assert columns["completion_ids"][2] == [0, 1, 2]
    return [len(text) + n for text, n in zip(completions, level, strict=True)]


def by_few_lists(prompts: list[Any], completions: list[str], level: list[int]) -> torch.Tensor:
    return torch.tensor([len(text) + n for text, n in zip(completions, level, strict=True)])


def one_by_one(completion: str, level: int) -> float:
    return len(completion) + level


def one_with_all(completion: str, **columns: Any) -> float:
    assert columns["prompt"] == [{"role": "user", "content": f"Say {completion}"}]
    return len(completion) + int(columns["answer"])


async def later(given: list[Answer]) -> list[float]:
    await asyncio.sleep(0)
    return batched(given)


async def lists_later(completions: list[str], level: list[int]) -> list[float]:
    await asyncio.sleep(0)
    return [len(text) + n for text, n in zip(completions, level, strict=True)]


async def one_later(completion: str, level: int) -> float:
    await asyncio.sleep(0)
    return len(completion) + level


class Judge:
    """A judge that remembers something."""

    def __call__(self, completion: str, level: int) -> float:
        return len(completion) + level


FORMS = [
    batched, lazy, by_lists, by_few_lists, one_by_one, one_with_all, later, lists_later, one_later, Judge(),
]  # fmt: skip


@pytest.mark.parametrize("function", FORMS, ids=lambda form: getattr(form, "__name__", "object"))
def test_every_form_gets_the_answers_with_their_rows(function: Callable[..., Any]) -> None:
    scored = function_scorer(function, "f.py:form")(answers())
    assert scored.scores_S.tolist() == [1.0, 3.0, 5.0, 7.0]
    assert scored.stats == {"reward/form_failures": 0.0}


def test_async_functions_of_all_batches_share_one_event_loop() -> None:
    loops = set()

    async def score(completion: str) -> float:
        loops.add(asyncio.get_running_loop())
        return 1.0

    scorer = function_scorer(score, "score")
    scorer(answers())
    scorer(answers())
    assert len(loops) == 1


def failing_on(text: str, act: Callable[[], Any]) -> Callable[..., Any]:
    def score(completion: str, level: int) -> Any:
        return act() if completion == text else float(len(completion))

    return score


def raise_(error: BaseException) -> Any:
    raise error


NONSENSE: dict[str, tuple[Callable[[], Any], str]] = {
    "raises": (
        lambda: raise_(KeyError("x")),
        r"raised KeyError: 'x' \(.*test_reward_functions.py line \d+\)",
    ),
    "exits": (lambda: raise_(SystemExit(3)), "raised SystemExit: 3"),
    "NaN": (lambda: math.nan, "gave 'nan' to answer 2, 'ccc': not a finite number"),
    "infinite": (lambda: -math.inf, "gave '-inf'"),
    "beyond float32": (lambda: 1e300, "not a finite number"),
    "None": (lambda: None, "gave 'None'"),
    "text": (lambda: "3", "not a finite number"),
    "a list": (lambda: [1.0, 2.0], "not a finite number"),
    "a tensor of two": (lambda: torch.ones(2), "not a finite number"),
    "hangs": (lambda: threading.Event().wait(), "gave no answer within 0.2 s"),
}


@pytest.mark.parametrize("name", NONSENSE)
@pytest.mark.parametrize("is_async", [False, True])
def test_an_answer_that_a_function_fails_on_costs_the_others_nothing(
    name: str, is_async: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    act, reason = NONSENSE[name]
    plain = failing_on("ccc", act)

    async def awaited(completion: str, level: int) -> Any:
        if name == "hangs" and completion == "ccc":
            await asyncio.Event().wait()
        return plain(completion, level)

    scored = function_scorer(awaited if is_async else plain, "score", time_limit=0.2)(answers())
    assert scored.scores_S.tolist() == [1.0, 2.0, 1.0, 4.0]  # the lowest of the others
    assert scored.stats == {"reward/score_failures": 1.0}
    told = capsys.readouterr().err
    assert "gave no score to 1 of 4 answers, which count as 1" in told
    if not (is_async and name == "exits"):
        assert re.search(reason, told)


def test_a_fallback_that_is_set_is_taken() -> None:
    score = failing_on("ccc", lambda: None)
    assert function_scorer(score, "score", fallback=-7.0)(answers()).scores_S.tolist() == [
        1.0,
        2.0,
        -7.0,
        4.0,
    ]


def test_an_async_function_that_hangs_is_cancelled() -> None:
    cancelled = threading.Event()

    async def score(given: list[Answer]) -> list[float]:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return []

    with pytest.raises(ConfigError, match=r"score gave no answer within 0\.1 s"):
        function_scorer(score, "score", time_limit=0.1)(answers())
    assert cancelled.wait(5)


@pytest.mark.parametrize("num_failures", [0, 1, 2])
def test_a_call_that_fails_is_tried_again(num_failures: int) -> None:
    calls: list[int] = []

    def score(given: list[Answer]) -> list[float]:
        calls.append(1)
        if len(calls) <= num_failures:
            raise ConnectionError
        return batched(given)

    scored = function_scorer(score, "score")(answers())
    assert scored.scores_S.tolist() == [1.0, 3.0, 5.0, 7.0]
    assert len(calls) == num_failures + 1


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        ([1.0], "returned 1 scores for 4 answers"),
        ([1.0] * 5, "returned 5 scores for 4 answers"),
        (3.0, "returned '3.0', which is not a list of numbers"),
        (None, "returned 'None', which is not a list of numbers"),
        ([math.nan] * 4, "gave 'nan' to answer 0"),
    ],
)
def test_a_function_that_is_wrong_from_the_start_is_an_error(returned: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"reward function f.py:score {problem}") as caught:
        function_scorer(lambda given: returned, "f.py:score")(answers())
    assert "one finite number per answer" in str(caught.value.hint)


def test_lost_batches_keep_the_mean_and_three_in_a_row_end_the_run() -> None:
    lost = {2, 3, 5, 6, 7}
    batch = 0

    def score(given: list[Answer]) -> list[float]:
        if batch in lost:
            raise ConnectionError("no route")
        return batched(given)

    scorer = function_scorer(score, "score")
    for batch in range(1, 7):
        scored = scorer(answers())
        assert scored.scores_S.tolist() == ([4.0] * 4 if batch in lost else [1.0, 3.0, 5.0, 7.0])
        assert scored.stats == {"reward/score_failures": 4.0 if batch in lost else 0.0}
    batch = 7
    with pytest.raises(ConfigError, match=r"raised ConnectionError: no route .*3 batches in a row"):
        scorer(answers())


@pytest.mark.parametrize("form", ["lists", "one"])
def test_a_column_that_the_row_lacks_is_named(form: str) -> None:
    functions: dict[str, Any] = {
        "lists": lambda completions, solution: [1.0 for _ in completions],
        "one": lambda completion, solution: 1.0,
    }
    with pytest.raises(
        ConfigError, match="needs the column solution, which the row lacks; it has answer, level"
    ):
        function_scorer(functions[form], "score")(answers())


def test_a_verifier_is_loaded_by_its_name_and_reads_the_rows() -> None:
    rows = [{"answer": "1"}, {"answer": "3"}, {"answer": "none"}, {}]
    scorer = load_reward_function("number")
    scored = scorer(answers(["it is 1", "it is 2", "3", "4"], rows))
    assert scored.scores_S.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert scored.stats == {"reward/number_failures": 2.0}
    with pytest.raises(ConfigError, match="number needs the column answer, which the row lacks; it has none"):
        load_reward_function("number")(answers(TEXTS, [{}] * 4))


def test_a_verifier_that_does_not_exist_is_answered_with_those_that_do() -> None:
    with pytest.raises(
        ConfigError, match=r"'nubmer' names no function(.|\n)*did you mean number\?.*code, exact"
    ):
        load_reward_function("nubmer")


@pytest.mark.parametrize("name", ["maths", "json_schema"])
def test_a_verifier_whose_library_is_absent_says_how_to_get_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"is not installed(.|\n)*dovetail-rlhf\[verifiers\]"):
        load_reward_function(name)


def test_a_sum_is_weighted_and_shows_its_parts() -> None:
    def model(given: Sequence[Answer]) -> Scored:
        return Scored(torch.tensor([0.5, -0.5, 1.5, 0.0]))

    parts = [
        Part("model", model),
        Part("form", function_scorer(batched, "f.py:form"), 2.0),
        Part("short", function_scorer(lambda completion: len(completion), "short"), -0.25),
    ]
    scored = WeightedSum(parts)(answers())
    expected = [
        m + 2.0 * f - 0.25 * s
        for m, f, s in zip([0.5, -0.5, 1.5, 0.0], [1, 3, 5, 7], [1, 2, 3, 4], strict=True)
    ]
    assert scored.scores_S.tolist() == pytest.approx(expected)
    assert scored.stats == {
        "reward/model_mean": 0.375,
        "reward/form_mean": 4.0,
        "reward/form_failures": 0.0,
        "reward/short_mean": 2.5,
        "reward/short_failures": 0.0,
    }


SENT: list[Any] = []


class Pair(World):
    """The first or the second of two processes; what the first one sends is kept for the second."""

    def from_first(self, value: Any) -> Any:
        if self.is_first:
            SENT.append(value)
        return SENT[-1]


@pytest.mark.parametrize("fails", [False, True])
def test_the_first_process_asks_and_all_have_scores_and_numbers(fails: bool) -> None:
    calls: list[int] = []

    def score(given: list[Answer]) -> list[float]:
        calls.append(len(given))
        return [math.nan] * 4 if fails else batched(given)

    found = []
    for rank in range(2):
        scorer = FirstRankScorer(function_scorer(score, "score"), Pair(rank=rank, size=2))
        if fails:
            with pytest.raises(ConfigError, match="gave 'nan'") as caught:
                scorer(answers())
            assert caught.value.is_everywhere
        else:
            scored = scorer(answers())
            found.append((scored.scores_S.tolist(), scored.stats))
    assert calls == [4]
    assert found == ([] if fails else [([1.0, 3.0, 5.0, 7.0], {"reward/score_failures": 0.0})] * 2)


@pytest.mark.parametrize(
    ("given", "terms"),
    [
        (None, ()),
        ([], ()),
        ("number", (RewardTerm(function="number"),)),
        (["number", "a.py:f"], (RewardTerm(function="number"), RewardTerm(function="a.py:f"))),
        (
            [{"function": "number", "weight": 2}, {"function": "a.py:f", "weight": -0.5, "fallback": 0}],
            (
                RewardTerm(function="number", weight=2.0),
                RewardTerm(function="a.py:f", weight=-0.5, fallback=0.0),
            ),
        ),
    ],
)
def test_one_function_or_a_list_of_them(given: Any, terms: tuple[RewardTerm, ...]) -> None:
    config = PpoConfig.model_validate({"reward_function": given})
    assert config.reward_function == terms
    assert PpoConfig.model_validate(config.model_dump(mode="json")) == config


def test_files_and_modules_hold_functions_of_any_form(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def score(completion, level):\n    return len(completion) + level\n")
    assert load_reward_function(f"{file}:score")(answers()).scores_S.tolist() == [1.0, 3.0, 5.0, 7.0]
    assert load_reward_function(f"{__name__}:by_lists")(answers()).scores_S.tolist() == [1.0, 3.0, 5.0, 7.0]
