"""``README.md`` of an exported folder: what it is, where it comes from, and how it is used.

Names and figures in it come from users and from files: text is written as code, so that nothing in it is markup, and of
paths only the last part is told.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError  # type: ignore[import-untyped]

from checkpoints.files import load_json_or_empty, save_text
from checkpoints.names import DATA_REPORT, RUN_SUMMARY
from qwen_model.architectures import ARCHITECTURES

# What vLLM's registry says (0.33.0, "was supported in vLLM until"): later releases have no class for QWenLMHeadModel.
_LAST_VLLM_WITH_QWEN = "0.23.0"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class CardFacts:
    """What a model card tells of a folder besides what lies in it.

    Attributes:
        name: what the folder is going to be called.
        base: the base as it was named, a hub id or a folder.
        base_folder: where its files lie; its licence is taken from there.
        adapters: folder and weight of each that was merged; none for a checkpoint that was only converted.
        layout: names of the tensors, ``qwen`` or ``qwen2``, or a later family's ``model_type``.
        model_type: of the base.
        dtype: what most weights are stored in, as ``bfloat16``.
        changed: a line on what was merged, as ``10 of 19 tensors changed``.
        verification: lines on the comparison with base and adapters; none where it was skipped.
        notes: lines on what the folder has lost against its base, or what its user has to know.
    """

    name: str
    base: str
    base_folder: Path
    adapters: tuple[tuple[Path, float], ...]
    layout: str
    model_type: str
    dtype: str
    changed: str
    verification: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def write_model_card(folder: Path, facts: CardFacts) -> Path:
    """Write ``README.md``, with the base's licence files beside it.

    Args:
        folder: the exported folder.

    Returns:
        The path of the card.
    """
    licenses = copy_licenses(facts.base_folder, folder)
    parts = [
        _front_matter(facts, licenses),
        f"# {code(facts.name)}\n",
        _summary(facts),
        _section("Training", _training_lines(facts)),
        _section("Checkpoint", _checkpoint_lines(facts)),
        _use(facts),
        _section("Licence", _license_lines(facts, licenses)),
    ]
    path = folder / "README.md"
    save_text("\n".join(part for part in parts if part), path)
    return path


def code(text: object) -> str:
    """Text as a code span of markdown, on one line; nothing in it can be markup, nor end the span."""
    plain = "".join(char if char.isprintable() else " " for char in str(text)).strip() or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    gap = " " if "`" in plain else ""
    return f"{fence}{gap}{plain}{gap}{fence}"


def copy_licenses(base: Path, folder: Path) -> list[str]:
    """Copy the base's LICENSE and NOTICE files; returns their names."""
    names = sorted(
        path.name for path in base.iterdir() if path.is_file() and re.match(r"(LICEN[SC]E|NOTICE)\b", path.name, re.I)
    )
    for name in names:
        shutil.copyfile(base / name, folder / name)
    return names


def serve_lines(folder: str | Path, layout: str, model_type: str) -> list[str]:
    """Commands that use an exported folder, for the log and the card; comments begin with ``#``.

    Args:
        folder: the name to write into them.
        layout, model_type: as in :class:`CardFacts`.
    """
    name = shlex.quote(str(folder))
    needs_code = layout == "qwen"
    trusting = " --trust-remote-code" if needs_code else ""
    vllm = [f"vllm serve {name}{trusting}"]
    if needs_code:
        vllm.insert(
            0, f"# {_LAST_VLLM_WITH_QWEN} is the last vLLM with a class for this layout; --layout qwen2 needs none"
        )
    ask = [f'python -m scripts.ask --model_name_or_path {name} "Who are you?"'] if model_type in ARCHITECTURES else []
    return [
        *ask,
        *vllm,
        f"transformers serve {name}{trusting}",
        f"python llama.cpp/convert_hf_to_gguf.py {name} --outfile model.gguf",
    ]


def _is_hub_id(facts: CardFacts) -> bool:
    return bool(_HUB_ID.fullmatch(facts.base)) and not Path(facts.base).exists()


def _front_matter(facts: CardFacts, licenses: Sequence[str]) -> str:
    values: dict[str, Any] = _license(facts.base_folder, licenses)
    if _is_hub_id(facts):
        values["base_model"] = facts.base
        if facts.adapters:
            values["base_model_relation"] = "finetune" if len(facts.adapters) == 1 else "merge"
    has = {
        "qwen": facts.model_type in ARCHITECTURES,
        "lora-merged": facts.adapters,
        "custom_code": facts.layout == "qwen",
    }
    tags = [tag for tag, is_true in has.items() if is_true]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags, **values)
    return f"---\n{data.to_yaml()}\n---\n"


def _license(base: Path, licenses: Sequence[str]) -> dict[str, str]:
    """What the base's own card says of its licence; else that it is not known here."""
    try:
        told: Mapping[str, Any] = metadata_load(base / "README.md") or {}
    except (OSError, ValueError, YAMLError):
        told = {}
    known = {key: told[key] for key in _LICENSE_KEYS if isinstance(told.get(key), str)}
    if "license" in known:
        return known
    files = [name for name in licenses if name.upper().startswith("LICEN")]
    if files:
        return {"license": "other", "license_name": "license-of-the-base", "license_link": files[0]}
    return {"license": "unknown"}


