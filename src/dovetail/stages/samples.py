"""Sample answers with their scores: printed now and then, and kept.

Responsible for: `ppo/samples.jsonl` of rollouts and `ppo/held_out.jsonl` of evaluations. Not responsible for: metrics
(telemetry/).
"""

import json
from collections.abc import Sequence
from pathlib import Path

from dovetail.parallel.world import ALONE, World
from dovetail.rlhf.rewards import Answer
from dovetail.telemetry.log import say

SHOWN = 2
KEPT = 8
KEPT_HELD_OUT = 32


class AnswerLog:
    """Appends one JSON line per answer; lines of steps after `start` are of a killed run and are dropped.

    Of several processes that hold the same answers, the first one keeps them.
    """

    def __init__(self, path: Path, *, start: int, world: World = ALONE) -> None:
        self.path = path
        self._is_kept = world.is_first
        if self._is_kept and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
            path.write_text("".join(kept), encoding="utf-8")

    def keep(self, step: int, answers: Sequence[Answer], scores: Sequence[float]) -> None:
        """Append the answers and their scores."""
        if not self._is_kept:
            return
        rows = [
            {
                "step": step,
                "messages": list(answer.messages),
                "answer": answer.text,
                "score": round(score, 4),
                "finished": answer.finished,
            }
            for answer, score in zip(answers, scores, strict=True)
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def show(answers: Sequence[Answer], scores: Sequence[float]) -> None:
    """Print two answers with their scores."""
    for answer, score in list(zip(answers, scores, strict=True))[:SHOWN]:
        question = answer.messages[-1]["content"]
        say(f"  [{score:+.2f}] {_short(question)} -> {_short(answer.text)}")


def _short(text: str, limit: int = 90) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
