"""gemloupe on a Ray cluster (`pip install gemloupe[ray]`): datasets through workers, and Serve.

    import ray
    from gemloupe.integrations.ray import Generator

    prompts = ray.data.read_json("prompts.jsonl")  # {"prompt": …} or {"messages": […]}
    answers = prompts.map_batches(
        Generator,
        fn_constructor_kwargs={"source": "./e2b-int4", "max_new_tokens": 64, "temperature": 0},
        batch_size=32, num_cpus=8, concurrency=4,
    )
    answers.write_parquet("answers")

Every worker maps the files of a packed folder (`gemloupe convert`): those of one machine share its
pages, so that a second worker costs caches and buffers, not weights.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.batching import MAX_ROWS, generate_all, new_scheduler
from gemloupe.errors import missing_extra, one_of, quoted
from gemloupe.generation import Row, make_rows
from gemloupe.model import load
from gemloupe.output import Output

if TYPE_CHECKING:
    from gemloupe.serving.command import Options

_INPUTS = ("messages", "prompt")


class Generator:
    """Generates for the rows of a dataset: a callable class for `Dataset.map_batches`.

    `source`: what `gl.load` takes, on every machine of the cluster; `load`: further arguments of
    `gl.load`, such as {"dtype": "int4"}. `threads` is the worker's num_cpus where `load` does not
    say. A row's input is its column "messages" (a chat) or "prompt" (raw text, or ids), or
    `column`; with `chat` a text is one user message. A column "seed" gives rows their own seeds.
    `capture` and all other arguments are those of `model.generate`. `max_rows` decode at once.

    Adds the columns `text`, `reasoning`, `finish_reason`, `prompt_tokens`, `generated_ids`, and
    for each captured point a tensor column under its name, float32 [prompt + new − 1, …] a row.
    A row that can't be generated raises ValueError, naming its input; with errors="record" its
    text is "", its arrays are empty, and the column `error` says why ("" for the others).

    A worker that dies loses nothing: Ray gives the batches that it had to others. The same rows
    come again where decoding is greedy or has a seed.
    """

    def __init__(
        self,
        source: Any,
        *,
        load: Mapping[str, Any] | None = None,
        column: str | None = None,
        chat: bool = False,
        capture: str | Iterable[str] | Mapping[str, Any] = (),
        errors: str = "raise",
        max_rows: int = MAX_ROWS,
        **arguments: Any,
    ) -> None:
        if errors not in ("raise", "record"):
            raise ValueError(f"errors is {quoted(errors)}; expected 'raise' or 'record'")
        if unknown := [name for name in ("stream", "cache") if name in arguments]:
            raise ValueError(f"{unknown[0]}= makes no sense for the rows of a dataset")
        self.model = _load(source, load)
        self.model.tokenizer.raw_text_warned = True
        self.column = column
        self.chat = chat
        self.errors = errors
        self.max_rows = max_rows
        # One for all batches, which may begin alike.
        self._scheduler = new_scheduler(self.model, max_rows)
        weakref.finalize(self, self._scheduler.close, 1.0)
        self.arguments = {"routing": False, **arguments, "capture": capture}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch (column -> array of rows) with the new columns."""
        inputs = self._inputs(batch)
        seeds = batch.get("seed")

        def rows(index: int) -> list[Row]:
            seed = {} if seeds is None else {"seed": int(seeds[index])}
            return make_rows(self.model, inputs[index], {**self.arguments, **seed})

        jobs = ((index, lambda index=index: rows(index)) for index in range(len(inputs)))
        found: dict[int, Output | Exception] = {}
        for index, outputs in generate_all(
            self.model, jobs, max_rows=self.max_rows, scheduler=self._scheduler
        ):
            if isinstance(outputs, Exception):
                if self.errors == "raise":
                    raise ValueError(f"{quoted(inputs[index])}: {outputs}") from outputs
                found[index] = outputs
            else:
                found[index] = outputs[0]
        return {**batch, **self._columns([found[index] for index in range(len(inputs))])}

    def _inputs(self, batch: Mapping[str, Any]) -> list[Any]:
        wanted = _INPUTS if self.column is None else (self.column,)
        name = next((name for name in wanted if name in batch), None)
        if name is None:
            raise ValueError(f"the rows have {one_of(list(batch))}; expected {one_of(wanted)}")
        return [self._input(value) for value in batch[name]]

    def _input(self, value: Any) -> Any:
        if isinstance(value, str):
            return [{"role": "user", "content": value}] if self.chat else value
        listed = value.tolist() if isinstance(value, np.ndarray) else list(value)
        if listed and isinstance(listed[0], Mapping):
            return [_plain(message) for message in listed]
        return listed

    def _columns(self, found: Sequence[Output | Exception]) -> dict[str, Any]:
        outputs = [each if isinstance(each, Output) else None for each in found]
        columns: dict[str, Any] = {
            "text": np.array([o.text if o else "" for o in outputs], object),
            "reasoning": np.array([o.reasoning if o else "" for o in outputs], object),
            "finish_reason": np.array([o.finish_reason if o else "error" for o in outputs], object),
            "prompt_tokens": np.array([len(o.prompt) if o else 0 for o in outputs], np.int64),
            "generated_ids": _ragged([o.ids if o else np.zeros(0, np.int32) for o in outputs]),
        }
        if self.errors == "record":
            columns["error"] = np.array(
                [str(each) if isinstance(each, Exception) else "" for each in found], object
            )
        names = {name for o in outputs if o for name in o.captured}
        for name in sorted(names):
            arrays = [_array(name, o.captured[name]) if o else None for o in outputs]
            some = next(array for array in arrays if array is not None)
            empty = np.zeros((0, *some.shape[1:]), some.dtype)
            columns[name] = _ragged([empty if array is None else array for array in arrays])
        return columns


