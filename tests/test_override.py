"""`model.override`: other weights inside a block, and the model's own bits before and after it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gemloupe as gl
from gemloupe.checkpoint import expected_text_tensors
from made_adapters import ALL_LINEAR, make, save
from tiny_models import VARIANTS, make_tiny, random_ids, save_tiny, save_tiny_tokenizer

IDS = random_ids(40)
UP = "layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(make_tiny("e2b", text_only=True), tmp_path_factory.mktemp("e2b"))
    return save_tiny_tokenizer(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> gl.Model:
    return gl.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def own(model: gl.Model) -> np.ndarray:
    return model.run(IDS, logits="all").logits


@pytest.fixture(autouse=True)
def _unchanged_after_each_test(model: gl.Model, own: np.ndarray) -> Iterator[None]:
    yield
    assert np.array_equal(model.run(IDS, logits="all").logits, own)


def changed(model: gl.Model, name: str, seed: int = 0) -> np.ndarray:
    values = model.loaded_weights[name]
    noise = np.random.default_rng(seed).normal(size=values.shape)
    return (values + 0.3 * max(float(values.std()), 0.1) * noise).astype(np.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_values_change_no_bit(tiny: Callable, variant: str) -> None:
    model = gl.load(tiny(variant, text_only=True)[1], dtype="float32")
    expected = model.run(IDS, logits="all").logits
    generated = model.generate(IDS, max_new_tokens=6, temperature=0).ids
    with model.override({name: model.weights[name] for name in model.weights}):
        assert np.array_equal(model.run(IDS, logits="all").logits, expected)
        assert np.array_equal(model.generate(IDS, max_new_tokens=6, temperature=0).ids, generated)


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_values_give_what_a_checkpoint_with_them_gives(
    tiny: Callable, tmp_path: Path, variant: str
) -> None:
    _, folder = tiny(variant, text_only=True)
    model = gl.load(folder, dtype="float32")
    expected = model.run(IDS, logits="all").logits
    chosen: dict[str, str] = {}  # One tensor of each kind: the last layer that has it.
    for name in expected_text_tensors(model.config.text):
        chosen[".".join(part for part in name.split(".") if not part.isdigit())] = name
    weights = {name: changed(model, name, i) for i, name in enumerate(chosen.values())}
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    for name, values in weights.items():
        full = model.checkpoint.prefix + name
        assert full in stored
        stored[full] = torch.from_numpy(values)
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    reference = gl.load(tmp_path, dtype="float32")
    with model.override(weights):
        got = model.run(IDS, logits="all", capture="layers.*.resid_post")
        generated = model.generate(IDS, max_new_tokens=6, temperature=0)
        scored = model.run(IDS, targets="next").logprobs
    theirs = reference.run(IDS, logits="all", capture="layers.*.resid_post")
    assert np.array_equal(got.logits, theirs.logits)
    assert all(np.array_equal(got[name], theirs[name]) for name in theirs.captured)
    assert np.array_equal(
        generated.ids, reference.generate(IDS, max_new_tokens=6, temperature=0).ids
    )
    assert np.array_equal(scored, reference.run(IDS, targets="next").logprobs, equal_nan=True)
    for name, values in weights.items():  # Each of them matters.
        with model.override({name: values}):
            assert not np.array_equal(model.run(IDS, logits="all").logits, expected), name


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_values_are_used_as_they_are_in_models_of_any_dtype(folder: Path, dtype: str) -> None:
    model = gl.load(folder, dtype=dtype)
    own = model.run(IDS, logits="all").logits
    exact = gl.load(folder, dtype="float32")
    weights = {name: exact.weights[name] for name in exact.weights}
    with model.override(weights):
        got = model.run(IDS, logits="all").logits
        assert {info.dtype for _, info in model.weights.items()} == {"float32"}
    # All of them are float32 now: embedding factor and cache are left of the dtype.
    like = {"embed_scale": model.embed_scale, "kv_dtype": model.kv_dtype}
    reference = gl.load(folder, dtype="float32", **like)
    assert np.array_equal(got, reference.run(IDS, logits="all").logits)
    if dtype == "bfloat16":
        same = {name: model.weights[name] for name in model.weights}
        with model.override(same, dtype="bfloat16"):
            assert np.array_equal(model.run(IDS, logits="all").logits, own)
    value = changed(exact, UP)
    with model.override({UP: value}):
        assert np.array_equal(model.weights[UP], value)
        assert not np.array_equal(model.run(IDS, logits="all").logits, own)
    with model.override({UP: value}, dtype="bfloat16"):
        held = torch.from_numpy(value).bfloat16().float().numpy()
        assert np.array_equal(model.weights[UP], held)
        assert model.weights.info(UP).dtype == "bfloat16"
    assert np.array_equal(model.run(IDS, logits="all").logits, own)


def test_weights_show_the_override_inside_the_block(model: gl.Model) -> None:
    before = model.weights[UP]
    prefixed = model.checkpoint.prefix + UP
    with model.override({prefixed: np.zeros_like(before)}):
        assert not model.weights[UP].any()
        assert not model.weights.rows(prefixed, [3]).any()
        assert np.array_equal(model.loaded_weights[UP], before)
    assert np.array_equal(model.weights[UP], before)


def test_blocks_nest(model: gl.Model) -> None:
    norm, up = changed(model, "norm.weight"), changed(model, UP)
    with model.override({"norm.weight": norm, UP: up}):
        both = model.run(IDS, logits="all").logits
    with model.override({"norm.weight": norm}):
        one = model.run(IDS, logits="all").logits
        with model.override({UP: up}):
            assert np.array_equal(model.run(IDS, logits="all").logits, both)
            with model.override({UP: model.loaded_weights[UP]}):
                assert np.array_equal(model.run(IDS, logits="all").logits, one)
        assert np.array_equal(model.run(IDS, logits="all").logits, one)


def test_an_exception_inside_the_block_leaves_nothing(model: gl.Model, own: np.ndarray) -> None:
    with pytest.raises(ZeroDivisionError), model.override({UP: changed(model, UP)}):
        assert not np.array_equal(model.run(IDS, logits="all").logits, own)
        raise ZeroDivisionError
    assert np.array_equal(model.run(IDS, logits="all").logits, own)


def test_other_threads_are_not_touched(model: gl.Model, own: np.ndarray) -> None:
    seen: dict[str, np.ndarray] = {}

    def elsewhere(name: str) -> None:
        seen[name] = model.run(IDS, logits="all").logits
        with model.override({UP: changed(model, UP, seed=7)}):
            seen[name + " changed"] = model.run(IDS, logits="all").logits

    with model.override({UP: changed(model, UP, seed=6)}):
        mine = model.run(IDS, logits="all").logits
        threads = [threading.Thread(target=elsewhere, args=(f"{i}",)) for i in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            assert np.array_equal(model.run(IDS, logits="all").logits, mine)
        for thread in threads:
            thread.join()
    assert len(seen) == 4
    assert np.array_equal(seen["0"], own)
    assert np.array_equal(seen["1"], own)
    assert np.array_equal(seen["0 changed"], seen["1 changed"])
    assert not np.array_equal(seen["0 changed"], mine)


def test_a_stream_keeps_the_weights_that_it_began_with(model: gl.Model) -> None:
    with model.override({UP: changed(model, UP)}):
        whole = model.generate(IDS, max_new_tokens=8, temperature=0).ids
        stream = model.generate(IDS, max_new_tokens=8, temperature=0, stream=True)
        next(stream)
    assert np.array_equal(stream.result.ids, whole)


def test_edits_adapters_and_unembed_meet_overridden_weights(
    model: gl.Model, folder: Path, tmp_path: Path
) -> None:
    peft = make(make_tiny("e2b", text_only=True), r=3, target_modules=ALL_LINEAR)
    adapter = model.load_adapter(save(peft, tmp_path / "one"), name="one")
    edit = {"layers.3.mlp.out": gl.edits.scale(0.5)}
    values = changed(model, UP)
    with model.override({UP: values}):
        both = model.run(IDS, logits="all", adapter="one", edit=edit)
        residual = model.run(IDS, capture="layers.8.resid_post")
        logits = model.unembed(residual["layers.8.resid_post"][-1:])
        np.testing.assert_allclose(logits, residual.logits, rtol=0, atol=1e-5)
        with pytest.raises(RuntimeError, match=r"merged inside a block of model\.override"):
            model.merge_adapter("one")
        with pytest.raises(RuntimeError, match=r"loaded inside a block of model\.override"):
            model.load_adapter(tmp_path / "one", name="two")
    assert both.adapters.label.startswith(f"one + {UP} overridden (")
    alone = model.run(IDS, logits="all", adapter="one", edit=edit)
    assert not np.array_equal(both.logits, alone.logits)
    model.merge_adapter("one")
    with pytest.raises(RuntimeError, match="merged into the weights"), model.override({UP: values}):
        pass
    model.unmerge_adapter()
    model.delete_adapter(adapter.name)


def test_a_cache_filled_under_other_weights_warns(model: gl.Model) -> None:
    cache = model.new_cache()
    model.run(IDS[:20], cache=cache)
    values = changed(model, UP)
    with model.override({UP: values}):
        with pytest.warns(UserWarning, match=r"under adapter none.*up_proj.weight overridden \("):
            model.run(IDS[20:], cache=cache)
        fresh = model.generate(IDS, max_new_tokens=2, temperature=0).cache
        label = model.run(IDS, cache=(mine := model.new_cache())).adapters.label
    assert [note.detail for note in fresh.provenance] == [label]
    with model.override({UP: values}), warnings.catch_warnings():
        warnings.simplefilter("error")  # The same values: the same weights.
        model.run([5], cache=mine)
    with pytest.warns(UserWarning, match="and is now used under none"):
        model.run([5], cache=mine)


def test_a_run_is_repeated_under_its_own_weights_only(model: gl.Model) -> None:
    kept = model.run(IDS, keep=True)
    with model.override({UP: changed(model, UP)}):
        with pytest.raises(ValueError, match=r"weights were the model's own, and now they are"):
            model.run(kept)
        own = model.run(IDS, keep=True)
        edit = {"layers.4.resid_post": gl.edits.zero(positions=30)}
        repeated = model.run(own, edit=edit).logits
        np.testing.assert_allclose(repeated, model.run(IDS, edit=edit).logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"overridden \(.*now they are the model's own"):
        model.run(own)


def test_derived_keys_belong_to_the_norm_that_made_them(tiny: Callable) -> None:
    model = gl.load(tiny("31b", text_only=True)[1], dtype="float32")
    name = "layers.5.self_attn.k_norm.weight"
    assert model.config.text.layers[5].values_are_keys
    cache, separate = model.new_cache(), model.new_cache(separate_keys=True)
    for held in (cache, separate):
        model.run(IDS[:9], cache=held)
    with model.override({name: changed(model, name)}):
        with pytest.warns(UserWarning, match="overridden"):
            with pytest.raises(ValueError, match=r"derives the keys of layer 5.*separate_keys"):
                model.run(IDS[9:], cache=cache)
        with pytest.warns(UserWarning, match="k_norm.weight overridden"):
            model.run(IDS[9:], cache=separate)
        whole = model.run(IDS, logits="all").logits
        inside = model.new_cache()
        model.run(IDS[:9], cache=inside)
        rest = model.run(IDS[9:], cache=inside, logits="all").logits
        np.testing.assert_allclose(rest, whole[9:], rtol=0, atol=1e-4)
    assert cache.length == 9
    model.run(IDS[9:], cache=cache)


def test_edit_functions_may_not_call_the_model_from_inside(model: gl.Model) -> None:
    def call(x: np.ndarray) -> None:
        model.run([5, 6])

    with model.override({UP: changed(model, UP)}):
        with pytest.raises(RuntimeError, match="running a pass that called this edit function"):
            model.run(IDS, edit={"layers.0.resid_post": call})


MISTAKES = {
    "unknown": ({"layers.1.mlp.upp_proj.weight": 0}, "is no tensor of this model. Did you mean"),
    "shape": ({UP: np.zeros((2, 3))}, f"'{UP}': the array is [2, 3]; expected [53, 44]"),
    "head": ({"lm_head.weight": 0}, "is tied to the embedding; expected 'embed_tokens.weight'"),
    "tower": ({"vision_tower.std_bias": 0}, "is of a tower; expected a tensor of the text"),
    "number": ({3: 0}, "is no tensor of this model"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_listed(model: gl.Model, case: str) -> None:
    weights, message = MISTAKES[case]
    with pytest.raises(ValueError) as error, model.override({**weights, "nothing": 0}):
        pass
    assert message in str(error.value)
    assert "'nothing' is no tensor" in str(error.value)


def test_other_mistakes_are_named(model: gl.Model) -> None:
    with pytest.raises(TypeError, match="takes a mapping"), model.override([UP]):
        pass
    with pytest.raises(TypeError, match="expected an array of numbers"), model.override({UP: "x"}):
        pass
    with pytest.raises(ValueError, match="dtype is 'int3'; expected"):
        with model.override({UP: changed(model, UP)}, dtype="int3"):
            pass
    twice = {UP: changed(model, UP), model.checkpoint.prefix + UP: changed(model, UP)}
    with pytest.raises(ValueError, match="is given twice"), model.override(twice):
        pass
