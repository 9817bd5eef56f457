"""Records every hook point of a transformers Gemma 4 model: forward hooks, nothing permanent.

Names that mislead in transformers, and what they are here:
  hidden_states[-1]   final_norm; the last layer's output is its resid_post
  router_logits       router.probs; router.logits is inside the router, before softmax
  per_layer_inputs    (argument) per_layer_inputs.token; layers read its sum with the context part
  resid_unscaled, router.weights_norm, attn.result, experts.hidden, experts.each and the norms'
divisors have no tensor of their own: operations beside them are repeated in the model's dtype.
Layers that share keys and values have no attn.k, attn.v and attn.rot_k.

torch is imported by the functions here only, and the model is as it was when they return.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

from gemloupe.embed_scale import embed_scale as scale_value
from gemloupe.errors import missing_extra, quoted

if TYPE_CHECKING:
    from gemloupe.comparison.media import MediaRows
    from gemloupe.prompt import Prompt

_FAMILY = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
# The attention function of transformers is replaced while a pass runs, for all threads.
LOCK = threading.RLock()


def import_torch(feature: str) -> Any:
    """Returns torch; ImportError naming what to install where torch or transformers is missing."""
    for name in ("torch", "transformers"):
        try:
            __import__(name)
        except ImportError:
            raise missing_extra(name, feature, "compare") from None
    return sys.modules["torch"]


def is_transformers_model(value: Any) -> bool:
    """Whether `value` is a torch module, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def decoder_of(model: Any) -> Any:
    """The text decoder inside a text-only or multimodal model, adapters of PEFT looked through.

    ValueError for a model of another family, or without an output matrix.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = getattr(getattr(base, "config", None), "model_type", None)
    if kind not in _FAMILY:
        raise ValueError(
            f"the reference is a {type(base).__name__} of model_type {quoted(kind)}; expected a "
            "Gemma 4 model of transformers, such as AutoModelForCausalLM.from_pretrained returns"
        )
    if not hasattr(base, "lm_head"):
        raise ValueError(
            f"the reference is a {type(base).__name__}, which has no logits; expected a class with "
            "lm_head, such as Gemma4ForCausalLM or Gemma4ForConditionalGeneration"
        )
    return getattr(base.model, "language_model", base.model)


def text_state(model: Any) -> dict[str, Any]:
    """The text decoder's parameters and buffers under the checkpoint's names, without prefix."""
    decoder = decoder_of(model)
    state = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    # PEFT wraps the layers that it adapts and keeps their weights in base_layer.
    return {name.replace(".base_layer", ""): tensor for name, tensor in state.items()}


def dtype_of(model: Any) -> str:
    """The dtype of the decoder's activations: its embedding's."""
    dtype = str(decoder_of(model).embed_tokens.weight.dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise ValueError(
            f"the reference's embedding has dtype {dtype}; expected float32 or bfloat16: load it "
            "with dtype=torch.float32"
        )
    return dtype


def describe(model: Any) -> str:
    """What runs in which dtype: "transformers 5.23.0 Gemma4ForCausalLM, bfloat16, eager"."""
    import transformers

    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    loaded = getattr(decoder_of(model).config, "_attn_implementation", None)
    attention = "eager attention"
    if loaded not in (None, "eager"):
        attention += f" (loaded with {loaded})"
    return f"transformers {transformers.__version__} {name}, {dtype_of(model)}, {attention}"


def rounded_frequencies(model: Any) -> str:
    """The dtype of RoPE's inverse frequencies where it is not float32, else "".

    model.to(torch.bfloat16) rounds these buffers; from_pretrained(dtype=torch.bfloat16) does not.
    """
    rotary = getattr(decoder_of(model), "rotary_emb", None)
    for name, buffer in rotary.named_buffers() if rotary is not None else ():
        dtype = str(buffer.dtype).removeprefix("torch.")
        if name.endswith("inv_freq") and dtype not in ("float32", "float64"):
            return dtype
    return ""


def record(
    model: Any,
    ids: Sequence[int],
    wanted: Collection[str] | None = None,
    *,
    experts: Mapping[int, Any] | None = None,
    float32: bool = False,
    embed_scale: str | None = None,
    media: tuple[Prompt, MediaRows] | None = None,
) -> dict[str, Any]:
    """Runs one prefill of ids and returns hook point -> CPU tensor [T, …] in the model's dtype.

    `wanted`: names to keep; None keeps all. `experts` maps a layer to int [T, k]: the experts that
    it is to choose, weighted by its own probabilities. `float32` computes in float32 with the
    model's weights as they are. `embed_scale`: the dtype to which √hidden_size is rounded, None for
    the model's own. `media`: a prompt of these ids, and the soft tokens of its media.
    """
    torch = import_torch("a transformers reference")
    decoder = decoder_of(model)
    own = dtype_of(model)
    recorder = _Recorder(torch, decoder, wanted)
    with contextlib.ExitStack() as stack:
        stack.enter_context(LOCK)
        stack.enter_context(torch.no_grad())
        stack.enter_context(_evaluating(model))
        stack.enter_context(_eager(model, decoder))
        scale = own if embed_scale is None else embed_scale
        if float32 or scale != own:
            stack.enter_context(_embedding(torch, decoder, scale, float32))
        if float32 and own != "float32":
            stack.enter_context(_float32_products(torch, model))
        if experts:
            stack.enter_context(_forced(torch, decoder, experts))
        stack.enter_context(recorder.attached(model))
        rows = torch.tensor([list(ids)], device=decoder.embed_tokens.weight.device)
        more: dict[str, Any] = {}
        if media is not None:
            from gemloupe.comparison.transformers_towers import given

            more = stack.enter_context(given(model, rows, media[1], media[0]))
        output = model(input_ids=rows, use_cache=False, return_dict=True, **more)
        recorder.keep("logits", output.logits[0])
    return recorder.finish()


class _Recorder:
    """Collects tensors while a model runs."""

    def __init__(self, torch: Any, decoder: Any, wanted: Collection[str] | None) -> None:
        self._torch = torch
        self._decoder = decoder
        self._wanted = None if wanted is None else set(wanted)
        self._values: dict[str, Any] = {}
        self._layer: dict[str, Any] = {}

    def wants(self, name: str) -> bool:
        return self._wanted is None or name in self._wanted

    def keep(self, name: str, tensor: Any) -> None:
        if self.wants(name):
            # A copy: layers multiply their output in place.
            self._values[name] = tensor.detach().to("cpu", copy=True).contiguous()

    def keep_divisor(self, name: str, module: Any, x: Any) -> None:
        """√(mean x² + eps) of a norm's input [..., D]; its rows keep one column, heads none."""
        if self.wants(name):
            wide = x.detach().float()
            mean = wide.pow(2).mean(-1, keepdim=wide.dim() == 2)
            self.keep(name, (mean + module.eps).sqrt())

    def finish(self) -> dict[str, Any]:
        return self._values

    @contextlib.contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        decoder, handles = self._decoder, []
        per_layer = getattr(decoder, "hidden_size_per_layer_input", 0)

        def on_output(module: Any, name: str, shape: tuple[int, ...] | None = None) -> None:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                tensor = output[0]
                self.keep(name, tensor if shape is None else tensor.reshape(len(tensor), *shape))

            handles.append(module.register_forward_hook(hook))

        if per_layer:
            shape = (len(decoder.layers), per_layer)
            on_output(decoder.embed_tokens_per_layer, "per_layer_inputs.token", shape)
            on_output(decoder.per_layer_projection_norm, "per_layer_inputs.context", shape)
            handles.append(
                decoder.per_layer_projection_norm.register_forward_pre_hook(
                    lambda m, i: self.keep_divisor("per_layer_inputs.context.scale", m, i[0][0])
                )
            )
        on_output(decoder.norm, "final_norm")
        handles.append(
            decoder.norm.register_forward_pre_hook(
                lambda m, i: self.keep_divisor("final_norm.scale", m, i[0][0])
            )
        )
        on_output(base.lm_head, "logits_raw")
        for index, layer in enumerate(decoder.layers):
            handles += _LayerHooks(self, index, layer).attach()
        try:
            with self._attention():
                yield
        finally:
            for handle in handles:
                handle.remove()
        rows = [self._layer.pop(f"per_layer.{i}", None) for i in range(len(decoder.layers))]
        if per_layer and self.wants("per_layer_inputs"):
            self.keep("per_layer_inputs", self._torch.stack(rows, dim=1))

    def note_per_layer(self, index: int, tensor: Any) -> None:
        if self.wants("per_layer_inputs"):
            self._layer[f"per_layer.{index}"] = tensor

    @contextlib.contextmanager
    def _attention(self) -> Iterator[None]:
        """Reads what eager attention gets and gives; the function itself stays transformers'."""
        own = {id(layer.self_attn): i for i, layer in enumerate(self._decoder.layers)}
        source = sys.modules[type(self._decoder).__module__]
        original = getattr(source, "eager_attention_forward", None)
        if original is None:
            raise ValueError(
                f"{source.__name__} has no eager_attention_forward, whose inputs are to be "
                "recorded; expected transformers 5.23 or one like it"
            )

        @functools.wraps(original)
        def recorded(module: Any, query: Any, key: Any, value: Any, mask: Any, *a: Any, **k: Any):  # type: ignore[no-untyped-def]
            output, pattern = original(module, query, key, value, mask, *a, **k)
            if id(module) in own:
                prefix = f"layers.{own[id(module)]}.attn."
                self.keep(prefix + "rot_q", query[0].transpose(0, 1))
                if not getattr(module, "is_kv_shared_layer", False):
                    self.keep(prefix + "rot_k", key[0].transpose(0, 1))
                self.keep(prefix + "keys", key[0].transpose(0, 1))
                self.keep(prefix + "values", value[0].transpose(0, 1))
                self.keep(prefix + "pattern", pattern[0])
                if self.wants(prefix + "scores"):
                    repeated = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
                    scores = query @ repeated.transpose(2, 3)
                    if mask is not None:
                        hidden = ~mask if mask.dtype == self._torch.bool else mask < 0
                        scores = scores.masked_fill(hidden, float("-inf"))
                    self.keep(prefix + "scores", scores[0])
            return output, pattern

        with mock.patch.object(source, "eager_attention_forward", recorded):
            yield


