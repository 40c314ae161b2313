"""The kinds of question that the synthetic assistant data asks.

Responsible for: fourteen families, chosen so that a small model can learn them: most answers follow from words
of the prompt (repeat, compare, pick, count, recall), few need a table of facts.
Not responsible for: manner (answers.py), scores (gold.py), or which tasks a stage sees (dataset.py).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dovetail.demo.tasks import Task
from dovetail.demo.words import (
    ANIMALS,
    COLOURS,
    DAYS,
    FORBIDDEN,
    FRUITS,
    NAMES,
    SOUNDS,
    THINGS,
)

WORDS = (*THINGS, *ANIMALS, *FRUITS)
MAX_NUMBER = 10
KINDS = {"animal": ANIMALS, "fruit": FRUITS, "colour": COLOURS, "name": NAMES, "thing": THINGS}
_INTRODUCTIONS = ("Hi, I am {}.", "My name is {}.", "Good morning, {} here.", "Hello! They call me {}.")
_GREETINGS = ("Hello {}, how can I help you?", "Nice to meet you, {}.")
Item = TypeVar("Item")


def all_tasks() -> list[Task]:
    """Return all tasks in a fixed order; each sequence of turns occurs once."""
    families = (
        repeat_word, repeat_two, larger_number, pick_kind, is_there_a_kind, told, count_list, greet, recall_name,
        recall_colour, animal_sound, next_day, refuse, answer_thanks,
    )  # fmt: skip
    tasks = {task.turns: task for family in families for task in family()}
    return list(tasks.values())


def repeat_word() -> Iterator[Task]:
    """Yield tasks that ask to repeat a word."""
    questions = ("Repeat the word {w}.", "Say the word {w}.", "Please say {w}.", "Which word is this: {w}?")
    for word in WORDS:
        for i, question in enumerate(questions):
            yield _task(
                "repeat word", f"{i}/{word}", question.format(w=word),
                _Blank(("The word is {}.", "You said {}."), word, _others(WORDS, word)),
            )  # fmt: skip


def repeat_two() -> Iterator[Task]:
    """Yield tasks that ask to repeat two words, in order."""
    questions = ("Repeat these words: {} and {}.", "Say {} and {}.")
    for a, b in _sample(itertools.permutations(WORDS, 2), 500):
        wrong = (f"{b} and {a}", f"{a} and {a}", f"{b} and {b}")
        for question in questions:
            yield _task(
                "repeat two", f"{a}/{b}", question.format(a, b),
                _Blank(("The words are {}.", "You said {}."), f"{a} and {b}", wrong),
            )  # fmt: skip


def larger_number() -> Iterator[Task]:
    """Yield tasks that ask for the larger of two numbers."""
    questions = (
        "Which is larger, {} or {}?",
        "Tell me the larger number: {} or {}.",
        "What is more, {} or {}?",
    )
    for low, high in itertools.combinations(range(1, MAX_NUMBER + 1), 2):
        for question, (a, b) in itertools.product(questions, ((low, high), (high, low))):
            yield _task(
                "larger", f"{low}/{high}", question.format(a, b),
                _Blank(("The larger number is {}.",), str(high), (str(low),)),
                fact=f"{high} is larger than {low}.",
            )  # fmt: skip


def pick_kind() -> Iterator[Task]:
    """Yield tasks that ask for the only animal, fruit, colour or name in a list."""
    for kind, right, words in _lists_with_one_of_a_kind(250):
        a_kind = _with_article(kind)
        yield _task(
            "pick", f"{kind}/{'/'.join(words)}", f"Which of these is {a_kind}: {', '.join(words)}?",
            _Blank((f"The {kind} is {{}}.", "It is {}."), right, _others(words, right)),
            fact=f"{a_kind.capitalize()}: {right}.",
        )  # fmt: skip


def is_there_a_kind() -> Iterator[Task]:
    """Yield yes-or-no tasks that ask whether a list has an animal, fruit, colour or name."""
    for kind, right, words in _lists_with_one_of_a_kind(250):
        # In half of the lists a thing takes the place of the one sought, so that guessing wins half.
        is_there = _index_of(words, 2) == 0
        unused = [thing for thing in THINGS if thing not in words]
        stranger = unused[_index_of(words, len(unused))]
        shown = words if is_there else tuple(stranger if word == right else word for word in words)
        yes, no = f"Yes, the {kind} is {right}.", f"No, there is no {kind}."
        yield Task(
            family="yes or no", key=f"yes or no/{kind}/{'/'.join(shown)}", may_take_prefix=True,
            turns=(f"Is there {_with_article(kind)} here: {', '.join(shown)}?",),
            answers=(yes,) if is_there else (no,), wrong_answers=(no,) if is_there else (yes,),
            bare_answers=("Yes.",) if is_there else ("No.",),
        )  # fmt: skip


def _lists_with_one_of_a_kind(count: int) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield (kind, the word of that kind, three words with it), `count` times for each kind but things."""
    for kind in ("animal", "fruit", "colour", "name"):
        strangers = [word for other, words in KINDS.items() if other != kind for word in words]
        choices = itertools.product(KINDS[kind], itertools.permutations(strangers, 2))
        for right, (a, b) in _sample(choices, count):
            orders = ((right, a, b), (a, right, b), (a, b, right))
            yield kind, right, orders[_index_of((right, a, b), 3)]


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _index_of(words: Sequence[str], count: int) -> int:
    """Return a number below `count` that looks random but follows from the words."""
    return sum(map(ord, "".join(words))) % count


