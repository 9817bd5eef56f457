"""A transformers model's towers, fed with gemloupe's patches and mel frames, one source at a time.

Nothing permanent: hooks and widened weights last while a source is encoded.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from gemloupe import hooks
from gemloupe.comparison import transformers_capture as hf
from gemloupe.comparison.media import MediaRows, Source, point_shape, tower_of
from gemloupe.errors import quoted
from gemloupe.media.images import Image

_MODULES = ("vision_tower", "embed_vision", "audio_tower", "embed_audio")
# Where the encoder-free model has what others have in a tower.
_UNIFIED = {
    "vision.patches": "embed_vision.pos_norm",
    "vision.soft_tokens": "embed_vision.multimodal_embedder",
}
_KINDS = {"image": 1, "video": 2, "audio": 3}


def paths(model: Any, points: Collection[hooks.HookPoint]) -> dict[str, str]:
    """Module paths of those points whose values a module gives; see `hooks.HookPoint`."""
    found = {}
    for point in points:
        path = point.transformers
        if _is_unified(model) and point.name.startswith("vision."):
            path = _UNIFIED.get(point.name, "")
        elif _is_unified(model) and point.name == "audio.mel":
            path = ""
        if path:
            found[point.name] = path
    return found


def encode(
    model: Any, source: Source, points: Sequence[hooks.HookPoint] = (), *, float32: bool = False
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the soft tokens float32 [n, D] of one source and the values of points [rows, …].

    `float32` computes in float32 with the towers' weights as they are. ValueError where the model
    has no such tower.
    """
    torch = hf.import_torch("a transformers reference")
    inner = _multimodal(model)
    what = tower_of(source)
    embedder = getattr(inner, f"embed_{what}", None)
    if embedder is None:
        raise ValueError(f"the reference has no {what} part, which the prompt's media need")
    values: dict[str, np.ndarray] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(hf.LOCK)
        stack.enter_context(torch.no_grad())
        stack.enter_context(_eager(inner))
        if float32:
            stack.enter_context(_widened(inner))
        weight = next(embedder.parameters())
        stack.enter_context(_recording(inner, points, paths(model, points), source, values))
        if isinstance(source, Image):
            rows = _image_tokens(torch, inner, source, weight.device)
        else:
            rows = _sound_tokens(torch, inner, source, weight)
    return rows.float().cpu().numpy(), values


