"""What decoding with a drafter costs and gains, by how often its guesses are right.

    python benchmarks/drafts.py MODEL [--variant E2B] [--depth 256] [--rounds 7] [--json FILE]

MODEL is a packed checkpoint (random_packed.py). A random drafter of the released size is made for
it; what it guesses is never right, so the times of its guesses and of passes that check 1 to 7 of
them are measured, and the tokens a second follow for each acceptance: guesses of a pass are taken
to be right independently, and as many are made as give the most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from workers import cell, markdown, progress, random_ids

import gemloupe as gl
from gemloupe import _core, bench, drafter

ACCEPTANCES = (0.5, 0.6, 0.7, 0.8, 0.9)
# hidden, intermediate, heads, ordered embeddings, of the released drafters.
SIZES = {
    "E2B": (256, 2048, 4, True),
    "E4B": (256, 2048, 4, True),
    "12B": (1024, 8192, 16, False),
    "26B-A4B": (1024, 8192, 16, False),
    "31B": (1024, 8192, 32, False),
}
CLUSTERS, CHOSEN = 2048, 32


def random_drafter(model: gl.Model, variant: str, folder: Path) -> Path:
    """Writes a drafter of the released size with random float16 weights."""
    hidden, intermediate, heads, ordered = SIZES[variant]
    text = model.config.text
    kinds = {layer.kind: layer for layer in text.layers}
    full, sliding = kinds["full"], kinds["sliding"]
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(np.float16) * np.float16(0.02)

    tensors = {
        "pre_projection.weight": matrix(hidden, 2 * text.hidden_size),
        "post_projection.weight": matrix(text.hidden_size, hidden),
        "model.embed_tokens.weight": matrix(text.vocab_size, hidden),
        "model.norm.weight": np.ones(hidden, np.float16),
    }
    for index in range(4):
        layer = full if index == 3 else sliding
        base = f"model.layers.{index}."
        width = heads * layer.head_dim
        tensors[base + "self_attn.q_proj.weight"] = matrix(width, hidden)
        tensors[base + "self_attn.q_norm.weight"] = np.ones(layer.head_dim, np.float16)
        tensors[base + "self_attn.o_proj.weight"] = matrix(hidden, width)
        for name, shape in {
            "gate": (intermediate, hidden),
            "up": (intermediate, hidden),
            "down": (hidden, intermediate),
        }.items():
            tensors[f"{base}mlp.{name}_proj.weight"] = matrix(*shape)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            tensors[f"{base}{name}_layernorm.weight"] = np.ones(hidden, np.float16)
        tensors[base + "layer_scalar"] = np.ones(1, np.float16)
    if ordered:
        tensors["masked_embedding.centroids.weight"] = matrix(CLUSTERS, hidden)
        tensors["masked_embedding.token_ordering"] = rng.permutation(text.vocab_size)
    unified = model.config.model_type.startswith("gemma4_unified")
    source = model.config.raw.get("text_config", model.config.raw)
    kept = ("rope_parameters", "sliding_window", "max_position_embeddings", "vocab_size")
    config = {
        "model_type": "gemma4_unified_assistant" if unified else "gemma4_assistant",
        "backbone_hidden_size": text.hidden_size,
        "use_ordered_embeddings": ordered,
        "num_centroids": CLUSTERS,
        "centroid_intermediate_top_k": CHOSEN,
        "text_config": {name: source[name] for name in kept if name in source}
        | {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": 4,
            "num_attention_heads": heads,
            "num_key_value_heads": sliding.num_kv_heads,
            "num_global_key_value_heads": full.num_kv_heads,
            "attention_k_eq_v": full.values_are_keys,
            "head_dim": sliding.head_dim,
            "global_head_dim": full.head_dim,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": None,
            "rms_norm_eps": text.rms_norm_eps,
        },
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = gl.load(arguments.model, threads=arguments.threads)
    guesser = model.load_drafter(random_drafter(model, arguments.variant, folder / "drafter"))
    vocab = model.config.text.vocab_size
    ids = random_ids(arguments.depth, vocab, [arguments.seed, 0])
    cache = model.run(ids, logits=None, routing=False).cache
    hidden = np.random.default_rng(1).standard_normal(model.config.text.hidden_size)
    hidden = hidden.astype(np.float32)

    def check(rows: int) -> float:
        """Seconds of a pass over `rows` tokens whose logits are all wanted."""
        fork = cache.fork().core
        begin = time.perf_counter()
        model.core.run(ids[:rows], fork, 0, rows, None, None, _core.DEFAULT_CHUNK)
        return time.perf_counter() - begin

    def guess(count: int) -> float:
        begin = time.perf_counter()
        guesser.core.draft(model.core, cache.core, 5, hidden, count)
        return time.perf_counter() - begin

    checks: dict[int, list[float]] = {n: [] for n in range(1, drafter.MOST_TOKENS + 2)}
    guesses: list[float] = []
    for rows in checks:
        check(rows)
    guess(4)
    for number in range(arguments.rounds):
        for rows in np.random.default_rng([arguments.seed, number]).permutation(list(checks)):
            checks[int(rows)].append(check(int(rows)))
        guesses.append(guess(4) / 4)
        progress(f"round {number + 1}: " + ", ".join(f"{t[-1] * 1e3:.1f}" for t in checks.values()))
    return {"checks": checks, "guess": guesses, "bytes": guesser.core.mapped_bytes}


def best(found: dict[str, Any], acceptance: float) -> tuple[int, float]:
    """The number of guesses that gives the most tokens a second, and how many these are."""
    guess = statistics.median(found["guess"])
    rates = {}
    for rows, times in found["checks"].items():
        count = int(rows) - 1
        tokens = sum(acceptance**i for i in range(count + 1))
        rates[count] = tokens / (statistics.median(times) + count * guess)
    count = max(rates, key=lambda n: rates[n])
    return count, rates[count]


def report_text(report: dict[str, Any]) -> str:
    found = report["found"]
    alone = statistics.median(found["checks"][1])
    rows = [
        [str(n), cell([1e3 * t for t in times], 1), f"{statistics.median(times) / alone:.2f}"]
        for n, times in found["checks"].items()
    ]
    gains = []
    for acceptance in ACCEPTANCES:
        count, rate = best(found, acceptance)
        gains.append([f"{acceptance:.1f}", str(count), f"{rate:.2f}", f"{rate * alone:.2f}x"])
    return "\n".join(
        [
            f"- {report['cpu']}, {report['threads']} threads, ISA {report['isa']}, gemloupe "
            f"{report['gemloupe']} at commit {report['commit'] or '-'}, {report['date']}",
            f"- {report['depth']} tokens before; median (minimum–maximum) of {report['rounds']} "
            f"rounds; a guess takes {cell([1e3 * t for t in found['guess']], 2)} ms "
            f"({found['bytes'] / 1e6:.0f} MB of weights)",
            "",
            markdown(["rows of a pass", "ms", "of one row"], rows),
            "",
            markdown(["right guesses", "guesses a pass", "tok/s", "of none"], gains),
        ]
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="decoding with a drafter")
    parser.add_argument("model")
    parser.add_argument("--variant", choices=list(SIZES), default="E2B")
    parser.add_argument("--depth", type=int, default=256, metavar="N")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--threads", type=int, default=_core.available_cpus(), metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    with tempfile.TemporaryDirectory(prefix="gemloupe-drafts-") as folder:
        found = measure(arguments, Path(folder))
    report = {
        **bench.environment(arguments.threads),
        "depth": arguments.depth,
        "rounds": arguments.rounds,
        "found": found,
    }
    print(report_text(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
