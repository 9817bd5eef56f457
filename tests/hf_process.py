"""Runs transformers in a process of its own, without vector instructions.

PyTorch's vectorised powf differs from the C library's in the last bit of RoPE's inverse
frequencies. At position 262,000 that bit is worth more than the tests' tolerance, so far positions
are compared with a reference whose capability is capped; that is only possible at process start.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np


def hf_logits_far(jobs: list[tuple[Path, list[int], int]], folder: Path) -> list[np.ndarray]:
    """Returns the logits [T, V] of each job (checkpoint, ids, position of the first id).

    `folder` is for the process's files.
    """
    (folder / "jobs.json").write_text(json.dumps([(str(f), ids, n) for f, ids, n in jobs]))
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    subprocess.run([sys.executable, __file__, str(folder)], check=True, env=environment)
    with np.load(folder / "logits.npz") as logits:
        return [logits[f"job{index}"] for index in range(len(jobs))]


def _load(checkpoint: str) -> Any:
    import torch
    import transformers

    config = json.loads((Path(checkpoint) / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    if config.get("text_config", config).get("enable_moe_block"):
        model.set_experts_implementation("eager")
    return model.eval()


def _main(folder: Path) -> None:
    import torch

    from tiny_models import hf_run

    assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    logits, load = {}, functools.cache(_load)
    jobs = json.loads((folder / "jobs.json").read_text())
    for index, (checkpoint, ids, start) in enumerate(jobs):
        positions = list(range(start, start + len(ids)))
        logits[f"job{index}"] = hf_run(load(checkpoint), ids, positions)["logits"]
    np.savez(folder / "logits.npz", **logits)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
