"""The demo's own models, after a few steps: `dovetail serve runs/demo` holds a conversation with every client."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from dovetail import ChatModel, Sampling
from dovetail.cli import demo
from dovetail.config.stages import SftConfig
from dovetail.demo import Sizes
from dovetail.demo.run import DemoPlan, run
from dovetail.text.message import Message
from tests.serving.test_concurrency import listening

pytestmark = pytest.mark.system

QUESTIONS = ("hello", "and?")
"""As two_turns.mjs asks them."""
_FEW = {"max_steps": 6, "eval_every": 100}
SCRIPT = "import sys; from dovetail.cli.main import main; main(sys.argv[1:])"


def short(plan: DemoPlan) -> DemoPlan:
    """The same demo, too short to learn much."""
    sizes = Sizes(documents=60, demonstrations=60, reward_prompts=12, ppo_prompts=64, test_prompts=8, dev_prompts=8,
                  held_out_documents=8)  # fmt: skip
    config, base = plan.run.model_dump(), plan.base
    assert base is not None
    for stage in ("sft", "reward", "ppo"):
        config[stage] |= {"max_steps": 2, "eval_every": 100}
    config["ppo"]["critic_warmup_rollouts"] = 0
    config["tracking"]["tensorboard"] = False
    return replace(
        plan,
        run=type(plan.run).model_validate(config),
        sizes=sizes,
        base=SftConfig.model_validate(base.model_dump() | _FEW),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which somebody ran the demo."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "runs").mkdir()
    run(short(demo.plan_of("tiny", 0, str(folder / "runs/demo-tiny-0"))))
    assert demo.point_at(folder / "runs/demo-tiny-0", folder / "runs/demo")
    return folder


@pytest.fixture(scope="module")
def url(runs: Path) -> Iterator[str]:
    """`dovetail serve runs/demo`."""
    command = [sys.executable, "-c", SCRIPT, "serve", "runs/demo", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=runs, stderr=subprocess.PIPE, text=True)
    try:
        yield listening(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def expected(runs: Path) -> list[str]:
    """Both answers, by the model itself."""
    model, turns, answers = ChatModel(str(runs / "runs/demo"), device="cpu"), list[Message](), []
    for question in QUESTIONS:
        turns.append({"role": "user", "content": question})
        answers.append(model.chat(turns, sampling=Sampling(max_new_tokens=12), seed=3))
        turns.append({"role": "assistant", "content": answers[-1]})
    return answers


def body(messages: list[Any]) -> dict[str, Any]:
    return {"model": "ppo", "messages": messages, "seed": 3, "max_tokens": 12, "stream": True}


def test_the_official_client_streams_two_turns(url: str, expected: list[str]) -> None:
    messages: list[Any] = []
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["ppo", "ppo-ema", "sft"]
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            chunks = client.chat.completions.create(**body(messages))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            messages.append({"role": "assistant", "content": text})
    assert [turn["content"] for turn in messages[1::2]] == expected


def test_curl_streams_two_turns(url: str, expected: list[str]) -> None:
    messages: list[Any] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        command = ["curl", "--silent", "--no-buffer", "--fail", f"{url}/v1/chat/completions"]
        header = ["-H", "Content-Type: application/json", "-d", json.dumps(body(messages))]
        done = subprocess.run([*command, *header], capture_output=True, text=True, check=True, timeout=60)
        events = [event.removeprefix("data: ") for event in done.stdout.split("\n\n")]
        assert events[-2:] == ["[DONE]", ""]
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-2]]
        messages.append({"role": "assistant", "content": "".join(d.get("content", "") for d in deltas)})
    assert [turn["content"] for turn in messages[1::2]] == expected


def test_node_streams_two_turns(url: str, expected: list[str]) -> None:
    node = shutil.which("node")
    assert node, "no node: make test-system installs it"
    command = [node, str(Path(__file__).with_name("two_turns.mjs")), url, "ppo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == expected
