"""The plot in a notebook holds the rows of the stage, and there is none in a script."""

from typing import Any

from dovetail.telemetry.notebook import EVERY, NotebookPlot, notebook_display


class FakeDisplay:
    """Takes figures as IPython's `display` and its handle do."""

    def __init__(self) -> None:
        self.figures: list[dict[str, Any]] = []

    def __call__(self, bundle: dict[str, Any], *, raw: bool, display_id: bool) -> "FakeDisplay":
        assert raw
        assert display_id
        self.figures.append(bundle)
        return self

    def update(self, bundle: dict[str, Any], *, raw: bool) -> None:
        assert raw
        self.figures.append(bundle)


def test_a_script_has_no_notebook() -> None:
    assert notebook_display() is None


def test_the_plot_follows_the_rows_every_few_seconds() -> None:
    show, now = FakeDisplay(), [0.0]
    plot = NotebookPlot("ppo", show, clock=lambda: now[0])
    plot.write(1, {"ppo/score_mean": 0.5, "ppo/kl_nats_per_answer": 0.0, "ppo/answer_tokens": 9.0})
    assert len(show.figures) == 1
    now[0] = EVERY
    plot.write(2, {"ppo/score_mean": 0.75})
    plot.close()
    figures = [bundle["application/vnd.plotly.v1+json"] for bundle in show.figures]
    score, kl = figures[1]["data"]
    assert (score["x"], score["y"]) == ([1, 2], [0.5, 0.75])
    assert (kl["x"], kl["y"], kl["yaxis"]) == ([1], [0.0], "y2")
    assert figures[1]["layout"]["yaxis2"]["title"]["text"] == "ppo/kl_nats_per_answer"
    assert show.figures[-1]["text/plain"] == "ppo/score_mean 0.75, ppo/kl_nats_per_answer 0"
