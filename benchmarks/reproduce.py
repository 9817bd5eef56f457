"""All tables for a checkpoint that you hold: fidelity, quality and speed, beside its peers.

    python benchmarks/reproduce.py --checkpoint FOLDER [--gguf FILE --llama-python PYTHON]
        [--text FILE] [--folder DIR] [--json FILE]

gemloupe's own tables are of random or demo weights, as the released ones may not be passed on.
This runs the same measurements on real ones and prints them with hashes of all files and all
versions. Fidelity compares with transformers, in float32 where it fits in memory. What does not fit
or was not given is left out, and the output says so.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.metadata
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compare_llama_cpp as compare
import measures
import numpy as np
import quality
import text_speed
from workers import Worker, cell, in_turns, markdown, progress

import gemloupe as gl
from gemloupe import _core, bench, sizes
from gemloupe.checkpoint import Checkpoint, open_checkpoint

PARTS = ("fidelity", "quality", "speed")


def file_hashes(paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of whole files, by name."""
    found = {}
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(16 << 20):
                digest.update(block)
        found[path.name] = digest.hexdigest()
    return found


def versions() -> dict[str, str]:
    names = ("numpy", "tokenizers", "transformers", "torch", "gguf")
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def transformers_fits(checkpoint: Checkpoint, dtype: str) -> str:
    """Returns "" or why transformers is left out."""
    if checkpoint.is_gguf or not (checkpoint.folder / "config.json").is_file():
        return "transformers was left out: it needs a checkpoint folder"
    return text_speed.fits(text_speed.Line("transformers", dtype), checkpoint)


