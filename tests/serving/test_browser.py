"""The chat page in a real Chromium, which talks to loopback and to nobody else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from dovetail.engine.scheduler import Load
from dovetail.serving.keys import ApiKeys, hash_of
from dovetail.serving.served_model import EngineSettings
from tests.serving.live import Live, live, tiny_served, until
from tests.serving.test_chat_completions import drawn
from tests.serving.test_label_tab import with_tab

pytestmark = pytest.mark.system
SETTINGS = EngineSettings(device="cpu", max_running=8, cache_tokens=4096)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "no chromium: make test-system installs it"
    with sync_playwright() as playwright:
        # As root Chromium has no sandbox; the pages are our own.
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(
        [tiny_served("sft", settings=SETTINGS), tiny_served("ppo", seed=1, settings=SETTINGS)]
    ) as running:
        yield running


class Chat:
    """A person at the page."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.hosts: set[str | None] = set()
        self.faults: list[str] = []
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("dialog", lambda dialog: (self.faults.append(dialog.message), dialog.dismiss()))
        page.goto(url)

    def set(self, **settings: object) -> None:
        """Fill in the settings."""
        if self.page.locator("#settings").is_hidden():
            self.page.click("#toggle-settings")
        for name, value in settings.items():
            self.page.fill(f"#{name}", str(value))

    def ask(self, question: str) -> list[str]:
        """Type and send a question; the texts of its answers once they are finished."""
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        return self.finished()

    def finished(self) -> list[str]:
        """The last turn's answers."""
        self.page.wait_for_selector("#send:not([hidden])")
        texts: list[str] = self.page.locator(".turn").last.locator(".answer .text").all_text_contents()
        return texts


@pytest.fixture(params=[(1280, 800), (390, 844)], ids=["desktop", "phone"])
def chat(request: pytest.FixtureRequest, browser: Any, server: Live) -> Iterator[Chat]:
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    chat = Chat(page, server.url)
    page.wait_for_selector("#model-0 option", state="attached")
    chat.set(temperature=1, top_p=1, max_tokens=12, seed=3)
    yield chat
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    page.close()
    assert chat.hosts == {"127.0.0.1"}
    assert chat.faults == []


def said(*turns: str) -> list[Any]:
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]


def test_two_turns_are_the_engine_s_own_answers(chat: Chat) -> None:
    first = drawn(said("hello"), seed=3)[0]
    assert chat.ask("hello") == [first]
    assert chat.ask("and?") == [drawn(said("hello", first, "and?"), seed=3)[0]]
    chat.set(system="be kind")
    chat.page.click("#new")
    assert chat.page.locator(".turn").count() == 0
    expected = drawn([{"role": "system", "content": "be kind"}, *said("hello")], seed=3)[0]
    assert chat.ask("hello") == [expected]


def test_regenerating_and_editing_ask_again(chat: Chat) -> None:
    (first,) = chat.ask("hello")
    chat.page.click("text=Regenerate")
    (second,) = chat.finished()
    assert second == drawn(said("hello"), seed=4)[0] != first
    chat.ask("and?")
    chat.page.locator("text=Edit").first.click()
    chat.page.fill("[aria-label='Edit the message']", "other")
    chat.page.press("[aria-label='Edit the message']", "Enter")
    assert chat.finished() == [drawn(said("other"), seed=3)[0]]
    assert chat.page.locator(".turn").count() == 1


def test_two_models_answer_the_same_question_side_by_side(chat: Chat) -> None:
    chat.page.check("#compare")
    texts = chat.ask("hello")
    assert texts == [drawn(said("hello"), seed=3)[0], drawn(said("hello"), seed=3, model_seed=1)[0]]
    assert chat.page.locator(".who").all_text_contents() == ["sft", "ppo"]
    again = chat.ask("and?")
    for model_seed, (text, second) in enumerate(zip(texts, again, strict=True)):
        assert second == drawn(said("hello", text, "and?"), seed=3, model_seed=model_seed)[0]


def test_escape_stops_an_answer_and_frees_its_pages(chat: Chat, server: Live) -> None:
    chat.set(max_tokens=400, seed=1)
    chat.page.fill("#question", "hello")
    chat.page.press("#question", "Enter")
    chat.page.wait_for_function("() => document.querySelector('.answer .text')?.textContent.length > 5")
    chat.page.keyboard.press("Escape")
    (text,) = chat.finished()
    assert drawn(said("hello"), seed=1, max_new_tokens=400)[0].startswith(text)
    until(lambda: all(model.thread.load == Load(0, 0, 0) for model in server.models))


