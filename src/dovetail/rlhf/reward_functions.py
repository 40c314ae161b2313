"""Score answers with Python functions: the user's own, and the built-in verifiers.

Responsible for: loading a function by name, the three forms that it may have, and answers that get no score.
Not responsible for: time limits and further tries (attempts.py), the verifiers (verifiers/), reward models and sums of
several rewards (rewards.py).
"""

import difflib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import torch

from dovetail.errors import ConfigError
from dovetail.rlhf.attempts import (
    ONE_EACH,
    Failure,
    WrongResultError,
    attempt,
    loaded,
)
from dovetail.rlhf.rewards import Answer, Scored, Scorer
from dovetail.rlhf.verifiers.builtin import NEEDS, VERIFIERS
from dovetail.rlhf.verifiers.pool import VerifierError, verdicts
from dovetail.telemetry.log import warn

Function = Callable[..., Any]

TIME_LIMIT = 300.0
"""Seconds that one call of a function may take."""
MOST_LOST = 3
"""The number of batches in a row without any score that end a run: it would learn nothing from then on."""
CALLS_AT_ONCE = 16
"""Calls of a function that scores answers one by one."""

_MAX_FLOAT32 = torch.finfo(torch.float32).max


@dataclass(slots=True)
class MissingScores:
    """The scores that answers without one get.

    An answer without a score is counted and gets `fallback`, by default the lowest score of the batch: a policy must
    not gain by answers that break its judge. A source of scores that fails in its whole first batch, or in three
    batches in a row, is a ConfigError.
    """

    source: str
    """The source of the scores, for messages: "reward function NAME"."""
    fallback: float | None = None
    _last_mean: float | None = None
    """The mean score of the last batch that had one."""
    _lost_batches: int = 0

    def filled(self, found: Sequence[float | Failure]) -> list[float]:
        """Return a score for each answer."""
        scores = [value for value in found if not isinstance(value, Failure)]
        failures = [value for value in found if isinstance(value, Failure)]
        if failures:
            self._expect_some(failures, len(found))
        self._lost_batches = 0 if scores or not failures else self._lost_batches + 1
        instead = self._instead(scores)
        if failures:
            warn(
                f"{self.source} gave no score to {len(failures)} of {len(found)} answers, which count as {instead:g}; "
                f"for the first it {failures[0].reason}"
            )
        if scores:
            self._last_mean = fmean(scores)
        return [instead if isinstance(value, Failure) else value for value in found]

    def _expect_some(self, failures: Sequence[Failure], num_answers: int) -> None:
        """Raise ConfigError if no answer has a score, in the first batch or in too many in a row."""
        first = failures[0]
        if len(failures) < num_answers:
            return
        if self._last_mean is None:
            raise ConfigError(f"{self.source} {first.reason}", hint=first.hint)
        if self._lost_batches + 1 >= MOST_LOST:
            raise ConfigError(
                f"{self.source} {first.reason}; no answer of {MOST_LOST} batches in a row has a score",
                hint=first.hint,
            )

    def _instead(self, scores: Sequence[float]) -> float:
        """Return the score of answers that have none. A batch without any keeps the mean, which moves nothing."""
        if self.fallback is not None:
            return self.fallback
        return min(scores) if scores else self._last_mean or 0.0


@dataclass(slots=True)
class FunctionScorer:
    """The scores of a function; an answer that it raises at, is too slow for or gives no finite number has none."""

    call: Callable[[Sequence[Answer]], Sequence[Any]]
    """Returns a value for each answer, or a Failure."""
    name: str
    fallback: float | None = None
    label: str = field(init=False)
    """The name in metrics: that of the function, without its module."""
    _missing: MissingScores = field(init=False)

    def __post_init__(self) -> None:
        self.label = self.name.rpartition(":")[2]
        self._missing = MissingScores(f"reward function {self.name}", self.fallback)

    def __call__(self, answers: Sequence[Answer]) -> Scored:
        pairs = zip(self.call(answers), answers, strict=True)
        found = [_score(index, value, answer) for index, (value, answer) in enumerate(pairs)]
        num_failures = sum(isinstance(value, Failure) for value in found)
        filled = torch.tensor(self._missing.filled(found), dtype=torch.float32)
        return Scored(filled, {f"reward/{self.label}_failures": float(num_failures)})


