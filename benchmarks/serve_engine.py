"""One engine in a process of its own, told what to measure line by line (JSON in, JSON out).

Other programs of this folder start it with the interpreter that has the engine; it needs numpy and
the engine only. Commands, each an object with "op":
    load      engine ("gemloupe", "llama.cpp", "transformers"), path, threads, and options of the
              engine: see the classes. Answers seconds, and what the engine says of itself.
    context   options of the engine's context: see LlamaCpp.
    prefill   ids. Forgets everything before, reads them in one go, and answers seconds.
    decode    ids. Feeds them one by one after what is in the cache; answers seconds of each.
    memory    answers VmHWM, RssAnon, … in bytes.
An operation that fails answers {"error": text}. The process ends with its input.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    """All feed the given ids, whatever they would choose themselves."""

    def about(self) -> dict[str, Any]: ...
    def context(self, **options: Any) -> None: ...
    def prefill(self, ids: list[int]) -> float:
        """Returns seconds until the logits of the last id are there."""

    def decode(self, ids: list[int]) -> list[float]:
        """Returns seconds of each id's pass, logits included."""


class Gemloupe:
    """Options: dtype, kv_dtype, activations, residency, invariant, … as in gemloupe.load.

    huge_pages=False takes 2 MiB pages from the whole process; all_rows=True runs the layers that
    only the last row of a prompt needs on all rows, as a capture of the last layer asks for.
    """

    def __init__(
        self,
        path: str,
        threads: int,
        huge_pages: bool = True,
        all_rows: bool = False,
        **options: Any,
    ) -> None:
        if not huge_pages:
            disable_huge_pages()
        import gemloupe

        self._all_rows = all_rows
        begin = time.perf_counter()
        self._model = gemloupe.load(path, threads=threads, **options)
        self.load_seconds = time.perf_counter() - begin
        self._cache: Any = None
        self._cache_options: dict[str, Any] = {}

    def about(self) -> dict[str, Any]:
        from gemloupe import _core

        core = self._model.core
        return {
            "kv_dtype": self._model.kv_dtype,
            "isa": _core.isa(),
            "versions": {"gemloupe": _core.__version__, "onednn": _core.onednn_version()},
            "copied_bytes": core.copied_bytes,
            "mapped_bytes": core.mapped_bytes,
        }

    def context(self, **options: Any) -> None:
        """Options of Model.new_cache, for every later prompt."""
        self._cache_options = options

    def _hook_points(self) -> dict[str, Any]:
        from gemloupe import hooks

        return hooks.hook_points(self._model.config.text)

    def prefill(self, ids: list[int]) -> float:
        self._cache = self._model.new_cache(**self._cache_options)
        return self._pass(ids)

    def decode(self, ids: list[int]) -> list[float]:
        return [self._pass([token]) for token in ids]

    def _pass(self, ids: list[int]) -> float:
        from gemloupe import _core

        last, chunk = len(ids) - 1, _core.DEFAULT_CHUNK
        taken = _core.Hooks()
        if self._all_rows:
            points = self._hook_points()
            layer = self._model.config.text.num_hidden_layers - 1
            point = points[f"layers.{layer}.resid_post"]
            every = _core.PositionFilter([], 0)
            taken.add_capture(point.index, point.layer, every, False, "", 0)
        begin = time.perf_counter()
        self._model.core.run(ids, self._cache.core, last, last + 1, taken, None, chunk)
        return time.perf_counter() - begin


class LlamaCpp:
    """llama.cpp through llama-cpp-python's bindings of its C functions. Options: repack, adapter (a
    LoRA file)."""

    def __init__(
        self, path: str, threads: int, repack: bool = True, adapter: str | None = None
    ) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = repack
        params.n_gpu_layers = 0
        begin = time.perf_counter()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        self.load_seconds = time.perf_counter() - begin
        if not self._model:
            raise RuntimeError(f"llama.cpp can not load {path}")
        self._adapter = None
        if adapter is not None:
            self._adapter = llama_cpp.llama_adapter_lora_init(self._model, adapter.encode())
            if not self._adapter:
                raise RuntimeError(f"llama.cpp can not load {adapter}")
        self._threads = threads
        self._context: Any = None
        self._position = 0

    def about(self) -> dict[str, Any]:
        info = self._lib.llama_print_system_info().decode()
        return {"versions": {"llama-cpp-python": self._lib.__version__}, "system_info": info}

    def context(
        self,
        n_ctx: int = 1024,
        n_batch: int = 512,
        n_ubatch: int = 512,
        flash_attn: int = -1,
        threads: int | None = None,
    ) -> None:
        """Replaces the context; flash_attn: -1 as llama.cpp decides, 0 off, 1 on."""
        if self._context is not None:
            self._lib.llama_free(self._context)
            self._context = None
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, n_ubatch
        params.n_threads = params.n_threads_batch = threads or self._threads
        params.flash_attn_type = flash_attn
        params.offload_kqv = False
        params.no_perf = True
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp can not make this context")
        if self._adapter is not None:
            adapters = (self._lib.llama_adapter_lora_p_ctypes * 1)(self._adapter)
            scales = (ctypes.c_float * 1)(1.0)
            if self._lib.llama_set_adapters_lora(self._context, adapters, 1, scales):
                raise RuntimeError("llama.cpp does not take the adapter")

    def prefill(self, ids: list[int]) -> float:
        if self._context is None:
            self.context()
        memory = self._lib.llama_get_memory(self._context)
        self._lib.llama_memory_clear(memory, True)
        self._position = 0
        begin = time.perf_counter()
        self._pass(ids)
        return time.perf_counter() - begin

    def decode(self, ids: list[int]) -> list[float]:
        seconds = []
        for token in ids:
            begin = time.perf_counter()
            self._pass([token])
            seconds.append(time.perf_counter() - begin)
        return seconds

    def _pass(self, ids: list[int]) -> None:
        tokens = (self._lib.llama_token * len(ids))(*ids)
        batch = self._lib.llama_batch_get_one(tokens, len(ids))
        failed = self._lib.llama_decode(self._context, batch)
        if failed:
            raise RuntimeError(f"llama_decode answers {failed}")
        self._lib.llama_synchronize(self._context)  # Until the logits are there.
        self._position += len(ids)


