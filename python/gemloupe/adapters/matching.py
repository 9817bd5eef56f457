"""Which tensor of an adapter changes which module of a model; what does not fit is listed.

Nothing is read but names and shapes: `match` either accounts for every tensor or raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from gemloupe.adapters import keys
from gemloupe.adapters.adapter_config import AdapterConfig
from gemloupe.adapters.keys import Key
from gemloupe.adapters.modules import HEAD, Module, Towers, modules_of
from gemloupe.checkpoint import expected_text_tensors, tower_of, unused_text_tensors
from gemloupe.config import TextConfig
from gemloupe.errors import MAX_LISTED, did_you_mean, format_shape, quoted
from gemloupe.safetensors_header import TensorInfo

DTYPES = ("F32", "BF16", "F16")
NO_TOWERS = Towers()


@dataclass(frozen=True)
class LowRank:
    """A pair of A and B, and what belongs to it."""

    module: Module
    a: TensorInfo
    b: TensorInfo
    rank: int
    scale: float
    """alpha / r; the embedding's own scale is not in it."""
    bias: TensorInfo | None = None
    magnitude: TensorInfo | None = None
    """DoRA's m."""
    swapped: bool = False
    """An embedding whose weight was targeted as a parameter: A is [r, D] and B [V, r]."""


@dataclass(frozen=True)
class Replacement:
    """A whole matrix of modules_to_save."""

    module: Module
    tensor: TensorInfo


@dataclass(frozen=True)
class Rows:
    """Trainable tokens: rows of an embedding or of the head."""

    module: Module
    tensor: TensorInfo
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Bias:
    """A bias in place of a module's own."""

    module: Module
    tensor: TensorInfo
    weight: str
    """The checkpoint's tensor."""


Changing = LowRank | Replacement | Rows | Bias


class Copy(NamedTuple):
    """A tensor that has to hold what the model's does: the adapter changes nothing there."""

    weight: str
    tensor: TensorInfo
    why: str
    """What the error says where it differs."""


class Ignored(NamedTuple):
    """A tensor of the adapter that acts nowhere in this model."""

    key: str
    reason: str


@dataclass(frozen=True)
class Match:
    """Every tensor of an adapter, by what it does."""

    low_rank: tuple[LowRank, ...]
    replacements: tuple[Replacement, ...]
    rows: tuple[Rows, ...]
    biases: tuple[Bias, ...]
    copies: tuple[Copy, ...]
    ignored: tuple[Ignored, ...]

    @property
    def changes(self) -> tuple[Changing, ...]:
        """All that changes a module."""
        return (*self.low_rank, *self.replacements, *self.rows, *self.biases)

    @property
    def touched(self) -> list[Module]:
        """The modules that change, each once."""
        return list(dict.fromkeys(change.module for change in self.changes))


def match(
    tensors: Iterable[TensorInfo],
    adapter: AdapterConfig,
    config: TextConfig,
    towers: Towers = NO_TOWERS,
) -> tuple[Match, list[str]]:
    """Assigns every tensor to a module; returns also what is wrong, a line each."""
    matcher = _Matcher(adapter, config, towers)
    for tensor in tensors:
        matcher.sort(tensor)
    matcher.pair()
    return matcher.result(), matcher.problems


