"""The model: a checkpoint's weights in the engine, with its tokenizer and configs."""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, overload

import numpy as np

from gemloupe import _core, cache_file, generation, recipe, routing, sizes, towers
from gemloupe import drafter as _drafter
from gemloupe import inspect as _inspect
from gemloupe import override as _override
from gemloupe import run as _run
from gemloupe.adapters import Adapter
from gemloupe.adapters.loading import weights_of
from gemloupe.adapters.registry import Adapters
from gemloupe.adapters.selection import Selection
from gemloupe.arrays import as_float32
from gemloupe.cache import KvCache
from gemloupe.checkpoint import Checkpoint, open_checkpoint
from gemloupe.config import ModelConfig, TextConfig
from gemloupe.drafter import Drafter, PromptLookup
from gemloupe.embed_scale import embed_scale
from gemloupe.errors import did_you_mean, does_not_fit, format_bytes, one_of, quoted
from gemloupe.media import Content, Reader, SoftTokens
from gemloupe.media.audio_tower import (
    AudioStream,
    AudioTower,
    encode_audio,
    open_tower,
    read_audio,
)
from gemloupe.media.images import default_budget
from gemloupe.media.listening import ListeningStream
from gemloupe.media.vision import Vision
from gemloupe.output import Output
from gemloupe.prefix_cache import PrefixCache
from gemloupe.progress import ProgressBar
from gemloupe.prompt import Prompt, prepare
from gemloupe.safetensors_header import TensorInfo
from gemloupe.stream import Stream
from gemloupe.table import Table, facts_html
from gemloupe.tokenizer import Tokenizer
from gemloupe.vision_config import read_vision_config
from gemloupe.weights import Weights

KV_DTYPES = ("auto", "float32", "float16", "bfloat16", "int8")
# Conversions of more weights than this show a progress bar.
_BAR_BYTES = 1 << 30


def load(
    source: str | os.PathLike[str],
    dtype: str | Mapping[str, str] = "auto",
    *,
    threads: int | None = None,
    kv_dtype: str = "auto",
    max_memory: int | None = None,
    residency: str = "mapped",
    activations: str = "auto",
    adapter: Any = None,
    invariant: bool | None = None,
    embed_scale: str = "auto",
    mmproj: str | os.PathLike[str] | None = "auto",
) -> Model:
    """Loads a checkpoint: a folder, a GGUF file, a hub id, or "demo:edge", "demo:moe", …

    `dtype`: "auto" (as stored), "float32", "bfloat16", "int8" or "int4". It is the weights';
    activations are float32. Files are mapped: only what is not stored in the wanted dtype is
    converted, on all threads, into a private copy ("float32" reads narrower weights exactly as
    they are stored). `gemloupe.recipe` says which tensors keep more bits under "int8" and "int4";
    a mapping overrides it by name pattern, and a later pattern wins:
    {"default": "int4", "*.mlp.down_proj.weight": "int8"}. A folder that `gemloupe convert` wrote
    is loaded with "auto". On CPUs with bfloat16 products, long prefills of "auto" and "bfloat16"
    round activations too; "float32" never does.
    `activations`: products with quantised weights round activations to int8 in groups of 32 (a
    hundredth of what int4 weights lose, about as much as int8 weights lose); "float32" rounds
    none, in no product, and is slower. `residency`: weights stay "mapped" from the file, or are
    copied into private 2 MiB pages ("resident").
    `threads`: None for every CPU that this process may use. `kv_dtype`: "auto" is float32 with
    dtype "float32", else float16; also "bfloat16" and "int8". `max_memory`: most bytes that the
    process may take (its peak, page cache not counted): what does not fit is refused, but for the
    experts of a checkpoint that is stored in the wanted dtype, which are then read from disk on
    demand (`expert_cache`).
    `invariant=True` (or GEMLOUPE_INVARIANT=1): a row's bits do not depend on batch, chunk or
    threads. `embed_scale`: √hidden_size as "float32" or rounded to "bfloat16", as a reference in
    that dtype holds it; "auto" follows dtype.
    `mmproj`: llama.cpp's file of the vision and audio parts of a GGUF model; "auto" takes the only
    `mmproj-*.gguf` beside the model (with a warning and no towers where it does not fit), None
    none. Its weights run as they are stored, quantised matrices as float32.

    While a model is in use its files may be replaced (by renaming), not rewritten in place: the
    engine reads them all the time, and a file cut short ends the process.

    Raises FileNotFoundError, ValueError (naming file, tensor or field, got and expected),
    ConnectionError (hub out of reach) and MemoryError (with the figures, before allocating).
    """
    recipe.check(dtype)
    _check_choice("kv_dtype", kv_dtype, KV_DTYPES)
    _check_choice("residency", residency, ("mapped", "resident"))
    _check_choice("activations", activations, ("auto", "float32"))
    _check_choice("embed_scale", embed_scale, ("auto", "float32", "bfloat16"))
    threads = check_threads(threads)
    _check_max_memory(max_memory)
    checkpoint = open_checkpoint(source, mmproj=mmproj)
    made = checkpoint.provenance
    preset = recipe.name_of(dtype if made is None else made.recipe)
    targets = sizes.weight_targets(checkpoint, dtype)
    options = _core.TextModelOptions()
    options.bfloat16_matmul = preset != "float32" and activations == "auto"
    options.float32_activations = activations == "float32"
    options.round_embed_scale = rounds_scale(preset, embed_scale, checkpoint)
    asked = os.environ.get("GEMLOUPE_INVARIANT") == "1"
    options.invariant = asked if invariant is None else invariant
    options.threads = threads
    if kv_dtype == "auto":
        kv_dtype = "float32" if preset == "float32" else "float16"
    options.kv_dtype = kv_dtype
    options.expert_memory = _expert_memory(checkpoint, dtype, residency, max_memory, targets)
    weights = stored_weights(checkpoint, targets)
    weights.set_resident(residency == "resident")
    with _load_bar(checkpoint, targets, residency) as bar:
        core = _core.TextModel(core_config(checkpoint.config.text), weights, options, bar.show)
    model = Model(core, checkpoint, preset, kv_dtype, options)
    for path, weight in weights_of(adapter).items():
        model.adapters.default[model.load_adapter(path).name] = weight
    return model


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise ValueError(f"{name} is {value!r}; expected {one_of(choices)}. {hint}".rstrip())


