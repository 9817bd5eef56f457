"""Sparse autoencoders in SAELens's format: `cfg.json` and `sae_weights.safetensors` in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gemloupe import strict_json
from gemloupe.arrays import as_float32
from gemloupe.errors import did_you_mean, format_shape, one_of, quoted
from gemloupe.safetensors_header import TensorInfo, read_header

ARCHITECTURES = ("standard", "jumprelu", "gated", "topk", "abstopk")
NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in")
_CONFIG, _WEIGHTS, _SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"

# Vectors [d_sae] beside W_enc [d_in, d_sae], W_dec [d_sae, d_in] and b_dec [d_in].
_VECTORS = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "topk": ("b_enc",),
    "abstopk": ("b_enc",),
}
_NUMPY = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
_LAYER_NORM_EPS = 1e-5  # SAELens's, added to the standard deviation.


@dataclass(frozen=True, eq=False)
class FeatureParts:
    """Some features of an autoencoder in affine terms: pre = encoder · x + bias.

    A feature is f = pre where pre > threshold, else 0; one that is set to v adds
    (v − f) · decoder to x.
    """

    encoder: np.ndarray
    """float32 [n, d_in]."""
    bias: np.ndarray
    """float32 [n]."""
    threshold: np.ndarray
    """float32 [n], 0 or more."""
    decoder: np.ndarray
    """float32 [n, d_in]."""


@dataclass(frozen=True, eq=False)
class Sae:
    """A sparse autoencoder of activations [T, d_in], made by `load_sae`.

    Inputs may be [T, …] whose other sizes multiply to d_in, such as `attn.z` [T, N, H].
    """

    architecture: str
    """"standard" (ReLU), "jumprelu", "gated", "topk" or "abstopk"."""
    W_enc: np.ndarray
    """float32 [d_in, d_sae]."""
    W_dec: np.ndarray
    """float32 [d_sae, d_in]: a feature's direction in each row."""
    b_dec: np.ndarray
    """float32 [d_in]."""
    vectors: Mapping[str, np.ndarray] = field(repr=False)
    """float32 [d_sae] by name: b_enc; threshold (jumprelu); b_gate, b_mag, r_mag (gated)."""
    k: int
    """How many features are active (topk, abstopk); 0 for the others."""
    rescale_acts_by_decoder_norm: bool
    apply_b_dec_to_input: bool
    normalize_activations: str
    """How each row of the input is scaled: "none", "layer_norm" or "constant_norm_rescale"."""
    scaling_factor: np.ndarray | None = field(repr=False)
    """float32 [d_sae]: a finetuned factor of the features in `decode`; None in most."""
    hook_name: str | None
    """Where the activations were taken, in TransformerLens's names; None if the file says not."""

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    def __repr__(self) -> str:
        where = f", {self.hook_name}" if self.hook_name else ""
        return f"Sae({self.architecture}, {self.d_in} -> {self.d_sae} features{where})"

    def encode(self, x: Any, features: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Feature activations float32 [T, d_sae] of `x` [T, d_in], or of `features` only.

        ValueError for another shape, IndexError for a feature that there is not.
        """
        rows, _, _ = self._normalized(x)
        wanted = slice(None) if features is None else self._features(features)
        z = rows - self.b_dec if self.apply_b_dec_to_input else rows
        if self.architecture in ("topk", "abstopk"):
            return self._top_k(z @ self.W_enc + self.vectors["b_enc"])[:, wanted]
        raw = z @ self.W_enc[:, wanted]
        if self.architecture == "gated":
            gate = raw + self.vectors["b_gate"][wanted] > 0
            scale = np.exp(self.vectors["r_mag"][wanted])
            return np.maximum(raw * scale + self.vectors["b_mag"][wanted], 0) * gate
        raw += self.vectors["b_enc"][wanted]
        active = np.maximum(raw, 0)
        if self.architecture == "jumprelu":
            active *= raw > self.vectors["threshold"][wanted]
        return active

    def decode(self, features: Any, x: Any = None) -> np.ndarray:
        """Activations float32 [T, d_in] from feature activations [T, d_sae].

        `x`: what was encoded; needed where `normalize_activations` is not "none", whose scale is
        taken back. ValueError for other shapes and without it.
        """
        rows = as_float32(features, "features", ("T", self.d_sae))
        out = (rows * self._decoder_scale(slice(None))) @ self.W_dec + self.b_dec
        if self.normalize_activations == "none":
            return out
        if x is None:
            raise ValueError(
                f"decode needs x: this autoencoder scales its inputs "
                f"({self.normalize_activations}), and what was encoded says by how much"
            )
        normalized, scale, mean = self._normalized(x)
        if len(normalized) != len(rows):
            raise ValueError(f"x has {len(normalized)} rows; expected {len(rows)}, as features")
        return out * scale + mean

    def with_features(self, x: Any, values: Mapping[int, float]) -> np.ndarray:
        """`x` with some features' activations set to `values`, what the rest says unchanged.

        That is x + decode(changed features) − decode(features): the reconstruction's error stays
        in. Same shape as `x`, float32. ValueError for another shape of `x` and for values that
        are no numbers, IndexError for a feature that there is not.
        """
        array = as_float32(x, "x")
        ids = self._features(list(values))
        wanted = as_float32(list(values.values()), "values", (len(ids),))
        change = (wanted - self.encode(array, ids)) * self._decoder_scale(ids)
        _, scale, _ = self._normalized(array)
        return array + ((change @ self.W_dec[ids]) * scale).reshape(array.shape)

    def feature_parts(self, features: Sequence[int] | np.ndarray) -> FeatureParts | None:
        """What an engine needs to read and write `features` without Python.

        None where a feature is no ReLU or jump of one affine function of x: gated and top-k
        autoencoders, and those that scale their inputs. IndexError for a feature there is not.
        """
        ids = self._features(features)
        affine = self.architecture in ("standard", "jumprelu")
        if not affine or self.normalize_activations != "none":
            return None
        encoder = np.ascontiguousarray(self.W_enc[:, ids].T)
        bias = self.vectors["b_enc"][ids]
        if self.apply_b_dec_to_input:
            bias = bias - encoder @ self.b_dec
        threshold = np.zeros(len(ids), np.float32)
        if self.architecture == "jumprelu":
            threshold = np.maximum(self.vectors["threshold"][ids], threshold)
        decoder = self.W_dec[ids] * self._decoder_scale(ids)[:, None]
        return FeatureParts(encoder, bias, threshold, decoder)

    def _features(self, features: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(features)
        if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
            raise ValueError(f"features is {quoted(features)}; expected a list of numbers")
        ids = ids.astype(np.int64)
        if ((ids < 0) | (ids >= self.d_sae)).any():
            raise IndexError(f"features is {quoted(features)}; expected 0 to {self.d_sae - 1}")
        return ids

    def _normalized(self, x: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows [T, d_in] as the encoder reads them, and what they were divided by and moved."""
        array = as_float32(x, "x")
        if array.ndim < 2 or np.prod(array.shape[1:]) != self.d_in:
            raise ValueError(f"x has shape {format_shape(array.shape)}; expected [T, {self.d_in}]")
        rows = array.reshape(len(array), self.d_in)
        one, zero = np.float32(1), np.float32(0)
        if self.normalize_activations == "layer_norm":
            mean = rows.mean(axis=1, keepdims=True)
            deviation = rows.std(axis=1, ddof=1, keepdims=True)
            return (rows - mean) / (deviation + np.float32(_LAYER_NORM_EPS)), deviation, mean
        if self.normalize_activations == "constant_norm_rescale":
            norm = np.linalg.norm(rows, axis=1, keepdims=True)
            scale = np.maximum(norm, np.finfo(np.float32).tiny) / np.float32(np.sqrt(self.d_in))
            return rows / scale, scale, zero
        return rows, one, zero

    def _top_k(self, raw: np.ndarray) -> np.ndarray:
        if self.rescale_acts_by_decoder_norm:
            raw = raw * np.linalg.norm(self.W_dec, axis=1)
        rank = np.abs(raw) if self.architecture == "abstopk" else raw
        chosen = np.argpartition(rank, -self.k, axis=1)[:, -self.k :]
        kept = np.take_along_axis(raw, chosen, axis=1)
        active = np.zeros_like(raw)
        np.put_along_axis(
            active, chosen, kept if self.architecture == "abstopk" else np.maximum(kept, 0), axis=1
        )
        return active

    def _decoder_scale(self, ids: Any) -> np.ndarray:
        """What a feature's activation is multiplied by before its direction is added."""
        scale = np.ones(self.d_sae, np.float32)[ids]
        if self.rescale_acts_by_decoder_norm:
            scale = scale / np.linalg.norm(self.W_dec[ids], axis=1)
        return scale if self.scaling_factor is None else scale * self.scaling_factor[ids]


def load_sae(folder: str | Path) -> Sae:
    """Reads an autoencoder that SAELens saved (versions 3 to 6), weights as float32.

    Folders come from strangers: nothing in them is run, and every size is checked. Raises
    FileNotFoundError where one of the two files is missing, and ValueError, naming the file, what
    was got and what is expected, for anything else that does not fit: an architecture that is none
    of ARCHITECTURES (transcoders map to another point), missing or other tensors, shapes, numbers
    that are not finite, an input scale that the folder does not hold.
    """
    folder = Path(folder)
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: no such file; expected a folder with {_CONFIG} and {_WEIGHTS}, "
                "as SAELens's save_model writes it"
            )
    config = _Config(folder / _CONFIG)
    path = folder / _WEIGHTS
    infos = {info.name: info for info in read_header(path)}
    if config.architecture == "jumprelu" and "log_threshold" in infos:
        infos["threshold"] = infos.pop("log_threshold")
    wanted = config.shapes()
    if missing := sorted(set(wanted) - set(infos)):
        raise ValueError(
            f"{path}: has no {one_of(missing)}, which architecture {config.architecture!r} needs; "
            f"it has {one_of(sorted(infos)[:10])}"
        )
    if other := sorted(set(infos) - set(wanted) - {"scaling_factor"}):
        raise ValueError(
            f"{path}: has {one_of(other[:10])}; expected {one_of(sorted(wanted))} for "
            f"architecture {config.architecture!r}"
        )
    tensors = {name: _read(path, infos[name], shape) for name, shape in wanted.items()}
    if "threshold" in tensors and infos["threshold"].name == "log_threshold":
        tensors["threshold"] = np.exp(tensors["threshold"])
    factor = _finetuned_factor(path, infos, config)
    if config.normalize == "expected_average_only_in":
        _fold_input_scale(tensors, _input_scale(folder), config)
    vectors = {name: tensors[name] for name in _VECTORS[config.architecture]}
    return Sae(
        architecture=config.architecture,
        W_enc=tensors["W_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        vectors=vectors,
        k=config.k,
        rescale_acts_by_decoder_norm=config.rescale,
        apply_b_dec_to_input=config.apply_b_dec,
        normalize_activations=(
            "none" if config.normalize == "expected_average_only_in" else config.normalize
        ),
        scaling_factor=factor,
        hook_name=config.hook_name,
    )


class _Config:
    """The fields of cfg.json that say how to compute, in the spellings of SAELens 3 to 6."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._raw = strict_json.read_object(path)
        activation = self._text("activation_fn", self._text("activation_fn_str", "relu"))
        arguments = self._raw.get("activation_fn_kwargs") or {}
        if not isinstance(arguments, dict):
            self._refuse("activation_fn_kwargs", arguments, "an object")
        self.architecture = self._text("architecture", "standard")
        if activation == "topk" and self.architecture == "standard":
            self.architecture = "topk"
        self._check("architecture", self.architecture, ARCHITECTURES)
        if self.architecture in ("standard", "jumprelu", "gated"):
            self._check("activation_fn", activation, ("relu",))
        self.d_in = self._count("d_in")
        self.d_sae = self._count("d_sae")
        self.k = 0
        if self.architecture in ("topk", "abstopk"):
            self.k = self._count("k", arguments.get("k"))
            if self.k > self.d_sae:
                self._refuse("k", self.k, f"1 to d_sae, which is {self.d_sae}")
        self.rescale = self._flag("rescale_acts_by_decoder_norm", False)
        if self.rescale and not self.k:
            self._refuse("rescale_acts_by_decoder_norm", True, "false for this architecture")
        self.apply_b_dec = self._flag("apply_b_dec_to_input", True)
        self.finetuned = self._flag("finetuning_scaling_factor", False)
        normalize = self._raw.get("normalize_activations")
        if normalize is None or isinstance(normalize, bool):  # Before SAELens 3.
            normalize = "expected_average_only_in" if normalize else "none"
        self.normalize = normalize
        self._check("normalize_activations", normalize, NORMALIZATIONS)
        self.hook_name = self._hook_name()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        vectors = dict.fromkeys(_VECTORS[self.architecture], (self.d_sae,))
        return {
            "W_enc": (self.d_in, self.d_sae),
            "W_dec": (self.d_sae, self.d_in),
            "b_dec": (self.d_in,),
            **vectors,
        }

    def _hook_name(self) -> str | None:
        metadata = self._raw.get("metadata")
        inner = metadata.get("hook_name") if isinstance(metadata, dict) else None
        name = inner or self._raw.get("hook_name") or self._raw.get("hook_point")
        return name if isinstance(name, str) else None

    def _text(self, name: str, default: str) -> str:
        value = self._raw.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            self._refuse(name, value, "a string")
        return value

    def _flag(self, name: str, default: bool) -> bool:
        value = self._raw.get(name)
        if value is not None and not isinstance(value, bool):
            self._refuse(name, value, "true or false")
        return default if value is None else value

    def _count(self, name: str, default: Any = None) -> int:
        value = self._raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**31:
            self._refuse(name, value, "a number from 1 to 2^31")
        return value

    def _check(self, name: str, value: Any, choices: Sequence[str]) -> None:
        if value not in choices:
            hint = did_you_mean(str(value), choices)
            self._refuse(name, value, f"{one_of(choices)}. {hint}".strip())

    def _refuse(self, name: str, got: Any, expected: str) -> None:
        raise ValueError(f"{self._path}: {name} is {quoted(got)}; expected {expected}")


def _read(path: Path, info: TensorInfo, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the file as float32; its bytes lie inside the file (read_header checks)."""
    where = f"{path}: tensor {quoted(info.name)}"
    if info.shape != shape:
        raise ValueError(
            f"{where} has shape {format_shape(info.shape)}; expected {format_shape(shape)}"
        )
    if info.dtype == "BF16":
        halves = np.fromfile(path, "<u2", info.elements, offset=info.begin)
        array = (halves.astype(np.uint32) << 16).view(np.float32)
    elif info.dtype in _NUMPY:
        array = np.fromfile(path, _NUMPY[info.dtype], info.elements, offset=info.begin)
    else:
        raise ValueError(f"{where} has dtype {info.dtype}; expected {one_of([*_NUMPY, 'BF16'])}")
    array = as_float32(array, where)
    # An infinite threshold is a feature that is never active.
    allowed = ~np.isnan(array) if info.name == "threshold" else np.isfinite(array)
    if not allowed.all():
        raise ValueError(f"{where} holds {array[~allowed][0]}; expected finite numbers")
    array = array.reshape(shape)
    array.flags.writeable = False
    return array


def _finetuned_factor(
    path: Path, infos: Mapping[str, TensorInfo], config: _Config
) -> np.ndarray | None:
    """`scaling_factor`: ones in files that only carry it along, else announced by the config."""
    if "scaling_factor" not in infos:
        return None
    factor = _read(path, infos["scaling_factor"], (config.d_sae,))
    if np.allclose(factor, 1):
        return None
    if not config.finetuned:
        raise ValueError(
            f"{path}: scaling_factor is not all ones, but finetuning_scaling_factor is not true "
            f"in {_CONFIG}; expected both or none"
        )
    return factor


def _input_scale(folder: Path) -> float:
    """The factor that brings inputs to the average norm that the training saw."""
    path = folder / _SCALER
    if not path.is_file():
        raise ValueError(
            f"{folder / _CONFIG}: normalize_activations is 'expected_average_only_in', but the "
            f"folder has no {_SCALER} with its factor; expected a folder with it, or one whose "
            "weights hold it (SAELens: sae.fold_activation_norm_scaling_factor(factor), save_model)"
        )
    scale = strict_json.read_object(path).get("scaling_factor")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e30:
        raise ValueError(f"{path}: scaling_factor is {quoted(scale)}; expected a number above 0")
    return float(scale)


def _fold_input_scale(tensors: dict[str, np.ndarray], scale: float, config: _Config) -> None:
    """Folds x -> scale · x before encoding and its inverse after decoding into the weights."""
    if config.rescale:
        raise ValueError(
            f"{_CONFIG}: rescale_acts_by_decoder_norm with an input scale that is not folded into "
            "the weights; expected one of the two"
        )
    tensors["W_enc"] = tensors["W_enc"] * np.float32(scale)
    tensors["W_dec"] = tensors["W_dec"] / np.float32(scale)
    tensors["b_dec"] = tensors["b_dec"] / np.float32(scale)
