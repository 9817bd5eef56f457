"""Tools that a model may call: JSON schemas, or Python functions whose schema is worked out."""

from __future__ import annotations

import inspect
import json
import re
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from gemloupe.errors import did_you_mean, one_of, quoted

_EXAMPLE = '{"type": "function", "function": {"name": ..., "parameters": {...}}}'
_NAME = re.compile(r"[^\s{}<>|]+")
_KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
# "Args:", "Arguments:", "Parameters:" of a docstring, and what may follow them.
_SECTION = re.compile(r"(args|arguments|parameters|params)\s*:?\s*", re.IGNORECASE)
_OTHER_SECTION = re.compile(
    r"(returns?|yields?|raises|examples?|notes?|warnings?|see also|references)\s*:?.*",
    re.IGNORECASE,
)
_ARGUMENT = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")
_NUMPY_ARGUMENT = re.compile(r"(\w+)\s*(?::\s*(.*))?")
_SPHINX_ARGUMENT = re.compile(r":param(?:\s+[\w\[\], .]+)?\s+(\w+)\s*:\s*(.*)")


@dataclass(frozen=True)
class Tool:
    """One tool. `schema` is in OpenAI's form; without `function` only the caller can run it."""

    name: str
    schema: dict[str, Any]
    function: Callable[..., Any] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ToolResult:
    """What came of one call."""

    call: dict[str, Any]
    """The entry of `tool_calls` that this answers."""
    content: Any
    """What the model is told: the returned value in JSON types, or {"error": text}."""
    error: str | None = None
    """Why there is no value; None where the function returned."""
    exception: BaseException | None = field(default=None, repr=False, compare=False)
    seconds: float = field(default=0.0, compare=False)

    @property
    def message(self) -> dict[str, Any]:
        """The message that tells the model, for a history."""
        return {
            "role": "tool",
            "tool_call_id": self.call["id"],
            "name": self.call["function"]["name"],
            "content": result_content(self.content),
        }


def parse_tools(tools: Any) -> list[Tool] | None:
    """Returns `tools` as a list of `Tool`, None where there are none.

    Each is a JSON schema ({"type": "function", "function": {"name", …}}, or {"name", …} alone) or
    a function with type hints. TypeError and ValueError say which entry is wrong.
    """
    if tools is None:
        return None
    if isinstance(tools, (Mapping, str)) or not isinstance(tools, Sequence):
        raise TypeError(
            f"tools must be a list of functions or JSON schemas, got {type(tools).__name__}"
        )
    parsed = [_parse_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    names = [tool.name for tool in parsed]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ValueError(f"tools[{index}] is a second tool named {quoted(name)}; rename one")
    return parsed or None


@dataclass(frozen=True)
class MustCall:
    """A tool has to be called: the one of this name, None for any."""

    name: str | None = None


ToolChoice = MustCall | None


def read_tool_choice(choice: Any, tools: Sequence[Tool] | None) -> ToolChoice:
    """Reads `tool_choice=`; None where the model decides. ValueError for a tool that is not there.

    "auto", "none", "required", or {"type": "function", "function": {"name": …}}.
    """
    if choice in (None, "auto", "none"):
        return None
    body = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = body.get("name") if isinstance(body, Mapping) else None
    if choice != "required" and not isinstance(name, str):
        raise ValueError(
            f"tool_choice is {quoted(choice)}; expected 'auto', 'none', 'required' or "
            '{"type": "function", "function": {"name": ...}}'
        )
    names = [tool.name for tool in tools or ()]
    if not names:
        raise ValueError(f"tool_choice is {quoted(choice)}, but there are no tools; pass tools=")
    if name is not None and name not in names:
        hint = did_you_mean(name, names) or f"Tools are {one_of(names)}."
        raise ValueError(f"tool_choice names no tool: {quoted(name)}. {hint}")
    return MustCall(name)


def _parse_tool(tool: Any, where: str) -> Tool:
    if isinstance(tool, Tool):
        return tool
    if callable(tool):
        schema = function_schema(tool, where)
        return Tool(schema["function"]["name"], schema, tool)
    body = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = body.get("name") if isinstance(body, Mapping) else None
    if not isinstance(body, Mapping) or not isinstance(name, str):
        raise TypeError(
            f"{where} is {quoted(tool)}; expected a function, or a JSON schema such as {_EXAMPLE}"
        )
    if tool.get("type", "function") != "function":
        raise ValueError(f'{where} has type {quoted(tool["type"])}; expected "function"')
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where} is named {quoted(name)}; expected a name without spaces or {{}}")
    for key, kind in (("description", str), ("parameters", Mapping)):
        if not isinstance(body.get(key), (kind, type(None))):
            raise TypeError(
                f"{where} ({name}): {key} is {quoted(body[key])}; expected a "
                + ("str" if kind is str else "JSON schema of type object")
            )
    # Released templates read tool["function"]["description"] without asking whether it is there.
    function = {"description": "", **body}
    function = {key: value for key, value in function.items() if value is not None}
    return Tool(name, {"type": "function", "function": {"name": name, **function}})


