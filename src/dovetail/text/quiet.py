"""Silence the bars and reports of Hugging Face's libraries: our own lines say what a user needs to know.

Responsible for: silencing them while something is read or written, and putting everything back, after a failure
too.
Not responsible for: our own output (telemetry/).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging

gguf_reader: Any = modeling_gguf_pytorch_utils
"""The module whose progress bar has no public name."""


@contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars, and log lines below an error; important ones are raised as errors anyway."""
    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_had_bars, gguf_bar = not are_progress_bars_disabled(), gguf_reader.tqdm
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    gguf_reader.tqdm = lambda tensors, **_: tensors  # the only bar without a switch
    try:
        yield
    finally:
        gguf_reader.tqdm = gguf_bar
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
            if not hub_had_bars:
                disable_progress_bars()
