"""Qwen v1's prompt as a chat template, for folders without one."""

from __future__ import annotations

from chat.chatml import DEFAULT_SYSTEM, IM_END, IM_START

CHATML_TEMPLATE = (
    # Qwen v1 calls tools in ReAct text; a template that ignored tools would look as if it supported them.
    "{%- if tools %}{{ raise_exception('the chat template of Qwen v1 does not support tools') }}{% endif %}\n"
    "{%- if not messages or messages[0]['role'] != 'system' %}\n"
    f"    {{{{- '{IM_START}system\\n{DEFAULT_SYSTEM}{IM_END}\\n' }}}}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    f"    {{{{- '{IM_START}' + message['role'] + '\\n' + message['content'] + '{IM_END}\\n' }}}}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    f"    {{{{- '{IM_START}assistant\\n' }}}}\n"
    "{%- endif %}\n"
)
"""Qwen v1's ``chat_template.jinja``."""
