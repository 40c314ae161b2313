"""Pictures of the chat page for docs/images, from a server that runs.

python -m tests.serving.take_screenshots http://127.0.0.1:8000 [FIRST_MODEL SECOND_MODEL]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parents[2] / "docs" / "images"
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
QUESTIONS = ("My name is Rosa.", "What is my name?")


def ask(page: Page, *questions: str) -> None:
    for question in questions:
        page.fill("#question", question)
        page.press("#question", "Enter")
        page.wait_for_selector("#send:not([hidden])", timeout=120_000)


def take(page: Page, size: str, models: list[str]) -> None:
    """A conversation, the same with two models, and the settings."""
    page.wait_for_selector("#model-0 option", state="attached")
    page.evaluate("() => { document.getElementById('seed').value = 1; }")
    if models:
        page.select_option("#model-0", models[0])
    ask(page, *QUESTIONS)
    page.screenshot(path=IMAGES / f"chat-{size}.png")
    page.click("#new")
    page.check("#compare")
    if models:
        page.select_option("#model-1", models[1])
    ask(page, *QUESTIONS)
    page.screenshot(path=IMAGES / f"compare-{size}.png")
    page.click("#toggle-settings")
    page.screenshot(path=IMAGES / f"settings-{size}.png")


def main(url: str, *models: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for size, (width, height) in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(url)
            take(page, size, list(models))
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
