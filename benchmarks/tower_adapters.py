"""What LoRA adapters cost in encoding: all linears of 26B-A4B's vision tower, of E2B's audio tower.

    python benchmarks/tower_adapters.py FOLDER [--rank 64] [--rounds 5] [--size 768] [--seconds 30]

FOLDER gets the random weights of vision_tower.py and audio_tower.py (3.4 GB in float32) unless it
has them. A is random and B zero, so that the soft tokens must keep their bits, which is checked.
Each round encodes without and with the adapter, in turn; ratios are of one round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import audio_tower
import numpy as np
import vision_tower

import gemloupe as gl
from gemloupe import _core
from gemloupe.adapters.modules import tower_modules
from gemloupe.safetensors_header import read_header

Mix = Iterable[tuple[_core.Adapter, float]]


def adapter(shapes: Mapping[str, tuple[int, ...]], rank: int) -> _core.Adapter:
    """Random A and zero B of every module of a tower, in bfloat16."""
    rng = np.random.default_rng(0)
    core = _core.Adapter(gl.load("demo:edge").core, "bfloat16")  # Sizes of towers are their own.
    for module in tower_modules(shapes).values():
        a = rng.normal(0, 0.02, (rank, module.inputs)).astype(np.float32)
        core.add(module.layer, module.name, a, np.zeros((module.outputs, rank), np.float32), 1.0)
    return core


def vision(arguments: argparse.Namespace) -> tuple[Callable[[Mix], np.ndarray], _core.Adapter]:
    path = arguments.folder / vision_tower.FILE
    if not path.is_file():
        vision_tower.write_weights(path, "float32")
    encode = vision_tower.gemloupe_encoder(path, arguments.threads)
    image = vision_tower.picture(arguments.size)
    shapes = vision_tower.shapes(vision_tower.tower())
    return lambda mix: encode(image, mix), adapter(shapes, arguments.rank)


def audio(arguments: argparse.Namespace) -> tuple[Callable[[Mix], np.ndarray], _core.Adapter]:
    path = arguments.folder / f"float32-{audio_tower.FILE}"
    if not path.is_file():
        audio_tower.write_weights(path, "float32")
    tower = audio_tower.gemloupe_tower(path, arguments.threads)
    features = tower.ears.features(tower.ears.read(audio_tower.sound(arguments.seconds)))
    shapes = {info.name: tuple(info.shape) for info in read_header(path)}

    def encode(mix: Mix) -> np.ndarray:
        return tower.core.encode(features, _core.AudioState(), True, None, list(mix))

    return encode, adapter(shapes, arguments.rank)


def measure(encode: Callable[[Mix], np.ndarray], core: _core.Adapter, rounds: int) -> list[str]:
    """The cells of a row: MB, seconds without and with the adapter, their ratio."""
    cases: dict[str, Mix] = {"without": (), "with": ((core, 1.0),)}
    tokens = {name: encode(mix) for name, mix in cases.items()}
    if not np.array_equal(tokens["without"], tokens["with"]):
        raise SystemExit("an adapter whose B is zero changed the soft tokens")
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, mix in cases.items():
            begin = time.perf_counter()
            encode(mix)
            taken[name].append(time.perf_counter() - begin)
    ratios = [b / a for a, b in zip(taken["without"], taken["with"], strict=True)]
    cells = [f"{core.nbytes / 1e6:.0f}"]
    for values in (*taken.values(), ratios):
        middle = statistics.median(values)
        cells.append(f"{middle:.2f} ({min(values):.2f}\N{EN DASH}{max(values):.2f})")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=768, help="pixels of the picture's side")
    parser.add_argument("--seconds", type=float, default=30.0, help="of sound")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print(f"rank {arguments.rank}, {arguments.threads} threads, {_core.isa()}, {_core.cpu_model()}")
    print("| tower | MB | s without | s with | ratio |\n| --- | ---: | ---: | ---: | ---: |")
    for name, make in {"vision": vision, "audio": audio}.items():
        print(f"| {name} | {' | '.join(measure(*make(arguments), arguments.rounds))} |", flush=True)


if __name__ == "__main__":
    main()
