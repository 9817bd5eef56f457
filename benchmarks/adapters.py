"""What LoRA adapters cost in decoding, alone, eight at once, and beside peers.

    python benchmarks/adapters.py CHECKPOINT [--packed FOLDER] [--rank 64] [--rounds 5]
        [--peers transformers llama.cpp] [--gguf FILE] [--llama-python PATH] [--json FILE]

CHECKPOINT is a transformers folder (random_checkpoint.py); --packed the same, as `gemloupe convert`
wrote it, which gemloupe then runs; --gguf the same sizes for llama.cpp (random_gguf.py). The
adapters are random and change all linear modules of every layer: their values cost nothing. Each
round runs every case once, in another order; ratios are of one round.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from workers import Worker, cell, markdown, progress, random_ids

import gemloupe as gl
from gemloupe import _core, bench
from gemloupe.checkpoint import open_checkpoint

ROWS = 8
# PEFT's module: (the engine's name, llama.cpp's tensor).
_MODULES = {
    "self_attn.q_proj": ("attn.q_proj", "attn_q"),
    "self_attn.k_proj": ("attn.k_proj", "attn_k"),
    "self_attn.v_proj": ("attn.v_proj", "attn_v"),
    "self_attn.o_proj": ("attn.o_proj", "attn_output"),
    "mlp.gate_proj": ("mlp.gate_proj", "ffn_gate"),
    "mlp.up_proj": ("mlp.up_proj", "ffn_up"),
    "mlp.down_proj": ("mlp.down_proj", "ffn_down"),
}


def random_pairs(
    model: gl.Model, rank: int, seed: int
) -> dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]:
    """(layer, PEFT's module) -> A [r, in], B [out, r]."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for layer in range(model.config.text.num_hidden_layers):
        for module, (name, _) in _MODULES.items():
            shape = _core.adapted_module_shape(model.core, layer, name)
            if shape is None:
                continue
            a = rng.normal(0, 0.02, size=(rank, shape[1])).astype(np.float32)
            b = rng.normal(0, 0.02, size=(shape[0], rank)).astype(np.float32)
            pairs[layer, module] = a, b
    return pairs


def write_peft(pairs: dict[Any, Any], rank: int, prefix: str, folder: Path) -> Path:
    """An adapter as PEFT saves it."""
    tensors = {}
    for (layer, module), (a, b) in pairs.items():
        base = f"base_model.model.{prefix}layers.{layer}.{module}"
        tensors[f"{base}.lora_A.weight"], tensors[f"{base}.lora_B.weight"] = a, b
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        # Towers have modules of these names, too.
        "target_modules": rf"{re.escape(prefix)}layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj",
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_gguf(pairs: dict[Any, Any], rank: int, path: Path) -> Path:
    """The same for llama.cpp, as its convert_lora_to_gguf lays it out."""
    import gguf

    writer = gguf.GGUFWriter(path, "gemma4")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(2 * rank))
    for (layer, module), (a, b) in pairs.items():
        base = f"blk.{layer}.{_MODULES[module][1]}.weight"
        writer.add_tensor(f"{base}.lora_a", a)
        writer.add_tensor(f"{base}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def decode_seconds(
    model: gl.Model, prompts: list[list[int]], adapters: list[str | None], new: int
) -> float:
    """Seconds of a decoded step of these rows together, the prompt not counted."""
    outs = model.generate(
        prompts,
        adapter=adapters,
        max_new_tokens=new,
        temperature=0,
        routing=False,
    )
    steps = max(out.timings.decode_tokens for out in outs)
    return max(out.timings.decode_seconds for out in outs) / steps


