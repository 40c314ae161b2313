"""SQuAD 2.0: questions about a paragraph, some of which it does not answer.

Responsible for: the prompt, and exact match and F1 with the normalisation of the official script (Rajpurkar et al.
2018, arXiv:1806.03822). Not responsible for: reading the file (named.py).

The prompt is InstructGPT's for this set (arXiv:2203.02155, appendix E); a reply of "Not in background." claims that
there is no answer. The first line of a reply counts.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import Any

from dovetail.data.records import Prompt, message
from dovetail.errors import DataError
from dovetail.rlhf.tasks.subject import Drawing, Subject

INSTRUCTION = (
    "Answer each question using information in the preceding background paragraph. If there is not enough information "
    'provided, answer with "Not in background."'
)
MAX_NEW_TOKENS = 48
"""Enough for the longest answers, which are parts of a sentence."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its paragraph, and the answers that people gave; none where the paragraph holds none."""

    prompt: Prompt
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Squad:
    """Exact match and F1 of greedy answers, over all questions, over those with an answer and over those without."""

    label: str
    questions: Sequence[Question]

    def __len__(self) -> int:
        return len(self.questions)

    def __call__(self, subject: Subject) -> dict[str, float]:
        drawing = Drawing(max_new_tokens=MAX_NEW_TOKENS)
        answers = subject.answers([question.prompt for question in self.questions], drawing, greedy=True)
        said = [claimed(answer.text) for answer in answers]
        exact = [
            exact_match(one, question.answers) for one, question in zip(said, self.questions, strict=True)
        ]
        f1 = [f1_score(one, question.answers) for one, question in zip(said, self.questions, strict=True)]
        figures = {"exact_match": fmean(exact), "f1": fmean(f1), "f1_stderr": pstdev(f1) / len(f1) ** 0.5}
        for kind, has_answer in (("has_answer", True), ("no_answer", False)):
            kept = [i for i, question in enumerate(self.questions) if bool(question.answers) == has_answer]
            if kept:
                figures[f"exact_match_{kind}"] = fmean(exact[i] for i in kept)
                figures[f"f1_{kind}"] = fmean(f1[i] for i in kept)
        return figures


def question_of(row: Prompt) -> Question:
    """Return the question of a row; raises DataError that names the row and the column that cannot be used."""
    context = row.row.get("context")
    if not isinstance(context, str):
        raise DataError(
            f"{row.place}: the column context holds no text; the row has {', '.join(['question', *row.row])}",
            hint="a row of SQuAD 2.0 has question, context, answers and is_impossible",
        )
    text = f"{INSTRUCTION}\n\nBackground: {context}\n\nQ: {row.messages[-1]['content']}\n\nA:"
    answers = () if row.row.get("is_impossible") else _answers(row.row, row.place)
    return Question(replace(row, messages=(message("user", text),)), answers)


def _answers(row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """Return the wordings of the answer: a list of texts, of objects with `text`, or an object with a list `text`."""
    given = row.get("answers")
    listed = given.get("text") if isinstance(given, Mapping) else given
    items = listed if isinstance(listed, list) else [None]
    texts = [item.get("text") if isinstance(item, Mapping) else item for item in items]
    kept = tuple(text for text in texts if isinstance(text, str))
    if len(kept) < len(texts):
        raise DataError(
            f"{place}: the column answers holds no list of texts, and is_impossible is not true",
            hint='write answers as ["first wording", "second"]; an empty list says that there is no answer',
        )
    return tuple(text for text in kept if normalised(text))


def claimed(reply: str) -> str:
    """Return the answer that a reply gives: its first line, or nothing where it says that there is none."""
    first = next((line.strip() for line in reply.splitlines() if line.strip()), "")
    return "" if normalised(first) == "not in background" else first


def normalised(text: str) -> str:
    """Return the text in lower case, without punctuation and articles, words one space apart."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(said: str, answers: Sequence[str]) -> float:
    """Return 1 if the answer is one of the wordings, or nothing where there is no answer."""
    return float(normalised(said) in [normalised(answer) for answer in answers or ("",)])


def f1_score(said: str, answers: Sequence[str]) -> float:
    """Return the best harmonic mean of precision and recall of the words, over the wordings."""
    return max(_f1(normalised(said).split(), normalised(answer).split()) for answer in answers or ("",))


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))
