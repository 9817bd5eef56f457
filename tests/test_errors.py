"""What users read when something is wrong; every text is a snapshot and says what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import errors as hub_errors

from gemloupe import errors, sizes
from gemloupe.checkpoint import open_checkpoint, resolve
from snapshot_texts import assert_is_snapshot


@pytest.fixture(autouse=True)
def _empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder and a hub cache of the test's own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def hub_answers(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)


def http_error(kind: type[Exception], text: str = "") -> Exception:
    """An error of huggingface_hub without the response that its constructor asks for."""
    error = kind.__new__(kind)
    error.args = (text,)
    return error


def test_misspelt_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_answers(monkeypatch, http_error(hub_errors.RepositoryNotFoundError))
    with pytest.raises(FileNotFoundError) as error:
        open_checkpoint("google/gema-4-E2B-it")
    assert_is_snapshot("errors", "misspelt hub id", str(error.value))


def test_gated_model(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_answers(monkeypatch, http_error(hub_errors.GatedRepoError))
    with pytest.raises(PermissionError) as error:
        open_checkpoint("google/gemma-4-E2B-it")
    assert_is_snapshot("errors", "gated model", str(error.value))


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub_answers(monkeypatch, hub_errors.LocalEntryNotFoundError("no connection"))
    with pytest.raises(ConnectionError) as error:
        open_checkpoint("google/gemma-4-E2B-it")
    assert_is_snapshot("errors", "no network", str(error.value))


def test_hub_switched_off(tmp_path: Path) -> None:
    (tmp_path / "cache" / "models--google--gemma-4-E4B-it").mkdir(parents=True)
    with pytest.raises(ConnectionError) as error:  # HF_HUB_OFFLINE=1 is set for all tests.
        open_checkpoint("google/gemma-4-E2B-it")
    assert_is_snapshot("errors", "hub switched off", str(error.value))


def test_hub_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_answers(monkeypatch, http_error(hub_errors.HfHubHTTPError, "503 Server Error\nmore"))
    with pytest.raises(ConnectionError) as error:
        open_checkpoint("google/gemma-4-E2B-it")
    assert_is_snapshot("errors", "hub refuses", str(error.value))


def test_misspelt_folder(tmp_path: Path) -> None:
    for name in ("gemma-4-e2b", "gemma-4-e4b", "notes"):
        (tmp_path / "here" / name).mkdir()
    (tmp_path / "here" / "models" / "edge").mkdir(parents=True)
    for name, source in {
        "misspelt folder": "./gema-4-e2b",
        "misspelt bare name": "gemma-4-2b",
        "misspelt absolute folder": str(tmp_path / "here" / "gemma4-e4b"),
        "no parent folder": str(tmp_path / "nowhere" / "model"),
        "nothing alike": "zebra",
        "a hub id that a folder hides": "models/edgy",
        "gguf": "some/gemma-4-E2B-Q4.gguf",
    }.items():
        with pytest.raises(FileNotFoundError) as error:
            open_checkpoint(source)
        assert_is_snapshot("errors", name, str(error.value), folder=tmp_path)


def test_files_that_are_no_checkpoint_folders(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name, source in {
        "a weight file": str(tmp_path / "model.safetensors"),
        "an empty source": "",
        "a source that is a number": 4,
        "an unknown demo": "demo:edgy",
    }.items():
        with pytest.raises(ValueError) as error:
            resolve(source)  # type: ignore[arg-type]
        assert_is_snapshot("errors", name, str(error.value), folder=tmp_path)


def test_folders_without_a_checkpoint(tiny: Callable, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()

    def message(kind: type[Exception] = FileNotFoundError) -> str:
        with pytest.raises(kind) as error:
            open_checkpoint(bare)
        return str(error.value)

    assert_is_snapshot("errors", "an empty folder", message(), folder=tmp_path)
    (bare / "model.gguf").touch()
    assert_is_snapshot("errors", "a folder of gguf", message(), folder=tmp_path)
    (bare / "model.gguf").unlink()
    shutil.copytree(tiny("31b")[1], bare / "inside")
    assert_is_snapshot("errors", "the folder above", message(), folder=tmp_path)
    (bare / "adapter_config.json").write_text("{}")
    assert_is_snapshot("errors", "an adapter", message(ValueError), folder=tmp_path)
    shutil.copy(bare / "inside" / "config.json", bare)
    (bare / "adapter_config.json").unlink()
    assert_is_snapshot("errors", "a config without weights", message(), folder=tmp_path)
    (bare / "pytorch_model-00001-of-00002.bin").touch()
    assert_is_snapshot("errors", "pickled weights", message(), folder=tmp_path)


def test_gemma_3_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3", "text_config": {}}')
    with pytest.raises(ValueError) as error:
        open_checkpoint(tmp_path)
    assert_is_snapshot("errors", "a Gemma 3 folder", str(error.value), folder=tmp_path)


def test_model_larger_than_memory_names_what_fits() -> None:
    options = [("dtype='bfloat16'", 9 << 30), ("a shorter context", 10 << 30)]
    error = errors.does_not_fit("this model in float32", 18 << 30, 12 << 30, options)
    assert isinstance(error, MemoryError)
    assert_is_snapshot("errors", "model larger than memory", str(error))
    nothing = errors.does_not_fit("this model", 60 << 30, 12 << 30, [])
    assert_is_snapshot("errors", "model larger than memory, nothing fits", str(nothing))


def test_missing_extra_gives_the_pip_line() -> None:
    error = errors.missing_extra("matplotlib", "gl.plot", "plot")
    assert isinstance(error, ImportError)
    assert_is_snapshot("errors", "missing extra", str(error))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"dtype": "float64"}, "estimate: unknown dtype"),
        ({"kv_dtype": "int3"}, "estimate: unknown kv_dtype"),
        ({"context": 200_000}, "estimate: context too long"),
        ({"context": 0}, "estimate: no context"),
    ],
)
def test_estimate_refuses(arguments: dict, name: str) -> None:
    with pytest.raises(ValueError) as error:
        sizes.estimate("E2B", **arguments)
    assert_is_snapshot("errors", name, str(error.value))


def test_close_matches_ignore_case_and_keep_the_spelling() -> None:
    names = ["resid_post", "resid_pre", "attn.out"]
    assert errors.close_matches("Resid_Pots", names)[0] == "resid_post"
    assert errors.did_you_mean("zzz", names) == ""
    assert errors.did_you_mean("atn.out", names) == "Did you mean 'attn.out'?"


def test_long_and_strange_names_are_cut_and_escaped() -> None:
    text = errors.quoted("a\x1b[31m" + "b" * 5000)
    assert len(text) < 90
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (5 << 40, "5.00 TiB")]
)
def test_byte_counts_are_written_in_binary_units(count: int, text: str) -> None:
    assert errors.format_bytes(count) == text
