"""Captures and edits: what they do to each other, to decoding, to batches and to the cache."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gemloupe as gl
from gemloupe.hooks import point_shape
from tiny_models import VARIANTS, random_ids

pytestmark = pytest.mark.core  # repeated for every instruction set


@pytest.fixture
def model(tiny, variant):
    return gl.load(tiny(variant)[1], dtype="float32")


@pytest.fixture
def e2b(tiny):
    return gl.load(tiny("e2b")[1], dtype="float32")


def direction(model, seed: int = 3) -> np.ndarray:
    size = model.config.text.hidden_size
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


@pytest.mark.parametrize("length", [1, 2, 8, 9, 11, 15, 16, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_capturing_every_point_changes_no_bit(model, length):
    ids = random_ids(length)
    run = model.run(ids, capture=list(gl.hook_points(model)))
    np.testing.assert_array_equal(run.logits, model.run(ids, routing=False).logits)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("capture", ["layers.*.resid_post", "layers.*.attn.keys"])
def test_capturing_changes_no_bit_of_a_prompt_in_chunks(model, capture):
    ids = random_ids(512)  # long enough for oneDNN, whose AVX2 sums depend on the outputs beside
    plain = model.run(ids, chunk=200, routing=False)
    np.testing.assert_array_equal(model.run(ids, chunk=200, capture=capture).logits, plain.logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_capturing_while_decoding_changes_no_bit(model):
    ids = random_ids(23)
    arguments = {"max_new_tokens": 6, "temperature": 0, "logprobs": 3}
    plain = model.generate(ids, routing=False, **arguments)
    shown = model.generate(ids, capture=list(gl.hook_points(model)), **arguments)
    assert shown.ids.tolist() == plain.ids.tolist()
    assert shown.logprobs == plain.logprobs


@pytest.mark.parametrize("length", [11, 30])
@pytest.mark.parametrize("variant", VARIANTS)
def test_identity_edits_change_no_bit_at_any_point(model, length):
    ids = random_ids(length)
    plain = model.run(ids, logits="last").logits
    for name in gl.hook_points(model):
        np.testing.assert_array_equal(
            model.run(ids, edit={name: lambda x: None}).logits, plain, err_msg=name
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_point_is_shown_once_a_layer_and_pass_with_its_shape(model):
    ids = random_ids(20)
    calls: list[tuple[str, str, int, tuple[int, ...]]] = []

    def watch(x, at):
        calls.append((at.name, at.phase, at.step, x.shape))

    points = gl.hook_points(model)
    model.generate(ids, max_new_tokens=3, temperature=0, edit=dict.fromkeys(points, watch))
    config = model.config.text
    for step, phase, rows, length in ((0, "prefill", 20, 20), (1, "decode", 1, 21)):
        seen = [(name, shape) for name, p, s, shape in calls if (p, s) == (phase, step)]
        assert [name for name, _ in seen] == list(points)
        for name, shape in seen:
            tail = point_shape(points[name], config)
            want: tuple[int, ...] = (rows, *tail)
            if "N, T, S" in points[name].shape:
                want = (config.num_attention_heads, rows, length)
            elif points[name].shape.startswith("[S"):
                want = (length, *tail)
            elif name.startswith("logits"):
                want = (1, *tail)  # Only the last row of a prompt has logits.
            assert shape == want, (name, phase)


@pytest.mark.parametrize("variant", VARIANTS)
def test_zeroing_a_head_is_the_same_at_z_at_the_pattern_and_in_the_checkpoint(
    model, tiny, variant, tmp_path
):
    ids = random_ids(25)
    head, layer = 1, 2
    width = model.config.text.layers[layer].head_dim
    z = f"layers.{layer}.attn.z"
    at_z = model.run(ids, logits="all", capture=[z], edit={z: gl.edits.zero(heads=head)})
    at_pattern = model.run(
        ids,
        logits="all",
        capture=[z],
        edit={f"layers.{layer}.attn.pattern": gl.edits.zero(heads=head)},
    )
    np.testing.assert_array_equal(at_pattern[z][:, head], 0)
    # A materialised pattern is summed in another order than the streamed one: equal as two
    # float32 engines are (1e-4 in the logits), not to the bit.
    np.testing.assert_allclose(at_pattern[z], at_z[z], atol=2e-6)
    folder = tiny(variant)[1]
    tensors = load_file(folder / "model.safetensors")
    name = next(
        n for n in tensors if n.endswith(f"language_model.layers.{layer}.self_attn.o_proj.weight")
    )
    cut = tensors[name].copy()
    cut[:, head * width : (head + 1) * width] = 0
    tensors[name] = cut
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    without = gl.load(tmp_path, dtype="float32").run(ids, logits="all")
    np.testing.assert_allclose(at_z.logits, without.logits, atol=1e-5)
    np.testing.assert_allclose(at_pattern.logits, without.logits, atol=1e-4)
    assert np.abs(at_z.logits - model.run(ids, logits="all").logits).max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_output_of_a_layer_is_the_input_of_the_next(model):
    ids = random_ids(17)
    v = direction(model)
    layers = model.config.text.num_hidden_layers
    for layer in range(layers - 1):
        post = model.run(ids, edit={f"layers.{layer}.resid_post": gl.edits.add(v, positions=4)})
        pre = model.run(ids, edit={f"layers.{layer + 1}.resid_pre": gl.edits.add(v, positions=4)})
        np.testing.assert_array_equal(post.logits, pre.logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_edits_of_the_middle_of_a_layer_are_those_of_what_is_added_before(model):
    ids = random_ids(17)
    v = direction(model)
    at_sum = model.run(ids, edit={"layers.1.resid_mid": gl.edits.add(v)}).logits
    at_part = model.run(ids, edit={"layers.1.attn.post": gl.edits.add(v)}).logits
    np.testing.assert_allclose(at_sum, at_part, atol=1e-4)
    at_sum = model.run(ids, edit={"layers.1.resid_ffn": gl.edits.add(v)}).logits
    at_part = model.run(ids, edit={"layers.1.ffn.post": gl.edits.add(v)}).logits
    np.testing.assert_allclose(at_sum, at_part, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_add_up_to_the_output_of_attention(model):
    run = model.run(random_ids(15), capture=["layers.*.attn.result", "layers.*.attn.out"])
    for layer in range(model.config.text.num_hidden_layers):
        total = run[f"layers.{layer}.attn.result"].sum(1)
        np.testing.assert_allclose(total, run[f"layers.{layer}.attn.out"], atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_frozen_norm_divides_by_what_was_set(model):
    run = model.run(
        random_ids(9),
        capture=["layers.0.attn.norm", "layers.0.resid_pre", gl.before("layers.0.attn.norm.scale")],
        edit={"layers.0.attn.norm.scale": gl.edits.set(2.0)},
    )
    x = run["layers.0.resid_pre"]
    scale = np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(run[gl.before("layers.0.attn.norm.scale")], scale, rtol=1e-5)
    weight = model.weights["layers.0.input_layernorm.weight"]
    np.testing.assert_allclose(run["layers.0.attn.norm"], x / 2.0 * weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_steering_acts_on_the_prompt_and_on_every_generated_token(model):
    ids = random_ids(14)
    edit = {"layers.1.resid_post": gl.edits.add(direction(model))}
    arguments = {"max_new_tokens": 5, "temperature": 0, "logprobs": 1}
    out = model.generate(ids, edit=edit, **arguments)
    plain = model.generate(ids, **arguments)
    assert all(a != b for a, b in zip(out.logprobs, plain.logprobs, strict=True))
    whole = model.run([*ids, *out.ids.tolist()], logits="all", edit=edit).logits
    assert whole[len(ids) - 1 : -1].argmax(1).tolist() == out.ids.tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_captures_of_a_generation_cover_prompt_and_answer(model):
    ids = random_ids(14)
    names = ["layers.*.resid_post", "layers.1.attn.pattern", "logits"]
    out = model.generate(ids, max_new_tokens=4, temperature=0, capture=names)
    run = model.run([*ids, *out.ids.tolist()[:-1]], capture=names, logits="all")
    for layer in range(model.config.text.num_hidden_layers):
        name = f"layers.{layer}.resid_post"
        assert out.captured[name].shape == (len(ids) + 3, model.config.text.hidden_size)
        np.testing.assert_allclose(out.captured[name], run[name], atol=1e-3, rtol=1e-3)
    patterns = out.captured["layers.1.attn.pattern"]
    assert [pattern.shape[1:] for pattern in patterns] == [(14, 14), (1, 15), (1, 16), (1, 17)]
    np.testing.assert_allclose(patterns[3][:, 0], run["layers.1.attn.pattern"][:, -1], atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_a_batch_have_their_own_edits_and_equal_themselves_alone(model):
    rows = [random_ids(n, seed=n) for n in (9, 13, 6)]
    edits = [{"layers.0.resid_post": gl.edits.add(direction(model, i))} for i in (1, 2)]
    edits.insert(1, None)
    arguments = {"max_new_tokens": 4, "temperature": 0, "capture": "layers.*.resid_post"}
    together = model.generate(rows, edit=edits, **arguments)
    for ids, edit, out in zip(rows, edits, together, strict=True):
        alone = model.generate(ids, edit=edit, **arguments)
        assert out.ids.tolist() == alone.ids.tolist()
        for name in alone.captured:
            np.testing.assert_array_equal(out.captured[name], alone.captured[name])


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_and_a_warm_cache_show_the_same_values_at_the_same_names(model):
    ids = random_ids(33)
    names = [n for n in gl.hook_points(model) if not n.endswith((".keys", ".values"))]
    whole = model.run(ids, capture=names, logits="all")
    chunked = model.run(ids, capture=names, logits="all", chunk=7)
    cache = model.new_cache()
    model.run(ids[:20], cache=cache)
    warm = model.run(ids[20:], capture=names, logits="all", cache=cache)
    for name in names:
        if name.endswith("router.experts"):
            continue  # Ties may be broken differently; probs are compared.
        scale = max(1.0, float(np.abs(whole[name][np.isfinite(whole[name])]).max()))
        np.testing.assert_allclose(chunked[name], whole[name], atol=1e-4 * scale, err_msg=name)
        rows = (
            whole[name][:, 20:] if "N, T" in gl.hook_points(model)[name].shape else whole[name][20:]
        )
        np.testing.assert_allclose(warm[name], rows, atol=1e-4 * scale, err_msg=name)


def test_positions_choose_rows_and_follow_the_answer(e2b):
    ids = random_ids(12)
    last = e2b.config.text.num_hidden_layers - 1
    name = f"layers.{last}.resid_post"
    everything = e2b.generate(ids, max_new_tokens=4, temperature=0, capture=name).captured
    for positions, want in (
        (-1, [11]),
        ([0, 5], [0, 5]),
        (slice(2, 5), [2, 3, 4]),
        (slice(10, None), [10, 11, 12, 13, 14]),
        ("generated", [12, 13, 14]),
        ("last", [11, 12, 13, 14]),
        ("prompt", list(range(12))),
        (np.arange(12) % 5 == 0, [0, 5, 10]),
    ):
        capture = {name: gl.at(positions)}
        out = e2b.generate(ids, max_new_tokens=4, temperature=0, capture=capture)
        assert out.captured.positions_of(name).tolist() == want
        # Fewer rows take other kernels, whose sums round otherwise.
        np.testing.assert_allclose(out.captured[name], everything[name][want], atol=1e-4)


def test_reductions_keep_means_norms_and_the_last_row(e2b):
    ids = random_ids(12)
    whole = e2b.run(ids, capture=["layers.0.resid_post", "layers.0.attn.z"])
    run = e2b.run(
        ids,
        capture={
            "layers.0.resid_post": gl.at(reduce="mean"),
            "layers.0.attn.z": gl.at(reduce="norm"),
        },
    )
    np.testing.assert_allclose(
        run["layers.0.resid_post"], whole["layers.0.resid_post"].mean(0), atol=1e-6
    )
    np.testing.assert_allclose(
        run["layers.0.attn.z"], np.linalg.norm(whole["layers.0.attn.z"], axis=-1), rtol=1e-5
    )
    last = e2b.run(ids, capture={"layers.0.resid_post": gl.at(slice(0, 4), reduce="last")})
    np.testing.assert_array_equal(last["layers.0.resid_post"], whole["layers.0.resid_post"][3])


def test_a_capture_holds_the_edited_value_and_before_the_original(e2b):
    ids = random_ids(8)
    name = "layers.2.mlp.out"
    plain = e2b.run(ids, capture=name)
    run = e2b.run(ids, capture=[name, gl.before(name)], edit={name: gl.edits.scale(2.0)})
    np.testing.assert_array_equal(run[gl.before(name)], plain[name])
    np.testing.assert_array_equal(run[name], 2 * plain[name])


def test_edits_apply_in_the_order_written(e2b):
    ids = random_ids(8)
    name = "layers.2.mlp.out"
    plain = e2b.run(ids, capture=name)[name]
    run = e2b.run(
        ids,
        capture=name,
        edit=[{name: [gl.edits.add(1.0), gl.edits.scale(3.0)]}, {name: lambda x: x - 1}],
    )
    np.testing.assert_allclose(run[name], (plain + 1) * 3 - 1, rtol=1e-5, atol=1e-5)


def test_names_of_transformers_and_transformer_lens_are_aliases(e2b):
    ids = random_ids(8)
    run = e2b.run(
        ids, capture=["blocks.*.hook_resid_post", "model.language_model.layers.1.mlp.gate_proj"]
    )
    assert run["layers.1.mlp.gate"].shape == (8, 53)
    np.testing.assert_array_equal(run["blocks.3.hook_resid_post"], run["layers.3.resid_post"])
    edited = e2b.run(ids, edit={"blocks.1.mlp.hook_post": gl.edits.zero()})
    want = e2b.run(ids, edit={"layers.1.mlp.hidden": gl.edits.zero()})
    np.testing.assert_array_equal(edited.logits, want.logits)


def test_an_exception_of_an_edit_function_reaches_the_caller_and_the_cache_is_as_before(e2b):
    ids = random_ids(10)
    cache = e2b.new_cache()
    e2b.run(ids, cache=cache)
    before = cache.layers[0].keys

    def fail(x):
        raise LookupError("no such concept")

    with pytest.raises(LookupError, match="no such concept"):
        e2b.run(ids, cache=cache, edit={"layers.3.mlp.out": fail})
    assert cache.length == 10
    np.testing.assert_array_equal(cache.layers[0].keys, before)
    with pytest.raises(LookupError, match="no such concept"):
        e2b.generate(ids, cache=cache, max_new_tokens=3, edit={"layers.3.mlp.out": fail})
    assert cache.length == 10
    assert e2b.run(ids).logits.shape == (1, e2b.config.text.vocab_size)


def test_a_model_called_inside_its_own_edit_function_is_an_error(e2b):
    with pytest.raises(RuntimeError, match="edit function"):
        e2b.run([2, 3], edit={"embed": lambda x: e2b.run([2, 3]).logits})
    assert np.isfinite(e2b.run([2, 3]).logits).all()


def test_arrays_kept_from_an_edit_function_stay_valid(e2b):
    kept = []
    e2b.run(random_ids(9), edit={"layers.*.resid_post": lambda x: kept.append(x)})
    run = e2b.run(random_ids(9), capture="layers.*.resid_post")
    for layer, array in enumerate(kept):
        np.testing.assert_array_equal(array, run[f"layers.{layer}.resid_post"])


@pytest.mark.parametrize(
    ("edit", "error", "match"),
    [
        ({"layers.0.resid_pots": gl.edits.zero()}, KeyError, "resid_post"),
        ({"layers.0.resid_post": np.zeros(3)}, ValueError, r"\[3\].*\[44\]"),
        ({"layers.0.resid_post": lambda x: x[:, :2]}, ValueError, r"\[8, 2\].*\[8, 44\]"),
        ({"layers.0.mlp.out": gl.edits.zero(heads=0)}, ValueError, "no heads"),
        ({"layers.0.attn.z": gl.edits.zero(heads=9)}, ValueError, "got 9"),
        ({"layers.0.resid_post": gl.edits.add(np.ones(44), positions=-99)}, ValueError, "-99"),
        ({"layers.0.resid_post": "zero"}, TypeError, "expected a function"),
        ([1, 2], TypeError, "expected a mapping"),
        ({"layers.0.attn.pattern": lambda x: x + 0.1}, ValueError, "expected 0 outside"),
        ({"layers.0.resid_post": gl.edits.ablate_experts([1])}, ValueError, "router or experts"),
        ({"layers.0.attn.scores": np.zeros((2, 8))}, ValueError, "a number, or a function"),
    ],
)  # fmt: skip
def test_wrong_edits_say_what_was_got_and_expected(e2b, edit, error, match):
    with pytest.raises(error, match=match):
        e2b.run(random_ids(8), edit=edit)


def test_values_that_are_not_finite_pass_unless_asked(e2b):
    edit = {"layers.1.mlp.out": gl.edits.set(np.nan, positions=2)}
    assert np.isnan(e2b.run(random_ids(5), logits="all", edit=edit).logits[2:]).any()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.out.*position 2"):
        e2b.run(random_ids(5), edit=edit, check_finite=True)


def test_captures_that_will_not_fit_are_refused_with_figures(e2b, monkeypatch):
    monkeypatch.setattr("gemloupe._core.available_memory", lambda: 10_000)
    with pytest.raises(MemoryError, match=r"KiB.*layers\.\d\.attn\.pattern"):
        e2b.run(random_ids(60), capture="layers.*.attn.pattern")


def test_sharing_layers_name_the_layer_that_they_read(e2b):
    with pytest.raises(KeyError, match="reads those of layer"):
        e2b.run([2, 3], capture="layers.8.attn.k")
    run = e2b.run([2, 3], capture="layers.*.attn.k")
    assert "layers.8.attn.k" in run.skipped


def test_masked_edges_carry_no_attention(e2b):
    ids = random_ids(10)
    name = "layers.3.attn.pattern"
    edit = {"layers.3.attn.scores": gl.edits.mask_edges([7, 8], [2, 3], heads=[0, 2])}
    pattern = e2b.run(ids, capture=name, edit=edit)[name]
    assert (pattern[np.ix_([0, 2], [7, 8], [2, 3])] == 0).all()
    assert (pattern[1, 7, 2:4] > 0).all()
    np.testing.assert_allclose(pattern.sum(-1), 1, atol=1e-5)


def test_patching_every_layer_input_gives_the_other_run(e2b):
    clean, corrupted = random_ids(11), random_ids(11, seed=9)
    names = ["embed", "per_layer_inputs.token"]
    source = e2b.run(clean, capture=names)
    patched = e2b.run(corrupted, edit={name: gl.edits.patch(source) for name in names})
    np.testing.assert_allclose(patched.logits, source.logits, atol=1e-5)


def test_a_repeated_run_equals_a_whole_one(tiny):
    for variant in VARIANTS:
        model = gl.load(tiny(variant)[1], dtype="float32")
        ids = random_ids(29)
        base = model.run(ids, keep=True, capture="layers.0.mlp.out")
        for layer in range(model.config.text.num_hidden_layers):
            for position in (0, 13, 28):
                edit = {f"layers.{layer}.mlp.out": gl.edits.add(2.0, positions=position)}
                capture = f"layers.{layer}.resid_post"
                whole = model.run(ids, edit=edit, capture={capture: gl.at(-1)})
                again = model.run(base, edit=edit, capture={capture: gl.at(-1)})
                np.testing.assert_allclose(again.logits, whole.logits, atol=2e-5)
                np.testing.assert_allclose(again[capture], whole[capture], atol=1e-4)
                assert again.cache.length == whole.cache.length
        np.testing.assert_allclose(model.run(base).logits, base.logits, atol=2e-5)


def test_a_repeated_run_of_an_invariant_model_has_the_same_bits(tiny):
    model = gl.load(tiny("12b")[1], dtype="float32", invariant=True)
    base = model.run(random_ids(29), keep=True)
    edit = {"layers.5.mlp.out": gl.edits.add(2.0, positions=13)}
    whole = model.run(random_ids(29), edit=edit)
    np.testing.assert_array_equal(model.run(base, edit=edit).logits, whole.logits)


def test_a_run_that_kept_nothing_can_not_be_repeated(e2b):
    with pytest.raises(ValueError, match="keep=True"):
        e2b.run(e2b.run([2, 3]), edit={"embed": gl.edits.zero()})


def test_projecting_a_direction_out_leaves_nothing_along_it(e2b):
    v = direction(e2b)
    name = "layers.1.resid_post"
    run = e2b.run(random_ids(7), capture=name, edit={name: gl.edits.project_out(v)})
    assert np.abs(run[name] @ v).max() < 1e-3
    with pytest.raises(ValueError, match="zero"):
        gl.edits.project_out(np.zeros(44))


def test_mean_ablation_takes_the_mean_that_was_captured(e2b):
    name = "layers.1.mlp.out"
    stats = e2b.run(random_ids(20), capture={name: gl.at(reduce="mean")}).captured
    run = e2b.run(random_ids(7), capture=name, edit={name: gl.edits.mean(stats)})
    np.testing.assert_array_equal(run[name], np.broadcast_to(stats[name], run[name].shape))


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_experts_without_output_keep_their_selection(tiny, mode):
    model = gl.load(tiny("26b")[1], dtype="float32")
    ids = random_ids(20)
    plain = model.run(ids, capture=["layers.2.experts.each"])
    means = np.full(
        (model.config.text.num_experts, model.config.text.hidden_size), 0.25, np.float32
    )
    edit = {"layers.2.router.logits": gl.edits.ablate_experts([1, 3], mode, means=means)}
    run = model.run(ids, capture=["layers.2.experts.each"], edit=edit)
    np.testing.assert_array_equal(run.routing.experts[2], plain.routing.experts[2])
    chosen = np.isin(run.routing.experts[2], [1, 3])
    want = np.where(
        chosen[..., None], 0.0 if mode == "zero" else 0.25, plain["layers.2.experts.each"]
    )
    np.testing.assert_array_equal(run["layers.2.experts.each"], want)


def test_experts_are_replaced_by_the_mean_outputs_of_a_trace(tiny):
    model = gl.load(tiny("26b")[1], dtype="float32")
    name, ids = "layers.2.experts.each", random_ids(20)
    run = model.run(ids, capture="layers.*.experts.each")
    trace = run.routing.with_outputs(run.captured)
    expert = int(trace.experts[2, 0, 0])
    edit = {"layers.2.router.logits": gl.edits.ablate_experts([expert], "mean", means=trace)}
    edited = model.run(ids, capture=name, edit=edit)
    np.testing.assert_array_equal(edited.routing.experts[2], trace.experts[2])
    chosen = trace.experts[2] == expert
    want = np.where(chosen[..., None], run[name][chosen].mean(0), run[name])
    np.testing.assert_allclose(edited[name], want, rtol=1e-5, atol=1e-6)
    assert np.abs(edited.logits - run.logits).max() > 1e-5


def test_mean_outputs_of_experts_that_no_token_chose_are_refused(tiny):
    model = gl.load(tiny("26b")[1], dtype="float32")
    run = model.run([2], capture="layers.2.experts.each")
    trace = run.routing.with_outputs(run.captured)
    chosen = trace.experts[2, 0].tolist()
    never = next(expert for expert in range(trace.num_experts) if expert not in chosen)

    def ablated(ids, layer=2, means=trace):
        edit = gl.edits.ablate_experts(ids, "mean", means=means)
        return model.run([2], edit={f"layers.{layer}.router.logits": edit})

    assert np.isfinite(ablated(chosen[:1]).logits).all()
    with pytest.raises(ValueError, match=rf"layer 2 are NaN for experts \[{never}\].*no token"):
        ablated([chosen[0], never])
    with pytest.raises(ValueError, match=r"no layer 3; it has layers \[2\]"):
        ablated(chosen[:1], layer=3)
    with pytest.raises(ValueError, match="with_outputs"):
        ablated(chosen[:1], means=run.routing)


def test_replayed_routing_gives_the_same_logits(tiny):
    model = gl.load(tiny("26b")[1], dtype="float32")
    ids = random_ids(20)
    run = model.run(
        ids, logits="all", edit={"layers.1.router.logits": gl.edits.ablate_experts([0])}
    )
    again = model.run(ids, logits="all", edit=run.routing.replay())
    np.testing.assert_array_equal(again.logits, run.logits)


def test_edits_are_noted_in_the_cache(e2b):
    cache = e2b.new_cache()
    e2b.run([2, 3, 4], cache=cache, edit={"layers.1.mlp.out": gl.edits.zero()})
    assert [(note.kind, note.detail) for note in cache.provenance] == [
        ("edit", "layers.1.mlp.out: zero")
    ]
    out = e2b.generate([2, 3, 4], max_new_tokens=2, edit={"layers.1.mlp.out": gl.edits.zero()})
    assert [note.detail for note in out.cache.provenance] == ["layers.1.mlp.out: zero"]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_dtypes_show_the_same_values_whatever_the_pass(tiny, variant, dtype):
    # Products of many rows may round activations to bfloat16 where the CPU multiplies bfloat16.
    activations = "float32" if dtype == "bfloat16" else "auto"
    model = gl.load(tiny(variant)[1], dtype=dtype, activations=activations)
    ids = random_ids(33)
    names = [n for n in gl.hook_points(model) if not n.endswith((".keys", ".values", ".experts"))]
    whole = model.run(ids, capture=names, logits="all")
    np.testing.assert_array_equal(whole.logits, model.run(ids, logits="all").logits)
    chunked = model.run(ids, capture=names, logits="all", chunk=7)
    for name in names:
        scale = max(1.0, float(np.abs(whole[name][np.isfinite(whole[name])]).max()))
        np.testing.assert_allclose(chunked[name], whole[name], atol=1e-4 * scale, err_msg=name)
    edit = {"layers.1.attn.z": lambda x: None, "layers.2.mlp.hidden": gl.edits.scale(1.0)}
    np.testing.assert_array_equal(model.run(ids, edit=edit).logits, model.run(ids).logits)
