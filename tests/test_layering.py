"""The C++ folders depend on each other in one direction only (csrc/README.md)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"

# From the lowest level to the highest. Folders of one level don't know each other.
LEVELS: list[set[str]] = [
    {"base"},
    {"kernels"},
    {"ops"},
    {"formats", "state", "inspect"},
    {"layers"},
    {"models"},
    {"runtime"},
    {"bindings"},
]
LEVEL_OF = {folder: level for level, folders in enumerate(LEVELS) for folder in folders}

# Whose header may be included where: one owner for each foreign library.
OWNERS = {
    "dnnl": re.compile(r"^ops/onednn\.(cc|h)$"),
    "omp.h": re.compile(r"^ops/onednn\.(cc|h)$"),
    "pybind11": re.compile(r"^bindings/"),
    "Python.h": re.compile(r"^bindings/"),
}
# A kernel object holds code for one instruction set: a template shared with other objects, compiled
# there, could be the copy that the linker keeps, and would crash older CPUs.
KERNEL_SYSTEM_HEADERS = {"immintrin.h", "cstdint", "cstddef"}

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
SOURCES = sorted(
    path.relative_to(CSRC).as_posix() for path in CSRC.rglob("*") if path.suffix in (".h", ".cc")
)


def included(source: str) -> list[str]:
    return INCLUDE.findall((CSRC / source).read_text(encoding="utf-8"))


def is_project_header(header: str) -> bool:
    return (CSRC / header).is_file()


def test_every_source_lies_in_a_known_level() -> None:
    assert SOURCES
    assert [source for source in SOURCES if source.split("/")[0] not in LEVEL_OF] == []


@pytest.mark.parametrize("source", SOURCES)
def test_includes_point_to_lower_levels_only(source: str) -> None:
    folder = source.split("/")[0]
    upward = [
        header
        for header in included(source)
        if is_project_header(header)
        and header.split("/")[0] != folder
        and LEVEL_OF[header.split("/")[0]] >= LEVEL_OF[folder]
    ]
    assert upward == []


@pytest.mark.parametrize("source", [s for s in SOURCES if s.startswith("kernels/simd_")])
def test_simd_kernels_include_intrinsics_and_their_own_folder_only(source: str) -> None:
    foreign = [
        header
        for header in included(source)
        if header not in KERNEL_SYSTEM_HEADERS and not header.startswith("kernels/")
    ]
    assert foreign == []


@pytest.mark.parametrize("source", SOURCES)
def test_each_foreign_library_has_one_owner(source: str) -> None:
    misplaced = [
        header
        for header in included(source)
        for name, owner in OWNERS.items()
        if header.startswith(name) and not owner.match(source)
    ]
    assert misplaced == []
