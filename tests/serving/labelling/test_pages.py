"""A real Chromium labels, undoes, exports, and asks nobody but the server."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright import sync_api

from dovetail.config.data import SourceConfig
from dovetail.data.labels.database import Store, open_store
from dovetail.data.labels.labels import list_labels
from dovetail.data.labels.tasks import NewTask, Sampled, open_project
from dovetail.data.sources import read_source
from dovetail.text.message import message
from tests.serving.labelling.served import Served, a_label, served
from tests.serving.labelling.work import new_project

pytestmark = pytest.mark.system

SCRIPT = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 800}
GUIDELINES = """Choose the answer you would rather have received.

1. Right comes before polite, and polite before brief.
2. An answer that stops in the middle is worse than a short one.
3. If both are equally good, say tie; if neither is of any use, say so."""
QUESTIONS = [
    ("What is a dovetail joint?", "Two boards whose ends interlock: fan-shaped tails fit between pins. It holds "
     "without nails, and the more you pull, the tighter it gets.", "It is a joint. Joints are for wood."),
    ("How many minutes are in two hours?", "120 minutes.", "There are 60 minutes in an hour, so about 100."),
    ("Name a colour of the sky at dusk.", "Orange.", "The sky is big."),
    ("Is seven a prime number?", "Yes: only 1 and 7 divide it.", "No, it is odd."),
    ("Translate 'bread' into German.", "Brot.", "Pain."),
    ("Say this as a web page would: hello", SCRIPT, "hello"),
    ("What do bees make?", "Honey, and wax for its cells.", "Noise."),
    ("Which is heavier, a litre of water or of oil?", "The water.", "The oil, since it is thick."),
    ("Give me a word that rhymes with 'pine'.", "Line.", "Tree."),
    ("What is 9 x 7?", "63.", "72."),
    ("Who wrote Faust?", "Goethe.", "Schiller wrote it in 1781."),
]  # fmt: skip


def tasks() -> list[NewTask]:
    return [
        NewTask(
            messages=(message("user", question),),
            answers=[
                Sampled(text=text, model=name, seed=1, sampling={})
                for name, text in zip("ab", texts, strict=True)
            ],
        )
        for question, *texts in QUESTIONS
    ]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(f"sqlite:///{tmp_path / 'labels.db'}")
    new_project(opened, *tasks(), overlap=2)
    open_project(opened, "test", guidelines=GUIDELINES)
    yield opened
    opened.close()


@pytest.fixture
def server(store: Store, tmp_path: Path) -> Iterator[Served]:
    with served(f"sqlite:///{tmp_path / 'labels.db'}", ["ann", "ben"]) as running:
        yield running


@pytest.fixture
def browser(tmp_path: Path) -> Iterator["sync_api.Browser"]:
    """Debian's Chromium, which writes every request it makes into net.json."""
    program = shutil.which("chromium")
    assert program is not None, "chromium is not installed: apt-get install chromium"
    log = f"--log-net-log={tmp_path / 'net.json'}"
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", log])
        yield opened
        opened.close()
    assert set(requested_hosts(tmp_path / "net.json")) == {"127.0.0.1"}


def requested_hosts(log: Path) -> Iterator[str]:
    """Hosts of all requests that a page began, from Chromium's log of its network.

    What the browser asks on its own account (for its dictionary, for a sign-in) has no page as its initiator.
    """
    for happened in json.loads(log.read_text())["events"]:
        found = happened.get("params") or {}
        if "url" in found and str(found.get("initiator", "")).startswith("http"):
            yield urlsplit(found["url"]).hostname or ""


