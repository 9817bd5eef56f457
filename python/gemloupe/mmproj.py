"""Reads llama.cpp's `mmproj-*.gguf`: the towers that belong to a text model's GGUF file.

Names, keys and conventions are those of llama.cpp's converter (`conversion/gemma.py`, classes
Gemma4VisionAudioModel and Gemma4UnifiedVisionAudioModel; `gguf-py/gguf/tensor_mapping.py`) and of
its graphs (`tools/mtmd/models/gemma4v.cpp`, `gemma4uv.cpp`, `gemma4a.cpp`), which fix what no key
says: rope base 100, 3x3 patches a soft token, windows of 12 tokens, a score cap of 50, half-step
residuals. Norms are stored as they are (no + 1), clipped linears with their four bounds.

What the converter changes is changed back: patches are (channel, row, column) there and (row,
column, channel) in the checkpoint, per_dim_scale is stored after softplus, the position table of
the encoder-free model by axis first.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemloupe import _core
from gemloupe.audio_config import read_audio_config
from gemloupe.checkpoint import Checkpoint, StoredTensor, tower_of
from gemloupe.config import parse_config
from gemloupe.errors import MAX_LISTED, bullet_list, did_you_mean, format_shape, one_of, quoted
from gemloupe.gguf import BLOCKED_TYPES, Metadata, all_tensors
from gemloupe.recipe import PLAIN
from gemloupe.safetensors_header import TensorInfo
from gemloupe.towers import mmproj_files
from gemloupe.vision_config import read_vision_config

AUTO = "auto"
ARCHITECTURE = "clip"

Shape = tuple[int, ...]
Restore = Callable[[np.ndarray], np.ndarray]

_MAX_WIDTH, _MAX_LAYERS, _MAX_HEADS = 1 << 20, 1024, 4096
_ADVICE = "Download the mmproj file that was published with the model."
_BOUNDS = ("input_min", "input_max", "output_min", "output_max")

# A layer's tensors, checkpoint -> file; those of the first table clip where there are bounds.
_VISION_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_VISION_NORMS = {
    "input_layernorm": "ln1",
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "ln2",
    "post_feedforward_layernorm": "ffn_post_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_AUDIO_LINEARS = {
    "feed_forward1.ffw_layer_1": "ffn_up",
    "feed_forward1.ffw_layer_2": "ffn_down",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.post": "attn_out",
    "lconv1d.linear_start": "conv_pw1",
    "lconv1d.linear_end": "conv_pw2",
    "feed_forward2.ffw_layer_1": "ffn_up_1",
    "feed_forward2.ffw_layer_2": "ffn_down_1",
}
# "conv_norm" is the norm before the convolution, "norm_conv" the one after it.
_AUDIO_NORMS = {
    "feed_forward1.pre_layer_norm": "ffn_norm",
    "feed_forward1.post_layer_norm": "ffn_post_norm",
    "norm_pre_attn": "attn_pre_norm",
    "norm_post_attn": "attn_post_norm",
    "lconv1d.pre_layer_norm": "conv_norm",
    "lconv1d.conv_norm": "norm_conv",
    "feed_forward2.pre_layer_norm": "ffn_norm_1",
    "feed_forward2.post_layer_norm": "ffn_post_norm_1",
    "norm_out": "ln2",
}


class Expected(NamedTuple):
    """A tensor of a tower: its name and shape in the file, its shape in the checkpoint."""

    name: str
    stored: Shape
    shape: Shape
    restore: Restore | None = None
    """From float32 values of the stored shape; None where they are the checkpoint's."""


def attach(checkpoint: Checkpoint, mmproj: str | os.PathLike[str] | None) -> Checkpoint:
    """Returns a GGUF checkpoint with the towers of an mmproj file.

    `mmproj`: the file, None for none, or "auto" for the only `mmproj-*.gguf` beside the model; one
    that is found so and does not fit is left out with a warning. FileNotFoundError; ValueError
    listing what is missing or wrong, got and expected.
    """
    if mmproj is None:
        return checkpoint
    if mmproj != AUTO:
        return _attached(checkpoint, Path(mmproj).expanduser())
    found = mmproj_files(checkpoint.folder)
    if len(found) != 1:
        return checkpoint
    try:
        return _attached(checkpoint, found[0])
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{found[0].name} lies beside the model, but its towers are not used: {error}",
            stacklevel=4,
        )
        return checkpoint


