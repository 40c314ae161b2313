"""Set up the labelling pages and the models that answer for them, alone or as a part of `dovetail serve`.

Responsible for: opening the database, the models that sample and score, the links that are printed.
Not responsible for: flags (label.py, serve.py), pages (serving/labelling/), storage (data/labels/).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from dovetail.errors import ConfigError
from dovetail.runs.run_models import model_folder, reward_folder

if TYPE_CHECKING:
    from dovetail.data.labels.database import Store
    from dovetail.serving.app import Section
    from dovetail.serving.labelling.supply import Answerer, Plan, Supply
    from dovetail.serving.served_model import ServedModel

_ADMIN_LINK_SECONDS = 24 * 3600
"""Lifetime of an admin's link. Every start prints one, and a link in an old log must not work forever."""


@contextmanager
def opened(url: str, *, must_exist: bool = False) -> Iterator["Store"]:
    """Open the database at a URL until the block ends."""
    from dovetail.data.labels.database import open_store  # here and not above: help must not wait for it

    store = open_store(url, must_exist=must_exist)
    try:
        yield store
    finally:
        store.close()


def print_links(store: "Store", names: Sequence[str], base: str) -> None:
    """Print a link for each of these annotators, and one for the admin, on standard output."""
    from dovetail.data.labels.annotators import invite

    for name in names:
        typer.echo(f"{name}: {base}/label/#token={invite(store, name)}")
    token = invite(store, "admin", is_admin=True, lasts_seconds=_ADMIN_LINK_SECONDS)
    typer.echo(f"admin: {base}/label/#token={token}")
    typer.echo(
        "Each link lets its owner in, the admin's for a day; Ctrl-C ends the server, and nothing is lost."
    )
    sys.stdout.flush()


@dataclass(frozen=True, slots=True)
class Wanted:
    """The flags about sampling, as they were typed."""

    prompts: str
    uncertain_first: str | None
    device: str


def supply_of(
    store: "Store", project_id: int, wanted: Wanted, plan: "Plan", load: Callable[[], Sequence["Answerer"]]
) -> "Supply":
    """Return the supply that makes tasks from the prompts, with answers of the models that `load` returns."""
    from dovetail.serving.labelling.answerer import reward_scorer
    from dovetail.serving.labelling.prompts import read_prompts
    from dovetail.serving.labelling.supply import Supply

    prompts = read_prompts(wanted.prompts, seed=plan.seed)
    scorer = None
    if wanted.uncertain_first is not None:
        scorer = reward_scorer(reward_folder(wanted.uncertain_first), device=wanted.device)
    return Supply(store, project_id, prompts, load(), plan, scorer)


def loaded_answerers(paths: Sequence[str], device: str) -> list["Answerer"]:
    """Load models for labelling alone."""
    from dovetail.serving.labelling.answerer import load_answerer

    answerers: list[Answerer] = []
    for path in paths:
        found = model_folder(path)
        typer.echo(f"loading {found}", err=True)
        answerers.append(load_answerer(found, device=device))
    return answerers


@dataclass(frozen=True, slots=True)
class LabelTab:
    """The flags of `dovetail serve` about labelling, as they were typed."""

    store: str
    project: str
    prompts: str | None
    models: Sequence[str]
    """Names of one or two served models; if empty, the first one answers."""
    uncertain_first: str | None
    max_new_tokens: int


@contextmanager
def label_section(
    tab: LabelTab, served: Sequence["ServedModel"], base: str, device: str
) -> Iterator["Section"]:
    """Make the pages under /label/, for which the served models answer, and print the admin's link.

    base: the server's URL. device: the device of the reward model that finds uncertain pairs.
    """
    from dovetail.data.labels.tasks import open_project
    from dovetail.engine.sampling import Sampling
    from dovetail.serving.app import Section
    from dovetail.serving.labelling.router import labelling_router
    from dovetail.serving.labelling.supply import Plan

    with opened(tab.store) as store:
        project_id = open_project(store, tab.project)
        options: dict[str, Any] = {}
        beside: Any = nullcontext()
        if tab.prompts is not None:
            wanted = Wanted(tab.prompts, tab.uncertain_first, device)
            plan = Plan(sampling=Sampling(max_new_tokens=tab.max_new_tokens))
            supply = supply_of(store, project_id, wanted, plan, lambda: served_answerers(served, tab.models))
            options["supply"] = supply.state
            beside = supply.running()
        print_links(store, (), base)
        router = labelling_router(store, project_id, **options)
        yield Section("Label", "/label/", router, logins=("/label/api/login",), while_serving=beside)


def served_answerers(served: Sequence["ServedModel"], names: Sequence[str]) -> list["Answerer"]:
    """Return the served models of these names, by default the first; their weights are in memory only once."""
    by_name = {model.name: model for model in served}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ConfigError(
            f"--compare {unknown[0]}: no served model has that name",
            hint=f"there are: {', '.join(by_name)}",
        )
    if len(names) > 2:
        raise ConfigError(
            f"--compare was given {len(names)} times; two models at most are compared",
            hint="give it once or twice",
        )
    return [_answerer(model) for model in [by_name[name] for name in names] or served[:1]]


def _answerer(model: "ServedModel") -> "Answerer":
    from dovetail.serving.labelling.answerer import ModelAnswerer

    return ModelAnswerer(model.path, model.chat, model.thread.complete, lambda: model.thread.max_tokens)
