"""Describes a checkpoint: its config, its layers, and what it weighs (`gemloupe inspect`)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gemloupe import packed, recipe, sizes
from gemloupe.checkpoint import Checkpoint, open_checkpoint
from gemloupe.config import LayerConfig, ModelConfig, TextConfig
from gemloupe.errors import bullet_list, format_bytes
from gemloupe.progress import ProgressBar
from gemloupe.sizes import Estimate, Parameters, Source, estimate

__all__ = ["Estimate", "LayerGroup", "Report", "describe", "estimate", "verify"]

_DESCRIPTIONS = {
    "vision_tower": "vision encoder",
    "embed_vision": "vision projection",
    "vision_embedder": "vision embedder",
    "audio_tower": "audio encoder",
    "embed_audio": "audio projection",
}


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are alike in everything, where a layer that shares keys names its source."""

    layers: tuple[int, ...]
    spec: LayerConfig

    @property
    def shares(self) -> bool:
        return self.spec.kv_source >= 0


@dataclass(frozen=True)
class Report:
    """What `describe` found; `str(report)` is the text that `gemloupe inspect` prints."""

    name: str
    config: ModelConfig
    groups: tuple[LayerGroup, ...]
    parameters: Parameters
    weight_bytes: dict[str, int]
    """Bytes of the text decoder's weights on disk by dtype, int8 and int4 by their recipes."""
    kv_bytes_per_token: tuple[int, int]
    """Bytes at two a number, as (all sliding, all full) layers."""
    kv_bytes_full_context: int
    """The same, at max_position_embeddings tokens, sliding layers holding their window."""
    stored: str
    """What the files hold; "" where only a config was read."""
    checkpoint: Checkpoint | None = field(default=None, repr=False)
    adapters: tuple[str, ...] = ()
    """What `model.explain` says of the loaded adapters, a line each."""

    def __str__(self) -> str:
        parts = [self._head(), self._layers(), self._parameters(), self._weights(), self._memory()]
        if self.adapters:
            parts.append("\n".join(["Adapters", *(f"  {line}" for line in self.adapters)]))
        return "\n\n".join(part for part in parts if part)

    def _head(self) -> str:
        text = self.config.text
        rows = [
            ("model", f"{self.config.model_type}, {self.config.architecture or 'no class named'}"),
            ("context", f"{text.max_position_embeddings:,} tokens"),
            ("vocabulary", f"{text.vocab_size:,}"),
            ("hidden size", f"{text.hidden_size}, {text.num_hidden_layers} layers"),
            (
                "logit soft-cap",
                f"{text.final_logit_softcapping:g}" if text.final_logit_softcapping else "none",
            ),
        ]
        if text.hidden_size_per_layer_input:
            packed = text.num_hidden_layers * text.hidden_size_per_layer_input
            table = f"table [{text.vocab_size_per_layer_input}, {packed}]"
            rows.append(("per-layer input", f"{text.hidden_size_per_layer_input} wide, {table}"))
        if text.num_experts:
            used = f"{text.top_k_experts} of {text.num_experts} per token"
            rows.append(("experts", f"{used}, {text.moe_intermediate_size} wide"))
        if text.bidirectional != "none":
            whose = "image tokens" if text.bidirectional == "vision" else "all tokens"
            rows.append(("two-way attention", f"{whose} ({text.bidirectional!r})"))
        if self.stored:
            rows.append(("files", self.stored))
        if self.checkpoint is not None and self.checkpoint.mmproj is not None:
            rows.append(("towers of", self.checkpoint.mmproj.name))
        made = self.checkpoint.provenance if self.checkpoint else None
        if made is not None and made.adapter:
            rows.append(("adapter folded in", made.adapter))
        return f"{self.name}\n" + "\n".join(f"  {name:<19}{value}" for name, value in rows)

    def _layers(self) -> str:
        rows = [
            (
                "count", "kind", "heads", "kv", "head size", "window", "keys and values",
                "FFN width", "experts", "layers",
            )
        ]  # fmt: skip
        text = self.config.text
        for group in self.groups:
            spec = group.spec
            keys = f"of layer {spec.kv_source}" if group.shares else "own"
            if spec.values_are_keys and not group.shares:
                keys = "own, K = V"
            experts = f"{text.top_k_experts}/{text.num_experts}" if spec.has_experts else "-"
            rows.append(
                (
                    str(len(group.layers)), spec.kind, str(text.num_attention_heads),
                    str(spec.num_kv_heads), str(spec.head_dim), str(spec.window or "-"), keys,
                    str(spec.intermediate_size), experts, _ranges(group.layers),
                )
            )  # fmt: skip
        return "Layers\n" + _table(rows)

    def _parameters(self) -> str:
        counts = self.parameters
        rows = [("text body", counts.text_body), ("token embedding, tied output", counts.embedding)]
        if counts.per_layer_table:
            rows.append(("per-layer table", counts.per_layer_table))
        if counts.experts:
            rows.append(("experts", counts.experts))
        rows.append(("text decoder", counts.text))
        rows += [(_DESCRIPTIONS.get(tower, tower), count) for tower, count in counts.towers.items()]
        rows += [("total", counts.total), ("active per token", counts.active)]
        width = max(len(name) for name, _ in rows)
        lines = [f"  {name:<{width}}  {count:>16,}" for name, count in rows]
        return "Parameters\n" + "\n".join(lines)

    def _weights(self) -> str:
        """The dtype of each kind of tensor, where a checkpoint is quantised."""
        if self.checkpoint is None:
            return ""
        if all(t.dtype in recipe.PLAIN for t in self.checkpoint.text_tensors.values()):
            return ""
        kinds: dict[tuple[str, str], list[int]] = {}
        for name, tensor in self.checkpoint.text_tensors.items():
            kind = re.sub(r"^layers\.\d+\.", "layers.*.", name)
            counts = kinds.setdefault((kind, tensor.dtype), [0, 0, 0])
            counts[0] += 1
            counts[1] += math.prod(tensor.shape)
            counts[2] += tensor.nbytes
        rows = [("tensor", "dtype", "bits a weight", "count", "size")]
        rows += [
            (kind, dtype, f"{8 * size / elements:.2f}", str(count), format_bytes(size))
            for (kind, dtype), (count, elements, size) in kinds.items()
        ]
        text = "Weights\n" + _table(rows)
        made = self.checkpoint.provenance
        if made is not None:
            text += (
                f"\n  packed as {made.dtype} from {made.source} ({made.source_dtype}) by gemloupe "
                f"{made.gemloupe}"
            )
        return text

    def _memory(self) -> str:
        lines = []
        for dtype, count in self.weight_bytes.items():
            lines.append(f"  weights, {dtype:<10}{format_bytes(count):>12}")
        sliding, full = self.kv_bytes_per_token
        context = self.config.text.max_position_embeddings
        rows = [
            ("KV cache a token", sliding + full, f"sliding {sliding:,} B, full {full:,} B"),
            (
                f"KV cache at {_thousands(context)}",
                self.kv_bytes_full_context,
                f"sliding layers hold {self.config.text.sliding_window} tokens",
            ),
        ]
        lines += [
            f"  {name:<19}{format_bytes(count):>12}  float16; {note}" for name, count, note in rows
        ]
        return "Memory of the text decoder\n" + "\n".join(lines)


