"""Counts from a config: parameters, bytes of weights, cache and scratch, bytes per token."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemloupe import checkpoint, hub, packed, recipe, safetensors_header
from gemloupe.checkpoint import Checkpoint, expected_text_tensors
from gemloupe.config import LayerConfig, ModelConfig, TextConfig
from gemloupe.errors import format_bytes, one_of, quoted
from gemloupe.towers import BUFFER_NAMES, tower_parameters
from gemloupe.variants import VARIANTS, Variant

# Bits per weight of a recipe's body; `recipe` says which tensors have more.
WEIGHT_BITS: dict[str, float] = {
    name: recipe.BITS[name] for name in ("float32", "bfloat16", "int8", "int4")
}
# Beside a converted tensor: parts of the source and of a float32 form of it.
_CONVERTING_BYTES = 64 << 20
# Resident in a fresh process after `import gemloupe`: Python, NumPy, oneDNN, the engine.
PROCESS_BYTES = 58 << 20
KV_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_INT8_SCALE_BYTES = 4  # Of each head's keys and of its values, per position.

_KV_BLOCK = 64  # Positions; csrc/ops/attention.h.


@dataclass(frozen=True)
class Parameters:
    """Parameters as transformers counts them: no buffers, and the tied output matrix once."""

    text_body: int
    """The text decoder without what the next three count."""
    embedding: int
    per_layer_table: int
    experts: int
    active_experts: int
    """Parameters of the experts that one token uses, over all layers."""
    towers: Mapping[str, int]

    @property
    def text(self) -> int:
        return self.text_body + self.embedding + self.per_layer_table + self.experts

    @property
    def total(self) -> int:
        return self.text + sum(self.towers.values())

    @property
    def active(self) -> int:
        """What one decoded token reads: a per-layer table is only looked up, a row at a time."""
        return self.text_body + self.embedding + self.active_experts


def count_parameters(subject: ModelConfig | Checkpoint) -> Parameters:
    """Counts by part; towers from the files where there are files, else from the config."""
    config = subject if isinstance(subject, ModelConfig) else subject.config
    text = config.text
    embedding = table = experts = rest = 0
    for name, shape in expected_text_tensors(text).items():
        count = math.prod(shape)
        if name == "embed_tokens.weight":
            embedding = count
        elif name == "embed_tokens_per_layer.weight":
            table = count
        elif ".experts." in name:
            experts += count
        elif not name.endswith(BUFFER_NAMES):
            rest += count
    towers = tower_parameters(config.raw)
    if isinstance(subject, Checkpoint):
        towers = {
            tower: sum(
                subject.tensors[name].info.elements
                for name in names
                if not name.endswith(BUFFER_NAMES)
            )
            for tower, names in subject.towers.items()
        }
    active = experts * text.top_k_experts // text.num_experts if experts else 0
    return Parameters(rest, embedding, table, experts, active, towers)


def kv_bytes_per_token(text: TextConfig, element_bytes: int = 2) -> tuple[int, int]:
    """Returns bytes of keys and values per token in (all sliding, all full) layers."""
    sliding = sum(_kv_width(layer) for layer in _storing(text) if layer.kind == "sliding")
    full = sum(_kv_width(layer) for layer in _storing(text) if layer.kind == "full")
    return sliding * element_bytes, full * element_bytes


def kv_bytes(text: TextConfig, context: int, element_bytes: int = 2) -> int:
    """Returns bytes of keys and values at `context` tokens, sliding layers holding their window."""
    return element_bytes * sum(
        min(context, layer.window or context) * _kv_width(layer) for layer in _storing(text)
    )


def kv_allocated(text: TextConfig, context: int, kv_dtype: str, chunk: int) -> int:
    """Returns the bytes that the engine allocates for them (`_core.kv_bytes_needed` is the same).

    In blocks of 64 positions, with room for a pass of `chunk` tokens. Where values are keys, only
    the rotated dims of the keys are stored beside them.
    """
    total = 0
    for layer in _storing(text):
        positions = context
        if layer.kind == "sliding":
            further = 1 if text.bidirectional == "all" else 0
            positions = min(context, layer.window + further - 1 + chunk + _KV_BLOCK)
        bytes_of_position = _kv_stored(layer) * KV_BYTES[kv_dtype]
        if kv_dtype == "int8":
            bytes_of_position += 2 * layer.num_kv_heads * _INT8_SCALE_BYTES
        total += -(-positions // _KV_BLOCK) * _KV_BLOCK * bytes_of_position
    return total


def bytes_per_decoded_token(
    parameters: Parameters, text: TextConfig, context: int, weight_bits: float, kv_element: int
) -> float:
    """Returns bytes read for one token after `context` tokens: weights in use, keys and values."""
    attended = sum(
        min(context, layer.window or context) * _kv_stored(layer) for layer in text.layers
    )
    return parameters.active * weight_bits / 8 + attended * kv_element


def decoded_weight_bits(text: TextConfig, dtype: recipe.Dtype) -> float:
    """Returns bits a weight, on average, of what one decoded token reads of a packed model."""
    tensors = {name: ("bfloat16", shape) for name, shape in expected_text_tensors(text).items()}
    targets = recipe.targets(dtype, tensors)
    size = count = 0.0
    for name, (_, shape) in tensors.items():
        if name == recipe.TABLE:
            continue
        share = text.top_k_experts / text.num_experts if ".experts." in name else 1.0
        size += share * recipe.nbytes(targets.get(name, "float32"), shape)
        count += share * math.prod(shape)
    return 8 * size / count


def _storing(text: TextConfig) -> list[LayerConfig]:
    return [layer for index, layer in enumerate(text.layers) if layer.kv_source == index]


def _kv_width(layer: LayerConfig) -> int:
    return 2 * layer.num_kv_heads * layer.head_dim


def _kv_stored(layer: LayerConfig) -> int:
    """Elements that the engine stores for a position: of derived keys only the rotated dims."""
    key_dims = 2 * layer.rotary_pairs if layer.values_are_keys else layer.head_dim
    return layer.num_kv_heads * (layer.head_dim + key_dims)


@dataclass(frozen=True)
class Estimate:
    """Bytes of memory that a process with this model needs, `int(estimate)` at its peak."""

    name: str
    dtype: str
    stored_dtype: str
    kv_dtype: str
    context: int
    weights: int
    """Mapped from the files where these hold the wanted type (float32 reads bfloat16 files as they
    are), else a private copy. Without the per-layer table, of which only rows are read."""
    kv_cache: int
    scratch: int
    """About what one pass of the default chunk needs beside them."""
    converting: int
    """What `load` needs for a moment beside the weights where it converts or copies them."""
    process: int = PROCESS_BYTES
    """About what Python and the libraries take before anything is loaded."""

    @property
    def total(self) -> int:
        return self.process + self.weights + max(self.converting, self.kv_cache + self.scratch)

    def __int__(self) -> int:
        return self.total

    def __str__(self) -> str:
        parts = [
            ("weights", self.weights, f"stored as {self.stored_dtype}"),
            ("KV cache", self.kv_cache, self.kv_dtype),
            ("scratch", self.scratch, "about"),
            ("process", self.process, "about"),
        ]
        if self.converting:
            parts.append(("converting", self.converting, "while loading, before cache and scratch"))
        head = f"{self.name}, {self.dtype}, context {self.context:,}: {format_bytes(self.total)}"
        lines = [f"  {part:<10}{format_bytes(size):>12}  {note}" for part, size, note in parts]
        return "\n".join([head, *lines])


Source = str | os.PathLike[str] | ModelConfig | Checkpoint | Variant


def estimate(
    source: Source,
    dtype: recipe.Dtype = "auto",
    context: int = 4096,
    kv_dtype: str = "auto",
    *,
    chunk: int = 512,
) -> Estimate:
    """Returns the bytes of RAM that `source` needs, before anything is loaded.

    `source` is what `load` takes, a released model's name ("31B"), or a config; of a hub model
    only config.json is fetched. `dtype` as in `load`: the figures of a checkpoint that must be
    converted are those of doing so while it is loaded, of a config those of a packed folder. The
    total is a new process's peak: Python and the libraries count, what else it imports does not.
    ValueError for an unknown dtype or a context beyond the model's.
    """
    name, subject = find(source)
    config = subject if isinstance(subject, ModelConfig) else subject.config
    stored = subject.dtype if isinstance(subject, Checkpoint) else config.dtype or "bfloat16"
    recipe.check(dtype)
    preset = recipe.name_of(dtype)
    if kv_dtype == "auto":
        kv_dtype = "float32" if preset == "float32" else "float16"  # As `load` does.
    if kv_dtype not in KV_BYTES:
        raise ValueError(
            f"kv_dtype is {quoted(kv_dtype)}; expected {one_of(['auto', *KV_BYTES])}. "
            "Give one of these."
        )
    limit = config.text.max_position_embeddings
    if not 1 <= context <= limit:
        raise ValueError(
            f"context is {context}; expected 1 to {limit}, the config's max_position_embeddings. "
            "Give a number of tokens in that range."
        )
    weights, converting = (
        (config_bytes(config.text, stored, dtype), 0)
        if isinstance(subject, ModelConfig)
        else load_bytes(subject, dtype)
    )
    return Estimate(
        name=name,
        dtype=stored if preset == "auto" else preset,
        stored_dtype=stored,
        kv_dtype=kv_dtype,
        context=context,
        weights=weights,
        kv_cache=kv_allocated(config.text, context, kv_dtype, chunk),
        scratch=scratch_bytes(config.text, min(chunk, context)),
        converting=converting,
    )


def weight_targets(subject: Checkpoint, dtype: recipe.Dtype) -> dict[str, str]:
    """Returns the dtype in which `load` holds each matrix of a checkpoint.

    ValueError for an unknown dtype or pattern, and for another one than a packed file's.
    """
    made = subject.provenance
    if made is not None and dtype not in ("auto", made.dtype):
        raise ValueError(
            f"{subject.source}: dtype is {quoted(dtype)}, but this folder was packed as "
            f"{quoted(made.dtype)}; expected 'auto'. Load or convert the checkpoint that it was "
            f"made from, {quoted(made.source)}."
        )
    tensors = {name: (t.dtype, t.shape) for name, t in subject.text_tensors.items()}
    return recipe.targets("auto" if made is not None else dtype, tensors, subject.prefix)


def resident_bytes(subject: Checkpoint, dtype: recipe.Dtype, residency: str = "mapped") -> int:
    """Returns the most bytes that `load` needs in memory for weights, mapped or copied."""
    return sum(load_bytes(subject, dtype, residency))


def load_bytes(
    subject: Checkpoint, dtype: recipe.Dtype, residency: str = "mapped"
) -> tuple[int, int]:
    """Returns bytes of (weights, mapped or copied; what converting or copying needs beside them).

    The table of which only rows are read counts where it must be converted.
    """
    targets = weight_targets(subject, dtype)
    total = largest = 0
    for name, tensor in subject.text_tensors.items():
        target = targets.get(name, "float32")
        copied = target != tensor.dtype and name in targets
        if name == recipe.TABLE and not copied:
            continue
        total += recipe.nbytes(target, tensor.shape)
        if copied or residency == "resident":
            largest = max(largest, tensor.nbytes)
    return total, min(largest, _CONVERTING_BYTES)


def expert_bytes(subject: Checkpoint) -> int:
    """Returns bytes of all experts as they are stored."""
    return sum(t.nbytes for name, t in subject.text_tensors.items() if ".experts." in name)


def config_bytes(text: TextConfig, stored: str, dtype: recipe.Dtype, *, table: bool = False) -> int:
    """The same of a checkpoint with this config, converted beforehand or stored in `dtype`.

    With `table` that of which only rows are read counts too: bytes on disk.
    """
    tensors = {name: (stored, shape) for name, shape in expected_text_tensors(text).items()}
    targets = recipe.targets(dtype, tensors)
    return sum(
        recipe.nbytes(targets.get(name, "float32"), shape)
        for name, (_, shape) in tensors.items()
        if table or name != recipe.TABLE
    )


def scratch_bytes(text: TextConfig, rows: int) -> int:
    """Float32 rows alive at once in the widest layer, per-layer inputs and one row of logits.

    Layers that share keys do not count: unless asked, only the last row of a prompt passes them.
    """
    widest = 0
    for layer in _storing(text):
        query = text.num_attention_heads * layer.head_dim
        ffn = 2 * layer.intermediate_size
        if layer.has_experts:
            ffn += text.top_k_experts * (2 * text.moe_intermediate_size + text.hidden_size)
        widest = max(widest, 2 * query + _kv_width(layer), ffn)
    per_row = 4 * text.hidden_size + widest
    per_row += 2 * text.num_hidden_layers * text.hidden_size_per_layer_input
    return 4 * (rows * per_row + text.vocab_size)


def find(
    source: Source, mmproj: str | os.PathLike[str] | None = None
) -> tuple[str, ModelConfig | Checkpoint]:
    """Returns the name and the config, or the checkpoint where its weights are on this machine.

    `mmproj`: as in `open_checkpoint`.
    """
    if isinstance(source, Variant):
        return source.name, source.config
    if isinstance(source, ModelConfig):
        return source.architecture or source.model_type, source
    if isinstance(source, Checkpoint):
        return source.source, source
    name = os.fspath(source)
    if name in VARIANTS and not Path(name).exists():
        return name, VARIANTS[name].config
    try:
        folder = checkpoint.resolve(source, weights=False)
    except ConnectionError:
        released = hub.released(name)
        if released is None:
            raise
        return name, released.config
    if (
        folder.is_file()
        or (folder / "model.safetensors").is_file()
        or (folder / safetensors_header.INDEX_NAME).is_file()
        or packed.is_packed(folder)
    ):
        return name, checkpoint.open_checkpoint(name, folder=folder, mmproj=mmproj)
    return name, checkpoint.read_folder_config(folder)
