"""Captures, edits and routing in JSON: what a client asks for, and arrays on their way back."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gemloupe import capturing, edits
from gemloupe.capturing import RoutedTokens
from gemloupe.config import TextConfig
from gemloupe.errors import format_bytes, one_of, quoted
from gemloupe.generation import Row
from gemloupe.media.tower_hooks import PREFIXES
from gemloupe.output import Output
from gemloupe.positions import Span
from gemloupe.serving.failure import ApiError

# Name of an edit in JSON -> (its function, the names of its arguments).
_EDITS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "zero": (edits.zero, ()),
    "scale": (edits.scale, ("factor",)),
    "set": (edits.set, ("value",)),
    "add": (edits.add, ("value",)),
    "project_out": (edits.project_out, ("v",)),
    "mask_edges": (edits.mask_edges, ("queries", "keys")),
    "ablate_experts": (edits.ablate_experts, ("ids", "mode")),
    "force_experts": (edits.force_experts, ("ids", "weights")),
}
_WHERE = ("positions", "heads")


def read_capture(capture: Any) -> list[str]:
    """`capture` of a request: a hook point's name or pattern, or a list of them."""
    names = [capture] if isinstance(capture, str) else capture
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ApiError(400, "capture must be a list of hook points' names", param="capture")
    _refuse_towers(names, "capture")
    return names


def read_edit(given: Any) -> dict[str, Any] | None:
    """`edit` of a request: {"layers.3.attn.z": {"do": "zero", "heads": [0]}}; lists apply in order.

    The names and arguments are those of `gl.edits`; functions and files can't be given.
    """
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ApiError(400, "edit must be an object from hook points to edits", param="edit")
    _refuse_towers(given, "edit")
    return {
        point: [_edit(one, point) for one in (entry if isinstance(entry, list) else [entry])]
        for point, entry in given.items()
    }


def _refuse_towers(names: Iterable[str], param: str) -> None:
    """Images are encoded where requests are read, outside the queue that bounds the work."""
    for name in names:
        if name.startswith(PREFIXES):
            raise ApiError(
                400,
                f"{param}: {quoted(name)} is of a tower; a server looks into the text model",
                param=param,
            )


def _edit(entry: Any, point: str) -> Any:
    where = f"edit[{quoted(point)}]"
    name = entry.get("do") if isinstance(entry, dict) else None
    if not isinstance(name, str) or name not in _EDITS:
        raise ApiError(
            400,
            f'{where} is {quoted(entry)}; expected {{"do": …}} with {one_of(list(_EDITS))}',
            param="edit",
        )
    make, known = _EDITS[name]
    arguments = {key: value for key, value in entry.items() if key != "do"}
    for key in arguments:
        if key not in (*known, *_WHERE):
            raise ApiError(
                400,
                f"{where}: {name} takes no {quoted(key)}; expected {one_of([*known, *_WHERE])}",
                param="edit",
            )
    return make(**arguments)


def check_capture_size(row: Row, config: TextConfig, most: int) -> None:
    """ApiError where a row's captures and routing may take more than `most` bytes."""
    if not row.request.wanted:
        return
    span = Span(row.prompt, 0)
    size = capturing.capture_bytes(row.request, config, span, row.options.max_new_tokens)
    if size > most:
        raise ApiError(
            400,
            f"captures and routing may take {format_bytes(size)}; this server gives a request "
            f"{format_bytes(most)}: capture fewer layers, or ask for fewer tokens",
            param="capture",
        )


def hooks_json(output: Output) -> dict[str, Any]:
    """`captured` and `routing` of an answer, {} where nothing was asked for."""
    found: dict[str, Any] = {}
    if output.captured:
        found["captured"] = {name: _value(value) for name, value in output.captured.items()}
    if output.routing is not None:
        trace = output.routing
        routing = {"experts": array_json(trace.experts), "weights": array_json(trace.weights)}
        for name in ("logits", "probs"):
            values = getattr(trace, name, None)
            if isinstance(values, np.ndarray):
                routing[name] = array_json(values)
        found["routing"] = routing
    return found


def experts_json(routed: RoutedTokens) -> dict[str, Any]:
    """Experts of a few tokens, in as few bytes as it takes: [L, T, k] and the positions [T]."""
    experts = routed.experts
    small = experts.astype(np.uint8 if experts.max() < 256 else np.uint16)
    return {"positions": routed.positions.tolist(), "experts": array_json(small)}


def _value(value: Any) -> Any:
    return [array_json(one) for one in value] if isinstance(value, list) else array_json(value)


def array_json(array: np.ndarray) -> Mapping[str, Any]:
    """{"dtype", "shape", "data"}: little-endian bytes in base64, rows first."""
    plain = np.ascontiguousarray(array)
    plain = plain.astype(plain.dtype.newbyteorder("<"), copy=False)
    data = base64.b64encode(plain.tobytes()).decode("ascii")
    return {"dtype": plain.dtype.name, "shape": list(array.shape), "data": data}
