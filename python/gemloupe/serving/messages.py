"""Chats as clients send them, rebuilt from what a server may read: no paths, no addresses."""

from __future__ import annotations

import base64
import binascii
import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import Any

from gemloupe.chat_template import ROLES
from gemloupe.errors import one_of, quoted
from gemloupe.media.videos import VideoSource
from gemloupe.serving.failure import ApiError
from gemloupe.serving.limits import Limits

_MAX_MESSAGES = 10_000
# OpenAI's `detail` of an image -> soft tokens; otherwise the model's usual number.
_DETAILS = {"low": 70, "high": 1120}


def read_messages(messages: Any, limits: Limits) -> list[dict[str, Any]]:
    """Returns OpenAI's messages as `model.prepare` takes them. ApiError naming the place.

    Images, sounds and videos come inside the request, in base64; files and addresses are refused.
    """
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list of at least one message", param="messages")
    if len(messages) > _MAX_MESSAGES:
        raise ApiError(400, f"more than {_MAX_MESSAGES} messages", param="messages")
    read = [_message(message, f"messages[{i}]", limits) for i, message in enumerate(messages)]
    kinds = [part["type"] for message in read for part in _parts(message)]
    for kind, what, most in (
        ("image", "images", limits.max_images),
        ("audio", "sounds", limits.max_sounds),
        ("video", "videos", limits.max_videos),
    ):
        if (count := kinds.count(kind)) > most:
            raise ApiError(400, f"{count} {what}; expected at most {most}", param="messages")
    return read


def _parts(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else ()


def _message(message: Any, where: str, limits: Limits) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ApiError(400, f"{where} is {quoted(message)}; expected an object", param=where)
    role = message.get("role")
    if role not in ROLES:
        raise ApiError(
            400, f"{where}.role is {quoted(role)}; expected {one_of(ROLES)}", param=f"{where}.role"
        )
    read: dict[str, Any] = {
        "role": role,
        "content": _content(message.get("content"), where, limits),
    }
    for key in ("name", "tool_call_id"):
        if isinstance(message.get(key), str):
            read[key] = message[key]
    if isinstance(message.get("tool_name"), str):  # Ollama's.
        read["name"] = message["tool_name"]
    reasoning = next(
        (message[key] for key in ("reasoning_content", "reasoning", "thinking") if key in message),
        None,
    )
    if isinstance(reasoning, str):
        read["reasoning_content"] = reasoning
    if message.get("tool_calls"):
        read["tool_calls"] = _calls(message["tool_calls"], f"{where}.tool_calls")
    images = message.get("images")  # Ollama's: base64 beside the text.
    if images:
        read["content"] = _with_images(read["content"], images, f"{where}.images")
    return read


def _content(content: Any, where: str, limits: Limits) -> Any:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(
            400, f"{where}.content is {quoted(content)}; expected a string or a list of parts",
            param=f"{where}.content",
        )  # fmt: skip
    parts = [_part(part, f"{where}.content[{i}]", limits) for i, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: Any, where: str, limits: Limits) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text") and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in ("image_url", "input_image"):
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        read: dict[str, Any] = {"type": "image", "image": _image(url, where)}
        inner = part.get("image_url")
        detail = part.get("detail") or (inner.get("detail") if isinstance(inner, dict) else None)
        if isinstance(detail, str) and detail in _DETAILS:
            read["max_soft_tokens"] = _DETAILS[detail]
        return read
    if kind == "input_audio" and isinstance(part.get("input_audio"), dict):
        return {"type": "audio", "audio": _bytes(part["input_audio"].get("data"), where)}
    if kind == "video_url":
        url = part.get("video_url")
        url = url.get("url") if isinstance(url, dict) else url
        return {"type": "video", "video": _video(url, where, limits)}
    if kind in ("input_audio", "audio", "audio_url", "video", "file"):
        raise ApiError(400, f"{where}: this server reads no {kind} parts", param=where)
    raise ApiError(
        400,
        f'{where} is {quoted(part)}; expected {{"type": "text", "text": …}} or {{"type": '
        '"image_url", "image_url": {"url": "data:image/png;base64,…"}}',
        param=where,
    )


def _video(url: Any, where: str, limits: Limits) -> VideoSource:
    if importlib.util.find_spec("av") is None:
        raise ApiError(
            400,
            f"{where}: this server reads no videos; it needs PyAV (pip install gemloupe[video])",
            param=where,
        )
    data = _data_url(url, where, "video", "mp4")
    return VideoSource(data, most_pixels=limits.max_video_pixels)


def _image(url: Any, where: str) -> bytes:
    return _data_url(url, where, "image", "png")


def _data_url(url: Any, where: str, kind: str, example: str) -> bytes:
    if not isinstance(url, str) or not url.startswith(f"data:{kind}/"):
        shown = quoted(url[:40] if isinstance(url, str) else url)
        raise ApiError(
            400,
            f"{where}: the {kind} is {shown}; expected a data URL (data:{kind}/{example};base64,…)."
            " This server reads no files and fetches no addresses",
            param=where,
        )
    head, _, body = url.partition(",")
    if not head.endswith(";base64"):
        raise ApiError(400, f"{where}: the data URL is not base64", param=where)
    return _bytes(body, where)


def _bytes(text: Any, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise ApiError(400, f"{where} is not base64", param=where) from None


def _with_images(content: Any, images: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(images, list):
        raise ApiError(400, f"{where} must be a list of base64 strings", param=where)
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": _bytes(image, f"{where}[{i}]")} for i, image in enumerate(images)
    ]
    if isinstance(content, list):
        return [*parts, *content]
    return [*parts, {"type": "text", "text": content}] if content else parts


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ApiError(400, f"{where} must be a list", param=where)
    return [_call(call, f"{where}[{i}]", i) for i, call in enumerate(calls)]


def _call(call: Any, where: str, index: int) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise ApiError(400, f"{where} is {quoted(call)}; expected a function call", param=where)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(
            400, f"{where}.function.arguments is no JSON object", param=f"{where}.function"
        )
    id = call.get("id")
    return {
        "id": id if isinstance(id, str) else f"call_{index}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
