"""Answers of mixed quality, as a crowd of good and bad writers would give them.

Responsible for: demonstrations whose flaws are mostly of manner (rude, rambling, cut off, repeated) and few
of fact, so that a model which imitates them faithfully leaves PPO room to improve.
Not responsible for: right and wrong sentences (families.py), or the score (gold.py).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from dovetail.demo.tasks import Task
from dovetail.demo.words import CLOSERS, EVASIONS, FILLERS, OPENERS, RUDE_CLOSERS, RUDE_OPENERS


@dataclass(frozen=True, slots=True)
class Habits:
    """The probabilities of the writers' habits. Flaws are drawn independently, so one answer can have several."""

    polite: float = 0.40
    """The probability that a writer adds a courtesy."""
    rude: float = 0.35
    """The probability that a writer adds a rude remark; the rest of the answers are plain."""
    one_filler: float = 0.20
    """The probability that a writer adds one needless sentence."""
    many_fillers: float = 0.25
    """The probability that a writer adds two or three needless sentences."""
    cut: float = 0.15
    """The probability that an answer stops in the middle of its last sentence."""
    repeats: float = 0.12
    """The probability that a writer says the answer twice."""
    evades: float = 0.05
    """The probability that a writer does not answer."""
    errs: float = 0.03
    """The probability that a writer answers wrongly."""


MIXED = Habits()
PLAIN = Habits(
    polite=0.0, rude=0.0, one_filler=0.0, many_fillers=0.0, cut=0.0, repeats=0.0, evades=0.0, errs=0.0
)
CAREFUL = replace(PLAIN, polite=1.0)


def write_answer(task: Task, rng: random.Random, habits: Habits = MIXED) -> str:
    """Write one answer to a task."""
    sentences = _core(task, rng, habits)
    draw = rng.random()
    num_fillers = 1 if draw < habits.one_filler else 0
    if habits.one_filler <= draw < habits.one_filler + habits.many_fillers:
        num_fillers = rng.randint(2, 3)
    sentences += rng.sample(FILLERS, num_fillers)
    sentences = _add_tone(sentences, task, rng, habits)
    text = " ".join(sentences)
    return _cut_short(text, len(sentences[-1]), rng) if rng.random() < habits.cut else text


def _core(task: Task, rng: random.Random, habits: Habits) -> list[str]:
    draw = rng.random()
    if draw < habits.evades:
        return [rng.choice(EVASIONS)]
    if draw < habits.evades + habits.errs:
        return [rng.choice(task.wrong_answers)]
    answer = rng.choice(task.answers)
    return [answer, answer] if rng.random() < habits.repeats else [answer]


def _add_tone(sentences: list[str], task: Task, rng: random.Random, habits: Habits) -> list[str]:
    draw, at_start = rng.random(), rng.random() < 0.7
    if draw < habits.rude:
        return [rng.choice(RUDE_OPENERS), *sentences] if at_start else [*sentences, rng.choice(RUDE_CLOSERS)]
    if draw < habits.rude + habits.polite and not task.is_courteous:
        return [rng.choice(OPENERS), *sentences] if at_start else [*sentences, rng.choice(CLOSERS)]
    return sentences


def _cut_short(text: str, last_sentence: int, rng: random.Random) -> str:
    """Drop one or more words from the end of the last sentence, with its full stop."""
    kept, last = text[: len(text) - last_sentence], text[len(text) - last_sentence :]
    words = last.rstrip(".!?").split()
    words = words[: rng.randint(max(1, len(words) // 2), max(1, len(words) - 1))]
    return kept + " ".join(words)
