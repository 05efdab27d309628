"""Chat templates as users write them, and a tokenizer that has their control tokens."""

from __future__ import annotations

from functools import cache

from transformers import AddedToken, PreTrainedTokenizerFast

from tests.models import SPECIAL_TOKENS, TINY
from tests.vocabulary import base_tokenizer

OTHER_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>", "<s>")

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_NAMED = "{'user': 'human', 'assistant': 'gpt', 'system': 'rules'}[m.role]"
_TRIMMED = _CHATML.replace("m.content", "(m.content | trim)")
_DEFAULT = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"

CHATML = {
    "default system": _DEFAULT + _CHATML,
    "other names": _CHATML.replace("m.role", _NAMED).replace(">assistant", ">gpt"),
    "other names and default": (_DEFAULT + _CHATML)
    .replace("+ m.role", f"+ {_NAMED}")
    .replace(">system", ">rules")
    .replace(">assistant", ">gpt"),
    "no line end": _CHATML.replace("<|im_end|>\n", "<|im_end|>"),
    "empty line": _CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n"),
    "trimmed": _TRIMMED,
    "trimmed questions": _CHATML.replace("m.content", "(m.content | trim if m.role == 'user' else m.content)"),
    "instructions": "{{ '<|im_start|>system\nBe kind.' }}{% if messages[0].role == 'system' %}"
    "{{ '\n\n' + messages[0].content }}{% set messages = messages[1:] %}{% endif %}{{ '<|im_end|>\n' }}" + _CHATML,
}
"""ChatML with something else than the official ones have."""

EMPTY_BLOCK = "<think>\n\n</think>\n\n"
OPENED = "Chat.\n" + _CHATML.replace("+ m.content", f"+ ({EMPTY_BLOCK!r} if m.role == 'assistant' else '') + m.content")
"""Writes something at the start of each answer that its prompts do not end with."""

OWN = {
    "brackets": "{{ bos_token or '' }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}<<SYS>>\n{{ m.content }}\n<</SYS>>\n\n{% else %} {{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}",
    "tokens of its own": "<s>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "date": "{{ '<|im_start|>system\nToday is ' + strftime_now('%Y-%m') + '.<|im_end|>\n' }}" + _CHATML,
    "system in the question": "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + (system if loop.first else '') + m.content | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "system in the last question": "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if messages[0].role == 'system' and loop.index0 >= loop.length - 2 %}{{ messages[0].content }}\n\n{% endif %}"
    "{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}",
    "preamble": "A chat.\n\n" + _CHATML,
    "labels": "{% for m in messages %}{% if m.role == 'assistant' %}ANSWER: {{ m.content }}{{ eos_token }}\n{% else %}"
    "{{ m.role | upper }}: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}ANSWER:{% endif %}",
}
"""Formats that are not ChatML, or not in every respect."""

REFUSED = {
    "no end": (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}",
        "no special token of the tokenizer",
    ),
    "no answers": (_CHATML.replace("for m in messages", "for m in messages if m.role == 'user'"), "text of an answer"),
    "no questions": ("hello<|im_end|>", "text of a question"),
    "other prompt": (_CHATML.replace(">assistant\n", ">assistant\n<think>\n"), "is not how it begins to write"),
    "no prompt": (_CHATML.partition("{% if add")[0], r"ignores add_generation_prompt: its prompts lack '<\|im_start"),
    "no Jinja": ("{% for m in messages %}{{ m.content }", "TemplateSyntaxError.*line 1"),
    "raises": ("{{ raise_exception('no chat') }}", "fails for a question and an answer: TemplateError: no chat"),
    "tries to leave": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "twice": (_CHATML.replace("m.content", "m.content + m.content"), "does not write an answer once"),
}
"""Templates that nothing can be trained with, and what is said."""


@cache
def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of 700 ranks with control tokens and a chat template."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base_tokenizer(TINY / "qwen.tiktoken"))
    added = [AddedToken(token, special=True, normalized=False) for token in (*SPECIAL_TOKENS, *OTHER_TOKENS)]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", "<|im_end|>", template
    return tokenizer