def picture(page: "sync_api.Page", tmp_path: Path, name: str) -> None:
    """At both widths, where nothing may stick out; into $SCREENSHOTS if that is set."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    for width, size in (("phone", PHONE), ("desktop", DESKTOP)):
        page.set_viewport_size(size)
        page.evaluate("scrollTo(0, 0)")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
        page.screenshot(path=folder / f"{name}-{width}.png")


def press(page: "sync_api.Page", key: str) -> None:
    """A key, and whatever the server says to it."""
    before = page.locator("#progress").inner_text()
    page.keyboard.press(key)
    page.wait_for_function("before => document.getElementById('progress').textContent !== before", arg=before)


def open_page(browser: "sync_api.Browser", server: Served, name: str) -> "sync_api.Page":
    page = browser.new_page(viewport=DESKTOP)
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.goto(f"{server.base}/label/#token={server.tokens[name]}")
    page.wait_for_selector("#tools:not([hidden])")
    assert "token" not in page.url
    return page


def test_ten_pairs_by_keyboard_one_undone_and_all_exported(
    browser: "sync_api.Browser", server: Served, store: Store, tmp_path: Path
) -> None:
    page = open_page(browser, server, "ann")
    picture(page, tmp_path, "labelling")
    expected: list[tuple[str, str | None]] = []
    for number, (_, good, bad) in enumerate(QUESTIONS[:10]):
        shown = page.locator(".answer > .text").all_inner_texts()
        assert sorted(shown) == sorted([good, bad])  # a script is text
        if number == 3:
            press(page, "t")
            expected.append(("tie", None))
            continue
        if number == 4:
            page.keyboard.press("n")
            page.keyboard.type("1 2 t b: keys in a note are text")
            page.keyboard.press("Escape")
        if number == 6:
            page.keyboard.press("e")
            page.keyboard.type("Honey.")
            page.keyboard.press("Escape")
            page.keyboard.press("r")
            page.keyboard.press("ArrowRight")
        press(page, str(shown.index(good) + 1))
        expected.append(("answer", good))
    assert page.title() == "Dovetail: label"
    press(page, "u")
    assert page.locator("#prompt .text").inner_text() == QUESTIONS[9][0]
    page.keyboard.press("?")
    picture(page, tmp_path, "labelling-keys")
    page.keyboard.press("?")
    press(page, "b")
    expected[9] = ("both_bad", None)
    counting = [line for line in reversed(list_labels(store, 1)) if line.void is None]
    assert [(line.verdict, line.chosen) for line in counting] == expected
    assert counting[4].note == "1 2 t b: keys in a note are text"
    assert counting[6].edited == "Honey."
    assert [line.void for line in list_labels(store, 1) if line.void] == ["undone"]
    assert all(0 < line.seconds < 60 for line in counting)
    label_six(server)
    export(browser, server, tmp_path)


def label_six(server: Served) -> None:
    """A second annotator, who takes the longer answer each time."""
    with server.client("ben") as ben:
        for _ in range(6):
            found = ben.post("next", json={}).json()["task"]
            longer = max((0, 1), key=lambda shown: len(found["answers"][shown]))
            ben.post("labels", json=a_label(found, "") | {"chosen": longer, "seconds": 4}).raise_for_status()


def export(browser: "sync_api.Browser", server: Served, tmp_path: Path) -> None:
    """As the admin, from the admin page; one label is voided there first."""
    page = open_page(browser, server, "admin")
    page.get_by_role("link", name="Admin").click()
    page.wait_for_selector("#all:not([hidden])")
    page.fill("#new-name", "cem")
    page.get_by_role("button", name="Invite").click()
    page.wait_for_selector("#invitation:not([hidden])")
    assert "/label/#token=" in page.locator("#link").inner_text()
    page.locator("tr", has_text=QUESTIONS[0][0]).last.get_by_role("button", name="Void").click()
    page.fill("#reason", "a trial")
    page.keyboard.press("Enter")
    page.wait_for_selector("tr.void:has-text('a trial')")
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#speeds tr", has_text="cem").get_by_role("button", name="Revoke links").click()
    page.wait_for_selector("#speeds tr:has-text('cem'):not(:has(button))")
    page.evaluate("document.getElementById('invitation').hidden = true")  # no token in a picture
    picture(page, tmp_path, "labelling-admin")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the comparisons").click()
    file = tmp_path / "pairs.jsonl"
    download.value.save_as(file)
    records = list(read_source(SourceConfig(path=str(file))))
    # ann: 8 preferences, the first of them voided, and an edited answer that is better than both; ben: 6.
    assert len(records) == 8 - 1 + 2 + 6


@pytest.mark.parametrize("key", ["1", "s", "u"])
def test_the_next_task_is_shown_from_its_beginning(
    browser: "sync_api.Browser", tmp_path: Path, key: str
) -> None:
    url = f"sqlite:///{tmp_path / 'long.db'}"
    store = open_store(url)
    long = [
        NewTask(
            messages=(message("user", f"Question {number}"),),
            answers=[
                Sampled(text="line\n" * length, model="a", seed=1, sampling={}) for length in (200, 300)
            ],
        )
        for number in range(3)
    ]
    new_project(store, *long)
    store.close()
    with served(url, ["ann"]) as server:
        page = open_page(browser, server, "ann")
        page.keyboard.press("1")
        page.wait_for_selector("#prompt .text:has-text('Question 1')")
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        assert not is_in_view(page, "#prompt .text")
        page.keyboard.press(key)
        following = "Question 0" if key == "u" else "Question 2"
        page.wait_for_selector(f"#prompt .text:has-text('{following}')")
        assert is_in_view(page, "#prompt .text")


def is_in_view(page: "sync_api.Page", selector: str) -> bool:
    box, height = page.locator(selector).first.bounding_box(), page.evaluate("innerHeight")
    assert box is not None
    return bool(box["y"] >= 0 and box["y"] + box["height"] <= height)


def test_a_wrong_token_is_refused_and_a_right_one_typed(
    browser: "sync_api.Browser", server: Served, tmp_path: Path
) -> None:
    page = browser.new_page(viewport=PHONE)
    page.goto(f"{server.base}/")
    page.wait_for_selector("#login:not([hidden])")
    picture(page, tmp_path, "labelling-login")
    page.fill("#token", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#notice:has-text('never given out')")
    page.fill("#token", server.tokens["ann"])
    page.keyboard.press("Enter")
    page.wait_for_selector("#task:not([hidden])")
    assert page.locator("#to-admin").is_hidden()
    page.get_by_role("button", name="Log out").click()
    page.wait_for_selector("#login:not([hidden])")