def reference_values(
    checkpoint: Checkpoint, dtype: str, texts: Sequence[list[int]]
) -> list[dict[str, np.ndarray]]:
    """logits [T, V] and resid [L, T, D] of transformers' eager classes."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    raw = json.loads((checkpoint.folder / "config.json").read_text())
    model_class = getattr(transformers, raw["architectures"][0])
    model = model_class.from_pretrained(
        checkpoint.folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()
    decoder = getattr(model.model, "language_model", model.model)
    resid: list[np.ndarray] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        # A copy: later layers write in place.
        resid.append(value.detach().reshape(-1, value.shape[-1]).float().clone().numpy())

    for layer in decoder.layers:
        layer.register_forward_hook(keep)
    found = []
    with torch.inference_mode():
        for ids in texts:
            resid.clear()
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            found.append({"logits": logits.float().numpy(), "resid": np.stack(resid)})
    return found


def fidelity(checkpoint: Checkpoint, source: str, texts: Sequence[list[int]]) -> dict[str, Any]:
    """gemloupe beside transformers, in the widest dtype that fits; {"note": why} if none does."""
    reasons = []
    for dtype in ("float32", "bfloat16"):
        reason = transformers_fits(checkpoint, dtype)
        if not reason:
            break
        reasons.append(reason)
    else:
        return {"note": "; ".join(reasons)}
    try:
        expected = reference_values(checkpoint, dtype, texts)
    except ImportError as error:
        return {"note": f"transformers was left out: {error}"}
    gc.collect()
    model = gl.load(source, dtype)
    kl, top, errors, differences = [], [], [], []
    for ids, values in zip(texts, expected, strict=True):
        found = quality.observe(model, ids)
        kl.append(measures.kl_divergence(values["logits"], found["logits"]))
        top.append(measures.same_top(values["logits"], found["logits"]))
        errors.append(measures.relative_error(values["resid"], found["resid"]))
        differences.append(float(np.abs(values["logits"] - found["logits"]).max()))
    by_layer = np.concatenate(errors, axis=1).mean(-1)
    return {
        "dtype": dtype,
        "texts": len(texts),
        "tokens": sum(map(len, texts)),
        "kl_mean": float(np.concatenate(kl).mean()),
        "kl_max": float(np.concatenate(kl).max()),
        "top1": float(np.concatenate(top).mean()),
        "logits_difference_max": max(differences),
        "resid_error": by_layer.tolist(),
        "notes": reasons,
    }


def speed(arguments: argparse.Namespace, checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """Rates of gemloupe by dtype and of the peers, loaded anew in each round."""
    threads = arguments.threads
    source = checkpoint.source if checkpoint.is_gguf else str(checkpoint.folder)
    options = compare.parse(["E2B", "--threads", str(threads), "--seed", str(arguments.seed)])
    options.prompt = options.warm = arguments.prompt
    options.new = arguments.new
    options.try_prompt = min(arguments.prompt, compare.TRY_PROMPT)
    options.llama_python = arguments.llama_python
    vocab = checkpoint.config.text.vocab_size
    notes: list[str] = []
    lines: list[compare.Line] = []
    if arguments.gguf is not None:
        compare.read_once(arguments.gguf)
        lines += compare.choose_peers(arguments.gguf, options, vocab, notes)
    else:
        notes.append("llama.cpp was left out: give --gguf, and --llama-python where it is")
    for dtype in ("bfloat16", "float32"):
        if reason := transformers_fits(checkpoint, dtype):
            notes.append(reason)
            continue
        load = {"engine": "transformers", "path": source, "threads": threads, "dtype": dtype}
        lines.append(compare.Line(f"transformers {dtype}", source, sys.executable, load))
    packed = folder / "packed-int4"
    if checkpoint.provenance is not None:
        packed = Path(source)
    elif not packed.exists():
        gl.convert(source, packed)
    ours = [("int4", str(packed))]
    ours += [("auto", source)] if checkpoint.provenance is None else []
    if arguments.gguf is not None:
        ours.append(("same GGUF file", str(arguments.gguf)))
    for name, path in ours:
        needed = sizes.resident_bytes(open_checkpoint(path), "auto")
        if needed + compare.SPARE_BYTES > _core.available_memory():
            notes.append(f"gemloupe {name} was left out: {needed / 1e9:.1f} GB do not fit")
            continue
        load = {"engine": "gemloupe", "path": path, "threads": threads, "dtype": "auto"}
        lines.append(compare.Line(f"gemloupe {name}", path, sys.executable, load))
    bandwidths = []
    for number in range(arguments.rounds):
        bandwidths.append(bench.read_bandwidth(threads))
        for name in in_turns([line.name for line in lines], number):
            line = next(line for line in lines if line.name == name)
            compare.read_once(Path(line.path))
            with Worker(line.name, line.python, line.load) as worker:
                compare.measure(line, worker, options, vocab, number)
            progress(f"round {number + 1}: {name}: pp {line.prefill[-1]:.2f}, "
                     f"tg {line.decode[-1]:.2f}")  # fmt: skip
    return {
        "prompt": arguments.prompt,
        "new": arguments.new,
        "rounds": arguments.rounds,
        "bandwidths": bandwidths,
        "notes": notes,
        "lines": [vars(line) for line in lines],
    }


def speed_text(report: dict[str, Any]) -> str:
    head = ["engine", "load, s", f"prefill {report['prompt']}, tok/s", "decode, tok/s"]
    head += ["peak RSS, GiB", "int4's prefill", "int4's decode"]
    best = next((line for line in report["lines"] if line["name"] == "gemloupe int4"), None)
    rows = []
    for line in report["lines"]:
        row = [line["name"], cell(line["load_seconds"], 3), cell(line["prefill"])]
        row += [cell(line["decode"]), f"{max(line['peak_rss']) / 2**30:.2f}"]
        for kind in ("prefill", "decode"):
            of = statistics.median(line[kind])
            row.append("-" if best is None else f"{statistics.median(best[kind]) / of:.2f}x")
        rows.append(row)
    flags = [
        f"- {line['name']} ran with {compare.flags(line['contexts'])}"
        for line in report["lines"]
        if line["contexts"]
    ]
    heading = (
        f"- decoded {report['new']} tokens after the prompt; median (minimum–maximum) of "
        f"{report['rounds']} rounds; read bandwidth "
        f"{cell([b / 1e9 for b in report['bandwidths']], 1)} GB/s"
    )
    notes = [f"- {note}" for note in report["notes"]]
    return "\n".join([heading, *flags, *notes, "", markdown(head, rows)])


def fidelity_text(report: dict[str, Any]) -> str:
    if "note" in report:
        return f"- {report['note']}"
    rows = [
        ["KL, mean and max", f"{report['kl_mean']:.2e}, {report['kl_max']:.2e}"],
        ["top-1", f"{100 * report['top1']:.2f} %"],
        ["largest difference of logits", f"{report['logits_difference_max']:.2e}"],
        ["resid_post, relative error: first layer", f"{report['resid_error'][0]:.2e}"],
        ["resid_post, relative error: last layer", f"{report['resid_error'][-1]:.2e}"],
    ]
    head = [f"{report['dtype']}, {report['texts']} texts, {report['tokens']} tokens", "value"]
    notes = [f"- {note}" for note in report["notes"]]
    return "\n".join([*notes, "", markdown(head, rows)])


def reproduce(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(arguments.checkpoint)
    paths = [*checkpoint.files]
    paths += [p for p in [checkpoint.folder / "config.json"] if not checkpoint.is_gguf]
    paths += [arguments.gguf] if arguments.gguf is not None else []
    progress("hashing the files")
    report: dict[str, Any] = {
        **bench.environment(arguments.threads),
        "versions": versions(),
        "checkpoint": checkpoint.source,
        "model": text_speed.describe(checkpoint),
        "sha256": file_hashes(paths),
    }
    head = [
        f"## {report['model']}",
        "",
        f"- {report['cpu']}, {report['threads']} threads, ISA {report['isa']}, {report['date']}",
        f"- gemloupe {report['gemloupe']} at commit {report['commit'] or '-'}, oneDNN "
        f"{report['onednn']}; " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()),
        *(f"- {name}: sha256 {digest}" for name, digest in report["sha256"].items()),
    ]
    print("\n".join(head), flush=True)
    scored = quality.parse(
        [arguments.checkpoint, "--texts", str(arguments.texts), "--length", str(arguments.length),
         "--ablations", str(arguments.ablations), "--folder", str(folder),
         *(["--text", str(arguments.text)] if arguments.text else [])]
    )  # fmt: skip
    if "fidelity" in arguments.parts:
        report["fidelity"] = fidelity(
            checkpoint, arguments.checkpoint, fidelity_texts(checkpoint, arguments)
        )
        print(f"\n### Fidelity: transformers\n\n{fidelity_text(report['fidelity'])}", flush=True)
        gc.collect()
    if "quality" in arguments.parts:
        if checkpoint.provenance is not None:
            report["quality"] = {"note": "left out: the checkpoint is packed already"}
            print(f"\n### Quality\n\n- {report['quality']['note']}", flush=True)
        else:
            report["quality"] = quality.evaluate(arguments.checkpoint, scored)
            print(f"\n{quality.report_text(report['quality'])}", flush=True)
        gc.collect()
    if "speed" in arguments.parts:
        report["speed"] = speed(arguments, checkpoint, folder)
        print(f"\n### Speed\n\n{speed_text(report['speed'])}", flush=True)
    return report


def fidelity_texts(checkpoint: Checkpoint, arguments: argparse.Namespace) -> list[list[int]]:
    """A few texts: --text if given, else random ids."""
    count, length = min(4, arguments.texts), arguments.length
    if arguments.text is not None:
        ids = checkpoint.new_tokenizer().encode(arguments.text.read_text("utf-8"), bos=False)
        windows = [[2, *ids[i : i + length - 1]] for i in range(0, len(ids), length - 1)]
        return windows[:count]
    vocab = checkpoint.config.text.vocab_size
    random = np.random.default_rng(arguments.seed)
    first = min(300, vocab // 2)
    return [[2, *random.integers(first, vocab, length - 1).tolist()] for _ in range(count)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="all tables for a checkpoint that you hold")
    parser.add_argument("--checkpoint", required=True, help="a checkpoint folder")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same model, for llama.cpp")
    parser.add_argument("--llama-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what is read (UTF-8)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path, help="where the packed file is made, and stays")
    parser.add_argument("--texts", type=int, default=32, metavar="N")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="tokens of each text")
    parser.add_argument("--ablations", type=int, default=8, metavar="N")
    parser.add_argument("--prompt", type=int, default=512, metavar="N")
    parser.add_argument("--new", type=int, default=32, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--threads", type=int, default=_core.available_cpus(), metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    arguments = parser.parse_args(argv)
    if min(arguments.texts, arguments.rounds, arguments.new, arguments.threads) < 1:
        parser.error("--texts, --rounds, --new and --threads are at least 1")
    if min(arguments.prompt, arguments.length) < 2:
        parser.error("--prompt and --length are at least 2")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.folder is None:
        with tempfile.TemporaryDirectory(prefix="gemloupe-reproduce-", dir=".") as folder:
            report = reproduce(arguments, Path(folder))
    else:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        report = reproduce(arguments, arguments.folder)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sys.exit(f"reproduce: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
