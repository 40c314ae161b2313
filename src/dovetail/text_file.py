"""Text files that people write or export: one way to read them.

Responsible for: UTF-8 with or without a byte order mark, and telling other encodings by their bytes.
Not responsible for: what is in the files.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path

UTF_8 = "utf-8-sig"
"""UTF-8, read past the byte order mark that some editors put first."""
_CHINESE = re.compile("[\u4e00-\u9fff]")


def read_text(file: Path) -> str:
    """Return the text of a file in UTF-8, without a byte order mark. Raises OSError or UnicodeDecodeError."""
    return file.read_text(encoding=UTF_8)


def seeming_encoding(content: bytes) -> str | None:
    """Return the encoding that bytes which are no UTF-8 seem to be in, as Python calls it; None if it is unknown."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if b"\0" in content[:1000]:
        return "utf-16-be" if content[:1] == b"\0" else "utf-16-le"
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(content)  # the last character may be cut
    except UnicodeDecodeError:
        return None
    return "gb18030" if _CHINESE.search(text) else None
