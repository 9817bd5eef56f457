"""Packed checkpoints: what convert writes, broken files, and conversions that end early."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemloupe as gl
from gemloupe import cli, conversion, packed
from gemloupe.checkpoint import open_checkpoint
from tiny_models import VARIANTS

HEADER = struct.Struct("<8sIIQQQI")  # The last 4 of its 64 bytes are the CRC of those before.
IDS = np.arange(45) % 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed demo model; tests that damage it copy it."""
    return gl.convert("demo:edge", tmp_path_factory.mktemp("packed") / "edge")


def logits(source: Any, **arguments: Any) -> np.ndarray:
    return gl.load(source, **arguments).run(IDS, logits="all").logits


@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_packed_folder_gives_the_bits_of_its_source(
    tiny: Callable, tmp_path: Path, variant: str, dtype: str
) -> None:
    source = tiny(variant, style="released", shards=3, towers="tiny", dtype="bfloat16")[1]
    made = gl.convert(source, tmp_path / "packed", dtype)
    model = gl.load(made)
    assert model.dtype == gl.load(source, dtype).dtype or dtype == "float32"
    assert model.core.copied_bytes == 0
    assert np.array_equal(model.run(IDS, logits="all").logits, logits(source, dtype=dtype))
    assert np.array_equal(
        gl.load(made, residency="resident").run(IDS, logits="all").logits,
        model.run(IDS, logits="all").logits,
    )


def test_patterns_and_float32_sources_give_the_same_bits(tiny: Callable, tmp_path: Path) -> None:
    source = tiny("26b", style="released")[1]  # float32
    dtype = {"default": "int4", "*.down_proj.weight": "int8", "*.experts.down_proj": "bfloat16"}
    made = gl.convert(source, tmp_path / "packed", dtype)
    assert np.array_equal(logits(made), logits(source, dtype=dtype))
    assert gl.load(made).weights.info("layers.0.experts.down_proj").dtype == "bfloat16"
    plain = gl.convert(source, tmp_path / "plain", "auto")
    assert np.array_equal(logits(plain), logits(source))


def test_dequantised_weights_in_float32_give_the_exact_path(tiny: Callable, tmp_path: Path) -> None:
    """int4 products with float32 activations are those of the values that int4 stands for."""
    from safetensors.numpy import save_file

    source = tiny("26b", style="released", dtype="bfloat16")[1]
    model = gl.load(source, dtype="int4", activations="float32", kv_dtype="float32")
    prefix = model.checkpoint.prefix
    values = {prefix + name: np.ascontiguousarray(model.weights[name]) for name in model.weights}
    same = tmp_path / "dequantised"
    same.mkdir()
    shutil.copy(source / "config.json", same)
    save_file(values, same / "model.safetensors")
    exact = gl.load(same, dtype="float32", embed_scale="bfloat16")
    found, expected = (m.run(IDS, logits="all").logits for m in (model, exact))
    # Both sum float32 products in float32, in different orders: a few roundings of sums as long
    # as the widest matrix, through six layers.
    assert np.abs(found - expected).max() <= 2e-4 * np.abs(expected).max()


def test_gguf_files_are_packed_with_their_values_and_tokenizer(tmp_path: Path) -> None:
    from gguf_files import write_gguf

    source = gl.load("demo:edge").checkpoint.folder
    path = tmp_path / "edge.gguf"
    write_gguf(path, source, tokenizer=source)
    original = gl.load(path)
    made = gl.convert(path, tmp_path / "packed", "auto")
    model = gl.load(made)
    assert model.core.copied_bytes == 0
    for name in model.weights:
        assert np.array_equal(model.weights[name], original.weights[name]), name
    assert np.array_equal(
        model.run(IDS, logits="all").logits, original.run(IDS, logits="all").logits
    )
    chat = [{"role": "user", "content": "What is 2 + 3?"}]
    assert np.array_equal(model.prepare(chat).ids, original.prepare(chat).ids)
    assert str(model.chat("What is 2 + 3?", temperature=0, max_new_tokens=8)) == str(
        original.chat("What is 2 + 3?", temperature=0, max_new_tokens=8)
    )


