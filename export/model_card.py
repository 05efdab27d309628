"""``README.md`` of a merged folder: what it is, what it was made from, and how it is used.

Names and figures come from users and files: each is written as a code span, so that none of it is interpreted as
markup, and of each path only the last part is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError  # type: ignore[import-untyped]

from checkpoints.companions import copy_companion, find_licenses
from checkpoints.files import load_json_or_empty, save_text
from checkpoints.names import DATA_REPORT, RUN_SUMMARY
from loading.opened_by import published_commands
from loading.tokenizer import is_rebuilt_otherwise
from qwen_model.architectures import ARCHITECTURES

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LICENSE_KEYS = ("license", "license_name", "license_link")
_MAX_SOURCES = 20  # of data, listed per split


@dataclass(frozen=True)
class CardFacts:
    """Contents of a model card that cannot be read from the merged folder.

    Attributes:
        name: final name of the folder.
        base: the base as the user named it, a model id or a folder.
        base_folder: folder of its files; the licence is copied from it.
        adapters: folder and weight of each merged adapter.
        layout: ``model_type`` of the merged folder.
        model_type: of the base.
        dtype: dtype of most weights, such as ``bfloat16``.
        changed: one line about the merge, such as ``10 of 19 tensors changed``.
        verification: lines of the comparison with base and adapters; empty if it was skipped.
        differences: lines about what was trained and is not in the folder.
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
    differences: tuple[str, ...] = ()


def write_model_card(folder: Path, facts: CardFacts) -> Path:
    """Write ``README.md`` and copy the base's licence files; return the path of the card."""
    licenses = copy_licenses(facts.base_folder, folder)
    parts = [
        _front_matter(facts, licenses),
        f"# {code(facts.name)}\n",
        _summary(facts),
        _section("Training", _training_lines(facts)),
        _section("Checkpoint", _checkpoint_lines(facts)),
        _usage(folder, facts),
        _section("Licence", _license_lines(facts, licenses)),
    ]
    path = folder / "README.md"
    save_text("\n".join(part for part in parts if part), path)
    return path


def code(text: object) -> str:
    """Write text as a markdown code span on one line; no text can end the span or be interpreted as markup."""
    plain = "".join(char if char.isprintable() else " " for char in str(text)).strip() or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    gap = " " if "`" in plain else ""
    return f"{fence}{gap}{plain}{gap}{fence}"


def copy_licenses(base: Path, folder: Path) -> list[str]:
    """Copy the base's LICENSE and NOTICE files; return their names."""
    names = find_licenses(base)
    for name in names:
        copy_companion(name, [base], folder)
    return names


def _is_hub_id(facts: CardFacts) -> bool:
    return bool(_HUB_ID.fullmatch(facts.base)) and not Path(facts.base).exists()


def _front_matter(facts: CardFacts, licenses: Sequence[str]) -> str:
    values: dict[str, Any] = _license(facts.base_folder, licenses)
    if _is_hub_id(facts):
        values["base_model"] = facts.base
        values["base_model_relation"] = "finetune" if len(facts.adapters) == 1 else "merge"
    tags = ["qwen"] if facts.model_type in ARCHITECTURES else []
    tags += ["lora-merged", "custom_code"] if facts.layout == "qwen" else ["lora-merged"]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags, **values)
    return f"---\n{data.to_yaml()}\n---\n"


def _license(base: Path, licenses: Sequence[str]) -> dict[str, str]:
    """Return the licence metadata of the base's own card; without one, its licence file or ``unknown``."""
    try:
        metadata: Mapping[str, Any] = metadata_load(base / "README.md") or {}
    except (OSError, ValueError, YAMLError):
        metadata = {}
    declared = {key: metadata[key] for key in _LICENSE_KEYS if isinstance(metadata.get(key), str)}
    if "license" in declared:
        return declared
    files = [name for name in licenses if name.upper().startswith("LICEN")]
    if files:
        return {"license": "other", "license_name": "license-of-the-base", "license_link": files[0]}
    return {"license": "unknown"}


def _summary(facts: CardFacts) -> str:
    base = f"[{facts.base}](https://huggingface.co/{facts.base})" if _is_hub_id(facts) else code(Path(facts.base).name)
    what = "a LoRA adapter" if len(facts.adapters) == 1 else f"{len(facts.adapters)} LoRA adapters"
    lines = [f"{base} with {what} merged into its weights:\n"]
    for path, weight in facts.adapters:
        lines.append(
            f"- {code(path.name)}" + (f", weight {weight:g}" if len(facts.adapters) > 1 or weight != 1 else "")
        )
    return "\n".join(lines) + "\n"


def _training_lines(facts: CardFacts) -> list[str]:
    if len(facts.adapters) == 1:
        return _training_lines_of(facts.adapters[0][0])
    return [f"{code(path.name)}: {line}" for path, _ in facts.adapters for line in _training_lines_of(path)]


def _training_lines_of(adapter: Path) -> list[str]:
    """Return a line per fact in an adapter's run summary and data report; none if these are missing or unreadable."""
    summary, report = load_json_or_empty(adapter / RUN_SUMMARY), load_json_or_empty(adapter / DATA_REPORT)
    lines = list(_run_figures(summary))
    for split, figures in _dicts_in(report or summary.get("data")):
        counts = f"{_number(figures.get('kept'))} conversations, {_number(figures.get('tokens'))} tokens"
        lines.append(f"{code(split)} data: {counts}, {_number(figures.get('trained_tokens'))} of them trained")
        listed = figures.get("sources")
        sources = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else [figures]
        for source in sources[:_MAX_SOURCES]:
            file_name = _last_part(source.get("path") or "?")
            lines.append(f"{code(split)} data: {code(file_name)}, {_number(source.get('kept'))} conversations")
        if len(sources) > _MAX_SOURCES:
            lines.append(f"{code(split)} data: {len(sources) - _MAX_SOURCES} more sources")
    return lines


def _run_figures(summary: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(method := summary.get("method"), str):
        yield f"method: {code(method)}"
    if "steps" in summary:
        trained = _number(summary.get("trained_tokens"))
        yield f"{_number(summary['steps'])} optimizer steps over {trained} trained tokens"
    if isinstance(summary.get("first_loss"), (int, float)):
        yield f"training loss {_number(summary['first_loss'])} -> {_number(summary.get('last_loss'))}"
    if isinstance(summary.get("last_eval_loss"), (int, float)):
        yield f"evaluation loss {_number(summary['last_eval_loss'])}"


def _dicts_in(value: object) -> list[tuple[str, dict[str, Any]]]:
    """Return the items of a dict whose values are dicts; none for any other value."""
    items = value.items() if isinstance(value, dict) else ()
    return [(key, each) for key, each in items if isinstance(each, dict)]


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "?"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _last_part(path: object) -> str:
    """Return the last part of a path of any operating system."""
    return PurePosixPath(PureWindowsPath(str(path)).as_posix()).name


def _checkpoint_lines(facts: CardFacts) -> list[str]:
    lines = [f"layout: {code(facts.layout)}, stored in {code(facts.dtype)}", code(facts.changed)]
    lines += [code(line) for line in facts.verification]
    if not facts.verification:
        lines.append("**not verified**: this checkpoint was not compared with its base and adapters")
    lines += [f"**not what was trained**: {code(line)}" for line in facts.differences]
    return lines


def _usage(folder: Path, facts: CardFacts) -> str:
    config = {"model_type": facts.layout}
    tokenizer = "PreTrainedTokenizerFast" if is_rebuilt_otherwise(folder, config) else "AutoTokenizer"
    trust_argument = ", trust_remote_code=True" if facts.layout == "qwen" else ""
    snippet = "\n".join(
        [
            f"from transformers import AutoModelForCausalLM, {tokenizer}\n",
            f'tokenizer = {tokenizer}.from_pretrained("FOLDER"{trust_argument})',
            f'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto", device_map="auto"{trust_argument})',
            'messages = [{"role": "user", "content": "Who are you?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ").to(model.device)",
            "output = model.generate(**inputs, max_new_tokens=256)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )
    commands = "\n".join(line for lines in published_commands(folder, config).values() for line in lines)
    note = "`FOLDER` is this folder, or its name on the hub."
    note += " It contains the model's code, which `trust_remote_code` runs." if trust_argument else ""
    shell = f"\n```bash\n{commands}\n```\n" if commands else ""
    return f"## Use\n\n{note}\n\n```python\n{snippet}\n```\n{shell}"


def _license_lines(facts: CardFacts, licenses: Sequence[str]) -> list[str]:
    if licenses:
        links = ", ".join(f"[{name}]({name})" for name in licenses if re.fullmatch(r"[\w.-]+", name))
        lines = [f"The base's licence applies to this model too: {links or 'see the files beside this one'}."]
    else:
        lines = [
            "The base's licence applies to this model too. The base's folder has no licence file: look the licence up "
            "where the base was published before you publish this model."
        ]
    if facts.layout == "qwen":
        lines.append("The Python files are part of the Qwen fine-tuning toolkit, under the Apache License 2.0.")
    return lines


def _section(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n" if lines else ""
