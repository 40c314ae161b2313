"""Small trained tokenizers with the habits of real ones, and chat templates in their families' manner."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = (
    "hello there friend , what is the capital of France ? The capital is Paris . I think so , yes ! "
    "user assistant system Human Assistant model think answer question \n\n two plus two is four . "
)

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
INST = (  # Llama 2 and Mistral: no generation prompt, spaces around the answer, roles must alternate
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (  # renames the assistant, refuses system messages, trims
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
THINKING = (  # Qwen 3 and its kin: reasoning of earlier turns is removed, the last turn gets a block
    "{% for message in messages %}{% set text = message['content'] %}"
    "{% if message['role'] == 'assistant' %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') if not loop.last else "
    "(text if '</think>' in text else '<think>\n\n</think>\n\n' + text) %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_FLAG = (  # knows no add_generation_prompt
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
)
NO_END = (  # ends answers with a line break only
    "{% for message in messages %}"
    "{{ message['role'] | upper + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SPECIAL = (
    "<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip


def byte_level(
    template: str | None = None, *, bos: bool = False, prefix_space: bool = False
) -> PreTrainedTokenizerFast:
    """As GPT-2; with `bos`, one that puts <s> in front as OPT and Llama 3 do."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([WORDS] * 20, trainer)
    return _wrap(core, template, bos=bos, eos="<|endoftext|>")


def sentence_piece(template: str | None = None, *, bos: bool = True) -> PreTrainedTokenizerFast:
    """As Llama 2: a space mark before words, one put before the text, and bytes for what is unknown."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", *SPECIAL, *bytes_], show_progress=False
    )
    core.train_from_iterator([WORDS] * 20, trainer)
    layout = json.loads(core.to_str())  # the trainer knows no way to add bytes but as special tokens
    layout["added_tokens"] = [token for token in layout["added_tokens"] if token["content"] not in bytes_]
    return _wrap(Tokenizer.from_str(json.dumps(layout)), template, bos=bos, eos="</s>")


def _wrap(core: Tokenizer, template: str | None, *, bos: bool, eos: str) -> PreTrainedTokenizerFast:
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, extra_special_tokens=list(SPECIAL),
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer
