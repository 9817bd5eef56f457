"""TransformerLens 4 on this engine: its hooks, caches and patching tools, without torch modules.

from gemloupe.integrations import transformer_lens

bridge = transformer_lens.bridge(model)
logits, cache = bridge.run_with_cache("The capital of France is")

`Driver` follows TransformerLens's Driver protocol (`transformer_lens.model_bridge.driver_protocol`)
and needs the package only for the classes that it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe import _core, hooks
from gemloupe.arrays import as_float32
from gemloupe.config import TextConfig
from gemloupe.errors import did_you_mean, format_shape, one_of, quoted

if TYPE_CHECKING:
    from gemloupe.model import Model

Edit = Callable[[np.ndarray, Any], np.ndarray]

# Where TransformerBridge's Gemma 4 registers a hook under another name than the classic one, which
# is its alias; without "blocks.{i}.".
_REGISTERED = {
    "hook_embed": "embed.hook_out",
    "hook_resid_pre": "hook_in",
    "attn.hook_q": "attn.q.hook_out",
    "attn.hook_k": "attn.k.hook_out",
    "attn.hook_v": "attn.v.hook_out",
    "attn.hook_z": "attn.o.hook_in",
    "hook_attn_out": "ln1_post.hook_out",
    "hook_resid_mid": "ln2.hook_in",
    "mlp.hook_pre": "mlp.gate.hook_out",
    "mlp.hook_pre_linear": "mlp.in.hook_out",
    "mlp.hook_post": "mlp.out.hook_in",
    "hook_mlp_out": "ln2_post.hook_out",
    "hook_resid_post": "hook_out",
}

_IGNORED = ("output_attentions", "output_hidden_states", "use_cache", "return_dict")
_OPERATIONS = ("suppress", "scale", "add", "set")
_KEYS = {"suppress": (), "scale": ("factor",), "add": ("value",), "set": ("value",)}


def bridge(model: Model) -> Any:
    """Returns a TransformerLens `RemoteBridge` over `model`, whose hooks act during the pass.

    `run_with_cache`, `run_with_hooks`, `hooks`, `add_hook`, `to_tokens`, loss and the functions of
    `transformer_lens.patching` work; hooks see float32 tensors [batch, …] and may change them in
    place or return another. `hook_attn_scores` are scores before the softmax here, and
    `hook_result` waits for `bridge.cfg.use_attn_result = True`. A batch can be read
    (`run_with_cache`, with `attention_mask` where it is padded), but not edited by hooks: the
    engine runs its rows one by one.

    There are no gradients, parameters or torch modules: bwd_hooks, stop_at_layer and functions
    that walk `bridge.blocks` raise. `bridge.W_E` [V, D] and `bridge.W_U` [D, V] are copies.

    Raises ImportError where transformer_lens (4.3 or later) is not installed.
    """
    try:
        from gemloupe.integrations._transformer_lens_bridge import GemloupeBridge
    except ImportError as error:
        raise ImportError(
            f"gemloupe.integrations.transformer_lens.bridge needs transformer_lens 4.3 or later "
            f'({error}). Install it with: pip install "transformer_lens>=4.3"'
        ) from error
    return GemloupeBridge(model)


def names(config: TextConfig) -> dict[str, str]:
    """The bridge's name -> gemloupe's, of every hook point that both have, in model order."""
    return {
        _registered(point.transformer_lens): point.name
        for point in hooks.hook_points(config).values()
        if point.transformer_lens
    }


def _registered(name: str) -> str:
    """TransformerLens's name in the hook table -> the one that the bridge registers."""
    if not name.startswith("blocks."):
        return _REGISTERED.get(name, name)
    _, layer, inner = name.split(".", 2)
    return f"blocks.{layer}.{_REGISTERED.get(inner, inner)}"


class Driver:
    """Runs forward passes for TransformerLens; see its `driver_protocol.Driver`.

    It serves captures and interventions of every layer in one pass, with the logits of all
    positions. Interventions are functions `fn(x)` of a float32 array [1, …], or TransformerLens's
    specifications: {"op": "suppress" | "scale" | "add" | "set", "factor" or "value":, "pos":}.
    """

    provides_sequence_logits = True
    _supported_features = frozenset({"weight_access", "intervention_callbacks"})

    def __init__(self, model: Model, bridge_config: Any = None, tokenizer: Any = None) -> None:
        self.model = model
        self.bridge_config = bridge_config
        self.tokenizer = tokenizer
        self.architecture = "Gemma4ForCausalLM"
        config = model.config.text
        self.names = names(config)
        self.supported_hook_points = frozenset(self.names)
        every = {
            _registered(row[5]).replace("{i}", str(layer))
            for row in _core.hook_points()
            for layer in range(config.num_hidden_layers)
            if row[5]
        }
        self.non_fireable_hook_points = frozenset(every - self.supported_hook_points)

    def supports(self, feature: str) -> bool:
        """Whether "weight_access" or "intervention_callbacks" is asked for; there is no more."""
        return feature in self._supported_features

    def close(self) -> None:
        """Nothing to release: the model belongs to the caller."""

    def get_param(self, name: str) -> Any:
        """A weight by its checkpoint's name as a float32 torch tensor, a copy.

        KeyError, with close matches, for a name that the text decoder lacks.
        """
        import torch

        return torch.tensor(self.model.weights[name])

    def forward(
        self,
        input_ids: Any = None,
        *,
        capture: tuple[str, ...] = (),
        intervene: Mapping[str, Any] | None = None,
        max_new_tokens: int = 1,
        return_logits: bool = True,
        attention_mask: Any = None,
        **arguments: Any,
    ) -> Any:
        """One pass over ids [B, T] or [T]; returns TransformerLens's `ForwardResult`.

        `logits` is float32 [B, T, V] after the soft-cap, `captured` maps the names of `capture` to
        float32 [B, T, …] ([B, N, T, T] for scores and patterns). `attention_mask` [B, T] marks
        the real tokens of padded rows, one run of ones in each: their positions begin at 0, and
        what is returned for padding is 0 (logits: -inf).

        Raises KeyError, with close matches, for an unknown hook point; ValueError for ids, a mask
        or an intervention that does not fit; NotImplementedError for more than one new token and
        for an intervention on more than one row.
        """
        from transformer_lens.model_bridge.driver_protocol import ForwardResult

        if max_new_tokens != 1:
            raise NotImplementedError(
                f"max_new_tokens is {max_new_tokens}; the driver makes one pass, "
                "model.generate(...) makes tokens, with captures and edits"
            )
        if unknown := sorted(set(arguments) - set(_IGNORED)):
            raise TypeError(f"forward() got {one_of(unknown)}, which this driver does not serve")
        if input_ids is None:
            raise ValueError("input_ids is None; expected token ids [batch, positions]")
        ids = _ids(input_ids)
        spans = _spans(attention_mask, ids.shape)
        edits = self._edits(intervene or {}, ids.shape, spans)
        wanted = [(name, self._ours(name)) for name in capture]
        runs = self.model.run(
            [row[begin:end].tolist() for row, (begin, end) in zip(ids, spans, strict=True)],
            capture=[ours for _, ours in wanted],
            logits="all"
            if return_logits or any(o.startswith("logits") for _, o in wanted)
            else None,
            chunk=ids.shape[1],  # hooks index positions of the whole prompt
            **({"edit": edits} if edits else {}),
        )
        width = ids.shape[1]
        logits = [run.logits for run in runs] if return_logits else None
        return ForwardResult(
            logits=None if logits is None else _padded(logits, spans, width, -np.inf),
            captured={
                theirs: _padded([run[ours] for run in runs], spans, width, 0.0)
                for theirs, ours in wanted
            },
            raw_output=runs,
        )

    def _ours(self, name: str) -> str:
        try:
            return self.names[name]
        except KeyError:
            hint = did_you_mean(name, self.names)
            raise KeyError(
                f"{quoted(name)} is no hook point of this model. {hint}".strip()
            ) from None

    def _edits(
        self, intervene: Mapping[str, Any], shape: tuple[int, ...], spans: Sequence[tuple[int, int]]
    ) -> dict[str, Edit]:
        if not intervene:
            return {}
        if shape[0] != 1:
            raise NotImplementedError(
                f"interventions on {shape[0]} rows: the engine runs rows one by one, and a "
                "function of a whole batch cannot see them together; pass one row at a time"
            )
        begin, end = spans[0]
        return {
            self._ours(name): _function_edit(wanted)
            if callable(wanted)
            else _specified_edit(name, wanted, begin, end)
            for name, wanted in intervene.items()
        }


