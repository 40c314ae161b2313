"""A judge behind an endpoint that answers what the test says."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dovetail.rlhf import attempts
from dovetail.rlhf.judge import Judge, Referee
from dovetail.rlhf.reward_functions import function_scorer
from tests.rlhf.test_reward_functions import ROWS, TEXTS, answers


class Endpoint(ThreadingHTTPServer):
    """An endpoint that keeps its requests and answers each with a status and a text."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[dict[str, Any], str | None]] = []
        self.reply: Callable[[str], tuple[int, str]] = lambda text: (200, "7")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((body, self.headers["Authorization"]))
        status, text = self.server.reply(body["messages"][-1]["content"])
        content = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
        self.send_response(status if self.path == "/v1/chat/completions" else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Stay silent."""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(attempts, "PAUSES", (0.0, 0.0))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def judge(endpoint: Endpoint, **more: Any) -> Judge:
    return Judge(url=endpoint.url, model="m", rubric="Be strict.", **more)


def by_length(text: str) -> tuple[int, str]:
    answer = text.split("<response>\n")[1].split("\n</response>")[0]
    return 200, f"Score: {len(answer)}"


def test_the_judge_sees_rubric_conversation_answer_and_the_columns_it_may(endpoint: Endpoint) -> None:
    endpoint.reply = by_length
    scored = function_scorer(judge(endpoint, columns=["answer"]), "judge")(answers())
    assert scored.scores_S.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert len(endpoint.requests) == len(TEXTS)
    for body, authorization in endpoint.requests:
        assert (body["model"], body["temperature"], authorization) == ("m", 0.0, None)
        system, user = (turn["content"] for turn in body["messages"])
        assert system == "Be strict.\n\nReply with one number from 1 to 10, and nothing else."
        place = next(i for i, text in enumerate(TEXTS) if f"<response>\n{text}\n</response>" in user)
        assert f"user: Say {TEXTS[place]}\n" in user
        assert f"<row.answer>\n{ROWS[place]['answer']}\n</row.answer>" in user
        assert "level" not in user


def test_the_key_comes_from_the_environment(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "k")
    judge(endpoint, key_variable="JUDGE_KEY")("a", [])
    assert endpoint.requests[0][1] == "Bearer k"


def test_a_score_that_is_kept_is_not_asked_for_again(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = by_length
    file = tmp_path / "run" / "judge.jsonl"
    for _ in range(2):
        scored = function_scorer(judge(endpoint, cache=str(file)), "judge")(answers())
        assert scored.scores_S.tolist() == [1.0, 2.0, 3.0, 4.0]
        assert len(endpoint.requests) == len(TEXTS)
    with file.open("a", encoding="utf-8") as log:
        log.write('["cut off')
    again = judge(endpoint, cache=str(file))
    assert again("a", [{"role": "user", "content": "Say a"}]) == 1.0
    assert again("eeeee", []) == 5.0
    assert len(endpoint.requests) == len(TEXTS) + 1
    assert len(dict(map(json.loads, file.read_text().splitlines()))) == len(TEXTS) + 1


def test_another_rubric_is_another_score(endpoint: Endpoint, tmp_path: Path) -> None:
    for rubric in ("Be strict.", "Be kind."):
        Judge(url=endpoint.url, model="m", rubric=rubric, cache=str(tmp_path / "j"))("a", [])
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize("nonsense", ["", "good", "11", "0", "7 or 8", "7/10", "NaN", "1e1", "-3"])
def test_a_reply_without_one_score_in_bounds_is_counted(
    endpoint: Endpoint, nonsense: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.reply = lambda text: (200, nonsense if "<response>\nccc\n" in text else "7")
    file = tmp_path / "judge.jsonl"
    scored = function_scorer(judge(endpoint, cache=str(file)), "judge")(answers())
    assert scored.stats == {"reward/judge_failures": 1.0}
    assert f"the judge said {nonsense!r}, which is not a score from 1 to 10" in capsys.readouterr().err
    assert len(file.read_text().splitlines()) == len(TEXTS) - 1


@pytest.mark.parametrize("reply", ["7", " 7.0\n", "Score: 7.", "**7**", "[7]"])
def test_a_score_may_be_dressed(endpoint: Endpoint, reply: str) -> None:
    endpoint.reply = lambda text: (200, reply)
    assert judge(endpoint)("a", []) == 7.0


def test_an_endpoint_that_fails_is_asked_again(endpoint: Endpoint) -> None:
    seen: list[str] = []

    def reply(text: str) -> tuple[int, str]:
        seen.append(text)
        return (503 if seen.count(text) < 3 else 200), "7"

    endpoint.reply = reply
    scored = function_scorer(judge(endpoint), "judge")(answers())
    assert (scored.scores_S.tolist(), len(seen)) == ([7.0] * 4, 12)
    with pytest.raises(ConnectionError, match=f"the judge at {endpoint.url} answers 503"):
        judge(endpoint)("new", [])


@pytest.mark.parametrize(
    ("favourite", "verdict"), [("good", 1.0), ("bad", 0.0), ("neither", 0.5), ("the first", 0.5)]
)
def test_a_referee_reads_two_answers_in_either_order(
    endpoint: Endpoint, favourite: str, verdict: float
) -> None:
    def reply(text: str) -> tuple[int, str]:
        assert "user: Which?\n" in text
        if favourite in ("neither", "the first"):
            return 200, {"neither": "Tie.", "the first": "A"}[favourite]
        return 200, "**A**" if f"<response A>\n{favourite}\n</response A>" in text else "B."

    endpoint.reply = reply
    referee = Referee(url=endpoint.url, model="m")
    assert referee([{"role": "user", "content": "Which?"}], "good", "bad") == verdict
    assert len({body["messages"][-1]["content"] for body, _ in endpoint.requests}) == 2


@pytest.mark.parametrize("nonsense", ["", "A or B", "both", "C", "a"])
def test_a_reply_without_one_verdict_is_none(endpoint: Endpoint, nonsense: str) -> None:
    endpoint.reply = lambda text: (200, nonsense)
    with pytest.raises(ValueError, match="which is none of A, B and tie"):
        Referee(url=endpoint.url, model="m")([], "good", "bad")
