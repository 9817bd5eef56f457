"""gemloupe among other libraries in one process: torch before and after it, and fork."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

# 40 rows: enough for the matrix products that go to oneDNN.
IDS = [2, *range(5, 44)]

# Imports two libraries in the order given, lets both compute, in turn, and saves the logits.
BOTH_COMPUTE = """
import importlib, sys

folder, result, *order = sys.argv[1:]
for name in order:
    importlib.import_module(name)
import gemloupe, numpy, torch

ids = [2, *range(5, 44)]
threads = torch.get_num_threads()
square = torch.arange(90000, dtype=torch.float32).reshape(300, 300) / 90000
before = square @ square
model = gemloupe.load(folder)
logits = model.run(ids, logits="all").logits
image = torch.ones(1, 3, 32, 32)
assert torch.nn.functional.conv2d(image, torch.ones(8, 3, 3, 3)).sum().item() == 8 * 900 * 27
assert torch.equal(square @ square, before)
assert torch.get_num_threads() == threads, "gemloupe changed torch's number of threads"
assert numpy.array_equal(model.run(ids, logits="all").logits, logits)
numpy.save(result, logits)
"""


def run_script(script: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.core
@pytest.mark.parametrize("order", [("gemloupe", "torch"), ("torch", "gemloupe")])
def test_gemloupe_and_torch_compute_in_one_process(
    order: tuple[str, str], tiny: Callable, tmp_path: Path
) -> None:
    import gemloupe

    _, folder = tiny("e2b")
    run_script(BOTH_COMPUTE, str(folder), str(tmp_path / "logits.npy"), *order)
    here = gemloupe.load(folder).run(IDS, logits="all").logits
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), here)


# multiprocessing's fork: the child inherits a pool whose threads are gone.
FORKED_CHILD_COMPUTES = """
import multiprocessing, sys
import gemloupe, numpy

ids = [2, *range(5, 44)]
model = gemloupe.load(sys.argv[1], threads=2)
before = model.run(ids).logits

def child(queue):
    queue.put(model.run(ids).logits)

context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=child, args=(queue,))
process.start()
in_child = queue.get(timeout=120)
process.join()
assert process.exitcode == 0, process.exitcode
assert numpy.array_equal(in_child, before)
assert numpy.array_equal(model.run(ids).logits, before)
"""


@pytest.mark.core
def test_forked_child_computes_what_its_parent_does(tiny: Callable) -> None:
    _, folder = tiny("e2b")
    run_script(FORKED_CHILD_COMPUTES, str(folder))


WITHOUT_TORCH = """
import sys
import gemloupe

gemloupe.load(sys.argv[1]).run([2, 5, 9])
heavy = {"torch", "transformers", "peft", "matplotlib", "pandas"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.core
def test_running_a_model_imports_no_heavy_library(tiny: Callable) -> None:
    _, folder = tiny("e2b")
    run_script(WITHOUT_TORCH, str(folder))
