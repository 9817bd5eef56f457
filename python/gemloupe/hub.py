"""Downloads checkpoints by hub id, and says plainly what is wrong where that fails."""

from __future__ import annotations

import re
from pathlib import Path

from gemloupe.config import read_config
from gemloupe.errors import did_you_mean, quoted, sentences
from gemloupe.variants import VARIANTS, Variant

# Weights, configs, tokenizer and chat template; no pickles, no code.
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)

_RELEASED = [hub_id for variant in VARIANTS.values() for hub_id in variant.hub_ids]


def is_id(text: str) -> bool:
    """True for "owner/name" in the letters that the hub allows."""
    return _ID.fullmatch(text) is not None


def download(repo_id: str) -> Path:
    """Returns the local folder of a hub checkpoint, downloading what is not cached.

    The config is fetched and checked first, so that a model of another family costs nothing. Bars
    show the progress. Raises FileNotFoundError for an id that does not exist, PermissionError for
    one whose terms have not been accepted, ConnectionError where the hub is out of reach, and
    ValueError where the config is not one of Gemma 4.
    """
    config = download_config(repo_id) / "config.json"
    if config.is_file():
        read_config(config)
    return _snapshot(repo_id, _PATTERNS)


def download_config(repo_id: str) -> Path:
    """Returns the local folder of a checkpoint with at least its config.json; errors as above."""
    return _snapshot(repo_id, ("config.json",))


def download_adapter(repo_id: str) -> Path:
    """Returns the local folder of a PEFT adapter; errors as above."""
    return _snapshot(repo_id, ("adapter_config.json", "adapter_model.safetensors"))


def _snapshot(repo_id: str, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=list(patterns)))
    except errors.GatedRepoError:
        raise PermissionError(
            f"{repo_id}: its owner asks for consent to the terms of use first. Accept them on the "
            "model's page, then sign in with: hf auth login"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise _no_such_model(repo_id) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        raise _out_of_reach(repo_id) from None
    except errors.HfHubHTTPError as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise ConnectionError(
            f"{repo_id}: the hub refused the download: {first_line}. Try again later, or give a "
            "folder on this machine."
        ) from error


def _no_such_model(repo_id: str) -> FileNotFoundError:
    advice = sentences(
        did_you_mean(repo_id, [*_RELEASED, *_cached_ids()]),
        "Check the spelling; for a private model sign in with: hf auth login",
    )
    return FileNotFoundError(
        f"{quoted(repo_id)}: no such folder here, and no such model on the hub. {advice}"
    )


def _out_of_reach(repo_id: str) -> ConnectionError:
    from huggingface_hub import constants

    reason = (
        "the hub is switched off by HF_HUB_OFFLINE=1"
        if constants.HF_HUB_OFFLINE
        else "the hub can't be reached"
    )
    cached = _cached_ids()
    in_cache = did_you_mean(repo_id, cached)
    advice = sentences(
        in_cache,
        "Connect to the network" if not constants.HF_HUB_OFFLINE else "Unset HF_HUB_OFFLINE",
    )
    return ConnectionError(
        f"{quoted(repo_id)}: no such folder here, it is not in the download cache, and {reason}. "
        f'{advice}, give a folder on this machine, or load "demo:edge", which needs no download.'
    )


def _cached_ids() -> list[str]:
    """Returns the ids of the models in the hub's cache on this machine."""
    from huggingface_hub import constants

    try:
        names = [path.name for path in Path(constants.HF_HUB_CACHE).iterdir()]
    except OSError:
        return []
    return [
        n.removeprefix("models--").replace("--", "/") for n in names if n.startswith("models--")
    ]


def released(repo_id: str) -> Variant | None:
    """Returns the released model of this id, in any case, or None."""
    for variant in VARIANTS.values():
        if repo_id.lower() in (hub_id.lower() for hub_id in variant.hub_ids):
            return variant
    return None