def test_side_files_and_towers_are_kept(tiny: Callable, tmp_path: Path) -> None:
    source = shutil.copytree(gl.load("demo:edge").checkpoint.folder, tmp_path / "source")
    (source / "notes.txt").write_text("not a part of the model")
    made = gl.convert(source, tmp_path / "packed")
    names = sorted(path.name for path in made.iterdir())
    kept = {"chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"}
    assert kept < set(names) and "notes.txt" not in names and "model.safetensors" not in names
    for name in names:
        if name not in ("config.json", "generation_config.json", packed.FILE_NAME):
            assert (made / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((made / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    question = {"temperature": 0, "max_new_tokens": 8}
    assert str(gl.load(made).chat("What is 2 + 3?", **question)) == str(
        gl.load(source, dtype="int4").chat("What is 2 + 3?", **question)
    )
    multimodal = tiny("e2b", style="released", towers="tiny", dtype="bfloat16")[1]
    towers = open_checkpoint(multimodal)
    again = open_checkpoint(gl.convert(multimodal, tmp_path / "multimodal"))
    assert again.towers == towers.towers and again.towers
    assert gl.inspect.describe(again).parameters == gl.inspect.describe(towers).parameters
    for names in towers.towers.values():
        for name in names:
            assert stored_bytes(again, name) == stored_bytes(towers, name)


def stored_bytes(checkpoint: Any, name: str) -> bytes:
    number, info = checkpoint.tensors[name]
    with checkpoint.files[number].open("rb") as file:
        file.seek(info.begin)
        return file.read(info.end - info.begin)


def test_the_file_says_where_it_came_from(folder: Path, tmp_path: Path) -> None:
    made = open_checkpoint(folder).provenance
    assert made is not None
    assert (made.dtype, made.source, made.source_dtype) == ("int4", "demo:edge", "bfloat16")
    assert made.recipe == {"default": "int4"} and made.gemloupe == gl.__version__
    assert len(made.source_hash) == 64 and made.embed_scale == "bfloat16"
    text = str(gl.inspect.describe(folder))
    assert "packed as int4 from demo:edge (bfloat16)" in text
    assert "embed_tokens.weight                         int6" in text
    copied = gl.convert(folder, tmp_path / "copy", "auto")
    assert open_checkpoint(copied).provenance == made
    assert (copied / packed.FILE_NAME).read_bytes() == (folder / packed.FILE_NAME).read_bytes()


def test_a_packed_folder_has_one_dtype(folder: Path, tmp_path: Path) -> None:
    gl.load(folder, dtype="int4")
    for dtype in ("int8", "float32", {"default": "int4", "*.up_proj.weight": "int8"}):
        with pytest.raises(ValueError, match="was packed as 'int4'.*made from, 'demo:edge'"):
            gl.load(folder, dtype=dtype)
    with pytest.raises(ValueError, match="was packed as 'int4'"):
        gl.convert(folder, tmp_path / "again", "int8")


def test_tensors_lie_at_pages_and_the_table_of_rows_last(folder: Path) -> None:
    entries, _ = gl._core.read_packed(str(folder / packed.FILE_NAME))
    assert entries[0].begin == 2 << 20
    for entry in entries:
        assert entry.begin % (4096 if entry.end - entry.begin >= 4096 else 64) == 0
    assert entries[-1].name.endswith("embed_tokens_per_layer.weight")
    assert entries[-1].begin % (2 << 20) == 0
    assert entries[-1].end == (folder / packed.FILE_NAME).stat().st_size


# Broken files.


def patched(folder: Path, tmp_path: Path, change: Callable[[bytearray], None]) -> Path:
    """A copy whose file `change` has altered."""
    copy = shutil.copytree(folder, tmp_path / "patched", dirs_exist_ok=True)
    data = bytearray((copy / packed.FILE_NAME).read_bytes())
    change(data)
    (copy / packed.FILE_NAME).write_bytes(data)
    return copy


def sealed(data: bytearray) -> None:
    """Makes the CRCs of header and table right again; zlib's, which is another implementation."""
    fields = list(HEADER.unpack_from(data))
    fields[6] = zlib.crc32(data[64 : 64 + fields[3]])
    HEADER.pack_into(data, 0, *fields)
    struct.pack_into("<I", data, 60, zlib.crc32(data[:60]))


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        gl.load(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_sealing_an_untouched_file_changes_nothing(folder: Path) -> None:
    data = bytearray((folder / packed.FILE_NAME).read_bytes())
    before = bytes(data)
    sealed(data)
    assert data == before


def test_truncated_files_are_refused(folder: Path, tmp_path: Path) -> None:
    size = (folder / packed.FILE_NAME).stat().st_size
    for length in (0, 7, 63, 64, 1000, 2 << 20, size - 4096, size - 1, size + 1):

        def cut(data: bytearray, length: int = length) -> None:
            data[:] = (data + b"\0")[:length]

        assert "convert the original checkpoint again" in refusal(patched(folder, tmp_path, cut))


def test_every_changed_byte_of_header_and_table_is_noticed(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "flipped")
    path = copy / packed.FILE_NAME
    table_bytes = HEADER.unpack_from(path.read_bytes())[3]
    with path.open("r+b") as file:
        for offset in [*range(64), *range(64, 64 + table_bytes, 37)]:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0x10]))
            file.flush()
            with pytest.raises(ValueError):
                gl._core.read_packed(str(path))
            file.seek(offset)
            file.write(bytes([byte]))
    gl.load(copy)


def field(offset: int, code: str, value: Any) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        struct.pack_into(code, data, offset, value)
        sealed(data)

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (field(0, "8s", b"GEMLOOPE"), "does not begin as a packed checkpoint"),
        (field(8, "<I", 2), "was packed in version 2, layout 1; this gemloupe reads version 1"),
        (field(12, "<I", 9), "version 1, layout 9; .*; convert the original checkpoint again"),
        (field(24, "<Q", 12345), "lets the data begin at 12345"),
        (field(24, "<Q", 1 << 62), "lets the data begin at 4611686018427387904"),
        (field(32, "<Q", 1 << 62), "expected 4611686018427387904; it is truncated or damaged"),
    ],
)
def test_wrong_headers_are_refused(
    folder: Path, tmp_path: Path, change: Callable[[bytearray], None], expected: str
) -> None:
    import re

    assert re.search(expected, refusal(patched(folder, tmp_path, change)))