class _LayerHooks:
    """The hooks of one decoder layer."""

    def __init__(self, recorder: _Recorder, index: int, layer: Any) -> None:
        self._recorder = recorder
        self._index = index
        self._layer = layer
        self._prefix = f"layers.{index}."
        self._last: dict[str, Any] = {}

    def attach(self) -> list[Any]:
        layer, attention = self._layer, self._layer.self_attn
        per_layer = bool(getattr(layer, "hidden_size_per_layer_input", 0))
        head = attention.head_dim
        hooks = [layer.register_forward_pre_hook(self._on_input, with_kwargs=True)]
        out = self._output
        hooks += [
            self._divisor(module, f"{name}.scale")
            for module, name in self._norms()
            if module is not None
        ]
        hooks += [
            out(layer.input_layernorm, "attn.norm"),
            out(attention.q_proj, "attn.q_proj", head),
            out(attention.q_norm, "attn.q"),
        ]
        if not getattr(attention, "is_kv_shared_layer", False):
            # Without v_proj the raw value is the raw key.
            hooks += [
                out(attention.k_proj, "attn.k_proj", head),
                out(attention.v_proj or attention.k_proj, "attn.v_proj", head),
                out(attention.k_norm, "attn.k"),
                out(attention.v_norm, "attn.v"),
            ]
        hooks += [
            self._input(attention.o_proj, "attn.z", head),
            out(attention.o_proj, "attn.out"),
            out(layer.post_attention_layernorm, "attn.post"),
            self._input(layer.pre_feedforward_layernorm, "resid_mid"),
            out(layer.pre_feedforward_layernorm, "mlp.norm"),
            out(layer.mlp.gate_proj, "mlp.gate"),
            out(layer.mlp.up_proj, "mlp.up"),
            self._input(layer.mlp.down_proj, "mlp.hidden"),
            out(layer.mlp.down_proj, "mlp.out"),
            self._input(layer.post_feedforward_layernorm, "ffn.out"),
            out(layer.post_feedforward_layernorm, "ffn.post"),
        ]
        if per_layer:
            hooks += [
                out(layer.per_layer_input_gate, "per_layer.gate"),
                self._input(layer.per_layer_projection, "per_layer.hidden"),
                out(layer.per_layer_projection, "per_layer.out"),
                out(layer.post_per_layer_input_norm, "per_layer.post"),
            ]
        if getattr(layer, "enable_moe_block", False):
            hooks += [
                self._input(layer.router.proj, "router.norm"),
                out(layer.router.proj, "router.logits"),
                layer.router.register_forward_hook(self._on_router),
                layer.experts.register_forward_hook(self._on_experts),
                out(layer.post_feedforward_layernorm_1, "mlp.post"),
                out(layer.post_feedforward_layernorm_2, "experts.post"),
            ]
        hooks.append(layer.register_forward_hook(self._on_output))
        return hooks

    def _norms(self) -> list[tuple[Any, str]]:
        layer = self._layer
        attention, router = layer.self_attn, getattr(layer, "router", None)
        return [
            (layer.input_layernorm, "attn.norm"),
            (attention.q_norm, "attn.q"),
            (getattr(attention, "k_norm", None), "attn.k"),
            (getattr(attention, "v_norm", None), "attn.v"),
            (layer.post_attention_layernorm, "attn.post"),
            (layer.pre_feedforward_layernorm, "mlp.norm"),
            (getattr(layer, "post_feedforward_layernorm_1", None), "mlp.post"),
            (getattr(router, "norm", None), "router.norm"),
            (getattr(layer, "pre_feedforward_layernorm_2", None), "experts.norm"),
            (getattr(layer, "post_feedforward_layernorm_2", None), "experts.post"),
            (layer.post_feedforward_layernorm, "ffn.post"),
            (getattr(layer, "post_per_layer_input_norm", None), "per_layer.post"),
        ]

    def _divisor(self, module: Any, name: str) -> Any:
        full = self._prefix + name

        def hook(norm: Any, inputs: Any) -> None:
            self._recorder.keep_divisor(full, norm, _rows(inputs[0], 0))

        return module.register_forward_pre_hook(hook)

    def _keep(self, name: str, tensor: Any) -> None:
        self._recorder.keep(self._prefix + name, tensor)
        if name in ("resid_mid", "ffn.post", "per_layer.post"):
            self._last[name] = tensor.detach().clone()

    def _output(self, module: Any, name: str, head: int = 0) -> Any:
        return module.register_forward_hook(lambda _m, _i, o: self._keep(name, _rows(o, head)))

    def _input(self, module: Any, name: str, head: int = 0) -> Any:
        return module.register_forward_pre_hook(lambda _m, i: self._keep(name, _rows(i[0], head)))

    def _on_input(self, _module: Any, inputs: Any, keywords: Any) -> None:
        hidden = inputs[0] if inputs else keywords["hidden_states"]
        self._keep("resid_pre", hidden[0])
        if self._index == 0:
            # With media rows merged, as the first layer reads it.
            self._recorder.keep("embed", hidden[0])
        row = inputs[1] if len(inputs) > 1 else keywords.get("per_layer_input")
        if row is not None:
            self._keep("per_layer.in", row[0])
            self._recorder.note_per_layer(self._index, row[0])

    def _on_output(self, _module: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._keep("resid_post", hidden[0])
        resid = self._last.pop("resid_mid") + self._last.pop("ffn.post")
        self._keep("resid_ffn", resid)
        post = self._last.pop("per_layer.post", None)
        self._keep("resid_unscaled", resid if post is None else resid + post)
        self._attention_result()

    def _attention_result(self) -> None:
        name = self._prefix + "attn.result"
        z = self._recorder._values.get(self._prefix + "attn.z")
        if self._recorder.wants(name) and z is not None:
            weight = self._layer.self_attn.o_proj.weight.detach().cpu().to(z.dtype)
            parts = [
                z[:, n] @ weight[:, n * z.shape[2] : (n + 1) * z.shape[2]].T
                for n in range(z.shape[1])
            ]
            self._recorder.keep(name, self._recorder._torch.stack(parts, dim=1))

    def _on_router(self, _module: Any, _inputs: Any, output: Any) -> None:
        probs, weights, experts = output
        self._keep("router.probs", probs)
        self._keep("router.experts", experts)
        chosen = probs.gather(-1, experts)
        self._keep("router.weights_norm", chosen / chosen.sum(dim=-1, keepdim=True))
        self._keep("router.weights", weights)

    def _on_experts(self, module: Any, inputs: Any, output: Any) -> None:
        x, experts, _weights = inputs
        self._keep("experts.norm", x)
        self._keep("experts.out", output)
        wants = self._recorder.wants
        if not (wants(self._prefix + "experts.hidden") or wants(self._prefix + "experts.each")):
            return
        torch = self._recorder._torch
        linear = torch.nn.functional.linear
        size = module.down_proj.shape[-1]
        hidden = x.new_zeros((*experts.shape, size))
        each = x.new_zeros((*experts.shape, x.shape[-1]))
        for expert in experts.unique().tolist():
            rows, slots = (experts == expert).nonzero(as_tuple=True)
            gate, up = linear(x[rows], module.gate_up_proj[expert].to(x.dtype)).chunk(2, dim=-1)
            hidden[rows, slots] = module.act_fn(gate) * up
            each[rows, slots] = linear(hidden[rows, slots], module.down_proj[expert].to(x.dtype))
        self._keep("experts.hidden", hidden)
        self._keep("experts.each", each)


def _rows(tensor: Any, head: int) -> Any:
    """[1, T, …] or, in the router and the experts, [T, …]; split into heads of `head`."""
    rows = tensor[0] if tensor.dim() == 3 or tensor.dim() == 4 else tensor
    return rows.reshape(len(rows), -1, head) if head else rows


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No dropout; every module gets back the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _eager(model: Any, decoder: Any) -> Iterator[None]:
    """The attention that has scores and patterns; the setting is put back."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    configs = {id(c): c for c in (decoder.config, base.config, base.config.get_text_config())}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


@contextlib.contextmanager
def _embedding(torch: Any, decoder: Any, scale: str, float32: bool) -> Iterator[None]:
    """Multiplies embeddings with √size rounded to `scale`; rows stay float32 where asked."""

    def replace(module: Any, inputs: Any, output: Any) -> Any:
        rows = torch.nn.functional.embedding(inputs[0], module.weight).float()
        factor = scale_value(scale, _embedding_size(decoder, module))
        return (rows * factor).to(torch.float32 if float32 else output.dtype)

    tables = [decoder.embed_tokens]
    if getattr(decoder, "hidden_size_per_layer_input", 0):
        tables.append(decoder.embed_tokens_per_layer)
    handles = [table.register_forward_hook(replace) for table in tables]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _embedding_size(decoder: Any, module: Any) -> int:
    if module is decoder.embed_tokens:
        return int(decoder.config.hidden_size)
    return int(decoder.config.hidden_size_per_layer_input)


@contextlib.contextmanager
def _float32_products(torch: Any, model: Any) -> Iterator[None]:
    """Widens each module's matrices while it runs: the whole model in float32 may not fit."""
    handles = []
    widened: dict[int, list[tuple[Any, Any]]] = {}

    def widen(module: Any, _inputs: Any) -> None:
        kept = [(p, p.data) for p in module.parameters(recurse=False) if p.is_floating_point()]
        widened[id(module)] = kept
        for parameter, data in kept:
            parameter.data = data.float()

    def restore(module: Any, _inputs: Any, _output: Any) -> None:
        for parameter, data in widened.pop(id(module), ()):
            parameter.data = data

    for module in model.modules():
        if isinstance(module, torch.nn.Linear) or hasattr(module, "gate_up_proj"):
            handles.append(module.register_forward_pre_hook(widen))
            handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for kept in widened.values():
            for parameter, data in kept:
                parameter.data = data


@contextlib.contextmanager
def _forced(torch: Any, decoder: Any, experts: Mapping[int, Any]) -> Iterator[None]:
    """Lets layers choose given experts; their weights come from their own probabilities."""

    def force(index: int) -> Any:
        def hook(module: Any, _inputs: Any, output: Any) -> Any:
            probs = output[0]
            chosen = torch.tensor(experts[index].tolist(), device=probs.device)
            weights = probs.gather(-1, chosen)
            weights = weights / weights.sum(dim=-1, keepdim=True)
            return probs, weights * module.per_expert_scale[chosen], chosen

        return hook

    handles = [
        decoder.layers[index].router.register_forward_hook(force(index)) for index in experts
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