def _check_max_memory(max_memory: int | None) -> None:
    is_count = isinstance(max_memory, int) and not isinstance(max_memory, bool) and max_memory > 0
    if max_memory is not None and not is_count:
        raise ValueError(
            f"max_memory is {quoted(max_memory)}; expected None or a number of bytes above 0, "
            "such as 8 * 2**30"
        )


def check_threads(threads: int | None) -> int:
    """Returns the engine's number of threads: 0 for all; ValueError for what is no number."""
    if threads is None:
        return 0
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise ValueError(f"threads is {threads!r}; expected None (all CPUs) or 1 to 1024")
    return threads


def rounds_scale(preset: str, embed_scale: str, checkpoint: Checkpoint) -> bool:
    """Whether √hidden_size is rounded to bfloat16, as `load`'s embed_scale says."""
    if embed_scale != "auto":
        return embed_scale == "bfloat16"
    if checkpoint.provenance is not None:
        return checkpoint.provenance.embed_scale == "bfloat16"
    if checkpoint.is_gguf:
        return False
    stored = checkpoint.dtype if preset == "auto" else preset
    return stored != "float32"


def stored_weights(
    checkpoint: Checkpoint, targets: Mapping[str, str], *, full_names: bool = False
) -> _core.Weights:
    """The text decoder's tensors for the engine, to be converted to `targets`.

    Under their names without prefix, or with `full_names` under those of the files.
    """
    prefix = checkpoint.prefix if full_names else ""
    files: dict[int, list[_core.TensorEntry]] = {}
    weights = _core.Weights()
    paths = [str(path) for path in checkpoint.files]
    for name, tensor in checkpoint.text_tensors.items():
        if tensor.pair is None:
            entry = _core.TensorEntry(
                prefix + name, tensor.dtype, list(tensor.shape), tensor.begin, tensor.end
            )
            files.setdefault(tensor.file, []).append(entry)
        else:
            (packed_file, packed), (scale_file, scale) = tensor.pair.packed, tensor.pair.scale
            weights.add_pack_quantized(
                prefix + name, list(tensor.shape),
                paths[packed_file], _entry(packed), paths[scale_file], _entry(scale),
            )  # fmt: skip
    for file, entries in files.items():
        weights.add_file(paths[file], entries)
    for name, target in targets.items():
        if target != checkpoint.text_tensors[name].dtype:
            weights.set_target(prefix + name, target)
    return weights


def _entry(info: TensorInfo) -> _core.TensorEntry:
    return _core.TensorEntry(info.name, info.dtype, list(info.shape), info.begin, info.end)


