"""`dovetail eval`: compare models on held-out prompts and tasks.

Responsible for: the flags, the tables, the JSON and the Markdown page. Not responsible for: the figures
(serving/inference/comparison.py).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dovetail.cli.user_paths import path as as_path
from dovetail.errors import ConfigError, DataError

if TYPE_CHECKING:
    from dovetail.config.run import RunConfig
    from dovetail.rlhf.tasks.subject import Drawing
    from dovetail.serving.inference.comparison import Result

ENDS = ("_stderr", "_low", "_high")
"""Ends of the names of figures that belong to another one."""


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Run folders, model folders, .gguf files or hub names. The first model is what the others are "
            "compared with; reward models among them score the answers.",
            show_default=False,
        ),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="prompts=FILE (or FILE alone), text=FILE, squad=FILE, pairs=FILE, or a verifier such as number=FILE. "
            "By default what the first run holds out.",
            show_default=False,
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="OpenAI-compatible endpoint whose model compares answers.", show_default=False),
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The name of its model.")] = "default",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest answer. By default the run's, or 256.", show_default=False),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.01, help="Of sampled answers. By default the run's, or 1.", show_default=False),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Answers to each prompt of a verifier: 1 is greedy, more give pass@k.")
    ] = 1,
    limit: Annotated[int, typer.Option(min=1, help="Most rows of a task, always the same ones.")] = 256,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Seed of the answers. By default that of evaluations in training.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    page: Annotated[
        Path | None, typer.Option(parser=as_path, help="Also write the tables to this Markdown file.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto.")] = "auto",
) -> None:
    """Compare models on held-out prompts and tasks.

    dovetail eval runs/demo
    dovetail eval runs/a/sft/model runs/a runs/b other/reward-model --task prompts.jsonl --task squad=dev.jsonl
    """
    from dovetail.rlhf.judge import Referee  # here and not above: these import torch
    from dovetail.rlhf.tasks.named import parse_task
    from dovetail.serving.inference.comparison import compare, contestants

    names = [parse_task(text) for text in task or ()]
    found = contestants(models)
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    drawing = drawing_of(found.run, samples=samples, **given)
    if judge and len(found.chat) < 2:
        raise ConfigError(
            f"--judge compares the answers of two models, and {', '.join(models)} holds {len(found.chat)}",
            hint="give a second model, or leave --judge out",
        )
    referee = Referee(url=judge, model=judge_model) if judge else None
    results = compare(found, names, drawing, limit=limit, judge=referee, device=device)
    if as_json:
        typer.echo(
            json.dumps(as_data({**found.chat, **found.rewards}, results), indent=2, ensure_ascii=False)
        )
    else:
        show(results)
    if page is not None:
        _write(page, results)


def drawing_of(run: "RunConfig | None", **given: Any) -> "Drawing":
    """Return the way to draw answers: as given, where that is not None; else as the run does, if there is one."""
    from dovetail.rlhf.tasks.subject import Drawing

    own = {} if run is None else run.ppo.sampling.model_dump()
    return Drawing(**{"max_new_tokens": 256} | own | {k: v for k, v in given.items() if v is not None})


def show_run(run: str, *, limit: int) -> None:
    """Compare the models of a run on the rows that it holds out, at most `limit` of each kind, and print the tables."""
    from dovetail.serving.inference.comparison import compare, contestants

    models = contestants([run])
    show(compare(models, [], drawing_of(models.run), limit=limit))


def as_data(models: Mapping[str, str], results: "Sequence[Result]") -> dict[str, Any]:
    """Return the results as JSON holds them."""
    tasks = [{"task": result.task, "rows": result.num_rows, "figures": result.figures} for result in results]
    return {"models": dict(models), "tasks": tasks}


def show(results: "Sequence[Result]") -> None:
    """Print a table for each task."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    for result in results:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        head, *rows = cells(result.figures)
        for number, column in enumerate(head):
            table.add_column(column, justify="right" if number else "left", min_width=0 if number else 18)
        for row in rows:
            table.add_row(*row)
        typer.echo(f"{result.task}, {result.num_rows} rows")
        Console().print(table)


def cells(figures: Mapping[str, Mapping[str, float]]) -> Iterator[list[str]]:
    """Yield the names of the models, then a row for each figure, each number with its error or interval."""
    yield ["", *figures]
    longest_first = sorted(figures.values(), key=len, reverse=True)
    for name in dict.fromkeys(name for own in longest_first for name in own if not name.endswith(ENDS)):
        yield [name.replace("_", " "), *(_cell(own, name) for own in figures.values())]


def _cell(figures: Mapping[str, float], name: str) -> str:
    if name not in figures:
        return "-"
    shown = _number(figures[name])
    if f"{name}_stderr" in figures:
        return f"{shown} ± {_number(figures[f'{name}_stderr'])}"
    if f"{name}_low" in figures:
        return f"{shown} [{figures[f'{name}_low']:.2f}, {figures[f'{name}_high']:.2f}]"
    return shown


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _write(page: Path, results: "Sequence[Result]") -> None:
    parts = []
    for result in results:
        head, *rows = cells(result.figures)
        lines = [head, ["---"] * len(head), *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"## {result.task}, {result.num_rows} rows\n\n{table}\n")
    try:
        page.write_text("# Evaluation\n\n" + "\n".join(parts), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{page} cannot be written: {error}", hint="choose another --page") from error
