"""The two sides of a comparison: a gemloupe model, a transformers model, a recorded file."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gemloupe import _core
from gemloupe import run as _run
from gemloupe.comparison import transformers_capture as hf
from gemloupe.comparison import transformers_towers as towers
from gemloupe.comparison.engines import PLAIN, Engine
from gemloupe.comparison.media import GemloupeTowers, MediaRows, Source, media_rows, parts
from gemloupe.comparison.tensors import AdaptedTensors, GemloupeTensors, Tensors, TorchTensors
from gemloupe.embed_scale import embed_scale
from gemloupe.errors import quoted

if TYPE_CHECKING:
    from gemloupe.config import ModelConfig
    from gemloupe.hooks import HookPoint
    from gemloupe.media import Medium
    from gemloupe.model import Model
    from gemloupe.prompt import Prompt

Values = dict[str, np.ndarray]
Experts = Mapping[int, np.ndarray]
"""Layer -> int [T, k], the experts to choose."""

# What both sides must agree on, by config.json's names.
SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_size_per_layer_input",
    "num_experts",
)


class Side(Protocol):
    """What a comparison asks of either side."""

    engine: Engine
    embed_scale: str
    shape: dict[str, int]

    @property
    def tensors(self) -> Tensors | None: ...

    @property
    def can_force_experts(self) -> bool: ...

    def values(
        self, prompt: Prompt, names: Collection[str], experts: Experts | None = None
    ) -> Values:
        """Returns those of `names` that this side has, float32 [T, …]; expert ids are integers."""

    def float32_values(
        self, prompt: Prompt, names: Collection[str], experts: Experts | None = None
    ) -> Values | None:
        """The same weights computed in float32; None where this side did so already."""

    def float32_logits(self, prompt: Prompt) -> np.ndarray | None:
        """Logits [T, V] of `float32_values`, each token with the experts that float32 chooses."""

    def media_rows(self, prompt: Prompt, config: ModelConfig) -> MediaRows | None:
        """What this side's towers make of a prompt's media; None without media."""

    def tower_values(
        self, prompt: Prompt, source: Source, points: Sequence[HookPoint], float32: bool = False
    ) -> Values | None:
        """What this side's tower holds at those of `points` that it has; with `float32` what it
        would hold in float32, None where it holds that already."""


class GemloupeSide:
    """A gemloupe model, under adapters where it has any."""

    def __init__(self, model: Model, adapter: Any = None, name: str = "model") -> None:
        """`name`: "model" or "reference", for messages."""
        self.model = model
        self.selection = model.adapters.selected(adapter)
        self._towers = GemloupeTowers(model, name, self.selection)
        self.tensors: Tensors = GemloupeTensors(model.weights)
        if self.selection:
            self.tensors = AdaptedTensors(model.weights, model.config.text, self.selection)
        quantised = any(
            info.dtype not in PLAIN for _, info in model.weights.items() if len(info.shape) > 1
        )
        label = f"gemloupe, {model.dtype} weights, float32 activations, {model.kv_dtype} cache"
        self.engine = Engine(
            label=f"{label}, adapter {self.selection.label}" if self.selection else label,
            dtype="float32",
            kv_dtype=model.kv_dtype,
            rounds_inputs=quantised,
            bfloat16_products=model.dtype != "float32" and _has_bfloat16_products(),
        )
        text = model.config.text
        self.shape = {name: getattr(text, name) for name in SHAPE_FIELDS}
        self.embed_scale = _scale_of(model)

    @property
    def can_force_experts(self) -> bool:
        return "edit" in inspect.signature(_run.run).parameters

    def values(
        self, prompt: Prompt, names: Collection[str], experts: Experts | None = None
    ) -> Values:
        arguments: dict[str, Any] = {"adapter": dict(self.selection.adapters)}
        if experts:
            arguments["edit"] = {f"layers.{i}.router.experts": e for i, e in experts.items()}
        wants_logits = any(name.startswith("logits") for name in names)
        logits = "all" if wants_logits else None
        x = self._towers.prompt(prompt) if prompt.media else prompt.ids.tolist()
        # Every position's keys are compared: a ring would have lost those of a long prompt.
        cache = self.model.new_cache(sliding="full")
        run = self.model.run(x, capture=list(names), logits=logits, cache=cache, **arguments)
        return {name: np.asarray(run[name]) for name in names}

    def media_rows(self, prompt: Prompt, config: ModelConfig) -> MediaRows | None:
        tokens = [self._towers.soft_tokens(medium) for medium in prompt.media]
        return media_rows(prompt, tokens, config)

    def tower_values(
        self, prompt: Prompt, source: Source, points: Sequence[HookPoint], float32: bool = False
    ) -> Values | None:
        names = [point.name for point in points]
        return None if float32 else self._towers.values(prompt, source, names)

    def float32_values(
        self, prompt: Prompt, names: Collection[str], experts: Experts | None = None
    ) -> None:
        return None

    def float32_logits(self, prompt: Prompt) -> None:
        return None


def _has_bfloat16_products() -> bool:
    return any(part in _core.isa() for part in ("bf16", "amx"))


def _scale_of(model: Model) -> str:
    """The dtype that √hidden_size is rounded to, "float32" where that makes no difference."""
    size = model.config.text.hidden_size
    if embed_scale("float32", size) == embed_scale("bfloat16", size):
        return "float32"
    return model.embed_scale


class TransformersSide:
    """A transformers model, as it was loaded."""

    def __init__(self, model: Any) -> None:
        hf.import_torch("a transformers reference")
        self.model = model
        decoder = hf.decoder_of(model)
        dtype = hf.dtype_of(model)
        self.engine = Engine(label=hf.describe(model), dtype=dtype)
        self.embed_scale = dtype if dtype in PLAIN else "float32"
        self.shape = {name: int(getattr(decoder.config, name, None) or 0) for name in SHAPE_FIELDS}
        if not getattr(decoder.config, "enable_moe_block", False):
            self.shape["num_experts"] = 0
        self._state = hf.text_state(model)
        self.tensors: Tensors = TorchTensors(self._state)
        self._aligned: str | None = None
        # Soft tokens by medium and whether in float32, of the prompt that came last.
        self._encoded: tuple[Prompt | None, dict[bool, list[np.ndarray]]] = (None, {})
        self.notes: list[str] = []
        if rounded := hf.rounded_frequencies(model):
            self.notes.append(
                f"the reference's RoPE frequencies are rounded to {rounded}, as model.to(dtype) "
                "does; transformers' from_pretrained(dtype=…) keeps them in float32"
            )

    @property
    def can_force_experts(self) -> bool:
        return True

    def align_embed_scale(self, dtype: str) -> None:
        """Multiplies embeddings with √hidden_size rounded to `dtype` from now on."""
        self._aligned = dtype
        self.embed_scale = dtype

    def values(
        self, prompt: Prompt, names: Collection[str], experts: Experts | None = None
    ) -> Values:
        return self._record(prompt, names, experts, float32=False)

    def float32_values(
        self, prompt: Prompt, names: Collection[str], experts: Experts | None = None
    ) -> Values | None:
        if self.engine.dtype in ("float32", "float64"):
            return None
        return self._record(prompt, names, experts, float32=True)

    def float32_logits(self, prompt: Prompt) -> np.ndarray | None:
        values = self.float32_values(prompt, ["logits"])
        return None if values is None else values["logits"]

    def _record(
        self, prompt: Prompt, names: Collection[str], experts: Experts | None, float32: bool
    ) -> Values:
        media = None
        if prompt.media:
            assert prompt.config is not None
            rows = media_rows(prompt, self._soft_tokens(prompt, float32), prompt.config)
            media = None if rows is None else (prompt, rows)
        tensors = hf.record(
            self.model,
            prompt.ids.tolist(),
            names,
            experts=experts,
            float32=float32,
            embed_scale=self._aligned,
            media=media,
        )
        return {name: as_array(tensor) for name, tensor in tensors.items()}

    def media_rows(self, prompt: Prompt, config: ModelConfig) -> MediaRows | None:
        return media_rows(prompt, self._soft_tokens(prompt, False), config)

    def _soft_tokens(self, prompt: Prompt, float32: bool) -> list[np.ndarray]:
        if self._encoded[0] is not prompt:
            self._encoded = (prompt, {})
        held = self._encoded[1]
        if float32 not in held:
            held[float32] = [self._tokens_of(medium, float32) for medium in prompt.media]
        return held[float32]

    def _tokens_of(self, medium: Medium, float32: bool) -> np.ndarray:
        known = parts(medium)
        if known is None:
            return np.asarray(medium.soft_tokens)
        encoded = [towers.encode(self.model, part, float32=float32)[0] for part in known]
        return np.concatenate(encoded)

    def tower_values(
        self, prompt: Prompt, source: Source, points: Sequence[HookPoint], float32: bool = False
    ) -> Values | None:
        if float32 and self.engine.dtype in ("float32", "float64"):
            return None
        return towers.encode(self.model, source, points, float32=float32)[1]

    @contextlib.contextmanager
    def swapped(self, name: str, rows: np.ndarray) -> Iterator[None]:
        """Puts other values into one tensor while the context lasts."""
        torch = hf.import_torch("a transformers reference")
        parameter = self._state[name]
        self.tensors.recent.clear()
        kept = parameter.data
        other = torch.from_numpy(np.array(rows, np.float32)).reshape(kept.shape)
        try:
            parameter.data = other.to(kept.dtype).to(kept.device)
            yield
        finally:
            parameter.data = kept
            self.tensors.recent.clear()


def as_array(tensor: Any) -> np.ndarray:
    """A CPU tensor as float32, or integers as they are."""
    array: np.ndarray = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array


def check_same_shape(model: Side, reference: Side) -> None:
    """ValueError naming the sizes in which both sides differ."""
    differing = [
        f"{name} is {model.shape[name]} in the model and {reference.shape[name]} in the reference"
        for name in SHAPE_FIELDS
        if model.shape[name] != reference.shape[name]
    ]
    if differing:
        raise ValueError(
            "the reference is another model: " + ", ".join(differing) + "; expected the same "
            "checkpoint on both sides"
        )


def check_values(name: str, got: np.ndarray, expected: np.ndarray) -> None:
    if got.shape != expected.shape:
        raise ValueError(
            f"{quoted(name)} has shape {list(got.shape)} in the model and {list(expected.shape)} "
            "in the reference; expected the same: are both the same checkpoint?"
        )