@dataclass(slots=True)
class EnvironmentScorer:
    """The rewards of environments, with other scores added to them; a failed episode has no score."""

    missing: MissingScores
    others: Scorer | None
    """The other scores, which are added; None = there are none."""

    def __call__(self, answers: Sequence[Answer]) -> Scored:
        failures = [answer.episode.failure if answer.episode else None for answer in answers]
        sound = [answer for answer, failure in zip(answers, failures, strict=True) if failure is None]
        paid = [
            sum(reward for _, reward in answer.episode.rewards) if answer.episode else 0.0 for answer in sound
        ]
        stats: dict[str, float] = {"reward/environment_mean": fmean(paid)} if paid else {}
        if self.others is not None and sound:
            added = self.others(sound)
            paid = [own + more for own, more in zip(paid, added.scores_S.tolist(), strict=True)]
            stats |= added.stats
        scores = iter(paid)
        found = [next(scores) if failure is None else failure for failure in failures]
        return Scored(torch.tensor(self.missing.filled(found), dtype=torch.float32), stats)


def function_scorer(
    function: Function, name: str, *, time_limit: float = TIME_LIMIT, fallback: float | None = None
) -> FunctionScorer:
    """Return the scorer of a function, whose parameters tell its form.

    `completion`: it scores one answer, and gets the row's columns by name. `completions`: it scores a list of answers,
    and gets a list of each column, as reward functions of TRL do. Any other: it scores a list of `Answer`.
    A function may be async.
    """
    parameters = _parameters(function)
    form = _batched
    if "completion" in parameters:
        form = _one_by_one
    elif "completions" in parameters:
        form = _by_lists
    return FunctionScorer(partial(form, function, parameters, time_limit), name, fallback)


def load_reward_function(
    spec: str, *, time_limit: float = TIME_LIMIT, fallback: float | None = None
) -> FunctionScorer:
    """Load the name of a built-in verifier, `package.module:function` or `path/to/file.py:function`.

    Raises ConfigError naming what is missing, or the file and line that cannot be run.
    """
    if spec in VERIFIERS:
        _expect_installed(spec)
        return FunctionScorer(partial(_verified, spec), spec, fallback)
    near = difflib.get_close_matches(spec, VERIFIERS, n=1)
    hint = (
        f"{f'did you mean {near[0]}? ' if near else ''}write package.module:function, path/to/file.py:function, or a "
        f"built-in verifier: {', '.join(VERIFIERS)}"
    )
    function = loaded(spec, "ppo.reward_function", "function", hint=hint)
    if not callable(function):
        raise ConfigError(
            f"ppo.reward_function = {spec!r} is not a function but {type(function).__name__}",
            hint="write the name of a function of the answers that returns one number for each",
        )
    return function_scorer(function, spec, time_limit=time_limit, fallback=fallback)


def _expect_installed(verifier: str) -> None:
    for module in NEEDS.get(verifier, ()):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"ppo.reward_function = {verifier!r} needs the module {module}, which is not installed",
                hint='pip install "dovetail-rlhf[verifiers]"',
            )


Parameters = Mapping[str, inspect.Parameter]


def _parameters(function: Function) -> Parameters:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # of functions that are not written in Python
        return {}


def _batched(
    function: Function, parameters: Parameters, time_limit: float, answers: Sequence[Answer]
) -> Sequence[Any]:
    return _whole(lambda: function(answers), time_limit, len(answers))


