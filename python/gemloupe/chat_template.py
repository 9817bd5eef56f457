"""Chat messages to the text that a model reads, by the checkpoint's own Jinja template.

Templates come from strangers: they run in Jinja's immutable sandbox, see plain JSON data only, and
get the names, filters and whitespace rules that transformers gives them, so that both render alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from gemloupe.errors import one_of, quoted

if TYPE_CHECKING:
    from gemloupe.config import ModelConfig

DEFAULT_PATH = Path(__file__).with_name("templates") / "gemma4.jinja"
# A template's role names; others are refused by `check_messages`, since a typo would go unseen.
ROLES = ("system", "developer", "user", "assistant", "model", "tool")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_MAX_TEMPLATE_BYTES = 4 << 20


class ChatTemplate:
    """One or several named Jinja templates and the variables they always get.

    `origin` says where they come from, for error texts; `is_default` that the checkpoint has none.
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        variables: Mapping[str, Any] | None = None,
        *,
        origin: str = "template",
        is_default: bool = False,
    ) -> None:
        self.templates = dict(templates)
        self.variables = dict(variables or {})
        self.origin = origin
        self.is_default = is_default

    def __repr__(self) -> str:
        return f"ChatTemplate({self.origin})"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Renders `messages` ({"role": ..., "content": ...}) to text that begins with BOS.

        `tools` are JSON schemas. Raises ValueError where the template refuses the messages.
        """
        chat = [_message(message) for message in messages]
        template = _compile(self._source(tools))
        data = {
            **self.variables,
            **variables,
            "messages": chat,
            "tools": None if tools is None else [_plain(tool) for tool in tools],
            "documents": None,
            "enable_thinking": thinking,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return template.render(data)
        except (jinja2.TemplateError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(
                f"{self.origin}: the chat template refuses these messages: {error}. "
                "Check roles and contents against the model's card, or pass text or ids instead."
            ) from error

    def _source(self, tools: object) -> str:
        if tools is not None and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" in self.templates:
            return self.templates["default"]
        raise ValueError(
            f"{self.origin}: has the chat templates {one_of(list(self.templates))}; expected one "
            "named 'default'. Rename one of them, or pass text or ids instead."
        )


def load_chat_template(
    folder: Path, settings: Mapping[str, Any], config: ModelConfig | None, named: Mapping[str, str]
) -> ChatTemplate:
    """Finds the template of a checkpoint.

    chat_template.jinja wins over `settings["chat_template"]` (tokenizer_config.json), and without
    both gemloupe's own is used. `named` holds the pieces by role, such as "bos_token".
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > _MAX_TEMPLATE_BYTES:
            raise ValueError(
                f"{path}: {path.stat().st_size} bytes are too many; expected at most "
                f"{_MAX_TEMPLATE_BYTES}. Download the file again."
            )
        return ChatTemplate({"default": path.read_text("utf-8")}, named, origin=str(path))
    if (stored := settings.get("chat_template")) is not None:
        origin = str(folder / "tokenizer_config.json")
        return ChatTemplate(_named_templates(stored, origin), named, origin=origin)
    # Rule of the released templates: 12B, 26B and 31B start with an empty thought, E2B and E4B
    # (the models with per-layer embeddings) do not.
    large = config is None or config.text.hidden_size_per_layer_input == 0
    variables = {**named, "empty_thought": large}
    source = DEFAULT_PATH.read_text("utf-8")
    return ChatTemplate(
        {"default": source}, variables, origin="gemloupe's Gemma 4 template", is_default=True
    )


def _named_templates(stored: Any, origin: str) -> dict[str, str]:
    if isinstance(stored, str):
        return {"default": stored}
    try:
        templates = {entry["name"]: entry["template"] for entry in stored}
    except (TypeError, KeyError):
        templates = {}
    if not templates or not all(
        isinstance(text, str) for pair in templates.items() for text in pair
    ):
        raise ValueError(
            f"{origin}: chat_template is {quoted(stored)}; expected a string or a list of "
            '{"name", "template"}. Correct the field, or download the file again.'
        )
    return templates


def check_messages(messages: Sequence[Any]) -> None:
    """Raises TypeError or ValueError unless every message is a dict with a known role."""
    if not messages:
        raise ValueError("a chat needs at least one message, got []; add a user message")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise TypeError(
                f'{where} must be a dict such as {{"role": "user", "content": "Hi"}}, '
                f"got {type(message).__name__}"
            )
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"{where} has the role {quoted(role)}; expected {one_of(ROLES)}")
        content = message.get("content")
        if content is None and role not in ("assistant", "model", "tool"):
            raise ValueError(f'{where} ({role}) has no "content"; give it a str')
        if isinstance(content, (list, tuple)):
            _check_parts(content, where)
        elif content is not None and not isinstance(content, str) and role != "tool":
            raise TypeError(
                f"{where}.content must be a str or a list of parts, got {type(content).__name__}"
            )


def _check_parts(parts: Sequence[Any], where: str) -> None:
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str):
            raise TypeError(
                f"{where}.content[{index}] is {quoted(part)}; expected a part such as "
                '{"type": "text", "text": "Hi"}'
            )
        if kind == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f'{where}.content[{index}] has no "text"; give it a str')


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the message as templates expect it: plain data, no None, all names of reasoning."""
    plain = {key: value for key, value in _plain(message).items() if value is not None}
    if isinstance(plain.get("tool_calls"), list):
        plain["tool_calls"] = [_call(call) for call in plain["tool_calls"]]
    for key in _REASONING_KEYS:
        if key in plain:
            return {"thinking": plain[key], **plain, "reasoning_content": plain[key]}
    return plain


def _call(call: Any) -> Any:
    """Returns a tool call with its arguments as a mapping; OpenAI's clients send them as JSON."""
    body = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(body, dict) or not isinstance(body.get("arguments"), str):
        return call
    try:
        arguments = json.loads(body["arguments"] or "{}")
    except ValueError:
        return call
    if not isinstance(arguments, dict):
        return call
    body = {**body, "arguments": arguments}
    return {**call, "function": body} if "function" in call else body


def _plain(value: Any) -> Any:
    """Rebuilds `value` from JSON types, since the sandbox can't know other objects' methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"


class _Generation(jinja2.ext.Extension):
    """Accepts {% generation %} blocks, which mark answers for training, and renders their body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` without names that begin with an underscore, a way out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a namespace can't hold {quoted(name)}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which a model has never seen.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


@lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the chat template is not valid Jinja: {error.message} at line {error.lineno}; "
            "correct it, or download the checkpoint again"
        ) from error
