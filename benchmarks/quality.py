"""How much of a model's behaviour its dtypes keep, against float32 of the same checkpoint.

    python benchmarks/quality.py                              # the three demo models
    python benchmarks/quality.py FOLDER --text FILE [--json FILE]

Compared are int8, int4, the same int4 recipe with its matrices rounded as Q4_0 (llama.cpp's rule),
bfloat16, and float32 with other KV dtypes. Demo models read held-out texts of their own tasks,
others --text, or random ids. All use one embed_scale. What the columns mean: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measures
import numpy as np
from workers import HERE, markdown, progress

import gemloupe as gl
from gemloupe import bench, recipe
from gemloupe.checkpoint import open_checkpoint
from gemloupe.model import Model

sys.path.insert(0, str(HERE.parent / "scripts" / "demo_models"))
import corpus

DEMOS = ("demo:edge", "demo:moe", "demo:dense")
REFERENCE = {"dtype": "float32", "activations": "float32", "kv_dtype": "float32"}
# Beside the reference. "q4_0" is loaded from a copy whose int4 matrices lie on Q4_0's lattice.
SETTINGS: dict[str, dict[str, str]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4"},
    "q4_0 rounding": {"dtype": "int4"},
    "int4, float32 activations": {"dtype": "int4", "activations": "float32"},
    "q4_0 rounding, float32 activations": {"dtype": "int4", "activations": "float32"},
    "float32, KV float16": {**REFERENCE, "kv_dtype": "float16"},
    "float32, KV bfloat16": {**REFERENCE, "kv_dtype": "bfloat16"},
    "float32, KV int8": {**REFERENCE, "kv_dtype": "int8"},
}
MOST_COPIED = 4 << 30  # Bytes of float32 that are written for the Q4_0 copy and for ablations.


@dataclass(frozen=True)
class Text:
    ids: list[int]
    scored: np.ndarray
    """bool [T]: whether what this position predicts is looked at. Of a chat only what the model
    is to write: nobody asked it to predict the question."""


@dataclass
class Figures:
    """What one setting did to each text."""

    kl: list[np.ndarray] = field(default_factory=list)  # of a text: [scored positions]
    top: list[np.ndarray] = field(default_factory=list)
    losses: list[np.ndarray] = field(default_factory=list)
    errors: list[np.ndarray] = field(default_factory=list)  # [layers, T]
    experts: list[np.ndarray] = field(default_factory=list)  # [layers with experts, T]
    routing: list[np.ndarray] = field(default_factory=list)
    heads: list[float] = field(default_factory=list)  # effect of each ablation
    single_experts: list[float] = field(default_factory=list)


def demo_texts(model: Model, count: int, seed: int) -> list[Text]:
    """Held-out texts of the demo models' tasks."""
    texts = []
    for sample in itertools.islice(corpus.stream(seed, held_out=True), count):
        if sample.messages:
            prompt = model.prepare(
                sample.messages, tools=sample.tools or None, thinking=sample.thinking
            ).ids.tolist()
        else:
            prompt = [2]
        pieces = [model.tokenizer.encode(part, bos=False) for part in sample.parts]
        written = [False] * len(prompt)
        for number, piece in enumerate(pieces):
            written += [number % 2 == 0] * len(piece)
        # A position predicts the next one's token.
        texts.append(Text(prompt + sum(pieces, []), np.array([*written[1:], False])))
    return texts


def whole(ids: list[int]) -> Text:
    return Text(ids, np.arange(len(ids)) < len(ids) - 1)


def file_texts(model: Model, path: Path, count: int, length: int) -> list[Text]:
    """Windows of a text file, each after one BOS."""
    ids = model.tokenizer.encode(path.read_text("utf-8"), bos=False)
    step = length - 1
    windows = [[2, *ids[i : i + step]] for i in range(0, len(ids) - step + 1, step)]
    if not windows:
        raise ValueError(f"{path} has {len(ids)} tokens; expected at least --length {length}")
    return [whole(ids) for ids in windows[:count]]


def random_texts(model: Model, count: int, length: int, seed: int) -> list[Text]:
    vocab = model.config.text.vocab_size
    random = np.random.default_rng(seed)
    first = min(300, vocab // 2)
    return [whole([2, *random.integers(first, vocab, length - 1).tolist()]) for _ in range(count)]


def observe(model: Model, ids: list[int]) -> dict[str, np.ndarray]:
    """logits [T, V], resid [L, T, D], and where there are experts probs and experts."""
    capture = ["layers.*.resid_post"]
    layers = model.config.text.layers
    routed = [i for i, layer in enumerate(layers) if layer.has_experts]
    if routed:
        capture += ["layers.*.router.probs", "layers.*.router.experts"]
    run = model.run(ids, logits="all", capture=capture)
    found = {
        "logits": run.logits,
        "resid": np.stack([run[f"layers.{i}.resid_post"] for i in range(len(layers))]),
    }
    for name in ("probs", "experts") if routed else ():
        found[name] = np.stack([run[f"layers.{i}.router.{name}"] for i in routed])
    return found


def add(
    figures: Figures, expected: dict[str, np.ndarray], found: dict[str, np.ndarray], text: Text
) -> None:
    """Compares one text."""
    logits = expected["logits"][text.scored], found["logits"][text.scored]
    figures.kl.append(measures.kl_divergence(*logits))
    figures.top.append(measures.same_top(*logits))
    figures.losses.append(losses(found["logits"], text))
    figures.errors.append(measures.relative_error(expected["resid"], found["resid"]))
    if "probs" in expected:
        figures.experts.append(measures.same_set(expected["experts"], found["experts"]))
        figures.routing.append(measures.js_divergence(expected["probs"], found["probs"]))


def losses(logits: np.ndarray, text: Text) -> np.ndarray:
    return measures.losses(logits, text.ids)[text.scored[:-1]]


class Copies:
    """Checkpoints made from one: float32, with changed matrices. They vanish with the object."""

    def __init__(self, source: str, folder: Path) -> None:
        self._checkpoint = open_checkpoint(source)
        self._model = gl.load(source, **REFERENCE)
        self._folder = folder
        elements = sum(math.prod(t.shape) for t in self._checkpoint.text_tensors.values())
        self.fits = 4 * elements <= MOST_COPIED

    def write(self, name: str, change: Callable[[str, np.ndarray], np.ndarray]) -> Path:
        """Writes the text decoder with `change(name, values)` of each tensor, names short."""
        from safetensors.numpy import save_file

        prefix, weights = self._checkpoint.prefix, self._model.weights
        tensors = {
            prefix + short: np.ascontiguousarray(change(short, np.array(weights[short])))
            for short in weights
        }
        target = self._folder / name
        target.mkdir()
        raw = json.loads(json.dumps(self._checkpoint.config.raw))
        raw.pop("quantization_config", None)
        raw["dtype"] = "float32"
        raw.update({tower: None for tower in ("vision_config", "audio_config") if tower in raw})
        (target / "config.json").write_text(json.dumps(raw))
        save_file(tensors, target / "model.safetensors")
        return target


def q4_0_names(source: str) -> tuple[set[str], int]:
    """The matrices that the int4 recipe holds in 4 bits and Q4_0 can hold, and how many the first
    are alone."""
    checkpoint = open_checkpoint(source)
    tensors = {name: ("float32", t.shape) for name, t in checkpoint.text_tensors.items()}
    targets = recipe.targets("int4", tensors)
    chosen = [name for name, target in targets.items() if target == "int4"]
    return {name for name in chosen if tensors[name][1][-1] % 32 == 0}, len(chosen)


def check_lattice(copy: Path, names: set[str], embed_scale: str) -> None:
    """RuntimeError unless loading the rounded copy as int4 keeps its values, bit for bit."""
    plain = gl.load(copy, **REFERENCE, embed_scale=embed_scale)
    packed = gl.load(copy, dtype="int4", embed_scale=embed_scale)
    for name in sorted(names):
        if not np.array_equal(plain.weights[name], packed.weights[name]):
            raise RuntimeError(f"{name}: int4 changed values that Q4_0 had rounded")


def ablations(model: Model, count: int, seed: int) -> tuple[list[tuple[int, int]], ...]:
    """Samples of (layer, head) and, where there are experts, of (layer, expert)."""
    text = model.config.text
    heads = [(i, h) for i in range(text.num_hidden_layers) for h in range(text.num_attention_heads)]
    experts = [
        (i, e)
        for i, layer in enumerate(text.layers)
        if layer.has_experts
        for e in range(text.num_experts)
    ]
    random = np.random.default_rng(seed)
    chosen = []
    for all_of_them in (heads, experts):
        size = min(count, len(all_of_them))
        picks = random.choice(len(all_of_them), size, replace=False) if size else []
        chosen.append([all_of_them[i] for i in sorted(picks)])
    return tuple(chosen)


def without_head(model: Model, layer: int, head: int) -> Callable[[str, np.ndarray], np.ndarray]:
    """Zeroes what a head adds: its columns of the output projection."""
    name = f"layers.{layer}.self_attn.o_proj.weight"
    size = model.config.text.layers[layer].head_dim

    def change(found: str, values: np.ndarray) -> np.ndarray:
        if found == name:
            values[:, head * size : (head + 1) * size] = 0
        return values

    return change


def without_expert(layer: int, expert: int) -> Callable[[str, np.ndarray], np.ndarray]:
    """Zeroes what an expert adds; it is still chosen."""
    name = f"layers.{layer}.experts.down_proj"

    def change(found: str, values: np.ndarray) -> np.ndarray:
        if found == name:
            values[expert] = 0
        return values

    return change


def mean_loss(model: Model, texts: Sequence[Text]) -> float:
    found = [losses(model.run(text.ids, logits="all").logits, text) for text in texts]
    return float(np.concatenate(found).mean())


def measure_ablations(
    source: str,
    copies: Copies,
    settings: Sequence[str],
    results: dict[str, Figures],
    texts: Sequence[Text],
    arguments: argparse.Namespace,
) -> dict[str, list[tuple[int, int]]]:
    """Fills heads and single_experts: the loss that taking each away costs, by setting."""
    model = gl.load(source, **REFERENCE)
    heads, experts = ablations(model, arguments.ablations, arguments.seed)
    rounded, _ = q4_0_names(source)

    def load(folder: Path, setting: str) -> Model:
        options = REFERENCE if setting == "float32" else SETTINGS[setting]
        return gl.load(folder, **options, embed_scale=arguments.embed_scale)

    def round_too(
        change: Callable[[str, np.ndarray], np.ndarray],
    ) -> Callable[[str, np.ndarray], np.ndarray]:
        def both(name: str, values: np.ndarray) -> np.ndarray:
            values = change(name, values)
            return measures.round_q4_0(values) if name in rounded else values

        return both

    changes: list[tuple[str, Callable[[str, np.ndarray], np.ndarray]]] = [("", lambda n, v: v)]
    changes += [("heads", without_head(model, *which)) for which in heads]
    changes += [("single_experts", without_expert(*which)) for which in experts]
    whole: dict[str, float] = {}
    for number, (kind, change) in enumerate(changes):
        progress(f"{source}: ablation {number} of {len(changes) - 1}")
        plain = copies.write(f"ablated-{number}", change)
        q4_0 = plain
        if any("q4_0" in setting for setting in settings):
            q4_0 = copies.write(f"ablated-q4_0-{number}", round_too(change))
        for setting in settings:
            loss = mean_loss(load(q4_0 if "q4_0" in setting else plain, setting), texts)
            if kind:
                getattr(results[setting], kind).append(loss - whole[setting])
            else:
                whole[setting] = loss
        for folder in {plain, q4_0}:
            shutil.rmtree(folder)
    return {"heads": heads, "experts": experts}


def evaluate(source: str, arguments: argparse.Namespace) -> dict[str, Any]:
    scale = arguments.embed_scale
    reference = gl.load(source, **REFERENCE, embed_scale=scale)
    if arguments.text is not None:
        texts = file_texts(reference, arguments.text, arguments.texts, arguments.length)
        origin = str(arguments.text)
    elif source in DEMOS:
        texts, origin = demo_texts(reference, arguments.texts, arguments.seed), "held-out tasks"
    else:
        texts = random_texts(reference, arguments.texts, arguments.length, arguments.seed)
        origin = "random ids"
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="gemloupe-quality-", dir=arguments.folder) as folder:
        copies = Copies(source, Path(folder))
        settings = [name for name in SETTINGS if name in arguments.settings]
        rounded = None
        if not copies.fits:
            notes.append("Q4_0 and ablations were left out: a float32 copy would exceed 4 GiB")
            settings = [name for name in settings if "q4_0" not in name]
        names, all_of_int4 = q4_0_names(source)
        if len(names) < all_of_int4:
            notes.append(
                "Q4_0 was left out: it needs rows of whole groups of 32, and "
                f"{all_of_int4 - len(names)} of {all_of_int4} int4 matrices have others"
            )
            settings = [name for name in settings if "q4_0" not in name]
        if any("q4_0" in name for name in settings):
            rounded = copies.write("q4_0", lambda n, v: measures.round_q4_0(v) if n in names else v)
            check_lattice(rounded, names, scale)
        results = {"float32": Figures()} | {name: Figures() for name in settings}
        for number, name in enumerate(results):
            progress(f"{source}: {name} ({number + 1} of {len(results)})")
            options = SETTINGS.get(name, REFERENCE)
            origin_of = rounded if "q4_0" in name and rounded is not None else source
            model = gl.load(origin_of, **options, embed_scale=scale)
            for text in texts:
                # The reference is computed anew for each: values of all texts may not fit.
                add(results[name], observe(reference, text.ids), observe(model, text.ids), text)
        ablated: dict[str, Any] = {}
        if copies.fits and arguments.ablations:
            few = texts[: arguments.ablation_texts]
            chosen = [n for n in results if "KV" not in n and "activations" not in n]
            ablated = measure_ablations(source, copies, chosen, results, few, arguments)
    return {
        "source": source,
        "embed_scale": scale,
        "texts": len(texts),
        "tokens": sum(len(text.ids) for text in texts),
        "scored": int(sum(text.scored.sum() for text in texts)),
        "text": origin,
        "ablated": ablated,
        "notes": notes,
        **bench.environment(reference.threads),
        "settings": {name: summary(found, results) for name, found in results.items()},
        "goals": goals(results),
    }


