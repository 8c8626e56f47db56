"""What clients may ask for: the bodies of /v1/chat/completions and /v1/completions, read and checked.

Fields have OpenAI's names, and those that llama.cpp's and vLLM's servers add (`grammar`, `top_k`, `chat_template_kwargs`, ...).
Fields that nobody reads are ignored, as every server does; a field of the wrong type is an `ApiError` 400 that names it.
null is as good as not given. What a client does not say is as the model's generation_config.json says.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..engine import GenerationOptions
from ..errors import UserError, shown
from .errors import ApiError

Body = TypeVar("Body", bound=BaseModel)
MOST_CHOICES = 128                # n, as OpenAI's
MOST_PROMPTS = 2048               # of one request to /v1/completions
MOST_TOP = 20                     # likeliest tokens told of each token
MOST_STOPS = 256                  # every piece of text is searched for each


def _whole(value: Any) -> Any:
    """JavaScript and some Pythons write a whole number as 16.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _count(value: Any) -> Any:
    """false is none, true the chosen token's alone."""
    return (0 if value else None) if isinstance(value, bool) else _whole(value)


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Whole = Annotated[int, BeforeValidator(_whole)]
Texts = Annotated[list[str], BeforeValidator(_texts)]


class Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(Fields):
    include_usage: bool | None = None


