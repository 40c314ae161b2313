"""Show a run, or several beside each other, on one page: RUN/report.html.

Responsible for: reading what a run has left, which charts and tables that makes, and keeping the page of a long run
up to date. Not responsible for: the page as a browser shows it (telemetry/report_page.py), the warnings (guard.py).
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from dovetail.config.load import load
from dovetail.config.recipes import recipe_for
from dovetail.errors import CheckpointError, DovetailError
from dovetail.runs.disk import write_atomically
from dovetail.runs.run_folder import RunFolder
from dovetail.telemetry.log import warn
from dovetail.telemetry.progress import WINDOW, format_seconds
from dovetail.telemetry.report_page import COLOURS, Chart, Curve, Page, Sample, Section, Table, html_of

EVERY = 60.0
"""Seconds between two versions of the page of a run that is going on; a shorter run leaves none."""
MOST_WARNINGS = 30
"""Warnings on the page, the newest ones."""
LONGEST_VALUE = 300
"""Characters of a setting, such as a list of sources, that are shown."""
MOST_SAMPLES = 32
"""Prompts whose answers are shown."""
STAGES = {
    "sft": "Stage 1: supervised fine-tuning",
    "reward": "Stage 2: reward model",
    "dpo": "Stage 2: direct preference optimisation",
    "ppo": "Stage 3: learning from rewards",
}


@dataclass(frozen=True, slots=True)
class _Spec:
    """A chart of metrics over the steps of a stage."""

    stage: str
    title: str
    unit: str
    note: str
    metrics: tuple[tuple[str, str], ...]
    """The metrics, and what each is called in the legend."""
    spread: str | None = None
    """The metric that is half the height of the band around the first."""


_HELD = "held out"
SPECS = (
    _Spec("sft", "Loss", "nats per token", "Falls, then flattens. Held out rises again where the model over-fits.",
          (("sft/loss", "training"), ("sft/held_out_loss", _HELD))),
    _Spec("sft", "Gradient norm", "", "Jumps point to odd rows or too high a learning rate.",
          (("sft/grad_norm", "norm"),)),
    _Spec("reward", "Loss", "nats per pair", "0.69 is guessing.",
          (("reward/loss", "training"), ("reward/held_out_loss", _HELD))),
    _Spec("reward", "Accuracy", "share of pairs", "How often the model prefers what people preferred; 0.5 is guessing.",
          (("reward/accuracy", _HELD),)),
    _Spec("reward", "Length bias", "correlation",
          "Scores and lengths of answers to one prompt. Near 1 the model has learnt that longer is better.",
          (("reward/score_length_correlation", "with length"),)),
    _Spec("dpo", "Loss", "nats per pair", "0.69 is the start of DPO.",
          (("dpo/loss", "training"), ("dpo/held_out_loss", _HELD))),
    _Spec("dpo", "Accuracy", "share of pairs", "How often the better answer gained more than the worse one.",
          (("dpo/accuracy", _HELD),)),
    _Spec("ppo", "Reward", "score", "The mean of a rollout, in a band of one standard deviation.",
          (("ppo/score_mean", "training"), ("ppo/held_out_reward", _HELD)), "ppo/score_std"),
    _Spec("ppo", "Distance from the start", "nats per answer", "KL to the reference. A run-away shows here first.",
          (("ppo/kl_nats_per_answer", "training"), ("ppo/held_out_kl_nats_per_answer", _HELD))),
    _Spec("ppo", "Length", "tokens per answer", "A steady drift means that the reward pays for length, or for brevity.",
          (("ppo/answer_tokens", "training"), ("ppo/held_out_answer_tokens", _HELD))),
    _Spec("ppo", "Entropy", "nats per token", "What is left to explore. Near 0 the actor has one answer.",
          (("ppo/entropy_nats_per_token", "training"), ("ppo/held_out_entropy_nats_per_token", _HELD))),
    _Spec("ppo", "Answers", "share", "Distinct, cut off at the limit, and prompts whose answers score alike.",
          (("ppo/distinct_fraction", "distinct"), ("ppo/cut_off_fraction", "cut off"),
           ("ppo/equal_groups_fraction", "prompts without signal"))),
    _Spec("ppo", "Critic", "explained variance", "1 is perfect, 0 is no better than the mean.",
          (("ppo/explained_variance", "explained"),)),
    _Spec("ppo", "Losses", "", "They need not fall: each rollout is a new problem.",
          (("ppo/actor_loss", "actor"), ("ppo/critic_loss", "critic"), ("ppo/ptx_loss", "pretraining text"))),
    _Spec("ppo", "Size of the update", "share of tokens", "Above a third, most of a rollout is learnt no further.",
          (("ppo/clipped_fraction", "clipped"),)),
    _Spec("ppo", "Generator and trainer", "nats per token", "How far they disagree about the same answers.",
          (("rollout/mismatch_kl_nats_per_token", "mismatch"),)),
    _Spec("ppo", "Text without a prompt", "nats per token", "What the actor forgets of plain text.",
          (("ppo/held_out_text_loss", _HELD),)),
)  # fmt: skip
"""The charts, in the order of the page; one for which a run has no numbers is left out."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The records that a run has left so far."""

    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    """The metrics of each stage, a row for each step."""
    warnings: Sequence[str]
    answers: Mapping[int, Mapping[str, tuple[str, float]]]
    """The answers to held-out prompts and their scores, by step and prompt."""
    done: Sequence[str]
    """The stages that have finished."""

    def curve(self, stage: str, metric: str) -> tuple[list[float], list[float | None]]:
        """Return the steps at which a metric was measured, and its values."""
        rows = [row for row in self.rows.get(stage, ()) if metric in row]
        return [row["step"] for row in rows], [row[metric] for row in rows]


