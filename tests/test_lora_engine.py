"""The engine's side of adapters, beside checkpoints into which the same change was written."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gemloupe as gl
from gemloupe import _core
from tiny_models import VARIANTS, random_ids

pytestmark = pytest.mark.core  # repeated for every instruction set

MODULES = {
    "attn.q_proj": "self_attn.q_proj.weight",
    "attn.k_proj": "self_attn.k_proj.weight",
    "attn.v_proj": "self_attn.v_proj.weight",
    "attn.o_proj": "self_attn.o_proj.weight",
    "mlp.gate_proj": "mlp.gate_proj.weight",
    "mlp.up_proj": "mlp.up_proj.weight",
    "mlp.down_proj": "mlp.down_proj.weight",
    "per_layer.gate": "per_layer_input_gate.weight",
    "per_layer.projection": "per_layer_projection.weight",
    "router.proj": "router.proj.weight",
    "experts.gate_up_proj": "experts.gate_up_proj",
    "experts.down_proj": "experts.down_proj",
}
RANK = 3


def run(model, ids, adapters=(), logits_begin=0, **arguments):
    cache = model.new_cache().core
    return model.core.run(
        ids, cache, logits_begin, len(ids), None, None, 512, adapters=list(adapters), **arguments
    )


class Change:
    """Random changes of every module of a model, and the checkpoint that has them."""

    def __init__(self, model, seed=0, size=0.2, dora=False):
        rng = np.random.default_rng(seed)
        self.adapter = _core.Adapter(model.core, "float32")
        self.weights = {}
        self.scale = 0.7
        for layer in range(len(model.config.text.layers)):
            for module, tensor in MODULES.items():
                shape = _core.adapted_module_shape(model.core, layer, module)
                if shape is None:
                    continue
                *experts, outputs, inputs = shape
                a = (size * rng.normal(size=(*experts, RANK, inputs))).astype(np.float32)
                b = (size * rng.normal(size=(*experts, outputs, RANK))).astype(np.float32)
                change = self.scale * (b @ a)
                name = f"layers.{layer}.{tensor}"
                if experts:
                    self.adapter.add_experts(layer, module, a, b, self.scale)
                    self.weights[name] = lambda w, change=change: w + change
                    continue
                gain = None
                if dora:
                    gain = rng.uniform(0.5, 1.5, size=outputs).astype(np.float32)
                    change_of = lambda w, c=change, g=gain: g[:, None] * (w + c)  # noqa: E731
                    self.weights[name] = change_of
                else:
                    self.weights[name] = lambda w, change=change: w + change
                self.adapter.add(layer, module, a, b, self.scale, gain)

    def write(self, source, target):
        tensors = load_file(source / "model.safetensors")
        for name, change in self.weights.items():
            full = next(n for n in tensors if n.endswith(name))
            tensors[full] = change(tensors[full]).astype(np.float32)
        target.mkdir()
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        for file in source.iterdir():
            if file.suffix == ".json":
                (target / file.name).write_bytes(file.read_bytes())
        return gl.load(target, dtype="float32")


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_side_path_equals_a_checkpoint_with_the_change(tiny, variant, dora, tmp_path):
    folder = tiny(variant)[1]
    model = gl.load(folder, dtype="float32")
    change = Change(model, dora=dora)
    changed = change.write(folder, tmp_path / "changed")
    ids = random_ids(37)
    want = run(changed, ids)
    got = run(model, ids, [(change.adapter, 1.0)])
    plain = run(model, ids)
    assert np.abs(want - plain).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_array_equal(run(model, ids), plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_equal_the_side_path_and_leave_no_trace(tiny, variant):
    model = gl.load(tiny(variant)[1], dtype="float32")
    change = Change(model, dora=True)
    ids = random_ids(21)
    plain = run(model, ids)
    side = run(model, ids, [(change.adapter, 0.5)])
    report = _core.merge_adapters(model.core, [(change.adapter, 0.5)])
    assert len(report) == len(change.weights)
    np.testing.assert_allclose(run(model, ids), side, atol=1e-4)
    assert _core.merge_adapters(model.core, []) == []
    np.testing.assert_array_equal(run(model, ids), plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_change_of_zero_changes_no_bit(tiny, variant):
    model = gl.load(tiny(variant)[1], dtype="float32")
    adapter = _core.Adapter(model.core, "bfloat16")
    rng = np.random.default_rng(1)
    for layer in range(len(model.config.text.layers)):
        for module in MODULES:
            shape = _core.adapted_module_shape(model.core, layer, module)
            if shape is None:
                continue
            *experts, outputs, inputs = shape
            a = rng.normal(size=(*experts, RANK, inputs)).astype(np.float32)
            b = np.zeros((*experts, outputs, RANK), np.float32)
            (adapter.add_experts if experts else adapter.add)(layer, module, a, b, 2.0)
    for length in (1, 7, 40):
        ids = random_ids(length)
        np.testing.assert_array_equal(run(model, ids, [(adapter, 1.0)]), run(model, ids))


def test_weights_of_several_adapters_add_up(tiny):
    model = gl.load(tiny("26b")[1], dtype="float32")
    one, two = Change(model, 1), Change(model, 2)
    ids = random_ids(19)
    halves = run(model, ids, [(one.adapter, 0.25), (two.adapter, 0.0), (one.adapter, 0.75)])
    np.testing.assert_allclose(halves, run(model, ids, [(one.adapter, 1.0)]), atol=1e-4)
    both = run(model, ids, [(one.adapter, 1.0), (two.adapter, -0.5)])
    report = _core.merge_adapters(model.core, [(one.adapter, 1.0), (two.adapter, -0.5)])
    assert {error for _, error in report} == {0.0}
    np.testing.assert_allclose(run(model, ids), both, atol=1e-4)


def test_an_adapter_in_use_and_one_of_other_sizes_are_refused(tiny):
    model = gl.load(tiny("e2b")[1], dtype="float32")
    other = gl.load(tiny("31b")[1], dtype="float32")
    change = Change(model)
    ids = random_ids(5)
    plain = run(other, ids)
    with pytest.raises(ValueError, match=r"adapter: .*"):
        run(other, ids, [(change.adapter, 1.0)])
    np.testing.assert_array_equal(run(other, ids), plain)
    run(model, ids, [(change.adapter, 1.0)])
    with pytest.raises(RuntimeError, match="in use"):
        change.adapter.replace_rows("lm_head", [1], np.zeros((1, 1), np.float32))
    with pytest.raises(ValueError, match=r"B has shape \[4, 3\], expected \["):
        _core.Adapter(model.core, "float32").add(
            0, "attn.q_proj", np.zeros((3, 4), np.float32), np.zeros((4, 3), np.float32), 1.0
        )
