from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from dovetail.text.chat_format import ChatFormat
from dovetail.text.template import Template, clock_stopped
from tests.text.tokenizers import CHATML, byte_level

HELLO = [{"role": "user", "content": "hi"}]
DATED = (  # the two ways in which published templates print the date
    "{{ strftime_now('%d %b %Y') }}" + CHATML,
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ date_string }}" + CHATML,
)


def test_within_the_block_every_template_prints_one_date_in_all_threads() -> None:
    for template in DATED:
        tokenizer = byte_level(template)
        dated = Template(tokenizer)
        with clock_stopped(datetime(2001, 2, 3)), ThreadPoolExecutor(1) as threads:
            shown = [dated.render(HELLO), threads.submit(dated.render, HELLO).result()]
        assert all(text.startswith("03 Feb 2001") for text in shown)
        today = tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
        assert dated.render(HELLO) == today


def test_a_format_that_prints_the_date_has_another_fingerprint_on_another_day() -> None:
    prints = []
    for template in (DATED[0], CHATML):
        for day in (1, 2):
            with clock_stopped(datetime(2001, 2, day)):
                prints.append(ChatFormat(byte_level(template)).fingerprint)
    assert prints[0] != prints[1]
    assert prints[2] == prints[3]
