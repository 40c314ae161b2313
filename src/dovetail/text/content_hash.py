"""Hash content, so that equal content has one name.

Responsible for: a hash of messages and texts that is the same in every process. Not responsible for: what is hashed.
"""

import hashlib
import json


def content_hash(*parts: object) -> str:
    """Return a hash of the parts' content, 128 bits in hex. Sources, line numbers and column names do not enter."""
    canonical = json.dumps(parts, ensure_ascii=True, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]
