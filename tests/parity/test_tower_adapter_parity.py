"""Adapters of vision and audio parts: PEFT's soft tokens and logits, whatever is around them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import media_reference
import numpy as np
import pytest
import torch
from media_reference import picture, sound
from parity_checks import assert_logits_close

import gemloupe as gl
import made_adapters
from gemloupe import _core
from gemloupe.adapters.effective import EffectiveWeights, rounded
from tiny_models import MEDIA_IDS, VOCAB_SIZE, save_tiny_tokenizer

# Clipped linears and sound, standardised features, neither encoder.
KINDS = ("e2b", "26b", "12b")
# Every linear of the towers that PEFT can target.
TOWERS = (
    r".*(vision|audio).*(\.linear|input_proj(_linear)?|output_proj|relative_k_proj|"
    r"embedding_projection|_dense)"
)
EVERYTHING = TOWERS + r"|.*language_model.*(self_attn|mlp)\.\w+_proj"
PATTERNS = {
    "rank_pattern": {r".*vision_tower.*q_proj\.linear": 5, "embedding_projection": 2},
    "alpha_pattern": {r".*self_attn\.post\.linear": 7, r".*layers.1.*": 9},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "rsLoRA, patterns": {"use_rslora": True, "lora_alpha": 4, **PATTERNS},
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "bias": "lora_only"},
    "whole matrices": {
        "modules_to_save": ["embedding_projection", "output_proj", "patch_dense", "up_proj.linear"],
        "target_modules": r".*(vision|audio).*\w_proj\.linear|.*language_model.*q_proj",
    },
}
PICTURE, SOUND = picture(40, 30), sound(7000)
BUDGET = 70


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable) -> Callable[[str], tuple[Any, Path]]:
    def get(kind: str, **options: Any) -> tuple[Any, Path]:
        table = "mm_posemb_size" if kind == "12b" else "position_embedding_size"
        reference, folder = tiny(
            kind, towers="tiny", media_ids=True, vision={table: 64}, seed=2, **options
        )
        save_tiny_tokenizer(folder)
        return reference, folder

    return get


@pytest.fixture(scope="module")
def made(checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Returns `get(kind, seed, **config) -> (PEFT model, folder)`, each made once."""
    known: dict[str, tuple[Any, Path]] = {}

    def get(kind: str, seed: int = 3, dtype: str = "float32", **config: Any) -> tuple[Any, Path]:
        config = {"target_modules": EVERYTHING, "r": 3, **config}
        key = repr((kind, seed, dtype, config))
        if key not in known:
            peft = made_adapters.make(checkpoint(kind, dtype=dtype)[0], seed=seed, **config)
            folder = tmp_path_factory.mktemp(f"tower-{kind}") / "adapter"
            known[key] = (peft.base_model.model, made_adapters.save(peft, folder))
        return known[key]

    return get


def clips(kind: str) -> list[np.ndarray]:
    return [] if kind == "26b" else [SOUND]


def prompt(lengths: Sequence[int]) -> list[int]:
    """Ids with an image, and a sound where there are two lengths."""
    words = np.random.default_rng(5).integers(60, VOCAB_SIZE, 12).tolist()
    ids = [2, *words[:4]]
    for kind, (begin, end), length in zip(
        ("image", "audio"), (("boi", "eoi"), ("boa", "eoa")), lengths, strict=False
    ):
        ids += [MEDIA_IDS[f"{begin}_token_id"], *[MEDIA_IDS[f"{kind}_token_id"]] * length]
        ids += [MEDIA_IDS[f"{end}_token_id"], *words[4:7]]
    return ids + words[7:]


def ask(model: gl.Model, kind: str, **arguments: Any) -> Any:
    """A run on the picture and, where the model hears, the sound."""
    sounds = clips(kind)
    lengths = [len(model.encode_image(PICTURE, BUDGET))]
    lengths += [len(model.encode_audio(clip)) for clip in sounds]
    media = {"images": PICTURE, "max_soft_tokens": BUDGET, "logits": "all"}
    return model.run(prompt(lengths), **media, **({"audio": sounds} if sounds else {}), **arguments)