def _attached(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    if not path.is_file():
        near = one_of([p.name for p in mmproj_files(checkpoint.folder)][:3])
        hint = f" Beside the model there is {near}." if near else ""
        raise FileNotFoundError(f"{path}: no such file; expected an mmproj-*.gguf file.{hint}")
    header = _core.GgufFile(str(path))
    reader = _Reader(Metadata(path, header), all_tensors([path], [header]), checkpoint)
    raw, expected = reader.read()
    reader.check(expected)
    number = len(checkpoint.files)
    tensors = dict(checkpoint.tensors)
    restore = {}
    towers: dict[str, list[str]] = {}
    for name, one in expected.items():
        _, info = reader.tensors[one.name]
        full = f"model.{name}"
        tensors[full] = StoredTensor(
            number, TensorInfo(full, info.dtype, one.shape, info.begin, info.end)
        )
        if one.restore is not None:
            restore[full] = _from_stored(one)
        towers.setdefault(tower_of(full) or "", []).append(full)
    config = parse_config(raw, str(path))
    read_vision_config(raw, config.text.hidden_size, str(path))
    read_audio_config(config, (raw.get("audio_config") or {}).get("input_feat_size", 128))
    if config.text != checkpoint.config.text:
        raise ValueError(
            f"{path}: this is an mmproj of Gemma 4 12B, which has no towers; {checkpoint.folder} "
            f"is another model. {_ADVICE}"
        )
    return replace(
        checkpoint,
        config=config,
        files=(*checkpoint.files, path),
        tensors=tensors,
        towers={tower: tuple(names) for tower, names in towers.items()},
        restore=restore,
        mmproj=path,
    )


def _from_stored(one: Expected) -> Restore:
    restore = one.restore
    assert restore is not None

    def values(stored: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(restore(stored.reshape(one.stored)), np.float32)

    return values


class _Reader:
    """One mmproj file beside the text model that it has to fit."""

    def __init__(
        self, metadata: Metadata, tensors: Mapping[str, StoredTensor], checkpoint: Checkpoint
    ) -> None:
        self.metadata = metadata
        self.path = metadata.path
        self.tensors = tensors
        self.checkpoint = checkpoint
        self.width = checkpoint.config.text.hidden_size

    def read(self) -> tuple[dict[str, Any], dict[str, Expected]]:
        """The whole model's config.json, and the towers' tensors by checkpoint name."""
        metadata = self.metadata
        if metadata.text("general.architecture") != ARCHITECTURE:
            metadata.refuse(
                "general.architecture", f"{quoted(ARCHITECTURE)}, as mmproj files say", _ADVICE
            )
        vision = self._projector("vision", ("gemma4v", "gemma4uv"))
        audio = self._projector("audio", ("gemma4a", "gemma4ua"))
        if vision is None and audio is None:
            metadata.refuse("clip.has_vision_encoder", "true, or clip.has_audio_encoder", _ADVICE)
        unified = {kind.startswith("gemma4u") for kind in (vision, audio) if kind}
        if len(unified) > 1:
            raise ValueError(
                f"{self.path}: the projectors are {quoted(vision)} and {quoted(audio)}; expected "
                f"both of one model. {_ADVICE}"
            )
        expected: dict[str, Expected] = {}
        raw: dict[str, Any] = {}
        if vision:
            read = self._patch_embedder if vision == "gemma4uv" else self._vision
            raw["vision_config"], tensors = read()
            expected |= tensors
        if audio:
            read = self._waveform if audio == "gemma4ua" else self._audio
            raw["audio_config"], tensors = read()
            expected |= tensors
        return self._whole(raw, *unified), expected

    def _whole(self, towers: dict[str, Any], unified: bool) -> dict[str, Any]:
        model_type = "gemma4_unified" if unified else "gemma4"
        own = self.checkpoint.config.raw
        ids = {name: value for name, value in own.items() if name.endswith("_token_id")}
        text = {name: value for name, value in own.items() if name not in ids}
        text.pop("architectures", None)
        kind = "Gemma4Unified" if unified else "Gemma4"
        return {
            "architectures": [f"{kind}ForConditionalGeneration"],
            "model_type": model_type,
            "text_config": {**text, "model_type": f"{model_type}_text"},
            **towers,
            **ids,
        }

    def _projector(self, part: str, known: tuple[str, str]) -> str | None:
        flag = f"clip.has_{part}_encoder"
        has = self.metadata.value(flag, "true or false", False)
        if not isinstance(has, bool):
            self.metadata.refuse(flag, "true or false", _ADVICE)
        if not has:
            return None
        key = f"clip.{part}.projector_type"
        if key not in self.metadata:
            key = "clip.projector_type"
        kind = self.metadata.text(key)
        if kind not in known:
            self.metadata.refuse(key, f"{one_of(known)}: the {part} parts of Gemma 4", _ADVICE)
        key = f"clip.{part}.projection_dim"
        if self.metadata.integer(key, high=_MAX_WIDTH) != self.width:
            self.metadata.refuse(
                key, f"{self.width}, the width of {self.checkpoint.folder.name}", _ADVICE
            )
        return kind

    def _shape(self, name: str, axes: int) -> Shape:
        stored = self.tensors.get(name)
        got = "missing" if stored is None else format_shape(stored.info.shape)
        if stored is None or len(stored.info.shape) != axes or 0 in stored.info.shape:
            raise ValueError(
                f"{self.path}: the tensor {name} is {got}; expected {axes} axes. {_ADVICE}"
            )
        return stored.info.shape

    def _sizes(self, part: str) -> tuple[int, int, int]:
        """Width, layers and heads of an encoder."""
        integer, prefix = self.metadata.integer, f"clip.{part}"
        width = integer(f"{prefix}.embedding_length", high=_MAX_WIDTH)
        layers = integer(f"{prefix}.block_count", high=_MAX_LAYERS)
        return width, layers, integer(f"{prefix}.attention.head_count", high=_MAX_HEADS)

    def _clips(self, prefix: str) -> bool:
        return any(name.startswith(prefix) and name.endswith(_BOUNDS) for name in self.tensors)

    def _patches(self) -> tuple[dict[str, Any], int, int]:
        """Fields that both kinds of vision parts have; a patch's side, patches of a token's."""
        patch = self.metadata.integer("clip.vision.patch_size", high=1024)
        cell = self.metadata.integer("clip.vision.projector.scale_factor", 3, high=64)
        eps = self.metadata.number("clip.vision.attention.layer_norm_epsilon", low=1e-20, high=0.1)
        return {"patch_size": patch, "pooling_kernel_size": cell, "rms_norm_eps": eps}, patch, cell

    def _vision(self) -> tuple[dict[str, Any], dict[str, Expected]]:
        fields, patch, _ = self._patches()
        width, layers, heads = self._sizes("vision")
        inner = self.metadata.integer("clip.vision.feed_forward_length", high=_MAX_WIDTH)
        query = self._shape("v.blk.0.attn_q.weight", 2)[0]
        key = self._shape("v.blk.0.attn_k.weight", 2)[0]
        if query % heads or key % (query // heads):
            self.metadata.refuse(
                "clip.vision.attention.head_count",
                f"a divisor of the {query} rows of v.blk.0.attn_q.weight and {key} of attn_k",
            )
        head = query // heads
        positions = self._shape("v.position_embd.weight", 3)[1]
        clips = self._clips("v.blk.")
        standardize = any(f"v.std_{name}" in self.tensors for name in ("bias", "scale"))
        raw = {
            **fields,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key // head,
            "head_dim": head,
            "position_embedding_size": positions,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
            "use_clipped_linears": clips,
            "standardize": standardize,
        }
        tower, values = "vision_tower", 3 * patch * patch
        tensors = {
            f"{tower}.patch_embedder.input_proj.weight": Expected(
                "v.patch_embd.weight", (width, 3, patch, patch), (width, values), _pixels_last
            ),
            f"{tower}.patch_embedder.position_embedding_table": _same(
                "v.position_embd.weight", 2, positions, width
            ),
            "embed_vision.embedding_projection.weight": _same(
                "mm.input_projection.weight", self.width, width
            ),
        }
        if standardize:
            tensors[f"{tower}.std_bias"] = _same("v.std_bias", width)
            tensors[f"{tower}.std_scale"] = _same("v.std_scale", width)
        shapes = {
            "attn_q": (query, width), "attn_k": (key, width), "attn_v": (key, width),
            "attn_out": (width, query), "ffn_gate": (inner, width), "ffn_up": (inner, width),
            "ffn_down": (width, inner), "attn_q_norm": (head,), "attn_k_norm": (head,),
        }  # fmt: skip
        for layer in range(layers):
            ours, theirs = f"{tower}.encoder.layers.{layer}", f"v.blk.{layer}"
            for name, stored in _VISION_LINEARS.items():
                matrix = _linear(f"{ours}.{name}", f"{theirs}.{stored}", shapes[stored], clips)
                tensors.update(matrix)
            for name, stored in _VISION_NORMS.items():
                shape = shapes.get(stored, (width,))
                tensors[f"{ours}.{name}.weight"] = _same(f"{theirs}.{stored}.weight", *shape)
        return raw, tensors

    def _patch_embedder(self) -> tuple[dict[str, Any], dict[str, Expected]]:
        """Gemma 4 12B: patches of a soft token's size, and no layers."""
        fields, patch, cell = self._patches()
        width = self.metadata.integer("clip.vision.embedding_length", high=_MAX_WIDTH)
        positions = self._shape("v.position_embd.weight", 3)[1]
        side = patch * cell
        values = 3 * side * side

        def by_pixel(stored: np.ndarray) -> np.ndarray:
            return _pixels_last(stored.reshape(-1, 3, side, side))

        def one_by_pixel(stored: np.ndarray) -> np.ndarray:
            return by_pixel(stored)[0]

        embedder = "vision_embedder"
        tensors = {
            f"{embedder}.patch_dense.weight": Expected(
                "v.patch_embd.weight", (width, values), (width, values), by_pixel
            ),
            f"{embedder}.patch_dense.bias": _same("v.patch_embd.bias", width),
            f"{embedder}.pos_embedding": Expected(
                "v.position_embd.weight", (2, positions, width), (positions, 2, width), _axis_second
            ),
            "embed_vision.embedding_projection.weight": _same(
                "mm.input_projection.weight", self.width, width
            ),
        }
        for kind in ("weight", "bias"):
            tensors[f"{embedder}.patch_ln1.{kind}"] = Expected(
                f"v.patch_norm.1.{kind}", (values,), (values,), one_by_pixel
            )
            tensors[f"{embedder}.patch_ln2.{kind}"] = _same(f"v.patch_norm.2.{kind}", width)
            tensors[f"{embedder}.pos_norm.{kind}"] = _same(f"v.patch_norm.3.{kind}", width)
        return {**fields, "mm_embed_dim": width, "mm_posemb_size": positions}, tensors

    def _audio(self) -> tuple[dict[str, Any], dict[str, Expected]]:
        width, layers, heads = self._sizes("audio")
        if width % heads:
            self.metadata.refuse("clip.audio.attention.head_count", f"a divisor of {width}")
        inner = self.metadata.integer("clip.audio.feed_forward_length", high=1 << 22)
        if inner != 4 * width:
            self.metadata.refuse(
                "clip.audio.feed_forward_length", f"{4 * width}, 4 times the width"
            )
        bands = self.metadata.integer("clip.audio.num_mel_bins", high=4096)
        self._check_audio_eps()
        first = self._shape("a.conv1d.0.weight", 4)[0]
        second = self._shape("a.conv1d.1.weight", 4)[0]
        kernel = self._shape("a.blk.0.conv_dw.weight", 2)[1]
        out = self._shape("a.pre_encode.out.weight", 2)[0]
        clips = self._clips("a.blk.")
        raw = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "subsampling_conv_channels": [first, second],
            "conv_kernel_size": kernel,
            "output_proj_dims": out,
            "use_clipped_linears": clips,
            "input_feat_size": bands,
            "rms_norm_eps": 1e-6,
        }
        tower, subsample = "audio_tower", "audio_tower.subsample_conv_projection"
        tensors = {
            f"{subsample}.layer0.conv.weight": _same("a.conv1d.0.weight", first, 1, 3, 3),
            f"{subsample}.layer0.norm.weight": _same("a.conv1d.0.norm.weight", first),
            f"{subsample}.layer1.conv.weight": _same("a.conv1d.1.weight", second, first, 3, 3),
            f"{subsample}.layer1.norm.weight": _same("a.conv1d.1.norm.weight", second),
            f"{subsample}.input_proj_linear.weight": _same(
                "a.input_projection.weight", width, first // 4 * second
            ),
            f"{tower}.output_proj.weight": _same("a.pre_encode.out.weight", out, width),
            f"{tower}.output_proj.bias": _same("a.pre_encode.out.bias", out),
            "embed_audio.embedding_projection.weight": _same(
                "mm.a.input_projection.weight", self.width, out
            ),
        }
        up, down = (inner, width), (width, inner)
        shapes = {
            "ffn_up": up, "ffn_up_1": up, "ffn_down": down, "ffn_down_1": down,
            "conv_pw1": (2 * width, width),
        }  # fmt: skip
        for layer in range(layers):
            ours, theirs = f"{tower}.layers.{layer}", f"a.blk.{layer}"
            for name, stored in _AUDIO_LINEARS.items():
                shape = shapes.get(stored, (width, width))
                tensors.update(_linear(f"{ours}.{name}", f"{theirs}.{stored}", shape, clips))
            for name, stored in _AUDIO_NORMS.items():
                tensors[f"{ours}.{name}.weight"] = _same(f"{theirs}.{stored}.weight", width)
            tensors[f"{ours}.self_attn.relative_k_proj.weight"] = _same(
                f"{theirs}.attn_k_rel.weight", width, width
            )
            head = (width // heads,)
            tensors[f"{ours}.self_attn.per_dim_scale"] = Expected(
                f"{theirs}.per_dim_scale.weight", head, head, self._before_softplus
            )
            tensors[f"{ours}.lconv1d.depthwise_conv1d.weight"] = Expected(
                f"{theirs}.conv_dw.weight", (width, kernel), (width, 1, kernel)
            )
        return raw, tensors

    def _waveform(self) -> tuple[dict[str, Any], dict[str, Expected]]:
        """Gemma 4 12B: samples are projected as they are."""
        self._check_audio_eps()
        samples = self._shape("mm.a.input_projection.weight", 2)[1]
        name = "embed_audio.embedding_projection.weight"
        return (
            {"audio_embed_dim": samples, "rms_norm_eps": 1e-6},
            {name: _same("mm.a.input_projection.weight", self.width, samples)},
        )

    def _check_audio_eps(self) -> None:
        # Early converters wrote 1e-5; model and graph have 1e-6 whatever the file says.
        key = "clip.audio.attention.layer_norm_epsilon"
        if self.metadata.number(key, 1e-6, low=0.0, high=1.0) not in (1e-5, 1e-6):
            self.metadata.refuse(key, "1e-06", _ADVICE)

    def _before_softplus(self, stored: np.ndarray) -> np.ndarray:
        values = stored.astype(np.float64)
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError(
                f"{self.path}: a per_dim_scale holds {quoted(float(values.min()))}; expected "
                f"positive numbers: softplus was applied to them. {_ADVICE}"
            )
        return values + np.log(-np.expm1(-values))

    def check(self, expected: Mapping[str, Expected]) -> None:
        """ValueError listing tensors that are missing, unknown, of a wrong shape or type."""
        problems = list(self._problems({one.name: one for one in expected.values()}))
        if problems:
            raise ValueError(
                f"{self.path}: the tensors don't match the metadata:\n{bullet_list(problems)}\n"
                f"{_ADVICE}"
            )

    def _problems(self, expected: Mapping[str, Expected]) -> Iterator[str]:
        hints = 0
        for name, (_, info) in self.tensors.items():
            one = expected.get(name)
            if one is None:
                # Only texts that are shown get a hint: a hostile file may have 100,000 names.
                hints += 1
                hint = did_you_mean(name, expected) if hints < MAX_LISTED else ""
                yield f"{quoted(name)} is no tensor of these towers. {hint}".rstrip()
            elif info.shape != one.stored:
                got = format_shape(info.shape)
                yield f"{name}: shape is {got}; expected {format_shape(one.stored)}"
            elif info.dtype not in _types(one):
                yield f"{name}: type is {info.dtype}; expected {one_of(_types(one))}"
        for name, one in expected.items():
            if name not in self.tensors:
                yield f"{name} is missing; expected {format_shape(one.stored)}"


def _types(one: Expected) -> tuple[str, ...]:
    """Matrices may be quantised; convolutions, tables, vectors and what is restored may not."""
    blocked = one.restore is None and len(one.shape) == 2
    return (*PLAIN, *BLOCKED_TYPES) if blocked else tuple(PLAIN)


def _same(name: str, *shape: int) -> Expected:
    return Expected(name, shape, shape)


def _linear(ours: str, theirs: str, shape: Shape, clips: bool) -> dict[str, Expected]:
    tensors = {f"{ours}.linear.weight": _same(f"{theirs}.weight", *shape)}
    for bound in _BOUNDS if clips else ():
        tensors[f"{ours}.{bound}"] = Expected(f"{theirs}.{bound}", (1,), ())
    return tensors


def _pixels_last(patches: np.ndarray) -> np.ndarray:
    """[n, channel, row, column] as [n, row · column · channel]."""
    return patches.transpose(0, 2, 3, 1).reshape(len(patches), -1)


def _axis_second(table: np.ndarray) -> np.ndarray:
    return table.transpose(1, 0, 2)
