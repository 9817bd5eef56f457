"""The dataset of activations that SAELens reads: what stands in its files, and what is refused.

tests/parity/saelens_package.py reads it with sae_lens itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest

import gemloupe as gl
from gemloupe.integrations.saelens import ActivationWriter, dataset

HOOK = "blocks.1.hook_resid_post"


def read(path: Path) -> tuple[np.ndarray, np.ndarray, pyarrow.Schema]:
    """Activations [contexts, context_size, d_in], ids [contexts, context_size], the schema."""
    state = json.loads((path / "state.json").read_text())
    tables = []
    for file in state["_data_files"]:
        with pyarrow.memory_map(str(path / file["filename"])) as source:
            tables.append(pyarrow.ipc.open_stream(source).read_all())
    table = pyarrow.concat_tables(tables)
    return (
        np.array(table[HOOK].to_pylist()),
        np.array(table["token_ids"].to_pylist()),
        table.schema,
    )


def write(path: Path, values: np.ndarray, *, context_size: int, step: int, **options: str) -> None:
    with ActivationWriter(
        path, HOOK, d_in=values.shape[1], context_size=context_size, **options
    ) as writer:
        for begin in range(0, len(values), step):
            place = slice(begin, begin + step)
            writer.add(values[place], np.arange(len(values))[place])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("step", [1, 7, 50])
def test_contexts_hold_the_rows_in_order_whatever_the_calls(
    tmp_path: Path, step: int, dtype: str
) -> None:
    values = np.random.default_rng(0).standard_normal((50, 3)).astype(dtype)
    write(tmp_path / "acts", values, context_size=4, step=step, dtype=dtype)
    got, ids, schema = read(tmp_path / "acts")
    assert np.array_equal(got.reshape(-1, 3).astype(dtype), values[:48])
    assert np.array_equal(ids, np.arange(48).reshape(12, 4))
    assert schema.field("token_ids").type == pyarrow.list_(pyarrow.int32(), 4)


def test_long_data_is_split_into_batches_and_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "_BATCH_BYTES", 200)
    monkeypatch.setattr(dataset, "_SHARD_BYTES", 1000)
    values = np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32)
    write(tmp_path / "acts", values, context_size=4, step=33)
    got, _, _ = read(tmp_path / "acts")
    assert np.array_equal(got.reshape(-1, 3).astype(np.float32), values)
    names = sorted(path.name for path in (tmp_path / "acts").iterdir())
    shards = [name for name in names if name.startswith("data-")]
    assert len(shards) > 2 and shards[1] == f"data-00001-of-{len(shards):05d}.arrow"
    assert names == [*shards, "dataset_info.json", "state.json"]


def extension_of(field: pyarrow.Field) -> tuple[str, bytes]:
    """The name and parameters of an extension type; pyarrow knows it if `datasets` is loaded."""
    if isinstance(field.type, pyarrow.BaseExtensionType):
        return field.type.extension_name, field.type.__arrow_ext_serialize__()
    marks = field.metadata
    return marks[b"ARROW:extension:name"].decode(), marks[b"ARROW:extension:metadata"]


def test_the_column_is_declared_as_a_matrix_of_datasets(tmp_path: Path) -> None:
    write(tmp_path / "acts", np.ones((8, 3), np.float32), context_size=4, step=8)
    _, _, schema = read(tmp_path / "acts")
    name, parameters = extension_of(schema.field(HOOK))
    assert name == "datasets.features.features.Array2DExtensionType"
    assert json.loads(parameters) == [[4, 3], "float32"]
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features[HOOK] == {"shape": [4, 3], "dtype": "float32", "_type": "Array2D"}
    info = json.loads((tmp_path / "acts" / "dataset_info.json").read_text())
    assert info["features"] == features


def test_a_run_of_a_model_becomes_contexts(tmp_path: Path) -> None:
    model = gl.load("demo:edge")
    run = model.run("What is 27 + 45?", capture="layers.1.resid_post", logits=None)
    values = run["layers.1.resid_post"]
    with ActivationWriter(tmp_path / "a", HOOK, d_in=values.shape[1], context_size=4) as writer:
        writer.add(values, run.prompt.ids)
        assert writer.contexts == len(values) // 4 and writer.left_over == len(values) % 4
    got, ids, _ = read(tmp_path / "a")
    assert np.array_equal(got.reshape(-1, values.shape[1]), values[: got.shape[0] * 4])
    assert ids.reshape(-1).tolist() == run.prompt.ids[: ids.size].tolist()


def test_after_an_error_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_BATCH_BYTES", 1)
    with pytest.raises(ZeroDivisionError):
        with ActivationWriter(tmp_path / "acts", HOOK, d_in=3, context_size=1) as writer:
            writer.add(np.ones((5, 3)), range(5))
            assert list((tmp_path / "acts").iterdir())
            raise ZeroDivisionError
    assert not list((tmp_path / "acts").iterdir())
    with pytest.raises(ValueError, match="is closed"):
        writer.add(np.ones((5, 3)), range(5))


def test_too_few_tokens_for_one_context_are_an_error(tmp_path: Path) -> None:
    writer = ActivationWriter(tmp_path / "acts", HOOK, d_in=3, context_size=8)
    writer.add(np.ones((5, 3)), range(5))
    with pytest.raises(ValueError, match="5 tokens fill no context of 8"):
        writer.close()
    writer.close()  # A second call does nothing.


@pytest.mark.parametrize(
    ("values", "ids", "error", "text"),
    [
        (np.ones((2, 4)), [1, 2], ValueError, r"shape \[2, 4\]; expected \[n, 3\]"),
        (np.ones((2, 3)), [1], ValueError, r"token_ids has shape \[1\]; expected \[2\]"),
        (np.ones((2, 3)), [0.5, 1], TypeError, "float64"),
        (np.full((2, 3), 1e5), [1, 2], ValueError, "float16 holds"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, values: np.ndarray, ids: list, error: type[Exception], text: str
) -> None:
    writer = ActivationWriter(tmp_path / "acts", HOOK, d_in=3, context_size=2, dtype="float16")
    with pytest.raises(error, match=text):
        writer.add(values, ids)
    assert writer.contexts == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"d_in": 0}, "d_in is 0"),
        ({"context_size": 2.5}, "context_size is 2.5"),
        ({"dtype": "bfloat16"}, "'float32' or 'float16'"),
        ({"d_in": 2**20, "context_size": 2**12}, "at most"),
        ({"hook_name": "token_ids"}, "hook_name"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, options: dict, text: str) -> None:
    arguments = {"hook_name": HOOK, "d_in": 3, "context_size": 4, **options}
    with pytest.raises(ValueError, match=text):
        ActivationWriter(tmp_path / "acts", **arguments)
    assert not (tmp_path / "acts").exists()


def test_a_folder_that_holds_something_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="new or empty folder"):
        ActivationWriter(tmp_path, HOOK, d_in=3, context_size=4)
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"gemloupe\[parquet\]"):
        ActivationWriter(tmp_path / "acts", HOOK, d_in=3, context_size=4)
