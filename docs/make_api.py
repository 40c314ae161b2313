"""The page of the public Python API, docs/api.md: `python docs/make_api.py` prints it.

Responsible for: names, signatures and docstrings, read from the source files without importing them.
Not responsible for: settings, which have a page of their own (dovetail/config/reference.py).
"""

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import dovetail

PACKAGE = Path(dovetail.__file__).parent
WIDTH = 100
HEAD = """# Python API

The names that programs of your own can rely on, each with the line that imports it. The [examples](../examples) use
them; what each setting means is on the page of
[settings](settings.md). This page is generated from signatures and docstrings by `make docs-api`.
"""
GROUPS = {
    "Stages as functions": (
        *("stages.functions.train_sft", "stages.functions.train_reward", "stages.functions.train_dpo"),
        *("stages.functions.train_ppo", "stages.functions.Trained"),
    ),
    "Train": (
        *("rlhf.api.RLHFEngine", "rlhf.api.PPOTrainer", "data.records.Prompt", "rlhf.build.Setup"),
        *(
            "parallel.sharing.Sharing",
            "parallel.world.World",
            "parallel.world.joined",
            "model.placement.resolve_device",
            "rlhf.algorithms.named.algorithm_named",
            "rlhf.rollout.Collected",
            "rlhf.update.UpdateReport",
            "rlhf.algorithms.named.algorithm_named",
        ),
    ),
    "Batches": ("batches.PackedBatch", "batches.Rollout", "batches.Experience", "training.step.StepReport"),
    "Settings as Python values": (
        *("config.stages.PpoConfig", "config.stages.SamplingConfig", "config.stages.OptimizerConfig"),
        *("config.stages.EnvironmentConfig", "config.policy.PolicyConfig"),
        *("config.model.LoraConfig", "config.sharding.ZeroStageConfig"),
    ),
    "Rewards": (
        *(
            "rlhf.rewards.Answer",
            "rlhf.rewards.RewardFunction",
            "rlhf.judge.Judge",
            "rlhf.verifiers.builtin.number",
        ),
        "rlhf.verifiers.builtin.number",
    ),
    "Environments": (
        *("rlhf.environments.Environment", "rlhf.environments.Turn", "rlhf.environments.Step"),
        *("rlhf.environments.Tools", "text.tools.ToolCall", "rlhf.rewards.Episode"),
    ),
    "Use a trained model": (
        *("serving.inference.chat_model.ChatModel", "serving.inference.chat_model.Reply"),
        "engine.sampling.Sampling",
    ),
    "Evaluate": (
        *("serving.inference.comparison.contestants", "serving.inference.comparison.compare"),
        *("serving.inference.comparison.Contestants", "serving.inference.comparison.Result"),
        *("rlhf.tasks.named.parse_task", "rlhf.tasks.subject.Drawing", "rlhf.judge.Referee"),
        "serving.inference.harness.HarnessModel",
    ),
    "Equations": (
        *("maths.ppo.per_token_rewards", "maths.ppo.gae", "maths.ppo.clipped_policy_loss"),
        *("maths.ppo.clipped_value_loss", "maths.ppo.k1", "maths.ppo.k3"),
    ),
}
"""Heading -> the names below it, by the module in which each is defined."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def api_page() -> str:
    """Return the page: a section for each group, a part for each name."""
    parts = [HEAD]
    for heading, places in GROUPS.items():
        parts.append(f"## {heading}\n")
        for place in places:
            module, _, name = place.rpartition(".")
            parts += described(name, module)
    return "\n".join(parts)


def described(name: str, module: str) -> Iterator[str]:
    """Yield the parts of the page about one name."""
    file = PACKAGE / f"{module.replace('.', '/')}.py"
    body = ast.parse(file.read_text(encoding="utf-8")).body
    index, node = next((i, node) for i, node in enumerate(body) if _defines(node, name))
    yield f"### `{name}`\n"
    yield _code(f"from dovetail{'' if name in dovetail.__all__ else f'.{module}'} import {name}")
    if isinstance(node, Function):
        yield _code(signature(node))
        yield _text(node)
    elif isinstance(node, ast.ClassDef):
        yield from _of_settings(node) if module.startswith("config.") else _of_class(node)
    else:
        yield _code(ast.unparse(node))
        yield f"{_string(body[index + 1])}\n"


def signature(function: Function, *, name: str = "") -> str:
    """Return the call as it is written, without `self`, one parameter a line where it is long."""
    arguments = function.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        arguments.args.pop(0)
    returns = f" -> {ast.unparse(function.returns)}" if function.returns and not name else ""
    called = name or function.name
    line = f"{called}({ast.unparse(arguments)}){returns}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{called}(", *(f"    {part}," for part in _parameters(arguments)), f"){returns}"])


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    without = [None] * (len(arguments.args) - len(arguments.defaults))
    yield from map(_parameter, arguments.args, [*without, *arguments.defaults])
    if arguments.vararg or arguments.kwonlyargs:
        yield f"*{ast.unparse(arguments.vararg) if arguments.vararg else ''}"
    yield from map(_parameter, arguments.kwonlyargs, arguments.kw_defaults)
    if arguments.kwarg:
        yield f"**{ast.unparse(arguments.kwarg)}"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else "")


def _of_class(node: ast.ClassDef) -> Iterator[str]:
    methods = [part for part in node.body if isinstance(part, Function)]
    yield from (_code(signature(method, name=node.name)) for method in methods if method.name == "__init__")
    yield _text(node)
    if fields := list(_fields(node)):
        yield "".join(f"{field}\n" for field in fields)
    for method in methods:
        if not method.name.startswith("_") and ast.get_docstring(method):
            yield f"#### `{node.name}.{method.name}`\n"
            yield _code(_property(method) or signature(method))
            yield _text(method)


def _of_settings(node: ast.ClassDef) -> Iterator[str]:
    yield _text(node)
    yield "Its fields are the [settings](settings.md) of the same names.\n"


def _property(method: Function) -> str:
    if "property" in map(ast.unparse, method.decorator_list) and method.returns:
        return f"{method.name}: {ast.unparse(method.returns)}"
    return ""


def _fields(node: ast.ClassDef) -> Iterator[str]:
    for part, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(part, ast.AnnAssign) and not ast.unparse(part.target).startswith("_"):
            meaning = " ".join(_string(after).split())
            yield f"- `{ast.unparse(part)}`{f': {meaning}' if meaning else ''}"


def _string(node: ast.stmt | None) -> str:
    if (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ):
        return inspect.cleandoc(node.value.value)
    return ""


def _defines(node: ast.stmt, name: str) -> bool:
    if isinstance(node, Function | ast.ClassDef):
        return node.name == name
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name


def _text(node: Function | ast.ClassDef) -> str:
    return f"{ast.get_docstring(node) or ''}\n"


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n"


if __name__ == "__main__":
    sys.stdout.write(api_page())
