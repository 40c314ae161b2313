"""Compute the gold score, the true worth of an answer.

Responsible for: truth and manner of an answer to a task, each in 0..1, and their sum.
Not responsible for: finding the task of a prompt (lookup.py).

A sentence counts only if it is in a whitelist of accepted answers and set phrases. So a text cannot
score by scattering the right word among others, nor by phrases that merely look polite.

    total = 0.4 truth + 0.2 politeness + 0.2 brevity + 0.2 clean

Truth is a part of a sum, not a condition: a wrong answer earns points for manner too, only fewer, since its
sentence counts as a superfluous one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dovetail.demo.lookup import task_of
from dovetail.demo.tasks import Task
from dovetail.demo.words import CLOSERS, EVASIONS, FILLERS, OPENERS, RUDE_CLOSERS, RUDE_OPENERS
from dovetail.text.message import Message

TRUTH_WEIGHT = 0.4
MANNER_WEIGHT = 0.2
"""The weight of each of the three parts of manner."""


@dataclass(frozen=True, slots=True)
class GoldScore:
    """The parts of a gold score, each in 0..1."""

    truth: float
    """1 = an accepted answer stands as a sentence, and nothing else is asserted."""
    politeness: float
    """1 = a courtesy, 0.5 = none, 0 = a rude remark."""
    brevity: float
    """1 = nothing but the answer and at most one courtesy; each sentence more costs 0.5."""
    clean: float
    """1 = ended by itself, with a full stop, and said nothing twice."""

    @property
    def manner(self) -> float:
        """The mean of the parts that are not truth."""
        return (self.politeness + self.brevity + self.clean) / 3

    @property
    def total(self) -> float:
        """The gold score."""
        return TRUTH_WEIGHT * self.truth + 3 * MANNER_WEIGHT * self.manner


def gold(task: Task, answer: str, *, finished: bool = True) -> GoldScore:
    """Judge an answer. `finished` = the model ended it, as opposed to being cut off at a length limit."""
    sentences, fragment = split_sentences(answer)
    if not sentences and not fragment:
        return GoldScore(truth=0.0, politeness=0.0, brevity=0.0, clean=0.0)
    accepted = {normalise(sentence) for sentence in (*task.answers, *task.bare_answers)}
    answering = [sentence for sentence in sentences if sentence in accepted]
    polite = [sentence for sentence in sentences if sentence in _POLITE and sentence not in accepted]
    is_rude = any(sentence in _RUDE for sentence in sentences)
    is_courteous = bool(polite) or (task.is_courteous and bool(answering))
    needed = min(len(answering), 1) + min(len(polite), 1)
    num_extra = len(sentences) - needed + bool(fragment)
    says_something = bool(answering) or num_extra > 0
    contradicts = any(s not in accepted and s not in _HARMLESS for s in sentences) or not _is_cut_phrase(
        fragment, accepted
    )
    return GoldScore(
        truth=float(bool(answering) and not contradicts),
        politeness=0.0 if is_rude else 1.0 if is_courteous else 0.5,
        brevity=max(0.0, 1.0 - 0.5 * num_extra) if says_something else 0.0,
        clean=float(finished and not fragment and not repeats_itself(sentences)),
    )


def gold_of(messages: Sequence[Message], answer: str, *, finished: bool = True) -> GoldScore:
    """Judge an answer to a prompt given as chat messages."""
    return gold(task_of(messages), answer, finished=finished)


def split_sentences(text: str) -> tuple[list[str], str]:
    """Split a text into its sentences, normalised, and the rest after the last full stop."""
    pieces = [piece for piece in re.split(r"(?<=[.!?])\s+", text.strip()) if normalise(piece)]
    fragment = pieces.pop() if pieces and not pieces[-1].endswith((".", "!", "?")) else ""
    return [normalise(piece) for piece in pieces], normalise(fragment)


def normalise(text: str) -> str:
    """Return the words of a text in lower case, without punctuation."""
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower()))


def repeats_itself(sentences: Sequence[str]) -> bool:
    """Return whether a sentence occurs twice, or four words in a row do."""
    words = " ".join(sentences).split()
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(set(sentences)) < len(sentences) or len(set(runs)) < len(runs)


def _is_cut_phrase(fragment: str, accepted: set[str]) -> bool:
    """Return whether an unfinished end begins a harmless phrase; an empty one does."""
    return any(phrase.startswith(fragment) for phrase in _HARMLESS | accepted)


_POLITE = frozenset(map(normalise, (*OPENERS, *CLOSERS)))
_RUDE = frozenset(map(normalise, (*RUDE_OPENERS, *RUDE_CLOSERS)))
_HARMLESS = _POLITE | _RUDE | frozenset(map(normalise, (*FILLERS, *EVASIONS)))