def test_a_conversation_can_be_saved_as_rows_that_training_reads(chat: Chat, tmp_path: Path) -> None:
    chat.page.check("#compare")
    texts = chat.ask("héllo")
    with chat.page.expect_download() as download:
        chat.page.click("#export")
    download.value.save_as(tmp_path / "saved.jsonl")
    rows = [
        json.loads(line) for line in (tmp_path / "saved.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    ]
    assert [row["model"] for row in rows] == ["sft", "ppo"]
    assert [row["messages"] for row in rows] == [said("héllo", text) for text in texts]


def saved(chat: Chat, folder: Path) -> list[dict[str, Any]]:
    """The rows of an export."""
    with chat.page.expect_download() as download:
        chat.page.click("#export")
    download.value.save_as(folder / "saved.jsonl")
    lines = (folder / "saved.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def stopped(chat: Chat) -> None:
    turns = said("hello", drawn(said("hello"), seed=3)[0], "a long story")
    seed = next(i for i in range(20) if drawn(turns, seed=i, max_new_tokens=400)[3] == "length")
    chat.set(max_tokens=400, seed=seed)
    chat.page.fill("#question", "a long story")
    chat.page.press("#question", "Enter")
    chat.page.wait_for_function("() => document.querySelectorAll('.answer .text')[1]?.textContent.length > 5")
    chat.page.keyboard.press("Escape")
    chat.finished()
    chat.set(max_tokens=12, seed=3)


def failed(chat: Chat) -> None:
    chat.page.route("**/v1/chat/completions", lambda route: route.abort())
    chat.ask("into the void")
    chat.page.unroute("**/v1/chat/completions")


def refused(chat: Chat) -> None:
    chat.set(top_p=2)
    chat.ask("too likely")
    chat.set(top_p=1)


def broken_off(chat: Chat) -> None:
    event = 'data: {"choices": [{"delta": {"content": "half an ans"}}]}\n\n'
    chat.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=event, content_type="text/event-stream")
    )
    chat.ask("half")
    chat.page.unroute("**/v1/chat/completions")


@pytest.mark.parametrize("interrupt", [stopped, failed, refused, broken_off])
def test_an_answer_that_is_not_whole_is_no_part_of_the_conversation(
    chat: Chat, tmp_path: Path, interrupt: Any
) -> None:
    (first,) = chat.ask("hello")
    interrupt(chat)
    assert "left out" in chat.page.locator(".turn").last.inner_text()
    assert saved(chat, tmp_path) == [{"model": "sft", "messages": said("hello", first)}]
    expected = drawn(said("hello", first, "and?"), seed=3)[0]
    assert chat.ask("and?") == [expected]
    assert saved(chat, tmp_path) == [{"model": "sft", "messages": said("hello", first, "and?", expected)}]


def test_a_conversation_without_a_whole_answer_has_nothing_to_export(chat: Chat) -> None:
    failed(chat)
    assert chat.page.locator("#export").is_disabled()


def test_an_export_names_the_model_of_each_answer(chat: Chat, tmp_path: Path) -> None:
    (first,) = chat.ask("hello")
    chat.page.select_option("#model-0", "ppo")
    (second,) = chat.ask("and?")
    assert saved(chat, tmp_path) == [
        {"model": ["sft", "ppo"], "messages": said("hello", first, "and?", second)}
    ]


def test_a_script_in_a_conversation_is_text(chat: Chat) -> None:
    script = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    chat.ask(script)
    assert chat.page.locator(".question .text").first.text_content() == script
    assert chat.page.locator("main script, main img").count() == 0


def test_a_conversation_that_outgrows_the_context_leaves_out_its_oldest_turns(chat: Chat) -> None:
    chat.ask("x" * 300)
    (text,) = chat.ask("y" * 300)
    assert text == drawn(said("y" * 300), seed=3)[0]
    assert "did not fit the model's context: 1" in chat.page.locator(".turn").last.inner_text()
    chat.ask("z" * 600)
    assert "the model's context is 512 tokens" in chat.page.locator("[role=alert]").last.inner_text()


def test_an_answer_longer_than_the_context_allows_is_cut_to_half_of_it(chat: Chat) -> None:
    chat.set(max_tokens=100_000)
    assert chat.ask("hello") == [drawn(said("hello"), seed=3, max_new_tokens=256)[0]]


def test_everything_can_be_reached_by_keyboard(chat: Chat) -> None:
    chat.ask("hello")
    assert chat.page.evaluate("document.activeElement.id") == "question"
    reached = set()
    for _ in range(30):
        chat.page.keyboard.press("Tab")
        reached.add(chat.page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    wanted = {"model-0", "compare", "new", "export", "toggle-settings", "system", "temperature", "Edit"}
    assert wanted | {"Regenerate", "question", "send"} <= reached


def test_with_keys_the_page_asks_for_one_and_keeps_it_for_the_tab(browser: Any) -> None:
    with live([tiny_served("sft")], keys=ApiKeys({"alice": hash_of("right")})) as server:
        page = browser.new_page()
        chat = Chat(page, server.url)
        page.wait_for_selector("#notice:not(:empty)")
        assert "no API key" in page.locator("#notice").inner_text()
        for key, shown in (("wrong", "this API key is not known"), ("right", "")):
            page.fill("#key", key)
            page.press("#key", "Tab")
            page.wait_for_function(
                "text => document.getElementById('notice').textContent === text", arg=shown
            )
        assert len(chat.ask("hello")) == 1
        page.reload()
        page.wait_for_selector("#model-0 option", state="attached")
        page.close()
        assert chat.hosts == {"127.0.0.1"}


def test_a_tab_leads_to_the_labelling_pages_and_back(
    browser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [tiny_served("sft", settings=SETTINGS), tiny_served("ppo", seed=1, settings=SETTINGS)]
    with with_tab(tmp_path, models, capsys, "ppo", "sft") as (server, admin):
        page = browser.new_page(viewport={"width": 390, "height": 844})
        chat = Chat(page, server.url)
        ((name, value),) = admin.cookies.items()
        page.context.add_cookies([{"name": name, "value": value, "url": server.url}])
        page.wait_for_selector("#pages [aria-current]:has-text('Chat')")
        page.get_by_role("link", name="Label").click()
        page.wait_for_selector("#task:not([hidden])")
        assert page.locator(".answer > .text").count() == 2
        page.keyboard.press("1")
        page.wait_for_selector("#history:not([hidden])")
        page.get_by_role("link", name="Dovetail").click()
        page.wait_for_selector("#model-0 option", state="attached")
        assert len(chat.ask("hello")) == 1
        page.close()
        assert chat.hosts == {"127.0.0.1"}
        assert chat.faults == []
