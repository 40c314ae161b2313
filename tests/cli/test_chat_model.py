from pathlib import Path

import pytest
import torch

from dovetail.cli.chat_model import ModelSpeaker
from dovetail.cli.main import main
from dovetail.engine.sampling import Sampling
from dovetail.model.load import save_model
from dovetail.text.chat_format import ChatFormat
from dovetail.text.message import Message
from tests.fakes import byte_tokenizer, tiny_model

HELLO: list[Message] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(tiny_model("llama"), byte_tokenizer(), folder)
    return folder


def greedy_by_hugging_face(folder: Path, question: str, max_new_tokens: int) -> str:
    chat = ChatFormat(byte_tokenizer())
    prompt = chat.prompt_ids([{"role": "user", "content": question}])
    output = tiny_model("llama").generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(chat.stop_token_ids),
    )
    return chat.decode(output[0, len(prompt) :].tolist()).strip()


def test_a_greedy_answer_is_hugging_face_s(folder: Path) -> None:
    speaker = ModelSpeaker(str(folder), Sampling(temperature=0, max_new_tokens=12), seed=0, device="cpu")
    pieces: list[str] = []
    answer = speaker.speak(HELLO, turn=1, on_text=pieces.append)
    assert answer == greedy_by_hugging_face(folder, "hello", 12)
    assert "".join(pieces) == answer
    assert len(pieces) > 3


def test_the_same_seed_says_the_same_and_another_says_something_else(folder: Path) -> None:
    def answer(seed: int, turn: int) -> str:
        speaker = ModelSpeaker(str(folder), Sampling(max_new_tokens=12), seed=seed, device="cpu")
        return speaker.speak(HELLO, turn=turn, on_text=lambda text: None)

    assert answer(1, 1) == answer(1, 1)
    assert len({answer(1, 1), answer(2, 1), answer(1, 3)}) == 3


def test_one_question_from_a_script_prints_the_answer_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["chat", str(folder), "--prompt", "hello", "--temperature", "0", "--max-new-tokens", "12"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.rstrip() == greedy_by_hugging_face(folder, "hello", 12)


def test_an_unknown_model_is_an_error_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["chat", "runs/none/of/these", "--prompt", "hello"])
    assert stopped.value.code == 2
    assert "hint:" in capsys.readouterr().err
