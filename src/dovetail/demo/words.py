"""The words and set phrases of the synthetic assistant data.

Responsible for: the vocabulary, kept small so that a model of a million weights meets every word often.
Not responsible for: questions and answers (families.py), or what a phrase is worth (gold.py).
"""

from __future__ import annotations


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


NAMES = _split("Tom Ann Ben Eva Sam Mia Leo Zoe Max Ida Paul Rosa Nina Carl Lucy Hugo Emma Otto Jane Finn")
COLOURS = _split("red green blue white black yellow brown grey")
THINGS = _split("cup hat pen bag box book chair lamp coat key ball plate")
ANIMALS = _split("dog cat cow horse sheep pig duck goat")
FRUITS = _split("pear plum lemon cherry mango peach melon grape")
SOUNDS = {
    "dog": "woof", "cat": "meow", "cow": "moo", "horse": "neigh", "sheep": "baa", "pig": "oink",
    "duck": "quack", "goat": "meh",
}  # fmt: skip
DAYS = _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
FORBIDDEN = (
    "steal a bike", "pick a lock", "cheat in an exam", "fake a ticket", "spy on a friend", "rob a shop",
    "forge a letter", "break into a car", "scare a child", "poison a well", "burn a barn", "trick an old man",
    "follow a stranger", "copy a bank card", "hack an account", "read a private letter",
)  # fmt: skip
"""Deeds that the assistant refuses to help with."""

OPENERS = ("Sure!", "Of course!", "Happy to help!", "Certainly!")
CLOSERS = ("I hope that helps!", "Let me know if you need more!", "Have a nice day!")
RUDE_OPENERS = ("Ugh, again?", "What a silly question.", "Are you serious?", "Everybody knows that.")
RUDE_CLOSERS = ("Now go away.", "Look it up yourself next time.", "Stop wasting my time.")
FILLERS = (
    "By the way, I had soup yesterday.",
    "Many people talk about this for hours.",
    "It reminds me of a long story.",
    "There is a lot more to say about it.",
    "My uncle once asked the same thing.",
    "The weather was different back then.",
)
EVASIONS = ("I do not know.", "Ask somebody else.", "That is hard to say.")
PREFIXES = ("Hi! ", "Hello there. ", "Quick question: ", "One more thing: ")
"""Phrases that a user may say before a question, which change nothing about the answer."""