class Sampling(Fields):
    """What both ways of asking have in common."""

    model: str | None = None
    max_tokens: Whole | None = None
    n: Annotated[int, BeforeValidator(_whole), Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None           # llama.cpp's name for it
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Whole | None = None
    stop: Annotated[Texts, Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: list[Whole] | None = None
    ignore_eos: bool | None = None
    response_format: dict[str, Any] | None = None
    json_schema: Any = None
    grammar: str | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def generation(self) -> dict:
        """The keyword arguments of `Engine.submit` for how tokens are chosen. Raises ApiError."""
        options = {name: value for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty",
                                            "presence_penalty", "seed") if (value := getattr(self, name)) is not None}
        if self.repeat_penalty is not None:
            options.setdefault("repetition_penalty", self.repeat_penalty)
        if options.get("top_k", 0) < 0:           # off, for vLLM
            options["top_k"] = 0
        if options.get("top_p") == 0:             # the likeliest token alone
            options["top_p"] = 1e-9
        if "seed" in options:                     # -1 is llama.cpp's "any"; OpenAI's are signed
            options["seed"] = None if options["seed"] == -1 else options["seed"] % (1 << 64)
        if self.logit_bias:
            if bad := next((key for key in self.logit_bias if not key.isascii() or not key.isdigit()), None):
                raise ApiError(400, f"logit_bias has {shown(bad)}; its names are token ids, such as \"42\"", param="logit_bias")
            options["logit_bias"] = {int(key): bias for key, bias in self.logit_bias.items()}
        if self.stop:
            options["stop"] = tuple(self.stop)
        if self.stop_token_ids:
            options["stop_tokens"] = tuple(self.stop_token_ids)
        if self.ignore_eos:
            options["ignore_model_stop"] = True
        try:
            GenerationOptions(**options)
        except UserError as error:                # its first word is the option
            name = str(error).split()[0]
            raise ApiError(400, str(error), param=name if name in type(self).model_fields else None) from None
        return options

    def constraint(self) -> tuple[str, Any] | None:
        """What the reply must be like: kind ("json", "json_schema", "regex", "grammar") and source; None: anything. Raises ApiError."""
        found = {}
        kind = (self.response_format or {}).get("type", "text")
        if kind == "json_object":
            schema = self.response_format.get("schema")            # llama.cpp's
            found["response_format"] = ("json", None) if schema is None else ("json_schema", schema)
        elif kind == "json_schema":
            inner = self.response_format.get("json_schema")
            schema = inner.get("schema") if isinstance(inner, dict) else None
            if not isinstance(schema, dict | bool):
                raise ApiError(400, "response_format of type json_schema needs json_schema: {name, schema}, the schema an object",
                               param="response_format")
            found["response_format"] = "json_schema", schema
        elif kind != "text":
            raise ApiError(400, f"response_format.type is {shown(kind)}; it must be text, json_object or json_schema", param="response_format")
        given = {"json_schema": self.json_schema, "grammar": self.grammar, "guided_json": self.guided_json,
                 "guided_regex": self.guided_regex, "guided_choice": self.guided_choice, "guided_grammar": self.guided_grammar,
                 **{f"structured_outputs.{name}": value for name, value in (self.structured_outputs or {}).items()}}
        for name, value in given.items():
            if value is not None and value != "" and value is not False:
                found[name] = _structured(name, value)
        if len(found) > 1:
            raise ApiError(400, f"{' and '.join(found)} are given; a reply follows one of them", param=list(found)[1])
        return next(iter(found.values()), None)


class Templated(Sampling):
    """And what a chat template may read."""

    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None


class Chat(Templated):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MOST_TOP)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    @classmethod
    def converted(cls, values: dict) -> Chat:
        """From the body of another route. Raises RequestValidationError."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RequestValidationError(error.errors(include_url=False)) from None

    @property
    def limit(self) -> int | None:
        """Tokens of a reply, at most; None: as many as there is room for."""
        return _limit("max_completion_tokens" if self.max_completion_tokens is not None else "max_tokens",
                      self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens)

    @property
    def told(self) -> int | None:
        """The engine's `logprobs`. Raises ApiError."""
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs is given without logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class Completion(Sampling):
    """The body of /v1/completions."""

    prompt: Any = None
    suffix: str | None = None
    echo: bool | None = None
    best_of: Whole | None = None
    logprobs: Annotated[int, BeforeValidator(_count), Field(ge=0, le=MOST_TOP)] | None = None

    @property
    def limit(self) -> int | None:
        """Tokens of a reply, at most; 0 beside `echo` alone; None: as many as there is room for. Raises ApiError."""
        return 0 if self.max_tokens == 0 and self.echo else _limit("max_tokens", self.max_tokens)

    @property
    def told(self) -> int | None:
        """The engine's `logprobs`."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """One or several, each a text or token ids. Raises ApiError."""
        prompt = self.prompt
        if isinstance(prompt, str) or _are_ids(prompt):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt or not all(isinstance(one, str) or _are_ids(one) for one in prompt):
            raise ApiError(400, f"prompt is {shown(prompt)}; it must be a text, token ids, or a list of those", param="prompt")
        if len(prompt) * (self.n or 1) > MOST_PROMPTS:
            raise ApiError(400, f"{len(prompt)} prompts with n={self.n or 1} are more than {MOST_PROMPTS} replies; ask in parts", param="prompt")
        return prompt


async def read(request: Request, kind: type[Body]) -> Body:
    """The body of a request. Raises ApiError and RequestValidationError for what is no JSON, or has a field of the wrong type."""
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        found = error.errors(include_url=False)
    if found[0]["type"] == "json_invalid":
        raise ApiError(400, f"the body is no JSON: {found[0]['ctx']['error']}", code="invalid_json")
    if not found[0]["loc"]:
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    raise RequestValidationError(found)


def _limit(name: str, given: int | None) -> int | None:
    if given is None or given == -1:              # -1: llama.cpp's "no limit"
        return None
    if given < 1:
        raise ApiError(400, f"{name} is {given}; it must be at least 1", param=name)
    return given


def _structured(name: str, value: Any) -> tuple[str, Any]:
    """Kind and source of one of the extra fields that say what a reply must be like. Raises ApiError."""
    kind = name.removeprefix("structured_outputs.").removeprefix("guided_")
    if kind in ("json", "json_schema"):
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            raise ApiError(400, f"{name} is no JSON schema", param=name) from None
        if isinstance(value, dict | bool):
            return "json_schema", value
    elif kind == "json_object" and value is True:
        return "json", None
    elif kind in ("regex", "grammar") and isinstance(value, str):
        return kind, value
    elif kind == "choice" and isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return "regex", "|".join(map(_escaped, value))
    raise ApiError(400, f"{name} is {shown(value)}, which no reply can be held to", param=name)


def _escaped(text: str) -> str:
    """A text as the regular expression for it."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&~-]", r"\\\g<0>", text)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int and 0 <= one < 1 << 31 for one in value)
