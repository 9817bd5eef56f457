"""A PEFT folder: finds it, reads its config and its tensors; both come from strangers."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gemloupe import hub, safetensors_header
from gemloupe.adapters.adapter_config import CONFIG_NAME, AdapterConfig, read_adapter_config
from gemloupe.errors import bullet_list, close_matches, one_of, quoted
from gemloupe.safetensors_header import TensorInfo

WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
_STORED: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter whose config and tensor names have been read."""

    source: str
    folder: Path
    config: AdapterConfig
    tensors: tuple[TensorInfo, ...] = field(repr=False)
    identity: tuple[tuple[int, ...], ...] = field(repr=False)
    """Device, inode, size and time of both files: the same for the same content."""

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS_NAME

    @property
    def config_path(self) -> Path:
        return self.folder / CONFIG_NAME

    def read(self, tensor: TensorInfo, *, infinite: bool = False) -> np.ndarray:
        """Returns a tensor as float32, which holds bfloat16 and float16 exactly.

        ValueError where the file was cut short meanwhile, or a value is not finite (`infinite`: is
        not a number).
        """
        with self.weights.open("rb") as file:
            file.seek(tensor.begin)
            data = file.read(tensor.end - tensor.begin)
        if len(data) != tensor.end - tensor.begin or self.identity != _identity(self.folder):
            raise ValueError(f"{self.weights}: the file changed while it was read. Load it again.")
        values = widened(data, tensor.dtype).reshape(tensor.shape)
        wrong = np.isnan(values) if infinite else ~np.isfinite(values)
        if wrong.any():
            count = int(wrong.sum())
            raise ValueError(
                f"{self.weights}: {quoted(tensor.name)} holds {count} values that are not finite; "
                "expected numbers. The training diverged, or the file is damaged."
            )
        return values


def widened(data: bytes, dtype: str) -> np.ndarray:
    """Stored values of F32, BF16 or F16 as float32 [n]."""
    array = np.frombuffer(data, _STORED[dtype])
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(array, np.float32)


def open_folder(source: str | os.PathLike[str]) -> AdapterFolder:
    """Reads a PEFT folder's config and header; `source` is a folder or a hub id.

    Raises FileNotFoundError (saying which folders below hold adapters), ConnectionError, and
    ValueError for pickles, damaged files and what can't be run.
    """
    folder = _find(source)
    config_path = folder / CONFIG_NAME
    if not config_path.is_file():
        raise _no_adapter(folder)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        pickles = [name for name in _PICKLES if (folder / name).is_file()]
        if pickles:
            raise ValueError(
                f"{folder / pickles[0]}: a pickle, which can run code when it is opened; expected "
                f"{WEIGHTS_NAME}. Save the adapter again with a current PEFT, which writes that."
            )
        raise FileNotFoundError(
            f"{weights}: no such file; expected the adapter's weights. Finish the download, or "
            "save the adapter again."
        )
    identity = _identity(folder)
    config = read_adapter_config(config_path)
    tensors = tuple(safetensors_header.read_header(weights))
    return AdapterFolder(os.fspath(source), folder, config, tensors, identity)


def _identity(folder: Path) -> tuple[tuple[int, ...], ...]:
    stats = [(folder / name).stat() for name in (CONFIG_NAME, WEIGHTS_NAME)]
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in stats)


def _find(source: str | os.PathLike[str]) -> Path:
    text = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(
            f"adapter is {quoted(source)}; expected a PEFT folder, or a hub id such as 'owner/name'"
        )
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(
            f"{text}: this is a file; expected the folder that holds it and {CONFIG_NAME}: "
            f"{quoted(str(path.parent))}"
        )
    if isinstance(source, str) and hub.is_id(text) and not path.parent.is_dir():
        return hub.download_adapter(text)
    siblings = []
    if path.parent.is_dir():
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    near = [str(path.parent / name) for name in close_matches(path.name, siblings)]
    advice = f"Did you mean {one_of(near)}?" if near else "Check the path."
    raise FileNotFoundError(f"{text}: no such folder; expected a PEFT adapter. {advice}")


def _no_adapter(folder: Path) -> FileNotFoundError:
    below = sorted(p.parent for p in folder.glob(f"*/{CONFIG_NAME}"))
    text = f"{folder}: there is no {CONFIG_NAME} here; expected a PEFT adapter."
    if below:
        # Numbers in order: checkpoint-500 comes before checkpoint-1500.
        below.sort(key=lambda path: (len(path.name), path.name))
        names = bullet_list([str(path) for path in reversed(below)])
        return FileNotFoundError(f"{text} These folders in it hold one; give one of them:\n{names}")
    if (folder / "config.json").is_file():
        return FileNotFoundError(f"{text} This is a whole model: gl.load({quoted(str(folder))})")
    return FileNotFoundError(f"{text} Give the folder that PEFT's save_pretrained wrote.")
