"""Let a language model behind an OpenAI-compatible endpoint score answers by a rubric, or compare two.

Responsible for: the request, the score or verdict in the reply, and scores on disk that are not asked for twice.
Not responsible for: further tries, time limits and answers without a score (reward_functions.py).
"""

import json
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from dovetail.text.content_hash import content_hash
from dovetail.text.message import Message

_COMPARE = (
    "You see a conversation and two responses to its last turn. Say which response is better: more helpful, more "
    "correct and not harmful. Neither their order nor their length counts. Reply with A, B or tie, and nothing else."
)
_VERDICT = re.compile(r"\b(?:A|B|[Tt]ie)\b")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w]|\.\d)")


@dataclass(kw_only=True)
class Judge:
    """A reward function: the score that a model gives an answer, from `lowest` to `highest`."""

    url: str
    """The address of the endpoint, such as http://localhost:8000/v1."""
    model: str
    rubric: str
    """The text that says what a good answer is."""
    lowest: float = 1.0
    highest: float = 10.0
    columns: Sequence[str] = ()
    """The columns of the row that the judge may see, such as a reference answer."""
    cache: str | None = None
    """A file that keeps each score, such as one in the run's folder; None: the judge is asked each time."""
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key, if the endpoint wants one."""
    seconds: float = 60.0
    """The time limit of one request."""
    _kept: dict[str, float] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, completion: str, prompt: Sequence[Message], **row: Any) -> float:
        messages = self._messages(completion, prompt, row)
        key = content_hash(self.model, self.lowest, self.highest, messages)
        with self._lock:
            known = self._scores().get(key)
        if known is not None:
            return known
        score = self._score_in(reply_to(messages, self.url, self.model, self.key_variable, self.seconds))
        with self._lock:
            self._keep(key, score)
        return score

    def _messages(self, completion: str, prompt: Sequence[Message], row: dict[str, Any]) -> list[Message]:
        form = f"Reply with one number from {self.lowest:g} to {self.highest:g}, and nothing else."
        shown = [f"<row.{name}>\n{row[name]}\n</row.{name}>" for name in self.columns]
        turns = "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
        text = "\n".join(
            [f"<conversation>\n{turns}\n</conversation>", *shown, f"<response>\n{completion}\n</response>"]
        )
        return [{"role": "system", "content": f"{self.rubric}\n\n{form}"}, {"role": "user", "content": text}]

    def _score_in(self, reply: str) -> float:
        """Return the one number of the reply; ValueError where there are several, none, or one out of bounds."""
        numbers = [float(number) for number in _NUMBER.findall(reply)]
        if len(numbers) != 1 or not self.lowest <= numbers[0] <= self.highest:
            raise ValueError(
                f"the judge said {reply[:80]!r}, which is not a score from {self.lowest:g} to {self.highest:g}"
            )
        return numbers[0]

    def _scores(self) -> dict[str, float]:
        """Return the scores that are known; the file is read once, without a line that was cut off."""
        if self._kept is None:
            self._kept = {}
            file = Path(self.cache) if self.cache is not None else None
            if file is not None and file.exists():
                lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
                whole = [line for line in lines if line.endswith("\n")]
                if len(whole) < len(lines):
                    file.write_text("".join(whole), encoding="utf-8")
                self._kept = dict(map(json.loads, whole))
        return self._kept

    def _keep(self, key: str, score: float) -> None:
        if self.cache is None:
            return
        self._scores()[key] = score
        file = Path(self.cache)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as log:
            log.write(json.dumps([key, score]) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Referee:
    """A judge of two answers to one prompt. It is asked twice, with the answers in either order, because models prefer
    the one that they read first."""

    url: str
    """The address of the endpoint, such as http://localhost:8000/v1."""
    model: str
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key, if the endpoint wants one."""
    seconds: float = 60.0
    """The time limit of one request."""

    def __call__(self, prompt: Sequence[Message], one: str, other: str) -> float:
        """Return 1 if `one` is better, 0 if `other` is, 1/2 for a tie: the mean of both orders."""
        return (self._asked(prompt, one, other) + 1.0 - self._asked(prompt, other, one)) / 2

    def _asked(self, prompt: Sequence[Message], first: str, second: str) -> float:
        turns = "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
        text = (
            f"<conversation>\n{turns}\n</conversation>\n<response A>\n{first}\n</response A>\n"
            f"<response B>\n{second}\n</response B>"
        )
        messages: list[Message] = [{"role": "system", "content": _COMPARE}, {"role": "user", "content": text}]
        reply = reply_to(messages, self.url, self.model, self.key_variable, self.seconds)
        named = {word.lower() for word in _VERDICT.findall(reply)}
        if len(named) != 1:
            raise ValueError(f"the judge said {reply[:80]!r}, which is none of A, B and tie")
        return {"a": 1.0, "b": 0.0, "tie": 0.5}[named.pop()]


def reply_to(messages: Sequence[Message], url: str, model: str, key_variable: str, seconds: float) -> str:
    """Return the reply of a model behind an OpenAI-compatible endpoint, at temperature 0.

    Raises ConnectionError with what the endpoint says, OSError if there is none.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(key_variable):
        headers["Authorization"] = f"Bearer {key}"
    body = json.dumps({"model": model, "messages": messages, "temperature": 0.0}).encode()
    request = Request(f"{url.rstrip('/')}/chat/completions", data=body, headers=headers)
    try:
        with urlopen(request, timeout=seconds) as response:
            reply = json.load(response)
    except HTTPError as error:
        with error:
            detail = error.read(200).decode(errors="replace")
        raise ConnectionError(f"the judge at {url} answers {error.code}: {detail}") from None
    return str(reply["choices"][0]["message"]["content"])
