"""Score answers: with a reward model, with functions, or with a sum of both.

Responsible for: what an answer is, the scores of a reward model, sums of several rewards; errors with names and numbers
where a model would read positions or embedding rows out of its bounds.
Not responsible for: calling functions (reward_functions.py), penalties and the KL term, which are part of the reward's
definition in PPO (rollout.py, maths/ppo.py), nor for clipping where a reward model scores alone.

Shapes: S answers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
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
from dovetail.parallel.shard import sharding_of
from dovetail.parallel.world import World, parts_of
from dovetail.rlhf.attempts import Failure
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
class Episode:
    """The part that an environment had in an answer of several turns (episodes.py)."""

    chosen: tuple[bool, ...]
    """Marks of `answer_ids`: True = the actor sampled it, False = the environment's."""
    rewards: tuple[tuple[int, float], ...] = ()
    """The index in `answer_ids` of the last token of each turn, and what the environment paid for the turn."""
    num_turns: int = 0
    num_calls: int = 0
    """The tool calls that the environment got."""
    num_unread_calls: int = 0
    """The tool calls that could not be read, and were answered with an error."""
    failure: Failure | None = None
    """The reason why the environment ended before the episode did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One sampled answer, on the host."""

    messages: tuple[Message, ...]
    """The conversation up to and including the last user turn, or the last reply of an environment."""
    text: str
    """The answer to these messages, decoded, without the end-of-turn token."""
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """Exactly the sampled tokens, end-of-turn token included if it was sampled. In an episode they are those of all
    turns, with the environment's between them."""
    logprobs: tuple[float, ...]
    """The log-probabilities of the sampled tokens under the generator."""
    finished: bool
    """False = cut off by the limit of tokens, or of turns."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The columns of the data row beside the prompt, such as a reference answer; empty where there is none."""
    episode: Episode | None = None
    """The environment's part; None without one."""

    @property
    def chosen(self) -> tuple[bool, ...]:
        """Marks of `answer_ids`: True = the actor sampled it."""
        return (True,) * len(self.answer_ids) if self.episode is None else self.episode.chosen


def episode_stats(answers: Iterable[Answer]) -> dict[str, float]:
    """Return the numbers of a rollout's episodes, for the metrics; nothing without an environment."""
    episodes = [answer.episode for answer in answers if answer.episode is not None]
    if not episodes:
        return {}
    return {
        "environment/turns_mean": fmean(episode.num_turns for episode in episodes),
        "environment/calls_mean": fmean(episode.num_calls for episode in episodes),
        "environment/unread_calls": float(sum(episode.num_unread_calls for episode in episodes)),
        "environment/failures": float(sum(episode.failure is not None for episode in episodes)),
    }


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of answers."""

    scores_S: Tensor
    """float32, on any device; higher is better."""
    stats: Mapping[str, float] = field(default_factory=dict)
    """Numbers about the scoring, for the metrics."""


class Scorer(Protocol):
    """Anything that scores answers."""

    def __call__(self, answers: Sequence[Answer]) -> Scored:
        """Return one score for each answer."""
        ...


RewardFunction = Callable[..., Any]
"""A function of the user's that scores answers; its parameters tell its form (reward_functions.py)."""


@dataclass(frozen=True, slots=True)
class RewardModelScorer:
    """The score of a reward model at the answer's last token."""

    model: PreTrainedModel
    budget: TokenBudget
    device: torch.device
    chat: ChatFormat | None = None
    """The reward model's own chat format, if its tokenizer is not the actor's: answers go through text then."""

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answer]) -> Scored:
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
        sharding_of(self.model).reshard()
        return Scored(scores_S)

    def _token_ids(self, answer: Answer) -> list[int]:
        if self.chat is None:
            return [*answer.prompt_ids, *answer.answer_ids]
        turn: Message = {"role": "assistant", "content": answer.text}
        return self.chat.conversation([*answer.messages, turn])[0]

    def _scores_S(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Score all answers; each rank that holds the model scores its share, and all get all scores."""
        world = sharding_of(self.model).world
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
class FirstRankScorer:
    """Asks in the first process alone and tells the others: a function may be costly, or answer otherwise next time."""

    scorer: Scorer
    world: World

    def __call__(self, answers: Sequence[Answer]) -> Scored:
        found: tuple[list[float], Mapping[str, float]] = ([], {})
        failure: DovetailError | None = None
        if self.world.is_first:
            try:
                scored = self.scorer(answers)
                found = scored.scores_S.tolist(), scored.stats
            except DovetailError as error:
                failure = error
        (scores, stats), failure = self.world.from_first((found, failure))
        if failure is not None:
            failure.is_everywhere = True
            raise failure
        return Scored(torch.tensor(scores, dtype=torch.float32), stats)


@dataclass(frozen=True, slots=True)
class ClippedScorer:
    """Scores within [-limit, limit], to which others can be added; None = as they are."""

    scorer: Scorer
    limit: float | None

    def __call__(self, answers: Sequence[Answer]) -> Scored:
        scored = self.scorer(answers)
        return replace(scored, scores_S=clip_scores(scored.scores_S, self.limit))


@dataclass(frozen=True, slots=True)
class Part:
    """One of several rewards."""

    name: str
    """The name in metrics: `reward/NAME_mean` is the mean of its own scores."""
    scorer: Scorer
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """The sum of several rewards, each times its weight."""

    parts: Sequence[Part]

    def __call__(self, answers: Sequence[Answer]) -> Scored:
        found = [part.scorer(answers) for part in self.parts]
        device = found[0].scores_S.device
        total_S = torch.zeros(len(answers), device=device)
        stats: dict[str, float] = {}
        for part, scored in zip(self.parts, found, strict=True):
            total_S = total_S + part.weight * moved(scored.scores_S, device)
            stats |= {f"reward/{part.name}_mean": float(scored.scores_S.mean()), **scored.stats}
        return Scored(total_S, stats)
