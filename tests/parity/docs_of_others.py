"""Runs the other packages' side of the pages "from TransformerLens", "from nnsight", ….

python tests/parity/docs_of_others.py from_transformer_lens | from_nnsight
python tests/parity/docs_of_others.py from_llama_cpp FOLDER_WITH_GGUF

Run by hand where the package is installed (`write_gguf` of tests/gguf_files.py makes FOLDER's
model-Q4_0.gguf where the package gguf is); the test suite runs gemloupe's side of all pages, and
transformers' side of its page.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import docs_blocks
import gemloupe as gl


def main(page: str, folder: str | None = None) -> None:
    warnings.filterwarnings("ignore")
    if folder is not None:
        os.chdir(folder)
    theirs = docs_blocks.execute(page, "python theirs", folder=str(docs_blocks.DEMO))
    print(f"{page}: {len(docs_blocks.blocks(page, 'python theirs'))} blocks ran")
    if docs_blocks.blocks(page, "python bridge"):
        model = gl.load("demo:edge", dtype="float32")
        ours = docs_blocks.execute(page, "python bridge", model=model)
        loss = float(theirs["model"](theirs["tokens"], return_type="loss"))
        print(f"loss through the bridge {float(ours['loss']):.6f}, of TransformerBridge {loss:.6f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
