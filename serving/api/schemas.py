"""Bodies of requests. A field that is not here is refused by its name; ``null`` means that it is not given."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.formats import TemplateOptions
from serving.requests import MOST_LOGPROBS

# Values of fields that this server does not know, with which OpenAI's clients mean: as always.
_NEUTRAL: dict[str, Any] = {
    "best_of": 1, "echo": False, "logit_bias": {}, "metadata": {}, "min_p": 0, "modalities": ["text"],
    "service_tier": "auto", "store": False, "suffix": "", "verbosity": "medium",
}  # fmt: skip
_MOST_STOPS, _LONGEST_STOP = 16, 1000  # what may be the beginning of one is compared after each token


class Strict(BaseModel):
    """An object without unknown fields, whose values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def drop_neutral(cls, value: Any) -> Any:
        """Leave out fields that are null, or unknown and without effect."""
        if not isinstance(value, dict):
            return value
        unknown = {name: neutral for name, neutral in _NEUTRAL.items() if name not in cls.model_fields}
        return {
            name: given
            for name, given in value.items()
            if given is not None and not (name in unknown and given == unknown[name])
        }


class StreamOptions(Strict):
    include_usage: bool = False


class SamplingFields(Strict):
    """What requests for chats and for completions have in common.

    ``top_k``, ``repetition_penalty`` and ``chat_template_kwargs`` have the names and meanings of vLLM.
    """

    model: str = Field(max_length=500)
    n: int = Field(default=1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    # Whose request it is, and which cache suits it: without effect.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the strings that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def check_common_fields(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if len(self.stops) > _MOST_STOPS:
            raise ValueError(f"stop has {len(self.stops)} strings; {_MOST_STOPS} is the most")
        if (longest := max(map(len, self.stops), default=0)) > _LONGEST_STOP:
            raise ValueError(f"stop has a string of {longest} characters; {_LONGEST_STOP} is the most")
        return self


class CompletionRequest(SamplingFields):
    """Body of ``/v1/completions``."""

    prompt: str | list[str]
    max_tokens: int | None = Field(default=None, ge=1)
    logprobs: int | None = Field(default=None, ge=0)


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class TemplateFields(Strict):
    """Arguments of the chat template, see ``serving.formats.TemplateOptions``."""

    enable_thinking: bool | None = None
    preserve_thinking: bool | None = None
    reasoning_effort: Effort | None = None


class JsonSchema(Strict):
    name: str
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")
    strict: bool = False


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is required for this type")
        if self.type != "json_schema" and self.json_schema is not None:
            raise ValueError(f"json_schema needs the type json_schema, not {self.type}")
        return self


class FunctionName(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class ChatRequest(SamplingFields):
    """Body of ``/v1/chat/completions``. Messages and tools are checked where they are rendered."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    functions: list[dict[str, Any]] | None = None
    function_call: Literal["none", "auto"] | FunctionName | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateFields = TemplateFields()

    @property
    def template_options(self) -> TemplateOptions:
        """Return the arguments of the chat template."""
        given = self.chat_template_kwargs
        effort = given.reasoning_effort or self.reasoning_effort
        return TemplateOptions(given.enable_thinking, given.preserve_thinking, effort)

    def place_of(self, option: str) -> str:
        """Return the field that gives an argument of the chat template."""
        return option if getattr(self.chat_template_kwargs, option) is None else f"chat_template_kwargs.{option}"

    @model_validator(mode="after")
    def check_fields(self) -> ChatRequest:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        efforts = {self.reasoning_effort, self.chat_template_kwargs.reasoning_effort} - {None}
        if len(efforts) > 1:
            raise ValueError("reasoning_effort and chat_template_kwargs.reasoning_effort differ; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if (self.functions or self.function_call) and (self.tools or self.tool_choice):
            raise ValueError(
                "functions and function_call are the older form of tools and tool_choice; give one of them"
            )
        return self
