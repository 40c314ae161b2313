"""Plot a stage below the cell of the notebook that runs it, while it runs.

Responsible for: the plot, and whether there is a notebook. Not responsible for: bars (progress.py), the page of a run.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from dovetail.telemetry.report_page import COLOURS

EVERY = 5.0
"""Seconds between two versions of the plot."""
SHOWN = {
    "sft": ("sft/loss", "sft/held_out_loss"),
    "reward": ("reward/loss", "reward/accuracy"),
    "dpo": ("dpo/loss", "dpo/accuracy"),
    "ppo": ("ppo/score_mean", "ppo/kl_nats_per_answer"),
}
"""The two metrics of each stage that are plotted, side by side."""
Display = Callable[..., Any]
"""The function `display` of IPython."""


def notebook_display() -> Display | None:
    """Return IPython's `display` if a notebook runs this process; None in a terminal or a script."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython  # type: ignore[import-not-found,unused-ignore]
    from IPython.display import display  # type: ignore[import-not-found,unused-ignore]

    shell = get_ipython()  # type: ignore[no-untyped-call,unused-ignore]
    return display if hasattr(shell, "kernel") else None


class NotebookPlot:
    """The plot of one stage, a sink of metrics."""

    def __init__(self, stage: str, show: Display, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = SHOWN[stage]
        self._points: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in self._metrics}
        self._clock = clock
        self._shown = clock()
        self._handle = show(self._bundle(), raw=True, display_id=True)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Take one row; the plot is drawn anew every few seconds."""
        for name in self._metrics:
            if name in row:
                steps, values = self._points[name]
                steps.append(step)
                values.append(row[name])
        if self._clock() - self._shown >= EVERY:
            self._draw()

    def close(self) -> None:
        """Draw the last rows."""
        self._draw()

    def _draw(self) -> None:
        self._shown = self._clock()
        self._handle.update(self._bundle(), raw=True)

    def _bundle(self) -> dict[str, Any]:
        """Return the figure as notebooks take it, and a line of text for those that draw nothing."""
        traces, layout = [], dict[str, Any](height=300, showlegend=False, grid={"rows": 1, "columns": 2})
        for number, name in enumerate(self._metrics):
            suffix = "" if number == 0 else str(number + 1)
            steps, values = self._points[name]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines" if len(steps) > 1 else "markers",
                    "x": list(steps),
                    "y": list(values),
                    "line": {"color": COLOURS[number]},
                    "xaxis": f"x{suffix}",
                    "yaxis": f"y{suffix}",
                }
            )
            layout[f"yaxis{suffix}"] = {"title": {"text": name}}
        last = ", ".join(f"{name} {values[-1]:.4g}" for name, (_, values) in self._points.items() if values)
        return {"application/vnd.plotly.v1+json": {"data": traces, "layout": layout}, "text/plain": last}
