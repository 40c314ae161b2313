"""Lay out the page of a run: one HTML file with all it needs, for a browser without a network.

Responsible for: the page, its charts as Plotly draws them, and that no text of a model becomes part of the page's
program. Not responsible for: reading a run and what its numbers mean (stages/report.py).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2

COLOURS = ("#2a7de1", "#e1662a", "#2f9e6e", "#a04fc4", "#c4384f", "#7a7f87")
"""One colour for each run, or for each curve of a chart that shows one run; readable on light and dark."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    spread: Sequence[float | None] | None = None
    """Half the height of a band around the line."""
    is_marked: bool = False
    """True where each point is drawn, because there are few."""
    colour: str | None = None
    is_dotted: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart, and the sentence beside it that says how to read it."""

    title: str
    note: str
    curves: Sequence[Curve]
    x_title: str
    y_title: str
    is_stacked: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """The charts of one stage."""

    title: str
    charts: Sequence[Chart]


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the page; the first column names the row."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Sample:
    """The answers to one prompt at the first evaluation and at the last, with their scores."""

    prompt: str
    before: str
    before_score: float
    after: str
    after_score: float


@dataclass(frozen=True, slots=True)
class Page:
    """All that the page shows."""

    title: str
    state: Sequence[str]
    """The lines at the top: where the run stands."""
    warnings: Sequence[str]
    sections: Sequence[Section]
    tables: Sequence[Table] = ()
    samples: Sequence[Sample] = ()
    sample_steps: tuple[int, int] = (0, 0)
    """The steps at which the samples were taken."""


def html_of(page: Page) -> str:
    """Return the page as one HTML document, its scripts and styles within."""
    package = files("dovetail.telemetry")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        package.joinpath("report.html").read_text(encoding="utf-8")
    )
    charts = [chart for section in page.sections for chart in section.charts]
    data = {
        "charts": [_figure(chart) for chart in charts],
        "samples": [
            {
                "prompt": sample.prompt,
                "before": sample.before,
                "beforeScore": sample.before_score,
                "after": sample.after,
                "afterScore": sample.after_score,
            }
            for sample in page.samples
        ],
    }
    return template.render(
        page=page,
        data=_for_a_script(data),
        plotly=files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8"),
    )


def _for_a_script(data: Any) -> str:
    """Return JSON that no text within can end: a script ends at `</`, a comment in it begins with `<!`."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _figure(chart: Chart) -> dict[str, Any]:
    """Return the traces and titles of a chart in Plotly's form."""
    traces: list[dict[str, Any]] = []
    for number, curve in enumerate(chart.curves):
        colour = curve.colour or COLOURS[number % len(COLOURS)]
        if curve.spread is not None:
            traces.append(_band(curve, curve.spread, colour))
        trace: dict[str, Any] = {
            "type": "scatter",
            "name": curve.name,
            "x": list(curve.x),
            "y": list(curve.y),
            "mode": "lines+markers" if curve.is_marked else "lines",
            "line": {"color": colour, "width": 2, "dash": "dot" if curve.is_dotted else "solid"},
            "marker": {"size": 6},
        }
        if chart.is_stacked:
            trace |= {"stackgroup": "all", "line": {"color": colour, "width": 0.5}}
        traces.append(trace)
    return {"traces": traces, "x": chart.x_title, "y": chart.y_title, "title": chart.title}


def _band(curve: Curve, spread: Sequence[float | None], colour: str) -> dict[str, Any]:
    """Return the band around a curve as a closed outline; points without a number are left out."""
    points = [
        (x, y, half)
        for x, y, half in zip(curve.x, curve.y, spread, strict=True)
        if y is not None and half is not None
    ]
    return {
        "type": "scatter",
        "x": [x for x, _, _ in points] + [x for x, _, _ in reversed(points)],
        "y": [y + half for _, y, half in points] + [y - half for _, y, half in reversed(points)],
        "fill": "toself",
        "fillcolor": f"{colour}22",
        "line": {"width": 0},
        "mode": "lines",
        "hoverinfo": "skip",
        "showlegend": False,
    }
