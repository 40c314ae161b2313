"""Play episodes: the model answers, an environment replies, and so on, many episodes on one decode batch.

Responsible for: whose turn it is, the tokens of an episode and which of them the actor chose, the limits of turns,
tokens and seconds, and episodes whose environment fails.
Not responsible for: the form of an environment (environments.py), decoding (engine/), scores (rewards.py).

Tokens go in and come out as they are: what the actor sampled is never encoded again, and a reply is appended as the
tokens that the chat template prints behind an answer. While an environment works, in a thread of its own, its episode
holds no place in the decode batch, and its pages of the cache until others need them; the reply brings it back.

An episode depends on (weights, prompt, seed, environment) alone, whatever plays beside it and whoever is faster (up to
rounding: another batch may add up in another order).
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

from dovetail.data.records import Message, Prompt, message
from dovetail.engine.hybrid import HybridEngine
from dovetail.engine.sampling import Sampling
from dovetail.engine.scheduler import Answer as Request
from dovetail.engine.scheduler import Load
from dovetail.errors import DovetailError
from dovetail.parallel.world import ALONE, World, divided
from dovetail.rlhf.attempts import Failure, begin, outcome
from dovetail.rlhf.environments import Environment, Environments, Maker, Step, Turn
from dovetail.rlhf.rewards import Answer, Episode
from dovetail.training.step import step_seed

_SHARE = 16
"""Replies are read together as soon as there is one for so many running episodes."""
_LONGEST_HELD = 4
"""The decode steps after which replies are read in any case."""
_REPLY_ROLES = ("user", "tool")
_PROMPT_ROLES = ("system", "user", "assistant", "tool")


@dataclass(slots=True, kw_only=True)
class _Game:
    """An episode in progress."""

    prompt: Prompt
    seed: int
    """The seed of the first turn; those of later turns follow from it."""
    shared_seed: int
    """The seed of the environment, which is that of all episodes of one prompt."""
    environment: Environment | None = None
    messages: list[Message] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    """The tokens behind the prompt, the actor's and the environment's."""
    chosen: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rewards: list[tuple[int, float]] = field(default_factory=list)
    num_turns: int = 0
    num_calls: int = 0
    num_unread_calls: int = 0
    max_tokens: int = 0
    """The most tokens of prompt and turns together."""
    is_cut_off: bool = False
    failure: Failure | None = None
    last: Request | None = None
    """The request of the last turn, whose place in the cache the next one takes over."""

    def reset(self, make: Maker) -> Any:
        """Make the environment and begin the episode; return what its `reset` returns."""
        self.environment = make()
        takes_seed = "seed" in inspect.signature(self.environment.reset).parameters
        seed = {"seed": self.shared_seed} if takes_seed else {}
        return self.environment.reset(dict(self.prompt.row), **seed)

    def request(self, sampling: Sampling) -> Request:
        """Return the request for the next turn."""
        prompt = (*self.prompt_ids, *self.token_ids)
        seed = step_seed(self.seed, self.num_turns) if self.num_turns else self.seed
        most = self.max_tokens - len(prompt)
        self.last = Request(0, prompt, sampling, seed, most, keeps_pages=True, continues=self.last)
        return self.last

    def take(self, request: Request, text: str) -> None:
        """Take in the turn that the actor has sampled."""
        self.token_ids += request.token_ids
        self.chosen += [True] * len(request.token_ids)
        self.logprobs += request.logprobs
        self.messages.append(message("assistant", text))
        self.num_turns += 1
        if request.finish_reason != "stop":
            self.end(is_cut_off=True)

    def reply(self, replies: Sequence[Message], ids: list[int], max_turns: int) -> bool:
        """Append the environment's reply; return False, and end the episode, if no turn may follow it."""
        num_tokens = len(self.prompt_ids) + len(self.token_ids) + len(ids)
        if self.num_turns >= max_turns or num_tokens >= self.max_tokens:
            self.end(is_cut_off=True)
            return False
        self.token_ids += ids
        self.chosen += [False] * len(ids)
        self.messages += replies
        return True

    def end(self, *, is_cut_off: bool = False) -> None:
        """End the episode, and let go of its pages of the cache."""
        self.is_cut_off = is_cut_off
        if self.last is not None:
            self.last.keeps_pages = False

    def fail(self, failure: Failure) -> None:
        """End the episode. One that never began is an answer without tokens, whose prompt need not be read."""
        self.end()
        self.failure = failure
        if not self.num_turns:
            self.prompt_ids = self.prompt_ids[:1]

    def answer(self) -> Answer:
        """Return the whole episode as an answer to its prompt; a failed one is worth nothing but its fallback."""
        last = self.messages[-1] if self.num_turns else message("assistant", "")
        return Answer(
            messages=tuple(self.messages[:-1] if self.num_turns else self.prompt.messages),
            text=last["content"],
            prompt_ids=tuple(self.prompt_ids),
            answer_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            finished=not self.is_cut_off,
            row=self.prompt.row,
            episode=Episode(
                chosen=tuple(self.chosen),
                rewards=() if self.failure else tuple(self.rewards),
                num_turns=self.num_turns,
                num_calls=self.num_calls,
                num_unread_calls=self.num_unread_calls,
                failure=self.failure,
            ),
        )


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of an environment under way, and what to do with its result."""

    game: _Game
    then: Callable[[_Game, Any], None]
    under_way: Future[Any]
    deadline: float


class _Table:
    """All games of one process: those that decode, those whose environment works, and those that may decode next."""

    def __init__(self, environments: Environments, sampling: Sampling) -> None:
        self._rules = environments
        self._sampling = sampling
        self._calls: list[_Call] = []
        self._decoding: list[tuple[_Game, Request]] = []
        self._next: list[_Game] = []
        self._num_steps_held = 0
        """The decode steps for which games that are ready have waited for others."""

    def reset(self, games: Sequence[_Game], context: int | None) -> list[_Game]:
        """Begin all games at once; return those that are ready, once no other can become so."""
        for game in games:
            game.prompt_ids = self._rules.chat.prompt_ids(game.prompt.messages)
            self._begin(
                game, partial(game.reset, self._rules.make), partial(self._take_prompt, context=context)
            )
        while self._calls:
            self._collect(blocks=True)
        return self._next

    def poll(self, load: Load) -> Sequence[Request] | None:
        """Return the requests of the games whose turn it is; None when all games are over."""
        under_way, self._decoding = self._decoding, []
        for game, request in under_way:
            if request.finish_reason is None:
                self._decoding.append((game, request))
            else:
                self._take_turn(game, request)
        self._collect(blocks=False)
        while load.is_idle and self._calls and not self._next:
            self._collect(blocks=True)
        ready, self._next = (self._next, []) if self._is_time(load) else ([], self._next)
        requests = [(game, game.request(self._sampling)) for game in ready]
        self._decoding += requests
        is_over = not self._decoding and not self._calls and not self._next
        return None if is_over else [request for _, request in requests]

    def _is_time(self, load: Load) -> bool:
        """Return whether the games that are ready go on now.

        To read one reply costs a forward pass as to read many does, so beside many that decode a few wait for more.
        """
        self._num_steps_held = self._num_steps_held + 1 if self._next else 0
        is_time = len(self._next) >= load.num_running // _SHARE or self._num_steps_held > _LONGEST_HELD
        if is_time:
            self._num_steps_held = 0
        return is_time

    def _begin(self, game: _Game, call: Callable[[], Any], then: Callable[[_Game, Any], None]) -> None:
        """Call the environment in the background."""
        limit = self._rules.time_limit
        self._calls.append(_Call(game, then, begin(call, limit), time.monotonic() + limit))

    def _collect(self, *, blocks: bool) -> None:
        """Go on with the games whose environment has returned, or has taken too long; wait for one if asked."""
        if blocks:
            patience = min(call.deadline for call in self._calls) - time.monotonic()
            wait([call.under_way for call in self._calls], max(0.0, patience), FIRST_COMPLETED)
        now = time.monotonic()
        calls, self._calls = self._calls, []
        for call in calls:
            if call.under_way.done() or now >= call.deadline:
                self._go_on(call)
            else:
                self._calls.append(call)

    def _go_on(self, call: _Call) -> None:
        """Hand the result of a call to its game, which ends if there is none that can be used."""
        found = outcome(call.under_way, self._rules.time_limit)
        if not isinstance(found, Failure):
            try:
                call.then(call.game, found)
            except _UnusableError as error:
                found = Failure(str(error), hint=error.hint)
            except DovetailError as error:  # a chat template that refuses the messages, for one
                found = Failure(f"gave messages that cannot be used: {error.message}", hint=error.hint or "")
        if isinstance(found, Failure):
            call.game.fail(found)

    def _take_prompt(self, game: _Game, given: Any, *, context: int | None) -> None:
        """Take in what `reset` returned."""
        messages = _prompt_of(game.prompt.messages, given)
        prompt_ids = self._rules.chat.prompt_ids(messages)
        limit = len(prompt_ids) + self._sampling.max_new_tokens
        if context is not None and len(prompt_ids) >= context:
            raise _UnusableError(
                f"began with a prompt of {len(prompt_ids)} tokens, and the model's context is {context}",
                hint="let reset return less, or take a model with a longer context",
            )
        game.messages, game.prompt_ids = messages, prompt_ids
        game.max_tokens = limit if context is None else min(limit, context)
        self._next.append(game)

    def _take_turn(self, game: _Game, request: Request) -> None:
        """Take in a turn of the actor, and let the environment make its step unless the turn was cut off."""
        chat = self._rules.chat
        game.take(request, chat.decode(request.token_ids))
        if game.is_cut_off:
            return
        parsed = chat.calls_in(request.token_ids) if self._rules.has_tools else None
        if parsed is not None and parsed.errors:
            game.num_unread_calls += len(parsed.errors)
            self._reply(game, [{"role": "tool", "content": f"error: {error}"} for error in parsed.errors])
            return
        calls = parsed.calls if parsed else ()
        game.num_calls += len(calls)
        assert game.environment is not None
        turn = Turn(game.messages[-1]["content"], calls)
        self._begin(game, partial(game.environment.step, turn), self._take_step)

    def _take_step(self, game: _Game, returned: Any) -> None:
        """Take in what `step` returned."""
        step = _step_of(returned)
        game.rewards.append((len(game.token_ids) - 1, step.reward))
        if step.done:
            game.end()
        else:
            self._reply(game, _replies_of(step.reply))

    def _reply(self, game: _Game, replies: Sequence[Message]) -> None:
        ids = self._rules.chat.reply_ids(replies, behind=game.token_ids[-1])
        if game.reply(replies, ids, self._rules.max_turns):
            self._next.append(game)


def play(
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    environments: Environments,
    engine: HybridEngine,
    sampling: Sampling,
    *,
    context: int | None,
    world: World = ALONE,
) -> list[Answer]:
    """Play one episode for each prompt; return the episodes as answers, in order.

    seeds: of each episode. context: the most tokens of an episode with its prompt, if the models have a limit. world:
    its processes play a share each.
    """
    shared = _shared_seeds(prompts, seeds)

    def played(mine: list[int]) -> list[Answer]:
        games = [_Game(prompt=prompts[i], seed=seeds[i], shared_seed=shared[i]) for i in mine]
        table = _Table(environments, sampling)
        ready = table.reset(games, context)
        with (
            engine.generating() as generate
        ):  # all processes enter it, because they gather the weights together
            if ready:
                serve = generate.serve([game.max_tokens for game in ready])
                for game in ready:
                    game.max_tokens = min(game.max_tokens, serve.max_tokens)
                serve(table)
        return [game.answer() for game in games]

    return divided([1] * len(prompts), played, world, engine.group)


def _shared_seeds(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[int]:
    """Return for each prompt the seed of the first of its neighbours that is the same prompt."""
    groups = groupby(range(len(prompts)), key=lambda place: id(prompts[place]))
    places = [list(group) for _, group in groups]
    return [seeds[group[0]] for group in places for _ in group]


class _UnusableError(Exception):
    """An environment returned what cannot be used."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def _prompt_of(messages: Sequence[Message], given: Any) -> list[Message]:
    """Return the messages that an episode begins with, from the row's prompt and what `reset` returned."""
    if given is None:
        return list(messages)
    if isinstance(given, str):
        last = messages[-1]
        return [*messages[:-1], message(last["role"], f"{last['content']}\n\n{given}")]
    return _messages(given, _PROMPT_ROLES, "reset")


