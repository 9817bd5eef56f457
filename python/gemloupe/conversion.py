"""Writes packed checkpoints: `gl.convert` and `gemloupe convert`.

Everything goes into a folder of another name beside the destination, which is renamed when all of
it is on the disk: a conversion that ends early, however it ends, leaves nothing that loads. What a
killed one left is removed by the next conversion beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemloupe import _core, packed, recipe, sizes
from gemloupe.adapters import baking
from gemloupe.checkpoint import Checkpoint, open_checkpoint
from gemloupe.errors import format_bytes, quoted
from gemloupe.model import check_threads, rounds_scale, stored_weights
from gemloupe.progress import ProgressBar

# Beside config.json and generation_config.json: what tokenizer and chat template read.
_SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "chat_template.jinja", "chat_template.json", "processor_config.json",
    "preprocessor_config.json",
)  # fmt: skip
_LOCK = "lock"
_SIDE_BYTES = 64 << 20  # Room for these files and the header.
_TOWER_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: str | Mapping[str, str] = "int4",
    *,
    adapter: Any = None,
    force: bool = False,
    threads: int | None = None,
) -> Path:
    """Writes `source` as a packed checkpoint folder, which loads in no time; returns the folder.

    `source` and `dtype` are what `load` takes; the packed folder then gives the same logits, bit
    for bit, as `load(source, dtype)`. "auto" keeps the values of a GGUF or W4A16 checkpoint and
    copies a packed one. Vision and audio tensors are copied as they are. It needs little memory:
    tensors pass through it in parts.

    `adapter`: a PEFT folder or hub id, a list or {folder: weight} for several: folded into the
    weights before they are rounded. It needs room on the disk for the float32 values of what
    changes. ValueError for what no weights can hold: lora_bias, and an embedding that changes
    otherwise than the head that it is tied to. Changed tensors of towers are rounded to the type
    that they are stored in.

    `force` replaces a destination that is a packed folder too. Raises FileExistsError for any
    other destination that exists, OSError where the disk is too small or fails, and as `load`.
    """
    recipe.check(dtype)
    checkpoint = open_checkpoint(source)
    target = Path(os.fspath(destination)).expanduser()
    target = target.parent.resolve() / target.name
    _check_destination(checkpoint, target, force)
    wanted = _targets(checkpoint, dtype)
    remove_leftovers(target.parent)
    baked = None if adapter is None else baking.prepare(source, adapter)
    _check_disk(checkpoint, target, wanted, baked.nbytes if baked else 0)
    with _partial_folder(target.parent) as partial:
        changed = baked.write(partial) if baked else None
        _write_weights(checkpoint, partial, dtype, wanted, changed, check_threads(threads))
        if changed:
            changed.path.unlink()
        _write_side_files(checkpoint, partial)
        _sync(partial)
        _check_destination(checkpoint, target, force)  # Another process may have made it meanwhile.
        _publish(partial, target)
    (target / _LOCK).unlink(missing_ok=True)  # Not before: it keeps the folder from being removed.
    return target


def remove_leftovers(parent: Path) -> list[Path]:
    """Removes what killed conversions left in a folder; what a running one fills is kept."""
    removed = []
    for path in parent.glob(packed.PARTIAL + "*"):
        with _locked(path) as is_ours:
            if is_ours:
                shutil.rmtree(path, ignore_errors=True)
                removed.append(path)
    return removed


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Gives whether the folder's lock was free; a process that ends frees its locks."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _partial_folder(parent: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=packed.PARTIAL, dir=parent))
    folder.chmod(0o777 & ~_umask())
    with _locked(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _check_destination(checkpoint: Checkpoint, target: Path, force: bool) -> None:
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"{target}: the folder {quoted(str(target.parent))} doesn't exist; expected the place "
            "for a new folder. Make it first."
        )
    if not os.path.lexists(target):
        return
    if not force:
        raise FileExistsError(
            f"{target}: exists already; expected a new folder's name. Give another one, or replace "
            "a packed checkpoint with force=True (--force)."
        )
    if target.is_symlink() or not packed.is_packed(target):
        raise FileExistsError(
            f"{target}: exists and is no packed checkpoint; force replaces only those. Give "
            "another name."
        )
    if target.resolve() == checkpoint.folder.resolve():
        raise FileExistsError(f"{target}: is the source itself. Give another name.")


def _targets(checkpoint: Checkpoint, dtype: recipe.Dtype) -> dict[str, str]:
    """Name -> dtype in the file, for every tensor: a matrix as `load` holds it, float32 vectors."""
    matrices = sizes.weight_targets(checkpoint, dtype)
    return {name: matrices.get(name, "float32") for name in checkpoint.text_tensors}


def _tower_names(checkpoint: Checkpoint) -> list[str]:
    return [
        name
        for names in checkpoint.towers.values()
        for name in names
        if checkpoint.tensors[name].info.dtype in (*_TOWER_DTYPES, *recipe.PLAIN)
    ]


def _check_disk(
    checkpoint: Checkpoint, target: Path, wanted: Mapping[str, str], beside: int
) -> None:
    text = checkpoint.text_tensors
    needed = sum(recipe.nbytes(dtype, text[name].shape) for name, dtype in wanted.items())
    for name in _tower_names(checkpoint):
        info = checkpoint.tensors[name].info
        needed += info.end - info.begin
    needed += _SIDE_BYTES + beside
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{target}: needs {format_bytes(needed)} on the disk; {format_bytes(free)} are free. "
            "Free some, or give a folder on another disk",
        )


def _write_weights(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: recipe.Dtype,
    wanted: Mapping[str, str],
    changed: baking.Changed | None,
    threads: int,
) -> None:
    source = changed.over(checkpoint) if changed else checkpoint
    weights = stored_weights(source, wanted, full_names=True)
    prefix = checkpoint.prefix
    tensors = [(prefix + name, name == recipe.TABLE) for name in wanted]
    towers: dict[int, list[_core.TensorEntry]] = {}
    for name in _tower_names(source):
        number, info = source.tensors[name]
        towers.setdefault(number, []).append(
            _core.TensorEntry(name, info.dtype, list(info.shape), info.begin, info.end)
        )
        tensors.append((name, False))
    for number, entries in towers.items():
        weights.add_file(str(source.files[number]), entries)
    provenance = _provenance(checkpoint, dtype)
    if changed:
        provenance["adapter"] = changed.label
        both = f"{provenance['source_hash']} {changed.digest}"
        provenance["source_hash"] = hashlib.sha256(both.encode()).hexdigest()
    metadata = json.dumps(provenance)
    path = folder / packed.FILE_NAME
    with ProgressBar(f"writing {recipe.name_of(dtype)} weights") as bar:
        _core.write_packed(weights, str(path), tensors, metadata, threads, bar.show)


def _provenance(checkpoint: Checkpoint, dtype: recipe.Dtype) -> dict[str, object]:
    made = checkpoint.provenance
    if made is not None:  # A copy: it has the same source.
        return {name: value for name, value in vars(made).items() if value != ""}
    preset = recipe.name_of(dtype)
    return {
        "dtype": checkpoint.dtype if preset == "auto" else preset,
        "recipe": {"default": dtype} if isinstance(dtype, str) else dict(dtype),
        "embed_scale": "bfloat16" if rounds_scale(preset, "auto", checkpoint) else "float32",
        "source": checkpoint.source,
        "source_hash": _source_hash(checkpoint),
        "source_dtype": checkpoint.dtype,
        "gemloupe": _core.__version__,
    }


def _source_hash(checkpoint: Checkpoint) -> str:
    """Of config.json and the weight files' headers: whole files would take minutes."""
    digest = hashlib.sha256(json.dumps(checkpoint.config.raw, sort_keys=True).encode())
    for name, (number, info) in sorted(checkpoint.tensors.items()):
        place = f"{name} {info.dtype} {info.shape} {number} {info.begin} {info.end}\n"
        digest.update(place.encode())
    for path in checkpoint.files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def _write_side_files(checkpoint: Checkpoint, folder: Path) -> None:
    config = {k: v for k, v in checkpoint.config.raw.items() if k != "quantization_config"}
    _write_json(folder / "config.json", config)
    if checkpoint.generation_config:
        _write_json(folder / "generation_config.json", checkpoint.generation_config)
    if not checkpoint.is_gguf:
        for name in _SIDE_FILES:
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, folder / name)
        return
    tokenizer = checkpoint.new_tokenizer()
    if not tokenizer.exists:
        return
    (folder / "tokenizer.json").write_text(tokenizer.backend.to_str(), "utf-8")
    _write_json(folder / "tokenizer_config.json", tokenizer.settings)
    template = tokenizer.chat_template
    if not template.is_default:
        (folder / "chat_template.jinja").write_text(template.templates["default"], "utf-8")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _sync(folder: Path) -> None:
    """Waits until the folder and its small files are on the disk; the engine did so for its own."""
    for path in [*folder.iterdir(), folder]:
        if path.name == packed.FILE_NAME:
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(partial: Path, target: Path) -> None:
    """Renames the folder to its destination; one that is there already is replaced in one step."""
    if not target.exists():
        os.rename(partial, target)
    elif not _exchange(partial, target):
        # An old file system: for a moment there is neither.
        old = Path(tempfile.mkdtemp(prefix=packed.PARTIAL, dir=target.parent))
        os.rename(target, old / "replaced")
        os.rename(partial, target)
        shutil.rmtree(old, ignore_errors=True)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step, where kernel and file system can."""
    current_folder, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    names = os.fsencode(first), os.fsencode(second)
    return rename(current_folder, names[0], current_folder, names[1], exchange) == 0