def read_run(path: Path) -> RunRecord:
    """Read a run folder; raises CheckpointError if it is none, or a file of it is damaged."""
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise CheckpointError(
            f"{path} is not the folder of a run: it has no config.yaml",
            hint="give the output_dir of a training run",
        )
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in _lines(folder.metrics):
        if (stage := _stage_of(row)) is not None:
            rows.setdefault(stage, []).append(row)
    answers: dict[int, dict[str, tuple[str, float]]] = {}
    for row in _lines(folder.held_out):
        prompt = "\n\n".join(message["content"] for message in row["messages"])
        answers.setdefault(row["step"], {})[prompt] = (row["answer"], row["score"])
    return RunRecord(
        name=path.resolve().name,
        config=yaml.safe_load(folder.config.read_text(encoding="utf-8")),
        summary=folder.read_summary(),
        rows=rows,
        warnings=[row["text"] for row in _lines(folder.warnings)],
        answers=answers,
        done=[stage for stage in STAGES if folder.is_done(stage)],
    )


def _stage_of(row: Mapping[str, Any]) -> str | None:
    """Return the stage that wrote a row: PPO's has the rewards by function beside its own metrics."""
    found = {name.partition("/")[0] for name in row}
    return next((stage for stage in reversed(STAGES) if stage in found), None)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON-lines file, which may be missing; a last line that is being written is left out."""
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            return
        try:
            yield json.loads(line)
        except ValueError as error:
            raise CheckpointError(
                f"{path}, line {number}: not JSON ({error})",
                hint="delete this line; the run itself does not need it",
            ) from error


def page_of(runs: Sequence[RunRecord], *, now: float) -> Page:
    """Return the page of one run, or of several compared. now: seconds since 1970."""
    written = f"Written {datetime.fromtimestamp(now):%Y-%m-%d %H:%M}."
    state = [line for run in runs for line in _state(run, is_alone=len(runs) == 1)]
    steps, samples = _samples(runs[0]) if len(runs) == 1 else ((0, 0), [])
    return Page(
        title=" and ".join(run.name for run in runs),
        state=[*state, written],
        warnings=_warnings(runs),
        sections=[section for stage, title in STAGES.items() if (section := _section(runs, stage, title))],
        tables=[table for table in (_results(runs), _settings(runs)) if table.rows],
        samples=samples,
        sample_steps=steps,
    )


def _state(run: RunRecord, *, is_alone: bool) -> Iterator[str]:
    """Yield where a run stands and when it will end."""
    head = "" if is_alone else f"{run.name}: "
    took = run.summary.get("seconds", {})
    finished = [f"{stage} in {format_seconds(took[stage])}" if stage in took else stage for stage in run.done]
    if finished:
        yield f"{head}Finished: {', '.join(finished)}."
    for stage in run.config.get("stages", STAGES):
        if stage in run.done or stage not in run.rows:
            continue
        rows = run.rows[stage]
        done, total = rows[-1]["step"], run.summary.get("planned_steps", {}).get(stage)
        recent = [row for row in rows if row["step"] > 0][-WINDOW - 1 :]
        line = f"{head}{STAGES[stage]}: step {done}" + (f" of {total}" if total else "")
        if total and len(recent) > 1 and done > recent[0]["step"]:
            each = (recent[-1]["time"] - recent[0]["time"]) / (done - recent[0]["step"])
            line += f", about {format_seconds(each * (total - done))} left from its last row on"
        yield f"{line}; last row written {datetime.fromtimestamp(rows[-1]['time']):%Y-%m-%d %H:%M}."


def _warnings(runs: Sequence[RunRecord]) -> list[str]:
    """Return the newest warnings, the newest first; those that differ in their figures alone count as one."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for text in reversed(run.warnings):
            named = text if len(runs) == 1 else f"{run.name}: {text}"
            found.setdefault(re.sub(r"\d+(\.\d+)?", "#", named), []).append(named)
    lines = [
        texts[0] if len(texts) == 1 else f"{texts[0]} (given {len(texts)} times, first: {_short(texts[-1])})"
        for texts in found.values()
    ]
    return lines[:MOST_WARNINGS]