def _step_of(returned: Any) -> Step:
    """Return what `step` returned as a Step with a finite reward."""
    if isinstance(returned, str):
        return Step(returned)
    hint = "return a Step, a tuple (reply, reward, done), or the text of a reply"
    try:
        step = Step(*returned)
        reward = float(step.reward)
    except (TypeError, ValueError) as error:
        raise _UnusableError(
            f"returned {returned!r:.200} from step, which is not a step: {error}", hint=hint
        ) from None
    if not math.isfinite(reward):
        raise _UnusableError(f"returned the reward {reward} from step", hint="a reward is a finite number")
    return step._replace(reward=reward)


def _replies_of(reply: str | Sequence[Message]) -> list[Message]:
    """Return a reply as messages."""
    if isinstance(reply, str):
        return [message("user", reply)]
    return _messages(reply, _REPLY_ROLES, "step")


def _messages(given: Any, roles: Sequence[str], method: str) -> list[Message]:
    """Check messages that an environment gave."""
    listed = list(given) if isinstance(given, Sequence) else []
    for turn in listed:
        if (
            not isinstance(turn, dict)
            or turn.get("role") not in roles
            or not isinstance(turn.get("content"), str)
        ):
            listed = []
    if not listed:
        raise _UnusableError(
            f"returned {given!r:.200} from {method}, which is neither a text nor a list of messages",
            hint=f'a message is {{"role": ..., "content": "..."}}, and its role one of {", ".join(roles)}',
        )
    return listed
