"""A hook of the documentation's site: what GitHub shows and the site's Markdown does not know is written another way.

Responsible for: pages that show the source files to which guides link, links to what else lies outside docs/ (the site
does not have it), and file names of code blocks.
Not responsible for: broken links, which mkdocs itself refuses.
"""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.resolve()
ROOT = DOCS.parent
SOURCES = "source/"
LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]*)[^)]*\)")
NAMED_BLOCK = re.compile(r"^```(\w+) ([\w./-]+)$", re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml"}
FENCE = "`" * 10  # longer than any in a source file


def on_files(files: Any, *, config: Any) -> Any:
    """Add a page for each source file to which a guide links; the navigation leaves it out."""
    from mkdocs.structure.files import File, InclusionLevel

    for path in linked_sources():
        uri, text = f"{SOURCES}{path}.md", source_page(path)
        files.append(File.generated(config, uri, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_others: Any) -> str:
    """Lead links out of docs/ to the page of the file, or leave their text; title a code block by its file's name."""
    uri = page.file.src_uri
    if uri.startswith(SOURCES):
        return markdown
    titled = NAMED_BLOCK.sub(r'```\1 title="\2"', markdown)
    return LINK.sub(lambda link: _within_the_site(link, uri), titled)


def linked_sources() -> list[str]:
    """Return the source files to which guides link, by their paths from the project's root."""
    linked = set()
    for page in DOCS.rglob("*.md"):
        for link in LINK.finditer(page.read_text(encoding="utf-8")):
            target = (page.parent / link[2]).resolve()
            if _is_source(target):
                linked.add(target.relative_to(ROOT).as_posix())
    return sorted(linked)


def source_page(path: str) -> str:
    """Return the page that shows one source file; the search leaves it out."""
    text = (ROOT / path).read_text(encoding="utf-8")
    language = LANGUAGES[Path(path).suffix]
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n{FENCE}{language}\n{text}{FENCE}\n"


def _is_source(target: Path) -> bool:
    return target.is_relative_to(ROOT) and target.suffix in LANGUAGES and target.is_file()


def _within_the_site(link: re.Match[str], uri: str) -> str:
    target = (DOCS / uri).parent.joinpath(link[2]).resolve()
    if target.is_relative_to(DOCS):
        return link[0]
    if not _is_source(target):
        return link[1]
    up = "../" * uri.count("/")
    return f"[{link[1]}]({up}{SOURCES}{target.relative_to(ROOT).as_posix()}.md)"
