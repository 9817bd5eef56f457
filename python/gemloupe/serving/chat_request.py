"""Requests of OpenAI's chat and completion interfaces as arguments of `generate`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gemloupe.errors import quoted
from gemloupe.serving.failure import ApiError
from gemloupe.serving.fields import Fields
from gemloupe.serving.hooks_json import read_capture, read_edit
from gemloupe.serving.limits import Limits
from gemloupe.serving.messages import read_messages

_MAX_STOPS = 16
_MAX_STOP_LENGTH = 1000
_MAX_TOP_LOGPROBS = 20
_MAX_TOOLS = 512
_SEEDS = 2**63 - 1
# What OpenAI's clients send for its billing and storage.
WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
     "parallel_tool_calls", "verbosity", "modalities"}
)  # fmt: skip
_ROUTING = ("experts", "full", "stream", False, True)
_ON = {"enabled": True, "on": True, "true": True, "disabled": False, "off": False, "false": False}


@dataclass
class GenerateRequest:
    """What a request asks for."""

    model: str
    inputs: list[Any]
    """Prompts as `model.prepare` takes them: chats, texts or ids."""
    arguments: dict[str, Any]
    """Those of `generate` that all rows share."""
    choices: int = 1
    """Rows of each input."""
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    streams_routing: bool = False
    """Experts come with the tokens, not at the end."""
    echo: bool = False
    discard: bool = False
    """Nothing new was asked for: the one token that a row must have is not shown."""
    warnings: list[str] = field(default_factory=list)


def read_chat(body: Mapping[str, Any], limits: Limits) -> GenerateRequest:
    """Reads a /v1/chat/completions body. ApiError 400 naming the field."""
    fields = Fields(_flat(body))
    arguments = _common(fields, limits, fields.integer("max_completion_tokens", 1, 2**31))
    messages = read_messages(fields.get("messages"), limits)
    thinking, budget = _thinking(fields)
    arguments["thinking"] = thinking
    if budget is not None:
        arguments["max_thinking_tokens"] = budget
    tools = fields.get("tools", list)
    choice = fields.get("tool_choice", str, dict, default="auto")
    if tools:
        if len(tools) > _MAX_TOOLS:
            raise ApiError(400, f"{len(tools)} tools; expected at most {_MAX_TOOLS}", param="tools")
        arguments["tools"] = tools
        arguments["tool_choice"] = choice
    elif choice not in ("auto", "none"):
        raise ApiError(400, "tool_choice without tools", param="tool_choice")
    for old in ("functions", "function_call"):
        fields.refuse(old, reason="is an older form; use tools and tool_choice")
    form = fields.get("response_format", dict)
    if form is not None:
        arguments["response_format"] = check_format(form, limits)
    wants = fields.get("logprobs", bool, default=False)
    top = fields.integer("top_logprobs", 0, _MAX_TOP_LOGPROBS, 0)
    if wants:
        arguments["logprobs"] = max(1, top)
    return _finish(fields, arguments, [messages], limits, logprobs=wants, top_logprobs=top)


def read_completion(body: Mapping[str, Any], limits: Limits) -> GenerateRequest:
    """Reads a /v1/completions body. ApiError 400 naming the field."""
    body = _flat(body)
    fields = Fields(body)
    discard = fields.get("max_tokens", int) == 0
    if discard:
        body = {**body, "max_tokens": 1}
        fields = Fields(body)
    arguments = _common(fields, limits, None, default=16)
    prompts = prompts_of(fields.get("prompt"), "prompt")
    echo = fields.get("echo", bool, default=False)
    if discard and not echo:
        raise ApiError(400, "max_tokens is 0; expected 1 or more, or echo", param="max_tokens")
    fields.refuse("suffix", "", reason="is not supported; write a prompt that ends where it should")
    fields.refuse("best_of", 1, reason="is not supported; ask for n and choose")
    form = fields.get("response_format", dict)
    if form is not None:
        arguments["response_format"] = check_format(form, limits)
    top = fields.integer("logprobs", 0, _MAX_TOP_LOGPROBS)
    if top is not None:
        arguments["logprobs"] = max(1, top)
        if echo:
            arguments["prompt_logprobs"] = max(1, top)
    request = _finish(
        fields, arguments, prompts, limits, logprobs=top is not None, top_logprobs=top or 0
    )
    request.echo, request.discard = echo, discard
    return request


def _flat(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body with the entries of `sampling_params`, an object, beside the others."""
    inner = Fields(body).get("sampling_params", dict, default={})
    flat = {key: value for key, value in body.items() if key != "sampling_params"}
    if twice := [key for key in inner if key in flat]:
        raise ApiError(
            400, f"{quoted(twice[0])} stands beside sampling_params and in it", param=twice[0]
        )
    return {**flat, **inner}


