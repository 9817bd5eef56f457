"""Adapters: what is read, what is refused, what calls run under, and what is left behind."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gemloupe as gl
import made_adapters
from made_adapters import ALL_LINEAR, CONFIG, EVERYTHING, WEIGHTS
from tiny_models import random_ids

IDS = random_ids(11)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """Returns `get(variant, seed, **config) -> (PEFT model, folder)`, each made once."""
    known: dict = {}

    def get(variant="e2b", seed=3, **config):
        config = {"target_modules": ALL_LINEAR, "r": 3, **config}
        key = (variant, seed, repr(config))
        if key not in known:
            peft = made_adapters.make(tiny(variant, text_only=True)[0], seed=seed, **config)
            folder = tmp_path_factory.mktemp(f"{variant}-{seed}-{len(known)}")
            known[key] = (peft, made_adapters.save(peft, folder))
        return known[key]

    return get


@pytest.fixture(scope="module")
def base(tiny):
    """Returns `get(variant, dtype) -> model` without adapters, each loaded anew."""

    def get(variant="e2b", dtype="float32", **options):
        return gl.load(tiny(variant, text_only=True)[1], dtype=dtype, **options)

    return get


def logits(model, **arguments) -> np.ndarray:
    return model.run(IDS, logits="all", **arguments).logits


def refused(model, folder, error=ValueError, **arguments) -> str:
    """The error of loading, after which the model is as it was."""
    before = logits(model)
    with pytest.raises(error) as caught:
        model.load_adapter(folder, **arguments)
    assert len(model.adapters) == 0
    assert np.array_equal(logits(model), before)
    return str(caught.value)


# What is read.


def test_every_form_of_a_key_means_the_same(base, made, tmp_path):
    _, folder = made()
    forms = {
        "bare": lambda name: name.removeprefix("base_model.model."),
        "named": lambda name: name.replace(".weight", ".default.weight"),
        "multimodal": lambda name: name.replace("model.layers", "model.language_model.layers"),
        "inner": lambda name: name.removeprefix("base_model.model.model."),
    }
    model = base()
    model.load_adapter(folder, name="plain")
    want = logits(model, adapter="plain")
    for form, rename in forms.items():
        copy = made_adapters.rewrite(
            folder, tmp_path / form, lambda t, r=rename: {r(name): v for name, v in t.items()}
        )
        model.load_adapter(copy)
        assert np.array_equal(logits(model, adapter=form), want), form


def test_dora_magnitudes_and_embeddings_are_read_with_the_adapters_name(base, made, tmp_path):
    _, folder = made(target_modules=EVERYTHING, use_dora=True)

    def rename(tensors):
        return {
            name + ".default"
            if name.endswith(("magnitude_vector", "embedding_A", "embedding_B"))
            else name: tensor
            for name, tensor in tensors.items()
        }

    model = base()
    model.load_adapter(folder, name="plain")
    model.load_adapter(made_adapters.rewrite(folder, tmp_path / "named", rename))
    assert np.array_equal(logits(model, adapter="named"), logits(model, adapter="plain"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_held_as_stored(base, made, tmp_path, dtype):
    _, folder = made()
    copy = made_adapters.rewrite(
        folder, tmp_path / "half", lambda t: {n: v.to(dtype) for n, v in t.items()}
    )
    wide = made_adapters.rewrite(
        folder, tmp_path / "wide", lambda t: {n: v.to(dtype).float() for n, v in t.items()}
    )
    model = base()
    a, b = model.load_adapter(copy), model.load_adapter(wide)
    assert (a.dtype, b.dtype) == (str(dtype).removeprefix("torch."), "float32")
    assert 2 * a.nbytes <= b.nbytes + 64 * len(a.match.low_rank)
    np.testing.assert_allclose(
        logits(model, adapter="half"), logits(model, adapter="wide"), atol=1e-4
    )


def test_a_text_adapter_acts_in_the_multimodal_model_and_the_reverse(tiny, tmp_path):
    import copy as copying

    text, text_folder = tiny("e2b", text_only=True)
    multi = copying.deepcopy(tiny("e2b", text_only=False)[0])
    multi.model.language_model.load_state_dict(text.model.state_dict())
    multi_folder = tmp_path / "multi"
    multi.save_pretrained(multi_folder)
    for trained, applied in ((text, multi_folder), (multi, text_folder)):
        peft = made_adapters.make(trained, target_modules=ALL_LINEAR, r=2)
        name = type(trained).__name__
        folder = made_adapters.save(peft, tmp_path / name)
        model = gl.load(applied, dtype="float32")
        model.load_adapter(folder)
        np.testing.assert_allclose(
            logits(model, adapter=name), made_adapters.logits(peft, IDS), atol=1e-4
        )


# What is ignored.


def test_sharing_layers_and_towers_are_listed_as_ignored(base, made, tmp_path):
    _, folder = made()

    def add(tensors):
        more = {
            "base_model.model.model.layers.8.self_attn.k_proj.lora_A.weight": torch.zeros(3, 44),
            "base_model.model.model.layers.8.self_attn.k_proj.lora_B.weight": torch.zeros(20, 3),
            "base_model.model.model.vision_tower.encoder.layers.0.mlp.up_proj.linear.lora_A.weight":
            torch.zeros(3, 24),
        }  # fmt: skip
        return tensors | more

    copy = made_adapters.rewrite(folder, tmp_path / "more", add)
    model = base()
    report = model.load_adapter(copy).report()
    assert [one.reason for one in report.ignored] == [
        "layer 8 reads the keys and values of layer 3",
        "layer 8 reads the keys and values of layer 3",
        "this model has no vision_tower",
    ]
    assert "ignored     3 tensors" in repr(report)
    text = refused(base(), copy, strict=True)
    assert "3 problems" in text and "layer 8 reads" in text


# What is refused.


def test_all_that_does_not_fit_is_one_error(base, made, tmp_path):
    _, folder = made()

    def spoil(tensors):
        first = "base_model.model.model.layers.0."
        del tensors[first + "self_attn.q_proj.lora_B.weight"]
        tensors[first + "self_attn.o_proj.lora_A.weight"] = torch.zeros(3, 7)
        tensors[first + "mlp.sideways_proj.lora_A.weight"] = torch.zeros(3, 44)
        tensors[first + "mlp.up_proj.bias"] = torch.zeros(53)
        return tensors

    copy = made_adapters.rewrite(folder, tmp_path / "spoilt", spoil)
    text = refused(base(), copy)
    for part in (
        "4 problems",
        "q_proj.lora_A.weight': its module has no lora_B",
        "o_proj.lora_A.weight': shape is [3, 7]; expected [3, 36]",
        "sideways_proj.lora_A.weight': its module has no lora_B",
        "mlp.up_proj.bias': is no module of this model",
    ):
        assert part in text, part


def test_an_adapter_of_another_model_says_which(base, made, tmp_path):
    _, folder = made("31b")
    copy = made_adapters.rewrite(
        folder, tmp_path / "a", config={"base_model_name_or_path": "google/gemma-4-31B"}
    )
    text = refused(base("e2b"), copy)
    assert "shape is" in text and "… and" in text and len(text.splitlines()) == 13
    assert "It was trained on 'google/gemma-4-31B': load that model." in text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
        ({"peft_type": "PROMPT_TUNING"}, "is no part of the weights; train a LoRA adapter"),
        ({"peft_type": "TRAINABLE_TOKENS"}, "or train LoRA with trainable_token_indices"),
        ({"peft_type": "OFT"}, "merge_and_unload"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens is [5, 6]; expected"),
        ({"layer_replication": [[0, 4]]}, "layer_replication is"),
        ({"megatron_config": {"x": 1}}, "megatron_config is"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"arrow_config": {"x": 1}}, "arrow_config is"),
        ({"a_later_option": 3}, "a_later_option is 3; expected it unset"),
        ({"init_lora_weights": "pissa_niter_4"}, "also changed the base weights"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"r": 0}, "r is 0; expected an integer from 1"),
        ({"r": 2.5}, "r is 2.5"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; expected a number"),
        ({"r": 4}, "shape is [44, 3]; expected [44, 4]"),
        ({"use_dora": True}, "has no lora_magnitude_vector; use_dora is set"),
        ({"use_dora": True, "lora_bias": True}, "use_dora and lora_bias are both set"),
        ({"lora_bias": True}, "has no lora_B.bias; lora_bias is set"),
        ({"rank_pattern": {"(a*)*b": 3}}, "which repeats a group"),
        ({"rank_pattern": {f".*{n}": 3 for n in range(51)}}, "at most 50 patterns with rep"),
        ({"rank_pattern": {"(": 3}}, "which is no regular expression"),
        ({"alpha_pattern": {"q_proj": None}}, "expected a number"),
        ({"alpha_pattern": [1]}, "expected an object"),
        ({"trainable_token_indices": [3, 3]}, "a list of token ids, each once"),
        ({"target_parameters": "x"}, "a list of texts"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_change_the_computation_are_refused_by_name(
    base, made, tmp_path, fields, expected
):
    _, folder = made()
    text = refused(base(), made_adapters.rewrite(folder, tmp_path / "a", config=fields))
    assert expected in text


def test_options_of_the_training_only_are_read_over(base, made, tmp_path):
    _, folder = made()
    fields = {
        "lora_dropout": 0.05, "init_lora_weights": "gaussian", "layers_to_transform": [0, 1],
        "layers_pattern": "layers", "eva_config": {"rho": 2.0}, "exclude_modules": ["x"],
        "auto_mapping": {"unsloth_fixed": True}, "fan_in_fan_out": True,
    }  # fmt: skip
    copy = made_adapters.rewrite(folder, tmp_path / "b", config=fields)
    model = base()
    model.load_adapter(folder, name="a")
    report = model.load_adapter(copy).report()
    assert np.array_equal(logits(model, adapter="a"), logits(model, adapter="b"))
    assert any("fan_in_fan_out" in note for note in report.notes)


def test_a_quantised_base_is_accepted_and_reported(base, made, tmp_path):
    _, folder = made()
    fields = {"base_model_name_or_path": "unsloth/gemma-4-E2B-it-unsloth-bnb-4bit"}
    copy = made_adapters.rewrite(folder, tmp_path / "a", config=fields)
    assert "whose weights" not in repr(base().load_adapter(folder).report())
    assert "says that its weights are quantised" in repr(base().load_adapter(copy).report())


def test_a_trainers_folder_lists_its_checkpoints(base, made, tmp_path):
    _, folder = made()
    for step in (500, 1500):
        shutil.copytree(folder, tmp_path / f"checkpoint-{step}")
    text = refused(base(), tmp_path, FileNotFoundError)
    assert text.index("checkpoint-1500") < text.index("checkpoint-500")


def test_a_pickle_is_refused_with_the_reason(base, made, tmp_path):
    _, folder = made()
    shutil.copy(folder / CONFIG, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    assert "a pickle, which can run code" in refused(base(), tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    assert "Finish the download" in refused(base(), tmp_path, FileNotFoundError)


def test_places_that_hold_no_adapter_say_what_to_give(base, tiny, tmp_path):
    model = base()
    whole = tiny("e2b", text_only=True)[1]
    assert "This is a whole model" in refused(model, whole, FileNotFoundError)
    assert "PEFT's save_pretrained wrote" in refused(model, tmp_path, FileNotFoundError)
    (tmp_path / "adapters").mkdir()
    text = refused(model, tmp_path / "adapter", FileNotFoundError)
    assert f"Did you mean {str(tmp_path / 'adapters')!r}?" in text
    assert "a PEFT folder, or a hub id" in refused(model, 5)
    refused(model, "someone/some-adapter", ConnectionError)


def test_any_truncation_or_damage_is_an_error_and_changes_nothing(base, made, tmp_path):
    _, folder = made()
    model = base()
    data = (folder / WEIGHTS).read_bytes()
    config = (folder / CONFIG).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    target = tmp_path / "a"
    target.mkdir()

    def write(weights: bytes = data, text: bytes = config) -> Path:
        (target / WEIGHTS).write_bytes(weights)
        (target / CONFIG).write_bytes(text)
        return target

    for length in (0, 4, 8, 20, header - 1, header, header + 10, len(data) - 1):
        refused(model, write(data[:length]))
    refused(model, write(data + b"\0"))
    refused(model, write(b"\xff" * 8 + data[8:]))
    refused(model, write(data[:header].replace(b'"F32"', b'"I32"', 1) + data[header:]))
    refused(model, write(data[:header].replace(b"[3,53]", b"[53,3]", 1) + data[header:]))
    refused(model, write(text=config[:-5]))
    refused(model, write(text=b"[]"))
    refused(model, write(text=config.replace(b"{", b'{"r": 3, ', 1)))
    nan = np.frombuffer(data[header:], "<f4").copy()
    nan[7] = np.nan
    assert "not finite" in refused(model, write(data[:header] + nan.tobytes()))


def test_several_adapters_in_one_file_are_refused(base, made, tmp_path):
    _, folder = made()

    def mix(tensors):
        names = {"lora_A.weight": "lora_A.one.weight", "lora_B.weight": "lora_B.two.weight"}
        return {
            next((n.replace(old, new) for old, new in names.items() if n.endswith(old)), n): v
            for n, v in tensors.items()
        }

    assert "several adapters" in refused(base(), made_adapters.rewrite(folder, tmp_path / "a", mix))


def test_norms_are_replaced_only_by_equal_ones(base, made, tmp_path):
    peft, folder = made(modules_to_save=["input_layernorm"])
    text = refused(base(), folder)
    assert "input_layernorm.weight': holds other values than the model's" in text
    norms = {k: v for k, v in load_file(folder / WEIGHTS).items() if "layernorm" in k}
    plain = peft.base_model.model.model.layers
    own = {k: plain[int(k.split(".")[4])].input_layernorm.original_module.weight for k in norms}
    copy = made_adapters.rewrite(folder, tmp_path / "own", lambda t: t | own)
    base().load_adapter(copy)


def test_a_copy_of_another_bases_embedding_is_refused(base, made, tmp_path):
    _, folder = made(target_modules=["embed_tokens"])

    def shift(tensors):
        return {n: v + 0.01 if "base_layer" in n else v for n, v in tensors.items()}

    text = refused(base(), made_adapters.rewrite(folder, tmp_path / "a", shift))
    assert "holds another base's weights" in text
    for dtype in ("bfloat16", "int8", "int4"):
        base(dtype=dtype).load_adapter(folder)


# What calls run under.


@pytest.fixture
def two(base, made):
    model = base()
    model.load_adapter(made(seed=3)[1], name="a")
    model.load_adapter(made(seed=4)[1], name="b")
    return model


def test_b_of_zeros_changes_no_bit(base, made, tmp_path):
    _, folder = made(target_modules=EVERYTHING)
    zero = made_adapters.rewrite(
        folder, tmp_path / "zero",
        lambda t: {n: v * 0 if "_B" in n else v for n, v in t.items()},
    )  # fmt: skip
    for dtype in ("float32", "int4"):
        model = base(dtype=dtype)
        model.load_adapter(zero)
        assert np.array_equal(logits(model, adapter="zero"), logits(model))


def test_weights_add_up_and_scale_multiplies(two, made):
    a = two.load_adapter(made(seed=3)[1], name="half", scale=0.5)
    assert np.array_equal(logits(two, adapter=a), logits(two, adapter={"a": 0.5}))
    both = logits(two, adapter={"a": 1.0, "b": 1.0})
    one = logits(two, adapter="a")
    assert np.abs(both - one).max() > 0.05
    np.testing.assert_allclose(logits(two, adapter={"a": 1, "b": 0}), one)
    assert np.array_equal(logits(two, adapter={}), logits(two))


def test_a_row_of_a_mixed_batch_is_as_alone(two):
    choices = ["a", None, {"a": 0.3, "b": 0.7}, "b", "a"]
    prompts = [random_ids(5 + n, seed=n) for n in range(5)]
    out = two.generate(prompts, adapter=choices, temperature=0, max_new_tokens=6, logprobs=3)
    runs = two.run(prompts, adapter=choices)
    for prompt, choice, row, run in zip(prompts, choices, out, runs, strict=True):
        alone = two.generate(prompt, adapter=choice, temperature=0, max_new_tokens=6, logprobs=3)
        assert row.ids.tolist() == alone.ids.tolist()
        np.testing.assert_allclose(
            [p for p, _ in row.logprobs], [p for p, _ in alone.logprobs], atol=1e-5
        )
        assert np.array_equal(run.logits, two.run(prompt, adapter=choice).logits)


def test_active_adapters_belong_to_their_thread(two):
    plain, a, b = (logits(two, adapter=choice) for choice in ({}, "a", "b"))
    seen = {}
    two.set_adapter("a")

    def other():
        seen["thread"] = logits(two)
        two.set_adapter("b")
        seen["set"] = logits(two)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert np.array_equal(seen["thread"], plain) and np.array_equal(seen["set"], b)
    assert np.array_equal(logits(two), a)
    with two.disable_adapter():
        assert np.array_equal(logits(two), plain)
        assert np.array_equal(logits(two, adapter="b"), b)
    assert np.array_equal(logits(two), a)
    assert "active" in str(two.explain()).split("Adapters")[1].splitlines()[1]
    two.set_adapter({"a": 0.5, "b": 0.5})
    assert np.array_equal(logits(two), logits(two, adapter={"b": 0.5, "a": 0.5}))
    two.set_adapter(None)
    assert np.array_equal(logits(two), plain)


def test_load_makes_an_adapter_the_default_of_every_thread(tiny, made):
    folder = tiny("e2b", text_only=True)[1]
    model = gl.load(folder, dtype="float32", adapter=made(seed=3)[1])
    name = model.list_adapters()["name"][0]
    seen = []
    thread = threading.Thread(target=lambda: seen.append(logits(model)))
    thread.start()
    thread.join()
    assert np.array_equal(seen[0], logits(model, adapter=name))
    assert not np.array_equal(seen[0], logits(model, adapter={}))
    half = gl.load(folder, dtype="float32", adapter={made(seed=3)[1]: 0.5})
    assert np.array_equal(logits(half), logits(model, adapter={name: 0.5}))
    both = gl.load(folder, dtype="float32", adapter=[made(seed=3)[1], made(seed=4)[1]])
    assert len(both.adapters) == 2 and both.run(IDS).adapters.label.count("+") == 1


def test_names_are_checked(two, made):
    with pytest.raises(KeyError, match=r"no adapter 'A'. Did you mean 'a'\?"):
        logits(two, adapter="A")
    with pytest.raises(KeyError, match="There are 'a', 'b'"):
        two.set_adapter("zzz")
    with pytest.raises(ValueError, match="there is an adapter 'a'"):
        two.load_adapter(made(seed=4)[1], name="a")
    for name in ("", "a b", "a*", "none", 5):
        with pytest.raises(ValueError, match="expected a word"):
            two.load_adapter(made(seed=4)[1], name=name)
    with pytest.raises(TypeError, match="adapter is 5"):
        logits(two, adapter=5)
    with pytest.raises(TypeError, match="must be a number"):
        logits(two, adapter={"a": "much"})
    with pytest.raises(ValueError, match="finite"):
        logits(two, adapter={"a": float("nan")})
    with pytest.raises(TypeError, match="x is a single prompt"):
        logits(two, adapter=["a"])
    with pytest.raises(ValueError, match="2 entries for 1 rows"):
        two.run([IDS], adapter=["a", "b"])


def test_a_deleted_adapter_is_gone(two):
    a = two.adapters["a"]
    two.set_adapter("a")
    two.unload_adapter("a")
    with pytest.raises(KeyError, match="no adapter 'a'"):
        logits(two)
    two.set_adapter(None)
    with pytest.raises(ValueError, match="was deleted"):
        logits(two, adapter=a)
    assert two.list_adapters()["name"] == ["b"]


def test_a_cache_remembers_its_adapters(two):
    cache = two.new_cache()
    two.run(IDS[:5], cache=cache, adapter="a")
    assert [note.detail for note in cache.provenance] == ["a"]
    with pytest.warns(UserWarning, match="entries computed under adapter a, and is now used"):
        two.generate(IDS[5:], cache=cache, max_new_tokens=2)
    made = two.generate(IDS, adapter={"a": 0.5, "b": 1}, max_new_tokens=2).cache
    assert [note.detail for note in made.provenance] == ["0.5 a + b"]
    assert two.generate(IDS, max_new_tokens=2).cache.provenance == ()


def test_a_repeated_run_keeps_its_adapters(two):
    run = two.run(IDS, adapter="a", keep=True, logits="all")
    edit = {"layers.3.resid_post": gl.edits.scale(0.5)}
    again = two.run(run, edit=edit, logits="all")
    np.testing.assert_allclose(
        again.logits, logits(two, adapter="a", edit=edit), atol=1e-5, rtol=1e-5
    )
    assert again.adapters.label == run.adapters.label == "a"
    with pytest.raises(ValueError, match="under its own adapters"):
        two.run(run, adapter="b")


def test_models_of_one_process_share_an_adapter(base, made):
    _, folder = made()
    first, second = base(), base()
    a, b = first.load_adapter(folder, name="x"), second.load_adapter(folder, name="y")
    assert a.held is b.held
    assert np.array_equal(logits(first, adapter="x"), logits(second, adapter="y"))
    assert base(dtype="int4").load_adapter(folder).held is not a.held  # held in bfloat16
    with pytest.raises(ValueError, match="belongs to another model"):
        logits(first, adapter=b)


def test_adapters_load_while_others_generate(two, made):
    want = two.generate(IDS, adapter="a", temperature=0, max_new_tokens=20).ids.tolist()
    failures = []

    def work():
        for n in range(4):
            name = f"{threading.get_ident()}-{n}"
            two.load_adapter(made(seed=4)[1], name=name)
            two.delete_adapter(name)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        got = two.generate(IDS, adapter="a", temperature=0, max_new_tokens=20).ids.tolist()
        failures += [got] if got != want else []
    for thread in threads:
        thread.join()
    assert not failures


# What can be seen.


def test_what_an_adapter_adds_to_a_module_is_captured(two):
    point, delta = "layers.2.attn.q_proj", "lora.a.layers.2.attn.q_proj"
    read = "layers.2.attn.norm"
    run = two.run(IDS, adapter={"a": 0.5, "b": 1}, capture=[read, point, "lora.*.layers.2.attn.*"])
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    wanted = {f"lora.{a}.layers.2.attn.{name}" for a in "ab" for name in names}
    assert set(run.captured) == {read, point, *wanted}
    plain = two.weights["layers.2.self_attn.q_proj.weight"]
    changes = sum(run[f"lora.{a}.layers.2.attn.q_proj"] for a in "ab")
    whole = run[point].reshape(len(IDS), -1)
    np.testing.assert_allclose(run[read] @ plain.T + changes, whole, atol=1e-5)
    pair = next(p for p in two.adapters["a"].match.low_rank if p.module.label == point)
    read_of = two.adapters["a"].folder.read
    product = 0.5 * pair.scale * run[read] @ read_of(pair.a).T @ read_of(pair.b).T
    np.testing.assert_allclose(run[delta], product, atol=1e-5)
    assert np.array_equal(run.captured.positions_of(delta), np.arange(len(IDS)))
    out = two.generate(IDS, adapter="a", capture=delta, max_new_tokens=3, temperature=0)
    assert out.captured[delta].shape == (len(IDS) + 2, product.shape[1])
    last = two.run(IDS, adapter="a", capture={delta: gl.at(-1)})
    np.testing.assert_allclose(last[delta], out.captured[delta][len(IDS) - 1 : len(IDS)], atol=1e-5)


def test_a_change_that_is_not_there_says_what_is(two):
    with pytest.raises(KeyError, match="Did you mean 'lora.a.layers.2.attn.q_proj'"):
        logits(two, adapter="a", capture="lora.a.layers.2.attn.q_prj")
    with pytest.raises(KeyError, match="This call runs under none"):
        logits(two, capture="lora.a.*")


# What is said.


@pytest.mark.parametrize("dora", [False, True])
def test_the_report_gives_the_norms_of_the_change(base, made, dora):
    peft, folder = made(target_modules=EVERYTHING, use_dora=dora, lora_alpha=5)
    report = base().load_adapter(folder, scale=0.5).report()
    inner = peft.base_model.model
    merged = {}
    for change in report.changes:
        path = (
            change.module.replace("attn.", "self_attn.")
            .replace("per_layer.gate", "per_layer_input_gate")
            .replace("per_layer.projection", "per_layer_projection")
        )
        module = inner.get_submodule(path if path == "lm_head" else f"model.{path}")
        weight = module.get_base_layer().weight
        delta = module.get_delta_weight("default")
        if dora:
            variant = module.lora_variant["default"]
            delta = variant.merge_safe(module, "default", weight.clone()) - weight
        merged[change.module] = (float(delta.norm()), float(weight.norm()))
    got = {c.module: (2 * c.norm, c.base_norm) for c in report.changes}
    assert got.keys() == merged.keys()
    for name, values in merged.items():
        np.testing.assert_allclose(got[name], values, rtol=1e-4, err_msg=name)
    assert report.table()["kind"][0] == ("DoRA" if dora else "LoRA")
    assert report.untouched == ()


def test_the_report_shows_and_counts(base, made):
    _, folder = made(target_modules=["q_proj"])
    a = base().load_adapter(folder, name="mine")
    report = a.report(norms=False)
    assert report.matched[0] == "layers.0.attn.q_proj" and len(report.matched) == 9
    assert "layers.0.mlp.up_proj" in report.untouched and "lm_head" in report.untouched
    assert "adapter mine" in repr(report) and "<table" in report._repr_html_()
    assert repr(a).startswith("Adapter('mine', rank 3, 9 modules")


# Merging.


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_merged_adapter_is_the_side_path_to_rounding_and_leaves_no_bit(
    base, made, dtype, requantize
):
    model = base(dtype=dtype)
    model.load_adapter(made()[1], name="a")
    point, read = "layers.0.attn.q_proj", "layers.0.attn.norm"
    plain = logits(model)
    side = model.run(IDS, adapter="a", capture=[point, read], logits="all")
    weight = model.weights["layers.0.self_attn.q_proj.weight"].astype(np.float64)
    table = model.merge_adapter("a", requantize=requantize)
    merged = model.run(IDS, capture=[point, read], logits="all")
    assert np.array_equal(merged[read], side[read])  # Nothing before it is adapted.
    errors = dict(zip(table["module"], table["error"], strict=True))
    bound = rounding_of_both(model, weight, side[read].astype(np.float64), errors[point], dtype)
    off = np.abs(merged[point] - side[point]).reshape(len(IDS), -1)
    assert (off <= bound).all()
    if dtype == "float32":
        np.testing.assert_allclose(merged.logits, side.logits, atol=1e-4)
    with pytest.raises(ValueError, match="is merged into the weights already"):
        logits(model, adapter="a")
    with model.disable_adapter(), pytest.raises(RuntimeError, match="can't be disabled"):
        logits(model)
    with pytest.raises(RuntimeError, match="unmerge_adapter first"):
        model.delete_adapter("a")
    model.unmerge_adapter()
    assert np.array_equal(logits(model), plain)
    assert np.array_equal(logits(model, adapter="a"), side.logits)


def rounding_of_both(model, weight, x, error, dtype) -> np.ndarray:
    """|merged − side| [T, out] at most: from operand norms, dtypes' roundoff, and merge's error."""
    pair = next(
        p for p in model.adapters["a"].match.low_rank if p.module.label == "layers.0.attn.q_proj"
    )
    a, b = (model.adapters["a"].folder.read(t).astype(np.float64) for t in (pair.a, pair.b))
    changed = weight + pair.scale * b @ a
    size = np.linalg.norm(x, axis=1)[:, None]
    plain = {"float32": 2.0**-20, "bfloat16": 2.0**-8}.get(dtype, 2.0**-7)
    product = abs(pair.scale) * np.linalg.norm(b, axis=1) * np.linalg.norm(a)
    held = (2.0**-18 if dtype == "float32" else 3 * 2.0**-8) * size * product
    # Activations are rounded on both sides: to int8 by half a step of 1/127 of a group's largest.
    inputs = plain * size if dtype in ("float32", "bfloat16") else np.abs(x).max(1)[:, None] / 254
    inputs = inputs * (x.shape[1] ** 0.5 if dtype.startswith("int") else 1)
    rows = np.linalg.norm(weight, axis=1) + np.linalg.norm(changed, axis=1)
    return held + inputs * rows + (error + 2.0**-20) * np.linalg.norm(changed) * size


def test_several_adapters_merge_and_leave_one_by_one(two):
    both, one = logits(two, adapter={"a": 0.5, "b": 1}), logits(two, adapter="b")
    two.merge_adapter("a", 0.5)
    two.merge_adapter("b")
    assert two.list_adapters()["active"] == ["merged", "merged"]
    np.testing.assert_allclose(logits(two), both, atol=1e-4)
    two.unmerge_adapter("a")
    np.testing.assert_allclose(logits(two), one, atol=1e-4)
    with pytest.raises(RuntimeError, match="adapter 'a' is not merged"):
        two.unmerge_adapter("a")
    with pytest.raises(RuntimeError, match="'b' is merged already"):
        two.merge_adapter("b")
    two.unmerge_adapter()


def test_configs_of_a_hostile_size_are_refused(base, made, tmp_path):
    _, folder = made()
    big = {f"layers.{n}.x": 3 for n in range(5001)}
    text = refused(
        base(), made_adapters.rewrite(folder, tmp_path / "a", config={"rank_pattern": big})
    )
    assert "at most 5000 patterns" in text and len(text) < 1000
    (tmp_path / "a" / CONFIG).write_text(json.dumps({"peft_type": "LORA", "x": "y" * (5 << 20)}))
    assert "too many for this file" in refused(base(), tmp_path / "a")