def _short(text: str) -> str:
    """Return the beginning of a warning, up to its first figures."""
    return text.partition(";")[0]


def _section(runs: Sequence[RunRecord], stage: str, title: str) -> Section | None:
    """Return the charts of one stage; None where no run has reached it."""
    charts = [chart for spec in SPECS if spec.stage == stage and (chart := _chart(runs, spec))]
    if stage == "ppo":
        charts += [chart for chart in (_rewards(runs), _reward_against_kl(runs), _speed(runs)) if chart]
    if len(runs) == 1:
        charts += [chart for chart in (_times(runs[0], stage),) if chart]
    return Section(title, charts) if charts else None


def _chart(runs: Sequence[RunRecord], spec: _Spec) -> Chart | None:
    curves = []
    for number, run in enumerate(runs):
        for place, (metric, label) in enumerate(spec.metrics):
            x, y = run.curve(spec.stage, metric)
            if not x:
                continue
            spread = run.curve(spec.stage, spec.spread)[1] if spec.spread and place == 0 else None
            curves.append(
                Curve(
                    label if len(runs) == 1 else f"{run.name}, {label}",
                    x,
                    y,
                    spread=spread if spread and len(spread) == len(y) and len(runs) == 1 else None,
                    is_marked=len(x) < WINDOW,
                    colour=None if len(runs) == 1 else COLOURS[number % len(COLOURS)],
                    is_dotted=len(runs) > 1 and place > 0,
                )
            )
    x_title = "rollout" if spec.stage == "ppo" else "optimiser step"
    return Chart(spec.title, spec.note, curves, x_title, spec.unit) if curves else None


def _rewards(runs: Sequence[RunRecord]) -> Chart | None:
    """Return the mean of each reward function, where there are several."""
    names = {name for run in runs for row in run.rows.get("ppo", ()) for name in row}
    metrics = sorted(name for name in names if name.startswith("reward/") and name.endswith("_mean"))
    labels = tuple((name, name.removeprefix("reward/").removesuffix("_mean")) for name in metrics)
    note = "The mean of each, before its weight."
    return (
        _chart(runs, _Spec("ppo", "Rewards by function", "score", note, labels)) if len(labels) > 1 else None
    )


def _reward_against_kl(runs: Sequence[RunRecord]) -> Chart | None:
    """Return what the reward costs in KL: the frontier on which runs can be compared (Gao et al. 2023)."""
    curves = []
    for run in runs:
        for prefix, label in (("ppo/held_out_", _HELD), ("ppo/", "training")):
            reward = "ppo/held_out_reward" if label == _HELD else "ppo/score_mean"
            rows = [
                row
                for row in run.rows.get("ppo", ())
                if reward in row and f"{prefix}kl_nats_per_answer" in row
            ]
            if rows:
                name = label if len(runs) == 1 else f"{run.name}, {label}"
                x = [row[f"{prefix}kl_nats_per_answer"] for row in rows]
                curves.append(Curve(name, x, [row[reward] for row in rows], is_marked=True))
                break
    note = "What each nat of distance has bought. Where the line turns down, the reward is cheated."
    return Chart("Reward against distance", note, curves, "KL, nats per answer", "score") if curves else None


def _speed(runs: Sequence[RunRecord]) -> Chart | None:
    """Return the answer tokens of a second, all phases of a rollout and its update together."""
    curves = []
    for run in runs:
        size = run.config.get("ppo", {}).get("batch_size")
        points = [
            (row["step"], size * row["ppo/answer_tokens"] / seconds)
            for row in run.rows.get("ppo", ())
            if size and row.get("ppo/answer_tokens") and (seconds := sum(_seconds(row, "ppo").values())) > 0
        ]
        if points:
            curves.append(Curve(run.name, [x for x, _ in points], [y for _, y in points]))
    note = "Answer tokens a second: generated, scored and learnt from."
    return Chart("Throughput", note, curves, "rollout", "tokens per second") if curves else None


