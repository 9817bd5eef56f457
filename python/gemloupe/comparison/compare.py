"""`gl.compare`: runs two engines over the same ids and says where they part, and why."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe import hooks
from gemloupe.comparison import contributions, media, walk
from gemloupe.comparison import transformers_capture as hf
from gemloupe.comparison.operations import Captured
from gemloupe.comparison.recording import RecordedSide
from gemloupe.comparison.report import Report
from gemloupe.comparison.sides import (
    Experts,
    GemloupeSide,
    Side,
    TransformersSide,
    Values,
    check_same_shape,
)
from gemloupe.comparison.walk import OtherChoice, Pair, PointError, Walk
from gemloupe.errors import one_of, quoted
from gemloupe.progress import ProgressBar

if TYPE_CHECKING:
    from gemloupe.model import Model
    from gemloupe.prompt import Prompt

# Captured values of one side that are in memory at a time; more points take several passes.
_GROUP_BYTES = 1 << 30
_BAR_POINTS = 1000


def compare(
    model: Model,
    reference: Any,
    inputs: Any = None,
    *,
    points: str | Iterable[str] = "*",
    reference_dtype: str = "float32",
    measure: str = "output",
    adapter: Any = None,
    reference_adapter: Any = None,
) -> Report:
    """Compares a model with a reference at every hook point that both have.

    `reference`: a Gemma 4 model of transformers as it was loaded (it is as it was afterwards), a
    checkpoint folder or "demo:edge" (loaded with transformers in `reference_dtype`), another
    gemloupe model, or a file of `gl.record_reference`. `inputs`: what `model.prepare` takes: ids,
    text, a chat, a `Prompt`, or a batch; None takes the prompts of a recorded file. Media come in a
    chat's parts or a `Prompt` (model.prepare(text, images=…)); see below. `points`:
    names or patterns. The float64 part takes most of the time: minutes for billions of weights.

    A point whose values differ is re-run in float64 from the captured inputs of both sides, with
    the model's weights. Where each side lies within the bound of its own result (computed from
    operand norms and the dtypes' roundoff), the difference came in from before; else the point is
    a divergence, and says which side is off, and which weights differ. For a reference that is not
    float32, √hidden_size is aligned, and each error stands beside the reference's own |its dtype -
    float32|: a ratio above 1.5 is a divergence. Tokens that take other experts are reported with
    the gap of the reference's probabilities; the rest is then compared with the same experts
    forced on one side. For a quantised model `contributions` ranks the tensors by the error of
    their output on the reference's inputs, or with `measure="kl"` by the KL of the transformers
    reference with that tensor alone rounded (a pass each).

    `adapter` and, for a gemloupe reference, `reference_adapter` are what both sides run under, as
    in `model.run`: gl.compare(model, model, inputs, adapter="a", reference_adapter={}) shows what
    an adapter does. Each module that it changes is a divergence whose weights differ; layers,
    tokens and choices of experts that follow from it come after.

    Images, sounds and videos: both sides get the same patches and mel frames, made by gemloupe
    (transformers' processor makes equal ones), and encode them with their own towers, whose points
    ("vision.…", "audio.…", positions within one picture or sound) come first in the report. Points
    of towers are compared with an allowance of 1e-4 of the largest value, not re-run in float64:
    the first that diverges is where to look. Soft tokens without a known source are given to both.

    Returns a `Report`. Raises ValueError for a reference of other sizes, hostile or foreign files
    and unknown arguments, KeyError for a pattern that matches nothing, ImportError where a
    transformers reference needs torch.
    """
    if measure not in ("output", "kl"):
        raise ValueError(f"measure is {quoted(measure)}; expected {one_of(['output', 'kl'])}")
    model_side = GemloupeSide(model, adapter)
    side = open_reference(reference, reference_dtype, reference_adapter)
    check_same_shape(model_side, side)
    prompts = _prompts(model, side, inputs)
    notes = _align(model_side, side)
    patterns = [points] if isinstance(points, str) else list(points)
    towers = media.selected(model, patterns) if any(p.media for p in prompts) else []
    of_text = [p for p in patterns if not (towers and p.startswith(walk.TOWERS))]
    names = [point.name for point in hooks.select(of_text, model.config.text)[0]]
    comparison = _Comparison(model, model_side, side, names, towers)
    with ProgressBar("comparing", shown=len(names) * len(prompts) > _BAR_POINTS) as bar:
        for number, prompt in enumerate(prompts):
            comparison.add_towers(number, prompt)
            comparison.add(number, prompt)
            bar.show((number + 1) / len(prompts))
    report = comparison.report(prompts)
    report.contributions = contributions.rank(report.points, comparison.walk, model_side.tensors)
    if measure == "kl":
        if not isinstance(side, TransformersSide):
            raise ValueError(
                'measure="kl" puts rounded tensors into a transformers model, but the reference is '
                f"{side.engine.label}; leave it out, or pass a transformers model"
            )
        report.contributions = contributions.with_kl(
            report.contributions, side, model_side.tensors, prompts
        )
    own_notes = side.notes if isinstance(side, TransformersSide) else ()
    report.notes = (*notes, *own_notes, *comparison.notes, *_naming_notes(model, side))
    return report


def open_reference(reference: Any, dtype: str = "float32", adapter: Any = None) -> Side:
    """Returns the side that `compare` runs the model against."""
    from gemloupe.model import Model

    if adapter is not None and not isinstance(reference, Model):
        raise ValueError(
            "reference_adapter is for a gemloupe model as reference; expected None: load the "
            "adapter into a transformers model with PEFT"
        )
    if isinstance(reference, (GemloupeSide, TransformersSide, RecordedSide)):
        return reference
    if isinstance(reference, Model):
        return GemloupeSide(reference, adapter, "reference")
    if hf.is_transformers_model(reference):
        return TransformersSide(reference)
    if not isinstance(reference, (str, os.PathLike)):
        raise ValueError(
            f"reference is a {type(reference).__name__}; expected a transformers model, a "
            "checkpoint folder, a gemloupe model, or a file of gl.record_reference"
        )
    path = Path(reference)
    if path.suffix == ".gguf":
        raise ValueError(
            f"{path} is a GGUF file, which transformers can't run as it is; pass gl.load({path!r}) "
            "(on the command line: --gemloupe)"
        )
    if path.suffix == ".safetensors" or path.is_file():
        return RecordedSide(path)
    return TransformersSide(_load_transformers(reference, dtype))


def _load_transformers(source: str | os.PathLike[str], dtype: str) -> Any:
    from gemloupe.checkpoint import read_folder_config, resolve
    from gemloupe.packed import is_packed

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(
            f"reference_dtype is {quoted(dtype)}; expected {one_of(['float32', 'bfloat16'])}"
        )
    torch = hf.import_torch("a checkpoint folder as reference")
    import transformers

    folder = resolve(source)
    config = read_folder_config(folder)
    if is_packed(folder):
        raise ValueError(
            f"{folder} is a packed checkpoint, which transformers can't read; pass gl.load(...) of "
            "it (on the command line: --gemloupe), or the checkpoint that it was made from"
        )
    text_only = config.model_type.endswith("_text") or config.architecture.endswith("ForCausalLM")
    auto = "AutoModelForCausalLM" if text_only else "AutoModelForImageTextToText"
    name = config.architecture if hasattr(transformers, config.architecture or " ") else auto
    options = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}
    loaded = getattr(transformers, name).from_pretrained(str(folder), **options)
    if config.text.num_experts:
        loaded.set_experts_implementation("eager")
    return loaded.eval()


def _prompts(model: Model, side: Side, inputs: Any) -> list[Prompt]:
    if inputs is None:
        if not isinstance(side, RecordedSide):
            raise ValueError("inputs is None; expected ids, text, a prompt or a batch of these")
        inputs = side.prompts
    prepared = model.prepare(inputs)
    return prepared if isinstance(prepared, list) else [prepared]


def _align(model: GemloupeSide, side: Side) -> list[str]:
    """Gives both sides the same √hidden_size where that can be done."""
    ours, theirs = model.embed_scale, side.embed_scale
    if ours == theirs:
        return []
    if isinstance(side, TransformersSide):
        side.align_embed_scale(ours)
        return [
            f"the reference, whose own √hidden_size is rounded to {theirs}, ran with the model's, "
            f'in {ours}; gl.load(..., embed_scale="{theirs}") compares it as it is'
        ]
    return [
        f"√hidden_size is rounded to {theirs} in the reference and to {ours} in the model: "
        f'load the model with gl.load(..., embed_scale="{theirs}")'
    ]


def _naming_notes(model: Model, side: Side) -> list[str]:
    if isinstance(side, GemloupeSide):
        return []
    text = model.config.text
    last = f"layers.{text.num_hidden_layers - 1}.resid_post"
    notes = [f"transformers' hidden_states[-1] is final_norm; the last layer's output is {last}"]
    if text.num_experts:
        notes.append(
            "transformers' router_logits are router.probs, after softmax; router.logits is the "
            "output of router.proj"
        )
    if text.hidden_size_per_layer_input:
        notes.append(
            "transformers' argument per_layer_inputs is per_layer_inputs.token; layers read "
            "per_layer_inputs, its sum with the context part over √2"
        )
    return notes


class _Comparison:
    """Gathers points, KL and choices of experts over prompts."""

    def __init__(
        self,
        model: Model,
        model_side: GemloupeSide,
        side: Side,
        names: Sequence[str],
        towers: Sequence[hooks.HookPoint],
    ) -> None:
        self._model = model
        self._towers = towers
        self._config = model.config.text
        self._model_side = model_side
        self._side = side
        self._names = names
        self.walk = Walk(self._config, model_side.tensors, side.tensors)
        self._points: dict[str, PointError] = {}
        self._kl: list[np.ndarray] = []
        self._top1: list[np.ndarray] = []
        self._own_kl: list[np.ndarray] = []
        self._choices: list[OtherChoice] = []
        self._missing: set[str] = set()
        self.notes: list[str] = []

    def add_towers(self, number: int, prompt: Prompt) -> None:
        """Encodes each picture and sound of one prompt on both sides."""
        nothing = np.zeros(0, np.int64)
        for source in media.sources(prompt) if self._towers else ():
            for points in media.groups(self._towers, source, self._model):
                theirs = self._side.tower_values(prompt, source, points) or {}
                self._missing |= {point.name for point in points} - set(theirs)
                points = [point for point in points if point.name in theirs]
                ours = self._model_side.tower_values(prompt, source, points) or {}
                pair = Pair(
                    self._captured(self._model_side, ours, nothing),
                    self._captured(self._side, theirs, nothing),
                    self._side.tower_values(prompt, source, points, float32=True),
                    number,
                )
                self._take(pair, [point.name for point in points])

    def _take(self, pair: Pair, names: Sequence[str]) -> None:
        for point in self.walk.points(pair, names):
            before = self._points.get(point.name)
            self._points[point.name] = walk.merge(before, point) if before else point

    def add(self, number: int, prompt: Prompt) -> None:
        """Runs both sides over one prompt; of a model with experts first as they route."""
        plain = []
        for layer in range(self._config.num_hidden_layers):
            if self._config.layers[layer].has_experts:
                plain += [f"layers.{layer}.router.{n}" for n in ("experts", "probs")]
        apart = bool(plain) or "logits" not in self._names
        if apart:
            plain.append("logits")
        forced: str = ""
        experts: Experts | None = None
        flips: dict[int, int] = {}
        if apart:
            pair = self._pair(number, prompt, plain)
            self._add_logits(pair, prompt)
            choices = _all_choices(pair, plain)
            forced, experts, flips = self._forced(pair, choices)
            if forced:
                # With the same path before it, a choice that still differs is no consequence.
                choices = _all_choices(self._pair(number, prompt, plain, forced, experts), plain)
            self._choices += choices
        for names in _groups(self._names, self._config, len(prompt)):
            read = [*names, *_inputs_of(names, self._config)]
            pair = self._pair(number, prompt, read, forced, experts)
            pair = replace(pair, flips=flips)
            self._take(pair, names)
            if not apart and "logits" in names:
                self._add_logits(pair, prompt)
            self._missing |= set(names) - set(pair.reference.values)

    def _forced(
        self, pair: Pair, choices: Sequence[OtherChoice]
    ) -> tuple[str, Experts | None, dict[int, int]]:
        """Where experts differ: which side takes the other's, and what can't be compared."""
        flips: dict[int, int] = {}
        for choice in choices:
            flips[choice.layer] = min(flips.get(choice.layer, choice.position), choice.position)
        if not flips:
            return "", None, {}
        source = None
        if self._side.can_force_experts:
            forced, source = "reference", pair.model.values
        elif self._model_side.can_force_experts:
            forced, source = "model", pair.reference.values
        if source is None:
            self._note(
                "tokens took other experts, and neither side can be forced to the other's: from "
                "there on only what precedes is set against the reference's own error"
            )
            return "", None, flips
        self._note(f"errors are those with the {_other(forced)}'s experts forced on the {forced}")
        experts = {
            int(name.split(".")[1]): array
            for name, array in source.items()
            if name.endswith("router.experts")
        }
        return forced, experts, {}

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _pair(
        self,
        number: int,
        prompt: Prompt,
        names: Sequence[str],
        forced: str = "",
        experts: Experts | None = None,
    ) -> Pair:
        ids = np.asarray(prompt.ids)
        ours = experts if forced == "model" else None
        theirs = experts if forced == "reference" else None
        reference = self._side.values(prompt, names, theirs)
        has_experts = [name for name in reference if name.endswith("router.experts")]
        # The float32 run takes the same experts: rounding is compared, not routing.
        same = theirs or {int(n.split(".")[1]): reference[n] for n in has_experts}
        return Pair(
            self._captured(
                self._model_side, self._model_side.values(prompt, names, ours), ids, prompt
            ),
            self._captured(self._side, reference, ids, prompt),
            self._side.float32_values(prompt, names, same),
            number,
            forced=forced,
        )

    def _captured(
        self, side: Side, values: Values, ids: np.ndarray, prompt: Prompt | None = None
    ) -> Captured:
        rows = None
        if prompt is not None and prompt.media:
            rows = side.media_rows(prompt, self._model.config)
        return Captured(values, ids, side.engine, side.embed_scale, rows)

    def _add_logits(self, pair: Pair, prompt: Prompt) -> None:
        got, expected = (s.values.get("logits") for s in (pair.model, pair.reference))
        if got is None or expected is None:
            return
        self._kl.append(contributions.kl(expected, got))
        self._top1.append(got.argmax(axis=-1) == expected.argmax(axis=-1))
        own = self._side.float32_logits(prompt)
        if own is not None:
            self._own_kl.append(contributions.kl(expected, own))

    def report(self, prompts: Sequence[Prompt]) -> Report:
        positions = [(n, t) for n, prompt in enumerate(prompts) for t in range(len(prompt))]
        names = [*(point.name for point in self._towers), *self._names]
        compared = [self._points[name] for name in names if name in self._points]
        return Report(
            model=self._model_side.engine.label,
            reference=self._side.engine.label,
            points=compared,
            kl=np.concatenate(self._kl) if self._kl else np.zeros(0),
            top1_agreement=np.concatenate(self._top1) if self._top1 else np.zeros(0, bool),
            positions=positions,
            tokens=[token for prompt in prompts for token in _tokens(prompt)],
            own_kl=np.concatenate(self._own_kl) if self._own_kl else None,
            near_ties=self._choices,
            not_compared=tuple(name for name in names if name in self._missing),
        )


def _all_choices(pair: Pair, names: Sequence[str]) -> list[OtherChoice]:
    return [
        choice
        for name in names
        if name.endswith("router.experts") and name in pair.reference.values
        for choice in walk.other_choices(pair, int(name.split(".")[1]))
    ]


def _other(side: str) -> str:
    return "reference" if side == "model" else "model"


def _tokens(prompt: Prompt) -> list[str]:
    if prompt.tokenizer.exists:
        return prompt.tokens
    return [f"[{index}]" for index in prompt.ids.tolist()]


def _groups(names: Sequence[str], config: Any, tokens: int) -> Iterator[list[str]]:
    """Splits the points into runs of whole layers that fit into memory together."""
    points = hooks.hook_points(config)
    group: list[str] = []
    size, layer = 0, None
    for name in names:
        point = points[name]
        count = _elements(point, config, tokens) * 4
        if group and point.layer != layer and size + count > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size, layer = size + count, point.layer
    if group:
        yield group


def _elements(point: hooks.HookPoint, config: Any, tokens: int) -> int:
    spec = config.layers[max(0, point.layer)]
    sizes = {
        "T": tokens,
        "S": tokens,
        "D": config.hidden_size,
        "N": config.num_attention_heads,
        "K": spec.num_kv_heads,
        "H": spec.head_dim,
        "F": spec.intermediate_size,
        "E": config.num_experts,
        "k": config.top_k_experts,
        "P": config.hidden_size_per_layer_input,
        "L": config.num_hidden_layers,
        "V": config.vocab_size,
    }
    count = 1
    for letter in point.shape.strip("[]").split(", "):
        count *= int(letter) if letter.isdecimal() else sizes[letter]
    return count


# Large, and computed from others where they are not captured.
_HEAVY = ("scores", "pattern", "attn.result", "experts.hidden", "experts.each")


def _inputs_of(names: Sequence[str], config: Any) -> list[str]:
    """Points that the operations of `names` read, in their own layers and in others."""
    points = hooks.hook_points(config)
    layers = {points[name].layer for name in names}
    wanted = [n for n, p in points.items() if p.layer in layers and not n.endswith(_HEAVY)]
    for layer in layers - {-1}:
        wanted.append("embed" if layer == 0 else f"layers.{layer - 1}.resid_post")
        source = config.layers[layer].kv_source
        wanted += [f"layers.{source}.attn.rot_k", f"layers.{source}.attn.v"]
        if config.hidden_size_per_layer_input:
            wanted.append("per_layer_inputs")
    if -1 in layers:
        wanted.append(f"layers.{config.num_hidden_layers - 1}.resid_post")
    asked = set(names)
    return [name for name in dict.fromkeys(wanted) if name not in asked]