def close(ours: Any, theirs: np.ndarray) -> None:
    scale = max(1.0, float(np.abs(theirs).max()))
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_of_the_towers_equals_peft(
    checkpoint: Callable, made: Callable, kind: str, config: dict[str, Any]
) -> None:
    reference, source = made(kind, **config)
    model = gl.load(checkpoint(kind)[1], dtype="float32")
    plain = ask(model, kind)
    adapter = model.load_adapter(source, name="a")

    tokens = model.encode_image(PICTURE, BUDGET, adapter="a")
    run = ask(model, kind, adapter="a")

    expected = media_reference.image_tokens(reference, [PICTURE], BUDGET)[0]
    close(tokens, expected)
    assert np.abs(expected - model.encode_image(PICTURE, BUDGET)).max() > 0.05
    if clips(kind):
        expected = media_reference.audio_tokens(reference, [SOUND])[0]
        close(model.encode_audio(SOUND, adapter="a"), expected)
        assert np.abs(expected - model.encode_audio(SOUND)).max() > 0.05
    want = media_reference.logits(reference, run.prompt.ids, [PICTURE], clips(kind))
    assert_logits_close(run.logits, want)
    assert np.abs(want - plain.logits).max() > 0.05
    assert np.array_equal(ask(model, kind).logits, plain.logits)
    report = adapter.report()
    assert not report.ignored
    towers = {label for label in model.adapters.modules if label.startswith(("vision", "audio"))}
    if "modules_to_save" not in config:
        assert towers <= set(report.matched)
    for change in report.changes:
        assert change.norm > 0 and (change.kind == "bias" or change.relative > 0.01)


def test_bfloat16_weights_give_what_the_same_weights_give_in_float32(
    checkpoint: Callable, made: Callable
) -> None:
    reference, source = made("e2b", dtype="bfloat16")
    model = gl.load(checkpoint("e2b", dtype="bfloat16")[1])
    assert model.load_adapter(source, name="a").dtype == "float32"

    image, heard = (
        media_reference.image_tokens(reference, [PICTURE], BUDGET)[0],
        (media_reference.audio_tokens(reference, [SOUND])[0]),
    )

    exact = gl.load(checkpoint("e2b", dtype="bfloat16")[1], dtype="float32")
    exact.load_adapter(source, name="a")
    close(exact.encode_image(PICTURE, BUDGET, adapter="a"), image)
    close(exact.encode_audio(SOUND, adapter="a"), heard)
    # Long products may round activations to bfloat16, too: eight bits, some dozen products deep.
    for ours, theirs in (
        (model.encode_image(PICTURE, BUDGET, adapter="a"), image),
        (model.encode_audio(SOUND, adapter="a"), heard),
    ):
        assert np.abs(np.asarray(ours) - theirs).max() < 0.06 * np.abs(theirs).max()


def test_hooks_in_towers_see_what_adapters_make(checkpoint: Callable, made: Callable) -> None:
    reference, source = made("e2b")
    model = gl.load(checkpoint("e2b")[1], dtype="float32")
    model.load_adapter(source, name="a")
    points = ["vision.layers.1.mlp.up", "audio.layers.0.attn.z", "audio.layers.0.conv.out"]

    run = ask(model, "e2b", adapter="a", capture=points)

    seen: dict[str, np.ndarray] = {}
    parts = reference.model.vision_tower.encoder.layers[1], reference.model.audio_tower.layers[0]
    modules = [parts[0].mlp.up_proj, parts[1].self_attn.post, parts[1].lconv1d.linear_end]
    for name, module in zip(points, modules, strict=True):

        def hook(_m: Any, inputs: Any, out: Any, name: str = name) -> None:
            seen[name] = (inputs[0] if name.endswith(".z") else out)[0].numpy().copy()

        module.register_forward_hook(hook)
    media_reference.image_tokens(reference, [PICTURE], BUDGET)
    media_reference.audio_tokens(reference, [SOUND])
    for name in points:
        got = run[name].reshape(len(run[name]), -1)
        close(got, seen[name][: len(got)].reshape(len(got), -1))
    assert np.array_equal(run.logits, ask(model, "e2b", adapter="a").logits)