def function_schema(function: Callable[..., Any], where: str = "the tool") -> dict[str, Any]:
    """Returns the JSON schema of a function, from its signature, type hints and docstring.

    Types: str, int, float, bool, None, list, tuple, dict, Literal, Optional, unions, Any, TypedDict
    and dataclass. Descriptions come from the docstring (Google's, NumPy's or Sphinx's style).
    TypeError for arguments that a model can't give by name, and for types that JSON lacks.
    """
    name = getattr(function, "__name__", None) or type(function).__name__
    where = f"{where} ({name})"
    if not _NAME.fullmatch(name):
        raise TypeError(f"{where} needs a name to be called by; define it with def")
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{where} is a coroutine; pass a function that waits for its result")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise TypeError(
            f"{where} has no signature; wrap it in a function with type hints"
        ) from None
    hints = _hints(function, where)
    summary, descriptions = _read_docstring(inspect.getdoc(function) or "")
    properties: dict[str, Any] = {}
    required = []
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(
                f"{where}: {parameter.name!r} can't be given by name, so this is no JSON schema; "
                "wrap it in a function with named arguments"
            )
        hint = hints.get(parameter.name)
        if hint is None and parameter.default not in (parameter.empty, None):
            hint = type(parameter.default)
        if hint is None:
            raise TypeError(f"{where}: {parameter.name} has no type hint; add one, such as str")
        schema = _type_schema(hint, f"{where}: {parameter.name}")
        if parameter.name in descriptions:
            schema = {"description": descriptions[parameter.name], **schema}
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    body = {"name": name, "description": summary, "parameters": parameters}
    return {"type": "function", "function": body}


def _hints(function: Callable[..., Any], where: str) -> dict[str, Any]:
    target = function if hasattr(function, "__annotations__") else type(function).__call__
    try:
        return typing.get_type_hints(target, include_extras=True)
    except Exception as error:  # Whatever evaluating the caller's annotations raises.
        raise TypeError(f"{where}: its type hints can't be read: {error}") from error


def _type_schema(hint: Any, where: str) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return {}
    if hint in _KINDS:
        return {"type": _KINDS[hint]}
    if origin is typing.Annotated:
        schema = _type_schema(arguments[0], where)
        notes = [note for note in arguments[1:] if isinstance(note, str)]
        return {"description": notes[0], **schema} if notes else schema
    if origin is typing.Literal:
        kinds = list(dict.fromkeys(_KINDS.get(type(value), "") for value in arguments))
        if "" in kinds:
            raise TypeError(f"{where} has the type {hint}; expected strings or numbers in it")
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return _union_schema(arguments, where)
    if (origin or hint) in (list, tuple, set, frozenset, Sequence):
        items = [each for each in arguments if each is not Ellipsis]
        if len(set(items)) > 1:
            raise TypeError(f"{where} has the type {hint}; expected one type of items")
        schema = {"type": "array"}
        return {**schema, "items": _type_schema(items[0], where)} if items else schema
    if (origin or hint) in (dict, Mapping):
        schema = {"type": "object"}
        if len(arguments) == 2 and arguments[1] is not Any:
            schema["additionalProperties"] = _type_schema(arguments[1], where)
        return schema
    if typing.is_typeddict(hint) or is_dataclass(hint):
        return _fields_schema(hint, where)
    raise TypeError(
        f"{where} has the type {getattr(hint, '__name__', hint)}, which JSON lacks; expected str, "
        "int, float, bool, list, dict, Literal, a TypedDict, or a union of these"
    )


def _union_schema(arguments: Sequence[Any], where: str) -> dict[str, Any]:
    schemas = [_type_schema(each, where) for each in arguments if each is not type(None)]
    nullable = {"nullable": True} if len(schemas) < len(arguments) else {}
    if len(schemas) == 1:
        return {**schemas[0], **nullable}
    if all(schema.keys() == {"type"} for schema in schemas):
        return {"type": [schema["type"] for schema in schemas], **nullable}
    return {"anyOf": schemas, **nullable}