def _load(source: Any, arguments: Mapping[str, Any] | None) -> Any:
    given = dict(arguments or {})
    given.setdefault("threads", assigned_threads())
    return load(source, **given)


def assigned_threads() -> int | None:
    """CPUs that Ray has given to this worker; None outside of one."""
    ray = _ray()
    if not ray.is_initialized():
        return None
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU")
    return None if cpus is None else max(1, int(cpus))


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without what Arrow fills in for fields that it lacks."""
    plain = {}
    for name, value in message.items():
        if value is None:
            continue
        value = value.tolist() if isinstance(value, np.ndarray) else value
        if isinstance(value, list):
            value = [_plain(each) if isinstance(each, Mapping) else each for each in value]
        plain[name] = value
    return plain


def _array(name: str, value: Any) -> np.ndarray:
    if isinstance(value, list):
        raise ValueError(
            f"{name} has an array for each pass, which is no column; expected points with a row "
            "for each token, such as attn.z"
        )
    return np.array(value)


def _ragged(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """An array of arrays, whose lengths may differ: a tensor column."""
    column = np.empty(len(arrays), object)
    for index, array in enumerate(arrays):
        column[index] = np.array(array)
    return column


def deployment(source: Any, options: Options | None = None, **ray_options: Any) -> Any:
    """`gemloupe serve` as a Ray Serve application: `serve.run(deployment("./e2b-int4"))`.

    Every replica is a server with its own model, with OpenAI's and Ollama's routes, streams
    included. `options`: a `gemloupe.serving.command.Options` (`host` and `port` are Serve's to
    choose); `ray_options`: of Serve's deployment, such as num_replicas=4,
    ray_actor_options={"num_cpus": 8}. `threads` are the replica's num_cpus unless `options.load`
    says otherwise. Serve sends a replica as many requests as `options.limits` take.
    """
    serve = _serve()
    from gemloupe.serving.command import Options

    options = options or Options()
    limits = options.limits
    given = {
        "name": "gemloupe",
        "max_ongoing_requests": limits.max_rows + limits.max_queue,
        "graceful_shutdown_timeout_s": options.drain + 1,
    }

    def build() -> Any:
        from gemloupe.serving.app import make_app
        from gemloupe.serving.command import make_service

        arguments = {"threads": assigned_threads(), **options.load}
        return make_app(
            make_service(source, dataclasses.replace(options, load=arguments)), options.drain
        )

    replica = serve.ingress(build)()
    return serve.deployment(replica).options(**{**given, **ray_options}).bind()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise missing_extra("ray", "gemloupe.integrations.ray", "ray") from None
    return ray


def _serve() -> Any:
    _ray()
    try:
        from ray import serve
    except ImportError:
        raise missing_extra("ray[serve]", "gemloupe.integrations.ray", "ray") from None
    return serve


__all__ = ["Generator", "assigned_threads", "deployment"]
