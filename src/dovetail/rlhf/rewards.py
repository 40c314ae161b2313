"""Score answers: with a reward model, a Python function, or both.

Responsible for: turning answers into one score each; errors with names and numbers where a model would read positions
or embedding rows out of its bounds.
Not responsible for: penalties and the KL term, which are part of the reward's definition in PPO (rollout.py,
maths/ppo.py), nor for clipping where a reward model scores alone.

Shapes: S answers.
"""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.batches import moved, pack
from dovetail.data.records import Message
from dovetail.errors import ConfigError, DovetailError, ModelError
from dovetail.maths.ppo import clip_scores
from dovetail.model.forward import context_in, context_of, last_scores, plain_model, vocabulary_of
from dovetail.model.rope import rope_limit_in
from dovetail.parallel.shard import reshard, world_of
from dovetail.parallel.world import World, parts_of
from dovetail.text.chat_format import ChatFormat
from dovetail.training.step import TokenBudget, retry_on_out_of_memory


def expect_room(role: str, config: Any, *, max_prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise ConfigError if the longest prompt with the longest answer is longer than the role's context.

    config: the model's. A rope that changes with the length ends the context of an answer, as its first tokens would be
    drawn with other numbers than they are learnt from.
    """
    limit = context_in(config)
    if limit is not None and max_prompt_tokens + max_new_tokens > limit:
        raise ConfigError(
            f"data.max_prompt_tokens = {max_prompt_tokens} and ppo.sampling.max_new_tokens = {max_new_tokens} "
            f"make {max_prompt_tokens + max_new_tokens} tokens; the context of the {role} is {limit}",
            hint=f"lower one of the two, so that together they are {limit} or less, or take a model with a "
            "longer context",
        )
    short = rope_limit_in(config)
    if short is not None and max_prompt_tokens + max_new_tokens > short:
        raise ConfigError(
            f"data.max_prompt_tokens = {max_prompt_tokens} and ppo.sampling.max_new_tokens = {max_new_tokens} "
            f"make {max_prompt_tokens + max_new_tokens} tokens; the rope of the {role} has other frequencies beyond "
            f"{short}, so an answer would be learnt from with other numbers than it was drawn with",
            hint=f"lower one of the two, so that together they are {short} or less",
        )


def expect_readable(role: str, model: Any, *, longest: int, highest_id: int) -> None:
    """Raise ModelError if a sequence is longer than the model's context, or a token beyond its embedding."""
    inner = plain_model(model)
    limit, rows = context_of(inner), vocabulary_of(inner)
    if limit is not None and longest > limit:
        raise ModelError(
            f"a prompt with its answer has {longest} tokens; the context of the {role} "
            f"({type(inner).__name__}) is {limit}",
            hint="shorten prompts (data.max_prompt_tokens) or answers (ppo.sampling.max_new_tokens), or take a "
            f"{role} with a longer context",
        )
    if highest_id >= rows:
        raise ModelError(
            f"an answer holds the token id {highest_id}; the embedding of the {role} ({type(inner).__name__}) "
            f"has {rows} rows",
            hint="take models of one family, or make room: model.resize_token_embeddings(n) with the larger n",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One sampled answer, on the host."""

    messages: tuple[Message, ...]
    """The conversation up to and including the last user turn."""
    text: str
    """The answer, decoded, without the end-of-turn token."""
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """Exactly the sampled tokens, end-of-turn token included if it was sampled."""
    logprobs: tuple[float, ...]
    """The log-probabilities of the sampled tokens under the generator."""
    finished: bool
    """False = cut off by the length limit."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The columns of the data row beside the prompt, such as a reference answer; empty where there is none."""


class Scorer(Protocol):
    """Anything that scores answers; higher is better."""

    def __call__(self, answers: Sequence[Answer]) -> Tensor:
        """float32 [S], on any device."""
        ...


RewardFunction = Callable[[Sequence[Answer]], Sequence[float]]

_MAX_FLOAT32 = torch.finfo(torch.float32).max
_ONE_EACH = "return one finite number per answer, in the order given"


@dataclass(frozen=True, slots=True)
class RewardModelScorer:
    """The score of a reward model at the answer's last token."""

    model: PreTrainedModel
    budget: TokenBudget
    device: torch.device
    chat: ChatFormat | None = None
    """The reward model's own chat format, if its tokenizer is not the actor's: answers go through text then."""

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answer]) -> Tensor:
        sequences = [self._token_ids(answer) for answer in answers]
        expect_readable(
            "reward model",
            self.model,
            longest=max(map(len, sequences)),
            highest_id=max(map(max, sequences)),
        )
        scores_S = retry_on_out_of_memory(
            lambda: self._scores_S(sequences),
            self.budget,
            unit_tokens=lambda: [len(ids) for ids in sequences],
        )
        reshard(self.model)
        return scores_S

    def _token_ids(self, answer: Answer) -> list[int]:
        if self.chat is None:
            return [*answer.prompt_ids, *answer.answer_ids]
        turn: Message = {"role": "assistant", "content": answer.text}
        return self.chat.conversation([*answer.messages, turn])[0]

    def _scores_S(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Score all answers; each rank that holds the model scores its share."""
        world = world_of(self.model)
        parts = parts_of([len(ids) for ids in sequences], self.budget.tokens, world)
        scores_S = torch.zeros(len(sequences), device=self.device)
        for part in parts:
            picked = [sequences[i] for i in part.index]
            batch = pack(picked, [[False] * len(ids) for ids in picked]).to(self.device)
            found_S = last_scores(self.model, batch).float()
            if part.counts:
                scores_S.index_copy_(0, moved(torch.tensor(part.index), self.device), found_S)
        return world.sum(scores_S)


@dataclass(frozen=True, slots=True)
class FunctionScorer:
    """A Python function of the answers: `function(answers) -> one finite number per answer`.

    Anything else it returns, or what it raises itself, is a ConfigError at once.
    """

    function: RewardFunction
    name: str

    def __call__(self, answers: Sequence[Answer]) -> Tensor:
        values = self._values(answers)
        if len(values) != len(answers):
            raise ConfigError(
                f"reward function {self.name} returned {len(values)} scores for {len(answers)} answers",
                hint=_ONE_EACH,
            )
        scores = [self._score(index, *pair) for index, pair in enumerate(zip(values, answers, strict=True))]
        return torch.tensor(scores, dtype=torch.float32)

    def _values(self, answers: Sequence[Answer]) -> list[Any]:
        """Call the function; what it raises, if only when its values are read, is a ConfigError."""
        with self._explained():
            returned = self.function(answers)
        try:
            values = iter(returned)
        except TypeError as error:
            raise ConfigError(
                f"reward function {self.name} returned {_excerpt(repr(returned))}, which is no list of numbers",
                hint=_ONE_EACH,
            ) from error
        with self._explained():
            return list(values)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # whatever the user's function does
            raise ConfigError(
                f"reward function {self.name} raised {_what_and_where(error)}",
                hint="repair it, or what it asks, and give the same command again",
            ) from error

    def _score(self, index: int, value: Any, answer: Answer) -> float:
        number = _number(value)
        if number is None:
            raise ConfigError(
                f"reward function {self.name} gave {_excerpt(repr(value))} to answer {index}, "
                f"{_excerpt(answer.text)}: not a finite number",
                hint=_ONE_EACH,
            )
        return number


@dataclass(frozen=True, slots=True)
class FirstRankScorer:
    """Asks in the first process alone and tells the others: a function may be costly, or answer otherwise next time."""

    scorer: Scorer
    world: World

    def __call__(self, answers: Sequence[Answer]) -> Tensor:
        scores: list[float] = []
        failure: DovetailError | None = None
        if self.world.is_first:
            try:
                scores = self.scorer(answers).tolist()
            except DovetailError as error:
                failure = error
        scores, failure = self.world.from_first((scores, failure))
        if failure is not None:
            failure.is_everywhere = True
            raise failure
        return torch.tensor(scores, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class ClippedScorer:
    """Scores within [-limit, limit], to which others can be added; None = as they are."""

    scorer: Scorer
    limit: float | None

    def __call__(self, answers: Sequence[Answer]) -> Tensor:
        return clip_scores(self.scorer(answers), self.limit)


@dataclass(frozen=True, slots=True)
class SumScorer:
    """A reward model plus a weighted function."""

    first: Scorer
    second: Scorer
    weight: float

    def __call__(self, answers: Sequence[Answer]) -> Tensor:
        first_S, second_S = self.first(answers), self.second(answers)
        return first_S + self.weight * moved(second_S, first_S.device)


def load_reward_function(spec: str) -> FunctionScorer:
    """`package.module:function` or `path/to/file.py:function`.

    Raises ConfigError naming what is missing, or the file and line that cannot be run.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ConfigError(
            f"ppo.reward_function = {spec!r} names no function",
            hint="write package.module:function or path/to/file.py:function",
        )
    try:
        module = (
            _module_from_file(Path(place).expanduser())
            if place.endswith(".py")
            else importlib.import_module(place)
        )
    except (Exception, SystemExit) as error:  # whatever the user's file does when it is run
        raise ConfigError(
            f"ppo.reward_function = {spec!r} cannot be loaded: {_what_and_where(error)}",
            hint="check the path and that the module can be imported from where you start dovetail",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(
            f"ppo.reward_function = {spec!r} cannot be loaded: {place} has no function {name}",
            hint="write the name of a function of the answers that returns one number for each",
        )
    return FunctionScorer(function, spec)


def _module_from_file(file: Path) -> ModuleType:
    module_spec = importlib.util.spec_from_file_location(f"dovetail_reward_{file.stem}", file)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where dataclasses and pickle look for it
    module_spec.loader.exec_module(module)
    return module


def _what_and_where(error: BaseException) -> str:
    """Describe the error with the file and line of the user's code that raised it, or could not be read."""
    what = f"{type(error).__name__}: {getattr(error, 'msg', None) or error}"
    if isinstance(error, SyntaxError):
        return f"{what} ({error.filename} line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    if not own:
        return what
    line = [frame.lineno for frame in own if frame.filename == own[0].filename][-1]
    return f"{what} ({own[0].filename} line {line})"


def _number(value: Any) -> float | None:
    """`value` as a finite float32 number; None if it is none. Texts are not taken for the numbers they show."""
    try:
        number = None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # tensors of several numbers: RuntimeError
        return None
    return number if number is not None and abs(number) <= _MAX_FLOAT32 else None


def _excerpt(text: str, limit: int = 80) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= limit else flat[: limit - 1] + "…")
