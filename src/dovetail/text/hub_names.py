"""Names that mean a local path or a repository on the Hugging Face hub.

Responsible for: saying at once that a path is mistyped, that the hub lacks a name, or that it cannot be reached.
Not responsible for: reading what is there (tokenizer.py, model/load.py, data/hub.py).
"""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from httpx import HTTPError
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from dovetail.errors import DovetailError

PATIENCE_S = 5
"""The number of seconds to wait for the hub's answer."""
_FILES = {"model": "config.json", "dataset": "README.md"}
"""The file to ask for. An error that a repository lacks it is an answer too."""


class _Refusal(NamedTuple):
    reason: str
    hint: str


def expect_available(
    given: str,
    *,
    kind: Literal["model", "dataset"],
    error: type[DovetailError],
    is_path: bool = False,
    revision: str | None = None,
) -> None:
    """Raise `error` unless `given` is a path that exists, or a repository in the cache or on the hub.

    The hub is asked once: its own libraries try again for half a minute where there is no network. is_path: whether
    `given` cannot be a name on the hub.
    """
    place = Path(given).expanduser()
    if place.exists():
        return
    guess = nearest(given)
    if is_path or place.is_absolute() or given.startswith((".", "~")) or given.count("/") > 1:
        above = next(folder for folder in place.absolute().parents if folder.exists())
        what = " does not exist:" if kind == "model" else ":"
        folder = " or folder" if kind == "model" else ""
        raise error(
            f"{given}{what} there is no such file{folder}",
            hint=guess or f"check the path: {above} is there, what follows is not",
        )
    refusal = _why_not_on_hub(given, kind, revision)
    if refusal is not None:
        raise error(
            f"{given} cannot be loaded: there is no such file or folder, and {refusal.reason}",
            hint="; ".join(filter(None, (guess, f"check the name; {refusal.hint}"))),
        )


def nearest(given: str, known: Sequence[str] = ()) -> str | None:
    """Ask whether the path or known name that is nearest to `given` was meant, None if none is near."""
    place = Path(given).expanduser()
    nearby = [str(file) for file in place.parent.glob("*")] if place.parent.is_dir() else []
    close = difflib.get_close_matches(str(place), [*nearby, *known], n=1)
    return f"did you mean {close[0]}?" if close else None


def no_network_hint(name: str, kind: str = "model") -> str:
    """Return the hint that says how to get a model or data set without the hub."""
    download = f"hf download {name}{' --repo-type dataset' if kind == 'dataset' else ''} --local-dir FOLDER"
    return (
        f"give a local folder ({download}, on a machine with network), or set the environment variable HF_ENDPOINT "
        "to a mirror of the hub that can be reached from here"
    )


def _why_not_on_hub(name: str, kind: Literal["model", "dataset"], revision: str | None) -> _Refusal | None:
    """Return the reason why the hub does not give `name`; None if it does."""
    file, login = _FILES[kind], "log in with `hf auth login`"
    try:
        if _is_cached(name, kind, revision):
            return None
        url = hf_hub_url(name, file, repo_type=kind, revision=revision)
        get_hf_file_metadata(url, timeout=PATIENCE_S)
    except EntryNotFoundError:
        return None
    except GatedRepoError:
        return _Refusal(
            "access to it is gated", f"ask for access on {constants.ENDPOINT}/{name}, then {login}"
        )
    except (RepositoryNotFoundError, HFValidationError):
        return _Refusal(f"{constants.ENDPOINT} has none of this name", f"for a private one, {login}")
    except OfflineModeIsEnabled:
        hint = f"unset HF_HUB_OFFLINE, or {no_network_hint(name, kind)}"
        return _Refusal("HF_HUB_OFFLINE is set, and the cache does not hold it", hint)
    except HfHubHTTPError as error:
        reason = str(error).strip().partition("\n")[0]
        return _Refusal(reason, f"check the revision, or {no_network_hint(name, kind)}")
    except (HTTPError, OSError) as error:
        reason = f"{constants.ENDPOINT} cannot be reached ({str(error) or type(error).__name__})"
        return _Refusal(reason, no_network_hint(name, kind))
    return None


def _is_cached(name: str, kind: str, revision: str | None) -> bool:
    if isinstance(try_to_load_from_cache(name, _FILES[kind], repo_type=kind, revision=revision), str):
        return True
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets"))
    return kind == "dataset" and any(prepared.glob(f"{name.partition('/')[0]}___*"))