def first_tensor(data: bytearray) -> tuple[int, int, int]:
    """(offset of its dtype's length, of its shape, of its begin) in the table."""
    at = 64 + 4 + struct.unpack_from("<I", data, 64)[0] + 4
    dtype = at + 2 + struct.unpack_from("<H", data, at)[0]
    shape = dtype + 1 + data[dtype] + 1
    return dtype, shape, shape + 8 * data[shape - 1]


def in_table(change: Callable[[bytearray, int, int, int], None]) -> Callable[[bytearray], None]:
    def apply(data: bytearray) -> None:
        change(data, *first_tensor(data))
        sealed(data)

    return apply


def put(code: str, where: str, shift: int, value: Any) -> Callable[[bytearray], None]:
    def change(data: bytearray, dtype: int, shape: int, begin: int) -> None:
        base = {"dtype": dtype, "shape": shape, "begin": begin}[where]
        struct.pack_into(code, data, base + shift, value)

    return in_table(change)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (put("4s", "dtype", 1, b"int5"), "unknown dtype 'int5'"),
        (put("4s", "dtype", 1, b"int8"), "needs .* bytes, the table gives it"),
        (put("<q", "shape", 0, -1), r"has the impossible shape \[-1, 96\]"),
        (put("<q", "shape", 0, 1 << 62), "has the impossible shape"),
        (put("<q", "shape", 8, (1 << 63) - 1), "has the impossible shape"),
        (put("<q", "shape", 0, 16), "needs .* bytes, the table gives it"),
        (put("<Q", "begin", 0, 64), "in what is before it"),
        (put("<Q", "begin", 0, (1 << 64) - 64), "outside the data of this file"),
        (put("<Q", "begin", 8, 1 << 40), "outside the data of this file"),
        (put("<Q", "begin", 0, (2 << 20) + 8), "expected a multiple of 64"),
        (put("<B", "shape", -1, 200), "its table of tensors is damaged"),
        (put("<B", "dtype", 0, 255), "damaged|unknown dtype|impossible"),
    ],
)
def test_hostile_tables_are_refused(
    folder: Path, tmp_path: Path, change: Callable[[bytearray], None], expected: str
) -> None:
    import re

    assert re.search(expected, refusal(patched(folder, tmp_path, change)))


