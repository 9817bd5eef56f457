"""End of a clip to the first token, E2B: sound read behind the speaker, and sound read whole.

    python benchmarks/audio_latency.py FOLDER [--seconds 5] [--dtype int4] [--rounds 5]

FOLDER gets E2B's text model as random packed weights (as random_packed.py writes them, in 100 s)
and a random full-size audio tower (0.6 GB; audio_tower.py), unless it has them. Pieces
of 100 ms are pushed as fast as they are read, in place of a microphone. "whole" encodes the clip
when it has ended and reads the whole prompt, "soft tokens streamed" encodes along and reads the
prompt at the end, "streamed" does both along (`model.audio_stream(prompt=…)`). Latency counts from
the moment at which the last piece is there. "work before the end" must be less than the clip's
seconds, and the slowest piece is what one push took at most. Greedy; the tokens must be the same.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from audio_tower import FILE, gemloupe_tower, sound, write_weights

import gemloupe as gl
from gemloupe import _core

_PUSH = 1_600  # Samples of 100 ms.
# Ids around the sound: a system turn and a question, as long as real ones.
_BEFORE, _AFTER = range(1000, 1024), range(2000, 2016)

Figures = dict[str, float]


def load(folder: Path, arguments: argparse.Namespace) -> gl.Model:
    """The text model with the tower in place of the one that its checkpoint lacks."""
    text = folder / f"E2B-{arguments.dtype}-{arguments.layers or 'all'}-layers"
    if not text.exists():
        writer = Path(__file__).with_name("random_packed.py")
        command = [sys.executable, str(writer), "E2B", str(text), "--dtype", arguments.dtype]
        command += ["--layers", str(arguments.layers)] if arguments.layers else []
        subprocess.run(command, check=True)
    tower = folder / f"{arguments.tower}-{FILE}"
    if not tower.exists():
        write_weights(tower, arguments.tower)
    model = gl.load(text, threads=arguments.threads)
    model.audio_tower = gemloupe_tower(tower, arguments.threads)
    return model


def prompt_ids(model: gl.Model, count: int) -> list[int]:
    """A prompt with `count` ids of sound."""
    config = model.config
    inner = [config.boa_token_id, *[config.audio_token_id] * count, config.eoa_token_id]
    return [config.bos_token_id, *_BEFORE, *inner, *_AFTER]


def answer(model: gl.Model, tokens: np.ndarray) -> int:
    out = model.generate(
        prompt_ids(model, len(tokens)), audio=tokens, max_new_tokens=1, temperature=0
    )
    return int(out.ids[0])


def whole(model: gl.Model, samples: np.ndarray) -> tuple[int, Figures]:
    begin = time.perf_counter()
    tokens = model.encode_audio(samples)
    encoded = time.perf_counter()
    token = answer(model, tokens)
    end = time.perf_counter()
    return token, {"latency": end - begin, "encode": encoded - begin, "read": end - encoded}


def soft_tokens_streamed(model: gl.Model, samples: np.ndarray) -> tuple[int, Figures]:
    stream = model.audio_stream()
    parts, times = _pushed(stream.push, samples[:-_PUSH])
    begin = time.perf_counter()
    parts += [stream.push(samples[-_PUSH:]), stream.finish()]
    encoded = time.perf_counter()
    token = answer(model, np.concatenate(parts))
    end = time.perf_counter()
    figures = {"latency": end - begin, "encode": encoded - begin, "read": end - encoded}
    return token, {**figures, "before": sum(times), "slowest": max(times)}


def streamed(model: gl.Model, samples: np.ndarray) -> tuple[int, Figures]:
    stream = model.audio_stream(prompt=prompt_ids(model, 1))
    _, times = _pushed(stream.push, samples[:-_PUSH])
    begin = time.perf_counter()
    stream.push(samples[-_PUSH:])
    stream.finish()
    encoded = time.perf_counter()
    token = int(stream.generate(max_new_tokens=1, temperature=0).ids[0])
    end = time.perf_counter()
    figures = {"latency": end - begin, "encode": encoded - begin, "read": end - encoded}
    return token, {**figures, "before": sum(times), "slowest": max(times)}


def _pushed(
    push: Callable[[np.ndarray], np.ndarray], samples: np.ndarray
) -> tuple[list[np.ndarray], list[float]]:
    parts, times = [], []
    for at in range(0, len(samples), _PUSH):
        begin = time.perf_counter()
        parts.append(push(samples[at : at + _PUSH]))
        times.append(time.perf_counter() - begin)
    return parts, times


WAYS: dict[str, Any] = {
    "whole": whole,
    "soft tokens streamed": soft_tokens_streamed,
    "streamed": streamed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--dtype", choices=("int4", "int8"), default="int4")
    parser.add_argument("--tower", choices=("float32", "bfloat16"), default="bfloat16",
                        help="of its weights; released ones are bfloat16")  # fmt: skip
    parser.add_argument("--layers", type=int, default=0, help="fewer layers, for a trial")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model = load(arguments.folder, arguments)
    samples = sound(arguments.seconds)
    count = len(model.encode_audio(samples))
    print(
        f"{arguments.seconds:g} s of sound ({count} of {len(prompt_ids(model, count))} tokens), "
        f"{arguments.dtype} text, {arguments.tower} tower, {arguments.threads} threads, "
        f"{_core.isa()}, {_core.cpu_model()}; medians of {arguments.rounds}"
    )
    print("                       latency   encode     read   work before the end   slowest piece")
    chosen = set()
    for name, way in WAYS.items():
        way(model, samples)  # Warms up.
        rounds = [way(model, samples) for _ in range(arguments.rounds)]
        chosen |= {token for token, _ in rounds}
        median = {key: statistics.median(f[key] for _, f in rounds) for key in rounds[0][1]}
        line = f"{name:21} {1000 * median['latency']:6.0f} ms{1000 * median['encode']:6.0f} ms"
        line += f"{1000 * median['read']:6.0f} ms"
        if "before" in median:
            line += f"{median['before']:19.2f} s{1000 * median['slowest']:13.0f} ms"
        print(line)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak {peak:.0f} MiB; {'the same first token' if len(chosen) == 1 else chosen}")


if __name__ == "__main__":
    main()
