"""How models are asked: the flags of ``scripts.evaluate`` that change prompts, and what they make of a chat format."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.flags import add_template_flags, template_arguments

if TYPE_CHECKING:
    from chat.families import Family
    from chat.samples import Thinking
    from loading.checkpoint import Checkpoint

PROMPT_FLAGS = ("chat_template", "thinking", "preserve_thinking", "reasoning_effort")


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of prompts; without ``--thinking`` the prompt is the one that fits the expected answer."""
    parser.add_argument(
        "--chat_template", metavar="FILE", help="Jinja chat template instead of those of the checkpoints and adapters"
    )
    add_template_flags(parser)


@dataclass(frozen=True)
class Prompts:
    """How models are asked.

    Attributes:
        thinking: as in training.
        arguments: others of the chat template.
        chat_template: file with a template that replaces the checkpoint's.
    """

    thinking: Thinking = "auto"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Prompts:
        """Return what the flags ask for."""
        return cls(args.thinking or "auto", template_arguments(args), args.chat_template)

    def families(self, checkpoint: Checkpoint) -> tuple[Family, Family]:
        """Return the chat formats behind prompts with thinking and without it.

        Raises:
            ConfigError: see :func:`loading.prompt_modes.prompt_families`.
        """
        from loading.prompt_modes import prompt_families

        return prompt_families(checkpoint, self.thinking, self.arguments)

    def identity(self) -> dict[str, Any]:
        """Return what decides the prompts, by flag; of a template its digest."""
        file = self.chat_template
        template = None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
        return {**dict.fromkeys(PROMPT_FLAGS), **self.arguments, "thinking": self.thinking, "chat_template": template}
