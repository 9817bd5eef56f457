"""Outputs and pieces in the words of OpenAI's API."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gemloupe.output import Output, TokenLogprobs
from gemloupe.prompt import Prompt
from gemloupe.serving.chat_request import GenerateRequest
from gemloupe.serving.hooks_json import hooks_json
from gemloupe.stream import Piece
from gemloupe.tokenizer import Tokenizer
from gemloupe.tools import as_json

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def usage(outputs: Sequence[Output], choices: int, discard: bool = False) -> dict[str, Any]:
    """Tokens of a request: a prompt counts once, whatever number of answers it has."""
    prompts = sum(len(output.prompt) for output in outputs[::choices])
    cached = sum(output.timings.cached_tokens for output in outputs[::choices])
    new = 0 if discard else sum(len(output.ids) for output in outputs)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": new,
        "total_tokens": prompts + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def timings(output: Output) -> dict[str, Any]:
    """Seconds and tokens of an answer; see `gemloupe.output.Timings`."""
    times = output.timings
    return {
        "prefill_tokens": times.prefill_tokens,
        "cached_tokens": times.cached_tokens,
        "prefill_seconds": times.prefill_seconds,
        "decode_tokens": times.decode_tokens,
        "decode_seconds": times.decode_seconds,
        "time_to_first_token": times.time_to_first_token,
    }


def extras(output: Output) -> dict[str, Any]:
    """What gemloupe adds to a choice: captures, routing, timings, broken calls."""
    added = {"seed": output.seed, "timings": timings(output), **hooks_json(output)}
    if output.tool_errors:
        added["tool_errors"] = output.tool_errors
    return {"gemloupe": added}


def call_json(call: dict[str, Any], index: int | None = None) -> dict[str, Any]:
    """A call with its arguments as JSON text; in streams with its number."""
    function = call["function"]
    numbered = {} if index is None else {"index": index}
    return {
        **numbered,
        "id": call["id"],
        "type": "function",
        "function": {"name": function["name"], "arguments": as_json(function["arguments"])},
    }


def chat_choice(index: int, output: Output, request: GenerateRequest) -> dict[str, Any]:
    calls = [call_json(call) for call in output.tool_calls]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if calls and not output.text else output.text,
    }
    if output.reasoning:
        message["reasoning_content"] = message["reasoning"] = output.reasoning
    if calls:
        message["tool_calls"] = calls
    logprobs = None
    if request.logprobs:
        tokenizer = output.prompt.tokenizer
        logprobs = chat_logprobs(
            output.ids.tolist(), output.logprobs or [], request.top_logprobs, tokenizer
        )
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": output.finish_reason,
        **extras(output),
    }


def chat_delta(
    index: int, piece: Piece, calls_before: int, request: GenerateRequest, tokenizer: Tokenizer
) -> dict[str, Any] | None:
    """The choice of a chunk; None where this token shows nothing."""
    delta: dict[str, Any] = {}
    if piece.text:
        delta["content"] = piece.text
    if piece.reasoning:
        delta["reasoning_content"] = delta["reasoning"] = piece.reasoning
    if piece.tool_calls:
        delta["tool_calls"] = [
            call_json(call, calls_before + i) for i, call in enumerate(piece.tool_calls)
        ]
    logprobs = None
    if request.logprobs and piece.ids:
        logprobs = chat_logprobs(piece.ids, piece.logprobs or [], request.top_logprobs, tokenizer)
    if not delta and logprobs is None and not piece.finish_reason and not piece.experts:
        return None
    return {
        "index": index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": piece.finish_reason,
    }


def chat_logprobs(
    ids: Sequence[int], logprobs: Sequence[TokenLogprobs], top: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    content = []
    for id, (logprob, best) in zip(ids, logprobs, strict=True):
        entry = _token_entry(id, logprob, tokenizer)
        entry["top_logprobs"] = [_token_entry(i, value, tokenizer) for i, value in best[:top]]
        content.append(entry)
    return {"content": content}


def _token_entry(id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    text, data = token_text(id, tokenizer)
    return {"token": text, "id": id, "logprob": _finite(logprob), "bytes": data}


def token_text(id: int, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """The text of one token and its bytes; of a byte token its own byte."""
    piece = tokenizer.tokens([id])[0]
    if match := _BYTE.fullmatch(piece):
        return f"bytes:\\x{match[1].lower()}", [int(match[1], 16)]
    text = piece.replace("\u2581", " ")
    return text, list(text.encode(errors="replace"))


def _finite(logprob: float) -> float:
    # JSON has neither infinity nor NaN, which edits may lead to; OpenAI writes -9999.
    return logprob if logprob > -9999.0 else -9999.0


def echoed_text(index: int, prompt: Prompt, request: GenerateRequest) -> str:
    """What stands before an answer: the prompt as it was given, where that was asked for."""
    given = request.inputs[index // request.choices]
    if not request.echo:
        return ""
    return given if isinstance(given, str) else prompt.text


def echoed_tokens(
    index: int,
    prompt: Prompt,
    logprobs: Sequence[TokenLogprobs | None] | None,
    request: GenerateRequest,
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """The tokens of `echoed_text`, without the BOS that a text got, and their entries."""
    if not request.echo:
        return [], []
    ids, entries = prompt.ids.tolist(), list(logprobs or [])
    skipped = 0
    if isinstance(request.inputs[index // request.choices], str):
        skipped = len(ids) - len(prompt.tokenizer.without_bos(ids))
    return ids[skipped:], entries[skipped:]


def completion_choice(index: int, output: Output, request: GenerateRequest) -> dict[str, Any]:
    begun = echoed_text(index, output.prompt, request)
    text = "" if request.discard else output.text
    logprobs = None
    if request.logprobs:
        ids, entries = echoed_tokens(index, output.prompt, output.prompt_logprobs, request)
        if not request.discard:
            ids, entries = ids + output.ids.tolist(), entries + list(output.logprobs or [])
        logprobs = completion_logprobs(ids, entries, request.top_logprobs, output.prompt.tokenizer)
    return {
        "index": index,
        "text": begun + text,
        "logprobs": logprobs,
        "finish_reason": "length" if request.discard else output.finish_reason,
        **extras(output),
    }


def completion_logprobs(
    ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    top: int,
    tokenizer: Tokenizer,
    offset: int = 0,
) -> dict[str, Any]:
    """Four lists with one entry a token; the first of a prompt has no log-probability."""
    tokens, values, tops, offsets = [], [], [], []
    for id, entry in zip(ids, logprobs, strict=True):
        text = token_text(id, tokenizer)[0]
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        values.append(None if entry is None else _finite(entry[0]))
        tops.append(
            None
            if entry is None
            else {token_text(i, tokenizer)[0]: _finite(value) for i, value in entry[1][:top]}
        )
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }
