"""gl.record and gl.open_activations: what stands in the files, how they appear, what is refused."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import gemloupe as gl
from adapter_files import write_adapter
from gemloupe import activation_file
from gemloupe.activation_file import from_bfloat16, to_bfloat16
from tiny_models import random_ids

NAMES = ["layers.1.resid_post", "layers.2.attn.z", "layers.2.router.experts"]
ROWS = [random_ids(n, seed=n) for n in (9, 1, 30, 13)]


@pytest.fixture(scope="module")
def model() -> gl.Model:
    return gl.load("demo:moe")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "acts.safetensors"


def listing(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("known", [True, False], ids=["list", "generator"])
def test_the_file_holds_what_runs_capture_row_by_row(model, path, known):
    inputs = ROWS if known else (ids for ids in ROWS)
    assert gl.record(model, inputs, NAMES, path) == path
    assert listing(path.parent) == [path.name]
    runs = [model.run(ids, capture=NAMES) for ids in ROWS]
    stored, opened = load_file(path), gl.open_activations(path)
    assert set(stored) == {*NAMES, "input", "positions", "ids"}
    assert list(opened) == NAMES and opened.rows == 53 and opened.complete
    for name in NAMES:
        want = np.concatenate([run[name] for run in runs])
        assert stored[name].dtype == opened[name].dtype == want.dtype
        np.testing.assert_array_equal(stored[name], want)
        np.testing.assert_array_equal(opened[name], want)
        assert isinstance(opened[name], np.memmap) and not opened[name].flags.writeable
    for got in (stored["ids"], opened.ids):
        assert got.tolist() == [token for ids in ROWS for token in ids]
    assert opened.positions.tolist() == [p for ids in ROWS for p in range(len(ids))]
    assert opened.input.tolist() == [i for i, ids in enumerate(ROWS) for _ in ids]


def test_both_ways_of_writing_give_the_same_bytes(model, tmp_path):
    gl.record(model, ROWS, NAMES, tmp_path / "a", dtype="bfloat16")
    gl.record(model, iter(ROWS), NAMES, tmp_path / "b", dtype="bfloat16")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_texts_chats_prompts_and_batches_are_inputs(model, path):
    chat = [{"role": "user", "content": "Hi"}]
    rows = ["Two cats", chat, model.prepare("A dog"), [2, 5], np.array([2, 6])]
    prompts = [model.prepare(row) for row in rows]
    want = np.concatenate([prompt.ids for prompt in prompts])
    for inputs in (rows, iter([rows[:2], rows[2:]]), [rows[:2], rows[2:]]):
        gl.record(model, inputs, "embed", path, overwrite=True)
        np.testing.assert_array_equal(gl.open_activations(path).ids, want)
    for one in rows:
        gl.record(model, one, "embed", path, overwrite=True)
        assert gl.open_activations(path).ids.tolist() == model.prepare(one).ids.tolist()


def test_positions_reductions_and_edits_are_those_of_run(model, path):
    name = "layers.1.resid_post"
    edit = {"layers.0.resid_post": gl.edits.scale(1.5)}
    for how, rows in (
        (gl.at([0, -1]), [0, 8]),
        (gl.at(reduce="last"), [8]),
        (gl.at("prompt"), range(9)),
    ):
        gl.record(model, [ROWS[0]] * 2, {name: how}, path, edit=edit, overwrite=True)
        opened = gl.open_activations(path)
        want = model.run(ROWS[0], capture=name, edit=edit)[name][list(rows)]
        np.testing.assert_array_equal(opened[name], np.concatenate([want, want]))
        assert opened.positions.tolist() == [*rows, *rows]
        assert opened.ids.tolist() == [ROWS[0][row] for row in [*rows, *rows]]
    gl.record(model, ROWS, {name: gl.at(reduce="mean")}, path, overwrite=True)
    opened = gl.open_activations(path)
    want = [model.run(ids, capture={name: gl.at(reduce="mean")})[name] for ids in ROWS]
    np.testing.assert_array_equal(opened[name], want)
    assert opened.reduced == {name: "mean"} and opened.positions.tolist() == [-1] * 4
    z = "layers.2.attn.z"
    gl.record(model, ROWS, {z: gl.at(reduce="norm")}, path, overwrite=True)
    assert gl.open_activations(path)[z].shape == (53, 4)


@pytest.mark.parametrize("inputs", [ROWS, iter(ROWS)], ids=["list", "generator"])
def test_logits_have_the_rows_that_are_asked_for(model, path, inputs):
    gl.record(model, inputs, {"logits": gl.at(slice(1, None))}, path, logits="all")
    opened = gl.open_activations(path)
    want = [model.run(ids, logits="all").logits[1:] for ids in ROWS]
    np.testing.assert_array_equal(opened["logits"], np.concatenate(want))
    gl.record(model, ROWS, "logits", path, logits="last", overwrite=True)
    assert gl.open_activations(path).positions.tolist() == [len(ids) - 1 for ids in ROWS]


def test_half_precisions_are_those_of_torch(model, path):
    name = "layers.1.resid_post"
    want = torch.from_numpy(np.concatenate([model.run(ids, capture=name)[name] for ids in ROWS]))
    for dtype in (torch.float16, torch.bfloat16):
        gl.record(model, ROWS, name, path, dtype=str(dtype).removeprefix("torch."), overwrite=True)
        stored = safetensors.torch.load_file(path)[name]
        assert stored.dtype == dtype and torch.equal(stored, want.to(dtype))
        opened = gl.open_activations(path)
        np.testing.assert_array_equal(opened.block(name, slice(5, 9)), stored[5:9].float())
        np.testing.assert_array_equal(np.asarray(opened[name], np.float32), stored.float())
    assert opened[name].shape == tuple(want.shape) and len(opened[name]) == 53


def test_bfloat16_bits_are_rounded_as_torch_rounds_them():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, np.uint32)
    special = [0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x7FFFFFFF, 0x80000000, 0x00008000, 0x00018000]
    values = np.concatenate([bits, np.array(special, np.uint32)]).view(np.float32)
    want = torch.from_numpy(values).bfloat16().float().numpy()
    got = from_bfloat16(to_bfloat16(values))
    np.testing.assert_array_equal(got, want)


def test_means_are_what_mean_ablation_takes(model, path):
    names = NAMES[:2]
    gl.record(model, ROWS, names, path, dtype="bfloat16")
    opened = gl.open_activations(path)
    means = opened.means()
    for name in names:
        assert means[name] == pytest.approx(np.asarray(opened[name]).mean(0), abs=1e-5)
    run = model.run(ROWS[0], capture=names[1], edit={names[1]: gl.edits.mean(means)})
    np.testing.assert_array_equal(
        run[names[1]], np.broadcast_to(means[names[1]], run[names[1]].shape)
    )


def test_any_reader_finds_names_and_metadata(model, path):
    gl.record(model, ROWS, "blocks.1.hook_resid_post", path)
    with safe_open(path, "numpy") as file:
        assert file.get_slice("layers.1.resid_post")[10:12].shape == (2, 96)
        metadata = file.metadata()
    assert metadata["format"] == "gemloupe.activations" and metadata["model"] == "demo:moe"
    assert (metadata["inputs"], metadata["complete"]) == ("4", "true")
    shown = repr(gl.open_activations(path))
    assert "53 rows of 4 inputs" in shown and "layers.1.resid_post  F32 [53, 96]" in shown


def test_a_file_in_the_way_is_kept_unless_it_may_be_replaced(model, path):
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        gl.record(model, ROWS, "embed", path)
    with pytest.raises(ValueError, match="float16 holds"):
        huge = {"layers.1.resid_post": gl.edits.set(1e5)}
        gl.record(
            model, ROWS, "layers.1.resid_post", path, edit=huge, dtype="float16", overwrite=True
        )
    assert path.read_text() == "mine" and listing(path.parent) == [path.name]
    gl.record(model, ROWS, "embed", path, overwrite=True)
    assert gl.open_activations(path).rows == 53
    folder = path.parent / "folder"
    folder.mkdir()
    with pytest.raises(FileExistsError, match="can be replaced"):
        gl.record(model, ROWS, "embed", folder, overwrite=True)


def test_a_disk_without_room_is_noticed_before_anything_is_computed(model, path, monkeypatch):
    usage = SimpleNamespace(total=10**9, used=10**9, free=20_000)
    monkeypatch.setattr(activation_file.shutil, "disk_usage", lambda _path: usage)
    monkeypatch.setattr(model, "run", lambda *a, **k: pytest.fail("computed"))
    with pytest.raises(OSError, match=r"for 53 rows; its disk has 19.53 KiB") as error:
        gl.record(model, ROWS, "embed", path)
    assert error.value.errno == 28 and not listing(path.parent)


@pytest.mark.parametrize("active", [True, False], ids=["set_adapter", "adapter="])
def test_what_an_adapter_adds_is_recorded(tmp_path, path, active):
    model = gl.load("demo:moe")
    model.load_adapter(write_adapter(tmp_path / "a", "demo:moe"))
    names = ["layers.1.resid_post", "lora.a.layers.1.attn.q_proj"]
    if active:
        model.set_adapter("a")
    gl.record(model, ROWS, names, path, adapter=None if active else "a")
    model.set_adapter(None)
    for name, stored in gl.open_activations(path).items():
        want = [model.run(ids, capture=names, adapter="a")[name] for ids in ROWS]
        np.testing.assert_array_equal(stored, np.concatenate(want))
    with pytest.raises(KeyError, match="is no change of an adapter"):
        gl.record(model, ROWS, names, tmp_path / "other")


@pytest.mark.parametrize("known", [True, False], ids=["list", "generator"])
@pytest.mark.parametrize("format", ["safetensors", "saelens"])
def test_ctrl_c_leaves_a_file_of_the_inputs_that_are_done(model, tmp_path, known, format):
    calls = []

    def interrupt(x, at):
        if at.phase == "prefill" and at.layer == 0:
            calls.append(len(x))
        if len(calls) == 3 and at.layer == 4:
            signal.raise_signal(signal.SIGINT)

    size = {"context_size": 4} if format == "saelens" else {}
    capture = NAMES[0] if size else NAMES
    with pytest.raises(KeyboardInterrupt):
        gl.record(
            model, ROWS if known else iter(ROWS), capture, tmp_path / "acts", format=format,
            edit={"layers.*.mlp.out": interrupt}, logits="last", **size,
        )  # fmt: skip
    assert listing(tmp_path) == ["acts"]
    done = np.concatenate([model.run(ids, capture=NAMES[0])[NAMES[0]] for ids in ROWS[:2]])
    if format == "saelens":
        values, ids = contexts(tmp_path / "acts", "blocks.1.hook_resid_post")
        np.testing.assert_array_equal(values.reshape(-1, 96), done[:8])
        assert ids.ravel().tolist() == [*ROWS[0], *ROWS[1]][:8]
        return
    opened = gl.open_activations(tmp_path / "acts")
    assert not opened.complete and "interrupted" in repr(opened)
    np.testing.assert_array_equal(opened[NAMES[0]], done)
    assert opened.ids.tolist() == [*ROWS[0], *ROWS[1]] and opened[NAMES[2]].shape == (10, 2)


def test_ctrl_c_before_the_first_input_and_errors_leave_nothing(model, tmp_path):
    def fail_at(number, error):
        for index, ids in enumerate(ROWS):
            if index == number:
                raise error
            yield ids

    for number, error in ((0, KeyboardInterrupt), (2, LookupError)):
        with pytest.raises(error):
            gl.record(model, fail_at(number, error), NAMES, tmp_path / "acts")
        with pytest.raises(error):
            gl.record(
                model, fail_at(number, error), "embed", tmp_path / "acts",
                format="saelens", context_size=4,
            )  # fmt: skip
        assert not listing(tmp_path)


def contexts(folder: Path, column: str) -> tuple[np.ndarray, np.ndarray]:
    state = json.loads((folder / "state.json").read_text())
    tables = []
    for file in state["_data_files"]:
        with pyarrow.memory_map(str(folder / file["filename"])) as source:
            tables.append(pyarrow.ipc.open_stream(source).read_all())
    table = pyarrow.concat_tables(tables)
    values = np.array(table[column].to_pylist(), np.float32)
    return values, np.array(table["token_ids"].to_pylist())


def test_the_format_of_saelens_is_its_dataset(model, tmp_path):
    folder = tmp_path / "acts"
    for _ in range(2):  # The second one replaces the first.
        gl.record(
            model, ROWS, "layers.2.attn.z", folder, format="saelens", context_size=8, overwrite=True
        )
    assert listing(tmp_path) == ["acts"]
    values, ids = contexts(folder, "blocks.2.attn.hook_z")
    want = np.concatenate([model.run(row, capture=NAMES[1])[NAMES[1]] for row in ROWS])
    np.testing.assert_array_equal(values, want.reshape(53, -1)[:48].reshape(6, 8, -1))
    assert ids.ravel().tolist() == [token for row in ROWS for token in row][:48]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="can be replaced"):
        gl.record(model, ROWS, NAMES[0], folder, format="saelens", context_size=8, overwrite=True)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"capture": "layers.1.resid_pots"}, KeyError, "resid_post"),
        ({"capture": ()}, ValueError, "no hook point"),
        ({"capture": "layers.1.attn.pattern"}, ValueError, r"\[N, T, S\]"),
        ({"capture": "layers.1.attn.keys"}, ValueError, "changes with every input"),
        ({"capture": {"embed": None, "layers.1.mlp.out": -1}}, ValueError, "two files"),
        ({"capture": {"embed": gl.at(999)}}, ValueError, "no position in any of the 4 inputs"),
        ({"capture": "logits"}, ValueError, "logits is None"),
        ({"dtype": "int8"}, ValueError, "'float32', 'float16' or 'bfloat16'"),
        ({"format": "parquet"}, ValueError, "'safetensors' or 'saelens'"),
        ({"context_size": 8}, ValueError, "None for"),
        ({"format": "saelens"}, ValueError, "context_size is None"),
        ({"format": "saelens", "context_size": 8, "dtype": "bfloat16"}, ValueError, "'float16'"),
        ({"format": "saelens", "context_size": 8, "capture": NAMES}, ValueError, "one point"),
        ({"inputs": {"role": "user"}}, TypeError, "expected texts"),
        ({"inputs": 7}, TypeError, "expected texts"),
        ({"inputs": iter(())}, ValueError, "at least one input"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_and_leave_nothing(model, path, arguments, error, match):
    given = {"inputs": ROWS, "capture": "embed", **arguments}
    with pytest.raises(error, match=match):
        gl.record(model, given.pop("inputs"), given.pop("capture"), path, **given)
    assert not listing(path.parent)


def edited(path: Path, change) -> Path:
    """Rewrites the header: `change` gets and changes the parsed JSON."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode().ljust(length)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return path


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda h: h.pop("__metadata__"), "format None"),
        (lambda h: h["__metadata__"].update(version="2"), "version '2'"),
        (lambda h: h["__metadata__"].update(reduced="[1"), "not JSON"),
        (lambda h: h["__metadata__"].update(reduced='{"a": "sum"}'), "mean, norm or last"),
        (lambda h: h.update(idz=h.pop("ids")), "'ids' is missing"),
        (lambda h: h["embed"].update(shape=[53 * 96]), r"\[5088\]; expected"),
        (lambda h: h["embed"].update(shape=[2**40, 96]), "bytes"),
        (lambda h: h["embed"].update(dtype="I64", shape=[53, 48]), "I64"),
        (lambda h: h["ids"].update(dtype="F32"), "expected I32"),
        (lambda h: h["input"].update(shape=[]), "bytes"),
        (lambda h: h["embed"].update(data_offsets=[0, 10]), "10 bytes"),
    ],
)
def test_hostile_files_are_value_errors(model, path, change, match):
    gl.record(model, ROWS, "embed", path)
    with pytest.raises(ValueError, match=match):
        gl.open_activations(edited(path, change))


def test_cut_and_foreign_files_are_value_errors(model, path):
    gl.record(model, ROWS, "embed", path)
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError):
            gl.open_activations(path)
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"gl\.record"):
        gl.open_activations(path)
    with pytest.raises(FileNotFoundError):
        gl.open_activations(path.parent / "none")


def test_an_unknown_point_names_the_nearest(model, path):
    gl.record(model, ROWS, NAMES, path)
    with pytest.raises(KeyError, match=r"layers\.1\.resid_post"):
        gl.open_activations(path)["layers.1.resid_pots"]


@pytest.mark.parametrize("known", [True, False], ids=["list", "generator"])
def test_memory_does_not_grow_with_the_number_of_inputs(tmp_path, known):
    """300 MiB in one file, with less than 60 MiB more memory than one input needs."""
    program = f"""
        import resource
        import gemloupe as gl
        model = gl.load("demo:moe", threads=1)
        ids = [2, *range(10, 265)]
        points = ["layers.*.resid_post", "layers.*.experts.each", "layers.*.attn.z"]
        gl.record(model, [ids] * 2, points, {str(tmp_path / "a")!r})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        inputs = [ids] * 130
        gl.record(model, inputs if {known} else iter(inputs), points, {str(tmp_path / "b")!r})
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], check=True, capture_output=True, text=True
    ).stdout
    assert (tmp_path / "b").stat().st_size > 300 << 20
    assert int(output) < 60 << 10
