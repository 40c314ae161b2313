"""The model for lm-evaluation-harness against transformers itself; lm_eval's base class is a stand-in here."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dovetail.errors import ConfigError
from dovetail.model.load import save_model
from tests.fakes import byte_tokenizer, tiny_model

PLACE = "dovetail.serving.inference.harness"


class LM:
    """The stand-in for lm_eval's base class, which sets a few attributes and nothing else."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("harness") / "tiny"
    save_model(tiny_model(), byte_tokenizer(), folder)
    parts: dict[str, Any] = {
        name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model")
    }
    parts["lm_eval.api.model"].LM = LM
    with pytest.MonkeyPatch.context() as patch:
        for name, module in parts.items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, PLACE, raising=False)
        yield importlib.import_module(PLACE).HarnessModel(str(folder), device="cpu")
        del sys.modules[PLACE]


def ids(text: str) -> list[int]:
    found: list[int] = byte_tokenizer()(text)["input_ids"]
    return found


def request(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


@torch.no_grad()
def by_transformers(before: list[int], after: list[int]) -> tuple[float, bool]:
    logprobs = tiny_model()(torch.tensor([before + after])).logits[0].log_softmax(-1)
    own = [logprobs[len(before) + i - 1] for i in range(len(after))]
    total = sum(float(row[token]) for row, token in zip(own, after, strict=True))
    return total, all(int(row.argmax()) == token for row, token in zip(own, after, strict=True))


def greedy(before: list[int], count: int) -> list[int]:
    """What transformers would say next."""
    found: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            found.append(int(tiny_model()(torch.tensor([before + found])).logits[0, -1].argmax()))
    return found


def test_choices_have_the_likelihood_that_transformers_gives(model: Any) -> None:
    """Two choices share a context; spaces at its end belong to the choice; an empty one is the end-of-text token."""
    pairs = [("The sky is", " blue"), ("The sky is", " a hat"), ("Go  ", "on"), ("", "Alone")]
    expected = [
        by_transformers(ids("The sky is"), ids(" blue")),
        by_transformers(ids("The sky is"), ids(" a hat")),
        by_transformers(ids("Go"), ids("  on")),
        by_transformers([256], ids("Alone")),
    ]
    found = model.loglikelihood([request(*pair) for pair in pairs])
    for (logprob, is_greedy), (expected_logprob, expected_greedy) in zip(found, expected, strict=True):
        assert logprob == pytest.approx(expected_logprob, rel=1e-4)
        assert is_greedy == expected_greedy


def test_a_choice_that_greedy_decoding_gives_is_told(model: Any) -> None:
    told = ids("Tell me")
    (first, second) = greedy(told, 2)
    pairs = [(told, [first, second]), (told, [first, (second + 1) % 256])]
    assert [is_greedy for _, is_greedy in model._scored(pairs)] == [True, False]


def test_a_context_that_is_too_long_loses_its_beginning(model: Any) -> None:
    text = "".join(chr(97 + i % 26) for i in range(600))
    ((found, _),) = model.loglikelihood([request(text, " end")])
    assert found == pytest.approx(by_transformers(ids(text)[-508:], ids(" end"))[0], rel=1e-4)


def test_a_text_longer_than_the_context_is_read_in_pieces(model: Any) -> None:
    text = "".join(chr(97 + i % 26) for i in range(600))
    short, long = model.loglikelihood_rolling([request("Hello"), request(text)])
    assert short == pytest.approx(by_transformers([256], ids("Hello"))[0], rel=1e-4)
    whole = ids(text)
    pieces = by_transformers([256], whole[:511])[0] + by_transformers(whole[510:511], whole[511:])[0]
    assert long == pytest.approx(pieces, rel=1e-4)


def test_a_continuation_ends_before_the_text_that_ends_it(model: Any) -> None:
    tokenizer = byte_tokenizer()
    said = tokenizer.decode([token for token in greedy(ids("Say:"), 12) if token < 256])
    stop = said[4:6]
    full, cut, default = model.generate_until(
        [
            request("Say:", {"max_gen_toks": 12, "until": []}),
            request("Say:", {"max_gen_toks": 12, "until": [stop], "do_sample": False, "temperature": 0.7}),
            request("Say:", {"until": "never said", "max_gen_toks": 3}),
        ]
    )
    assert full == said
    assert cut == said[: said.index(stop)]
    assert default == said[: len(default)]


def test_nothing_asked_is_nothing_said(model: Any) -> None:
    assert model.loglikelihood([]) == model.loglikelihood_rolling([]) == model.generate_until([]) == []


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, PLACE, raising=False)
    with pytest.raises(ConfigError, match="lm_eval is not installed") as caught:
        importlib.import_module(PLACE)
    assert "dovetail-rlhf[harness]" in str(caught.value.hint)