def _summary(facts: CardFacts) -> str:
    base = f"[{facts.base}](https://huggingface.co/{facts.base})" if _is_hub_id(facts) else code(Path(facts.base).name)
    if not facts.adapters:
        return f"{base} with its tensors under other names ({code(facts.layout)}), converted and not trained further.\n"
    what = "a LoRA adapter" if len(facts.adapters) == 1 else f"{len(facts.adapters)} LoRA adapters"
    lines = [f"{base} with {what} folded into its weights:\n"]
    for path, weight in facts.adapters:
        lines.append(
            f"- {code(path.name)}" + (f", weight {weight:g}" if len(facts.adapters) > 1 or weight != 1 else "")
        )
    return "\n".join(lines) + "\n"


def _training_lines(facts: CardFacts) -> list[str]:
    if len(facts.adapters) == 1:
        return training_lines(facts.adapters[0][0], code)
    return [f"{code(path.name)}: {line}" for path, _ in facts.adapters for line in training_lines(path, code)]


def _checkpoint_lines(facts: CardFacts) -> list[str]:
    lines = [f"layout: {code(facts.layout)}, stored in {code(facts.dtype)}", code(facts.changed)]
    lines += [code(line) for line in facts.verification]
    if facts.adapters and not facts.verification:
        lines.append("**not verified**: nobody has compared this checkpoint with its base and adapters")
    return [*lines, *(code(note) for note in facts.notes)]


def _use(facts: CardFacts) -> str:
    trusting = ", trust_remote_code=True" if facts.layout == "qwen" else ""
    snippet = "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n",
            f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trusting})',
            f'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto", device_map="auto"{trusting})',
            'messages = [{"role": "user", "content": "Who are you?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ").to(model.device)",
            "output = model.generate(**inputs, max_new_tokens=256)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )
    commands = "\n".join(serve_lines("FOLDER", facts.layout, facts.model_type))
    why = "`FOLDER` is this folder, or its name on the hub."
    why += " It carries the model's code, which `trust_remote_code` runs." if trusting else ""
    return f"## Use\n\n{why}\n\n```python\n{snippet}\n```\n\n```bash\n{commands}\n```\n"


def _license_lines(facts: CardFacts, licenses: Sequence[str]) -> list[str]:
    if licenses:
        links = ", ".join(f"[{name}]({name})" for name in licenses if re.fullmatch(r"[\w.-]+", name))
        lines = [f"The base's licence holds for this model too: {links or 'see the files beside this one'}."]
    else:
        lines = [
            "The base's licence holds for this model too. No licence file lay beside the base: look it up where the "
            "base was published, before you pass this model on."
        ]
    if facts.layout == "qwen":
        lines.append("The Python files are part of the Qwen fine-tuning toolkit, under the Apache License 2.0.")
    return lines


def _section(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n" if lines else ""


_MAX_SOURCES = 20


def training_lines(adapter: Path, code: Callable[[object], str]) -> list[str]:
    """A line per fact of ``run_summary.json`` and ``data_receipt.json``; none where these are missing or unreadable.

    Args:
        adapter: the adapter's folder.
        code: writes a text that is not ours.
    """
    summary, report = (
        load_json_or_empty(adapter / RUN_SUMMARY),
        load_json_or_empty(adapter / DATA_REPORT),
    )
    lines = list(_figures(summary))
    for split, told in _objects(report or _object(summary.get("data"))):
        counts = f"{_number(told.get('kept'))} conversations, {_number(told.get('tokens'))} tokens"
        lines.append(f"{code(split)} data: {counts}, {_number(told.get('trained_tokens'))} of them learnt")
        sources = told.get("sources")
        named = [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else [told]
        lines += [f"{code(split)} data: {_source(source, code)}" for source in named[:_MAX_SOURCES]]
        if len(named) > _MAX_SOURCES:
            lines.append(f"{code(split)} data: {len(named) - _MAX_SOURCES} more sources")
    return lines


def base_name(path: object) -> str:
    """The last part of a path of any system."""
    return PurePosixPath(PureWindowsPath(str(path)).as_posix()).name


def _figures(summary: Mapping[str, Any]) -> Iterator[str]:
    if "steps" in summary:
        yield f"{_number(summary['steps'])} optimizer steps over {_number(summary.get('trained_tokens'))} learnt tokens"
    if isinstance(summary.get("first_loss"), (int, float)):
        yield f"training loss {_number(summary['first_loss'])} -> {_number(summary.get('last_loss'))}"
    if isinstance(summary.get("last_eval_loss"), (int, float)):
        yield f"evaluation loss {_number(summary['last_eval_loss'])}"


def _source(source: Mapping[str, Any], code: Callable[[object], str]) -> str:
    return f"{code(base_name(source.get('path') or '?'))}, {_number(source.get('kept'))} conversations"


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "?"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _objects(value: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, told) for name, told in value.items() if isinstance(told, dict)]


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
