"""The chat template of Qwen v1, which published it as code only.

It renders plain conversations as ``chatml.py`` does for ``families.QWEN_V1``: a system message in any case, every text
as it stands. A folder that is to be used without this toolkit carries it.
"""

from __future__ import annotations

from qwen_model.families import DEFAULT_SYSTEM, IM_END, IM_START

CHATML_TEMPLATE = (
    # Qwen v1 calls functions in ReAct text; a template that dropped them in silence would look as if it knew them.
    "{%- if tools %}{{ raise_exception('the chat template of Qwen v1 knows no tools') }}{% endif %}\n"
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
"""Content of ``chat_template.jinja``."""
