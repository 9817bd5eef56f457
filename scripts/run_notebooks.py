"""Runs the notebooks: `python scripts/run_notebooks.py notebooks/*.ipynb`; `--write` keeps outputs.

A cell that raises, a notebook of more than 15 cells, and one whose file would be larger than 300 KB
are errors; one that takes over two minutes is pointed out (the machine may be busy). Without
`--write` the files stay as they are: outputs need not be equal, since times differ.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import time
from pathlib import Path
from typing import Any

import nbclient
import nbformat

MOST_CELLS = 15
MOST_SECONDS = 120
MOST_BYTES = 300_000
# Figures have few colours: a palette keeps them sharp at a third of the bytes.
_PALETTE = 128


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="store the outputs in the files")
    parser.add_argument("--figures", type=Path, help="a folder for the figures as PNG files")
    arguments = parser.parse_args()
    failed = []
    for path in arguments.notebooks:
        problems = run(path, arguments.write, arguments.figures)
        for problem in problems:
            print(f"{path}: {problem}", file=sys.stderr)
        if problems:
            failed.append(str(path))
    return 1 if failed else 0


def run(path: Path, write: bool, figures: Path | None) -> list[str]:
    """Runs one notebook and returns what is wrong with it."""
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=5 * MOST_SECONDS, resources={"metadata": {"path": str(path.parent)}}
    )
    begin = time.perf_counter()
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        return [str(error)]
    seconds = time.perf_counter() - begin
    clean(notebook)
    text = nbformat.writes(notebook) + "\n"
    if figures is not None:
        save_figures(notebook, figures, path.stem)
    if write:
        path.write_text(text, encoding="utf-8")
    print(f"{path}: {len(notebook.cells)} cells, {seconds:.1f} s, {len(text) / 1000:.0f} KB")
    problems = []
    if len(notebook.cells) > MOST_CELLS:
        problems.append(f"{len(notebook.cells)} cells; expected at most {MOST_CELLS}")
    if seconds > MOST_SECONDS:
        print(f"{path}: {seconds:.0f} s; meant to take at most {MOST_SECONDS}")
    if len(text) > MOST_BYTES:
        problems.append(f"{len(text)} bytes; expected at most {MOST_BYTES}")
    return problems


def clean(notebook: Any) -> None:
    """Takes out what changes from run to run and says nothing; makes figures small."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = {}
        if (
            "outputs" in cell
        ):  # On stderr: progress bars, and warnings about the machine's packages.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            if "png" in str(list(output.get("data", {}))):
                output.data["image/png"] = smaller(output.data["image/png"])
                output.data.pop("text/plain", None)
            if "metadata" in output:
                output.metadata = {}


def smaller(png: str) -> str:
    """Returns a base64 PNG with a palette, transparency kept."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(png)))
    reduced = image.convert("RGBA").quantize(_PALETTE, method=Image.Quantize.FASTOCTREE)
    data = io.BytesIO()
    reduced.save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode() + "\n"


def save_figures(notebook: Any, folder: Path, stem: str) -> None:
    """Writes every figure twice, on a light and on a dark page, to be looked at."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if png := output.get("data", {}).get("image/png"):
                figure = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
                for page, colour in (("light", "#ffffff"), ("dark", "#181818")):
                    sheet = Image.new("RGBA", figure.size, colour)
                    sheet.alpha_composite(figure)
                    sheet.convert("RGB").save(folder / f"{stem}-{number:02d}-{page}.png")


if __name__ == "__main__":
    sys.exit(main())
