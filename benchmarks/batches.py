"""What a scheduler gains: tokens a second of several rows beside one, and prompts read before.

    python benchmarks/batches.py MODEL [--rows 1 2 4 8] [--new 64] [--prefix 2048] [--repeat 3]

Rows are generated as the server does it: sampled with the model's settings, with a prompt of random
ids each. Tokens a second are of all rows together, prompts not counted; every size is measured
--repeat times, in turn, and the median is taken. The second part reads a prompt of --prefix tokens
without a prefix cache, with an empty one, and again with another end, and gives the seconds to the
first token.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

import gemloupe as gl
from gemloupe.generation import Generation, make_rows

FREE = {"routing": False, "stop": ()}


def ids_of(model: gl.Model, count: int, seed: int) -> np.ndarray:
    """Random ids [count], without the special ones at the vocabulary's beginning."""
    size = model.config.text.vocab_size
    return np.random.default_rng(seed).integers(min(300, size // 2), size, count)


def tokens_per_second(model: gl.Model, rows: int, options: argparse.Namespace, seed: int) -> float:
    """New tokens of all rows by the seconds after the last prompt was read.

    No row ends before its last token: a random prompt's answer may be short.
    """
    prompts = [ids_of(model, options.prompt, seed + row) for row in range(rows)]
    arguments = {"max_new_tokens": options.new, "seed": list(range(rows)), **FREE}
    made = make_rows(model, prompts, arguments)
    for row in made:
        row.options = dataclasses.replace(row.options, stop_ids=())
    generation = Generation(model, made, stream=False)
    while any(not row.ids for row in made):
        generation.step()
    before, began = sum(len(row.ids) for row in made), time.perf_counter()
    while not generation.done:
        generation.step()
    seconds = time.perf_counter() - began
    return (sum(len(row.ids) for row in made) - before) / seconds


def first_token(model: gl.Model, ids: np.ndarray, prefixes: Any = None) -> tuple[float, int]:
    """(seconds to the first token, prompt tokens that were not read)."""
    times = model.generate(ids, max_new_tokens=1, prefix_cache=prefixes, **FREE).timings
    return times.time_to_first_token, times.cached_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--prefix", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    model = gl.load(options.model, threads=options.threads)
    tokens_per_second(model, 1, argparse.Namespace(prompt=8, new=4), 0)
    rates: dict[int, list[float]] = {rows: [] for rows in options.rows}
    for turn in range(options.repeat):
        for rows in options.rows:
            rates[rows].append(tokens_per_second(model, rows, options, 100 * turn))
    medians = {rows: statistics.median(values) for rows, values in rates.items()}
    base = medians[min(medians)]
    ids = ids_of(model, options.prefix, 7)
    prefixes = model.prefix_cache()
    alone, _ = first_token(model, ids)
    empty, _ = first_token(model, ids, prefixes)
    other_end = np.concatenate([ids[:-16], ids_of(model, 16, 8)])
    warm, cached = first_token(model, other_end, prefixes)
    record = {
        "model": repr(model),
        "tokens_per_second": {rows: round(rate, 2) for rows, rate in medians.items()},
        "times_one_row": {rows: round(rate / base, 2) for rows, rate in medians.items()},
        "all": {rows: [round(rate, 2) for rate in values] for rows, values in rates.items()},
        "first_token": {
            "prompt": options.prefix,
            "without": round(alone, 3),
            "empty": round(empty, 3),
            "warm": round(warm, 3),
            "cached_tokens": cached,
            "bytes": prefixes.nbytes,
        },
    }
    print(json.dumps(record, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
