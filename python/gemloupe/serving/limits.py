"""What a server takes from strangers, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """Bounds of one server. Bytes are bytes, tokens are those of the model."""

    max_rows: int = 8
    """Rows that decode at once; a pass of the engine takes eight."""
    max_queue: int = 64
    """Rows that wait for their turn; more are refused with 429."""
    spare_requests: int = 32
    """Requests beside those that run or wait: being read, refused, tokenised."""
    max_body: int = 16 << 20
    max_schema: int = 64 << 10
    """Of a response_format, as JSON."""
    max_prompt: int | None = None
    """Tokens; None for what the model reads."""
    max_new_tokens: int = 4096
    """What a request may ask for; one that asks for nothing gets as many."""
    max_choices: int = 8
    """`n` of a request, times its prompts."""
    max_images: int = 16
    max_sounds: int = 4
    max_videos: int = 2
    max_video_pixels: int = 1 << 32
    """Of all frames of one video: two minutes of 1280 x 720 at 30 a second are 3.3 billion."""
    max_transcribed: float = 600.0
    """Seconds of one sound for /v1/audio/transcriptions."""
    max_capture: int = 64 << 20
    """Bytes of the activations that one row may capture."""
    kv_bytes: int | None = None
    """Memory for the keys and values of all rows; None for half of what is free at the start."""
    prefix_bytes: int | None = None
    """Memory for what prompts begin with, of each model; 0 for none, None for a tenth of what is
    free at the start, at most 4 GiB."""
    body_seconds: float = 30.0
    """How long a client may take to send its body."""


@dataclass(frozen=True)
class Access:
    """Who may use a server."""

    api_key: str | None = None
    anybody: bool = False
    """Whether a server that others reach may do without a key."""
    hosts: tuple[str, ...] = ()
    """Names that a Host header may have, beside this machine's own; () for any."""
    origins: tuple[str, ...] = ()
    """Web pages (scheme://host) that may call, beside this machine's own."""
    page: bool = True
    """Whether browsers get the web page at `/`, for which they need no key."""
    adapter_folder: Path | None = None
    """Where clients may load adapters from; None: nowhere."""
