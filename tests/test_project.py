"""Promises about the project as a whole: small files, no stubs, and text that stays true."""

import ast
import re
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import dovetail
from dovetail.cli.main import app
from dovetail.cli.train import train
from dovetail.config.load import check
from dovetail.config.recipes import FOLDER, recipe_names
from dovetail.config.yaml_source import read_yaml
from tests.mutants import Mutant, read_table

ROOT = Path(__file__).parent.parent
SOURCES = [*sorted((ROOT / "src").rglob("*.py")), ROOT / "train.py"]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
GUIDES = [*READMES, *sorted((ROOT / "docs").rglob("*.md"))]
MOST_LINES = {"file": 400, "function": 60, "class": 200}
LONGER_FOR_A_REASON = {
    "src/dovetail/engine/forward.py": "modules, prefill and decode: one call, one cache, one attention",
    "src/dovetail/training/optim.py": "the optimiser and its average share one state",
    "src/dovetail/training/step.py": "the one gradient step, whole: seed, rate, micro-batches, clipping, retries",
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def warn_of_length(lengths: dict[str, int], kind: str) -> None:
    """Name what is longer than most readers like; a limit serves readers and refuses nothing."""
    if long := {where: length for where, length in lengths.items() if length > MOST_LINES[kind]}:
        warnings.warn(f"longer than {MOST_LINES[kind]} lines, without a reason given: {long}", stacklevel=2)


@pytest.mark.filterwarnings("default")
def test_files_longer_than_a_reader_likes_are_named() -> None:
    lengths = {name(file): len(file.read_text(encoding="utf-8").splitlines()) for file in [*SOURCES, *TESTS]}
    assert all(lengths[file] > MOST_LINES["file"] for file in LONGER_FOR_A_REASON), (
        "a reason that is not needed"
    )
    warn_of_length({file: n for file, n in lengths.items() if file not in LONGER_FOR_A_REASON}, "file")


@pytest.mark.filterwarnings("default")
def test_functions_and_classes_longer_than_a_reader_likes_are_named() -> None:
    for kind, types in {
        "function": ast.FunctionDef | ast.AsyncFunctionDef,
        "class": ast.ClassDef,
    }.items():
        lengths = {
            f"{name(file)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
            for file in SOURCES
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, types)
        }
        assert lengths
        warn_of_length(lengths, kind)


def test_every_module_says_what_it_is_for() -> None:
    texts = {name(file): file.read_text(encoding="utf-8") for file in SOURCES}
    assert [
        file for file, text in texts.items() if text.strip() and not ast.get_docstring(ast.parse(text))
    ] == []


def test_nothing_is_promised_and_not_there() -> None:
    promise = re.compile(r"NotImplementedError|\b(TODO|FIXME|XXX)\b|^\s*pass\s*$", re.MULTILINE)
    assert [name(file) for file in SOURCES if promise.search(file.read_text(encoding="utf-8"))] == []


def test_no_module_is_named_after_nothing() -> None:
    vague = {"utils", "helpers", "common", "misc", "base", "manager"}
    assert not [name(file) for file in SOURCES if file.stem in vague]


def test_the_changelog_s_top_version_is_the_package_s() -> None:
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == dovetail.__version__


def test_the_recipes_folder_shows_what_the_package_ships() -> None:
    assert sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")) == sorted(recipe_names())


def test_recipes_name_registered_data() -> None:
    registry = yaml.safe_load((ROOT / "src/dovetail/data/registry.yaml").read_text(encoding="utf-8"))
    for recipe in FOLDER.glob("*.yaml"):
        blend = yaml.safe_load(recipe.read_text(encoding="utf-8"))["data"]["blend"]
        assert set(blend) <= set(registry), recipe.name


def test_torch_is_pinned_once_and_within_the_package_s_range() -> None:
    pins = (ROOT / "requirements/runtime.txt").read_text(encoding="utf-8")
    assert re.findall(r"^torch==(.+)$", pins, re.MULTILINE) == ["2.13.0"]
    for file in (ROOT / "requirements").glob("*.txt"):
        for line in file.read_text(encoding="utf-8").splitlines():
            assert re.match(r"#|-r |[A-Za-z0-9_.-]+==[0-9][^ ]*( ; python_version .*)?$", line), line