def zeroed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t * 0 if "lora_B" in name else t for name, t in tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_b_of_zeros_changes_no_bit(
    checkpoint: Callable, made: Callable, kind: str, tmp_path: Path
) -> None:
    source = made_adapters.rewrite(made(kind)[1], tmp_path / "zero", zeroed)
    model = gl.load(checkpoint(kind)[1], dtype="float32")
    model.load_adapter(source)
    assert np.array_equal(ask(model, kind, adapter="zero").logits, ask(model, kind).logits)


@pytest.fixture
def two(checkpoint: Callable, made: Callable) -> gl.Model:
    """A model with the adapters "a" and "b"."""
    model = gl.load(checkpoint("e2b")[1], dtype="float32")
    model.load_adapter(made("e2b")[1], name="a")
    model.load_adapter(made("e2b", seed=4, use_dora=True)[1], name="b", scale=0.5)
    return model


def test_each_row_of_a_batch_is_encoded_under_its_own_adapters(two: gl.Model) -> None:
    ids = prompt([len(two.encode_image(PICTURE, BUDGET)), len(two.encode_audio(SOUND))])
    media = {"images": [PICTURE], "audio": [SOUND], "max_soft_tokens": BUDGET}
    mixes: list[Any] = ["a", {}, {"a": 0.5, "b": -1.5}, "b"]

    rows = two.run(
        [ids] * 4, **{k: [v] * 4 if k != "max_soft_tokens" else v for k, v in media.items()},
        adapter=mixes,
    )  # fmt: skip

    for row, mix in zip(rows, mixes, strict=True):
        assert np.array_equal(row.logits, two.run(ids, **media, adapter=mix).logits)
        image, heard = row.media
        assert np.array_equal(image.soft_tokens, two.encode_image(PICTURE, BUDGET, adapter=mix))
        assert np.array_equal(heard.soft_tokens, two.encode_audio(SOUND, adapter=mix))
    outs = two.generate(
        [ids] * 2, images=[[PICTURE]] * 2, audio=[[SOUND]] * 2, max_soft_tokens=BUDGET,
        adapter=["a", "b"], temperature=0, max_new_tokens=3, logprobs=1,
    )  # fmt: skip
    for out, name in zip(outs, "ab", strict=True):
        alone = two.generate(
            ids, **media, adapter=name, temperature=0, max_new_tokens=3, logprobs=1
        )
        assert out.ids.tolist() == alone.ids.tolist()
        assert out.logprobs[0][0] == pytest.approx(alone.logprobs[0][0], abs=1e-4)


def test_encoding_follows_the_adapters_of_its_context(two: gl.Model) -> None:
    plain, heard = two.encode_image(PICTURE, BUDGET), two.encode_audio(SOUND)
    two.set_adapter("a")
    under_a = two.encode_image(PICTURE, BUDGET)
    assert np.array_equal(under_a, two.encode_image(PICTURE, BUDGET, adapter="a"))
    assert not np.array_equal(under_a, plain)
    assert np.array_equal(two.encode_video([PICTURE]), two.encode_video([PICTURE], adapter="a"))
    stream = two.audio_stream()
    with two.disable_adapter():
        assert np.array_equal(two.encode_image(PICTURE, BUDGET), plain)
        assert np.array_equal(two.encode_audio(SOUND), heard)
        parts = [stream.push(SOUND[:3000]), stream.push(SOUND[3000:]), stream.finish()]
    close(np.concatenate(parts), np.asarray(two.encode_audio(SOUND, adapter="a")))
    two.set_adapter(None)


