"""Ollama's Modelfile of an exported model: its chat format as a template of Go, system message, stops and sampling.

The template writes what the checkpoint's own chat template writes (a test compares both), except that Ollama writes the
JSON of tools and calls without spaces. Ollama finds the tags of thinking and of calls in the text around ``.Thinking``
and after ``if .ToolCalls``, so line breaks there are strings within an action.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chat.chatml import END_OF_TEXT, IM_END, IM_START
from chat.families import THINK, THINK_END, Family
from chat.template_arguments import reads_argument
from chat.tools_hermes import Hermes, describe_tools
from errors import ConfigError
from outputs import staged_file

# Parts of the template. Actions of Go are written with square brackets here: [[ .Content ]] becomes {{ .Content }}.
_TOOL = '{"type": "function", "function": [[ .Function ]]}'
_TOOLS = f'[[ range $i, $_ := .Tools ]][[ if $i ]][[ "\\n" ]][[ end ]]{_TOOL}[[ end ]]'
_CALL = '<tool_call>\n{"name": "[[ .Function.Name ]]", "arguments": [[ .Function.Arguments ]]}\n</tool_call>'
_CALLS = (
    "[[ if .Content ]][[ with .ToolCalls ]]\n[[ end ]][[ end ]]"
    f'[[ if .ToolCalls ]][[ range $j, $_ := .ToolCalls ]][[ if $j ]][[ "\\n" ]][[ end ]]{_CALL}[[ end ]][[ end ]]'
)
_RESULT = (
    f'[[ else if eq .Role "tool" ]][[ if not $results ]]{IM_START}user[[ end ]]'
    "\n<tool_response>\n[[ .Content ]]\n</tool_response>[[ $results = true ]]"
)
_END_RESULTS = f"[[ if $results ]]{IM_END}\n[[ $results = false ]][[ end ]]"
_FIND_QUESTION = (
    '[[ $question := -1 ]][[ range $i, $_ := .Messages ]][[ if eq .Role "user" ]][[ $question = $i ]][[ end ]][[ end ]]'
)
_THOUGHT = f"[[ if and .Thinking (gt $i $question) ]]{THINK}\n[[ .Thinking ]]\n{THINK_END}\n\n[[ end ]]"
_NO_THOUGHT = f"[[ if and $.IsThinkSet (not $.Think) ]]{THINK}\n\n{THINK_END}\n\n[[ end ]]"


def go_template(family: Family, has_switch: bool = False) -> str:
    """Return a family's chat format as a template of Go, with the fields that Ollama sets.

    Tools are left out unless they are written as from Qwen2.5 on, and thinking if the checkpoint's template is unknown.

    Args:
        has_switch: an answer without thinking can be asked for.

    Raises:
        ConfigError: a format that is not known in this form.
    """
    is_changed = family.instructions or family.role_names or family.turn_end != "\n"
    if family.is_strict or family.trimmed_roles:
        what = f"--modelfile: the chat format {family.name!r} trims texts, which templates of Ollama cannot do"
        raise ConfigError(what, "Leave it out; the checkpoint's own template is in the file")
    if is_changed or family.own_template:
        what = f"--modelfile: the chat format {family.name!r} of this checkpoint cannot be a template of Ollama"
        raise ConfigError(what, "Leave it out; the checkpoint's own template is in the file")
    form = family.tool_form if isinstance(family.tool_form, Hermes) else None
    thinks = family.thinking == "block" and family.knows_thinking
    has_system, tools, calls, result, end_results, before = ".System", "", "", "", "", ""
    if form:
        text = describe_tools([_TOOLS], form.call_example.replace("{{", '[[ "{{" ]]'))
        has_system = "or .System .Tools"
        tools = f"[[ if .Tools ]][[ if .System ]]\n\n[[ else ]]{form.system_prefix}[[ end ]]{text}[[ end ]]"
        calls, result, end_results = _CALLS, _RESULT, _END_RESULTS
        before = f'[[ if ne .Role "tool" ]]{_END_RESULTS}[[ end ]]'
    template = (
        f"{_FIND_QUESTION if thinks else ''}{'[[ $results := false ]]' if form else ''}"
        f"[[ if {has_system} ]]{IM_START}system\n[[ .System ]]{tools}{IM_END}\n[[ end ]]"
        "[[ range $i, $_ := .Messages ]][[ $last := eq (len (slice $.Messages $i)) 1 ]]"
        f'{before}[[ if eq .Role "user" ]]{IM_START}user\n[[ .Content ]]{IM_END}\n'
        f'[[ else if eq .Role "assistant" ]]{IM_START}assistant\n{_THOUGHT if thinks else ""}[[ .Content ]]{calls}'
        f"[[ if not $last ]]{IM_END}\n[[ end ]]{result}[[ end ]]"
        f'[[ if and $last (ne .Role "assistant") ]]{end_results}{IM_START}assistant\n{family.prompt_suffix}'
        f"{_NO_THOUGHT if thinks and has_switch else ''}[[ end ]][[ end ]]"
    )
    return template.replace("[[", "{{").replace("]]", "}}")


def modelfile(family: Family, chat_template: object, generation_config: Any, gguf: str) -> str:
    """Return the Modelfile for a GGUF file.

    Args:
        chat_template: the checkpoint's own.
        gguf: name of the file, in the Modelfile's folder.

    Raises:
        ConfigError: a system message that a Modelfile cannot contain.
    """
    template = go_template(family, has_switch=reads_argument(str(chat_template), "enable_thinking"))
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{template}"""']
    if system := family.default_system:
        if '"""' in system or system.endswith('"'):
            what = f"--modelfile: the default system message {system!r} has quotes that a Modelfile cannot contain"
            raise ConfigError(what, "Change it in the checkpoint's chat template, or leave out --modelfile")
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{token}"' for token in (IM_END, END_OF_TEXT, IM_START)]
    lines += [f"PARAMETER {name} {value}" for name, value in sampling(generation_config).items()]
    return "\n".join(lines) + "\n"


def sampling(settings: Any) -> dict[str, float]:
    """Return a generation config under Ollama's names, with transformers' defaults, as Ollama's differ from them."""
    values: dict[str, float | None] = {"temperature": 0.0}
    defaults = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
    if settings.do_sample:
        values = {name: getattr(settings, name, None) for name in defaults}
    values["repeat_penalty"] = settings.repetition_penalty
    defaults["repeat_penalty"] = 1.0
    return {name: defaults[name] if value is None else value for name, value in values.items()}


def write_modelfile(text: str, path: Path) -> None:
    """Write a Modelfile; there must be none at its path."""
    with staged_file(path, replaces=False) as staging:
        staging.write_text(text, encoding="utf-8")