class Transformers:
    """The reference's own classes. Options: dtype, attention ("sdpa" or "eager"), adapter (a folder
    of PEFT)."""

    def __init__(
        self,
        path: str,
        threads: int,
        dtype: str = "float32",
        attention: str = "sdpa",
        adapter: str | None = None,
    ) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        config = json.loads((Path(path) / "config.json").read_text())
        model_class = getattr(transformers, config["architectures"][0])
        begin = time.perf_counter()
        self._model = model_class.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=attention
        ).eval()
        if adapter is not None:
            import peft

            self._model = peft.PeftModel.from_pretrained(self._model, adapter).eval()
        self.load_seconds = time.perf_counter() - begin
        self._cache: Any = None

    def about(self) -> dict[str, Any]:
        import torch
        import transformers

        return {"versions": {"transformers": transformers.__version__, "torch": torch.__version__}}

    def context(self, **options: Any) -> None:
        if options:
            raise ValueError(f"transformers has no such options of a context: {options}")

    def prefill(self, ids: list[int]) -> float:
        self._cache = None
        return self._pass(ids)

    def decode(self, ids: list[int]) -> list[float]:
        return [self._pass([token]) for token in ids]

    def _pass(self, ids: list[int]) -> float:
        import torch

        begin = time.perf_counter()
        with torch.inference_mode():
            out = self._model(
                input_ids=torch.tensor([ids]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = out.past_key_values
        return time.perf_counter() - begin


ENGINES = {"gemloupe": Gemloupe, "llama.cpp": LlamaCpp, "transformers": Transformers}


def disable_huge_pages() -> None:
    """For this process, mapped files included; OSError where the kernel refuses."""
    pr_set_thp_disable = 41
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(pr_set_thp_disable, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_THP_DISABLE)")


def memory() -> dict[str, int]:
    """Bytes of this process: VmHWM (peak RSS), RssAnon (its own) and RssFile (mapped files); Rss
    now, and how much of it lies in 2 MiB pages."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "RssAnon", "RssFile"):
            found[name] = int(value.split()[0]) * 1024
    huge = 0
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        if name in ("AnonHugePages", "FilePmdMapped", "ShmemPmdMapped"):
            huge += int(value.split()[0]) * 1024
        elif name == "Rss":
            found["Rss"] = int(value.split()[0]) * 1024
    return {**found, "huge_pages": huge}


class Server:
    """Carries out commands on the one engine that it has loaded."""

    def __init__(self) -> None:
        self._engine: Any = None

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        op = command.pop("op")
        if op == "load":
            # Imports are not part of what loading a model takes.
            self._engine = ENGINES[command.pop("engine")](**command)
            return {"seconds": self._engine.load_seconds, **self._engine.about()}
        if op == "context":
            self._engine.context(**command)
            return {}
        if op == "prefill":
            return {"seconds": self._engine.prefill(command["ids"])}
        if op == "decode":
            return {"seconds": self._engine.decode(command["ids"])}
        if op == "memory":
            return dict(memory())
        raise ValueError(f"op is {op!r}; expected load, context, prefill, decode or memory")


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers commands until the input ends, then ends the process."""
    # Libraries write where they like; only answers go to the real output.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            result = answer(json.loads(line))
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(BrokenPipeError):
            answers.write(json.dumps(result) + "\n")
            answers.flush()
    os._exit(0)  # Freeing a model takes its time, and nobody waits for it.


if __name__ == "__main__":
    serve(Server().answer)