def test_soft_tokens_stay_what_they_are_under_other_adapters(two: gl.Model) -> None:
    tokens = two.encode_image(PICTURE, BUDGET, adapter="a")
    ids = prompt([len(tokens)])
    given = two.run(ids, images=tokens, adapter="b", logits="all")
    array = two.run(ids, images=np.array(tokens), adapter="b", logits="all")
    assert np.array_equal(given.logits, array.logits)
    watched = two.run(
        ids, images=tokens, adapter="b", logits="all", capture="vision.layers.0.resid_post"
    )
    assert np.array_equal(watched.logits, given.logits)
    # A prompt with the picture itself is encoded anew under each call's adapters.
    prepared = two.prepare(ids, images=PICTURE, max_soft_tokens=BUDGET)
    for name in ("b", "a", "b"):
        run = two.run(prepared, adapter=name)
        expected = two.encode_image(PICTURE, BUDGET, adapter=name)
        assert np.array_equal(run.media[0].soft_tokens, expected)


def test_a_merged_adapter_stays_beside_towers_and_leaves_no_bit(two: gl.Model) -> None:
    plain, before = two.encode_image(PICTURE, BUDGET), ask(two, "e2b")
    side = ask(two, "e2b", adapter="a")
    both = two.encode_image(PICTURE, BUDGET, adapter={"a": 1, "b": 1})
    two.merge_adapter("a")
    merged = ask(two, "e2b")
    assert np.array_equal(merged.media[0].soft_tokens, side.media[0].soft_tokens)
    assert_logits_close(merged.logits, side.logits)
    assert np.array_equal(two.encode_image(PICTURE, BUDGET, adapter="b"), both)
    two.unmerge_adapter()
    assert np.array_equal(two.encode_image(PICTURE, BUDGET), plain)
    assert np.array_equal(ask(two, "e2b").logits, before.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_converting_bakes_towers_in(
    checkpoint: Callable, made: Callable, kind: str, tmp_path: Path
) -> None:
    targets = TOWERS + "|.*language_model.*q_proj"
    config = {"bias": "lora_only", "use_dora": True, "target_modules": targets}
    folder, source = checkpoint(kind)[1], made(kind, **config)[1]
    side = gl.load(folder, dtype="float32")
    side.load_adapter(source, name="a")
    baked = gl.load(gl.convert(folder, tmp_path / "baked", "float32", adapter=source))
    close(
        baked.encode_image(PICTURE, BUDGET),
        np.asarray(side.encode_image(PICTURE, BUDGET, adapter="a")),
    )
    if clips(kind):
        close(baked.encode_audio(SOUND), np.asarray(side.encode_audio(SOUND, adapter="a")))
    assert_logits_close(ask(baked, kind).logits, ask(side, kind, adapter="a").logits)


def test_baked_tensors_of_towers_keep_their_type(
    checkpoint: Callable, made: Callable, tmp_path: Path
) -> None:
    folder, source = checkpoint("e2b", dtype="bfloat16")[1], made("e2b", dtype="bfloat16")[1]
    model = gl.load(folder)
    model.load_adapter(source, name="a")
    effective = EffectiveWeights(model.adapters.selected("a"))
    baked = gl.load(gl.convert(folder, tmp_path / "baked", "int8", adapter=source))
    for module in model.adapters.towers.modules.values():
        own = model.adapters.base.rows(module.weight, range(module.outputs))
        want = rounded(effective.rows(module, own, 0), "bfloat16")
        assert baked.adapters.base.dtype(module.weight) == "bfloat16"
        got = baked.adapters.base.rows(module.weight, range(module.outputs))
        assert np.array_equal(got, want)


BROKEN = {
    "not finite": (lambda t: t * np.nan, {}, "values that are not finite"),
    "of another rank": (lambda t: t[:, :1], {}, r"shape is \[\d+, 1\]; expected \[\d+, 3\]"),
    "of another size": (lambda t: t[:-1], {}, r"shape is \[\d+, 3\]; expected"),
    "without DoRA's magnitudes": (lambda t: t, {"use_dora": True}, "has no lora_magnitude_vector"),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_damaged_adapter_never_changes_a_tower(
    checkpoint: Callable, made: Callable, tmp_path: Path, broken: tuple[Any, Any, str]
) -> None:
    damage, config, text = broken
    end = "q_proj.linear.lora_B.weight"

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: damage(t) if n.endswith(end) else t for n, t in tensors.items()}

    source = made_adapters.rewrite(made("e2b")[1], tmp_path / "broken", change, config)
    model = gl.load(checkpoint("e2b")[1], dtype="float32")
    before = ask(model, "e2b").logits
    with pytest.raises(ValueError, match=text):
        model.load_adapter(source)
    assert len(model.adapters) == 0
    assert np.array_equal(ask(model, "e2b").logits, before)


def test_convolutions_and_norms_of_towers_are_refused_by_name(
    checkpoint: Callable, made: Callable
) -> None:
    model = gl.load(checkpoint("e2b")[1], dtype="float32")
    with pytest.raises(ValueError, match=r"layer0\.conv\.lora_A.*changes a convolution"):
        model.load_adapter(made("e2b", target_modules=r".*layer0\.conv|.*q_proj\.linear")[1])
    unified = gl.load(checkpoint("12b")[1], dtype="float32")
    with pytest.raises(ValueError, match=r"patch_ln1\.bias': holds other values than the model's"):
        unified.load_adapter(made("12b", bias="all")[1])


def test_a_whole_tower_saved_beside_is_read_where_only_matrices_differ(
    checkpoint: Callable, made: Callable, tmp_path: Path
) -> None:
    reference, folder = checkpoint("e2b")
    state = {
        f"base_model.model.{name}": tensor.clone()
        for name, tensor in reference.state_dict().items()
        if name.startswith(("model.vision_tower.", "model.embed_vision."))
    }
    for name in state:
        if name.endswith("o_proj.linear.weight"):
            state[name] *= 1.5
    state["base_model.model.model.vision_tower.encoder.layers.0.mlp.up_proj.input_max"] *= 1.0
    source = made_adapters.rewrite(made("e2b")[1], tmp_path / "whole", lambda _t: state)
    model = gl.load(folder, dtype="float32")
    report = model.load_adapter(source).report()
    changed = {c.module: c.relative for c in report.changes if c.norm > 0}
    assert changed == pytest.approx(
        {f"vision.layers.{i}.attn.o_proj": 0.5 for i in (0, 1)}, rel=1e-5
    )
    state["base_model.model.model.vision_tower.encoder.layers.0.mlp.up_proj.input_max"] *= 2
    worse = made_adapters.rewrite(made("e2b")[1], tmp_path / "worse", lambda _t: state)
    with pytest.raises(ValueError, match=r"input_max': holds other values than the model's"):
        model.load_adapter(worse, name="worse")


def test_what_an_adapter_adds_in_towers_is_captured(two: gl.Model) -> None:
    names = [
        "lora.a.vision.layers.1.attn.o_proj",
        "lora.a.vision.input_proj",
        "lora.a.audio.layers.0.attn.post",
        "lora.a.audio.projection",
        "lora.a.layers.0.attn.q_proj",
    ]
    points = ["vision.layers.1.attn.out", "audio.soft_tokens"]
    plain = ask(two, "e2b", adapter="a")
    run = ask(two, "e2b", adapter="a", capture=[*names, *points])
    assert np.array_equal(run.logits, plain.logits)
    assert all(np.abs(run[name]).max() > 0 for name in names)
    assert run[names[0]].shape == run[points[0]].shape
    # The last product of all: without what the adapter adds to it, the rest stays.
    rest = np.asarray(two.encode_audio(SOUND, adapter="a")) - run[names[3]]
    close(rest + run[names[3]], run[points[1]])
    with pytest.raises(KeyError, match="is no change of an adapter"):
        ask(two, "e2b", capture=names[:1])
    with pytest.raises(KeyError, match="is no change of an adapter"):
        ask(two, "e2b", adapter="a", capture="lora.a.audio.layers.0.attn.relative_k_proj")


def test_large_images_are_the_same_in_parts_and_whole(
    checkpoint: Callable, made: Callable, tiny: Callable
) -> None:
    # More patches than a feed-forward computes at once, unless hooks look.
    folder = tiny("e2b", towers="tiny", media_ids=True, vision={"position_embedding_size": 256})[1]
    model = gl.load(folder, dtype="float32", invariant=True)
    model.load_adapter(made("e2b")[1], name="a")
    tokens = model.encode_image(picture(200, 150), 560, adapter="a")
    ids = prompt([len(tokens)])
    media = {"images": picture(200, 150), "max_soft_tokens": 560, "adapter": "a", "logits": None}
    run = model.run(ids, **media, capture=["vision.soft_tokens", "vision.patches"])
    assert len(run["vision.patches"]) > 2560
    assert np.array_equal(tokens, run["vision.soft_tokens"])


def test_adapters_come_and_go_while_others_encode(two: gl.Model, made: Callable) -> None:
    source = made("e2b", seed=5)[1]
    want = {name: two.encode_image(PICTURE, BUDGET, adapter=name) for name in ("a", "b")}
    heard = {name: two.encode_audio(SOUND, adapter=name) for name in ("a", "b")}
    wrong: list[str] = []

    def encode(name: str) -> None:
        for _ in range(6):
            if not np.array_equal(two.encode_image(PICTURE, BUDGET, adapter=name), want[name]):
                wrong.append(f"image under {name}")
            if not np.array_equal(two.encode_audio(SOUND, adapter=name), heard[name]):
                wrong.append(f"sound under {name}")

    threads = [threading.Thread(target=encode, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        two.load_adapter(source, name="c")
        two.encode_image(PICTURE, BUDGET, adapter={"c": 1, "a": 1})
        two.delete_adapter("c")
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_engine_refuses_changes_of_another_size(two: gl.Model) -> None:
    core = _core.Adapter(two.core, "float32")
    core.add(
        0, "vision.attn.q_proj", np.zeros((2, 25), np.float32), np.zeros((24, 2), np.float32), 1
    )
    core.shift(-1, "audio.output_proj", np.zeros(7, np.float32))
    image = two.media_reader.read("image", PICTURE, "image", {"max_soft_tokens": BUDGET}).source
    vision, patch = two.vision, 4
    columns = image.pixels.shape[1] // patch
    with pytest.raises(
        ValueError, match=r"vision\.layers\.0\.attn\.q_proj has 25 inputs of A, exp"
    ):
        vision.core.encode(image.patches(patch), columns, adapters=[(core, 1.0)])
    features = two.audio_tower.ears.features(two.audio_tower.ears.read(SOUND))
    with pytest.raises(ValueError, match=r"audio\.output_proj has 7 biases, expected 28"):
        two.audio_tower.core.encode(features, _core.AudioState(), True, adapters=[(core, 1.0)])
    a, b = np.zeros((2, 24), np.float32), np.zeros((24, 2), np.float32)
    for layer, name, expected in (
        (-1, "vision.attn.q_proj", "is -1, expected 0 or more"),
        (0, "vision.projection", "is 0, expected -1"),
    ):
        with pytest.raises(ValueError, match=expected):
            _core.Adapter(two.core, "float32").add(layer, name, a, b, 1)


def test_compare_encodes_each_side_under_its_own_adapters(two: gl.Model) -> None:
    asked = two.prepare(prompt([len(two.encode_image(PICTURE, BUDGET))]), images=PICTURE,
                        max_soft_tokens=BUDGET)  # fmt: skip
    same = gl.compare(two, two, asked, adapter="a", reference_adapter="a")
    assert same.first_divergence is None
    other = gl.compare(two, two, asked, adapter="a", reference_adapter={})
    assert other.first_divergence.name.startswith("vision.")
    assert other.kl.mean() > 0.01