def summary(figures: Figures, results: dict[str, Figures]) -> dict[str, Any]:
    """All figures of a setting, with 95 % intervals where a goal needs them."""
    kl = np.concatenate(figures.kl)
    errors = np.concatenate(figures.errors, axis=1)
    result: dict[str, Any] = {
        "kl_mean": float(kl.mean()),
        "kl_interval": measures.mean_interval(figures.kl),
        "kl_p50": float(np.percentile(kl, 50)),
        "kl_p99": float(np.percentile(kl, 99)),
        "kl_max": float(kl.max()),
        "top1": float(np.concatenate(figures.top).mean()),
        "top1_interval": measures.mean_interval(figures.top),
        "perplexity": float(np.exp(np.concatenate(figures.losses).mean())),
        "resid_error": errors.mean(-1).tolist(),
        "resid_error_mean": float(errors.mean()),
        "resid_error_interval": measures.mean_interval([e.mean(0) for e in figures.errors]),
    }
    if figures.experts:
        result["same_experts"] = np.concatenate(figures.experts, axis=1).mean(-1).tolist()
        result["router_js"] = np.concatenate(figures.routing, axis=1).mean(-1).tolist()
    for kind in ("heads", "single_experts"):
        ours, theirs = getattr(figures, kind), getattr(results["float32"], kind)
        if len(ours) > 1:
            result[f"{kind}_rank_correlation"] = measures.rank_correlation(theirs, ours)
            result[f"{kind}_interval"] = measures.bootstrap(len(ours), correlation(theirs, ours))
    return result