def _by_lists(
    function: Function, parameters: Parameters, time_limit: float, answers: Sequence[Answer]
) -> Sequence[Any]:
    """Call a function in TRL's form: lists of prompts, completions and columns, by name."""
    names = dict.fromkeys(name for answer in answers for name in answer.row)
    columns = {name: [answer.row.get(name) for answer in answers] for name in names}
    given = {
        "prompts": [list(answer.messages) for answer in answers],
        "completions": [answer.text for answer in answers],
        "completion_ids": [list(answer.answer_ids) for answer in answers],
    }
    chosen = _chosen(parameters, columns, given)
    if isinstance(chosen, Failure):
        return [chosen] * len(answers)
    return _whole(lambda: function(**chosen), time_limit, len(answers))


def _one_by_one(
    function: Function, parameters: Parameters, time_limit: float, answers: Sequence[Answer]
) -> Sequence[Any]:
    """Call a function for each answer, several at once; one that fails costs the others nothing."""

    def value_of(answer: Answer) -> Any:
        chosen = _chosen(parameters, answer.row, _given(answer))
        if isinstance(chosen, Failure):
            return chosen
        return attempt(lambda: function(**chosen), time_limit)

    with ThreadPoolExecutor(CALLS_AT_ONCE) as threads:
        return list(threads.map(value_of, answers))


def _verified(name: str, answers: Sequence[Answer]) -> Sequence[Any]:
    """Ask a built-in verifier about each answer whose row has the columns that it reads."""
    parameters = _parameters(VERIFIERS[name])
    chosen = [_chosen(parameters, answer.row, _given(answer)) for answer in answers]
    asked = [None if isinstance(one, Failure) else (one.pop("completion"), one) for one in chosen]
    verdict = iter(verdicts(name, [request for request in asked if request is not None]))
    found = [one if request is None else next(verdict) for one, request in zip(chosen, asked, strict=True)]
    return [Failure(str(one)) if isinstance(one, VerifierError) else one for one in found]


def _given(answer: Answer) -> dict[str, Any]:
    return {"prompt": list(answer.messages), "completion": answer.text}


def _chosen(
    parameters: Parameters, columns: Mapping[str, Any], more: Mapping[str, Any]
) -> dict[str, Any] | Failure:
    """Return what a function takes of the columns and the rest; a Failure if a column that it needs is absent."""
    given = {**columns, **more}
    kinds = {parameter.kind for parameter in parameters.values()}
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    missing = [name for name in needed if given.get(name) is None]
    if missing:
        return Failure(
            f"needs the column {missing[0]}, which the row lacks; it has {', '.join(columns) or 'none'}",
            hint="`dovetail data preview --stage ppo` lists the columns; a function of your own may read others",
        )
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return dict(given)
    return {name: value for name, value in given.items() if name in parameters}


def _whole(call: Callable[[], Any], time_limit: float, count: int) -> Sequence[Any]:
    """Return the values of one call for all answers."""
    found = attempt(lambda: _listed(call(), count), time_limit)
    return [found] * count if isinstance(found, Failure) else found


def _listed(returned: Any, count: int) -> Any:
    """Return the values as a list; of an async function, which has yet to run, a coroutine that does."""
    if inspect.isawaitable(returned):

        async def awaited() -> Any:
            return _listed(await returned, count)

        return awaited()
    try:
        values = iter(returned)
    except TypeError:
        raise WrongResultError(
            f"returned {_excerpt(repr(returned))}, which is not a list of numbers"
        ) from None
    listed = list(values)
    if len(listed) != count:
        raise WrongResultError(f"returned {len(listed)} scores for {count} answers")
    return listed


def _score(index: int, value: Any, answer: Answer) -> float | Failure:
    if isinstance(value, Failure):
        return value
    number = _number(value)
    if number is None:
        return Failure(
            f"gave {_excerpt(repr(value))} to answer {index}, {_excerpt(answer.text)}: not a finite number",
            hint=ONE_EACH,
        )
    return number


def _number(value: Any) -> float | None:
    """Return `value` as a finite float32 number; None if it is none. Texts are not taken for the numbers they show."""
    try:
        number = None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # tensors of several numbers: RuntimeError
        return None
    return number if number is not None and abs(number) <= _MAX_FLOAT32 else None


def _excerpt(text: str, limit: int = 80) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= limit else flat[: limit - 1] + "…")
