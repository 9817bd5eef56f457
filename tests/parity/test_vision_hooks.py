"""Hook points of the vision tower hold what transformers' modules hold, and change what follows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

import gemloupe as gl
from gemloupe.media.images import read_image
from gemloupe.media.vision_hooks import vision_points
from tiny_models import save_tiny_tokenizer

PATCH = 4


def _picture(seed: int = 0, size: tuple[int, int] = (60, 45)) -> PilImage.Image:
    rng = np.random.default_rng(seed)
    return PilImage.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))


@pytest.fixture(params=["e2b", "26b", "12b"])
def loaded(request: pytest.FixtureRequest, tiny: Callable) -> tuple[Any, gl.Model]:
    reference, folder = tiny(request.param, towers="tiny", media_ids=True)
    save_tiny_tokenizer(folder)
    return reference, gl.load(folder, dtype="float32")


@contextlib.contextmanager
def _recorded(reference: Any, paths: dict[str, str]) -> Iterator[dict[str, np.ndarray]]:
    """Records modules' outputs, or inputs (".input") or one of several outputs (".output.1")."""
    values: dict[str, np.ndarray] = {}
    handles = []
    for name, path in paths.items():
        module, _, rest = path.partition(".output")
        is_input = module.endswith(".input")
        target = reference.model.get_submodule(module.removesuffix(".input"))

        def hook(
            _module: Any, inputs: Any, output: Any, name: str = name, rest: str = rest,
            is_input: bool = is_input,
        ) -> None:  # fmt: skip
            value = inputs[0] if is_input else output
            value = value[int(rest[1:])] if rest else value
            values[name] = value.detach().clone().numpy()

        handles.append(target.register_forward_hook(hook))
    yield values
    for handle in handles:
        handle.remove()