def correlation(a: Sequence[float], b: Sequence[float]) -> Callable[[np.ndarray], float]:
    x, y = np.asarray(a), np.asarray(b)
    return lambda indices: measures.rank_correlation(x[indices].tolist(), y[indices].tolist())


# What int4 must not do worse than Q4_0 rounding: (name, values of each text, less is better).
COMPARED: list[tuple[str, Callable[[Figures], Sequence[np.ndarray]], bool]] = [
    ("mean KL", lambda f: f.kl, True),
    ("mean relative resid_post error", lambda f: [e.mean(0) for e in f.errors], True),
    ("top-1", lambda f: f.top, False),
    ("loss", lambda f: f.losses, True),
    ("same experts", lambda f: [e.mean(0) for e in f.experts], False),
    ("router JS", lambda f: [e.mean(0) for e in f.routing], True),
]
STRICT = ("mean KL", "mean relative resid_post error")  # The others within the 95 % interval.


def goals(results: dict[str, Figures]) -> list[dict[str, Any]]:
    """The issue's goals: int8's top-1, and int4 no worse than Q4_0 rounding."""
    found = []
    if "int8" in results:
        top = float(np.concatenate(results["int8"].top).mean())
        found.append({"goal": "int8 top-1 ≥ 99 %", "value": top, "met": top >= 0.99})
    for suffix in ("", ", float32 activations"):
        pair = ("int4" + suffix, "q4_0 rounding" + suffix)
        if all(name in results for name in pair):
            found += compared(pair, results["float32"], *(results[name] for name in pair))
    return found