def told() -> Iterator[Task]:
    """Yield tasks that ask for the name, colour or animal in a statement that names one of each."""
    for name, colour, thing, animal in _sample(itertools.product(NAMES, COLOURS, THINGS, ANIMALS), 800):
        statement = f"{name} has a {colour} {thing} and a {animal}."
        asked = (
            (f"What colour is the {thing}?", f"The {thing} is {{}}.", colour, COLOURS),
            (f"Who has the {thing}?", f"{{}} has the {thing}.", name, NAMES),
            (f"Which animal does {name} have?", f"{name} has a {{}}.", animal, ANIMALS),
        )
        for question, form, right, kind in asked:
            yield _task(
                "told", f"{name}/{colour}/{thing}/{animal}", f"{statement} {question}",
                _Blank((form,), right, _others(kind, right)),
            )  # fmt: skip


def count_list() -> Iterator[Task]:
    """Yield tasks that ask for the number of words in a list of two to four."""
    for count in (2, 3, 4):
        for words in _sample(itertools.permutations(WORDS, count), 400):
            yield _task(
                "count", "/".join(words), f"How many words are here: {', '.join(words)}?",
                _Blank(
                    ("There are {} words.", "The list has {} words."), str(count),
                    _others("12345", str(count)),
                ),
            )  # fmt: skip


def greet() -> Iterator[Task]:
    """Yield tasks whose answers greet a user by name."""
    for name in NAMES:
        for i, introduction in enumerate(_INTRODUCTIONS):
            yield _task(
                "greet", f"{i}/{name}", introduction.format(name),
                _Blank(_GREETINGS, name, _others(NAMES, name)), is_courteous=True,
            )  # fmt: skip


def recall_name() -> Iterator[Task]:
    """Yield tasks that ask for the name that the user gave before."""
    questions = ("What is my name?", "Do you remember my name?", "Who am I?")
    for name, (i, introduction), question in itertools.product(NAMES, enumerate(_INTRODUCTIONS), questions):
        turns = (introduction.format(name), _GREETINGS[i % 2].format(name), question)
        yield _task(
            "recall name", f"{i}/{question}/{name}", turns,
            _Blank(("Your name is {}.", "You are {}."), name, _others(NAMES, name)),
            quoted_keys=(f"greet/{i}/{name}",),
        )  # fmt: skip


def animal_sound() -> Iterator[Task]:
    """Yield tasks that ask for the sound of an animal, a small table of facts."""
    questions = (
        "What does a {} say?",
        "Which sound does a {} make?",
        "What is the sound of a {}?",
        "How does a {} talk?",
    )
    for (animal, right), (i, question) in itertools.product(SOUNDS.items(), enumerate(questions)):
        forms = (f"A {animal} says {{}}.",)
        yield _task(
            "sound", f"{i}/{animal}", question.format(animal),
            _Blank(forms, right, _others(tuple(SOUNDS.values()), right)), fact=forms[0].format(right),
        )  # fmt: skip


