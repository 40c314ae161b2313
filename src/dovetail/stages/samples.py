"""Sample answers with their scores: printed now and then, and all that is printed is kept.

Responsible for: `ppo/samples.jsonl`. Not responsible for: metrics (telemetry/).
"""

import json
from pathlib import Path

from dovetail.parallel.world import ALONE, World
from dovetail.rlhf.rollout import Collected
from dovetail.telemetry.log import say

SHOWN = 2
KEPT = 8


class SampleLog:
    """Appends one JSON line per kept answer; lines of steps after `start` are of a killed run and are dropped.

    Of several processes that hold the same answers, the first one keeps and prints them.
    """

    def __init__(self, path: Path, *, start: int, every: int, world: World = ALONE) -> None:
        self.path = path
        self.every = every
        self._is_kept = world.is_first
        if self._is_kept and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
            path.write_text("".join(kept), encoding="utf-8")

    def show_if_due(self, step: int, collected: Collected) -> None:
        """Keep the first few answers of the rollout, and print two."""
        if step % self.every or not self._is_kept:
            return
        scores = collected.experience.scores_S.tolist()
        rows = [
            {
                "step": step,
                "messages": list(answer.messages),
                "answer": answer.text,
                "score": round(score, 4),
                "finished": answer.finished,
            }
            for answer, score in list(zip(collected.answers, scores, strict=True))[:KEPT]
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for answer, score in list(zip(collected.answers, scores, strict=True))[:SHOWN]:
            question = answer.messages[-1]["content"]
            say(f"  [{score:+.2f}] {_short(question)} -> {_short(answer.text)}")


def _short(text: str, limit: int = 90) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