@dataclass
class _Matcher:
    adapter: AdapterConfig
    config: TextConfig
    towers: Towers
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.modules = modules_of(self.config) | dict(self.towers.modules)
        self.shapes = expected_text_tensors(self.config) | dict(self.towers.shapes)
        self.unused = unused_text_tensors(self.config)
        self.groups: dict[tuple[str, str, int], dict[str, TensorInfo]] = {}
        self.names: set[str] = set()
        self.low_rank: list[LowRank] = []
        self.replacements: list[Replacement] = []
        self.rows: list[Rows] = []
        self.biases: list[Bias] = []
        self.copies: list[Copy] = []
        self.ignored: list[Ignored] = []

    def result(self) -> Match:
        return Match(
            tuple(self.low_rank), tuple(self.replacements), tuple(self.rows), tuple(self.biases),
            tuple(self.copies), tuple(self.ignored),
        )  # fmt: skip

    def sort(self, tensor: TensorInfo) -> None:
        """Puts one tensor to its module's others, or says at once what becomes of it."""
        key = keys.parse(tensor.name)
        path = keys.in_text_decoder(key.path)
        tower = None if path else tower_of(keys.in_towers(key.path))
        if tower in self.towers.parts:
            path = keys.in_towers(key.path)
        if path is None and tower is None:
            self._unmatched(tensor, key.path)
        elif path is None:
            self.ignored.append(Ignored(tensor.name, f"this model has no {tower}"))
        elif (f"{path}.weight" if key.part != "saved" else path) in self.unused:
            layer = int(path.split(".")[1])
            source = self.config.layers[layer].kv_source
            reason = f"layer {layer} reads the keys and values of layer {source}"
            self.ignored.append(Ignored(tensor.name, reason))
        elif tensor.dtype not in DTYPES:
            self._problem(tensor, f"dtype is {tensor.dtype}; expected F32, BF16 or F16")
        elif key.part == "saved":
            self._saved(tensor, path)
        elif key.part == "tokens":
            self._tokens(tensor, path)
        elif key.part == "base":
            self._base_copy(tensor, path)
        elif key.part == "base_bias":
            self._saved(tensor, f"{path}.bias")
        else:
            self._part(tensor, key, path)

    def _problem(self, tensor: TensorInfo, text: str) -> None:
        self.problems.append(f"{quoted(tensor.name.removeprefix(keys.PREFIX))}: {text}")

    def _unmatched(self, tensor: TensorInfo, path: str) -> None:
        # A hint for those that are shown only: a hostile file may have 100,000 names.
        shown = len(self.problems) < MAX_LISTED
        hint = did_you_mean(path, self.modules) if shown else ""
        self._problem(tensor, f"is no module of this model. {hint}".rstrip())

    def _shape_is(self, tensor: TensorInfo, shape: tuple[int, ...]) -> bool:
        if tensor.shape == shape:
            return True
        self._problem(
            tensor, f"shape is {format_shape(tensor.shape)}; expected {format_shape(shape)}"
        )
        return False

    def _saved(self, tensor: TensorInfo, path: str) -> None:
        module = self.modules.get(path.removesuffix(".weight"))
        if module is not None and not module.is_experts and path.endswith(".weight"):
            if self._shape_is(tensor, module.shape):
                self.replacements.append(Replacement(module, tensor))
        elif path in self.shapes and path.endswith(".bias") and path[:-5] in self.modules:
            if self._shape_is(tensor, self.shapes[path]):
                self.biases.append(Bias(self.modules[path[:-5]], tensor, path))
        elif path in self.shapes:
            if self._shape_is(tensor, self.shapes[path]):
                why = (
                    "other values than the model's; of those only matrices, embeddings and the "
                    "biases of matrices can be replaced"
                )
                self.copies.append(Copy(path, tensor, why))
        else:
            self._unmatched(tensor, path)

    def _base_copy(self, tensor: TensorInfo, path: str) -> None:
        module = self.modules.get(path)
        if module is None:
            self._unmatched(tensor, path)
        elif self._shape_is(tensor, module.shape):
            self.copies.append(
                Copy(module.weight, tensor, "another base's weights than the model's")
            )

    def _tokens(self, tensor: TensorInfo, path: str) -> None:
        module = self.modules.get(path)
        if module is None or not (module.is_embedding or module.name == HEAD):
            self._unmatched(tensor, path)
            return
        ids = next(
            (ids for name, ids in self.adapter.token_indices.items() if _ends_with(path, name)),
            None,
        )
        if ids is None:
            self._problem(tensor, "trainable_token_indices has no ids for it")
            return
        rows = module.shape[0]
        if any(index >= rows for index in ids):
            self._problem(tensor, f"trainable_token_indices has id {max(ids)}; expected < {rows}")
        elif self._shape_is(tensor, (len(ids), module.inputs)):
            self.rows.append(Rows(module, tensor, ids))
            if module.name == "embed_tokens" and self.adapter.ties_tokens:
                self.rows.append(Rows(self.modules[HEAD], tensor, ids))

    def _part(self, tensor: TensorInfo, key: Key, path: str) -> None:
        self.names.add(key.adapter)
        parts = self.groups.setdefault((path, key.path, key.nested), {})
        if key.part in parts:
            self._problem(tensor, f"is there twice; the other is {quoted(parts[key.part].name)}")
        else:
            parts[key.part] = tensor

    def pair(self) -> None:
        """Makes pairs of the parts of each module, when all tensors are sorted."""
        if len(self.names - {""}) > 1:
            self.problems.append(
                f"the file holds several adapters, {sorted(self.names)[:5]}; expected one. Save "
                "each alone."
            )
        for (path, full, _nested), parts in self.groups.items():
            self._pair(path, full, parts)
        changed: dict[Module, str] = {}
        for change in self.result().changes:
            if isinstance(change, Bias):  # It stands beside a change of the matrix.
                continue
            kind = type(change).__name__
            if changed.setdefault(change.module, kind) != kind or (
                kind == "LowRank" and sum(c.module == change.module for c in self.low_rank) > 1
            ):
                text = f"{change.module.label} is changed twice, by several tensors of the file"
                if text not in self.problems:
                    self.problems.append(text)

    def _pair(self, path: str, full: str, parts: Mapping[str, TensorInfo]) -> None:
        embedding = "embedding_a" in parts or "embedding_b" in parts
        a, b = (parts.get(f"embedding_{x}" if embedding else x) for x in "ab")
        first = next(iter(parts.values()))
        if a is None or b is None:
            lacking = "A" if a is None else "B"
            self._problem(first, f"its module has no lora_{lacking}; expected A and B")
            return
        module = self._module_of(path, a, b)
        if module is None:
            self._no_module(path, a, b)
            return
        target = f"{full}.{module.path.rsplit('.', 1)[1]}" if module.is_experts else full
        rank = self.adapter.rank_of(target)
        swapped = module.is_embedding and not embedding
        if self._fits(module, parts, (a, b), rank, swapped):
            self.low_rank.append(
                LowRank(
                    module, a, b, rank, self.adapter.scale_of(target), parts.get("bias"),
                    parts.get("magnitude"), swapped,
                )
            )  # fmt: skip

    def _module_of(self, path: str, a: TensorInfo, b: TensorInfo) -> Module | None:
        """The module at a path; of an experts' two parameters that whose sizes fit."""
        if not path.endswith(".experts"):
            return self.modules.get(path)
        for name in ("gate_up_proj", "down_proj"):
            module = self.modules.get(f"{path}.{name}")
            if module and a.shape[-1:] == (module.inputs,) and b.shape[:1] == (module.outputs,):
                return module
        return None

    def _no_module(self, path: str, a: TensorInfo, b: TensorInfo) -> None:
        down = self.modules.get(f"{path}.down_proj")
        if len(self.shapes.get(f"{path}.weight", ())) > 2:
            for tensor in (a, b):
                self._problem(tensor, "changes a convolution; expected linear modules in towers")
            return
        if not path.endswith(".experts") or down is None:
            self._unmatched(a, path)
            self._unmatched(b, path)
            return
        shapes = f"A {format_shape(a.shape)} and B {format_shape(b.shape)}"
        sizes = f"{down.outputs} -> {2 * down.inputs} or {down.inputs} -> {down.outputs}"
        self._problem(a, f"{shapes} fit no tensor of the experts; expected in -> out of {sizes}")

    def _fits(
        self,
        module: Module,
        parts: Mapping[str, TensorInfo],
        pair: tuple[TensorInfo, TensorInfo],
        rank: int,
        swapped: bool,
    ) -> bool:
        """Whether all parts are of the right sizes, and just those that the config asks for."""
        a, b = pair
        stacked = rank * (module.shape[0] if module.is_experts else 1)
        # An embedding is stored [V, D]: A picks by token, B makes the D outputs.
        inputs, outputs = module.inputs, module.outputs
        if module.is_embedding and not swapped:
            inputs, outputs = outputs, inputs
        fits = [self._shape_is(a, (stacked, inputs)), self._shape_is(b, (outputs, stacked))]
        wants = {
            "magnitude": self.adapter.use_dora and not module.is_experts and not swapped,
            "bias": self.adapter.lora_bias and not module.is_experts and not module.is_embedding,
        }
        for part, option in (("magnitude", "use_dora"), ("bias", "lora_bias")):
            tensor = parts.get(part)
            if tensor is not None and wants[part]:
                fits.append(self._shape_is(tensor, (outputs,)))
            elif tensor is not None:
                self._problem(tensor, f"is there although {option} is not set, or can't act here")
                fits.append(False)
            elif wants[part]:
                name = "lora_magnitude_vector" if part == "magnitude" else "lora_B.bias"
                self._problem(a, f"its module has no {name}; {option} is set")
                fits.append(False)
        others = set(parts) - {"a", "b", "embedding_a", "embedding_b", "magnitude", "bias"}
        if others or len({"a", "embedding_a"} & set(parts)) > 1:
            self._problem(a, "its module has parts that don't belong together")
            fits.append(False)
        return all(fits)


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}") or name.endswith(f".{path}")