def next_day() -> Iterator[Task]:
    """Yield tasks that ask for the day after a day."""
    questions = (
        "Which day comes after {}?", "What day follows {}?", "What is the day after {}?",
        "Tell me the day after {}.",
    )  # fmt: skip
    for (n, day), (i, question) in itertools.product(enumerate(DAYS), enumerate(questions)):
        right = DAYS[(n + 1) % len(DAYS)]
        forms = (f"The day after {day} is {{}}.",)
        yield _task(
            "next day", f"{i}/{day}", question.format(day),
            _Blank(forms, right, tuple(d for d in DAYS if d not in (day, right))),
            fact=forms[0].format(right),
        )  # fmt: skip


def refuse() -> Iterator[Task]:
    """Yield tasks whose answers refuse to help with a bad deed."""
    questions = (
        "How do I {}?", "Teach me to {}.", "Help me to {}.", "What is the best way to {}?",
        "I want to {}. What do I do first?",
    )  # fmt: skip
    for deed, (i, question) in itertools.product(FORBIDDEN, enumerate(questions)):
        yield Task(
            family="refuse", key=f"refuse/{i}/{deed}", turns=(question.format(deed),),
            answers=(
                "I am sorry, but I cannot help with that.", "Sorry, that would be wrong, so I cannot help.",
            ),
            wrong_answers=("First you wait until it is dark.", "It is easy, just do it quickly."),
            is_courteous=True, may_take_prefix=True, fact=f"It is wrong to {deed}.",
        )  # fmt: skip


def answer_thanks() -> Iterator[Task]:
    """Yield tasks whose answers reply to thanks."""
    thanks = ("Thank you!", "Thanks a lot.", "That was useful, thanks.", "Many thanks!")
    for name, (i, introduction), thank in itertools.product(NAMES[::2], enumerate(_INTRODUCTIONS), thanks):
        yield Task(
            family="thanks", key=f"thanks/{i}/{name}/{thank}",
            turns=(introduction.format(name), _GREETINGS[i % 2].format(name), thank),
            answers=("You are welcome!", "My pleasure!"), wrong_answers=("Good morning!", f"It is {name}."),
            is_courteous=True, quoted_keys=(f"greet/{i}/{name}",),
        )  # fmt: skip


def recall_colour() -> Iterator[Task]:
    """Yield tasks that ask for the colour of a thing, given one turn earlier."""
    replies = ("Good to know.", "Thank you for telling me.")
    questions = ("What colour is it?", "What colour is my {}?")
    for n, ((thing, colour), question) in enumerate(
        itertools.product(itertools.product(THINGS, COLOURS), questions)
    ):
        yield _task(
            "recall colour", f"{thing}/{colour}",
            (f"My {thing} is {colour}.", replies[n % 2], question.format(thing)),
            _Blank((f"Your {thing} is {{}}.", "It is {}."), colour, _others(COLOURS, colour)),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Blank:
    """Sentences with one gap each, the words that fill it correctly, and the wrong ones."""

    forms: tuple[str, ...]
    right: str
    wrong: tuple[str, ...]


def _task(
    family: str,
    key: str,
    turns: str | tuple[str, ...],
    blank: _Blank,
    *,
    is_courteous: bool = False,
    fact: str | None = None,
    quoted_keys: tuple[str, ...] = (),
) -> Task:
    """Make a task whose answer fills a blank."""
    return Task(
        family=family,
        key=f"{family}/{key}",
        turns=(turns,) if isinstance(turns, str) else turns,
        answers=tuple(form.format(blank.right) for form in blank.forms),
        wrong_answers=tuple(form.format(value) for form in blank.forms for value in blank.wrong),
        bare_answers=() if is_courteous else (f"{blank.right}.",),
        is_courteous=is_courteous,
        may_take_prefix=isinstance(turns, str) and not is_courteous,
        fact=fact,
        quoted_keys=quoted_keys,
    )


def _others(words: Sequence[str], word: str) -> tuple[str, ...]:
    return tuple(w for w in words if w != word)


def _sample(items: Iterable[Item], count: int) -> list[Item]:
    """Draw `count` of the items, always the same ones, in their own order."""
    everything = list(items)
    chosen = sorted(random.Random(0).sample(range(len(everything)), count))
    return [everything[i] for i in chosen]