def check_format(form: Mapping[str, Any], limits: Limits) -> Any:
    """A response_format in one of the forms that say what they are, of bounded size."""
    kinds = ("text", "json_object", "json_schema")
    if form.get("type") not in kinds and not {"regex", "grammar", "choices"} & form.keys():
        raise ApiError(
            400,
            f'response_format is {quoted(form)}; expected {{"type": "json_schema", "json_schema": '
            '{"schema": …}}, {"type": "json_object"}, {"regex": …}, {"grammar": …} or '
            '{"choices": […]}',
            param="response_format",
        )
    size = len(json.dumps(form))
    if size > limits.max_schema:
        raise ApiError(
            400,
            f"response_format has {size} bytes; expected at most {limits.max_schema}",
            param="response_format",
        )
    return form


def prompts_of(given: Any, name: str) -> list[Any]:
    """A string, ids, or a list of these, as a list. ApiError 400 naming the field `name`."""

    def is_ids(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(map(_is_id, value))

    prompts = [given] if isinstance(given, str) or is_ids(given) else given
    if not isinstance(prompts, list) or not prompts:
        raise ApiError(400, f"{name} must be a string, ids, or a list of these", param=name)
    for index, each in enumerate(prompts):
        if not isinstance(each, str) and not is_ids(each):
            raise ApiError(
                400, f"{name}[{index}] is {quoted(each)}; expected a string or ids", param=name
            )
    return prompts


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _common(
    fields: Fields, limits: Limits, tokens: int | None, default: int | None = None
) -> dict[str, Any]:
    """The fields that chats and completions share."""
    asked = fields.integer("max_tokens", 1, 2**31)
    tokens = tokens or asked or default or limits.max_new_tokens
    arguments: dict[str, Any] = {
        "max_new_tokens": min(tokens, limits.max_new_tokens),
        "temperature": fields.number("temperature", 0, 100),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.integer("top_k", -1, 2**31),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 1e-3, 1e3),
        "stop": _stop(fields),
        "routing": fields.choice("routing", _ROUTING, False),
    }
    if arguments["top_p"] == 0:  # Some clients mean greedy by it.
        arguments["top_p"], arguments["temperature"] = None, 0.0
    if arguments["top_k"] == -1:
        arguments["top_k"] = 0
    if arguments["routing"] is True:
        arguments["routing"] = "experts"
    for key in ("frequency_penalty", "presence_penalty"):
        fields.refuse(key, 0, reason="is not supported; use repetition_penalty, or leave it out")
    fields.refuse("logit_bias", {}, reason="is not supported; use response_format, or edit logits")
    if (cap := fields.number("logit_cap", 1e-6, 1e6)) is not None:
        arguments["softcap"] = cap
    if (capture := fields.get("capture", list, str)) is not None:
        arguments["capture"] = read_capture(capture)
    if (edit := fields.get("edit", dict)) is not None:
        arguments["edit"] = read_edit(edit)
    adapter = fields.get("adapter", str, dict)
    if adapter is not None:
        arguments["adapter"] = adapter
    return arguments


def _stop(fields: Fields) -> list[Any]:
    stop = fields.get("stop", str, list, default=[])
    stops = [stop] if isinstance(stop, str) else [each for each in stop if each != ""]
    right = all(isinstance(s, str) and len(s) <= _MAX_STOP_LENGTH for s in stops)
    if len(stops) > _MAX_STOPS or not right:
        raise ApiError(
            400,
            f"stop must be at most {_MAX_STOPS} strings of at most {_MAX_STOP_LENGTH} characters",
            param="stop",
        )
    ids = fields.get("stop_token_ids", list, default=[])
    if len(ids) > _MAX_STOPS or not all(map(_is_id, ids)):
        raise ApiError(400, "stop_token_ids must be a short list of ids", param="stop_token_ids")
    return [*(each for each in stops if each), *ids]


def _thinking(fields: Fields) -> tuple[bool, int | None]:
    """(whether to think, budget) from the spellings of clients."""
    said = [
        _switch(fields, "thinking_mode"),
        _switch(fields, "enable_thinking"),
        _switch(fields, "think"),
    ]
    budget = fields.integer("max_thinking_tokens", 0, 2**31)
    thinking = fields.get("thinking", bool, dict)
    if isinstance(thinking, dict):
        inner = Fields(thinking, "thinking.")
        said.append(_switch(inner, "type"))
        tokens = inner.integer("budget_tokens", 0, 2**31)
        budget = tokens if budget is None else budget
    else:
        said.append(thinking)
    template = fields.get("chat_template_kwargs", dict)
    if template is not None:
        inner = Fields(template, "chat_template_kwargs.")
        said.append(_switch(inner, "enable_thinking"))
        if rest := [key for key in template if key != "enable_thinking"]:
            raise ApiError(
                400, f"chat_template_kwargs: {quoted(rest[0])} is not known; expected "
                "enable_thinking alone", param="chat_template_kwargs",
            )  # fmt: skip
    effort = fields.choice(
        "reasoning_effort", ("none", "minimal", "low", "medium", "high", "xhigh")
    )
    if effort is not None:
        said.append(effort != "none")
    chosen = {each for each in said if each is not None}
    if len(chosen) > 1:
        raise ApiError(400, "the request turns thinking on and off", param="thinking_mode")
    return chosen == {True}, budget


def _switch(fields: Fields, key: str) -> bool | None:
    value = fields.get(key, bool, str)
    if isinstance(value, str):
        if value.lower() in ("auto", ""):
            return None
        if value.lower() in ("low", "medium", "high"):
            return True
        if value.lower() not in _ON:
            raise ApiError(
                400,
                f'{fields.name(key)} is {quoted(value)}; expected "enabled", "disabled" or "auto"',
                param=fields.name(key),
            )
        return _ON[value.lower()]
    return value


def _finish(
    fields: Fields,
    arguments: dict[str, Any],
    inputs: list[Any],
    limits: Limits,
    *,
    logprobs: bool,
    top_logprobs: int,
) -> GenerateRequest:
    choices = fields.integer("n", 1, limits.max_choices, 1)
    if choices * len(inputs) > limits.max_choices:
        raise ApiError(
            400,
            f"{choices * len(inputs)} answers; expected at most {limits.max_choices}",
            param="n",
        )
    stream = fields.get("stream", bool, default=False)
    options = Fields(fields.get("stream_options", dict, default={}), "stream_options.")
    include_usage = options.get("include_usage", bool, default=False)
    streams_routing = arguments["routing"] == "stream"
    if streams_routing:
        if not stream:
            raise ApiError(
                400,
                'routing is "stream" without stream; expected "experts" or "full"',
                param="routing",
            )
        arguments["routing"] = "experts"
    request = GenerateRequest(
        model=fields.get("model", str, default=""),
        inputs=inputs,
        arguments={key: value for key, value in arguments.items() if value is not None},
        choices=choices,
        seed=fields.integer("seed", -(2**63), _SEEDS),
        stream=stream,
        include_usage=include_usage,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        streams_routing=streams_routing,
    )
    request.warnings = fields.finish(WITHOUT_EFFECT)
    return request