def compared(
    pair: tuple[str, str], exact: Figures, int4: Figures, q4_0: Figures
) -> list[dict[str, Any]]:
    found = []
    for what, of, less in COMPARED:
        if not of(int4):
            continue
        values = [float(np.concatenate(of(f)).mean()) for f in (int4, q4_0)]
        differences = [a.astype(float) - b for a, b in zip(of(int4), of(q4_0), strict=True)]
        low, high = measures.mean_interval(differences)
        if what in STRICT:
            met = values[0] <= values[1]
        else:
            met = low <= 0 if less else high >= 0
        sign = "≤" if less else "≥"
        found.append(
            {
                "goal": f"{what}: {pair[0]} {sign} {pair[1]}"
                + ("" if what in STRICT else ", within 95 %"),
                "value": values,
                "difference_interval": (low, high),
                "met": bool(met),
            }
        )
    for kind in ("heads", "single_experts"):
        effects = [getattr(f, kind) for f in (exact, int4, q4_0)]
        if min(map(len, effects)) < 2:
            continue
        ours, theirs = (correlation(effects[0], other) for other in effects[1:])
        count = len(effects[0])

        def difference(indices: np.ndarray, a: Any = ours, b: Any = theirs) -> float:
            return float(a(indices) - b(indices))

        low, high = measures.bootstrap(count, difference)
        everything = np.arange(count)
        found.append(
            {
                "goal": f"rank correlation of {kind}: {pair[0]} ≥ {pair[1]}, within 95 %",
                "value": [ours(everything), theirs(everything)],
                "difference_interval": (low, high),
                "met": bool(high >= 0),
            }
        )
    return found


