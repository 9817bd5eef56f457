"""Writes a released model's packed checkpoint with random weights, as `gemloupe convert` would.

    python benchmarks/random_packed.py 31B FOLDER [--dtype int4] [--vocab N] [--layers N]

For measuring speed, memory and loading of models whose bfloat16 weights do not fit on the disk. The
engine's own writer lays the file out; its tensors come from runs of random blocks in a temporary
file beside the folder, so that only their places differ. Activations stay finite; tokens mean
nothing, and there is no tokenizer: prompts are ids.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from random_checkpoint import PREFIX, Tensor, check_space, model_config, plan_tensors

from gemloupe import _core, conversion, packed, recipe
from gemloupe.config import parse_config
from gemloupe.progress import ProgressBar
from gemloupe.variants import VARIANTS

# A prime: rows of a matrix begin at different places of the run, so that no two are equal.
RUN_RECORDS = 65_537
PLACES = 64  # Tensors begin at one of so many records.
PANEL_ROWS, TILE = 16, 64  # csrc/kernels/packed_layout.h


@dataclass(frozen=True)
class Layout:
    """How a quantised dtype repeats: `scales` float16 numbers, then random bytes."""

    scales: int
    integers: int
    std: float
    """Of the integers, minus their zero, when all are equally likely."""

    @property
    def nbytes(self) -> int:
        return 2 * self.scales + self.integers


LAYOUTS = {
    "int4": Layout(32, 512, 16 / math.sqrt(12)),
    "int6": Layout(32, 768, 64 / math.sqrt(12)),
    "int8": Layout(32, 1024, 256 / math.sqrt(12)),
    "q8_0": Layout(1, 32, 256 / math.sqrt(12)),
}


def random_run(dtype: str, mean: float, std: float, random: np.random.Generator) -> np.ndarray:
    """Returns uint8 [RUN_RECORDS, bytes of a record], or of single numbers where plain."""
    if dtype == "float32":
        values = mean + std * random.standard_normal((RUN_RECORDS, 1))
        return values.astype(np.float32).view(np.uint8)
    layout = LAYOUTS[dtype]
    run = random.integers(0, 256, (RUN_RECORDS, layout.nbytes), np.uint8)
    if dtype == "int4":  # -7 to 7, which has mean 0: a mean would show in every token alike.
        run[run & 15 == 0] |= 8
        run[run >> 4 == 0] |= 128
    width = random.uniform(0.5, 1.5, (RUN_RECORDS, layout.scales)) * std / layout.std
    run[:, : 2 * layout.scales] = width.astype(np.float16).view(np.uint8)
    return run


def write_scratch(path: Path, run: np.ndarray, nbytes: int) -> None:
    """Repeats the run until the file has `nbytes`."""
    whole = run.tobytes()
    with path.open("wb") as file:
        for _ in range(nbytes // len(whole)):
            file.write(whole)
        file.write(whole[: nbytes % len(whole)])


def fill(
    weights: _core.Weights,
    tensors: Sequence[Tensor],
    targets: dict[str, str],
    scratch: Path,
    seed: int,
) -> None:
    """Adds every tensor as a part of a scratch file of its dtype and width."""
    random = np.random.default_rng(seed)
    groups: dict[tuple[str, float, float], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((targets[tensor.name], tensor.mean, tensor.std), []).append(tensor)
    for number, ((dtype, mean, std), members) in enumerate(groups.items()):
        run = random_run(dtype, mean, std, random)
        step = run.shape[1]
        sizes = [_core.tensor_bytes(dtype, tensor.shape) for tensor in members]
        path = scratch / f"{number}-{dtype}"
        # The engine looks at tensors of any dtype at multiples of 64 bytes.
        align = step * 64 // math.gcd(step, 64)
        write_scratch(path, run, max(sizes) + PLACES * align)
        for tensor, size in zip(members, sizes, strict=True):
            begin = int(random.integers(PLACES)) * align
            entry = _core.TensorEntry(tensor.name, dtype, list(tensor.shape), begin, begin + size)
            weights.add_file(str(path), [entry])  # One by one: they overlap.


def check_shapes(tensors: Sequence[Tensor], targets: dict[str, str]) -> None:
    """ValueError where a panel or tile would have padding, which must be zero."""
    for tensor in tensors:
        if targets[tensor.name] not in ("int4", "int6", "int8"):
            continue
        rows, cols = tensor.shape[-2:]
        if rows % PANEL_ROWS or cols % TILE:
            raise ValueError(
                f"{tensor.name} has {rows} x {cols} elements; expected multiples of {PANEL_ROWS} "
                f"and {TILE}. Give --vocab a multiple of {PANEL_ROWS}."
            )


def write_packed(
    variant: str,
    folder: Path,
    *,
    dtype: str = "int4",
    vocab: int | None = None,
    layers: int | None = None,
    seed: int = 0,
) -> int:
    """Writes the folder and returns the bytes of its weight file. Nothing is left after a failure.

    Raises ValueError (an impossible cut, a name in use) and OSError (no space).
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; give another name")
    raw = model_config(variant, "bfloat16", vocab, layers)
    tensors = plan_tensors(raw)
    shapes = {t.name.removeprefix(PREFIX): ("bfloat16", t.shape) for t in tensors}
    matrices = recipe.targets(dtype, shapes)
    targets = {PREFIX + name: matrices.get(name, "float32") for name in shapes}
    check_shapes(tensors, targets)
    sizes = [_core.tensor_bytes(targets[tensor.name], tensor.shape) for tensor in tensors]
    # Scratch files are no longer than the largest tensors of each kind.
    check_space(folder, sum(sizes) + 2 * max(sizes))
    parse_config(raw, "config.json")
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".gemloupe-random-", dir=folder.parent))
    try:
        with conversion._partial_folder(folder.parent) as partial:
            weights = _core.Weights()
            fill(weights, tensors, targets, scratch, seed)
            names = [(t.name, t.name == PREFIX + recipe.TABLE) for t in tensors]
            with ProgressBar(f"writing random {dtype} weights") as bar:
                _core.write_packed(
                    weights,
                    str(partial / packed.FILE_NAME),
                    names,
                    json.dumps(provenance(variant, dtype, raw, seed)),
                    0,
                    bar.show,
                )
            write_configs(partial, raw)
            conversion._sync(partial)
            conversion._publish(partial, folder)
        (folder / conversion._LOCK).unlink(missing_ok=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return (folder / packed.FILE_NAME).stat().st_size


def provenance(variant: str, dtype: str, raw: dict[str, object], seed: int) -> dict[str, object]:
    text = json.dumps([raw, dtype, seed], sort_keys=True)
    return {
        "dtype": dtype,
        "recipe": {"default": dtype},
        "embed_scale": "bfloat16",
        "source": f"random {variant}",
        "source_hash": hashlib.sha256(text.encode()).hexdigest(),
        "source_dtype": "bfloat16",
        "gemloupe": _core.__version__,
    }


def write_configs(folder: Path, raw: dict[str, object]) -> None:
    end_ids = raw["eos_token_id"]
    generation = {
        "bos_token_id": 2,
        "pad_token_id": 0,
        "eos_token_id": end_ids,
        "suppress_tokens": end_ids,  # Random weights would end where they like.
    }
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="writes a packed checkpoint of random weights")
    parser.add_argument("variant", choices=list(VARIANTS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=["int4", "int8"], default="int4")
    parser.add_argument("--vocab", type=int, metavar="N", help="cut the vocabulary to N tokens")
    parser.add_argument("--layers", type=int, metavar="N", help="cut the model to N layers")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that partial files are removed.
    try:
        total = write_packed(**vars(arguments))
    except (ValueError, OSError) as error:
        print(f"random_packed: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{arguments.folder}: {total:,} bytes of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
