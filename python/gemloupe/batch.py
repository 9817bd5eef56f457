"""`gl.run_batch`: requests from a JSONL file to answers in another one, resumable at any time.

Every line of the input is a request in OpenAI's form for batches, {"custom_id": …, "body": {…}},
or a plain one, {"prompt": …} or {"messages": […]} with options beside it and an "id" if wanted.
Every request becomes one record, appended and synced to disk when its answer is complete. Beside
the output lies OUT.batch.json: the settings that its records were made with.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from gemloupe import strict_json
from gemloupe.batching import MAX_ROWS, generate_all
from gemloupe.errors import one_of, quoted
from gemloupe.generation import Row, make_rows
from gemloupe.output import Output
from gemloupe.progress import ProgressBar
from gemloupe.serving import openai_format
from gemloupe.serving.chat_request import GenerateRequest, read_chat, read_completion
from gemloupe.serving.failure import ApiError, as_api_error
from gemloupe.serving.fields import parse_body
from gemloupe.serving.limits import Limits

if TYPE_CHECKING:
    from gemloupe.model import Model

_VERSION = 1
_DEFAULT_TOKENS = 256
# 2^64 divided by the golden ratio: what separates the seeds of one request's answers.
_CHOICE_SEED = 0x9E3779B97F4A7C15
_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"
# Defaults that prompts without a chat leave out.
_OF_CHATS = frozenset(
    {"thinking", "thinking_mode", "enable_thinking", "think", "max_thinking_tokens", "tools",
     "reasoning_effort", "chat_template_kwargs", "tool_choice", "max_completion_tokens"}
)  # fmt: skip


@dataclass
class BatchResult:
    """What became of the lines of a batch."""

    done: int = 0
    """Records that this call wrote, those of errors included."""
    failed: int = 0
    """Of these, records of errors."""
    skipped: int = 0
    """Lines whose records an earlier call had written."""
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        speed = self.new_tokens / self.seconds if self.seconds else 0.0
        return (
            f"{self.done} done ({self.failed} of them errors), {self.skipped} were done before; "
            f"{self.prompt_tokens} tokens read, {self.new_tokens} written ({speed:.1f}/s)"
        )


def run_batch(
    model: Model,
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    defaults: Mapping[str, Any] | None = None,
    captures: str | os.PathLike[str] | None = None,
    in_order: bool = False,
    restart: bool = False,
    max_rows: int = MAX_ROWS,
    kv_bytes: int | None = None,
) -> BatchResult:
    """Answers the requests of a JSONL file into another one, `max_rows` at once.

    `defaults`: fields that requests get where they don't have them, such as {"temperature": 0,
    "max_tokens": 64, "capture": ["layers.3.resid_post"]}; `max_tokens` is 256 without. A default
    `seed` counts up with the lines. `captures`: a folder for what requests capture, one safetensors
    file each, named in the record; without it captures stand in the records, in base64.
    Records come in the order in which answers end, or `in_order` of the input. `kv_bytes` bounds
    memory for keys and values (half of what is free where None).

    Where `destination` exists, lines that have a record are skipped, and a last record that was
    cut by a crash is made again; `restart` makes all anew. A line that can't be answered becomes a
    record with an error, and the rest goes on. Ctrl-C drops what is unfinished and is raised.

    ValueError where `destination` was made with another model, other defaults or other lines, or
    another process is writing it; FileNotFoundError. Shows a progress bar on a terminal.
    """
    if os.stat(source) and os.path.exists(destination) and os.path.samefile(source, destination):
        raise ValueError(f"{source} is both input and output; expected two files")
    if os.path.isdir(destination):
        raise IsADirectoryError(f"{destination} is a folder; expected a file for the answers")
    model.tokenizer.raw_text_warned = True  # A prompt beside messages is meant to be raw.
    job = _Batch(model, Path(source), dict(defaults or {}), captures)
    with _Records(Path(destination), job.settings, restart=restart) as records:
        return job.run(records, _Running(in_order, max_rows, kv_bytes))


@dataclass(frozen=True)
class _Running:
    in_order: bool
    max_rows: int
    kv_bytes: int | None


@dataclass
class _Line:
    """One request of the input."""

    number: int
    sha256: str
    id: Any = None
    is_openai: bool = False
    asked: GenerateRequest | None = None
    is_chat: bool = False

    @property
    def origin(self) -> dict[str, Any]:
        return {"line": self.number, "sha256": self.sha256}


class _Records:
    """The output file: records of finished lines, and the settings beside it."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, restart: bool) -> None:
        self._path = path
        self._settings_path = path.with_name(path.name + ".batch.json")
        self._settings = settings
        self._restart = restart
        self._file: IO[bytes] | None = None
        self.done: dict[int, str] = {}
        """Lines that have a record, with the hash of what they were."""

    def __enter__(self) -> _Records:
        self._file = self._path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ValueError(f"{self._path}: another process is writing this batch") from None
        try:
            self._open(self._file)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        assert self._file is not None
        self._file.close()

    def _open(self, file: IO[bytes]) -> None:
        size = os.fstat(file.fileno()).st_size
        if self._restart:
            file.truncate(0)
        elif size:
            self._check_settings()
            self._read(file)
            return
        temporary = self._settings_path.with_name(f".{self._settings_path.name}-{os.getpid()}")
        temporary.write_text(json.dumps(self._settings, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._settings_path)

    def _check_settings(self) -> None:
        if not self._settings_path.is_file():
            raise ValueError(
                f"{self._path} is there already, without {self._settings_path.name}: no batch that "
                "can be continued; expected another output, or a restart (--restart)"
            )
        before = strict_json.read_object(self._settings_path)
        for name, value in self._settings.items():
            # As JSON has it: what was given as a tuple is a list.
            now = json.loads(json.dumps(value))
            if name != "gemloupe" and before.get(name) != now:
                was, is_ = quoted(before.get(name)), quoted(now)
                if name == "fingerprint":
                    was, is_ = "another", "not that one"
                raise ValueError(
                    f"{self._path} was made with {name} {was}, and this is {is_}; expected the "
                    "same settings, another output, or a restart (--restart)"
                )

    def _read(self, file: IO[bytes]) -> None:
        file.seek(0)
        end = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break  # Cut by a crash.
            try:
                origin = json.loads(line)["input"]
                self.done[int(origin["line"])] = str(origin["sha256"])
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{self._path}: line {number} is no record of a batch; expected those that "
                    "this command wrote, or a restart (--restart)"
                ) from None
            end += len(line)
        file.truncate(end)

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one record; it survives whatever comes after."""
        assert self._file is not None
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@dataclass
class _Batch:
    model: Model
    source: Path
    defaults: dict[str, Any]
    captures: str | os.PathLike[str] | None
    result: BatchResult = field(default_factory=BatchResult)

    def __post_init__(self) -> None:
        limit = self.model.config.text.max_position_embeddings
        self._limits = Limits(max_new_tokens=limit, max_schema=1 << 30, max_body=1 << 40)
        known = {"model", "messages", "prompt", "custom_id", "id", "stream"}
        if wrong := known & self.defaults.keys():
            raise ValueError(f"defaults has {one_of(sorted(wrong))}, which each line says itself")
        self.defaults.setdefault("max_tokens", _DEFAULT_TOKENS)
        # What is wrong with them is said at once, not in every record.
        probe = {**self.defaults, "messages": [{"role": "user", "content": "Hi"}]}
        try:
            asked = read_chat(probe, self._limits)
            self._rows(asked, 0)
        except ApiError as error:
            raise ValueError(f"defaults: {error}") from None
        if self.captures is not None:
            Path(self.captures).mkdir(parents=True, exist_ok=True)

    @property
    def settings(self) -> dict[str, Any]:
        """What records depend on, and the version that made them."""
        from gemloupe import __version__

        model = self.model
        adapters = model.list_adapters()
        return {
            "version": _VERSION,
            "gemloupe": __version__,
            "fingerprint": hashlib.sha256(model.fingerprint.encode()).hexdigest(),
            "dtype": model.dtype,
            "kv_dtype": model.kv_dtype,
            "adapters": dict(zip(adapters["name"], map(float, adapters["scale"]), strict=True)),
            "active_adapters": dict(model.adapters.default),
            "defaults": self.defaults,
            "captures": self.captures is not None,
        }

    def run(self, records: _Records, running: _Running) -> BatchResult:
        began = time.monotonic()
        result = self.result
        order: list[int] = []
        held: dict[int, dict[str, Any]] = {}

        def jobs() -> Iterator[tuple[_Line, Any]]:
            for line, body in self._lines(records.done):
                order.append(line.number)
                yield line, lambda line=line, body=body: self._prepare(line, body)

        def advance(count: int) -> None:
            result.new_tokens += count
            show()

        def show() -> None:
            speed = result.new_tokens / max(1e-9, time.monotonic() - began)
            bar.count(result.done + result.skipped, f"{speed:.1f} tokens/s")

        total = _count_lines(self.source)
        with ProgressBar("batch", counted="requests", total=total) as bar:
            answers = generate_all(
                self.model,
                jobs(),
                max_rows=running.max_rows,
                kv_bytes=running.kv_bytes,
                advance=advance,
            )
            with contextlib.closing(answers):
                for line, outputs in answers:
                    held[line.number] = self._record(line, outputs)
                    ready = [line.number]
                    if running.in_order:
                        ready = []
                        while order and order[0] in held:
                            ready.append(order.pop(0))
                    for number in ready:
                        records.append(held.pop(number))
                        result.done += 1
                        show()
        result.seconds = time.monotonic() - began
        return result

    def _lines(self, done: Mapping[int, str]) -> Iterator[tuple[_Line, Any]]:
        """(line, its JSON object or what is wrong with it) of lines without a record."""
        first: dict[Any, int] = {}
        with self.source.open("rb") as file:
            for number, data in enumerate(file, 1):
                if number == 1:  # Editors of other systems begin files with it.
                    data = data.removeprefix(codecs.BOM_UTF8)
                if not data.strip():
                    continue
                line = _Line(number, hashlib.sha256(data.strip()).hexdigest()[:16])
                body: Any
                try:
                    body = parse_body(data)
                except ApiError as error:
                    body = ApiError(400, f"line {number}: {error}", code="invalid_json_line")
                else:
                    line.is_openai = "body" in body
                    line.id = body.get("custom_id") if line.is_openai else body.get("id")
                    if isinstance(line.id, (str, int)):
                        same = first.setdefault(line.id, number)
                        if same != number:
                            body = ApiError(
                                400,
                                f"line {number} has the id {quoted(line.id)} of line {same}",
                                code="duplicate_id",
                            )
                if (was := done.get(number)) is not None:
                    if was != line.sha256:
                        raise ValueError(
                            f"{self.source}: line {number} is another one than when its record was "
                            "written; expected the same lines, with new ones at the end, or a "
                            "restart (--restart)"
                        )
                    self.result.skipped += 1
                    continue
                yield line, body

    def _prepare(self, line: _Line, body: Any) -> list[Row]:
        """The rows of a line. ApiError and the like for a line that can't be answered."""
        if isinstance(body, ApiError):
            raise body
        if line.is_openai:
            fields, url = body["body"], body.get("url")
            if not isinstance(fields, dict):
                raise ApiError(400, f"body is {quoted(fields)}; expected an object", param="body")
            if url not in (None, _CHAT, _COMPLETION):
                raise ApiError(
                    400, f"url is {quoted(url)}; expected {one_of([_CHAT, _COMPLETION])}",
                    param="url",
                )  # fmt: skip
            line.is_chat = "messages" in fields if url is None else url == _CHAT
        else:
            fields = {name: value for name, value in body.items() if name != "id"}
            if "max_new_tokens" in fields:
                fields["max_tokens"] = fields.pop("max_new_tokens")
            line.is_chat = "messages" in fields
            if ("prompt" in fields) == line.is_chat:
                raise ApiError(400, 'expected one of "prompt" and "messages"')
        fields = {name: value for name, value in fields.items() if value is not None}
        read = read_chat if line.is_chat else read_completion
        ignored = () if line.is_chat else _OF_CHATS
        defaults = {name: value for name, value in self.defaults.items() if name not in ignored}
        line.asked = read({**defaults, **fields}, self._limits)
        if line.asked.stream:
            raise ApiError(400, "stream is true; a batch has complete answers", param="stream")
        if not line.is_openai and len(line.asked.inputs) * line.asked.choices > 1:
            raise ApiError(400, "a plain line has one answer; use custom_id and body for more")
        if "seed" not in fields and line.asked.seed is not None:
            line.asked.seed = (line.asked.seed + line.number) % 2**63
        return self._rows(line.asked, line.number)

    def _rows(self, asked: GenerateRequest, number: int) -> list[Row]:
        arguments = dict(asked.arguments)
        if arguments.get("adapter") == "base":
            arguments["adapter"] = {}
        tools = None if arguments.get("tool_choice") == "none" else arguments.get("tools")
        rows = []
        for index, given in enumerate(asked.inputs):
            prompt = self.model.prepare(
                given, thinking=arguments.get("thinking", False), tools=tools
            )
            for choice in range(asked.choices):
                seed = asked.seed
                if seed is not None:
                    seed = (seed + (index * asked.choices + choice) * _CHOICE_SEED) % 2**63
                rows.append(make_rows(self.model, prompt, {**arguments, "seed": seed})[0])
        return rows

    def _record(self, line: _Line, outputs: list[Output] | Exception) -> dict[str, Any]:
        origin = {"input": line.origin}
        if isinstance(outputs, Exception):
            self.result.failed += 1
            return {**_error_record(line, outputs), **origin}
        assert line.asked is not None
        files = [self._save(line, index, output) for index, output in enumerate(outputs)]
        named = {"captures": files[0] if len(files) == 1 else files} if any(files) else {}
        usage = openai_format.usage(outputs, line.asked.choices, line.asked.discard)
        self.result.prompt_tokens += usage["prompt_tokens"]
        if line.is_openai:
            body = _openai_body(line.asked, outputs, usage, is_chat=line.is_chat)
            response = {"status_code": 200, "request_id": uuid.uuid4().hex, "body": body}
            record = {**_head(line), "response": response, "error": None}
        else:
            record = {"id": line.id, **_plain(line.asked, outputs[0], usage)}
        return {**record, **named, **origin}

    def _save(self, line: _Line, index: int, output: Output) -> str | None:
        """Moves what an output captured to a file and returns its name."""
        if self.captures is None or not (output.captured or output.routing is not None):
            return None
        from safetensors.numpy import save

        arrays: dict[str, np.ndarray] = {"ids": np.concatenate([output.prompt.ids, output.ids])}
        for name, value in output.captured.items():
            parts = {f"{name}.{i}": part for i, part in enumerate(value)}
            arrays |= parts if isinstance(value, list) else {name: value}
        if output.routing is not None:
            trace = output.routing
            arrays |= {"routing.experts": trace.experts, "routing.weights": trace.weights}
        output.captured, output.routing = {}, None
        name = f"{line.number:08d}" + (f"-{index}" if index else "") + ".safetensors"
        path = Path(self.captures) / name
        temporary = path.with_name(f".{name}-{os.getpid()}")
        with temporary.open("wb") as file:
            file.write(save({key: np.ascontiguousarray(array) for key, array in arrays.items()}))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        return name