def report_text(report: dict[str, Any]) -> str:
    settings = report["settings"]
    head = ["against float32", "KL mean", "95 %", "p50", "p99", "max", "top-1", "95 %"]
    head += ["perplexity", "resid error, mean", "last layer", "heads ρ", "95 %"]
    routed = any("same_experts" in s for s in settings.values())
    if routed:
        head += ["experts ρ", "95 %", "same experts", "worst layer", "router JS"]
    rows = []
    for name, s in settings.items():
        row = [
            name,
            f"{s['kl_mean']:.2e}",
            interval(s["kl_interval"], ".1e"),
            f"{s['kl_p50']:.1e}",
            f"{s['kl_p99']:.1e}",
            f"{s['kl_max']:.1e}",
            f"{100 * s['top1']:.2f} %",
            interval([100 * x for x in s["top1_interval"]], ".2f"),
            f"{s['perplexity']:.4f}",
            f"{s['resid_error_mean']:.2e}",
            f"{s['resid_error'][-1]:.2e}",
            *correlation_cells(s, "heads"),
        ]
        if routed:
            row += [
                *correlation_cells(s, "single_experts"),
                f"{100 * np.mean(s['same_experts']):.1f} %",
                f"{100 * np.min(s['same_experts']):.1f} %",
                f"{np.mean(s['router_js']):.1e}",
            ]
        rows.append(row)
    ablated = report["ablated"]
    sampled = ", ".join(f"{len(which)} {kind}" for kind, which in ablated.items() if which)
    return "\n".join(
        [
            f"### {report['source']}: quality by dtype",
            "",
            f"- {report['texts']} texts ({report['text']}), {report['tokens']} tokens, of "
            f"which {report['scored']} predictions are scored; embed_scale "
            f"{report['embed_scale']}; {report['cpu']}, ISA {report['isa']}, gemloupe "
            f"{report['gemloupe']} at commit {report['commit'] or '-'}, {report['date']}",
            *([f"- ablated one at a time: {sampled}"] if sampled else []),
            *(f"- {note}" for note in report["notes"]),
            "",
            markdown(head, rows),
            "",
            *layer_table(settings, routed),
            "",
            *(
                f"- {'met' if goal['met'] else 'MISSED'}: {goal['goal']}: {shown(goal)}"
                for goal in report["goals"]
            ),
        ]
    )


def interval(values: Sequence[float], form: str) -> str:
    return f"{values[0]:{form}}–{values[1]:{form}}"


def shown(goal: dict[str, Any]) -> str:
    if "difference_interval" not in goal:
        return f"{100 * goal['value']:.2f} %"
    low, high = goal["difference_interval"]
    values = " and ".join(f"{value:.3e}" for value in goal["value"])
    return f"{values} (difference, 95 %: {low:.1e} to {high:.1e})"


def correlation_cells(setting: dict[str, Any], kind: str) -> list[str]:
    value = setting.get(f"{kind}_rank_correlation")
    if value is None:
        return ["-", "-"]
    return [f"{value:.3f}", interval(setting[f"{kind}_interval"], ".2f")]


def layer_table(settings: dict[str, Any], routed: bool) -> list[str]:
    """Errors by layer, and with experts the share of tokens with the same ones."""
    some = [name for name in settings if name != "float32" and "activations" not in name]
    layers = len(settings["float32"]["resid_error"])
    lines = ["Relative error of resid_post by layer:", ""]
    rows = [[name, *(f"{value:.1e}" for value in settings[name]["resid_error"])] for name in some]
    lines.append(markdown(["layer", *(str(i) for i in range(layers))], rows))
    if routed:
        count = len(settings["float32"]["same_experts"])
        for title, key, form in (
            (
                "Share of tokens with the same experts, by layer with experts:",
                "same_experts",
                ".3f",
            ),
            ("JS divergence of router probabilities:", "router_js", ".1e"),
        ):
            rows = [[name, *(f"{v:{form}}" for v in settings[name][key])] for name in some]
            lines += ["", title, ""]
            lines.append(markdown(["layer", *(str(i) for i in range(count))], rows))
    return lines


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="quality by dtype, against float32")
    parser.add_argument("checkpoints", nargs="*", default=list(DEMOS), metavar="CHECKPOINT")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what is read (UTF-8)")
    parser.add_argument("--texts", type=int, default=200, metavar="N", help="how many")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="tokens of each")
    parser.add_argument("--ablations", type=int, default=24, metavar="N", help="of each kind")
    parser.add_argument("--ablation-texts", type=int, default=40, metavar="N")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--embed-scale", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--folder", help="where copies are written for a while")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    arguments = parser.parse_args(argv)
    if min(arguments.texts, arguments.ablation_texts) < 1 or arguments.length < 2:
        parser.error("--texts and --ablation-texts are at least 1, --length at least 2")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    reports = []
    for source in arguments.checkpoints:
        reports.append(evaluate(source, arguments))
        print(report_text(reports[-1]) + "\n", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(reports, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sys.exit(f"quality: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