def measure_own(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = gl.load(
        arguments.packed or arguments.checkpoint, threads=arguments.threads, dtype=arguments.dtype
    )
    prefix = arguments.prefix
    nbytes = {}
    for rank, count in {arguments.rank: 1, arguments.batch_rank: ROWS}.items():
        for i in range(count):
            pairs = random_pairs(model, rank, i)
            path = write_peft(pairs, rank, prefix, folder / f"r{rank}-{i}")
            adapter = model.load_adapter(path, name=f"r{rank}-{i}")
            nbytes[rank] = adapter.nbytes
    vocab = model.config.text.vocab_size
    rows = [random_ids(16, vocab, [arguments.seed, i]) for i in range(ROWS)]
    one, many = f"r{arguments.rank}-0", [f"r{arguments.batch_rank}-{i}" for i in range(ROWS)]
    cases: dict[str, Callable[[], float]] = {
        "no adapter": lambda: decode_seconds(model, rows[:1], [None], arguments.new),
        f"rank {arguments.rank}": lambda: decode_seconds(model, rows[:1], [one], arguments.new),
        f"{ROWS} rows, no adapter": lambda: decode_seconds(
            model, rows, [None] * ROWS, arguments.new
        ),
        f"{ROWS} rows, one of rank {arguments.batch_rank}": lambda: decode_seconds(
            model, rows, [many[0]] * ROWS, arguments.new
        ),
        f"{ROWS} rows, {ROWS} of rank {arguments.batch_rank}": lambda: decode_seconds(
            model, rows, list(many), arguments.new
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for work in cases.values():
        work()
    for number in range(arguments.rounds):
        names = list(cases)
        for i in np.random.default_rng([arguments.seed, number]).permutation(len(names)):
            times[names[i]].append(cases[names[i]]())
        progress(f"round {number + 1}: " + ", ".join(f"{t[-1] * 1e3:.1f}" for t in times.values()))
    return {
        "dtype": model.dtype,
        "bytes": model.core.mapped_bytes + model.core.copied_bytes,
        "adapter_bytes": nbytes,
        "seconds": times,
    }


def measure_peer(
    name: str, arguments: argparse.Namespace, folder: Path, vocab: int
) -> dict[str, Any]:
    adapter = folder / f"r{arguments.rank}-0"
    if name == "llama.cpp":
        model = gl.load(arguments.checkpoint)
        write_gguf(random_pairs(model, arguments.rank, 0), arguments.rank, folder / "lora.gguf")
        adapter, python = folder / "lora.gguf", arguments.llama_python
        load = {"engine": name, "path": str(arguments.gguf), "threads": arguments.threads}
    else:
        python = arguments.peer_python
        load = {"engine": name, "path": str(arguments.checkpoint), "threads": arguments.threads}
        load["dtype"] = "bfloat16"
    times: dict[str, list[float]] = {}
    for case, option in {"no adapter": {}, "with it": {"adapter": str(adapter)}}.items():
        worker = Worker(f"{name}, {case}", python, {**load, **option})
        try:
            worker.load()
            worker.prefill(random_ids(16, vocab, [arguments.seed, 0]))
            worker.decode(random_ids(2, vocab, [arguments.seed, 1]))
            times[case] = []
            for number in range(arguments.rounds):
                ids = random_ids(arguments.new, vocab, [arguments.seed, 2, number])
                times[case].append(statistics.mean(worker.decode(ids)))
            progress(f"{name}, {case}: {1e3 * statistics.median(times[case]):.1f} ms a token")
        finally:
            worker.close()
    return times


def report_text(report: dict[str, Any]) -> str:
    seconds = report["own"]["seconds"]
    names = list(seconds)
    base = {names[1]: names[0], names[3]: names[2], names[4]: names[3]}
    rows = []
    for name, times in seconds.items():
        compared = seconds[base[name]] if name in base else []
        ratios = [b / a for a, b in zip(compared, times, strict=bool(compared))]
        rows.append(
            [
                f"gemloupe {report['own']['dtype']}, {name}",
                cell([1e3 * t for t in times], 1),
                f"{cell(ratios)} of {base[name]}" if ratios else "",
            ]
        )
    for peer, times in report["peers"].items():
        plain, adapted = times["no adapter"], times["with it"]
        rows.append([f"{peer}, no adapter", cell([1e3 * t for t in plain], 1), ""])
        ratio = statistics.median(adapted) / statistics.median(plain)
        rows.append(
            [f"{peer}, rank {report['rank']}", cell([1e3 * t for t in adapted], 1), f"{ratio:.2f}"]
        )
    weights = report["own"]["bytes"] / 1e9
    held = ", ".join(
        f"rank {rank}: {n / 1e6:.0f} MB" for rank, n in report["own"]["adapter_bytes"].items()
    )
    return "\n".join(
        [
            f"- {report['cpu']}, {report['threads']} threads, ISA {report['isa']}, gemloupe "
            f"{report['gemloupe']} at commit {report['commit'] or '-'}, {report['date']}",
            f"- weights of the file {weights:.2f} GB; adapters ({held}) on all linear modules; "
            f"median (minimum–maximum) of {report['rounds']} rounds of {report['new']} tokens",
            "",
            markdown(["case", "ms a step", "ratio"], rows),
        ]
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what adapters cost")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--packed", type=Path, metavar="FOLDER", help="what gemloupe runs")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch-rank", type=int, default=8, help="of the eight adapters")
    parser.add_argument("--new", type=int, default=24, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--threads", type=int, default=_core.available_cpus(), metavar="N")
    parser.add_argument("--peers", nargs="*", choices=["transformers", "llama.cpp"], default=[])
    parser.add_argument("--peer-python", default=sys.executable, metavar="FILE")
    parser.add_argument("--gguf", type=Path, metavar="FILE")
    parser.add_argument("--llama-python", metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    arguments = parser.parse_args(argv)
    if arguments.rank == arguments.batch_rank or min(arguments.rounds, arguments.new) < 2:
        parser.error("--rank and --batch-rank differ; --rounds and --new are at least 2")
    if "llama.cpp" in arguments.peers and not (arguments.gguf and arguments.llama_python):
        parser.error("llama.cpp needs --gguf and --llama-python")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    checkpoint = open_checkpoint(str(arguments.checkpoint))
    # PEFT's names follow the class of the checkpoint.
    text_only = "ForCausalLM" in checkpoint.config.architecture
    arguments.prefix = "model." if text_only else "model.language_model."
    with tempfile.TemporaryDirectory(prefix="gemloupe-adapters-") as folder:
        own = measure_own(arguments, Path(folder))
        vocab = checkpoint.config.text.vocab_size
        peers = {
            name: measure_peer(name, arguments, Path(folder), vocab) for name in arguments.peers
        }
    report = {
        **bench.environment(arguments.threads),
        "rank": arguments.rank,
        "rounds": arguments.rounds,
        "new": arguments.new,
        "own": own,
        "peers": peers,
    }
    print(report_text(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