def describe(source: Source, mmproj: str | os.PathLike[str] | None = "auto") -> Report:
    """Describes a checkpoint, a config, a released model ("E2B"), or anything that `load` takes.

    `mmproj`: the towers of a GGUF model, as in `gl.load`. Weights are not read, and not downloaded.
    Errors as in `open_checkpoint`.
    """
    name, subject = sizes.find(source, mmproj)
    config = subject if isinstance(subject, ModelConfig) else subject.config
    text = config.text
    parameters = sizes.count_parameters(subject)
    return Report(
        name=name,
        config=config,
        groups=_groups(text),
        parameters=parameters,
        weight_bytes={
            "float32": 4 * parameters.text,
            "bfloat16": 2 * parameters.text,
            **{
                dtype: sizes.config_bytes(text, "bfloat16", dtype, table=True)
                for dtype in ("int8", "int4")
            },
        },
        kv_bytes_per_token=sizes.kv_bytes_per_token(text),
        kv_bytes_full_context=sizes.kv_bytes(text, text.max_position_embeddings),
        stored=_stored(subject) if isinstance(subject, Checkpoint) else "",
        checkpoint=subject if isinstance(subject, Checkpoint) else None,
    )


def verify(source: str | os.PathLike[str]) -> str:
    """Reads every tensor of a packed checkpoint, and says that all are as they were written.

    ValueError naming the damaged ones, and for a checkpoint that is not packed.
    """
    opened = open_checkpoint(source)
    if opened.provenance is None:
        raise ValueError(
            f"{opened.source}: only packed checkpoints hold checksums of their tensors; expected a "
            "folder that gemloupe convert wrote. Give one, or leave out --verify."
        )
    with ProgressBar("verifying") as bar:
        damaged = packed.damaged_tensors(opened.folder, bar.show)
    if damaged:
        raise ValueError(
            f"{opened.files[0]}: {len(damaged)} of {len(opened.tensors)} tensors are damaged:\n"
            f"{bullet_list(damaged)}\nConvert {opened.provenance.source} again."
        )
    return f"{opened.files[0]}: all {len(opened.tensors)} tensors are as they were written"


def _stored(checkpoint: Checkpoint) -> str:
    size = sum(path.stat().st_size for path in checkpoint.files)
    files = "1 file" if len(checkpoint.files) == 1 else f"{len(checkpoint.files)} files"
    text = f"{files}, {format_bytes(size)}, {checkpoint.dtype}, {len(checkpoint.tensors)} tensors"
    unread = len(checkpoint.ignored)
    return f"{text} ({unread} of them never used)" if unread else text


def _groups(text: TextConfig) -> tuple[LayerGroup, ...]:
    """Groups layers; in a group's spec `kv_source` is the layer shared with, −1 for none."""
    members: dict[LayerConfig, list[int]] = {}
    for index, layer in enumerate(text.layers):
        source = -1 if layer.kv_source == index else layer.kv_source
        members.setdefault(_with_source(layer, source), []).append(index)
    return tuple(LayerGroup(tuple(indices), spec) for spec, indices in members.items())


def _with_source(layer: LayerConfig, source: int) -> LayerConfig:
    return replace(layer, kv_source=source)


def _ranges(indices: Sequence[int], limit: int = 4) -> str:
    """Returns "0-4, 6-10, …, 54-58"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    if len(texts) > limit:
        texts = [*texts[: limit - 1], "…", texts[-1]]
    return ", ".join(texts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Lines up columns; to the right those that hold only numbers and "-" below the heading."""
    columns = list(zip(*rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    numeric = [all(cell.isdigit() or cell == "-" for cell in column[1:]) for column in columns]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if is_numeric else cell.ljust(width)
            for cell, width, is_numeric in zip(row, widths, numeric, strict=True)
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def _thousands(count: int) -> str:
    return f"{count >> 10}K" if count % 1024 == 0 else f"{count:,}"