def _expert_memory(
    checkpoint: Checkpoint,
    dtype: str | Mapping[str, str],
    residency: str,
    max_memory: int | None,
    targets: Mapping[str, str],
) -> int:
    """Returns bytes for experts to be read on demand; 0 where the whole model stays in memory.

    Mapped weights count as memory: one that is not in memory is read from disk for every token. Of
    the per-layer embedding table only a few rows are. MemoryError where the model does not fit.
    """
    text = checkpoint.config.text
    weights = sizes.resident_bytes(checkpoint, dtype, residency)
    available = _core.available_memory()
    beside = 0
    if max_memory is not None:
        # What the process has already, and what a pass and a cache of some thousand tokens need.
        context = min(4096, text.max_position_embeddings)
        beside = _resident_set() + sizes.scratch_bytes(text, _core.DEFAULT_CHUNK)
        beside += sizes.kv_allocated(text, context, "float16", _core.DEFAULT_CHUNK)
        available = max_memory
    if weights + beside <= available:
        return 0
    stored = all(
        targets.get(name, tensor.dtype) == tensor.dtype
        for name, tensor in checkpoint.text_tensors.items()
        if ".experts." in name
    )
    experts = sizes.expert_bytes(checkpoint)
    if max_memory is not None and experts and stored and residency == "mapped":
        of_one = experts // (text.num_experts * sum(layer.has_experts for layer in text.layers))
        beside += weights - experts
        weights = text.top_k_experts * of_one  # The least that a token needs.
        if weights + beside <= available:
            return available - beside
    needed = weights + beside
    alternatives = []
    if checkpoint.provenance is None:
        for name in ("bfloat16", "int8", "int4"):
            smaller = sizes.resident_bytes(checkpoint, name)
            if smaller < needed and smaller <= available:
                alternatives.append((f'dtype="{name}"', smaller))
    label = checkpoint.dtype if dtype == "auto" else recipe.name_of(dtype)
    what = f"{checkpoint.source}: the model in {label}"
    if max_memory is not None and not alternatives:
        raise MemoryError(
            f"{what} needs {format_bytes(needed)} of memory, the process included; max_memory is "
            f"{format_bytes(max_memory)}. Raise it, or load a smaller model."
        )
    raise does_not_fit(what, needed, available, alternatives)


def _resident_set() -> int:
    """Returns the bytes of memory that this process has now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # No /proc: count a plain interpreter with NumPy.
        return 64 << 20


def _load_bar(checkpoint: Checkpoint, targets: Mapping[str, str], residency: str) -> ProgressBar:
    converted = sum(
        tensor.nbytes
        for name, tensor in checkpoint.text_tensors.items()
        if residency == "resident" or targets.get(name, tensor.dtype) != tensor.dtype
    )
    return ProgressBar("loading weights", shown=converted > _BAR_BYTES)


def core_config(config: TextConfig) -> _core.TextConfig:
    """The engine's copy of a text config: the same fields under the same names."""
    core = _core.TextConfig()
    layers = []
    for layer in config.layers:
        core_layer = _core.LayerConfig()
        for field in dataclasses.fields(layer):
            setattr(core_layer, field.name, getattr(layer, field.name))
        layers.append(core_layer)
    for field in dataclasses.fields(config):
        if field.name not in ("layers", "sliding_window"):
            setattr(core, field.name, getattr(config, field.name))
    core.layers = layers
    return core