def _head(line: _Line) -> dict[str, Any]:
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.id}


def _error_record(line: _Line, error: Exception) -> dict[str, Any]:
    known = as_api_error(error)
    if known.status == 500:  # The file is the user's own: nothing is hidden from them.
        known = ApiError(500, f"{type(error).__name__}: {' '.join(str(error).split())}")
    if line.is_openai:
        response = {
            "status_code": known.status,
            "request_id": uuid.uuid4().hex,
            "body": known.body,
        }
        return {**_head(line), "response": response, "error": None}
    return {"id": line.id, "error": known.body["error"]}


def _openai_body(
    asked: GenerateRequest, outputs: Sequence[Output], usage: Mapping[str, int], *, is_chat: bool
) -> dict[str, Any]:
    make = openai_format.chat_choice if is_chat else openai_format.completion_choice
    body: dict[str, Any] = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": asked.model,
        "choices": [make(index, output, asked) for index, output in enumerate(outputs)],
        "usage": dict(usage),
    }
    if asked.warnings:
        body["warnings"] = asked.warnings
    return body


def _plain(asked: GenerateRequest, output: Output, usage: Mapping[str, int]) -> dict[str, Any]:
    record: dict[str, Any] = {"text": output.text}
    if output.reasoning:
        record["reasoning"] = output.reasoning
    if output.tool_calls:
        record["tool_calls"] = [openai_format.call_json(call) for call in output.tool_calls]
    record["finish_reason"] = output.finish_reason
    record["usage"] = dict(usage)
    if asked.logprobs:
        record["logprobs"] = openai_format.chat_logprobs(
            output.ids.tolist(),
            output.logprobs or [],
            asked.top_logprobs,
            output.prompt.tokenizer,
        )["content"]
    record |= openai_format.extras(output)
    if asked.warnings:
        record["warnings"] = asked.warnings
    return record


def _count_lines(path: Path) -> int | None:
    """Lines that hold something; None for what can be read only once."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())