def _fields_schema(hint: Any, where: str) -> dict[str, Any]:
    hints = typing.get_type_hints(hint)
    required = list(hints)
    if typing.is_typeddict(hint):
        required = [name for name in hints if name in hint.__required_keys__]
    properties = {name: _type_schema(kind, f"{where}.{name}") for name, kind in hints.items()}
    return {"type": "object", "properties": properties, "required": required}


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Returns (what the function does, {argument: description})."""
    summary: list[str] = []
    descriptions: dict[str, str] = {}
    section, name, indent = "", "", 0
    lines = text.split("\n")
    for index, line in enumerate(lines):
        bare = line.strip()
        underlined = index + 1 < len(lines) and re.fullmatch(r"\s*-{3,}\s*", lines[index + 1])
        heading = bare.endswith(":") or underlined
        if heading and _SECTION.fullmatch(bare):
            section, name = "numpy" if underlined else "google", ""
        elif heading and _OTHER_SECTION.fullmatch(bare):
            section = "other"
        elif match := _SPHINX_ARGUMENT.match(bare):
            section, name = "sphinx", match[1]
            descriptions[name] = match[2]
        elif bare.startswith(":") and re.match(r":(returns?|rtype|raises|type)\b", bare):
            section = "other"
        elif not section:
            summary.append(bare)
        elif section in ("google", "numpy") and bare and set(bare) != {"-"}:
            depth = len(line) - len(line.lstrip())
            pattern = _ARGUMENT if section == "google" else _NUMPY_ARGUMENT
            match = pattern.fullmatch(bare) if not name or depth <= indent else None
            if match:
                name, indent = match[1], depth
                descriptions[name] = match[2] if section == "google" else ""
            elif name:
                descriptions[name] = f"{descriptions[name]} {bare}".strip()
        elif section == "sphinx" and bare:
            descriptions[name] += f" {bare}"
    return " ".join(" ".join(summary).split()), {k: v.strip() for k, v in descriptions.items()}


def can_run(tools: Sequence[Tool], calls: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every call is of a function, or of nothing that exists (which is answered too)."""
    outside = {tool.name for tool in tools if tool.function is None}
    any_function = any(tool.function is not None for tool in tools)
    return any_function and not any(call["function"]["name"] in outside for call in calls)


def run_tools(tools: Sequence[Tool], calls: Sequence[dict[str, Any]]) -> list[ToolResult]:
    """Runs the calls one after the other. An exception of a function becomes its result."""
    return [_run_tool(tools, call) for call in calls]


def _run_tool(tools: Sequence[Tool], call: dict[str, Any]) -> ToolResult:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    function = next((tool.function for tool in tools if tool.name == name), None)
    if function is None:
        names = [tool.name for tool in tools]
        hint = did_you_mean(name, names) or f"Tools are {one_of(names)}."
        return _failed(call, f"there is no tool named {quoted(name)}. {hint}")
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        return _failed(call, f"wrong arguments for {name}: {error}", error)
    started = time.perf_counter()
    try:
        value = function(**arguments)
    except Exception as error:
        seconds = time.perf_counter() - started
        return _failed(call, f"{type(error).__name__}: {error}", error, seconds)
    seconds = time.perf_counter() - started
    return ToolResult(call, json_value(value), seconds=seconds)


def _failed(
    call: dict[str, Any],
    error: str,
    exception: BaseException | None = None,
    seconds: float = 0.0,
) -> ToolResult:
    return ToolResult(call, {"error": error}, error, exception, seconds)


def json_value(value: Any) -> Any:
    """Returns `value` in JSON types; what has none becomes its text."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [json_value(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {name: json_value(getattr(value, name)) for name in value.__dataclass_fields__}
    if hasattr(value, "tolist"):  # NumPy's and torch's arrays and numbers.
        return json_value(value.tolist())
    return str(value)


def result_content(value: Any) -> Any:
    """Returns `value` as templates take a tool's result: a list would be read as message parts."""
    return {"value": value} if isinstance(value, (list, tuple)) else value


def as_json(value: Any) -> str:
    """Returns `value` as JSON text, as clients of OpenAI's API expect arguments."""
    return json.dumps(value, ensure_ascii=False)
