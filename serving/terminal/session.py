"""A conversation with an engine: turns, settings, and answers as they arrive."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from chat.events import Event
from chat.reading import AnswerReader, opening_of, turn_of
from chat.turns import Turn
from serving.formats import TemplateOptions
from serving.requests import FinishReason, Request, Sampling

if TYPE_CHECKING:
    from serving.engine import Engine

_DEFAULT = TemplateOptions()


class Session:
    """A conversation.

    Args:
        sampling: what replaces the checkpoint's values.
        system: system message; ``None``: that of the family.
        adapter: the adapter that answers; ``None``: the base.
        options: arguments of the checkpoint's template.

    Attributes:
        turns: questions and answers so far.
        finish_reason: why the last answer ended.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        system: str | None = None,
        adapter: str | None = None,
        options: TemplateOptions = _DEFAULT,
    ) -> None:
        self.engine = engine
        self.first_sampling = self.sampling = sampling
        self.system, self.adapter, self.options = system, adapter, options
        self.turns: list[Turn] = []
        self.finish_reason: FinishReason | None = None

    def ask(self, text: str) -> Generator[Event, None, None]:
        """Yield the answer to a question as it arrives. Closing the iterator stops the answer, which stays as it is.

        Raises:
            RequestError: the conversation is too long.
        """
        engine, asked = self.engine, [*self.turns, Turn("user", text)]
        prompt = engine.render_turns(asked, system=self.system, options=self.options)
        ticket = engine.submit(Request(prompt, self.sampling, self.adapter))
        family = engine.family_of(self.options)
        reader = AnswerReader(family, opening=opening_of(family, False, False))
        events: list[Event] = []
        try:
            for piece in ticket:
                for event in reader.feed(piece.text):
                    events.append(event)
                    yield event
            for event in reader.close():
                events.append(event)
                yield event
        finally:
            if ticket.finish_reason is None:
                ticket.cancel()
            self.finish_reason = ticket.finish_reason or "cancelled"
            if events:
                self.turns = [*asked, turn_of(events)]

    def as_record(self) -> str:
        """Return the conversation as a line of training data."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*system, *map(_message, self.turns)]
        return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"

    def save(self, path: Path) -> None:
        """Append the conversation to a file of training data."""
        with path.open("a", encoding="utf-8") as file:
            file.write(self.as_record())


def _message(turn: Turn) -> dict[str, str]:
    thinking = {"reasoning_content": turn.thinking} if turn.thinking else {}
    return {"role": turn.role, "content": turn.content, **thinking}
