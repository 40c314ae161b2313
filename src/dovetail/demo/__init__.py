"""An assistant data set for the demo, generated in memory, whose quality can be computed.

Responsible for: the public names. See families.py for the questions, answers.py for the mixed quality of the
demonstrations, gold.py for the score.
"""

from dovetail.demo.answers import CAREFUL, MIXED, PLAIN, Habits, write_answer
from dovetail.demo.dataset import Dataset, Exchange, Sizes, TaskPrompt, dataset
from dovetail.demo.gold import GoldScore, gold, gold_of
from dovetail.demo.learner import new_model, small_llama
from dovetail.demo.lookup import task_of
from dovetail.demo.tasks import Task
from dovetail.demo.tokenizer import train_tokenizer

__all__ = [
    "CAREFUL",
    "MIXED",
    "PLAIN",
    "Dataset",
    "Exchange",
    "GoldScore",
    "Habits",
    "Sizes",
    "Task",
    "TaskPrompt",
    "dataset",
    "gold",
    "gold_of",
    "new_model",
    "small_llama",
    "task_of",
    "train_tokenizer",
    "write_answer",
]