def _ids(input_ids: Any) -> np.ndarray:
    """Token ids [B, T]; torch tensors are read through DLPack or `__array__`."""
    ids = np.asarray(input_ids)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.dtype.kind not in "iu" or ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(
            f"input_ids has shape {format_shape(ids.shape)} and dtype {ids.dtype}; "
            "expected integers [batch, positions], at least one of each"
        )
    return ids


def _spans(mask: Any, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """The real tokens [begin, end) of every row."""
    if mask is None:
        return [(0, shape[1])] * shape[0]
    rows = np.asarray(mask) != 0
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.shape != shape:
        raise ValueError(
            f"attention_mask has shape {format_shape(rows.shape)}; expected {format_shape(shape)}"
        )
    spans = []
    for index, row in enumerate(rows):
        real = np.flatnonzero(row)
        if not len(real) or real[-1] - real[0] + 1 != len(real):
            raise ValueError(
                f"attention_mask of row {index} is {row.astype(int).tolist()[:20]}; expected one "
                "run of ones, with padding before or after it"
            )
        spans.append((int(real[0]), int(real[-1]) + 1))
    return spans


def _padded(
    arrays: Sequence[np.ndarray], spans: Sequence[tuple[int, int]], width: int, fill: float
) -> np.ndarray:
    """Rows [T, …] or [N, T, S] at their spans of [B, width, …] or [B, N, width, width]."""
    if all(span == (0, width) for span in spans):
        return np.stack(arrays)
    padded = []
    for array, (begin, end) in zip(arrays, spans, strict=True):
        around = (begin, width - end)
        is_square = array.ndim == 3 and array.shape[1:] == (end - begin, end - begin)
        sides = [(0, 0), around, around] if is_square else [around] + [(0, 0)] * (array.ndim - 1)
        padded.append(np.pad(array, sides, constant_values=fill))
    return np.stack(padded)


def _function_edit(function: Callable[[Any], Any]) -> Edit:
    def edit(x: np.ndarray, at: Any) -> np.ndarray:
        changed = function(x[None])
        return x if changed is None else as_float32(changed, at.name, (1, *x.shape))[0]

    return edit


def _specified_edit(name: str, wanted: Any, begin: int, end: int) -> Edit:
    """The function of one specification; `begin` and `end` are the row's real tokens."""
    operation = wanted.get("op") if isinstance(wanted, Mapping) else None
    if operation not in _OPERATIONS:
        raise ValueError(
            f"the intervention on {name} is {quoted(wanted)}; expected a function, or a mapping "
            f"whose 'op' is {one_of(_OPERATIONS)}"
        )
    keys = {"op", *_KEYS[operation]}
    if not keys <= set(wanted) <= keys | {"pos"}:
        raise ValueError(
            f"the intervention on {name} has {one_of(sorted(wanted))}; expected "
            f"{one_of(sorted(keys))}, and 'pos' where it acts at some positions only"
        )
    number = as_float32(wanted.get("factor", wanted.get("value", 0.0)), f"{name}: {operation}")
    rows = _rows(name, wanted.get("pos"), begin, end)

    def edit(x: np.ndarray, at: Any) -> np.ndarray:
        value = number.reshape(x.shape[1:]) if number.size == x[0].size else number
        if value.size > 1 and value.shape != x.shape[1:]:
            raise ValueError(
                f"the value of {name} has shape {format_shape(number.shape)}; expected one number "
                f"or {format_shape(x.shape[1:])}"
            )
        if operation in ("suppress", "set"):
            x[rows] = value
        elif operation == "scale":
            x[rows] *= value
        else:
            x[rows] += value
        return x

    return edit


def _rows(name: str, positions: Any, begin: int, end: int) -> Any:
    """Rows of the pass for `pos`, which counts in the padded row."""
    if positions is None:
        return slice(None)
    wanted = np.atleast_1d(np.asarray(positions))
    if wanted.dtype.kind not in "iu" or ((wanted < begin) | (wanted >= end)).any():
        raise ValueError(
            f"pos of {name} is {quoted(positions)}; expected positions from {begin} to {end - 1}"
        )
    return wanted - begin