class Model:
    """A Gemma 4 model, made by `load`. Threads may share one: their passes take turns."""

    def __init__(
        self,
        core: _core.TextModel,
        checkpoint: Checkpoint,
        dtype: str,
        kv_dtype: str,
        options: _core.TextModelOptions,
    ) -> None:
        self._core = core
        self.adapters = Adapters(self)
        """The adapters that are loaded, by name; see `load_adapter`."""
        self.embed_scale = "bfloat16" if options.round_embed_scale else "float32"
        """The dtype that √hidden_size is rounded to."""
        self.checkpoint = checkpoint
        self.dtype = checkpoint.dtype if dtype == "auto" else dtype
        self.kv_dtype = kv_dtype
        self._options = options
        self._tokenizer = checkpoint.new_tokenizer()
        self._drafters: dict[str, Drafter] = {}
        self._prefix_caches: weakref.WeakSet[PrefixCache] = weakref.WeakSet()
        self._prefix_lock = threading.Lock()

    @property
    def core(self) -> _core.TextModel:
        """The engine's model: what `override` put in its place, inside its block."""
        entry = _override.active(self)
        return self._core if entry is None else entry.core

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's config.json, checked; `config.text` is the decoder's part."""
        return self.checkpoint.config

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The checkpoint's generation_config.json."""
        return self.checkpoint.generation_config

    @property
    def tokenizer(self) -> Tokenizer:
        """Reads tokenizer.json when text is first encoded or decoded; ids never need it."""
        return self._tokenizer

    @property
    def weights(self) -> Weights:
        """The tensors by name as float32, dequantised on demand; see `gemloupe.weights.Weights`.

        Inside a block of `override`, with what it put in their place.
        """
        return Weights(self.core, self.checkpoint)

    @property
    def loaded_weights(self) -> Weights:
        """The tensors as they were loaded, whatever is overridden."""
        return Weights(self._core, self.checkpoint)

    def override(
        self, weights: Mapping[str, Any], *, dtype: str = "float32"
    ) -> AbstractContextManager[None]:
        """Runs the model with other weights inside a with block.

        with model.override({"layers.3.mlp.down_proj.weight": changed}):
            run = model.run(x)

        `weights`: checkpoint names, with or without the files' prefix, to arrays of the whole
        tensor's shape: any tensor of the text decoder, norms, scales, embeddings, experts. Blocks
        nest: an inner one adds to the outer one's. Every call that begins inside the block has
        them, in this thread (or task) only; `model.weights` shows them; after the block, also when
        it raises, the model's own bits are back. A DoRA adapter keeps the gains it has for the
        model's own weights.
        Matrices are held in `dtype`, "float32", "bfloat16" or "float16", whatever the model's, so
        that float32 values are used as they are; activations that they multiply are not rounded.
        A cache that was filled under other weights warns, as under other adapters.
        ValueError listing unknown names (with close matches) and wrong shapes; TypeError for what
        is no array; MemoryError; RuntimeError while an adapter is merged, and for models whose
        experts are read from disk (`max_memory`).
        """
        return _override.overriding(self, weights, dtype)

    @property
    def expert_cache(self) -> Mapping[str, int] | None:
        """Experts that can be held at once, and how many were found or read since loading.

        None where all experts are in memory (`max_memory` was large enough, or not given).
        """
        return self.core.expert_cache

    @property
    def threads(self) -> int:
        """Threads of a pass, the calling one included."""
        return self.core.threads

    def prepare(
        self,
        x: Any,
        *,
        images: Any = None,
        audio: Any = None,
        videos: Any = None,
        max_soft_tokens: int | Sequence[int | None] | None = None,
        tools: Sequence[Any] | None = None,
        thinking: bool = False,
        bos: bool | str = "auto",
    ) -> Any:
        """Turns `x` into a `Prompt` (a batch into a list), as `run` and `generate` do.

        A str is raw text (one BOS, no template), a list of dicts one chat (template), a list of
        ints or a 1-D array ids, taken as given. `bos=False` begins with none.

        `images`, `audio`, `videos`: one, or a list in the order of the placeholders (<|image|>,
        <|audio|>, <|video|>) in the text, or of the messages' parts ({"type": "image"}; a part may
        bring its own: {"type": "image", "image": …}). Soft tokens [n, D] may stand for an image or
        a sound. Ids hold runs of n placeholder ids already. In a batch, a list of one entry a row.
        ValueError naming both counts where they differ. `max_soft_tokens`: 70, 140, 280, 560
        or 1120, of every image, or a list of one number an image of `images`; a part may say its
        own. None is the checkpoint's default, 280 for the released ones.

        A call encodes images and sounds under its own adapters: its result's `.prompt` has them so,
        a prompt that no call has read has them under none.
        """
        return prepare(
            x,
            self.tokenizer,
            self.config,
            thinking=thinking,
            tools=tools,
            bos=bos,
            images=images,
            audio=audio,
            videos=videos,
            max_soft_tokens=max_soft_tokens,
            reader=self.media_reader,
        )

    def run(self, x: Any, **arguments: Any) -> Any:
        """Runs the model over `x` and returns a `Run` (a batch: a list of them).

        `x`: see `prepare`. Keyword arguments:
        cache: a `KvCache` to append to (a list of them for a batch); without one a new cache.
            If the call raises, the cache is as it was.
        capture: hook points by name or pattern, such as "layers.*.resid_post"; their values are
            `run[name]`. Names of transformers' modules and of TransformerLens's hooks work too. A
            mapping says which positions: {"layers.*.resid_post": gl.at(-1)}. The values are those
            after edits, `gl.before(name)` those before. KeyError with close matches for a pattern
            that matches nothing; MemoryError, before computing, for what will not fit.
        edit: a mapping from hook points to changes (`gl.edits`, an array, or a function fn(x) or
            fn(x, at), see `gl.edits.function`; a list of them), or a list of mappings; they apply
            in the order written, and later computation uses the edited values. In a batch, a list
            is one entry a row. Nothing remains after the call.
        check_finite: ValueError for edits that write NaN or infinity.
        routing: "full" gives `run.routing` everything that the routers computed, "experts" the
            experts and their weights, False nothing; "full" unless a run is repeated.
        adapter: the name of an adapter, an `Adapter`, {"a": 0.5, "b": 0.5} for several with
            weights, {} for none, or None for those that are active (`set_adapter`); in a batch
            also a list, one entry a row. A run that is repeated keeps its adapters.
        keep: hold what `model.run(this_run, edit=…)` begins from: that repeats the input with
            edits, but computes only the layers and positions that they, captures and logits reach.
        logits: "last" ([1, V]), "all" ([T, V]), None, or a slice of the rows of `x`; in a batch
            also a list, one entry a row.
        vocab: ids: these columns of logits alone, in this order ([n, len(vocab)]).
        targets: "next", or one id for each row of `x` (-1 for none; in a batch a list of these):
            `run.logprobs` [T] is ln p of each row's target and `run.entropy` [T] the entropy of
            what it predicts, both in nats and after the soft-cap. With "next", logprobs[t] is of
            the id that follows row t: that of the last row is nan, and so is that of a row before
            a soft token. Logits are computed in blocks of 64 rows: with neither logits="all" nor a
            capture of them, [T, V] is never held.
        softcap: "config", a number, or None for uncapped logits.
        thinking, bos, images, audio, videos, max_soft_tokens: as in `prepare`.
        chunk: tokens of one pass; 512 by default. Images that see themselves whole are not cut.
        """
        return _run.run(self, x, **arguments)

    def generate(self, x: Any, **arguments: Any) -> Output | list[Output] | Stream:
        """Continues `x`; see `gemloupe.generation.generate` for the arguments."""
        return generation.generate(self, x, **arguments)

    def chat(self, message: Any, **arguments: Any) -> Output | list[Output] | Stream:
        """Generates the answer to one user message, or to a list of messages."""
        return generation.chat(self, message, **arguments)

    def load_adapter(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        scale: float = 1.0,
        strict: bool = False,
        *,
        dtype: str = "auto",
    ) -> Adapter:
        """Loads a LoRA adapter that PEFT saved; calls run under it with adapter=name.

        a = model.load_adapter("my-adapter")
        print(a.report())
        model.chat("Hi", adapter="my-adapter")

        `path`: a folder with adapter_config.json and adapter_model.safetensors, or a hub id.
        `name`: the folder's own where left out. `scale` multiplies all its changes. It works
        beside weights of any dtype, which stay as they are; several models of one process that
        load the same adapter share it, and calls in other threads go on meanwhile. `dtype`: how A
        and B are held, "float32", "bfloat16" or "float16"; "auto" is as stored, but bfloat16
        beside quantised weights.

        Tensors for keys and values of layers that read those of others, and for vision and audio
        parts that are not loaded, are listed as ignored in `a.report()`; `strict=True` makes them
        errors. Any other tensor that fits no module, an A without B, a wrong shape, another base
        model and options that this version doesn't know are one ValueError that lists them all.
        FileNotFoundError (a trainer's folder: listing its checkpoints), ConnectionError for a hub
        out of reach. After an error the model is as it was.
        """
        return self.adapters.load(path, name, scale, strict, dtype)

    def delete_adapter(self, name: str) -> None:
        """Forgets an adapter; calls that run under it still end. KeyError for an unknown name.

        RuntimeError while it is merged. PEFT's other name for it is `unload_adapter`.
        """
        self.adapters.delete(name)

    unload_adapter = delete_adapter

    def list_adapters(self) -> Table:
        """The loaded adapters as a table: name, scale, modules, MiB, active, from."""
        return self.adapters.table()

    def set_adapter(self, adapter: Any) -> None:
        """Makes adapters active: later calls without adapter= run under them.

        `adapter`: a name, an `Adapter`, a list of these, {"a": 0.5, "b": 0.5}, {} for none, or None
        to go back to what `gl.load(adapter=)` said. It counts in this thread (or task) only, and
        is read when a call begins. KeyError for a name that is not loaded.
        """
        self.adapters.set(adapter)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Calls inside a with block, in this thread (or task), run under no adapter.

        Those that name one with adapter= still do. RuntimeError at a call while one is merged.
        """
        return self.adapters.disabled()

    def merge_adapter(
        self, adapter: str | Adapter, weight: float = 1.0, *, requantize: bool = False
    ) -> Table:
        """Folds an adapter into copies of the weights: every later call has it, at no cost.

        The weights themselves stay as they are: `unmerge_adapter` gives their bits back. In vision
        and audio parts the adapter stays beside the weights, in every call. Merged
        int4 and int8 tensors become int8 with a scale for each row unless `requantize`, which
        keeps their dtype. Returns a table of modules and the relative errors of what is stored,
        ‖stored − (W + ΔW)‖ / ‖W + ΔW‖. RuntimeError where it is merged already; MemoryError.
        """
        return self.adapters.merge(adapter, weight, requantize)

    def unmerge_adapter(
        self, adapter: str | Adapter | None = None, *, requantize: bool = False
    ) -> Table:
        """Takes an adapter, or all of them, out of the weights again; the rest is merged anew."""
        return self.adapters.unmerge(adapter, requantize)

    def routing_stats(
        self, *, coactivation: bool = False
    ) -> AbstractContextManager[routing.RoutingStats]:
        """Counts what the routers choose in every `run` and `generate` inside a with block.

        with model.routing_stats() as stats:
            for prompt in prompts:
                model.generate(prompt)
        print(stats)

        `stats` is a `RoutingStats` (loads and weights of experts; `coactivation` adds pairs) and
        can be read inside the block and after it. A call is counted when it returns, a stream when
        its result is made, if it began inside the block on this model and in this thread (or task).
        Not counted: calls that raise, those with routing=False (as patching grids have), and of
        `model.run(earlier_run, …)` the tokens that are not computed again. ValueError where the
        model has no experts.
        """
        if not any(layer.has_experts for layer in self.config.text.layers):
            raise ValueError(
                f"{quoted(self.checkpoint.source)} has no experts; expected a mixture-of-experts "
                "model, such as 26B-A4B"
            )
        return routing.counting(self, routing.RoutingStats(coactivation=coactivation))

    def new_cache(
        self,
        max_tokens: int | None = None,
        dtype: str | None = None,
        sliding: str = "ring",
        start: int = 0,
        *,
        separate_keys: bool = False,
    ) -> KvCache:
        """An empty KV cache.

        `dtype`: "float32", "float16", "bfloat16", or "int8" (a float32 scale for each head and
        position); None for the model's. `separate_keys=True` stores keys whole even where they
        could be derived from the values (the global layers of 12B, 26B-A4B and 31B).

        `max_tokens`: most tokens it takes; None for the model's maximum. It grows as it is filled:
        only layers with full attention grow beyond their window. `sliding="full"` makes sliding
        layers keep every position too. `start`: position of the first token.
        ValueError beyond the model's maximum; MemoryError, before allocating, if an explicit
        `max_tokens` does not fit.
        """
        _check_choice("sliding", sliding, ("ring", "full"))
        dtype = self.kv_dtype if dtype in (None, "auto") else dtype
        _check_choice("dtype", dtype or "", KV_DTYPES[1:])
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; expected 1 or more, or None")
        return KvCache(
            _core.new_cache(
                self.core,
                max_tokens or 0,
                dtype,
                start,
                sliding == "full",
                _core.DEFAULT_CHUNK,
                separate_keys,
            ),
            self.fingerprint,
        )

    def prefix_cache(self, max_bytes: int = 1 << 30) -> PrefixCache:
        """A store of what prompts begin with, for `generate(..., prefix_cache=)`.

        A later prompt goes on from the longest beginning that it holds, with the bits that it
        would get alone: from any position with int8 and int4 weights and in invariant mode, else
        from multiples of 512. Beyond `max_bytes`, what was used longest ago goes. It belongs to
        this model, and forgets what merged adapters and deleted ones make useless. ValueError
        unless `max_bytes` is an int above 0.
        """
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(
                f"max_bytes is {quoted(max_bytes)}; expected a number of bytes above 0"
            )
        made = PrefixCache(self, max_bytes)
        with self._prefix_lock:
            self._prefix_caches.add(made)
        return made

    def forget_prefixes(self) -> None:
        """Takes out of all prefix caches what the present weights and adapters can't use."""
        with self._prefix_lock:
            caches = [*self._prefix_caches]
        for cache in caches:
            cache.forget()

    @property
    def invariant(self) -> bool:
        """Whether a row's bits never depend on batch, chunk or threads; see `load`."""
        return self._options.invariant

    def unembed(
        self,
        x: Any,
        norm: bool = True,
        softcap: bool = True,
        vocab: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Logits of residual streams x [T, D] (or [D]): float32 [T, V], or [T, n] of `vocab` ids.

        `norm` applies the final norm before, `softcap` the config's soft-cap after; with both, the
        last layer's resid_post gives the model's logits. ValueError for another width.
        """
        rows = as_float32(x, "x")
        if rows.ndim not in (1, 2) or rows.shape[-1] != self.config.text.hidden_size:
            raise ValueError(
                f"unembed: x has shape {list(rows.shape)}; expected [T, "
                f"{self.config.text.hidden_size}] (hidden_size)"
            )
        ids = [] if vocab is None else [int(token) for token in vocab]
        if vocab is not None and not ids:
            return np.zeros((len(np.atleast_2d(rows)), 0), np.float32)
        return self.core.unembed(np.atleast_2d(rows), norm, None if softcap else 0.0, ids)

    @property
    def settings(self) -> dict[str, Any]:
        """What of `load`'s arguments decides which numbers are computed."""
        names = ("bfloat16_matmul", "float32_activations", "round_embed_scale", "invariant")
        chosen = {name: getattr(self._options, name) for name in names}
        dtypes = [info.dtype for _name, info in self.weights.items()]
        return {**chosen, "kv_dtype": self.kv_dtype, "weight_dtypes": dtypes}

    @functools.cached_property
    def fingerprint(self) -> str:
        """What the model is, as JSON: files that belong to it say it."""
        return cache_file.fingerprint(self)

    def explain(self) -> _inspect.Report:
        """What this model is made of: layers, sharing, parameters, bytes, adapters; print it."""
        return dataclasses.replace(
            _inspect.describe(self.checkpoint), adapters=self.adapters.describe()
        )

    def __repr__(self) -> str:
        text = self.config.text
        mmproj = self.checkpoint.mmproj
        with_towers = f" with {mmproj.name}" if mmproj else ""
        return (
            f"Model({quoted(self.checkpoint.source)}{with_towers}, {text.num_hidden_layers} layers "
            f"of {text.hidden_size}, {self.dtype}, {self.threads} threads, {_core.isa()})"
        )

    def _repr_html_(self) -> str:
        return facts_html(f"Model({quoted(self.checkpoint.source)})", self._facts())

    def _facts(self) -> list[tuple[str, str]]:
        """What is special about this model, as (name, value); what it lacks is left out."""
        text = self.config.text
        sliding = sum(layer.window > 0 for layer in text.layers)
        kinds = [f"{sliding} sliding (window {text.sliding_window})"] if sliding else []
        kinds += [f"{len(text.layers) - sliding} full"] if sliding < len(text.layers) else []
        rows = [("layers", f"{len(text.layers)} of {text.hidden_size}: {', '.join(kinds)}")]
        shared = [layer.kv_source for i, layer in enumerate(text.layers) if layer.kv_source != i]
        derived = sum(layer.values_are_keys for layer in text.layers)
        keys = []
        if shared:
            sources = ", ".join(str(source) for source in sorted({*shared}))
            keys.append(f"{len(shared)} layers read those of layers {sources}")
        if derived:
            keys.append(f"values are keys in {derived} layers")
        if keys:
            rows.append(("keys and values", "; ".join(keys)))
        if text.hidden_size_per_layer_input:
            rows.append(("per-layer input", f"{text.hidden_size_per_layer_input} a layer"))
        if text.num_experts:
            rows.append(("experts", f"{text.top_k_experts} of {text.num_experts} a token"))
        return [
            *rows,
            ("vocabulary", f"{text.vocab_size:,}"),
            ("context", f"{text.max_position_embeddings:,} tokens"),
            ("weights", self.dtype),
            ("cache", self.kv_dtype),
            ("runs on", f"{self.threads} threads, {_core.isa()}"),
        ]

    def embedding_scale(self, name: str) -> float:
        """What rows of "embed_tokens" or "embed_tokens_per_layer" are multiplied with."""
        text = self.config.text
        per_layer = name == "embed_tokens_per_layer"
        size = text.hidden_size_per_layer_input if per_layer else text.hidden_size
        return embed_scale(self.embed_scale, size)

    @functools.cached_property
    def media_reader(self) -> Reader:
        """Reads images, sounds and videos for this model's prompts."""
        readers: dict[str, Callable[..., Content]] = {}
        # A vision_config that can't be read matters to those who pass images only.
        if towers.has_vision(self.checkpoint):
            readers["image"] = lambda *value, **options: self._eyes().read(*value, **options)
            readers["video"] = lambda *value, **options: self._eyes().read_video(*value, **options)
        if towers.has_audio(self.checkpoint):
            readers["audio"] = lambda value, name: read_audio(self.audio_tower, value, name)
        return Reader(self.config.text.hidden_size, readers)

    @functools.cached_property
    def vision(self) -> Vision | None:
        """What reads images; None where the checkpoint has no vision part."""
        where = f"{self.checkpoint.folder}: config.json"
        config = read_vision_config(self.config.raw, self.config.text.hidden_size, where)
        if config is None or not towers.has_vision(self.checkpoint):
            return None
        return Vision(config, self._load_vision, default_budget(self.checkpoint.folder))

    def _load_vision(self, config: _core.VisionConfig) -> _core.VisionModel:
        options = _core.VisionOptions()
        options.bfloat16_matmul = self._options.bfloat16_matmul
        options.invariant = self._options.invariant
        options.threads = self._options.threads
        weights = towers.weights(self.checkpoint, towers.VISION)
        return _core.VisionModel(config, weights, options)

    def encode_image(
        self, image: Any, max_soft_tokens: int | None = None, *, adapter: Any = None
    ) -> SoftTokens:
        """Soft tokens float32 [n, D] of an image, as the text model reads them.

        `image`: a path, bytes of a file, a data URL, a PIL image, or an array uint8 [H, W, 3].
        `max_soft_tokens`: 70, 140, 280, 560 or 1120; None is what the checkpoint's
        processor_config.json names, else 280. n is what its shape fills of them. Prompts take the
        result in place of the image, under any adapter. `adapter`: as in `run`, those that the
        vision part is run under. ValueError for what is no image, and where the model
        reads none; ImportError without Pillow (`pip install gemloupe[media]`).
        """
        return self._eyes().encode_image(image, max_soft_tokens, self._of_media(adapter))

    def _of_media(self, adapter: Any) -> Selection:
        return self.adapters.media(self.adapters.selected(adapter))

    def encode_video(self, video: Any, *, adapter: Any = None) -> SoftTokens:
        """Soft tokens float32 [n, D] of a video's frames, one frame after the other.

        `video`: a path or bytes of a file (with PyAV: `pip install gemloupe[video]`), a list of
        frames, an array uint8 [F, H, W, 3], or what `gl.video(…)` made of one, which says how many
        frames are read and of how many soft tokens (32 of up to 70). `adapter` and errors as in
        `encode_image`.
        """
        return self._eyes().encode_video(video, self._of_media(adapter))

    def _eyes(self) -> Vision:
        if self.vision is None:
            raise towers.lacks(self.checkpoint, "vision", "a multimodal checkpoint")
        return self.vision

    @functools.cached_property
    def audio_tower(self) -> AudioTower:
        """The audio encoder; its weights are mapped when it is first used.

        ValueError where the checkpoint has none.
        """
        options = _core.AudioTowerOptions()
        for name in ("bfloat16_matmul", "invariant", "threads"):
            setattr(options, name, getattr(self._options, name))
        return open_tower(self.checkpoint, options)

    def encode_audio(
        self,
        source: Any,
        sampling_rate: int | None = None,
        *,
        adapter: Any = None,
        capture: Any = (),
        edit: Any = None,
        check_finite: bool = False,
    ) -> SoftTokens:
        """A sound's soft tokens, float32 [n, D], 25 a second, as the text model reads them.

        `source`: a path, bytes, data URL, or samples [N] or [N, channels] at `sampling_rate` (16
        kHz without it). Encoders read 30 s; more is cut, as transformers does it, with a warning.
        Pass the result as `audio=` of `run` and `generate`, as often as you like, under any
        adapter. `adapter`: as in `run`, those that the encoder is run under.
        `capture` and `edit` (as in `run`) take points of the tower, such as
        "audio.layers.3.attn.pattern"; positions are those of soft tokens, at "audio.mel" of frames.
        Captures are `tokens.content.source.captured`, which also tells times and frames of tokens.
        ValueError for what is no sound, and for models without ears.
        """
        return encode_audio(
            self.audio_tower,
            source,
            sampling_rate,
            adapters=self._of_media(adapter),
            capture=capture,
            edit=edit,
            check_finite=check_finite,
        )

    @overload
    def audio_stream(
        self, sampling_rate: int | None = None, *, adapter: Any = None
    ) -> AudioStream: ...
    @overload
    def audio_stream(
        self, sampling_rate: int | None = None, *, adapter: Any = None, prompt: Any, **options: Any
    ) -> ListeningStream: ...
    def audio_stream(
        self,
        sampling_rate: int | None = None,
        *,
        adapter: Any = None,
        prompt: Any = None,
        **options: Any,
    ) -> AudioStream:
        """Encodes sound while it comes, under `adapter` (as in `run`); see `AudioStream`.

        With `prompt`, a text with one <|audio|> or a chat with one part {"type": "audio"}, the text
        model reads along, and `stream.generate(…)` answers when the sound ends; see
        `ListeningStream`. `options`: as in `prepare` (thinking, tools, images of the prompt, …).
        """
        if prompt is not None:
            selected = self.adapters.selected(adapter)
            return ListeningStream(self, prompt, sampling_rate, selected, **options)
        if options:
            raise ValueError(f"{one_of(list(options))} belongs to a prompt; pass prompt=, too")
        mix = self._of_media(adapter).of_tower("audio")
        return AudioStream(self.audio_tower, sampling_rate, mix)

    # What gemloupe.generation asks of a model.

    def load_drafter(
        self, source: str | os.PathLike[str], *, dtype: str = "auto", max_tokens: int = 4
    ) -> Drafter:
        """Loads an assistant checkpoint of this model, for `generate(..., drafter=)`.

        `source`: a folder or hub id, such as "google/gemma-4-E2B-it-assistant". `dtype`: of its
        matrices, "auto" as stored, "float32", "bfloat16", "int8" or "int4". `max_tokens`: the most
        tokens that it guesses for one pass, 1 to 7; how many it does follows how many were right.
        ValueError, naming the field, where it was made for another model.
        """
        return _drafter.load(self, source, dtype, max_tokens)

    def drafter(
        self, drafter: Drafter | PromptLookup | str | os.PathLike[str]
    ) -> Drafter | PromptLookup:
        """What a call's `drafter` stands for; a path is loaded once."""
        if isinstance(drafter, PromptLookup):
            return drafter
        if drafter == "prompt-lookup":
            return PromptLookup()
        if isinstance(drafter, Drafter):
            drafter.check_target(self)
            return drafter
        if not isinstance(drafter, (str, os.PathLike)):
            raise TypeError(
                f"drafter is {quoted(drafter)}; expected what load_drafter gave, a path or "
                'hub id, a gl.PromptLookup or "prompt-lookup"'
            )
        key = os.fspath(drafter)
        if key not in self._drafters:
            self._drafters[key] = self.load_drafter(key)
        return self._drafters[key]

    def new_session(self) -> _core.Session:
        return _core.Session(self.core)

    def new_request(self) -> _core.RowRequest:
        return _core.RowRequest()

    def new_mask(self, vocab_size: int) -> _core.TokenMask:
        return _core.TokenMask(vocab_size)

    def core_cache(self, cache: KvCache) -> _core.KvCache:
        return cache.core

    def wrap_cache(self, core_cache: _core.KvCache) -> KvCache:
        return KvCache(core_cache, self.fingerprint)


__all__ = ["Model", "Prompt", "load"]