def _image_tokens(torch: Any, inner: Any, image: Image, device: Any) -> Any:
    config = inner.config.vision_config
    side = image.cell if _is_unified(inner) else config.patch_size
    patches = torch.from_numpy(image.patches(side))[None].to(device)
    at, columns = torch.arange(patches.shape[1]), image.pixels.shape[1] // side
    places = torch.stack([at % columns, at // columns], dim=-1)[None].to(device)
    return inner.get_image_features(patches, places, return_dict=True).pooler_output[0]


def _sound_tokens(torch: Any, inner: Any, sound: Any, weight: Any) -> Any:
    frames = torch.from_numpy(np.array(sound.features))[None].to(weight.device, weight.dtype)
    mask = torch.ones(frames.shape[:2], dtype=torch.bool, device=weight.device)
    return inner.get_audio_features(frames, mask, return_dict=True).pooler_output[0]


@contextlib.contextmanager
def given(model: Any, ids: Any, media: MediaRows | None, prompt: Any) -> Iterator[dict[str, Any]]:
    """Lets a forward pass find soft tokens where its media stand; yields its further arguments.

    `ids`: a tensor [1, T]. The towers do not run: `media` has what they gave.
    """
    if media is None:
        yield {}
        return
    torch = hf.import_torch("a transformers reference")
    inner = _multimodal(model)
    device = ids.device
    tokens: dict[str, list[Any]] = {kind: [] for kind in _KINDS}
    kinds = torch.zeros_like(ids)
    begin = 0
    for medium in prompt.media:
        end = begin + len(medium.positions)
        rows = torch.from_numpy(np.array(media.soft_tokens[begin:end])).to(device)
        tokens[medium.kind].append((medium.index, rows))
        kinds[0, torch.from_numpy(medium.positions)] = _KINDS[medium.kind]
        begin = end

    def features(kind: str) -> Any:
        found = [rows for _, rows in sorted(tokens[kind], key=lambda pair: pair[0])]
        return lambda *_arguments, **_keywords: SimpleNamespace(pooler_output=found)

    def sounds(*_arguments: Any, **_keywords: Any) -> Any:
        found = torch.cat(features("audio")().pooler_output)[None]
        mask = torch.ones(found.shape[:2], dtype=torch.bool, device=device)
        return SimpleNamespace(pooler_output=found, attention_mask=mask)

    something = torch.zeros(1, device=device)
    more: dict[str, Any] = {"mm_token_type_ids": kinds}
    if tokens["image"]:
        more["pixel_values"] = something
    if tokens["video"]:
        more |= {"pixel_values_videos": something, "num_frames_per_video": something.long()}
    if tokens["audio"]:
        more |= {"input_features": something, "input_features_mask": something}
    if _is_unified(model):
        more["attention_mask"] = _static_masks(torch, model, kinds)
    with (
        mock.patch.object(inner, "get_image_features", features("image")),
        mock.patch.object(inner, "get_video_features", features("video")),
        mock.patch.object(inner, "get_audio_features", sounds),
    ):
        yield more


def _static_masks(torch: Any, model: Any, kinds: Any) -> Any:
    """The masks of generate() with a static cache: its plain forward lets images of the 12B see
    themselves whole in full layers, too."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    dtype = hf.decoder_of(model).embed_tokens.weight.dtype
    size = base.config.get_text_config().hidden_size
    hidden = torch.zeros(1, kinds.shape[1], size, dtype=dtype, device=kinds.device)
    ones = torch.ones(kinds.shape, device=kinds.device)
    at = torch.arange(kinds.shape[1], device=kinds.device)[None]
    return base.create_masks_for_generate(base.config, hidden, ones, None, at, kinds)


def _multimodal(model: Any) -> Any:
    """The module that has the towers; ValueError for a text-only class."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner = base if hasattr(base, "get_image_features") and not hasattr(base, "lm_head") else None
    inner = inner or getattr(base, "model", None)
    if inner is None or not hasattr(inner, "language_model"):
        raise ValueError(
            f"the reference is a {type(base).__name__}, which reads text alone, but the inputs "
            "have media; load the whole model, such as Gemma4ForConditionalGeneration"
        )
    return inner


def _is_unified(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return str(base.config.model_type).startswith("gemma4_unified")


@contextlib.contextmanager
def _eager(inner: Any) -> Iterator[None]:
    """The attention that gives patterns; settings are put back."""
    towers = [getattr(inner, name, None) for name in ("vision_tower", "audio_tower")]
    configs = {id(t.config): t.config for t in towers if t is not None}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    modules = [module for t in towers if t is not None for module in t.modules()]
    training = [module for module in modules if module.training]
    try:
        for config in configs.values():
            config._attn_implementation_internal = "eager"
        for module in training:
            module.training = False
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        for module in training:
            module.training = True


@contextlib.contextmanager
def _widened(inner: Any) -> Iterator[None]:
    """The towers' parameters in float32 for a while."""
    modules = [getattr(inner, name, None) for name in _MODULES]
    kept = [(p, p.data) for m in modules if m is not None for p in m.parameters()]
    try:
        for parameter, data in kept:
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


@contextlib.contextmanager
def _recording(
    inner: Any,
    points: Sequence[hooks.HookPoint],
    found: Mapping[str, str],
    source: Source,
    values: dict[str, np.ndarray],
) -> Iterator[None]:
    handles = []
    for point in points:
        path = found.get(point.name)
        if not path:
            continue
        output = re.search(r"\.output\.(\d)$", path)
        module = path[: output.start()] if output else path
        which = int(output[1]) if output else 0
        is_input = module.endswith(".input")
        try:
            target = inner.get_submodule(module.removesuffix(".input"))
        except AttributeError:
            raise ValueError(
                f"the reference has no module {quoted(module)}, whose output is {point.name}; "
                "expected transformers 5.23 or one like it, and the same checkpoint"
            ) from None
        keep = _keeper(point, point_shape(point, source), which, values)
        if is_input:
            handles.append(
                target.register_forward_pre_hook(
                    lambda _m, args, keywords, keep=keep: keep(
                        args[0] if args else next(iter(keywords.values()))
                    ),
                    with_kwargs=True,
                )
            )
        else:
            handles.append(target.register_forward_hook(lambda _m, _i, out, keep=keep: keep(out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keeper(
    point: hooks.HookPoint, shape: tuple[int, ...], which: int, values: dict[str, np.ndarray]
) -> Any:
    def keep(value: Any) -> None:
        if isinstance(value, (tuple, list)):
            value = value[which]
        array = value.detach().float().cpu().numpy().copy()
        if shape == (-1,):
            values[point.name] = array[0]
            return
        # Pooled rows come without a batch dimension.
        values[point.name] = array.reshape(-1, *shape)

    return keep
