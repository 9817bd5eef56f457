"""The table of proofs on the page about hooks says what the tests prove: no more, no less."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from hf_edits import comparable_points

import gemloupe as gl
import test_hook_identities
from gemloupe import _core, help_pages
from tiny_models import VARIANTS, hf_run, random_ids

FOLDER = Path(__file__).parents[1]


def short(name: str) -> str:
    return re.sub(r"^layers\.\d+\.", "", name)


def proofs(model, reference) -> dict[str, str]:
    """Point without its layer -> a cell of the table: capture's mark and edit's mark."""
    captured = set(hf_run(reference, random_ids(9)))
    edited = {short(point.name) for point in comparable_points(model)}
    cells: dict[str, str] = {}
    points = list(gl.hook_points(model))
    for name in dict.fromkeys(map(short, points)):
        of_layers = [point for point in points if short(point) == name]
        compared = all(point in captured for point in of_layers)
        capture = "C" if compared else "c" if name in test_hook_identities.CAPTURED else "?"
        edit = "E" if name in edited else "e" if name in test_hook_identities.EDITED else "?"
        cells[name] = f"{capture} {edit}"
    return cells


def test_the_table_of_proofs_is_what_the_tests_prove(tiny):
    table = [line for line in help_pages.text("hooks").splitlines() if line.startswith("| `")]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table]
    shown = {name: cells for name, *cells in rows}
    proven = {}
    for variant in VARIANTS:
        reference, folder = tiny(variant)
        proven[variant] = proofs(gl.load(folder, dtype="float32"), reference)
    want = {row[0]: [proven[v].get(row[0], "–") for v in VARIANTS] for row in _core.hook_points()}
    norms = [name for name in want if name.endswith(".scale")]
    assert all(set(want[name]) <= {"c e", "–"} for name in norms)
    want = {name: cells for name, cells in want.items() if name not in norms}
    want["….scale"] = ["c e"] * len(VARIANTS)
    assert shown == want


def test_every_test_that_the_proofs_name_exists():
    functions = {
        node.name
        for file in FOLDER.rglob("test_*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    named = {*test_hook_identities.CAPTURED.values(), *test_hook_identities.EDITED.values()}
    assert named <= functions, named - functions
    page = help_pages.text("hooks")
    cited = set(re.findall(r"`(test_\w+)`", page))
    assert cited and cited <= functions | {file.stem for file in FOLDER.rglob("test_*.py")}