def blocks(file: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def yaml_blocks() -> Iterator[tuple[str, str]]:
    for file in GUIDES:
        for index, block in enumerate(blocks(file, "yaml")):
            yield f"{name(file)} block {index + 1}", block


@pytest.mark.parametrize(("where", "block"), list(yaml_blocks()))
def test_every_recipe_in_the_guides_loads(where: str, block: str) -> None:
    assert check(read_yaml(block, where).values).actor.path


def commands() -> Iterator[str]:
    for file in GUIDES:
        for block in blocks(file, "bash"):
            yield from (line.split("#")[0].strip() for line in block.splitlines() if not line.startswith("#"))


@pytest.mark.parametrize("command", sorted({command for command in commands() if command}))
def test_every_command_in_the_guides_exists(command: str) -> None:
    program, *arguments = command.split()
    match program:
        case "make":
            targets = re.findall(
                r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
            )
            assert arguments[0] in targets
        case "dovetail":
            known = {c.name for c in app.registered_commands} | {g.name for g in app.registered_groups}
            assert arguments[0] in known | {"--install-completion", "--help"}
        case "python":
            assert (ROOT / arguments[0]).is_file()
            flags = {f"--{parameter.replace('_', '-')}" for parameter in train.__annotations__}
            assert {argument for argument in arguments if argument.startswith("--")} <= flags
        case _:
            assert program in {"pip", "git", "cd", "source"}


@pytest.mark.parametrize("file", GUIDES, ids=name)
def test_links_in_the_guides_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", file.read_text(encoding="utf-8")):
        assert (file.parent / target).exists(), target


def test_the_tour_of_a_step_names_functions_where_they_are() -> None:
    tour = ROOT / "docs/a-ppo-step.md"
    named = re.findall(r"\[`(\w+)`\]\(([^)]+\.py)\)", tour.read_text(encoding="utf-8"))
    assert named
    for function, file in named:
        defined = re.compile(rf"^ *(def|class) {function}\b", re.MULTILINE)
        assert defined.search((tour.parent / file).read_text(encoding="utf-8")), f"{file} has no {function}"


def test_the_index_lists_every_page_and_every_example() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    pages = [path.name for path in (ROOT / "docs").glob("*.md") if path.name != "index.md"]
    examples = [f"../examples/{path.name}" for path in (ROOT / "examples").iterdir() if path.is_file()]
    assert [link for link in [*pages, *examples] if f"]({link})" not in index] == []


def test_both_readmes_show_the_same_commands() -> None:
    english, chinese = (
        [line for block in blocks(file, "bash") for line in block.splitlines()] for file in READMES
    )
    strip = re.compile(r"\s*#.*")
    assert [strip.sub("", line) for line in english] == [strip.sub("", line) for line in chinese]


def test_the_makefile_does_what_its_head_says() -> None:
    done = subprocess.run(
        ["make", "-n", "demo", "PROCS=2"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "dovetail demo --model tiny --seed 0 --num-gpus 2" in done.stdout


def test_the_site_s_build_counts_warnings() -> None:
    done = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True, check=True)
    (build,) = re.findall(r"mkdocs build .*", done.stdout)
    assert "--strict" in build
    assert "--quiet" not in build  # which would drop warnings before they are counted


def test_mutations_have_names_of_their_own() -> None:
    names = [mutant.name for mutant in read_table()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("mutant", read_table(), ids=lambda mutant: mutant.name)
def test_every_mutation_still_applies_and_names_tests_that_exist(mutant: Mutant) -> None:
    ast.parse(mutant.text())
    assert mutant.tests
    for test in mutant.tests:
        file, _, function = test.partition("::")
        assert f"def {function}" in (ROOT / file).read_text(encoding="utf-8")