def test_every_point_holds_what_transformers_holds(loaded: tuple[Any, gl.Model]) -> None:
    reference, model = loaded
    picture = _picture()
    assert model.vision is not None
    points = vision_points(model.vision.config)
    run = model.run("<|image|>", images=picture, max_soft_tokens=70, capture="vision.*")
    assert {name for name in run.captured if name.startswith("vision.")} == set(points)
    unified = not model.vision.config.has_encoder
    paths = {name: p.transformers for name, p in points.items() if p.transformers}
    side = 3 * PATCH if unified else PATCH
    image = read_image(picture, "x", 3 * PATCH, 70)
    patches = torch.from_numpy(image.patches(side))[None]
    at, columns = torch.arange(patches.shape[1]), image.pixels.shape[1] // side
    places = torch.stack([at % columns, at // columns], dim=-1)[None]
    if unified:
        paths = {
            "vision.patches": "embed_vision.pos_norm",
            "vision.soft_tokens": "embed_vision.multimodal_embedder",
        }
    with _recorded(reference, paths) as theirs, torch.no_grad():
        tokens = reference.model.get_image_features(patches, places).pooler_output[0].numpy()
    theirs["vision.soft_tokens"] = tokens
    assert len(theirs) == len(paths) and (unified or len(paths) > 30)
    for name, expected in theirs.items():
        ours = run[name]
        ours = ours[0] if isinstance(ours, list) else ours
        expected = expected.reshape(ours.shape)
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * scale, err_msg=name)


def test_points_without_a_module_are_what_their_names_say(tiny: Callable) -> None:
    _reference, folder = tiny("26b", towers="tiny", media_ids=True)
    save_tiny_tokenizer(folder)
    model = gl.load(folder, dtype="float32")
    run = model.run("<|image|>", images=_picture(), max_soft_tokens=70, capture="vision.*")
    of = "vision.layers.1."
    q, k, v = run[of + "attn.rot_q"], run[of + "attn.rot_k"], run[of + "attn.v"]
    scores = np.einsum("tnh,snh->nts", q, k)
    np.testing.assert_allclose(run[of + "attn.scores"][0], scores, rtol=0, atol=1e-4)
    pattern = run[of + "attn.pattern"][0]
    np.testing.assert_allclose(np.einsum("nts,snh->tnh", pattern, v), run[of + "attn.z"], atol=1e-4)
    scale = run[of + "attn.norm.scale"]
    np.testing.assert_allclose(scale[:, 0] ** 2, (run[of + "resid_pre"] ** 2).mean(1), rtol=1e-4)
    assert np.array_equal(run["vision.soft_tokens"], run.media[0].soft_tokens)


def test_captures_change_no_bit_and_rows_go_on_over_images(loaded: tuple[Any, gl.Model]) -> None:
    _reference, model = loaded
    pictures = [_picture(1), _picture(2, (50, 40))]
    text = "<|image|> <|image|>"
    plain = model.run(text, images=pictures, max_soft_tokens=70, capture="embed")
    seen = model.run(text, images=pictures, max_soft_tokens=70, capture=["vision.*", "embed"])
    assert np.array_equal(plain.logits, seen.logits)
    assert np.array_equal(plain["embed"], seen["embed"])
    both = np.concatenate([medium.soft_tokens for medium in seen.media])
    assert np.array_equal(seen["vision.soft_tokens"], both)
    assert seen.positions_of("vision.soft_tokens").tolist() == list(range(len(both)))
    some = model.run(
        text, images=pictures, max_soft_tokens=70, capture={"vision.patches": gl.at([0, -1])}
    )
    assert np.array_equal(some["vision.patches"], seen["vision.patches"][[0, -1]])


def test_edits_change_what_follows_and_nothing_remains(loaded: tuple[Any, gl.Model]) -> None:
    _reference, model = loaded
    picture = _picture()
    arguments: dict[str, Any] = {"images": picture, "max_soft_tokens": 70}
    plain = model.run("<|image|>?", **arguments, capture="vision.soft_tokens")
    doubled = model.run(
        "<|image|>?", **arguments, edit={"vision.soft_tokens": gl.edits.scale(2.0)},
        capture=["vision.soft_tokens", "embed"],
    )  # fmt: skip
    twice = 2 * plain["vision.soft_tokens"]
    assert np.array_equal(doubled["vision.soft_tokens"], twice)
    assert np.array_equal(doubled["embed"][doubled.media[0].positions], twice)
    given = model.run("<|image|>?", images=twice)
    assert np.array_equal(doubled.logits, given.logits)
    assert np.array_equal(model.run("<|image|>?", **arguments).logits, plain.logits)
    if model.vision is not None and model.vision.config.has_encoder:
        layer = "vision.layers.0."
        head = model.run(
            "<|image|>?", **arguments, capture="vision.layers.0.attn.z",
            edit={layer + "attn.pattern": gl.edits.zero(heads=[1])},
        )  # fmt: skip
        assert not head[layer + "attn.z"][:, 1].any() and head[layer + "attn.z"][:, 0].any()
        rows = model.run(
            "<|image|>?", **arguments, capture=layer + "resid_post",
            edit={layer + "resid_post": lambda x, at: x * (at.positions[:, None] > 3)},
        )  # fmt: skip
        assert not rows[layer + "resid_post"][:4].any() and rows[layer + "resid_post"][4:].any()


def test_what_can_not_be_seen_is_said(loaded: tuple[Any, gl.Model], tiny: Callable) -> None:
    _reference, model = loaded
    picture = _picture()
    with pytest.raises(KeyError, match="vision tower; did you mean 'vision.soft_tokens'"):
        model.run("<|image|>", images=picture, capture="vision.soft_token")
    with pytest.raises(ValueError, match="there is no image"):
        model.run("a", capture="vision.soft_tokens")
    tokens = np.asarray(model.encode_image(picture, 70))
    with pytest.raises(ValueError, match="soft tokens of an unknown picture"):
        model.run("<|image|>", images=tokens, capture="vision.soft_tokens")
    kept = model.run("<|image|>", images=picture, max_soft_tokens=70, keep=True)
    with pytest.raises(ValueError, match="a repeated run encodes no image and no"):
        model.run(kept, edit={"vision.soft_tokens": gl.edits.zero()})
    broken = gl.load(tiny("e2b", towers="tiny", media_ids=True)[1])
    broken.config.raw["vision_config"]["head_dim"] = 7
    assert broken.run([2, 5]).logits is not None
    with pytest.raises(ValueError, match="vision_config.head_dim is 7; expected a mul"):
        broken.encode_image(picture)
    blind = gl.load(tiny("e2b")[1])
    with pytest.raises(KeyError, match="this checkpoint has no vision part"):
        blind.run([2, 5], capture="vision.soft_tokens")
    with pytest.raises(ValueError, match="has no vision part; expected a multimodal checkpoint"):
        blind.encode_image(picture)