def _times(run: RunRecord, stage: str) -> Chart | None:
    """Return the seconds of each phase of a step, stacked."""
    rows = [row for row in run.rows.get(stage, ()) if _seconds(row, stage)]
    names = sorted({name for row in rows for name in _seconds(row, stage)})
    curves = [
        Curve(name, [row["step"] for row in rows], [_seconds(row, stage).get(name, 0.0) for row in rows])
        for name in names
    ]
    note = "Seconds of each phase of a step."
    return Chart("Where the time goes", note, curves, "step", "seconds", is_stacked=True) if curves else None


def _seconds(row: Mapping[str, Any], stage: str) -> dict[str, float]:
    """Return the phases that were timed in a row; gathering weights is part of collecting."""
    prefix, suffix = f"{stage}/", "_seconds"
    return {
        name.removeprefix(prefix).removesuffix(suffix): value
        for name, value in row.items()
        if name.startswith(prefix) and name.endswith(suffix) and name != "ppo/gather_seconds"
    }


def _samples(run: RunRecord) -> tuple[tuple[int, int], list[Sample]]:
    """Return the steps of the first and the last evaluation, and the answers to the prompts of both."""
    if len(run.answers) < 2:
        return (0, 0), []
    first, last = min(run.answers), max(run.answers)
    before, after = run.answers[first], run.answers[last]
    both = [prompt for prompt in before if prompt in after][:MOST_SAMPLES]
    return (first, last), [Sample(prompt, *before[prompt], *after[prompt]) for prompt in both]


def _results(runs: Sequence[RunRecord]) -> Table:
    """Return the results of finished stages."""
    rows: dict[str, list[str]] = {}
    for number, run in enumerate(runs):
        for stage in STAGES:
            for name, value in run.summary.get(stage, {}).items():
                row = rows.setdefault(f"{stage}: {name.replace('_', ' ')}", [""] * len(runs))
                row[number] = f"{value:.4g}" if isinstance(value, int | float) else str(value)
    head = ["Result", *(run.name for run in runs)]
    return Table("Results", "", head, [[name, *values] for name, values in rows.items()])


def _settings(runs: Sequence[RunRecord]) -> Table:
    """Return the settings that differ: from the recipe of the model, or between the runs."""
    flat = [_flat(run.config) for run in runs]
    if len(runs) > 1:
        names = [
            name
            for name in dict.fromkeys(n for one in flat for n in one)
            if len({one.get(name) for one in flat}) > 1
        ]
        rows = [[name, *(_cut(one.get(name, "")) for one in flat)] for name in names if name != "output_dir"]
        return Table("Settings that differ", "", ["Setting", *(run.name for run in runs)], rows)
    recipe = recipe_for(str(runs[0].config["actor"]["path"])).recipe
    theirs = _flat(load(recipe, []).model_dump(mode="json"))
    rows = [
        [name, _cut(value), _cut(theirs.get(name, ""))]
        for name, value in flat[0].items()
        if value != theirs.get(name)
    ]
    return Table(
        "Settings that differ from the recipe", "", ["Setting", "This run", f"Recipe {recipe}"], rows
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings by their dotted names, each as text."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = json.dumps(_without_nulls(value), ensure_ascii=False, sort_keys=True)
    return found


def _cut(text: str) -> str:
    """Return as much of a setting's value as a table has room for."""
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


def _without_nulls(value: Any) -> Any:
    """Return the items of a list, such as the sources of data, with the settings that they have."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, Mapping):
        return {name: inner for name, inner in value.items() if inner is not None}
    return value


def write_report(paths: Sequence[Path], to: Path, *, clock: Callable[[], float] = time.time) -> None:
    """Write the page of one run, or of several compared."""
    runs = [read_run(path) for path in paths]
    write_atomically(to, html_of(page_of(runs, now=clock())))


class LiveReport:
    """The page of a run that is going on, written anew at most once a minute. It is a sink of metrics."""

    def __init__(self, folder: RunFolder, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._written = clock()
        self._is_broken = False

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Take one row: the page is due when a minute has passed since the last one."""
        if self._clock() - self._written >= EVERY:
            self._write()

    def close(self) -> None:
        """Bring the page to the end of a stage, if the run has one."""
        if self._folder.report.exists():
            self._write()

    def _write(self) -> None:
        """Write the page; a run does not end because its page cannot be written."""
        if self._is_broken:
            return
        try:
            write_report([self._folder.path], self._folder.report)
        except (DovetailError, OSError, ValueError, KeyError, TypeError) as error:
            self._is_broken = True
            warn(f"{self._folder.report} cannot be written: {error}", hint="`dovetail report` makes it later")
        self._written = self._clock()
