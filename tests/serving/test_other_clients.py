"""Clients that are not Python."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.serving.live import live
from tests.serving.test_chat_completions import drawn


def two_turns() -> list[str]:
    """What the engine says to `hello` and then to `and?`."""
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    first = drawn(messages, seed=3)[0]
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "and?"}]
    return [first, drawn(messages, seed=3)[0]]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_streams_a_conversation_of_two_turns() -> None:
    messages: list[Any] = []
    with live() as server:
        for question in ("hello", "and?"):
            messages.append({"role": "user", "content": question})
            body = {"model": "tiny", "messages": messages, "seed": 3, "max_tokens": 12, "stream": True}
            command = ["curl", "--silent", "--no-buffer", "--fail", f"{server.url}/v1/chat/completions"]
            header = ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
            events = subprocess.run(
                [*command, *header], capture_output=True, text=True, check=True, timeout=60
            ).stdout.split("\n\n")
            assert events[-2:] == ["data: [DONE]", ""]
            deltas = [json.loads(event[len("data: ") :])["choices"][0]["delta"] for event in events[:-2]]
            messages.append({"role": "assistant", "content": "".join(d.get("content", "") for d in deltas)})
    assert [turn["content"] for turn in messages[1::2]] == two_turns()


@pytest.mark.system
def test_node_streams_a_conversation_of_two_turns() -> None:
    node = shutil.which("node")
    assert node, "no node: make test-system installs it"
    script = Path(__file__).with_name("two_turns.mjs")
    with live() as server:
        done = subprocess.run(
            [node, str(script), server.url, "tiny"], capture_output=True, text=True, timeout=60, check=True
        )
    assert json.loads(done.stdout) == two_turns()
