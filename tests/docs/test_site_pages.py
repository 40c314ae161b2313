"""The site shows what GitHub shows, with the links that it can follow."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


def site_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs/site_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(markdown: str, page: str) -> str:
    text: str = site_pages().on_page_markdown(
        markdown, page=SimpleNamespace(file=SimpleNamespace(src_uri=page))
    )
    return text


@pytest.mark.parametrize(
    ("page", "markdown", "expected"),
    [
        (
            "index.md",
            "see [the code](../src/dovetail/batches.py).",
            "see [the code](source/src/dovetail/batches.py.md).",
        ),
        ("index.md", "[a](data.md) [b](../README.md#licence)", "[a](data.md) b"),
        ("decisions/0001.md", "[data](../data.md#x) [code](../../src)", "[data](../data.md#x) code"),
        ("decisions/0001.md", "[c](../../train.py#L1)", "[c](../source/train.py.md)"),
        ("data.md", "[gone](../src/gone.py)", "gone"),
        ("source/train.py.md", "[c](../../train.py)", "[c](../../train.py)"),
        ("data.md", "```python my_file.py\nx = 1\n```", '```python title="my_file.py"\nx = 1\n```'),
        ("data.md", "```python\nx = 1\n```", "```python\nx = 1\n```"),
    ],
)
def test_links_out_of_the_site_and_named_blocks(page: str, markdown: str, expected: str) -> None:
    assert shown(markdown, page) == expected


def test_the_navigation_has_every_page_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    navigation = text.partition("\nnav:\n")[2]
    listed = [line.split()[-1] for line in navigation.splitlines() if line.endswith(".md")]
    records = (ROOT / "docs/decisions/README.md").read_text(encoding="utf-8")
    listed += [f"decisions/{name}" for name in re.findall(r"\]\((\d{4}-.+?\.md)\)", records)]
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages)


def test_every_source_file_that_the_tour_names_has_a_page_of_its_text() -> None:
    module = site_pages()
    linked = module.linked_sources()
    assert {"src/dovetail/maths/ppo.py", "examples/own_reward.py", "examples/own_data.yaml"} <= set(linked)
    for path in linked:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert module.FENCE not in text
        assert text in module.source_page(path)