def test_overlapping_and_doubled_tensors_are_refused(folder: Path, tmp_path: Path) -> None:
    def overlap(data: bytearray, _dtype: int, _shape: int, begin: int) -> None:
        # The second tensor where the first is.
        name = begin + 20
        second = name + 2 + struct.unpack_from("<H", data, name)[0]
        second += 1 + data[second]
        second += 1 + 8 * data[second]
        size = struct.unpack_from("<2Q", data, second)
        struct.pack_into("<2Q", data, second, 2 << 20, (2 << 20) + size[1] - size[0])

    assert "in what is before it" in refusal(patched(folder, tmp_path, in_table(overlap)))

    def rename(data: bytearray) -> None:
        old, new = b"layers.1.input_layernorm", b"layers.0.input_layernorm"
        data[:] = bytes(data).replace(old, new, 1)
        sealed(data)

    assert "is listed twice" in refusal(patched(folder, tmp_path, rename))

    def count(data: bytearray) -> None:
        at = 64 + 4 + struct.unpack_from("<I", data, 64)[0]
        struct.pack_into("<I", data, at, 0xFFFFFFFF)
        sealed(data)

    assert "lists 4294967295 tensors" in refusal(patched(folder, tmp_path, count))


def test_wrong_metadata_and_tensors_of_another_model_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    def scale(data: bytearray) -> None:
        data[:] = bytes(data).replace(b'"embed_scale": "bfloat16"', b'"embed_scale": "bfloat61"')
        sealed(data)

    assert "metadata field embed_scale is 'bfloat61'" in refusal(patched(folder, tmp_path, scale))
    copy = shutil.copytree(folder, tmp_path / "mixed")
    moe = gl.load("demo:moe").checkpoint.folder
    shutil.copy(moe / "config.json", copy / "config.json")
    assert "the tensors don't match config.json" in refusal(copy)


def test_quantised_vectors_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "vector")
    weights = gl._core.Weights()
    checkpoint = open_checkpoint(folder)
    path = copy / packed.FILE_NAME
    metadata = gl._core.read_packed(str(path))[1].decode()
    entries = gl._core.read_packed(str(path))[0]
    weights.add_file(str(folder / packed.FILE_NAME), entries)
    name = checkpoint.prefix + "norm.weight"
    weights.set_target(name, "int8")
    path.unlink()
    gl._core.write_packed(weights, str(path), [(e.name, False) for e in entries], metadata, 1)
    assert "norm.weight" in refusal(copy)


