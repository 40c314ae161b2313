"""A hook of the documentation's site: what GitHub shows and the site's Markdown does not know is written another way.

Responsible for: links to files outside docs/, which the site does not have, and file names of code blocks.
Not responsible for: broken links, which mkdocs itself refuses.
"""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.resolve()
LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]*)[^)]*\)")
NAMED_BLOCK = re.compile(r"^```(\w+) ([\w./-]+)$", re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Any, **_others: Any) -> str:
    """Replace links out of docs/ by their text, and make the file name of a code block its title."""
    folder = (DOCS / page.file.src_uri).parent
    titled = NAMED_BLOCK.sub(r'```\1 title="\2"', markdown)
    return LINK.sub(lambda link: _without_link(link, folder), titled)


def _without_link(link: re.Match[str], folder: Path) -> str:
    stays = (folder / link[2]).resolve().is_relative_to(DOCS)
    return link[0] if stays else link[1]