def test_verify_names_damaged_tensors(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", "--verify", str(folder)]) == 0
    assert "all 160 tensors are as they were written" in capsys.readouterr().out
    entries, _ = gl._core.read_packed(str(folder / packed.FILE_NAME))
    hit = [entries[3], entries[-1]]

    def flip(data: bytearray) -> None:
        data[hit[0].begin] ^= 1
        data[hit[1].end - 1] ^= 128

    damaged = patched(folder, tmp_path, flip)
    gl.load(damaged)  # Loading reads no more than the table.
    assert packed.damaged_tensors(damaged) == [entry.name for entry in hit]
    assert cli.main(["inspect", "--verify", str(damaged)]) == 2
    text = capsys.readouterr().err
    assert "2 of 160 tensors are damaged" in text and hit[0].name in text
    assert cli.main(["inspect", "--verify", "demo:edge"]) == 2
    assert "only packed checkpoints hold checksums" in capsys.readouterr().err


# Destinations, and conversions that end early.


def leftovers(parent: Path) -> list[Path]:
    return sorted(parent.glob(packed.PARTIAL + "*"))


def test_destinations_are_not_overwritten(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("the only copy")
    with pytest.raises(FileExistsError, match="exists already"):
        gl.convert("demo:edge", other)
    with pytest.raises(FileExistsError, match="no packed checkpoint"):
        gl.convert("demo:edge", other, force=True)
    assert (other / "thesis.txt").read_text() == "the only copy"
    made = shutil.copytree(folder, tmp_path / "packed")
    with pytest.raises(FileExistsError, match="exists already"):
        gl.convert("demo:edge", made)
    with pytest.raises(FileExistsError, match="is the source itself"):
        gl.convert(made, made, "auto", force=True)
    gl.convert("demo:edge", made, "int8", force=True)
    assert gl.load(made).dtype == "int8"
    with pytest.raises(FileNotFoundError, match="doesn't exist"):
        gl.convert("demo:edge", tmp_path / "no" / "such" / "place")
    assert leftovers(tmp_path) == []


def test_a_small_disk_is_refused_with_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(OSError, match=r"needs \d+\.\d+ MiB on the disk; 1.00 MiB are free"):
        gl.convert("demo:edge", tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def run_child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_killed_conversion_leaves_nothing_that_loads(tmp_path: Path) -> None:
    code = """
import os, signal, sys
import gemloupe as gl
from gemloupe.progress import ProgressBar
def show(self, fraction):
    if fraction > 0.5:
        os.kill(os.getpid(), signal.SIGKILL)
ProgressBar.show = show
gl.convert("demo:edge", sys.argv[1])
"""
    target = tmp_path / "packed"
    assert run_child(code, target).returncode == -signal.SIGKILL
    assert not target.exists()
    (left,) = leftovers(tmp_path)
    assert (left / packed.FILE_NAME).exists()
    with pytest.raises((ValueError, FileNotFoundError)):
        gl.load(left)
    # Not even under another name, with the config that it lacks.
    moved = shutil.copytree(left, tmp_path / "moved")
    shutil.copy(gl.load("demo:edge").checkpoint.folder / "config.json", moved)
    assert "its conversion did not end" in refusal(moved)
    gl.convert("demo:edge", target)
    assert leftovers(tmp_path) == []
    gl.load(target)


def test_a_running_conversion_is_left_alone(tmp_path: Path) -> None:
    with conversion._partial_folder(tmp_path) as running:
        gl.convert("demo:edge", tmp_path / "packed")
        assert leftovers(tmp_path) == [running]
    assert leftovers(tmp_path) == []


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path: Path) -> None:
    code = """
import resource, sys
import gemloupe as gl
resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
try:
    gl.convert("demo:edge", sys.argv[1])
except OSError as error:
    print("OSError:", error)
"""
    found = run_child(code, tmp_path / "packed")
    assert found.stdout.startswith("OSError:"), found
    assert "model.gemloupe: can't be written: File too large" in found.stdout
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_through_a_file_that_exists(tmp_path: Path) -> None:
    weights = conversion.stored_weights(open_checkpoint("demo:edge"), {})
    path = tmp_path / packed.FILE_NAME
    (tmp_path / "other").write_text("kept")
    path.symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="can't be made: File exists"):
        gl._core.write_packed(weights, str(path), [("norm.weight", False)], "{}", 1)
    assert (tmp_path / "other").read_text() == "kept"


def test_ctrl_c_ends_a_conversion_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_bar: object, fraction: float) -> None:
        if fraction > 0.5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(conversion.ProgressBar, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        gl.convert("demo:edge", tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_loading_can_be_interrupted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_bar: object, fraction: float) -> None:
        if 0.2 < fraction < 1.0:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(conversion.ProgressBar, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        gl.load("demo:edge", dtype="int4")


def test_converting_needs_little_memory(tiny: Callable, tmp_path: Path) -> None:
    """A model of 190 MB passes through far less."""
    source = tiny("31b", style="released", dtype="bfloat16", vocab_size=1_800_000)[1]
    size = (source / "model.safetensors").stat().st_size
    assert size > 180_000_000
    code = """
import sys
import gemloupe as gl
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
gl.convert("demo:edge", sys.argv[2] + "-warm")
before = peak()
gl.convert(sys.argv[1], sys.argv[2])
print(peak() - before)
"""
    found = run_child(code, source, tmp_path / "packed")
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) < 100_000_000


def test_the_command_line_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "packed"
    argv = ["convert", "demo:edge", str(target), "--keep", "*.mlp.down_proj.weight=int8"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == f"{target}: 4.33 MiB\n"
    assert gl.load(target).weights.info("layers.0.mlp.down_proj.weight").dtype == "int8"
    assert cli.main(argv) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*argv, "--keep", "int8"]) == 2
    assert "expected PATTERN=DTYPE" in capsys.readouterr().err
    assert cli.main([*argv, "--force", "--dtype", "int8"]) == 0
